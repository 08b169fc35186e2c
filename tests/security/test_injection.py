"""Names and texts that try to be SQL: they are data, or they are refused, and nothing else happens.

Names of schemas are the only ones that become part of a statement, so they are tried everywhere
that takes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import InvalidArgument, Item, Message, QueueService, metadata, migrations
from pgqrs_sa._core.scope import Context
from pgqrs_sa.cli.admin import script
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.grants import grants
from pgqrs_sa.migrations.install import install, uninstall
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.pgqrs.database import models_in
from support.cases import each_case

TEXTS = [
    "'; DROP TABLE pgqrs_messages; --",
    "'); DELETE FROM pgqrs_queues; --",
    '"; DROP SCHEMA public CASCADE; --',
    "' OR '1'='1",
    "x' UNION SELECT passwd FROM pg_shadow --",
    "\\'; DROP TABLE pgqrs_messages; --",
    "$$; DROP TABLE pgqrs_messages; $$",
    "%s %(queue)s %% %d",
    ":queue :ids ::text @name $1 ?",
    "{queue} {0} {{}}",
    "back\\slash \\n \\x00 \\u0000",
    "e'\\047; SELECT 1; --",
    'two "quoted" words',
    "naïve 名前 نص 🐘",
    "right\u202eto left\u200b, \ufeffunseen",
    "line\nbreak\r\n\ttab",
    "\x1b[31mred\x07",
    "/* comment */ -- comment",
]
SCHEMAS = [
    "'; DROP TABLE pgqrs_messages; --",
    '"; DROP SCHEMA public CASCADE; --',
    "%s %(queue)s %% %d",
    ":queue :ids ::text @name $1 ?",
    "back\\slash \\n \\x00 $$ e'\\047",
    'two "quoted" words, {0} {{}}',
    "naïve 名前 نص 🐘",
    "line\nbreak /* comment */ -- comment",
]
NAMES_THAT_LOOK_LIKE_SQL = [
    "select",
    "NULL",
    "pgqrs_messages",
    "pg_catalog.pg_class",
    "a--b",
    "a:b::text",
    "1/0",
    "public.pgqrs_queues--",
    "DROP-TABLE:pgqrs_messages",
]


@pytest.fixture(autouse=True)
def untouched(migrated: Any) -> Iterator[None]:
    """After each attempt the schema is the same, and so is a message in it."""
    engine = sa.create_engine(migrated.url, poolclass=sa.NullPool)

    def shape(connection: sa.Connection) -> Any:
        names = sa.text(
            "SELECT table_name, column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = 'public' ORDER BY 1, 2"
        )
        return connection.execute(names).all()

    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.queues.create("canary")
        service.enqueue("canary", "alive")
        before = shape(session.connection())
    yield
    with Session(engine) as session:
        assert shape(session.connection()) == before
        (found,) = QueueService(session).messages.find("canary")
        assert found.payload == "alive"


@each_case("text", TEXTS)
def test_a_queue_is_not_called_so_by_the_api_nor_by_the_database(engine, text: str) -> None:
    with Session(engine) as session:
        service = QueueService(session)
        sent: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
        for attempt in (
            lambda: service.queues.create(text),
            lambda: service.enqueue(text, 1),
            lambda: service.dequeue(text),
            lambda: service.queues.purge(text),
            lambda: service.queues.delete(text, force=True),
            lambda: service.messages.find(text),
            lambda: service.workers.register("w", queues=[text]),
            lambda: Message(queue_name=text, payload=1),
        ):
            with pytest.raises(InvalidArgument, match="is no queue name"):
                attempt()
        assert sent == []
        values = {"name": text}
        with pytest.raises(sa.exc.IntegrityError, match="pgqrs_queues_queue_name_check"):
            session.execute(sa.text("INSERT INTO pgqrs_queues (queue_name) VALUES (:name)"), values)


@each_case("name", NAMES_THAT_LOOK_LIKE_SQL)
def test_a_queue_may_be_called_like_a_piece_of_sql(session, name: str) -> None:
    service = QueueService(session)
    service.queues.create(name)
    service.enqueue(name, 1)
    service.enqueue_many(name, [2, Item(3, key="k")])
    service.enqueue_from(name, sa.select(sa.literal(4)))
    session.add(Message(queue_name=name, payload=5))
    assert sorted(message.payload for message in service.messages.peek(name, 9)) == [1, 2, 3, 4, 5]
    service.archive_many(service.dequeue(name, 2))
    assert service.messages.metrics(name).archived == 2
    assert service.workers.register("w", queues=[name]).queues == [name]
    assert len(service.workers.list(queue=name)) == 1
    service.archived.prune(0, queue=name)
    service.queues.pause(name)
    assert service.queues.purge(name) == 3
    service.queues.delete(name)
    session.commit()


@each_case("text", TEXTS)
def test_a_text_comes_back_letter_by_letter_wherever_it_was_given(session, text: str) -> None:
    service = QueueService(session)
    service.queues.create("mail")
    worker = service.workers.register(text, hostname=text, version=text, queues=["mail"])
    assert (worker.name, worker.hostname, worker.version) == (text, text, text)
    payload = {text: [text, {"deep": text}]}
    receipt = service.enqueue("mail", payload, key=text, headers={text: text})
    assert service.enqueue("mail", 0, key=text).id == receipt.id
    assert service.enqueue_many("mail", [Item(payload, key=text, headers={text: text})])[
        0
    ].duplicate
    assert service.messages.count("mail", payload={text: [text]}) == 1
    assert service.messages.count("mail", where=Message.dedup_key == text) == 1
    (delivery,) = service.dequeue("mail", worker=worker, where=Message.dedup_key == text)
    assert (delivery.payload, delivery.headers, delivery.key) == (payload, {text: text}, text)
    service.fail(delivery, text, reason=text, dead=True)
    (letter,) = service.archived.find("mail", payload=payload)
    assert (letter.last_error, letter.reason, letter.key) == (text, text, text)
    service.archived.requeue(letter.id)
    assert service.messages.cancel_where("mail", payload={text: [text]}, reason=text) == 1
    session.add(Message(queue_name="mail", payload=payload, dedup_key=text, headers={text: text}))
    query = sa.select(sa.literal(text).label("payload"), sa.literal(text + "2").label("key"))
    assert service.enqueue_from("mail", query) == 1
    (added, selected) = service.dequeue("mail", 2)
    assert (added.payload, selected.payload) == (payload, text)
    session.commit()
    service.queues.delete("mail", force=True)
    session.commit()


@each_case("text", SCHEMAS)
def test_the_name_of_a_schema_is_a_name_and_nothing_else(engine, text: str) -> None:
    """Made, worked with in both ways of naming it, examined, granted and taken away again."""
    moved = engine.execution_options(schema_translate_map={None: text})
    name = f"{text[:40]} role"
    role = '"{}"'.format(name.replace('"', '""'))
    with engine.begin() as connection:
        assert install(connection, text) == 0
        assert install(connection, text) == migrations.LATEST
        assert migrations.current_version(connection, text) == migrations.LATEST
        assert sa.inspect(connection).has_table("pgqrs_messages", schema=text)
    own = models_in(text)
    for bind, models in ((moved, None), (engine, own)):
        with Session(bind) as session, session.begin():
            service = QueueService(session, models=models)
            service.check_schema()
            service.queues.create("mail")
            service.enqueue_many("mail", [1, 2, Item(3, key=text)])
            cls: Any = Message if models is None else models.message
            session.add(cls(queue_name="mail", payload=4))
            deliveries = service.dequeue("mail", 4)
            service.archive_many(deliveries[:2])
            service.delete_many(deliveries[2:])
            service.archived.prune(0)
            service.queues.delete("mail", force=True)
        with Session(bind) as session:
            context = Context.of(models or READY_MADE, None, None, allow_autocommit=True)
            assert diagnose(session, context, only=("schema", "drift")) == []
    with engine.begin() as connection:
        run = connection.connection.driver_connection.execute  # as psql does: no parameters
        run(f"CREATE ROLE {role}")
        for kind in ("producer", "consumer", "dashboard", "operator", "migrator"):
            for line in grants(kind, name, text):
                run(line)
        run(f"DROP OWNED BY {role}")
        run(f"DROP ROLE {role}")
        assert uninstall(connection, text) == migrations.LATEST
        assert sa.inspect(connection).get_table_names(schema=text) == []
        connection.execute(sa.schema.DropSchema(text))


@each_case("text", SCHEMAS)
def test_a_script_for_such_a_schema_runs_as_it_is_printed(engine, text: str) -> None:
    """What ``pgqrs schema sql --schema`` prints, sent as psql would send it."""
    raw = engine.raw_connection()
    try:
        raw.driver_connection.execute(script(0, migrations.LATEST, text))
        with raw.driver_connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname = %s", [text])
            assert cursor.fetchone() == (4,)
        raw.driver_connection.execute(script(migrations.LATEST, 0, text))
        raw.driver_connection.commit()
    finally:
        raw.close()
    with engine.begin() as connection:
        connection.execute(sa.schema.DropSchema(text))


def test_a_schema_whose_name_no_database_can_hold_is_an_error(engine) -> None:
    for name in ("a\0b", "a\ud800b"):
        with (
            engine.connect() as connection,
            pytest.raises((sa.exc.DBAPIError, UnicodeError, ValueError)),
        ):
            install(connection, name)


def test_the_tables_of_one_schema_are_not_those_of_another_with_a_name_like_it(engine) -> None:
    """Case, quotes and blanks tell schemas apart; PostgreSQL folds and trims unquoted names."""
    names = ["jobs", "Jobs", "JOBS", " jobs", "jobs ", '"jobs"', "jobs;", "jöbs", "jo'bs", "job%s"]
    with engine.begin() as connection:
        for name in names:
            install(connection, name)
    for n, name in enumerate(names, 1):
        moved = engine.execution_options(schema_translate_map={None: name})
        with Session(moved) as session, session.begin():
            service = QueueService(session)
            service.queues.create("mail")
            service.enqueue_many("mail", range(n))
    for n, name in enumerate(names, 1):
        moved = engine.execution_options(schema_translate_map={None: name})
        with Session(moved) as session:
            assert QueueService(session).messages.metrics("mail").ready == n
            taken = QueueService(session).dequeue("mail", limit=100)
            assert len(taken) == n
            QueueService(session).archive_many(taken)
            sequence = sa.Sequence("pgqrs_messages_fencing_token_seq", schema=name)
            drawn = session.connection().dialect.identifier_preparer.format_sequence(sequence)
            drawn = sa.text(f"SELECT last_value FROM {drawn}".replace("%%", "%"))  # noqa: S608
            assert session.scalar(drawn) == max(delivery.fencing_token for delivery in taken)
    with engine.begin() as connection:
        for name in names:
            connection.execute(sa.schema.DropSchema(name, cascade=True))
        assert metadata.tables.keys() <= set(sa.inspect(connection).get_table_names())

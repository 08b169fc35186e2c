"""What each role must not do, tried one by one by a role that has logged in.

``tests/doctor/test_grants.py`` shows that each kind of role can do its work; here everything is
refused with SQLSTATE 42501, insufficient privilege, and nothing in the database is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Item, Message, QueueService, metadata
from support.cases import each_case

from .conftest import empty

Attempt = Callable[[QueueService, Session], Any]


def sql(text: str) -> Attempt:
    return lambda _, session: session.connection().exec_driver_sql(text)


NOBODY: dict[str, Attempt] = {
    # What no role that works with the queue may do: change what it is.
    "drop a table": sql("DROP TABLE pgqrs_archive"),
    "drop an index": sql("DROP INDEX pgqrs_messages_order_idx"),
    "add a column": sql("ALTER TABLE pgqrs_messages ADD COLUMN evil text"),
    "drop a constraint": sql("ALTER TABLE pgqrs_queues DROP CONSTRAINT pgqrs_queues_pkey"),
    "take the table": sql("ALTER TABLE pgqrs_messages OWNER TO CURRENT_USER"),
    "add a trigger": sql(
        "CREATE TRIGGER evil BEFORE INSERT ON pgqrs_messages"
        " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    ),
    "add a rule": sql("CREATE RULE evil AS ON DELETE TO pgqrs_messages DO INSTEAD NOTHING"),
    "add a policy": sql("CREATE POLICY evil ON pgqrs_messages USING (true)"),
    "hide the rows": sql("ALTER TABLE pgqrs_messages ENABLE ROW LEVEL SECURITY"),
    "forge the version": sql("COMMENT ON TABLE pgqrs_queues IS 'pgqrs_sa:schema=99'"),
    "make a table": sql("CREATE TABLE evil ()"),
    "empty the archive": sql("TRUNCATE pgqrs_archive"),
    "move the ids": sql("SELECT setval('pgqrs_messages_id_seq', 1)"),
    "become the owner": sql("SET SESSION AUTHORIZATION postgres"),
    "run a program": sql("COPY (SELECT 1) TO PROGRAM 'true'"),
    "read a file": sql("SELECT pg_read_file('/etc/passwd')"),
    "give a message another payload": sql("UPDATE pgqrs_messages SET payload = '1'"),
    "give a message another key": sql("UPDATE pgqrs_messages SET dedup_key = 'stolen'"),
    "move a message to another queue": sql("UPDATE pgqrs_messages SET queue_id = 2"),
    "rename a queue": sql("UPDATE pgqrs_queues SET queue_name = 'evil'"),
    "rewrite history": sql("UPDATE pgqrs_archive SET archived_at = now()"),
    "rewrite an outcome": sql("UPDATE pgqrs_archive SET outcome = 'archived'"),
}

PRODUCER: dict[str, Attempt] = {
    "get a message": lambda service, _: service.messages.get(1),
    "count messages by state": lambda service, _: service.messages.count("mail", state="leased"),
    "see all metrics": lambda service, _: service.messages.all_metrics(),
    "cancel by payload": lambda service, _: service.messages.cancel_where("mail", payload={}),
    "look for orphans": lambda service, _: service.orphans(),
    "get an archived message": lambda service, _: service.archived.get(1),
    "count the archive": lambda service, _: service.archived.count(),
    "bury": lambda service, _: service.archived.bury("mail"),
    "requeue": lambda service, _: service.archived.requeue(1),
    "prune": lambda service, _: service.archived.prune(0),
    "forget archived messages": lambda service, _: service.archived.delete([1]),
    "raise the limit of a queue": lambda s, _: s.queues.update("mail", max_payload_bytes=2**30),
    "resume a queue": lambda service, _: service.queues.resume("mail"),
    "see a worker": lambda service, _: service.workers.get(1),
    "keep a worker alive": lambda service, _: service.workers.heartbeat(1),
    "suspend a worker": lambda service, _: service.workers.suspend(1),
    "reclaim": lambda service, _: service.workers.reclaim(silent_for=1),
    "free a worker's leases": lambda service, _: service.workers.release_leases(1),
    "dequeue for a worker": lambda service, _: service.dequeue("mail", worker=1),
    "read what it has written": sql(
        "INSERT INTO pgqrs_messages (queue_id, payload) VALUES (1, '1') RETURNING payload"
    ),
    "overwrite by its key": sql(
        "INSERT INTO pgqrs_messages (queue_id, payload, dedup_key) VALUES (1, '1', 'k')"
        " ON CONFLICT (queue_id, dedup_key) WHERE dedup_key IS NOT NULL"
        " DO UPDATE SET payload = excluded.payload"
    ),
    "enqueue in the past": sql(
        "INSERT INTO pgqrs_messages (queue_id, payload, enqueued_at) VALUES (1, '1', 'epoch')"
    ),
    "enqueue what is leased": sql(
        "INSERT INTO pgqrs_messages (queue_id, payload, leased_until) VALUES (1, '1', 'infinity')"
    ),
    "add what is leased": lambda _, session: (
        session.add(Message(queue_id=1, payload=1, leased_until=datetime.now(UTC))),
        session.flush(),
    ),
    "lease a message": sql("UPDATE pgqrs_messages SET leased_until = 'infinity'"),
    "see leases": sql("SELECT leased_until FROM pgqrs_messages"),
    "copy the messages out": sql("COPY pgqrs_messages (payload) TO STDOUT"),
    "see headers": sql("SELECT headers FROM pgqrs_messages"),
    "see errors": sql("SELECT last_error FROM pgqrs_messages"),
    "see workers": sql("SELECT hostname FROM pgqrs_workers"),
    "lock a message": sql("SELECT id FROM pgqrs_messages FOR UPDATE"),
    "hide a message": sql("UPDATE pgqrs_messages SET vt = 'infinity'"),
    "make a queue": sql("INSERT INTO pgqrs_queues (queue_name) VALUES ('evil')"),
    "delete a queue": sql("DELETE FROM pgqrs_queues"),
    "guess a payload by an index": sql("SELECT 1 FROM pgqrs_messages WHERE payload @> '{}'"),
}

CONSUMER: dict[str, Attempt] = {
    "enqueue by a query": lambda service, _: service.enqueue_from("mail", sa.select(sa.literal(1))),
    "enqueue with a key": lambda service, _: service.enqueue_many("mail", [Item(1, key="x")]),
    "add by id of the queue": lambda _, session: (
        session.add(Message(queue_id=1, payload=1)),
        session.flush(),
    ),
    "get an archived message": lambda service, _: service.archived.get(1),
    "count by payload": lambda service, _: service.archived.count(payload={}),
    "requeue many": lambda service, _: service.archived.requeue_many([1, 2]),
    "resume a queue": lambda service, _: service.queues.resume("mail"),
    "change a queue": lambda service, _: service.queues.update("mail", max_read_ct=99),
    "delete an empty queue": lambda service, _: service.queues.delete("empty"),
    "delete a worker": lambda service, _: service.workers.delete(2),
    "make a message urgent": sql("UPDATE pgqrs_messages SET priority = -1"),
    "change headers": sql("UPDATE pgqrs_messages SET headers = NULL"),
    "backdate a message": sql("UPDATE pgqrs_messages SET enqueued_at = 'epoch'"),
    "change who produced it": sql("UPDATE pgqrs_messages SET producer_worker_id = 9"),
    "change the id of a message": sql("UPDATE pgqrs_messages SET id = 99 WHERE id = 1"),
    "backdate the archive": sql(
        "INSERT INTO pgqrs_archive (id, queue_id, payload, archived_at) VALUES (1, 1, '1', 'epoch')"
    ),
    "enqueue by SQL": sql("INSERT INTO pgqrs_messages (queue_id, payload) VALUES (1, '1')"),
    "change the id of an archived message": sql("UPDATE pgqrs_archive SET id = 99"),
    "see archived headers": sql("SELECT headers FROM pgqrs_archive"),
    "see archived errors": sql("SELECT last_error FROM pgqrs_archive"),
    "see reasons": sql("SELECT reason FROM pgqrs_archive"),
    "copy the archive out": sql("COPY pgqrs_archive TO STDOUT"),
    "see the payload that it archives": sql(
        "INSERT INTO pgqrs_archive (id, queue_id, payload) VALUES (99, 1, '1') RETURNING payload"
    ),
    "pass for another host": sql("UPDATE pgqrs_workers SET hostname = 'other'"),
    "pass for an older start": sql("UPDATE pgqrs_workers SET started_at = 'epoch'"),
    "take another worker's id": sql("UPDATE pgqrs_workers SET id = 9"),
    "choose a worker's id": sql(
        "INSERT INTO pgqrs_workers (id, name, hostname) VALUES (9, 'w', 'h')"
    ),
}

DASHBOARD: dict[str, Attempt] = {
    "get a message": lambda service, _: service.messages.get(1),
    "get an archived message": lambda service, _: service.archived.get(1),
    "guess a payload": lambda service, _: service.messages.count("mail", payload={"secret": 0}),
    "guess an archived payload": lambda service, _: service.archived.count(payload={"secret": 0}),
    "cancel": lambda service, _: service.messages.cancel(1),
    "cancel by state": lambda service, _: service.messages.cancel_where("mail", Message.ready),
    "reschedule": lambda service, _: service.messages.reschedule(1, delay=9),
    "enqueue many": lambda service, _: service.enqueue_many("mail", [1]),
    "purge": lambda service, _: service.queues.purge("mail"),
    "make a queue": lambda service, _: service.queues.create("evil"),
    "change a queue": lambda service, _: service.queues.update("mail", lease=1),
    "resume a queue": lambda service, _: service.queues.resume("mail"),
    "delete a queue": lambda service, _: service.queues.delete("empty"),
    "bury": lambda service, _: service.archived.bury("mail"),
    "requeue": lambda service, _: service.archived.requeue(1),
    "prune": lambda service, _: service.archived.prune(0),
    "forget archived messages": lambda service, _: service.archived.delete([1]),
    "register": lambda service, _: service.workers.register("w"),
    "keep a worker alive": lambda service, _: service.workers.heartbeat(1),
    "reclaim": lambda service, _: service.workers.reclaim(silent_for=1),
    "delete a worker": lambda service, _: service.workers.delete(2),
    "purge workers": lambda service, _: service.workers.purge(older_than=0),
    "copy the messages out": sql("COPY pgqrs_messages TO STDOUT"),
    "see archived keys": sql("SELECT dedup_key FROM pgqrs_archive"),
    "see archived headers": sql("SELECT headers FROM pgqrs_archive"),
    "see archived errors": sql("SELECT last_error FROM pgqrs_archive"),
    "see a whole row": sql("SELECT m FROM pgqrs_messages m"),
    "lock a message": sql("SELECT id FROM pgqrs_messages FOR SHARE"),
}

OPERATOR: dict[str, Attempt] = {
    "give a message other headers": sql("UPDATE pgqrs_messages SET headers = NULL"),
    "change who produced it": sql("UPDATE pgqrs_messages SET producer_worker_id = 9"),
    "backdate a message": sql("UPDATE pgqrs_messages SET enqueued_at = 'epoch'"),
    "give an archived message another payload": sql("UPDATE pgqrs_archive SET payload = '1'"),
    "backdate the archive": sql(
        "INSERT INTO pgqrs_archive (id, queue_id, payload, archived_at) VALUES (1, 1, '1', 'epoch')"
    ),
    "pass for another host": sql("UPDATE pgqrs_workers SET hostname = 'other'"),
}

# A role that may delete rows of a table may lock it, and an operator may delete queues.
LOCK = {"keep everybody out": sql("LOCK TABLE pgqrs_queues IN ACCESS EXCLUSIVE MODE")}

ATTEMPTS = {
    "producer": NOBODY | LOCK | PRODUCER,
    "consumer": NOBODY | LOCK | CONSUMER,
    "dashboard": NOBODY | LOCK | DASHBOARD,
    "operator": NOBODY | OPERATOR,
}


@pytest.fixture(scope="module")
def stocked(kept: Any) -> Iterator[sa.Engine]:
    """A queue with messages in every state, an empty one, and two workers, seen by the owner."""
    engine = sa.create_engine(kept.url)
    with engine.begin() as connection:
        empty(connection)
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.queues.create("mail")
        service.queues.create("empty")
        worker = service.workers.register("w", queues=["mail"])
        service.workers.stop(service.workers.register("gone").id)
        service.enqueue_many("mail", [{"secret": n} for n in range(6)])
        service.enqueue("mail", {"secret": 7}, key="k", headers={"token": "t"})
        service.dequeue("mail", worker=worker)
        service.archive_many(service.dequeue("mail", 2))
        service.fail(service.dequeue("mail")[0], "no", dead=True)
    yield engine
    engine.dispose()


def contents(engine: sa.Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        return {
            table.name: connection.execute(sa.select(table).order_by(table.c.id)).all()
            for table in metadata.sorted_tables
        }


@pytest.mark.parametrize("kind", ATTEMPTS)
def test_a_role_is_refused(kind: str, stocked: sa.Engine, login, subtests) -> None:
    for what, attempt in ATTEMPTS[kind].items():
        with subtests.test(what):
            before = contents(stocked)
            with Session(login(kind)) as session:
                with pytest.raises(sa.exc.ProgrammingError) as refused:
                    attempt(QueueService(session), session)
                assert refused.value.orig.sqlstate == "42501"
            assert contents(stocked) == before


@each_case("kind", list(ATTEMPTS))
def test_a_role_passes_no_rights_on(kind: str, stocked: sa.Engine, login) -> None:
    """PostgreSQL only warns a role that has some right, but may not grant it."""
    rights = sa.text("SELECT relname, relacl::text FROM pg_class WHERE relname LIKE 'pgqrs%'")
    with Session(login(kind)) as session, Session(stocked) as owner:
        before = owner.execute(rights).all()
        for grantee in ("PUBLIC", "CURRENT_USER"):
            for table in metadata.sorted_tables:
                try:
                    session.execute(sa.text(f"GRANT ALL ON {table.name} TO {grantee}"))
                except sa.exc.ProgrammingError:  # a role without any right is refused
                    session.rollback()
        session.commit()
        assert owner.execute(rights).all() == before


def test_each_role_is_tried_in_twenty_ways_at_least() -> None:
    assert all(len(attempts) >= 20 for attempts in ATTEMPTS.values())


def test_messages_pass_from_role_to_role(migrated, engine, login) -> None:
    """The whole way of a message, each step under the role whose it is."""

    def act(kind: str, step: Callable[[QueueService], Any]) -> Any:
        with Session(login(kind)) as session, session.begin():
            return step(QueueService(session))

    act("operator", lambda service: service.queues.create("mail"))
    receipt = act("producer", lambda service: service.enqueue("mail", {"n": 1}, key="k"))
    worker = act("consumer", lambda service: service.workers.register("w", queues=["mail"]))
    (delivery,) = act("consumer", lambda service: service.dequeue("mail", worker=worker))
    assert (delivery.id, delivery.payload) == (receipt.id, {"n": 1})
    delivery = act("consumer", lambda service: service.extend(delivery, 60))
    act("consumer", lambda service: service.fail(delivery, "no", dead=True))
    assert act("dashboard", lambda service: service.messages.metrics("mail")).dead == 1
    (letter,) = act("operator", lambda service: service.archived.find("mail"))
    act("operator", lambda service: service.archived.requeue(letter.id))
    (delivery,) = act("consumer", lambda service: service.dequeue("mail"))
    act("consumer", lambda service: service.archive(delivery))
    found = act("dashboard", lambda service: service.messages.metrics("mail"))
    assert (found.live, found.archived, found.dead) == (0, 1, 0)


def test_a_process_that_is_two_of_them_gets_the_rights_of_both_and_no_more(
    stocked: sa.Engine, login
) -> None:
    engine = login("producer", "consumer")
    with Session(engine) as session:
        service = QueueService(session)
        service.enqueue("mail", {"n": 1})
        assert service.dequeue("mail")
        session.rollback()
    for name in ("see archived errors", "make a message urgent", "change a queue"):
        with Session(engine) as session:
            with pytest.raises(sa.exc.ProgrammingError) as refused:
                CONSUMER[name](QueueService(session), session)
            assert refused.value.orig.sqlstate == "42501"


def test_a_role_without_any_grant_can_do_nothing(stocked: sa.Engine, login) -> None:
    with Session(login(more=("SELECT 1",))) as session:
        for table in metadata.sorted_tables:
            with pytest.raises(sa.exc.ProgrammingError) as refused:
                session.execute(sa.select(sa.func.count()).select_from(table))
            assert refused.value.orig.sqlstate == "42501"
            session.rollback()

"""Each kind of role under exactly its grants: what it must be able to do, and what it must not."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqrs_sa import (
    ArchivedMessageMixin,
    Item,
    Message,
    MessageMixin,
    Models,
    QueueMixin,
    QueueService,
    WorkerMixin,
    metadata,
)
from pgqrs_sa._core.scope import Context
from pgqrs_sa.cli.messages import STATES
from pgqrs_sa.cli.queries import count_live
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.errors import InvalidArgument
from pgqrs_sa.grants import ROLES, grants
from pgqrs_sa.models import READY_MADE


@pytest.fixture
def role(migrated, engine):
    """Return a function that makes a role of a kind, and an engine that works as it."""
    engines, names = [], []

    def make(kind, *more):
        name = f"pgqrs_{kind}"
        with engine.begin() as connection:
            if name not in names:
                connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
                connection.exec_driver_sql(f"CREATE ROLE {name}")
                names.append(name)
            for statement in (*grants(kind, name), *more):
                connection.exec_driver_sql(statement.format(name=name))
        options = {"options": f"-c role={name}"}
        engines.append(sa.create_engine(migrated.url, connect_args=options))
        return engines[-1]

    yield make
    for item in engines:
        item.dispose()
    with engine.begin() as connection:
        for name in names:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
            connection.exec_driver_sql(f"DROP ROLE {name}")


@pytest.fixture
def stocked(service, session):
    """A queue with messages in every state, and a worker."""
    service.workers.register("w")
    service.enqueue_many("mail", [{"secret": n} for n in range(12)])
    service.enqueue("mail", 1, max_read_ct=1, priority=-1)
    service.dequeue("mail", lease=0.001)
    service.archive(service.dequeue("mail")[0])
    service.fail(service.dequeue("mail")[0], "no", dead=True)
    session.commit()
    return service


def refused(engine, *attempts):
    """Every one of these must fail for want of a right."""
    for attempt in attempts:
        with Session(engine) as session:
            with pytest.raises(sa.exc.ProgrammingError) as caught:
                attempt(QueueService(session), session)
            assert caught.value.orig.sqlstate == "42501", attempt


def sql(text):
    return lambda _service, session: session.execute(sa.text(text))


def test_a_producer_enqueues_in_every_way(role, stocked):
    with Session(role("producer")) as session, session.begin():
        service = QueueService(session)
        service.check_schema()
        assert not service.enqueue("mail", {"a": 1}, key="k", headers={"t": 1}, delay=5).duplicate
        assert service.enqueue("mail", {"a": 1}, key="k").duplicate
        assert len(service.enqueue_many("mail", [1, Item(2, key="k"), Item(3, priority=4)])) == 3
        assert service.enqueue_from("mail", sa.select(sa.literal(7))) == 1
        query = sa.select(sa.literal(7).label("payload"), sa.literal("q").label("key"))
        assert service.enqueue_from("mail", query) == 1
        message = Message(queue_name="mail", payload={"b": 1}, delay=60, dedup_key="orm")
        session.add_all([message, Message(queue_name="mail", payload=2, headers={}, priority=3)])
        session.flush()
        assert message.vt > message.enqueued_at
        assert (message.state, message.leased_until) == ("scheduled", None)
        assert service.queues.get("mail").name == "mail"
        with pytest.raises(LookupError, match="did you mean 'mail'"):
            service.enqueue("mial", 1)


def test_a_producer_can_do_nothing_else(role, stocked):
    engine = role("producer")
    refused(
        engine,
        lambda service, _: service.dequeue("mail"),
        lambda service, _: service.messages.find("mail"),
        lambda service, _: service.messages.metrics("mail"),
        lambda service, _: service.messages.cancel(3),
        lambda service, _: service.messages.reschedule(3, delay=5),
        lambda service, _: service.queues.pause("mail"),
        lambda service, _: service.queues.create("other"),
        lambda service, _: service.queues.purge("mail"),
        lambda service, _: service.queues.delete("mail", force=True),
        lambda service, _: service.archived.find("mail"),
        lambda service, _: service.workers.list(),
        lambda service, _: service.workers.register("me"),
        lambda _, session: session.get(Message, 3),
        sql("SELECT payload FROM pgqrs_messages"),
        sql("UPDATE pgqrs_messages SET vt = now()"),
        sql("UPDATE pgqrs_messages SET leased_until = now()"),
        sql("INSERT INTO pgqrs_messages (queue_id, payload, leased_until) VALUES (1, '1', now())"),
        sql("DELETE FROM pgqrs_messages"),
        sql("INSERT INTO pgqrs_messages (id, queue_id, payload) VALUES (1, 1, '1')"),
        sql("INSERT INTO pgqrs_messages (queue_id, payload, read_ct) VALUES (1, '1', -7)"),
        sql("INSERT INTO pgqrs_archive (id, queue_id, payload) VALUES (1, 1, '1')"),
        sql("SELECT FROM pgqrs_queues FOR UPDATE"),
        sql("LOCK TABLE pgqrs_messages IN SHARE MODE"),
        sql("SELECT nextval('pgqrs_messages_id_seq')"),
        sql("TRUNCATE pgqrs_messages"),
    )


def test_a_consumer_leases_and_settles(role, stocked):
    with Session(role("consumer")) as session, session.begin():
        service = QueueService(session)
        service.check_schema()
        worker = service.workers.register("me", queues=["mail"])
        service.workers.heartbeat(worker.id, leased=0)
        batch = service.dequeue("mail", 8, worker=worker.id)
        batch += service.dequeue("mail", 1, where=Message.payload["secret"].as_integer() > 0)
        item, two, three, four, five, six, seven, eight, _ = batch
        service.archive(item)
        service.delete(two)
        service.extend(three, 60)
        service.release(four)
        service.release(service.dequeue("mail", worker=worker.id)[0], delay=60)
        assert not service.fail(five, "later").dead
        assert service.fail(six, "never", dead=True).dead
        service.archive(seven, outcome="discarded", reason="why")
        assert service.try_archive(item) is False
        assert service.archived.bury("mail") == 1
        with pytest.raises(Exception, match="archived"):
            service.archive_many([eight, item])
        assert service.workers.health()[-1].leases == 0
        assert service.workers.release_leases(worker.id) == 2
        service.workers.reclaim(silent_for=60)
        service.workers.suspend(worker.id)
        service.workers.resume(worker.id)
        service.workers.stop(worker.id)
        service.messages.find("mail")


def test_a_consumer_can_do_nothing_else(role, stocked):
    engine = role("consumer")
    refused(
        engine,
        lambda service, _: service.enqueue("mail", 1),
        lambda service, _: service.enqueue_many("mail", [1]),
        lambda _, session: (session.add(Message(queue_name="mail", payload=1)), session.flush()),
        lambda service, _: service.queues.create("other"),
        lambda service, _: service.queues.pause("mail"),
        lambda service, _: service.queues.update("mail", lease=5),
        lambda service, _: service.queues.delete("mail", force=True),
        lambda service, _: service.archived.find("mail"),
        lambda service, _: service.archived.requeue(1),
        lambda service, _: service.archived.delete([1]),
        lambda service, _: service.archived.prune(0),
        lambda service, _: service.workers.purge(older_than=0),
        sql("SELECT payload FROM pgqrs_archive"),
        sql("UPDATE pgqrs_messages SET payload = '1'"),
        sql("UPDATE pgqrs_messages SET queue_id = 2"),
        sql("UPDATE pgqrs_archive SET outcome = 'archived'"),
        sql("DELETE FROM pgqrs_archive"),
        sql("DELETE FROM pgqrs_workers"),
        sql("UPDATE pgqrs_workers SET name = 'x'"),
        sql("TRUNCATE pgqrs_messages"),
    )


def test_a_dashboard_counts(role, stocked, engine):
    with Session(role("dashboard")) as session:
        service = QueueService(session)
        service.check_schema()
        assert service.messages.all_metrics()[0].dead == 1
        assert service.messages.metrics("mail").exhausted == 1
        assert [queue.name for queue in service.queues.list()] == ["mail"]
        assert service.workers.list()[0].name == "w"
        assert service.workers.health()[0].worker.name == "w"
        assert service.messages.count() == service.messages.metrics("mail").live
        assert (
            service.messages.count("mail", state="ready") == service.messages.metrics("mail").ready
        )
        assert service.archived.count("mail", outcome="dead") == 1
        session.execute(sa.text("SELECT id, vt, read_ct FROM pgqrs_messages"))
        session.execute(sa.text("SELECT id, outcome, archived_at FROM pgqrs_archive"))


def test_a_dashboard_lists_messages_without_their_contents(role, stocked):
    with Session(role("dashboard")) as session:
        service = QueueService(session)
        live = service.messages.find("mail", content=False)
        assert {message.state for message in live} == {"ready", "exhausted"}
        assert service.messages.find(state="exhausted", content=False) == [
            message for message in live if message.state == "exhausted"
        ]
        settled = service.archived.find("mail", content=False, newest_first=True)
        assert [delivery.outcome for delivery in settled] == ["dead", "archived"]
        assert not any(case.content for case in (*live, *settled))


def test_a_dashboard_sees_no_contents_and_changes_nothing(role, stocked):
    engine = role("dashboard")
    refused(
        engine,
        lambda service, _: service.messages.find("mail"),
        lambda service, _: service.messages.peek("mail"),
        lambda service, _: service.archived.find("mail"),
        lambda service, _: service.enqueue("mail", 1),
        lambda service, _: service.dequeue("mail"),
        lambda service, _: service.queues.pause("mail"),
        lambda service, _: service.workers.stop(1),
        sql("SELECT payload FROM pgqrs_messages"),
        sql("SELECT headers FROM pgqrs_messages"),
        sql("SELECT dedup_key FROM pgqrs_messages"),
        sql("SELECT last_error FROM pgqrs_messages"),
        sql("SELECT payload FROM pgqrs_archive"),
        sql("SELECT reason FROM pgqrs_archive"),
        sql("DELETE FROM pgqrs_messages"),
    )


CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=True)


def test_a_dashboard_role_may_run_the_doctor(role, stocked):
    with Session(role("dashboard")) as session:
        (finding,) = diagnose(session, CONTEXT)
    assert finding.check == "rights"
    assert finding.fix == "GRANT pg_read_all_stats TO pgqrs_dashboard;"
    with Session(role("dashboard", "GRANT pg_read_all_stats TO {name}")) as session:
        assert diagnose(session, CONTEXT) == []


def test_the_doctor_without_temporary_tables(role, migrated, engine):
    takes = f"REVOKE TEMPORARY ON DATABASE {migrated.name} FROM PUBLIC"
    with Session(role("dashboard", takes, "GRANT pg_read_all_stats TO {name}")) as session:
        (finding,) = diagnose(session, CONTEXT)
    assert "may not make temporary tables" in finding.problem
    with engine.begin() as connection:
        connection.exec_driver_sql(finding.fix)
    with Session(role("dashboard", "GRANT pg_read_all_stats TO {name}")) as session:
        assert diagnose(session, CONTEXT) == []


def test_an_operator_does_everything(role, stocked):
    with Session(role("operator")) as session:
        service = QueueService(session)
        service.queues.create("other", lease=5)
        service.queues.update("other", max_read_ct=2)
        service.queues.pause("other")
        service.queues.resume("other")
        ids = [receipt.id for receipt in service.enqueue_many("other", range(4))]
        service.messages.cancel(ids[0])
        service.messages.cancel_where("other", payload=1)
        service.messages.reschedule(ids[2], delay=5)
        archived = service.archived.find("other")
        service.archived.requeue(archived[0].id)
        service.archived.delete([archived[1].id])
        service.archived.prune(0)
        service.archived.bury("mail")
        worker = service.workers.register("me")
        service.archive(service.dequeue("other", worker=worker)[0])
        service.workers.stop(worker.id)
        service.workers.purge(older_than=0)
        service.queues.purge("other")
        service.queues.delete("other", force=True)
        session.commit()


def test_an_operator_changes_no_table(role, stocked):
    refused(
        role("operator"),
        sql("DROP TABLE pgqrs_messages"),
        sql("TRUNCATE pgqrs_messages"),
        sql("UPDATE pgqrs_messages SET payload = '1'"),
        sql("CREATE TABLE pgqrs_more ()"),
    )


def test_a_migrator_makes_the_tables(migrated, engine, role):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA jobs")
        connection.exec_driver_sql("CREATE ROLE pgqrs_maker")
        for statement in grants("migrator", "pgqrs_maker", "jobs"):
            connection.exec_driver_sql(statement)
    try:
        maker = sa.create_engine(
            migrated.url,
            connect_args={"options": "-c role=pgqrs_maker"},
            execution_options={"schema_translate_map": {None: "jobs"}},
            poolclass=sa.NullPool,
        )
        with maker.begin() as connection:
            metadata.create_all(connection)
        refused(maker, sql("CREATE TABLE public.t ()"))
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY pgqrs_maker CASCADE")
            connection.exec_driver_sql("DROP ROLE pgqrs_maker")


def test_names_are_quoted():
    for kind in ROLES:
        text = "\n".join(grants(kind, 'the "boss" 5%', 'Jobs"'))
        assert text.count('TO "the ""boss"" 5%";') == len(text.splitlines())
        assert '"Jobs"""' in text


def test_a_hosts_columns_are_granted_too():
    class Own(DeclarativeBase):
        __pgqrs_schema__ = "jobs"

    class Queue(QueueMixin, Own): ...

    class Archived(ArchivedMessageMixin, Own):
        tenant_id: Mapped[int | None]

    class Worker(WorkerMixin, Own): ...

    class OwnMessage(MessageMixin, Own):
        tenant_id: Mapped[int | None] = mapped_column(sa.Integer)

    models = Models(Queue, OwnMessage, Archived, Worker)
    usage, *rest = grants("consumer", "app", models=models)
    assert usage == "GRANT USAGE ON SCHEMA jobs TO app;"
    (archive,) = (item for item in rest if " jobs.pgqrs_archive " in item)
    assert "tenant_id" in archive.partition("INSERT (")[2].partition(")")[0]
    assert "tenant_id" in grants("producer", "app", models=models)[2]


def test_a_kind_that_does_not_exist():
    with pytest.raises(InvalidArgument, match="producer, consumer, dashboard, operator, migrator"):
        grants("boss", "app")


@pytest.mark.parametrize("kind", ["consumer", "dashboard", "operator"])
def test_who_sees_live_messages_counts_them(role, stocked, kind):
    with Session(role(kind)) as session:
        QueueService(session).queues.get("mail")
        assert count_live(session, "mail", None) == 11
        counted = {state: count_live(session, "mail", state) for state in STATES}
    assert sum(counted.values()) == 11
    assert counted["exhausted"] == 1

"""Every other check: the problem is made for real, found, and gone once its fix has run."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService, embedded, metadata
from pgqrs_sa._core.scope import Context
from pgqrs_sa._core.sql import catalog, lease, settle
from pgqrs_sa._core.sql.fragments import LEASED
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.doctor import CHECKS, Thresholds, checks, diagnose
from pgqrs_sa.doctor.findings import CheckContext
from pgqrs_sa.errors import InvalidArgument
from pgqrs_sa.models import READY_MADE
from support.cases import each_case
from support.waiting import until

NOTHING = timedelta(0)
CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=True)


@contextmanager
def another(migrated, *statements):
    """A session of somebody else, which may be terminated meanwhile."""
    conn = psycopg.connect(migrated.dsn, application_name="forgetful", autocommit=True)
    try:
        for statement in statements:
            conn.execute(statement)
        yield conn
    finally:
        conn.close()


def test_a_check_that_does_not_exist(doctor):
    with pytest.raises(InvalidArgument, match="no check is called 'drfit'; there are schema, dri"):
        doctor("drfit")


def test_errors_come_first(doctor, sql):
    sql(
        "ALTER TABLE pgqrs_messages SET (autovacuum_vacuum_threshold = 5)\n"
        "COMMENT ON TABLE pgqrs_queues IS NULL"
    )
    assert [finding.severity for finding in doctor()] == ["error", "warning"]


# The schema's version.


def test_no_tables(database):
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with Session(engine) as session:
        (finding,) = diagnose(session, CONTEXT)
    assert finding.check == "schema"
    assert finding.fix == "pgqrs install"
    metadata.create_all(engine)
    with Session(engine) as session:
        assert diagnose(session, CONTEXT) == []


def test_no_version(fixed, sql):
    sql("COMMENT ON TABLE pgqrs_queues IS NULL")
    assert "without their version" in fixed().problem


@pytest.mark.parametrize(
    ("stamp", "problem", "fix"),
    [
        (0, "version 0 is older than 1", "alembic upgrade head"),
        (7, "version 7 is newer than 1", "pip install --upgrade pgqrs-sa"),
    ],
)
def test_another_version(doctor, sql, stamp, problem, fix):
    sql(
        f"COMMENT ON TABLE pgqrs_queues IS 'pgqrs_sa:schema={stamp}'\n"
        "DROP INDEX pgqrs_archive_queue_idx"
    )
    (finding,) = doctor()  # what another version's tables should be, nobody here knows
    assert problem in finding.problem
    assert fix in finding.fix
    assert finding.severity == "error"


# Promises.


def test_a_trigger(fixed, sql):
    sql(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'\n"
        "CREATE TRIGGER notify_me AFTER INSERT ON pgqrs_messages FOR EACH ROW EXECUTE FUNCTION f()"
    )
    assert fixed().subject == "notify_me"


def test_a_foreign_key_of_messages(fixed, sql):
    sql("ALTER TABLE pgqrs_messages ADD FOREIGN KEY (queue_id) REFERENCES pgqrs_queues")
    assert fixed().check == "promises"


@pytest.mark.parametrize("rule", ["", "ON DELETE RESTRICT", "DEFERRABLE INITIALLY DEFERRED"])
@pytest.mark.parametrize("required", ["", "NOT NULL"])
def test_a_foreign_key_to_messages_that_keeps_them(
    fixed, sql, service, session, rule, required, rows
):
    message = service.enqueue("mail", 1).id
    session.commit()
    sql(
        f"CREATE TABLE receipt (m bigint {required} REFERENCES pgqrs_messages {rule})\n"
        f"INSERT INTO receipt VALUES ({message})"
    )
    assert fixed().severity == "error"
    service.archive(service.dequeue("mail")[0])
    session.commit()
    assert rows("SELECT m FROM receipt")[0].m == (message if required else None)


def test_a_required_column_of_the_host(fixed, sql, service):
    sql("ALTER TABLE pgqrs_messages ADD tenant integer NOT NULL")
    assert "nothing can be inserted" in fixed().problem
    service.enqueue("mail", 1)


ADD = "ALTER TABLE pgqrs_messages ADD CONSTRAINT mine"
INDEXES = {
    "a key": 'CREATE INDEX "my ""own"" 5%" ON pgqrs_messages (queue_id, consumer_worker_id)',
    "a key that is unique": "CREATE UNIQUE INDEX mine ON pgqrs_messages (fencing_token)",
    "a column besides": "CREATE INDEX mine ON pgqrs_messages (enqueued_at) INCLUDE (leased_until)",
    "an expression": "CREATE INDEX mine ON pgqrs_messages ((read_ct + 1), queue_id)",
    "a predicate": "CREATE INDEX mine ON pgqrs_messages (queue_id) WHERE max_read_ct > 0",
    "a unique constraint": f"{ADD} UNIQUE (id, dequeued_at)",
    "an exclusion constraint": f"{ADD} EXCLUDE (queue_id WITH =) WHERE (dequeued_at > 'infinity')",
}


@pytest.fixture
def heap_only(service, session):
    """Return a function that leases three messages, and says whether it wrote no index."""
    worker = service.workers.register("w").id
    session.commit()

    def updates() -> Any:
        columns = "n_tup_upd AS written, n_tup_hot_upd AS heap_only"
        counted = f"SELECT {columns} FROM pg_stat_xact_user_tables WHERE relname = :name"  # noqa: S608
        return session.execute(sa.text(counted), {"name": "pgqrs_messages"}).one()

    def leases() -> bool:
        service.enqueue_many("mail", range(3))
        before = updates()
        assert len(service.dequeue("mail", 3, worker=worker)) == 3
        after = updates()
        session.rollback()
        assert after.written - before.written == 3
        assert after.heap_only - before.heap_only in {0, 3}
        return after.heap_only > before.heap_only

    return leases


def test_no_index_of_ours_names_a_column_that_a_lease_writes(engine):
    tables = tables_of(READY_MADE)

    def set_by(update: Any) -> set[str]:
        return {getattr(column, "name", column) for column in update._values}

    written, renewed = set_by(lease.dequeue(tables, by_worker=True)), set_by(settle.extend(tables))
    assert renewed < written == set(LEASED)
    oid = "SELECT CAST(to_regclass('pgqrs_messages') AS bigint)"
    with engine.connect() as connection:
        oids = [connection.scalar(sa.text(oid))]
        found = {
            name: connection.execute(catalog.indexes_on, {"oids": oids, "columns": columns}).all()
            for name, columns in {"written": list(LEASED), "vt": ["vt"]}.items()
        }
    assert found == {"written": [], "vt": [("pgqrs_messages_order_idx", ["vt"], None)]}


@each_case("index", list(INDEXES))
def test_an_index_that_each_lease_would_write(fixed, sql, heap_only, index):
    assert heap_only()
    sql(INDEXES[index])
    assert not heap_only()
    finding = fixed()
    assert (finding.check, finding.severity) == ("promises", "warning")
    assert finding.subject == ('my "own" 5%' if index == "a key" else "mine")
    assert heap_only()


@pytest.mark.parametrize(
    "index",
    [
        "(priority, enqueued_at) INCLUDE (producer_worker_id)",
        "USING gin (payload jsonb_path_ops)",
        "((payload ->> 'tenant')) WHERE headers IS NOT NULL",
        "(last_error) WHERE last_error IS NOT NULL",
    ],
)
def test_an_index_that_no_lease_writes(doctor, sql, heap_only, index):
    sql(f"CREATE INDEX mine ON pgqrs_messages {index}")
    assert heap_only()
    assert doctor() == []


def test_an_index_that_summarizes_pages(doctor, sql, heap_only):
    """From PostgreSQL 16 on such an index allows heap-only updates."""
    sql("CREATE INDEX mine ON pgqrs_messages USING brin (leased_until)")
    assert (doctor() == []) == heap_only()


# The server.


@pytest.mark.parametrize(("hours", "word"), [(1, "behind"), (-1, "ahead of")])
def test_the_clock_of_this_computer(doctor, monkeypatch, hours, word):
    monkeypatch.setattr(checks, "_now", lambda: datetime.now(UTC) + timedelta(hours=hours))
    (finding,) = doctor()
    assert finding.check == "clock"
    assert f"s {word} this computer's" in finding.problem


def test_a_transaction_that_stays_open(doctor, fixed, migrated):
    begin = ("BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT 1")
    with another(migrated, *begin) as forgetful:
        pid = forgetful.info.backend_pid
        assert doctor() == []
        finding = fixed("transactions", transaction_age=NOTHING)
        assert finding.fix == f"SELECT pg_terminate_backend({pid});"
        assert "forgetful" in finding.problem
        assert "idle in transaction" in finding.problem
        with pytest.raises(psycopg.OperationalError):
            forgetful.execute("SELECT 1")


def test_a_transaction_without_a_snapshot_harms_nobody(doctor, migrated):
    with another(migrated, "BEGIN", "SELECT 1"):
        assert doctor("transactions", transaction_age=NOTHING) == []


@pytest.fixture(scope="module")
def special():
    """A server for what the shared one cannot do."""
    settings = {"wal_level": "logical", "max_prepared_transactions": "5", "max_connections": "12"}
    with embedded.start(settings=settings) as server:
        url = server.dsn().replace("postgresql:", "postgresql+psycopg:", 1)
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        metadata.create_all(engine)
        yield engine


def found(engine, *only, **limits):
    with Session(engine) as session:
        return diagnose(session, CONTEXT, thresholds=Thresholds(**limits), only=only)


def paste(engine, script):
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        for line in script.splitlines():
            connection.exec_driver_sql(line)


def test_a_replication_slot_that_nobody_reads(special):
    paste(special, "SELECT pg_create_logical_replication_slot('it''s'::name, 'test_decoding')"
          .replace("it''s", "old_reader"))  # fmt: skip
    paste(special, "SELECT pg_current_xact_id()")
    assert found(special) == []
    (finding,) = found(special, "slots", slot_age=0)
    assert finding.subject == "old_reader"
    paste(special, finding.fix)
    assert found(special, "slots", slot_age=0) == []


def test_a_prepared_transaction(special):
    paste(special, "BEGIN\nCREATE TABLE t ()\nPREPARE TRANSACTION 'it''s mine'")
    assert found(special) == []
    (finding,) = found(special, "prepared", transaction_age=NOTHING)
    assert finding.subject == "it's mine"
    paste(special, finding.fix)
    assert found(special, "prepared", transaction_age=NOTHING) == []


def test_connections_run_out(special):
    held = [special.connect() for _ in range(8)]
    try:
        for connection in held:
            connection.exec_driver_sql("SELECT 1")
        (finding,) = found(special)
    finally:
        for connection in held:
            connection.close()
    assert "9 of 9 are in use" in finding.problem
    assert finding.fix == "ALTER SYSTEM SET max_connections = 18;"
    assert found(special, "connections") == []


def test_autovacuum_is_off(special):
    paste(special, "ALTER SYSTEM SET autovacuum = off\nSELECT pg_reload_conf()")
    (finding,) = until(lambda: found(special), "the setting is read again")
    assert (finding.check, finding.subject) == ("autovacuum", "autovacuum")
    paste(special, finding.fix)
    until(lambda: found(special) == [], "the setting is read again")


def test_the_server_is_read_only(special):
    paste(special, "ALTER DATABASE postgres SET default_transaction_read_only = on")
    (finding, _) = found(special, "read_only", "drift")
    assert finding.check == "read_only"
    assert finding.severity == "error"
    paste(special, f"BEGIN READ WRITE\n{finding.fix}\nCOMMIT")
    assert found(special) == []


def test_a_standby(doctor, monkeypatch):
    # The facts of a standby; a real one is for the tests of failover.
    real = CheckContext.of

    def of(*arguments):
        visit = real(*arguments)
        facts = visit.facts._asdict() | {"standby": True, "notifications": None}
        from dataclasses import replace
        from types import SimpleNamespace

        return replace(visit, facts=SimpleNamespace(**facts))

    monkeypatch.setattr(CheckContext, "of", of)
    (finding,) = doctor()
    assert finding.check == "read_only"
    assert "standby" in finding.problem


def test_notifications_pile_up(doctor, migrated, sql):
    with another(migrated, "LISTEN c") as listener:
        listener.execute("BEGIN")
        listener.execute("SELECT 1")
        sql("\n".join(["SELECT pg_notify('c', repeat('x', 7900))"] * 20))
        (finding,) = doctor("notifications", notifications=0.0)
        assert finding.severity == "error"
        sql(finding.fix)

        def nothing_left() -> bool:
            sql("\n".join(["SELECT pg_notify('c', repeat('x', 7900))"] * 20))
            return doctor("notifications", notifications=0.0) == []

        until(nothing_left, "the backend has ended, and the queue is cut")


def test_autovacuum_is_off_for_a_table(fixed, sql):
    sql("ALTER TABLE pgqrs_archive SET (autovacuum_enabled = off)")
    assert fixed().check == "autovacuum"


def test_dead_rows(doctor, sql, service, session):
    service.enqueue_many("mail", range(200))
    session.commit()
    service.queues.purge("mail")
    session.commit()
    session.close()
    beyond = {"dead_rows": 100, "vacuum_age": NOTHING}
    (finding,) = until(lambda: doctor("vacuum", **beyond), "the dead rows are counted")
    assert finding.subject == "public.pgqrs_messages"
    assert "200 dead rows; last vacuumed: never" in finding.problem
    sql(finding.fix)
    until(lambda: doctor("vacuum", **beyond) == [], "that they are gone is counted")


def test_a_sequence_runs_out(fixed, sql):
    sql(
        "ALTER TABLE pgqrs_messages ALTER id SET MAXVALUE 1000\n"
        "SELECT setval('pgqrs_messages_id_seq', 900)"
    )
    assert "900 of its 1000" in fixed().problem


def test_a_sequence_is_behind(fixed, sql, service, session):
    service.enqueue_many("mail", [1, 2, 3])
    session.commit()
    sql("SELECT setval('pgqrs_messages_id_seq', 1)")
    assert "the next id is 2" in fixed().problem
    assert service.enqueue("mail", 4).id == 4


# Messages and workers.


def test_leases_of_a_stopped_worker_and_of_one_that_is_gone(doctor, sql, service, session):
    ids = [service.workers.register(name).id for name in ("a", "b", "alive")]
    service.enqueue_many("mail", range(6))
    for worker in ids:
        service.dequeue("mail", 2, lease=3600, worker=worker)
    session.commit()
    assert doctor() == []
    service.workers.stop(ids[0])
    session.commit()
    sql(f"DELETE FROM pgqrs_workers WHERE id = {ids[1]}")  # noqa: S608
    findings = doctor()
    assert [finding.subject for finding in findings] == [f"worker {ids[0]}", f"worker {ids[1]}"]
    assert all("2 message(s)" in finding.problem for finding in findings)
    for finding in findings:
        sql(finding.fix)
    assert doctor() == []
    assert service.messages.metrics("mail").ready == 4


def test_a_lease_that_ends_soon_is_left_alone(doctor, service, session):
    worker = service.workers.register("a").id
    service.enqueue("mail", 1)
    service.dequeue("mail", worker=worker)
    service.workers.stop(worker)
    session.commit()
    assert doctor() == []
    assert len(doctor(lease_ahead=NOTHING)) == 1


def test_exhausted_messages(doctor, fixed, service, session):
    service.enqueue("mail", 1, max_read_ct=1)
    service.dequeue("mail", lease=0.01)
    session.commit()
    time.sleep(0.05)
    assert doctor() == []
    assert fixed("exhausted", exhausted_age=NOTHING).subject == "mail"
    assert service.messages.metrics("mail").dead == 1


def test_an_archive_that_grows_without_retention(doctor, fixed, service, session, sql):
    for name in ("kept", "empty"):
        service.queues.create(name, retention=60 if name == "kept" else None)
    for name in ("mail", "kept"):
        service.enqueue(name, 1)
        service.archive(service.dequeue(name)[0])
    session.commit()
    assert doctor("retention", archived_rows=1) == []  # never analyzed
    sql("ANALYZE pgqrs_archive")
    assert doctor("retention") == doctor("retention", archived_rows=2) == []
    finding = fixed("retention", archived_rows=1)
    assert (finding.subject, finding.severity) == ("mail", "warning")
    assert "about 2 rows" in finding.problem
    session.expire_all()
    assert service.queues.get("mail").retention_seconds == 365 * 86_400


def test_a_queue_that_adds_nothing_without_a_retention_needs_none(doctor, service, session, sql):
    service.queues.update("mail", retention=60)
    service.queues.create("failures", keep="failed", failed_retention=60)
    service.queues.create("for-ever", keep="failed")
    service.queues.create("nothing", keep="nothing")
    session.commit()
    sql("INSERT INTO pgqrs_archive (id, queue_id, payload) SELECT id, id, '1' FROM pgqrs_queues")
    sql("UPDATE pgqrs_archive SET outcome = 'dead'")
    sql("ANALYZE pgqrs_archive")
    assert [found.subject for found in doctor("retention", archived_rows=1)] == ["for-ever"]


def test_orphans(fixed, sql, service, session):
    service.enqueue_many("mail", [1, 2])
    service.archive(service.dequeue("mail")[0])
    session.commit()
    sql("DELETE FROM pgqrs_queues")
    session.expire_all()
    finding = fixed()
    assert finding.severity == "error"
    assert "live and archived" in finding.problem
    assert service.messages.metrics("recovered-1").live == 1


def test_orphans_that_are_exhausted(fixed, sql, service, session):
    service.enqueue("mail", 1, max_read_ct=1)
    service.dequeue("mail")
    session.commit()
    sql("DELETE FROM pgqrs_queues")
    assert fixed("orphans").subject == "queue 1"


def test_a_queue_paused_for_long(doctor, fixed, service, session, sql):
    service.queues.pause("mail")
    session.commit()
    sql("UPDATE pgqrs_queues SET paused_at = now() - interval '2 hours'")
    assert doctor() == []
    service.enqueue("mail", 1)
    session.commit()
    assert "2:00:0" in fixed("backlog").problem


def test_messages_wait_for_long(doctor, service, session, sql):
    service.enqueue("mail", 1)
    session.commit()
    sql("UPDATE pgqrs_messages SET vt = now() - interval '1 hour'")
    (finding,) = doctor()
    assert finding.fix == "pgqrs worker list --queue mail"
    service.dequeue("mail")
    session.commit()
    assert doctor() == []


def test_a_silent_worker(fixed, service, session, sql):
    worker = service.workers.register("a")
    session.commit()
    sql("UPDATE pgqrs_workers SET heartbeat_at = now() - interval '6 minutes'")
    assert fixed().subject == f"worker {worker.id}"
    session.expire_all()
    assert service.workers.get(worker.id).status == "stopped"


def test_everything_but_drift_works_read_only(engine, service, session):
    service.enqueue("mail", 1)
    session.commit()
    with Session(engine) as reader:
        reader.connection(execution_options={"postgresql_readonly": True})
        assert diagnose(reader, CONTEXT, only=set(CHECKS) - {"drift"}) == []


def test_a_schema_given_by_a_translation(database):
    engine = sa.create_engine(database.url, poolclass=sa.NullPool).execution_options(
        schema_translate_map={None: "Jobs"}
    )
    with engine.begin() as connection:
        connection.exec_driver_sql('CREATE SCHEMA "Jobs"')
        metadata.create_all(connection)
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
        QueueService(session).enqueue("mail", 1, max_read_ct=1)
        QueueService(session).dequeue("mail", lease=0.01)
    assert found(engine) == []
    paste(engine, 'CREATE INDEX mine ON "Jobs".pgqrs_messages (read_ct)')
    (finding,) = found(engine)
    assert finding.fix == 'DROP INDEX CONCURRENTLY "Jobs".mine;'
    paste(engine, finding.fix)
    with engine.begin() as connection:
        connection.exec_driver_sql('DROP INDEX "Jobs".pgqrs_messages_order_idx')
    findings = found(engine, exhausted_age=NOTHING)
    assert [finding.check for finding in findings] == ["drift", "exhausted"]
    for finding in findings:
        assert '"Jobs".pgqrs_messages' in finding.fix
        paste(engine, finding.fix)
    assert found(engine, exhausted_age=NOTHING) == []


def test_several_doctors_at_once(engine):
    with ThreadedDoctors(engine, 4) as answers:
        pass
    assert answers == [[]] * 4


class ThreadedDoctors:
    def __init__(self, engine, count):
        self.answers = []
        self.threads = [
            threading.Thread(target=lambda: self.answers.append(found(engine)))
            for _ in range(count)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self.answers

    def __exit__(self, *_):
        for thread in self.threads:
            thread.join()


async def test_through_an_async_session(async_session):
    assert await async_session.run_sync(diagnose, CONTEXT) == []

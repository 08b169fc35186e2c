"""The live schema against the models: each kind of difference, made for real and fixed."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqrs_sa import (
    ArchivedMessageMixin,
    MessageMixin,
    Models,
    QueueMixin,
    WorkerMixin,
    metadata,
)
from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import Thresholds, diagnose
from pgqrs_sa.models import READY_MADE
from support.cases import each_case


def test_a_migrated_database_is_healthy(doctor):
    assert doctor() == []


def own_models(schema):
    class Own(DeclarativeBase):
        __pgqrs_schema__ = schema

    class Queue(QueueMixin, Own): ...

    class Archived(ArchivedMessageMixin, Own):
        tenant_id: Mapped[int] = mapped_column(index=True)

    class Worker(WorkerMixin, Own):
        zone: Mapped[str | None]

    class OwnMessage(MessageMixin, Own):
        tenant_id: Mapped[int] = mapped_column(index=True, server_default="7")

    return Own.metadata, Models(Queue, OwnMessage, Archived, Worker)


@each_case("schema", [None, 'Jobs of "us"'])
def test_tables_of_a_host_with_more_columns_are_healthy(database, schema):
    tables, models = own_models(schema)
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        if schema is not None:
            connection.execute(sa.schema.CreateSchema(schema))
        tables.create_all(connection)
    context = Context.of(models, None, None, allow_autocommit=False)
    with Session(engine) as session:
        assert diagnose(session, context) == []
        session.connection().exec_driver_sql("SELECT 1")  # the transaction is as it was


def test_tables_made_without_alembic_are_healthy(database):
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    metadata.create_all(engine)
    context = Context.of(READY_MADE, None, None, allow_autocommit=False)
    with Session(engine) as session:
        assert diagnose(session, context) == []


M = "ALTER TABLE pgqrs_messages"
DRIFTS = {
    "column": (f"{M} DROP COLUMN last_error", "pgqrs_messages.last_error", "is missing"),
    "type": (f"{M} ALTER priority TYPE integer", "pgqrs_messages.priority", "type is integer"),
    "null": (f"{M} ALTER queue_id DROP NOT NULL", "pgqrs_messages.queue_id", "may be NULL"),
    "not null": (f"{M} ALTER max_read_ct SET NOT NULL", "messages.max_read_ct", "may not be NULL"),
    "no default": (f"{M} ALTER vt DROP DEFAULT", "pgqrs_messages.vt", "missing"),
    "default": (f"{M} ALTER vt SET DEFAULT now()", "pgqrs_messages.vt", "now()"),
    "a default": (f"{M} ALTER last_error SET DEFAULT ''", "messages.last_error", "be none"),
    "identity": (f"{M} ALTER id DROP IDENTITY", "pgqrs_messages.id", "not an identity"),
    "index": ("DROP INDEX pgqrs_archive_queue_idx", "pgqrs_archive_queue_idx", "missing"),
    "order": (
        (
            "DROP INDEX pgqrs_messages_order_idx;"
            "CREATE INDEX pgqrs_messages_order_idx ON pgqrs_messages (queue_id, vt, priority, id)"
            " WHERE max_read_ct IS NULL OR read_ct < max_read_ct"
        ),
        "pgqrs_messages_order_idx",
        "on (queue_id, vt, priority, id)",
    ),
    "predicate": (
        (
            "DROP INDEX pgqrs_messages_order_idx;"
            "CREATE INDEX pgqrs_messages_order_idx ON pgqrs_messages (queue_id, priority, vt, id)"
            " WHERE max_read_ct IS NULL OR read_ct <= max_read_ct"
        ),
        "pgqrs_messages_order_idx",
        "read_ct <= max_read_ct",
    ),
    "direction": (
        (
            "DROP INDEX pgqrs_archive_queue_idx;"
            "CREATE INDEX pgqrs_archive_queue_idx ON pgqrs_archive (queue_id, archived_at DESC, id)"
        ),
        "pgqrs_archive_queue_idx",
        "archived_at DESC",
    ),
    "uniqueness": (
        (
            "DROP INDEX pgqrs_messages_dedup_key_idx;"
            "CREATE INDEX pgqrs_messages_dedup_key_idx ON pgqrs_messages (queue_id, dedup_key)"
            " WHERE dedup_key IS NOT NULL"
        ),
        "pgqrs_messages_dedup_key_idx",
        "not unique",
    ),
    "check": (f"{M} DROP CONSTRAINT pgqrs_messages_vt_check", "messages_vt_check", "missing"),
    "body": (
        (
            "ALTER TABLE pgqrs_workers DROP CONSTRAINT pgqrs_workers_status_check,"
            " ADD CONSTRAINT pgqrs_workers_status_check CHECK (status IN ('ready', 'busy'))"
        ),
        "pgqrs_workers_status_check",
        "busy",
    ),
    "not valid": (
        (
            f"{M} DROP CONSTRAINT pgqrs_messages_read_ct_check,"
            " ADD CONSTRAINT pgqrs_messages_read_ct_check CHECK (read_ct >= 0) NOT VALID"
        ),
        "pgqrs_messages_read_ct_check",
        "never checked",
    ),
    "renamed": (
        f"{M} RENAME CONSTRAINT pgqrs_messages_read_ct_check TO other",
        "pgqrs_messages_read_ct_check",
        "is called other",
    ),
    "key": (
        "ALTER TABLE pgqrs_workers DROP CONSTRAINT pgqrs_workers_pkey",
        "pgqrs_workers_pkey",
        "missing",
    ),
    "unique": (
        "ALTER TABLE pgqrs_queues DROP CONSTRAINT pgqrs_queues_queue_name_key",
        "pgqrs_queues_queue_name_key",
        "missing",
    ),
    "storage": (
        f"{M} RESET (autovacuum_vacuum_threshold)",
        "pgqrs_messages",
        "autovacuum_vacuum_threshold is not set",
    ),
    "fillfactor": (f"{M} RESET (fillfactor)", "pgqrs_messages", "fillfactor is not set"),
    "unlogged": ("ALTER TABLE pgqrs_archive SET UNLOGGED", "pgqrs_archive", "unlogged"),
    "table": ("DROP TABLE pgqrs_workers", "pgqrs_workers", "the table is missing"),
    "archive": ("DROP TABLE pgqrs_archive", "pgqrs_archive", "the table is missing"),
    "big table": ("DROP TABLE pgqrs_messages CASCADE", "pgqrs_messages", "the table is missing"),
}


@each_case("kind", list(DRIFTS))
def test_drift(fixed, sql, kind):
    damage, subject, problem = DRIFTS[kind]
    sql(damage.replace(";", "\n"))
    finding = fixed("drift")
    assert finding.check == "drift"
    assert subject in finding.subject
    assert problem in finding.problem


def test_the_column_of_leases_and_its_range(sql, doctor):
    sql(f"{M} DROP COLUMN leased_until")
    column, constraint = doctor("drift")
    assert column.subject == "public.pgqrs_messages.leased_until"
    assert constraint.subject == "pgqrs_messages_leased_until_check"
    for finding in (column, constraint):
        sql(finding.fix)
    assert doctor() == []


def test_another_fillfactor_is_the_choice_of_the_host(sql, doctor, fixed, rows):
    sql(f"{M} SET (fillfactor = 90)")
    assert doctor() == []
    sql(f"{M} RESET (autovacuum_vacuum_threshold)")
    assert "fillfactor" not in fixed("drift").fix
    ((options,),) = rows("SELECT reloptions FROM pg_class WHERE relname = 'pgqrs_messages'")
    assert "fillfactor=90" in options


def test_fixing_is_possible_with_rows(sql, service, session, fixed):
    service.enqueue_many(
        "mail",
        [1, 2, 3],
    )
    session.commit()
    sql("ALTER TABLE pgqrs_messages ALTER id DROP IDENTITY")
    fixed("drift")
    assert service.enqueue("mail", 4).id == 4


def test_a_serial_becomes_an_identity(sql, fixed):
    sql(
        "ALTER TABLE pgqrs_workers ALTER id DROP IDENTITY\n"
        "CREATE SEQUENCE s\nALTER TABLE pgqrs_workers ALTER id SET DEFAULT nextval('s')"
    )
    fixed("drift")


def test_an_index_whose_building_was_interrupted(sql, service, session, fixed):
    service.enqueue_many("mail", [1, 1])
    session.commit()
    sql("DROP INDEX pgqrs_messages_dedup_key_idx\nUPDATE pgqrs_messages SET dedup_key = 'same'")
    with pytest.raises(sa.exc.IntegrityError):
        sql(
            "CREATE UNIQUE INDEX CONCURRENTLY pgqrs_messages_dedup_key_idx ON pgqrs_messages"
            " (queue_id, dedup_key) WHERE dedup_key IS NOT NULL"
        )
    sql("UPDATE pgqrs_messages SET dedup_key = id")
    assert "invalid" in fixed("drift").problem


def test_everything_at_once(sql, doctor):
    sql("\n".join(
        damage.replace(";", "\n") for kind, (damage, *_) in DRIFTS.items()
        if kind in {"type", "null", "default", "index", "body", "storage", "unique"}
    ))  # fmt: skip
    findings = doctor("drift")
    assert len(findings) == 7
    assert [finding.severity for finding in findings] == ["error"] * 6 + ["warning"]
    for finding in findings:
        sql(finding.fix)
    assert doctor() == []


INEXACT = ["column", "type", "null", "not null", "no default", "identity", "index",
           "order", "uniqueness", "check", "not valid", "key", "unique", "unlogged", "table",
           "archive"]  # fmt: skip


@each_case("kind", ["nothing", *INEXACT])
def test_a_read_only_transaction_sees_all_but_expressions(engine, sql, fixed, kind):
    damage, *expected = DRIFTS.get(kind, ("SELECT 1",))
    sql(damage.replace(";", "\n"))
    with Session(engine) as session:
        session.connection(execution_options={"postgresql_readonly": True})
        findings = diagnose(session, Context.of(READY_MADE, None, None, allow_autocommit=False))
    *found, last = sorted(findings, key=lambda finding: finding.subject == "comparison")
    assert "read-only" in last.problem
    assert "not compared" in last.problem
    assert [finding.check for finding in found] == ["drift"] * (kind != "nothing")
    if found:
        assert expected[0] in found[0].subject
        fixed("drift")


def test_autocommit_is_less_exact_and_leaves_nothing(engine, rows):
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(autocommit) as session:
        context = Context.of(READY_MADE, None, None, allow_autocommit=True)
        (finding,) = diagnose(session, context, only=["drift"], thresholds=Thresholds())
    assert "AUTOCOMMIT" in finding.problem
    assert rows("SELECT FROM pg_class WHERE relname ~ '^pgqrs' AND relpersistence = 't'") == []


def test_the_session_is_left_as_it_was(session, service):
    service.enqueue("mail", 1)
    diagnose(session, Context.of(READY_MADE, None, None, allow_autocommit=False))
    session.commit()
    assert service.messages.metrics("mail").ready == 1

"""Version 1: the four tables. Released steps are never edited, and do not import the models.

``pgqrs_queues`` gets no comment here: the caller of the steps stamps the version. Storage
parameters are set by ALTER TABLE, because SQLAlchemy 2.0 cannot create a table with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

if TYPE_CHECKING:
    from alembic.operations import Operations

__all__ = ["downgrade", "upgrade"]

_STORAGE = (
    "fillfactor = 45, "
    "autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, "
    "autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 1000"
)

_ddl: Callable[[str], sa.DDL] = sa.DDL


def upgrade(op: Operations, schema: str | None) -> None:
    """Create the tables."""
    _create_queues(op, schema)
    _create_messages(op, schema)
    _create_archive(op, schema)
    _create_workers(op, schema)


def downgrade(op: Operations, schema: str | None) -> None:
    """Drop the tables and everything in them."""
    for table in ("pgqrs_workers", "pgqrs_archive", "pgqrs_messages", "pgqrs_queues"):
        op.drop_table(table, schema=schema)


def _create_queues(op: Operations, schema: str | None) -> None:
    op.create_table(
        "pgqrs_queues",
        _id(),
        sa.Column("queue_name", sa.Text, nullable=False),
        _moment("created_at", now=True),
        sa.Column("lease_seconds", sa.Double, server_default=sa.text("30"), nullable=False),
        sa.Column("max_read_ct", sa.Integer, server_default=sa.text("5"), nullable=False),
        sa.Column("keep", sa.Text, server_default=sa.text("'all'"), nullable=False),
        sa.Column("retention_seconds", sa.Double),
        sa.Column("failed_retention_seconds", sa.Double),
        sa.Column(
            "max_payload_bytes", sa.Integer, server_default=sa.text("1048576"), nullable=False
        ),
        _moment("paused_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pgqrs_queues_pkey")),
        sa.UniqueConstraint("queue_name", name=op.f("pgqrs_queues_queue_name_key")),
        _check(
            op,
            "pgqrs_queues_queue_name_check",
            "queue_name ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$'",
        ),
        _check(op, "pgqrs_queues_lease_seconds_check", "lease_seconds > 0"),
        _check(op, "pgqrs_queues_max_read_ct_check", "max_read_ct >= 1"),
        _check(op, "pgqrs_queues_keep_check", "keep IN ('all', 'failed', 'nothing')"),
        _check(op, "pgqrs_queues_retention_seconds_check", "retention_seconds >= 0"),
        _check(op, "pgqrs_queues_failed_retention_seconds_check", "failed_retention_seconds >= 0"),
        _check(op, "pgqrs_queues_max_payload_bytes_check", "max_payload_bytes >= 1"),
        schema=schema,
    )
    op.create_index(
        op.f("pgqrs_queues_keep_idx"),
        "pgqrs_queues",
        ["id"],
        schema=schema,
        postgresql_where=sa.text("keep <> 'all'"),
    )


def _create_messages(op: Operations, schema: str | None) -> None:
    table = "pgqrs_messages"
    op.create_table(
        table,
        _id(),
        *_content(),
        _moment("leased_until"),
        _number("fencing_token"),
        sa.PrimaryKeyConstraint("id", name=op.f("pgqrs_messages_pkey")),
        _check(
            op,
            "pgqrs_messages_vt_check",
            "vt >= '1970-01-01 00:00:00+00' AND vt < '9999-01-01 00:00:00+00'",
        ),
        _check(
            op,
            "pgqrs_messages_leased_until_check",
            "leased_until >= '1970-01-01 00:00:00+00' AND leased_until < '9999-01-01 00:00:00+00'",
        ),
        _check(op, "pgqrs_messages_read_ct_check", "read_ct >= 0"),
        _check(
            op,
            "pgqrs_messages_max_read_ct_check",
            "CASE WHEN max_read_ct IS NULL THEN read_ct = 0 ELSE max_read_ct >= 1 END",
        ),
        _check(op, "pgqrs_messages_headers_check", "jsonb_typeof(headers) = 'object'"),
        _check(op, "pgqrs_messages_dedup_key_check", "char_length(dedup_key) BETWEEN 1 AND 255"),
        schema=schema,
        comment="Live messages of pgqrs_sa",
    )
    op.execute(_ddl(f"ALTER TABLE {_quoted(schema, table)} SET ({_STORAGE})"))
    op.create_index(
        op.f("pgqrs_messages_order_idx"),
        table,
        ["queue_id", "priority", "vt", "id"],
        schema=schema,
    )
    op.create_index(
        op.f("pgqrs_messages_dedup_key_idx"),
        table,
        ["queue_id", "dedup_key"],
        schema=schema,
        unique=True,
        postgresql_where=sa.text("dedup_key IS NOT NULL"),
    )


def _create_archive(op: Operations, schema: str | None) -> None:
    table = "pgqrs_archive"
    op.create_table(
        table,
        sa.Column("id", sa.BigInteger, autoincrement=False, nullable=False),
        *_content(),
        _moment("archived_at", now=True),
        sa.Column("outcome", sa.Text, server_default=sa.text("'archived'"), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("fencing_token", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name=op.f("pgqrs_archive_pkey")),
        _check(
            op,
            "pgqrs_archive_outcome_check",
            "outcome IN ('archived', 'dead', 'cancelled', 'discarded')",
        ),
        schema=schema,
        comment="Settled messages of pgqrs_sa",
    )
    op.create_index(
        op.f("pgqrs_archive_queue_idx"), table, ["queue_id", "archived_at", "id"], schema=schema
    )
    op.create_index(
        op.f("pgqrs_archive_not_done_idx"),
        table,
        ["queue_id", "outcome", "id"],
        schema=schema,
        postgresql_where=sa.text("outcome <> 'archived'"),
    )


def _create_workers(op: Operations, schema: str | None) -> None:
    op.create_table(
        "pgqrs_workers",
        _id(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hostname", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("port", sa.Integer),
        sa.Column("version", sa.Text),
        sa.Column("queues", ARRAY(sa.Text), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("status", sa.Text, server_default=sa.text("'ready'"), nullable=False),
        _moment("started_at", now=True),
        _moment("heartbeat_at", now=True),
        _moment("shutdown_at"),
        _moment("waiting_until"),
        sa.Column("leased", sa.Integer),
        sa.PrimaryKeyConstraint("id", name=op.f("pgqrs_workers_pkey")),
        _check(op, "pgqrs_workers_status_check", "status IN ('ready', 'suspended', 'stopped')"),
        schema=schema,
        comment="Processes that work on pgqrs_sa queues",
    )


def _content() -> list[sa.Column[Any]]:
    """Return the columns that live and archived messages share, but for the id."""
    return [
        sa.Column("queue_id", sa.BigInteger, nullable=False),
        sa.Column("payload", JSONB, nullable=False),
        sa.Column("headers", JSONB),
        sa.Column("priority", sa.SmallInteger, server_default=sa.text("0"), nullable=False),
        _moment("vt", now=True),
        _moment("enqueued_at", now=True),
        sa.Column("read_ct", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("max_read_ct", sa.Integer),
        _moment("dequeued_at"),
        sa.Column("producer_worker_id", sa.BigInteger),
        sa.Column("consumer_worker_id", sa.BigInteger),
        sa.Column("dedup_key", sa.Text),
        sa.Column("last_error", sa.Text),
    ]


def _id() -> sa.Column[int]:
    return _number("id")


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, sa.Identity(always=False), nullable=False)


def _moment(name: str, *, now: bool = False) -> sa.Column[Any]:
    default = sa.text("statement_timestamp()") if now else None
    return sa.Column(name, sa.DateTime(timezone=True), server_default=default, nullable=not now)


def _check(op: Operations, name: str, body: str) -> sa.CheckConstraint:
    # f() marks the name as final: a naming convention of the host must not prefix it again.
    return sa.CheckConstraint(body, name=op.f(name))


def _quoted(*path: str | None) -> str:
    # A dialect's own quoting doubles percent signs, and DDL() would then double them again.
    parts = [part.replace('"', '""').replace("%", "%%") for part in path if part is not None]
    return ".".join(f'"{part}"' for part in parts)

"""Changes by hand that ``alembic check`` passes over, and that the doctor finds and fixes."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.models import READY_MADE

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=True)
UNSEEN = {
    "the predicate of an index": (
        (
            "DROP INDEX pgqrs_messages_order_idx;"
            "CREATE INDEX pgqrs_messages_order_idx ON pgqrs_messages (queue_id, priority, vt, id)"
            " WHERE read_ct < max_read_ct"
        ),
        "pgqrs_messages_order_idx",
    ),
    "a unique index for some rows only": (
        (
            "DROP INDEX pgqrs_messages_dedup_key_idx;"
            "CREATE UNIQUE INDEX pgqrs_messages_dedup_key_idx ON pgqrs_messages"
            " (queue_id, dedup_key) WHERE dedup_key IS NOT NULL AND priority = 0"
        ),
        "pgqrs_messages_dedup_key_idx",
    ),
    "the body of a CHECK": (
        (
            "ALTER TABLE pgqrs_archive DROP CONSTRAINT pgqrs_archive_outcome_check,"
            " ADD CONSTRAINT pgqrs_archive_outcome_check CHECK (outcome <> '')"
        ),
        "pgqrs_archive_outcome_check",
    ),
    "a storage parameter": (
        "ALTER TABLE pgqrs_messages SET (autovacuum_enabled = off)",
        "pgqrs_messages",
    ),
    "another storage parameter": (
        "ALTER TABLE pgqrs_messages RESET (autovacuum_vacuum_scale_factor)",
        "pgqrs_messages",
    ),
    "the room for a lease": (
        "ALTER TABLE pgqrs_messages RESET (fillfactor)",
        "pgqrs_messages",
    ),
    "a server default": (
        "ALTER TABLE pgqrs_messages ALTER vt SET DEFAULT now()",
        "pgqrs_messages.vt",
    ),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_alembic_does_not_compare_is_found_and_fixed(host: Any, what: str) -> None:
    damage, subject = UNSEEN[what]
    host.write("op.pgqrs_upgrade(from_version=0, to_version=1)")
    host.upgrade()
    in_transactions = sa.create_engine(host.url, poolclass=sa.NullPool)
    engine = in_transactions.execution_options(isolation_level="AUTOCOMMIT")

    def examine() -> list[Any]:
        with Session(in_transactions) as session:
            return diagnose(session, CONTEXT)

    def run(script: str) -> None:
        with engine.connect() as connection:
            for statement in script.split(";"):
                if statement.strip():
                    connection.exec_driver_sql(statement.replace("%", "%%"))

    assert examine() == []
    run(damage)
    host.check()
    (finding,) = examine()
    assert subject in finding.subject
    run(finding.fix)
    assert examine() == []

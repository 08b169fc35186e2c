"""The consumer's own connections, and what a pooler in transaction mode does to them."""

from __future__ import annotations

import threading
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from pgqrs_sa.consumers.line import AsyncPlug, Line
from pgqrs_sa.operations.context import Context

CONTEXT = Context.of(None, None, None, allow_autocommit=True)
FOR_PGBOUNCER = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: f"pgqrs_{uuid4().hex}",
}


def transactions(session, context):
    """How many transactions two statements are."""
    return len({session.scalar(sa.text(f"SELECT now() -- {n}")) for n in range(2)})


@pytest.mark.parametrize(("settings", "expected"), [({}, 2), (FOR_PGBOUNCER, 1)])
def test_asyncpg_set_up_for_pgbouncer_sends_no_statement_outside_a_transaction(
    migrated, settings, expected
):
    """It prepares each statement before it runs it: two rounds, that belong to one server."""
    url = migrated.direct.async_url("asyncpg")
    engine = create_async_engine(url, poolclass=sa.NullPool, connect_args=settings)
    line = Line(AsyncPlug(engine), threading.Event(), deadline=30)
    assert line.once(CONTEXT, transactions) == expected
    line.close()

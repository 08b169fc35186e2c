"""Waking consumers: when an enqueue sends a NOTIFY, and who waits for one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .._core import routing
from .._core.context import Context, execute
from .._core.sql import wakeup as statements
from .._core.sql.fragments import tables
from . import local

__all__ = ["announce", "channel", "channel_on", "set_waiting"]


def set_waiting(session: Session, context: Context, worker_id: int, span: timedelta | None) -> None:
    """Say that a worker waits to be woken for so long from now; None: it does not wait any more.

    Commit, and look into the queues once more before waiting: what was enqueued before that
    commit has sent no notification.
    """
    values = {"worker_id": worker_id, "span": span}
    execute(session, context, statements.waiting(context.models), values)


def channel(session: Session, context: Context) -> dict[str, str]:
    """Return what a statement that notifies has to bind more, or nothing if none is to be sent."""
    if not (context.notify or session.info.get(local.NOTIFY)):
        return {}
    connection = routing.connect(session, {"mapper": context.mapper})
    return channel_on(connection, tables(context.models).message)


def channel_on(connection: sa.Connection, messages: sa.Table) -> dict[str, str]:
    """Return the same for a connection on which notifications are wanted."""
    # PostgreSQL prepares no transaction that has notified. Its consumers find out by polling.
    if isinstance(connection.get_transaction(), sa.TwoPhaseTransaction):
        return {}
    return {"channel": statements.channel(connection.schema_for_object(messages))}


def announce(session: Session, context: Context, ids: Sequence[int]) -> None:
    """Wake the consumers of messages that were made visible by hand, in a statement of its own.

    Nothing is executed unless somebody may want to know.
    """
    to = channel(session, context)
    if not ids or not (to or local.subscribed()):
        return
    queue, message, _, worker = tables(context.models)
    statement = statements.visible(queue, message, worker, notify=bool(to))
    for name in execute(session, context, statement, {"ids": list(ids), **to}).scalars():
        local.mark_enqueued(session, name, context.mapper)

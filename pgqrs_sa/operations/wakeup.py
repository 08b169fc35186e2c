"""Waking consumers: the NOTIFY of a session that sends them, and who waits for one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from .. import nudge
from ..statements import wakeup as statements
from ..statements.parts import tables
from .context import Context, run

__all__ = ["announce", "channel_of", "set_waiting", "wanted"]


def set_waiting(session: Session, context: Context, worker_id: int, span: timedelta | None) -> None:
    """Say that a worker waits to be woken for so long from now; None: it does not wait any more.

    Commit, and look into the queues once more before waiting: what was enqueued before that
    commit has sent no notification.
    """
    values = {"worker_id": worker_id, "span": span}
    run(session, context, statements.waiting(context.models), values)


def wanted(session: Session, context: Context) -> bool:
    """Whether what is enqueued here sends a NOTIFY."""
    return context.notify or bool(session.info.get(nudge.NOTIFY))


def channel_of(session: Session, context: Context) -> dict[str, str]:
    """Return the bind parameter that a statement with a NOTIFY has besides its own."""
    connection = session.connection(bind_arguments={"mapper": context.mapper})
    message = tables(context.models).message
    return {"channel": statements.channel(connection.schema_for_object(message))}


def announce(session: Session, context: Context, ids: Sequence[int]) -> None:
    """Wake the consumers of messages that were made visible by hand, in a statement of its own.

    Nothing is executed unless somebody may want to know.
    """
    notify = wanted(session, context)
    if not ids or not (notify or nudge.subscribed()):
        return
    queue, message, _, worker = tables(context.models)
    values: dict[str, Any] = {"ids": list(ids)}
    if notify:
        values |= channel_of(session, context)
    statement = statements.visible(queue, message, worker, notify=notify)
    for name in run(session, context, statement, values).scalars():
        nudge.note(session, name, context.mapper)

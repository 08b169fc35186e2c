"""Let time pass for messages, without changing the clock."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, overload

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .. import validation
from .._core import cursors, states
from .._core.scope import Context, Scope
from .._core.sessions import sync_loaded
from .._core.sql.fragments import MOVED, array_bind, elapsed, interval_bind, timestamp
from .._core.states import now
from .._core.tables import Tables
from ..models import Models, models_of
from ..resources import Queues
from ..types import Seconds
from .sessions import SessionLike, perform

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from .sessions import AsyncSessionLike

__all__ = ["advance", "next_due", "shift"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@overload
def advance(
    session: SessionLike, by: Seconds, queue: str | None = None, *, models: Models | None = None
) -> int: ...
@overload
def advance(
    session: AsyncSessionLike,
    by: Seconds,
    queue: str | None = None,
    *,
    models: Models | None = None,
) -> Coroutine[Any, Any, int]: ...
def advance(
    session: Any, by: Seconds, queue: str | None = None, *, models: Models | None = None
) -> Any:
    """Let time pass for messages: move ``vt`` and ``leased_until`` of all live messages back.

    Scheduled messages become due, and leases expire, as if that time had passed. The clock does
    not change, nor does any other column: not the application's own times, and not ``enqueued_at``.

    Args:
        session: The test's session; with an ``AsyncSession`` the result is awaited.
        by: Seconds, or a timedelta.
        queue: Only for the messages of this queue.
        models: A host's own classes; default: the ready-made classes.

    Returns:
        The number of messages.

    Raises:
        QueueNotFound: with similar names.
        DelayError: the time is negative.
    """
    context = Context.of(models_of(models), None, None, allow_autocommit=True)
    length = validation.validate_duration(by, "by")

    def work(session: Session) -> int:
        session.flush()
        scope = Scope(session, context)
        if queue is not None:
            Queues(scope).get(queue)
        return shift(scope, length, None if queue is None else [queue])

    return perform(session, work, lambda moved: moved)


def shift(scope: Scope, length: timedelta, queues: Sequence[str] | None) -> int:
    """Move the messages of these queues (or of all) back in time; return how many."""
    statement = _shift(scope.tables, everywhere=queues is None)
    values: dict[str, Any] = {"length": length}
    if queues is not None:
        values["queues"] = list(queues)
    rows = scope.execute(statement, values).all()
    cursors.reset()  # the dequeue cursors are no longer valid
    sync_loaded(scope.session, scope.context.models.message, rows, MOVED)
    return len(rows)


def next_due(scope: Scope, queues: Sequence[str]) -> timedelta | None:
    """Return the time until the next scheduled message of these queues is due."""
    values = {"queues": list(queues)}
    wait: timedelta | None = scope.execute(_next_due(scope.tables), values).scalar_one()
    return wait


@cache
def _shift(tables: Tables, *, everywhere: bool) -> Executable:
    queue, message, _, _ = tables

    def earlier(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        # As a sub-select: Citus refuses a function that is STABLE and reads a column in SET.
        moved = sa.select(column - interval_bind("length")).correlate(message).scalar_subquery()
        return func.greatest(moved, sa.literal(_EPOCH, timestamp), type_=timestamp)

    until = message.c.leased_until
    statement = sa.update(message).values(
        vt=earlier(message.c.vt),
        leased_until=sa.case((until.is_not(None), earlier(until))),
    )
    if not everywhere:
        named = sa.select(queue.c.id).where(_named(queue))
        statement = statement.where(message.c.queue_id.in_(named))
    return statement.returning(message.c.id, *(message.c[name] for name in MOVED))


@cache
def _next_due(tables: Tables) -> Executable:
    queue, message, _, _ = tables
    return (
        sa.select(elapsed(func.min(message.c.vt) - now()))
        .join(queue, queue.c.id == message.c.queue_id)
        .where(
            _named(queue),
            queue.c.paused_at.is_(None),
            states.scheduled(message.c),
            states.has_attempts(message.c),
        )
    )


def _named(queue: sa.Table) -> sa.ColumnElement[bool]:
    return queue.c.queue_name == func.any(array_bind("queues", sa.Text))

"""Leasing messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .. import validation
from ..errors import PayloadError, WorkerNotFound, WorkerNotReady
from ..types import Criteria, Delivery
from . import cursors, settle
from .archive import dead_letter_exhausted
from .context import Context, criteria_on, decode_all, execute, queue_not_found, sync_loaded
from .sql import lease as statements
from .sql import queues, workers
from .sql.fragments import MOVED

__all__ = ["decodable", "deliveries", "dequeue", "explain_nothing", "in_order"]

_DEAD_LETTER_CHUNK = 100
"""A dequeue that finds nothing makes dead letters of so many messages that are out of attempts:
their last holders died, and nobody else may be there to do it."""

_MOST_TRIES = 100
"""A dequeue that leases only messages that cannot be decoded leases again, at most so often."""


def dequeue(
    session: Session,
    context: Context,
    queue: str,
    limit: int,
    lease: float | timedelta | None,
    worker: object,
    where: Criteria,
) -> list[Delivery]:
    """Lease up to ``limit`` visible messages and count the attempt."""
    holder = context.worker if worker is None else validation.validate_worker_id(worker)
    criteria = criteria_on(where, context.tables.message)
    validation.validate_queue_name(queue)
    values = {
        "queue": queue,
        "limit": validation.validate_limit(limit),
        "lease": None
        if lease is None
        else validation.validate_duration(lease, "lease", positive=True),
        "worker": holder,
        "attempts": None,
    }
    found: list[Delivery] = []
    for _ in range(_MOST_TRIES):
        found, dead = _leased(session, context, queue, criteria, values)
        if found or not dead:
            break
    if not found:
        explain_nothing(session, context, queue, holder)
    return found


def _leased(
    session: Session,
    context: Context,
    queue: str,
    criteria: tuple[Any, ...],
    values: dict[str, Any],
) -> tuple[list[Delivery], list[Delivery]]:
    """Lease once; return as `decodable`."""
    by_worker = values["worker"] is not None
    if criteria:
        statement = statements.dequeue_where(context.tables, criteria, by_worker=by_worker)
        rows = in_order(execute(session, context, statement, values))
    else:
        statement = statements.dequeue(context.tables, by_worker=by_worker)
        rows = _lease_from_cursor(session, context, statement, values)
    sync_loaded(session, context.models.message, rows, MOVED)
    return decodable(session, context, deliveries(context, queue, rows, values["worker"]))


def _lease_from_cursor(
    session: Session, context: Context, statement: Executable, values: dict[str, Any]
) -> Sequence[Row[Any]]:
    """Lease from the cursor, or from the beginning: see `_core.cursor`."""
    taking = cursors.CursorUse(session, context, statement, values)
    while True:
        rows = in_order(execute(session, context, statement, values | taking.binds()))
        if taking.record(rows):
            return rows


# By position, as `statements.lease` has them: by name it takes three times as long.
_COLUMNS = (*statements.DELIVERED, "was_visible_at")
_PLACE = itemgetter(*map(_COLUMNS.index, ("priority", "was_visible_at", "id")))
_REST = slice(_COLUMNS.index("priority"), len(statements.DELIVERED))


def in_order(rows: Iterable[Row[Any]]) -> Sequence[Row[Any]]:
    """Return what a lease returned in the order of the queue: RETURNING follows the plan."""
    return sorted(rows, key=_PLACE)


def deliveries(
    context: Context, queue: str, rows: Sequence[Any], worker: int | None
) -> list[Delivery]:
    """Return what a lease of this worker returned."""
    return [
        Delivery(row[0], queue, row[1], payload, headers, *row[_REST], worker)  # type: ignore[call-arg]
        for row, (payload, headers) in zip(rows, decode_all(context.codec, rows), strict=True)
    ]


def decodable(
    session: Session, context: Context, leased: list[Delivery]
) -> tuple[list[Delivery], list[Delivery]]:
    """Make dead letters of the messages whose payload or headers cannot be decoded.

    In the caller's transaction: an error here would roll back the lease and its attempt, and the
    same message would come first again each time.

    Returns:
        The other deliveries, and the dead ones.
    """
    undecodable = [delivery for delivery in leased if type(delivery.decoded) is PayloadError]
    if not undecodable:
        return leased, []
    dead = settle.dead_letter_undecodable(session, context, undecodable)
    return (
        [delivery for delivery in leased if type(delivery.decoded) is not PayloadError],
        [delivery for delivery in undecodable if delivery.id in dead],
    )


def explain_nothing(session: Session, context: Context, queue: str, worker: int | None) -> None:
    """Raise if nothing was leased because the queue or the worker does not exist, or may not lease.

    Otherwise there may be messages whose attempts are used up: make dead letters of some.
    """
    if (
        execute(session, context, queues.get(context.tables), {"queue": queue}).one_or_none()
        is None
    ):
        raise queue_not_found(session, context, queue)
    if worker is not None:
        values = {"worker_id": worker}
        row = execute(session, context, workers.get(context.tables), values).one_or_none()
        if row is None:
            raise WorkerNotFound(worker)
        if row.status != "ready":
            raise WorkerNotReady(worker, row.status)
    dead_letter_exhausted(session, context, queue, _DEAD_LETTER_CHUNK)

"""Taking messages under lease."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .. import arguments
from ..errors import WorkerNotFound, WorkerNotReady
from ..statements import lease as statements
from ..statements import queues, workers
from ..statements.parts import MOVED, tables
from ..types import Criteria, Delivery
from . import floors
from .archive import bury
from .context import Context, criteria_on, decoded_each, queue_not_found, refresh, run

__all__ = ["deliveries", "dequeue", "explain_nothing", "from_floor", "in_order"]

_BURIED_AT_ONCE = 100
"""A dequeue that finds nothing makes dead letters of so many messages that are out of attempts:
their last holders died, and nobody else may be there to do it."""


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
    holder = context.worker if worker is None else arguments.worker_id(worker)
    criteria = criteria_on(where, tables(context.models).message)
    arguments.check_queue_name(queue)
    values = {
        "queue": queue,
        "limit": arguments.checked_limit(limit),
        "lease": None if lease is None else arguments.duration(lease, "lease", positive=True),
        "worker": holder,
        "attempts": None,
    }
    by_worker = holder is not None
    if criteria:
        statement = statements.dequeue_where(context.models, criteria, by_worker=by_worker)
        rows = in_order(run(session, context, statement, values))
    else:
        rows = from_floor(
            session,
            context,
            queue,
            statements.dequeue(context.models, by_worker=by_worker, floored=True),
            statements.dequeue(context.models, by_worker=by_worker),
            values,
        )
    refresh(session, context.models.message, rows, MOVED)
    if not rows:
        explain_nothing(session, context, queue, holder)
    return deliveries(context, queue, rows, holder)


def from_floor(
    session: Session,
    context: Context,
    queue: str,
    floored: Executable,
    sweep: Executable,
    values: dict[str, Any],
) -> Sequence[Row[Any]]:
    """Lease from where this process was last, or from the beginning: see `pgqrs_sa.floor`."""
    floor, start = floors.begin(session, context, queue)
    if start is not None:
        rows = in_order(run(session, context, floored, values | floors.binds(start)))
        if rows:
            floors.learn(session, floor, rows)
            return rows
    swept_at = time.monotonic()
    rows = in_order(run(session, context, sweep, values))
    floors.learn(session, floor, rows, swept_at=swept_at, full=len(rows) == values["limit"])
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
        for row, (payload, headers) in zip(rows, decoded_each(context.codec, rows), strict=True)
    ]


def explain_nothing(session: Session, context: Context, queue: str, worker: int | None) -> None:
    """Raise if there was nothing because the queue or the worker is not what was meant.

    Otherwise there may be messages whose attempts are used up: make dead letters of some.
    """
    if run(session, context, queues.get(context.models), {"queue": queue}).one_or_none() is None:
        raise queue_not_found(session, context, queue)
    if worker is not None:
        values = {"worker_id": worker}
        row = run(session, context, workers.get(context.models), values).one_or_none()
        if row is None:
            raise WorkerNotFound(worker)
        if row.status != "ready":
            raise WorkerNotReady(worker, row.status)
    bury(session, context, queue, _BURIED_AT_ONCE)

"""Leasing messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any

from sqlalchemy import Row
from sqlalchemy.sql import Executable

from .. import validation
from ..errors import PayloadError, WorkerNotFound, WorkerNotReady
from ..types import Delivery, unwatched
from . import cursors, settle
from .criteria import Criteria, criteria_on
from .queues import get as get_queue
from .scope import Context, Scope, decode_all, queue_not_found
from .sessions import expire_deleted, sync_loaded
from .sql import archive, queues, workers
from .sql import lease as statements
from .sql.fragments import MOVED

__all__ = [
    "dead_letter_exhausted",
    "decodable",
    "deliveries",
    "dequeue",
    "explain_nothing",
    "in_order",
    "new_delivery",
]

_DEAD_LETTER_CHUNK = 100
"""The number of exhausted messages that a dequeue that finds nothing turns into dead letters.

Their last holders died, and perhaps no consumer with housekeeping runs."""

_MOST_TRIES = 100
"""How often a dequeue leases again when it leased only messages that cannot be decoded."""


def dequeue(
    scope: Scope,
    queue: str,
    limit: int,
    lease: float | timedelta | None,
    worker: object,
    where: Criteria,
) -> list[Delivery]:
    """Lease up to ``limit`` visible messages and count the attempt."""
    holder = scope.context.worker if worker is None else validation.validate_worker_id(worker)
    criteria = criteria_on(where, scope.tables.message)
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
        found, dead = _leased(scope, queue, criteria, values)
        if found or not dead:
            break
    if not found:
        explain_nothing(scope, queue, holder)
    return found


def _leased(
    scope: Scope,
    queue: str,
    criteria: tuple[Any, ...],
    values: dict[str, Any],
) -> tuple[list[Delivery], list[Delivery]]:
    """Lease once; return the same as `decodable`."""
    by_worker = values["worker"] is not None
    if criteria:
        statement = statements.dequeue_where(scope.tables, criteria, by_worker=by_worker)
        rows = in_order(scope.execute(statement, values))
    else:
        statement = statements.dequeue(scope.tables, by_worker=by_worker)
        rows = _lease_from_cursor(scope, statement, values)
    sync_loaded(scope.session, scope.context.models.message, rows, MOVED)
    return decodable(scope, deliveries(scope.context, queue, rows, values["worker"]))


def _lease_from_cursor(
    scope: Scope, statement: Executable, values: dict[str, Any]
) -> Sequence[Row[Any]]:
    """Lease from the cursor, or from the beginning: see `_core.cursor`."""
    taking = cursors.CursorUse(scope, statement, values)
    while True:
        rows = in_order(scope.execute(statement, values | taking.binds()))
        if taking.record(rows):
            return rows


# By position, in the order of `statements.lease`: by name it takes three times as long.
_COLUMNS = statements.DELIVERED
_PLACE = itemgetter(*map(_COLUMNS.index, ("priority", "vt", "id")))
_REST = slice(_COLUMNS.index("priority"), len(_COLUMNS))


def in_order(rows: Iterable[Row[Any]]) -> Sequence[Row[Any]]:
    """Return the rows of a lease in the order of the queue: RETURNING has no defined order."""
    return sorted(rows, key=_PLACE)


class _NewDelivery(Delivery.__base__):  # type: ignore[name-defined,misc]
    """A delivery that is being made: `Delivery`, but its attributes can be set."""

    __slots__ = ("fencing_token", "leased_until", "watch", "worker_id")
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__


def new_delivery(
    id: int,
    queue: str,
    text: str,
    decoded: Any,
    headers: dict[str, Any] | None,
    priority: int,
    vt: datetime,
    enqueued_at: datetime,
    read_ct: int,
    max_read_ct: int | None,
    key: str | None,
    last_error: str | None,
    leased_until: datetime,
    fencing_token: int,
    worker_id: int | None,
) -> Delivery:
    """Return ``Delivery(...)`` in 0.4 of the time.

    The constructor of a frozen class calls a function for each attribute: that was a tenth of all
    that a consumer does for a message.
    """
    new: Any = _NewDelivery.__new__(_NewDelivery)
    new.id = id
    new.queue = queue
    new.text = text
    new.decoded = decoded
    new.headers = headers
    new.priority = priority
    new.vt = vt
    new.enqueued_at = enqueued_at
    new.read_ct = read_ct
    new.max_read_ct = max_read_ct
    new.key = key
    new.last_error = last_error
    new.leased_until = leased_until
    new.fencing_token = fencing_token
    new.worker_id = worker_id
    new.watch = unwatched
    new.__class__ = Delivery
    delivery: Delivery = new
    return delivery


def deliveries(
    context: Context, queue: str, rows: Sequence[Any], worker: int | None
) -> list[Delivery]:
    """Return the deliveries for the rows that a lease returned."""
    return [
        new_delivery(row[0], queue, row[1], payload, headers, *row[_REST], worker)  # type: ignore[call-arg]
        for row, (payload, headers) in zip(rows, decode_all(context.codec, rows), strict=True)
    ]


def decodable(scope: Scope, leased: list[Delivery]) -> tuple[list[Delivery], list[Delivery]]:
    """Make dead letters of the messages whose payload or headers cannot be decoded.

    This happens in the caller's transaction. Raising instead would roll back the lease and its
    attempt, and the same message would be leased first every time.

    Returns:
        The other deliveries, and the dead ones.
    """
    undecodable = [delivery for delivery in leased if type(delivery.decoded) is PayloadError]
    if not undecodable:
        return leased, []
    dead = settle.dead_letter_undecodable(scope, undecodable)
    return (
        [delivery for delivery in leased if type(delivery.decoded) is not PayloadError],
        [delivery for delivery in undecodable if delivery.id in dead],
    )


def explain_nothing(scope: Scope, queue: str, worker: int | None, look: int | None = None) -> bool:
    """Raise if nothing was leased because the queue or the worker is missing, or may not lease.

    Otherwise make dead letters of some exhausted messages, if there are any. The lease that found
    nothing has read all visible messages, and so does this.

    Returns:
        Whether there may be more of them.
    """
    if scope.execute(queues.get(scope.tables), {"queue": queue}).one_or_none() is None:
        raise queue_not_found(scope, queue)
    if worker is not None:
        values = {"worker_id": worker}
        row = scope.execute(workers.get(scope.tables), values).one_or_none()
        if row is None:
            raise WorkerNotFound(worker)
        if row.status != "ready":
            raise WorkerNotReady(worker, row.status)
    return dead_letter_exhausted(scope, queue, _DEAD_LETTER_CHUNK, look) == _DEAD_LETTER_CHUNK


def dead_letter_exhausted(scope: Scope, queue: str, limit: int, look: int | None = None) -> int:
    """Archive exhausted messages as dead letters; return how many.

    Args:
        scope: The session, and the settings of the service.
        queue: The name of the queue.
        limit: The most to archive.
        look: At how many visible messages of each priority to look; None for all.
    """
    validation.validate_queue_name(queue)
    values = {"queue": queue, "limit": validation.validate_limit(limit), "look": look}
    ids = scope.execute(archive.dead_letter_exhausted(scope.tables), values).scalars().all()
    if not ids:
        get_queue(scope, queue)
    expire_deleted(scope.session, scope.context.models.message, ids)
    return len(ids)

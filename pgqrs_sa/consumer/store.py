"""What a consumer does in the database, beside what `QueueService` offers.

On the consumer's own connection nothing here waits for a lock: a row that another transaction is
just changing is left as it is, and reported as busy. One consumer has many leases, and one of them
must not hold up the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

from .. import validation
from .._core import cursors, settle
from .._core.lease import decodable, in_order
from .._core.lease import deliveries as deliveries_of
from .._core.scope import Scope
from .._core.sql import consume as statements
from .._core.sql import lease as leasing
from .._core.sql import settle as settling
from ..errors import ReadOnlyDatabase
from ..types import Delivery, Outcome
from .disposition import Disposition

__all__ = [
    "QueueCheck",
    "SettledAndLeased",
    "SettledStatus",
    "UnansweredLease",
    "apply",
    "check_queues",
    "lock_messages",
    "lookup_status",
    "release_unanswered",
    "renew",
    "server_info",
    "settle_and_lease",
    "try_housekeeping_lock",
]

SettledStatus: TypeAlias = Outcome | Literal["busy"]
"""What became of a delivery that could not be settled: its outcome, or "busy" while another
transaction has its row locked."""

_OWN_OUTCOMES = (Outcome.ARCHIVED, Outcome.DISCARDED, Outcome.DEAD)


@dataclass(frozen=True, slots=True)
class SettledAndLeased:
    """What one turn brought.

    Attributes:
        settled: The ids that were archived.
        leased: The new deliveries, in queue order.
        undecodable: Those that were leased, and are dead letters now.
    """

    settled: frozenset[int]
    leased: list[Delivery]
    undecodable: list[Delivery] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UnansweredLease:
    """A turn whose reply was lost: it may have leased messages that nobody knows of.

    Attributes:
        worker: For whom.
        queue: From which queue.
        lease: For how long.
        since: The monotonic clock before it was sent.
        until: The monotonic clock after it was given up.
    """

    worker: int
    queue: str
    lease: timedelta
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class QueueCheck:
    """What a look at some queues has found.

    Attributes:
        ready: Queues with a message that this worker could lease, were it not locked.
        exhausted: Queues with messages whose attempts are used up.
        missing: Names that no queue has.
    """

    ready: frozenset[str]
    exhausted: frozenset[str]
    missing: frozenset[str]


def settle_and_lease(
    scope: Scope,
    done: Sequence[Delivery],
    queue: str,
    limit: int,
    lease: timedelta,
    attempts: int | None,
) -> SettledAndLeased:
    """Archive what is done, and lease up to ``limit`` messages of a queue, in one statement."""
    context = scope.context
    values = {
        **settle.fence(done),
        "queue": queue,
        "limit": limit,
        "lease": lease,
        "worker": context.worker,
        "attempts": attempts,
    }
    statement = statements.settle_and_lease(context.tables)
    taking = cursors.CursorUse(scope, statement, values)
    rows = scope.execute(statement, values | taking.binds()).all()
    taken = in_order(row for row in rows if row.id is not None)
    (settled,) = (row.settled for row in rows if row.id is None)
    if not taking.record(taken):
        beginning = leasing.dequeue(context.tables, by_worker=True)
        taken = in_order(scope.execute(beginning, values | taking.binds()))
        taking.record(taken)
    found = deliveries_of(context, queue, taken, context.worker)
    return SettledAndLeased(frozenset(settled or ()), *decodable(scope, found))


def renew(scope: Scope, held: Sequence[Delivery], lease: timedelta) -> frozenset[int]:
    """Let leases run out ``lease`` from now; return the ids for which that was possible."""
    values = settle.fence(held, required=0, lease=lease)
    statement = settling.extend(scope.tables, skip_locked=True)
    return frozenset(row.id for row in scope.execute(statement, values))


def lookup_status(scope: Scope, deliveries: Sequence[Delivery]) -> dict[int, SettledStatus]:
    """Say what became of deliveries that were just not settled.

    A row in the archive with the delivery's own fencing token is the delivery's own work, the
    reply to whose COMMIT was lost on the way; or, when it is dead, that of whoever buried it.
    """
    values = {"ids": [delivery.id for delivery in deliveries]}
    rows = scope.execute(settling.whereabouts(scope.tables), values).all()
    by_id: dict[int, list[Any]] = {}
    for row in rows:
        by_id.setdefault(row.id, []).append(row)
    return {delivery.id: _status(delivery, by_id.get(delivery.id, ())) for delivery in deliveries}


def _status(delivery: Delivery, rows: Iterable[Any]) -> SettledStatus:
    for row in rows:
        if row.fencing_token == delivery.fencing_token:
            if row.held:
                return "busy"
            if row.settled and row.state in _OWN_OUTCOMES:
                return Outcome(row.state)
            return Outcome.LOST
    return Outcome.LOST


def check_queues(scope: Scope, queues: Sequence[str]) -> QueueCheck:
    """Return which of these queues have something for this worker, in one statement."""
    values = {"queues": list(queues), "worker": scope.context.worker}
    found: dict[str, set[str]] = {"ready": set(), "exhausted": set(), "missing": set()}
    for row in scope.execute(statements.check_queues(scope.tables), values):
        found[row.found].add(row.queue)
    return QueueCheck(**{what: frozenset(names) for what, names in found.items()})


def release_unanswered(scope: Scope, turns: Sequence[UnansweredLease], known: Iterable[int]) -> int:
    """Give back what turns have leased whose replies were lost; return how many messages.

    Args:
        scope: The session, and the settings of the service.
        turns: Those without a reply.
        known: The fencing tokens of leases that the consumer has been told of.
    """
    listed, count = sorted(known), 0
    sent = time.monotonic()
    at: datetime = scope.execute(statements.clock()).scalar_one()
    told = time.monotonic()
    for unanswered in turns:
        values = {
            "worker_id": unanswered.worker,
            "queue": unanswered.queue,
            "lease": unanswered.lease,
            # The server read its clock between the two moments of ours: the turn began neither
            # before nor after these.
            "since": at - timedelta(seconds=told - unanswered.since),
            "until": at - timedelta(seconds=sent - unanswered.until),
            "known": listed,
        }
        count += len(scope.execute(statements.release_unanswered(scope.tables), values).all())
    return count


def lock_messages(scope: Scope, deliveries: Sequence[Delivery]) -> None:
    """Lock deliveries until the transaction ends, or raise `LeaseLost`.

    For transactions that keep one snapshot (REPEATABLE READ, SERIALIZABLE): there a renewal by
    another transaction would make the acknowledgement fail. A locked message needs no renewal.
    """
    values = settle.fence(deliveries)
    if len(scope.execute(statements.lock_messages(scope.tables), values).all()) < len(deliveries):
        raise settle.lease_lost(scope, deliveries)


def try_housekeeping_lock(scope: Scope) -> bool:
    """Return whether this transaction is the one that tidies up now."""
    return bool(scope.execute(statements.try_housekeeping_lock(scope.tables)).scalar_one())


def server_info(scope: Scope) -> str:
    """Return the server's default isolation level, or raise if nothing can be leased there.

    Raises:
        ReadOnlyDatabase: a standby, or a database that is set to read only.
    """
    row = scope.execute(statements.server_info()).one()
    if row.read_only:  # as every transaction of a standby is
        raise ReadOnlyDatabase(standby=row.standby)
    isolation: str = row.isolation
    return isolation


_MaybeOutcome: TypeAlias = Outcome | None
"""None of what is not held, or is locked."""


def apply(scope: Scope, dispositions: Sequence[Disposition], *, strict: bool) -> dict[int, Outcome]:
    """Settle deliveries, each by its disposition.

    Args:
        scope: The session, and the settings of the service.
        dispositions: How each is settled.
        strict: All of them, or `LeaseLost`; otherwise rows that are locked are left alone.

    Returns:
        The outcome of each that was settled, by its id. What is missing is not held, or is locked.
    """
    outcomes: dict[int, Outcome] = {}
    archives = [
        disposition.delivery for disposition in dispositions if disposition.action == "archive"
    ]
    if archives:
        done = settle.archive(scope, archives, "archived", None, strict, skip_locked=not strict)
        outcomes |= {
            delivery.id: Outcome.ARCHIVED
            for delivery, archived in zip(archives, done, strict=True)
            if archived
        }
    for disposition in dispositions:
        if (settle_one := _BY_ACTION.get(disposition.action)) is not None and (
            outcome := settle_one(scope, disposition, strict)
        ):
            outcomes[disposition.delivery.id] = outcome
    return outcomes


def _discard(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (done,) = settle.archive(
        scope,
        [disposition.delivery],
        "discarded",
        disposition.reason,
        strict,
        skip_locked=not strict,
    )
    return Outcome.DISCARDED if done else None


def _retry(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    limit = disposition.delivery.max_read_ct
    if strict or (limit is not None and disposition.delivery.read_ct >= limit):
        return _fail(scope, disposition, strict)
    # An attempt is left. `settle.fail` makes a dead letter of what it could not put back, and
    # would do that to a row that was locked at first, and then not any more.
    error = validation.error_text(disposition.error_text)
    values = settle.fence(
        [disposition.delivery], required=0, errors=[error], delays=[disposition.delay]
    )
    statement = settling.reschedule_failed(scope.tables, skip_locked=True)
    return Outcome.RETRIED if scope.execute(statement, values).all() else None


def _fail(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (failure,) = settle.fail(
        scope,
        [disposition.delivery],
        disposition.error_text,
        disposition.delay,
        disposition.reason,
        disposition.action == "dead",
        strict,
        skip_locked=not strict,
    )
    if failure is None:
        return None
    return Outcome.DEAD if failure.dead else Outcome.RETRIED


def _release(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (done,) = settle.release(
        scope, [disposition.delivery], disposition.delay, strict, skip_locked=not strict
    )
    return Outcome.RELEASED if done else None


_BY_ACTION: dict[str, Callable[[Scope, Disposition, bool], _MaybeOutcome]] = {
    "discard": _discard,
    "retry": _retry,
    "dead": _fail,
    "release": _release,
}

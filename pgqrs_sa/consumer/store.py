"""The operations of a consumer in the database that `QueueService` does not offer.

On the consumer's own connection none of them waits for a lock: a row that another transaction has
locked is left unchanged, and reported as busy. A consumer has many leases, and one of them must not
delay the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

from .. import migrations, validation
from .._core import cursors, settle
from .._core.lease import decodable, in_order
from .._core.lease import deliveries as deliveries_of
from .._core.scope import Scope
from .._core.sql import consume as statements
from .._core.sql import lease as leasing
from .._core.sql import settle as settling
from ..declared import DeclaredQueue
from ..errors import InvalidArgument, PayloadError, ReadOnlyDatabase
from ..resources import Queues
from ..types import Delivery, Outcome
from .disposition import Disposition
from .handlers import Handler

__all__ = [
    "QueueCheck",
    "SettleAndLease",
    "SettledAndLeased",
    "SettledStatus",
    "UnansweredLease",
    "apply",
    "check_database",
    "check_queues",
    "lock_messages",
    "lookup_status",
    "release_unanswered",
    "renew",
    "server_info",
    "try_housekeeping_lock",
]

log = logging.getLogger("pgqrs_sa.consumer")

SettledStatus: TypeAlias = Outcome | Literal["busy"]
"""The outcome of a delivery that could not be settled, or "busy" while another transaction has its
row locked."""

_OWN_OUTCOMES = (Outcome.ARCHIVED, Outcome.DISCARDED, Outcome.DEAD)


@dataclass(frozen=True, slots=True)
class SettledAndLeased:
    """The result of `SettleAndLease`.

    Attributes:
        settled: The ids that were archived.
        leased: The new deliveries, in queue order.
        undecodable: Deliveries that were leased, could not be decoded, and are dead letters now.
    """

    settled: frozenset[int]
    leased: list[Delivery]
    undecodable: list[Delivery] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UnansweredLease:
    """A lease statement whose reply was lost: it may have leased messages unknown to the consumer.

    Attributes:
        worker: The worker that leased.
        queue: The queue.
        lease: The length of the lease.
        since: The monotonic clock before the statement was sent.
        until: The monotonic clock after it failed.
    """

    worker: int
    queue: str
    lease: timedelta
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class QueueCheck:
    """The result of `check_queues`.

    Attributes:
        ready: Queues with a visible message for this worker, which may be locked.
        exhausted: Queues with exhausted messages.
        missing: Names without a queue.
    """

    ready: frozenset[str]
    exhausted: frozenset[str]
    missing: frozenset[str]


class SettleAndLease:
    """Archive what is done, and lease messages of a queue, in one statement.

    In two halves, so that the caller may do something else while the statement is on its way.

    Args:
        scope: The session, and the settings of the service.
        done: Deliveries to archive.
        queue: The queue to lease from.
        limit: How many messages to lease at most.
        lease: For how long.
        attempts: The limit of attempts, or None for the queue's own.

    Attributes:
        statement: The statement to execute.
        values: Its parameters. It must be sent at once, as its time is measured.
    """

    def __init__(
        self,
        scope: Scope,
        done: Sequence[Delivery],
        queue: str,
        limit: int,
        lease: timedelta,
        attempts: int | None,
    ) -> None:
        self._context = scope.context
        self._queue = queue
        self._values = {
            **settle.fence(done),
            "queue": queue,
            "limit": limit,
            "lease": lease,
            "worker": scope.context.worker,
            "attempts": attempts,
        }
        self.statement = statements.settle_and_lease(scope.tables)
        self._cursor = cursors.CursorUse(scope, self.statement, self._values)
        self.values = self._values | self._cursor.binds()
        self._settled: frozenset[int] = frozenset()
        self._leased: list[Delivery] = []
        self._looks_again = False

    def read(self, rows: Sequence[Any]) -> SettledAndLeased | None:
        """Return the result that the rows stand for, or None if `result` has to be asked."""
        (told,) = (row for row in rows if row.id is None)
        self._settled = frozenset(told.settled or ())
        taken = in_order(row for row in rows if row is not told)
        self._looks_again = not self._cursor.record(taken)
        if self._looks_again or not self._take(taken):
            return None
        return SettledAndLeased(self._settled, self._leased)

    def _take(self, rows: Sequence[Any]) -> bool:
        """Note what was leased; return whether all of it can be decoded."""
        context = self._context
        self._leased = deliveries_of(context, self._queue, rows, context.worker)
        return not any(type(delivery.decoded) is PayloadError for delivery in self._leased)

    def result(self, scope: Scope) -> SettledAndLeased:
        """Return what the statement did, after others that this needs."""
        if self._looks_again:
            beginning = leasing.dequeue(scope.tables, by_worker=True)
            values = self._values | self._cursor.binds()
            taken = in_order(scope.execute(beginning, values))
            self._cursor.record(taken)
            self._take(taken)
        return SettledAndLeased(self._settled, *decodable(scope, self._leased))

    def run(self, scope: Scope) -> SettledAndLeased:
        """Execute the statement, wait for it, and return what it did."""
        rows = scope.execute(self.statement, self.values).all()
        return self.read(rows) or self.result(scope)


def renew(scope: Scope, held: Sequence[Delivery], lease: timedelta) -> frozenset[int]:
    """Let leases expire ``lease`` from now; return the ids of those that were renewed."""
    values = settle.fence(held, required=0, lease=lease)
    statement = settling.extend(scope.tables, skip_locked=True)
    return frozenset(row.id for row in scope.execute(statement, values))


def lookup_status(scope: Scope, deliveries: Sequence[Delivery]) -> dict[int, SettledStatus]:
    """Return the status of deliveries that could not be settled.

    A row in the archive with the delivery's own fencing token was written by this delivery, and
    only the reply to its COMMIT was lost. A dead letter may also have been made by another process.
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
    """Return which of these queues have messages for this worker, in one statement."""
    values = {"queues": list(queues), "worker": scope.context.worker}
    found: dict[str, set[str]] = {"ready": set(), "exhausted": set(), "missing": set()}
    for row in scope.execute(statements.check_queues(scope.tables), values):
        found[row.found].add(row.queue)
    return QueueCheck(**{what: frozenset(names) for what, names in found.items()})


def release_unanswered(scope: Scope, turns: Sequence[UnansweredLease], known: Iterable[int]) -> int:
    """Release the leases of statements whose replies were lost; return how many messages.

    Args:
        scope: The session, and the settings of the service.
        turns: The statements without a reply.
        known: The fencing tokens of the leases that the consumer knows.
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
            # The server read its clock between these two readings of ours, so the lease began
            # between them.
            "since": at - timedelta(seconds=told - unanswered.since),
            "until": at - timedelta(seconds=sent - unanswered.until),
            "known": listed,
        }
        count += len(scope.execute(statements.release_unanswered(scope.tables), values).all())
    return count


def lock_messages(scope: Scope, deliveries: Sequence[Delivery]) -> None:
    """Lock deliveries until the transaction ends, or raise `LeaseLost`.

    Needed in transactions that keep one snapshot (REPEATABLE READ, SERIALIZABLE): a renewal by
    another transaction would make the acknowledgement fail. A locked message needs no renewal.
    """
    values = settle.fence(deliveries)
    if len(scope.execute(statements.lock_messages(scope.tables), values).all()) < len(deliveries):
        raise settle.lease_lost(scope, deliveries)


def try_housekeeping_lock(scope: Scope) -> bool:
    """Return whether this transaction got the lock for housekeeping."""
    return bool(scope.execute(statements.try_housekeeping_lock(scope.tables)).scalar_one())


def server_info(scope: Scope) -> str:
    """Return the server's default isolation level, or raise if nothing can be leased there.

    Raises:
        ReadOnlyDatabase: the server is a standby, or the database is read only.
    """
    row = scope.execute(statements.server_info()).one()
    if row.read_only:  # as every transaction of a standby is
        raise ReadOnlyDatabase(standby=row.standby)
    isolation: str = row.isolation
    return isolation


def check_database(
    scope: Scope,
    handlers: Sequence[Handler],
    declared: Sequence[DeclaredQueue] = (),
    *,
    create: bool = True,
) -> dict[str, timedelta]:
    """Return the length of a lease by queue; raise if a consumer cannot work on this database.

    Args:
        scope: The session, and the settings of the service.
        handlers: The handlers of the consumer.
        declared: Queues to compare with those in the database.
        create: Create the missing ones.

    Raises:
        ReadOnlyDatabase: the server is a standby, or the database is read only.
        SchemaVersionError: the tables have a version that this release does not support.
        QueueNotFound: with similar names.
    """
    if not handlers:
        raise InvalidArgument("this consumer has no handler: decorate one with @consumer.on(queue)")
    server_info(scope)
    migrations.check(scope.session, models=scope.context.models)
    missing = _synchronized(scope, declared, create=create)
    leases = {}
    for handler in handlers:
        if (queue := missing.get(handler.queue)) is not None:
            leases[handler.queue] = handler.lease or queue.lease_at_creation
            continue
        info = Queues(scope).get(handler.queue)
        leases[handler.queue] = handler.lease or timedelta(seconds=info.lease_seconds)
    return leases


def _synchronized(
    scope: Scope, declared: Sequence[DeclaredQueue], *, create: bool
) -> dict[str, DeclaredQueue]:
    """Create or look up declared queues; log differences, and return the missing ones."""
    missing = set()
    for queue in Queues(scope).sync(declared, dry_run=not create):
        if queue.status == "missing":
            missing.add(queue.name)
            log.info("queue %r does not exist: the consumer creates it when it starts", queue.name)
        elif queue.status == "created":
            log.info("queue %r was missing, and is created", queue.name)
        for difference in queue.differences:
            log.warning(
                "queue %r: %s; to change it, call queues.sync(..., update=True), or run "
                "pgqrs queue sync --update",
                queue.name,
                difference,
            )
    return {queue.name: queue for queue in declared if queue.name in missing}


_MaybeOutcome: TypeAlias = Outcome | None
"""None for a delivery that is not held, or whose row is locked."""


def apply(scope: Scope, dispositions: Sequence[Disposition], *, strict: bool) -> dict[int, Outcome]:
    """Settle deliveries, each by its disposition.

    Args:
        scope: The session, and the settings of the service.
        dispositions: How each is settled.
        strict: Settle all of them, or raise `LeaseLost`; otherwise skip locked rows.

    Returns:
        The outcomes by id. A delivery that is missing here is not held, or its row is locked.
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
    # An attempt is left. `settle.fail` dead-letters what it could not reschedule. That would
    # include a row that was locked for its first statement, and no longer for the second.
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

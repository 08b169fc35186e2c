"""The values that the pgqrs module returns, with pgqrs' names.

Times that pgqrs gives as text (RFC 3339) are text here too; those that it does not give at all,
``vt`` and ``enqueued_at`` of a `QueueMessage`, are aware datetimes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Self, TypeVar, overload

from .. import types as core
from ..errors import PayloadError

__all__ = [
    "ArchivedMessage",
    "QueueInfo",
    "QueueMessage",
    "QueueMetrics",
    "SystemStats",
    "WorkerHealthStats",
    "WorkerInfo",
    "WorkerStats",
    "WorkerStatus",
]


_T = TypeVar("_T")


class Alias(Generic[_T]):
    """A read-only attribute: pgqrs' name of another attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, value: None, owner: type) -> Self: ...
    @overload
    def __get__(self, value: object, owner: type) -> _T: ...
    def __get__(self, value: object | None, owner: type) -> Any:
        return self if value is None else getattr(value, self._name)


class WorkerStatus(StrEnum):
    """The status of a worker: ready or suspended, and at the end stopped."""

    Ready = "ready"
    Suspended = "suspended"
    Stopped = "stopped"


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue.

    Attributes:
        id: The queue's id.
        queue_name: Its name.
        created_at: When it was created, RFC 3339.
    """

    id: int
    queue_name: str
    created_at: str

    @classmethod
    def of(cls, info: core.QueueInfo) -> QueueInfo:
        """Convert the service's value."""
        return cls(info.id, info.name, info.created_at.isoformat())


@dataclass(frozen=True, slots=True)
class _Content:
    id: int
    queue_id: int
    decoded: Any = field(repr=False)
    headers: Mapping[str, Any] | None
    read_ct: int

    @property
    def payload(self) -> Any:
        """The payload; `PayloadError` when what is stored cannot be decoded."""
        if isinstance(self.decoded, PayloadError):
            raise self.decoded
        return self.decoded


@dataclass(frozen=True, slots=True)
class QueueMessage(_Content):
    """A live message.

    Attributes:
        id: The message's id.
        queue_id: The id of its queue.
        payload: The payload, decoded.
        headers: The producer's headers, or None.
        read_ct: How often it was dequeued; 1 in the first attempt.
        vt: When it becomes visible: if it is leased, when the lease ends.
        enqueued_at: When it was enqueued, by the database's clock.
    """

    vt: datetime
    enqueued_at: datetime

    @classmethod
    def of(cls, queue_id: int, message: core.Delivery | core.MessageInfo) -> QueueMessage:
        """Convert the service's value."""
        return cls(
            message.id,
            queue_id,
            message.decoded,
            message.headers,
            message.read_ct,
            max(message.vt, message.leased_until or message.vt),
            message.enqueued_at,
        )


@dataclass(frozen=True, slots=True)
class ArchivedMessage(_Content):
    """A settled message; times are RFC 3339.

    Attributes:
        id: The id of the message.
        original_msg_id: The same.
        outcome: ``archived``, ``dead``, ``cancelled`` or ``discarded``.
        reason: Why, for all but ``archived``.
        last_error: The error of its last failed attempt, or None.
    """

    original_msg_id: int
    enqueued_at: str
    archived_at: str
    vt: str
    dequeued_at: str | None
    producer_worker_id: int | None
    consumer_worker_id: int | None
    outcome: str
    reason: str | None
    last_error: str | None

    @classmethod
    def of(cls, queue_id: int, message: core.ArchivedInfo) -> ArchivedMessage:
        """Convert the service's value."""
        return cls(
            message.id,
            queue_id,
            message.decoded,
            message.headers,
            message.read_ct,
            original_msg_id=message.original_msg_id,
            enqueued_at=message.enqueued_at.isoformat(),
            archived_at=message.archived_at.isoformat(),
            vt=message.vt.isoformat(),
            dequeued_at=_text(message.dequeued_at),
            producer_worker_id=message.producer_id,
            consumer_worker_id=message.worker_id,
            outcome=message.outcome,
            reason=message.reason,
            last_error=message.last_error,
        )


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One start of a producer, consumer or admin; times are RFC 3339.

    Attributes:
        id: The worker's id.
        name: ``producer``, ``consumer`` or ``admin``, for those that this module registers.
        hostname: The host that it registered with.
        port: The port that it registered with.
        queue_id: The queue that it works on; None for an admin, or when the queue was deleted.
        queues: The names of all the queues that it works on.
        status: Its status.
        started_at: When it registered.
        heartbeat_at: When its last heartbeat was recorded.
        shutdown_at: When it stopped, or None.
    """

    id: int
    name: str
    hostname: str
    port: int | None
    queue_id: int | None
    queues: Sequence[str]
    status: WorkerStatus
    started_at: str
    heartbeat_at: str
    shutdown_at: str | None

    @classmethod
    def of(cls, queue_ids: Mapping[str, int], info: core.WorkerInfo) -> WorkerInfo:
        """Convert the service's value; ``queue_ids`` are the queues' ids by their names."""
        return cls(
            id=info.id,
            name=info.name,
            hostname=info.hostname,
            port=info.port,
            queue_id=next((queue_ids[name] for name in info.queues if name in queue_ids), None),
            queues=tuple(info.queues),
            status=WorkerStatus(info.status),
            started_at=info.started_at.isoformat(),
            heartbeat_at=info.heartbeat_at.isoformat(),
            shutdown_at=_text(info.shutdown_at),
        )


class _MessageCounts:
    """pgqrs' names for messages by state."""

    __slots__ = ()

    ready: int
    scheduled: int
    leased: int
    exhausted: int
    archived: int
    dead: int
    cancelled: int
    discarded: int

    @property
    def total_messages(self) -> int:
        """All live messages."""
        return self.pending_messages + self.leased

    @property
    def pending_messages(self) -> int:
        """Live messages that are not leased: ready, scheduled or exhausted."""
        return self.ready + self.scheduled + self.exhausted

    locked_messages = Alias[int]("leased")
    """Messages under a lease that has not expired."""

    @property
    def archived_messages(self) -> int:
        """All settled messages; a lower bound where a queue's outcome was counted up to its cap."""
        return self.archived + self.dead + self.cancelled + self.discarded


@dataclass(frozen=True, slots=True)
class QueueMetrics(_MessageCounts, core.QueueMetrics):
    """Counts of one queue at one moment, with the names of `pgqrs_sa.QueueMetrics` and pgqrs'.

    Attributes:
        oldest_pending_message: When the oldest message that is not leased was enqueued; None if
            there is none, and always from `Admin.all_queues_metrics`, which does not read it.
        newest_message: When the newest live message was enqueued; None likewise.
    """

    oldest_pending_message: datetime | None = None
    newest_message: datetime | None = None

    @classmethod
    def of(
        cls,
        counts: core.QueueMetrics,
        oldest_pending_message: datetime | None = None,
        newest_message: datetime | None = None,
    ) -> QueueMetrics:
        """Convert the service's counts, and add two times."""
        names = (field.name for field in fields(core.QueueMetrics))
        counted: dict[str, Any] = {name: getattr(counts, name) for name in names}
        return cls(
            **counted,
            oldest_pending_message=oldest_pending_message,
            newest_message=newest_message,
        )

    name = Alias[str]("queue")
    """The queue's name."""


@dataclass(frozen=True, slots=True)
class SystemStats(_MessageCounts):
    """Counts of everything at one moment; see `pgqrs_sa.QueueMetrics` for the states.

    pgqrs' names are properties. ``schema_version`` is a number here, the version of our tables;
    pgqrs has a text.
    """

    queues: int
    ready: int
    scheduled: int
    leased: int
    exhausted: int
    archived: int
    dead: int
    cancelled: int
    discarded: int
    workers: int
    ready_workers: int
    suspended_workers: int
    stopped_workers: int
    schema_version: int | None

    @classmethod
    def of(
        cls,
        metrics: Sequence[core.QueueMetrics],
        workers: Sequence[core.WorkerInfo],
        schema_version: int | None,
    ) -> SystemStats:
        """Add up the counts of all queues and workers."""
        return cls(
            queues=len(metrics),
            **{
                state: sum(getattr(counts, state) for counts in metrics)
                for state in _MessageCounts.__annotations__
            },
            workers=len(workers),
            **{f"{status}_workers": count for status, count in _by_status(workers).items()},
            schema_version=schema_version,
        )

    total_queues = Alias[int]("queues")
    """The number of queues."""
    total_workers = Alias[int]("workers")
    """The number of workers in any state."""
    active_workers = Alias[int]("ready_workers")
    """The number of workers that are ready."""


class _WorkerCounts:
    """pgqrs' names for workers by state.

    Two states of pgqrs do not exist here, and their counts are 0: a polling worker is ready, and
    an interrupted worker is suspended or stopped.
    """

    __slots__ = ()

    total: int
    ready: int
    suspended: int
    stopped: int

    total_workers = Alias[int]("total")
    """The number of workers in any state."""
    ready_workers = Alias[int]("ready")
    """The number of ready workers."""

    @property
    def polling_workers(self) -> int:
        """Always 0: a polling worker is ready."""
        return 0

    @property
    def interrupted_workers(self) -> int:
        """Always 0: there is no such state."""
        return 0

    suspended_workers = Alias[int]("suspended")
    """The number of suspended workers."""
    stopped_workers = Alias[int]("stopped")
    """The number of stopped workers."""


@dataclass(frozen=True, slots=True)
class WorkerHealthStats(_WorkerCounts):
    """The workers of a queue, or all of them, by state.

    Attributes:
        queue: The queue's name; None for all queues, or for workers without a queue.
        total: The number of workers.
        ready: The number of ready workers.
        suspended: The number of suspended workers.
        stopped: The number of stopped workers.
        stale: The number of workers that are not stopped and have no recent heartbeat.
    """

    queue: str | None
    total: int
    ready: int
    suspended: int
    stopped: int
    stale: int

    @classmethod
    def all_of(
        cls,
        workers: Sequence[core.WorkerInfo],
        known: Sequence[core.WorkerHealth],
        *,
        by_queue: bool,
    ) -> list[WorkerHealthStats]:
        """Return the counts of all workers, or those of each queue by its name."""
        silent = {health.worker.id for health in known if not health.healthy}

        def counted(queue: str | None, some: Sequence[core.WorkerInfo]) -> WorkerHealthStats:
            stale = sum(worker.id in silent for worker in some)
            return cls(queue, len(some), **_by_status(some), stale=stale)

        if not by_queue:
            return [counted(None, workers)]
        names = sorted({name for worker in workers for name in worker.queues})
        found = [
            counted(name, [worker for worker in workers if name in worker.queues]) for name in names
        ]
        idle = [worker for worker in workers if not worker.queues]
        return [*found, counted(None, idle)] if idle else found

    @property
    def queue_name(self) -> str:
        """The queue's name; ``Global`` where `queue` is None."""
        return "Global" if self.queue is None else self.queue

    stale_workers = Alias[int]("stale")
    """The number of workers without a recent heartbeat."""


@dataclass(frozen=True, slots=True)
class WorkerStats(_WorkerCounts):
    """The workers of one queue.

    Attributes:
        queue: The queue's name.
        total: The number of workers.
        ready: The number of ready workers.
        suspended: The number of suspended workers.
        stopped: The number of stopped workers.
        leases: The number of leased messages of the queue.
        shortest_silence: The time since the last heartbeat of any worker, or None.
        oldest_worker_age: The time since the first worker that is not stopped registered, or None.
    """

    queue: str
    total: int
    ready: int
    suspended: int
    stopped: int
    leases: int
    shortest_silence: timedelta | None
    oldest_worker_age: timedelta | None = None

    @classmethod
    def of(
        cls,
        counted: core.QueueMetrics,
        workers: Sequence[core.WorkerInfo],
        known: Sequence[core.WorkerHealth],
    ) -> WorkerStats:
        """Return the counts of one queue's workers."""
        alive = [health for health in known if counted.queue in health.worker.queues]
        return cls(
            counted.queue,
            len(workers),
            **_by_status(workers),
            leases=counted.leased,
            shortest_silence=min((health.silent_for for health in alive), default=None),
            # The last heartbeat plus the silence is now, by the database's clock.
            oldest_worker_age=max(
                (
                    health.worker.heartbeat_at + health.silent_for - health.worker.started_at
                    for health in alive
                ),
                default=None,
            ),
        )

    @property
    def average_messages_per_worker(self) -> float:
        """`leases` divided by the number of workers in any state; 0.0 without workers."""
        return self.leases / self.total if self.total else 0.0

    newest_heartbeat_age = Alias[timedelta | None]("shortest_silence")
    """The time since the last heartbeat of any worker, or None."""


def _by_status(workers: Sequence[core.WorkerInfo]) -> dict[str, int]:
    counted = Counter(worker.status for worker in workers)
    return {
        "ready": counted["ready"],
        "suspended": counted["suspended"],
        "stopped": counted["stopped"],
    }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()

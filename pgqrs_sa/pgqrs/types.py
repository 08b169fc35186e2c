"""The values that the pgqrs module returns, under pgqrs' names.

Times that pgqrs gives as text (RFC 3339) are text here too; those that it does not give at all,
``vt`` and ``enqueued_at`` of a `QueueMessage`, are aware datetimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

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


class WorkerStatus(StrEnum):
    """What a worker is doing: ready and suspended may change to and fro, stopped is the end."""

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
        """Return what the service says of a queue."""
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
        headers: What the producer put beside the payload, or None.
        read_ct: How often it was dequeued; 1 in the first attempt.
        vt: When it becomes visible; of a message that was dequeued, when it does so again.
        enqueued_at: When it was enqueued, by the database's clock.
    """

    vt: datetime
    enqueued_at: datetime

    @classmethod
    def of(cls, queue_id: int, message: core.Delivery | core.MessageInfo) -> QueueMessage:
        """Return what the service says of a message."""
        return cls(
            message.id,
            queue_id,
            message.decoded,
            message.headers,
            message.read_ct,
            message.vt,
            message.enqueued_at,
        )


@dataclass(frozen=True, slots=True)
class ArchivedMessage(_Content):
    """A settled message; times are RFC 3339.

    Attributes:
        id: The id of the archive's row.
        original_msg_id: The id that the message had.
        outcome: ``archived``, ``dead``, ``cancelled`` or ``discarded``.
        reason: Why, for all but ``archived``.
        last_error: What its last failed attempt failed with, or None.
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
        """Return what the service says of an archived message."""
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
        hostname: What it gave as its host.
        port: What it gave as its port.
        queue_id: The queue that it works on; None for an admin, or when the queue is gone.
        queues: The names of all the queues that it works on.
        status: What it is doing.
        started_at: When it registered.
        heartbeat_at: When it was last heard of.
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
        """Return what the service says of a worker."""
        return cls(
            id=info.id,
            name=info.name,
            hostname=info.hostname,
            port=info.port,
            queue_id=next((queue_ids[one] for one in info.queues if one in queue_ids), None),
            queues=tuple(info.queues),
            status=WorkerStatus(info.status),
            started_at=info.started_at.isoformat(),
            heartbeat_at=info.heartbeat_at.isoformat(),
            shutdown_at=_text(info.shutdown_at),
        )


@dataclass(frozen=True, slots=True)
class QueueMetrics(core.QueueMetrics):
    """Counts of one queue at one moment, under the names of `pgqrs_sa.QueueMetrics` and pgqrs'.

    Attributes:
        oldest_pending_message: When the oldest message that nobody holds was enqueued; None if
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
        """Return what the service counted, with the times that were read besides."""
        names = (one.name for one in fields(core.QueueMetrics))
        counted: dict[str, Any] = {name: getattr(counts, name) for name in names}
        return cls(
            **counted,
            oldest_pending_message=oldest_pending_message,
            newest_message=newest_message,
        )

    @property
    def name(self) -> str:
        """The queue's name."""
        return self.queue

    @property
    def total_messages(self) -> int:
        """All live messages."""
        return self.live

    @property
    def pending_messages(self) -> int:
        """Live messages that nobody holds: ready, scheduled or exhausted."""
        return self.live - self.leased

    @property
    def locked_messages(self) -> int:
        """Messages under a lease that has not expired."""
        return self.leased

    @property
    def archived_messages(self) -> int:
        """All settled messages; a lower bound if ``capped`` is not empty."""
        return self.archived + self.dead + self.cancelled + self.discarded


@dataclass(frozen=True, slots=True)
class SystemStats:
    """Counts of everything at one moment; see `pgqrs_sa.QueueMetrics` for the states.

    pgqrs' names are properties. Its schema version is a text, here a number: that of our tables.
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

    @property
    def total_queues(self) -> int:
        """The number of queues."""
        return self.queues

    @property
    def total_workers(self) -> int:
        """The number of workers in any state."""
        return self.workers

    @property
    def active_workers(self) -> int:
        """The number of workers that are ready."""
        return self.ready_workers

    @property
    def total_messages(self) -> int:
        """All live messages."""
        return self.pending_messages + self.locked_messages

    @property
    def pending_messages(self) -> int:
        """Live messages that nobody holds."""
        return self.ready + self.scheduled + self.exhausted

    @property
    def locked_messages(self) -> int:
        """Messages under a lease that has not expired."""
        return self.leased

    @property
    def archived_messages(self) -> int:
        """All settled messages, each outcome of a queue counted up to its cap."""
        return self.archived + self.dead + self.cancelled + self.discarded


class _WorkerCounts:
    """pgqrs' names for workers by state.

    A worker that polls is ready, and an interrupted one is suspended or stopped: these two states
    of pgqrs do not exist here, and their counts are 0.
    """

    __slots__ = ()

    total: int
    ready: int
    suspended: int
    stopped: int

    @property
    def total_workers(self) -> int:
        """The number of workers in any state."""
        return self.total

    @property
    def ready_workers(self) -> int:
        """The number of ready workers."""
        return self.ready

    @property
    def polling_workers(self) -> int:
        """Always 0: a worker that polls is ready."""
        return 0

    @property
    def interrupted_workers(self) -> int:
        """Always 0: there is no such state."""
        return 0

    @property
    def suspended_workers(self) -> int:
        """The number of suspended workers."""
        return self.suspended

    @property
    def stopped_workers(self) -> int:
        """The number of stopped workers."""
        return self.stopped


@dataclass(frozen=True, slots=True)
class WorkerHealthStats(_WorkerCounts):
    """The workers of a queue, or all of them, by state.

    Attributes:
        queue: The queue's name; None for all, or for workers that work on none.
        total: How many there are.
        ready: How many are ready.
        suspended: How many are suspended.
        stopped: How many are stopped.
        stale: How many are not stopped, yet have been silent for longer than was asked.
    """

    queue: str | None
    total: int
    ready: int
    suspended: int
    stopped: int
    stale: int

    @property
    def queue_name(self) -> str:
        """The queue's name; ``Global`` where `queue` is None."""
        return "Global" if self.queue is None else self.queue

    @property
    def stale_workers(self) -> int:
        """The number of workers without a recent heartbeat."""
        return self.stale


@dataclass(frozen=True, slots=True)
class WorkerStats(_WorkerCounts):
    """The workers of one queue.

    Attributes:
        queue: The queue's name.
        total: How many there are.
        ready: How many are ready.
        suspended: How many are suspended.
        stopped: How many are stopped.
        leases: How many messages of the queue are leased, whoever holds them.
        shortest_silence: How long ago the last heartbeat of any of them was, or None.
        oldest_worker_age: How long ago the first of those that are not stopped registered, or None.
    """

    queue: str
    total: int
    ready: int
    suspended: int
    stopped: int
    leases: int
    shortest_silence: timedelta | None
    oldest_worker_age: timedelta | None = None

    @property
    def average_messages_per_worker(self) -> float:
        """`leases` divided by the number of workers in any state; 0.0 without workers."""
        return self.leases / self.total if self.total else 0.0

    @property
    def newest_heartbeat_age(self) -> timedelta | None:
        """The time since the last heartbeat of any worker, or None."""
        return self.shortest_silence


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()

"""The values that the pgqrs module returns, under pgqrs' names.

Times that pgqrs gives as text (RFC 3339) are text here too; those that it does not give at all,
``vt`` and ``enqueued_at`` of a `QueueMessage`, are aware datetimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from .. import types as core
from ..errors import PayloadError

__all__ = [
    "ArchivedMessage",
    "QueueInfo",
    "QueueMessage",
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
class SystemStats:
    """Counts of everything at one moment; see `pgqrs_sa.QueueMetrics` for the states."""

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


@dataclass(frozen=True, slots=True)
class WorkerHealthStats:
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


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The workers of one queue.

    Attributes:
        queue: The queue's name.
        total: How many there are.
        ready: How many are ready.
        suspended: How many are suspended.
        stopped: How many are stopped.
        leases: How many messages of the queue are leased, whoever holds them.
        shortest_silence: How long ago the last heartbeat of any of them was, or None.
    """

    queue: str
    total: int
    ready: int
    suspended: int
    stopped: int
    leases: int
    shortest_silence: timedelta | None


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()

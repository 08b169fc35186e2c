"""The frozen values that go in and come out: nothing here is attached to a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, TypeAlias, TypedDict

from .errors import PayloadError

__all__ = [
    "ArchiveOutcome",
    "ArchivedInfo",
    "Delivery",
    "Failure",
    "Item",
    "MessageInfo",
    "MessageState",
    "Outcome",
    "QueueDifference",
    "QueueInfo",
    "QueueMetrics",
    "Receipt",
    "Seconds",
    "SyncedQueue",
    "WorkerHealth",
    "WorkerInfo",
    "WorkerStatus",
]

Seconds: TypeAlias = float | timedelta
"""A span of time: seconds, or a timedelta."""

MessageState = Literal["ready", "scheduled", "leased", "exhausted"]
ArchiveOutcome = Literal["archived", "dead", "cancelled", "discarded"]
"""The values of the archive's column ``outcome``: those of `Outcome` that settle a message."""

WorkerStatus = Literal["ready", "suspended", "stopped"]
Keep = Literal["all", "failed", "nothing"]
"""Which settled messages a queue moves to the archive; the others are deleted.

``failed``: all but those with the outcome ``archived``.
"""


class Outcome(StrEnum):
    """How an attempt ended, or how a message was settled.

    A member is equal to its value, the text that hooks, the log and the archive have. The first
    four settle the message, which is then in the archive; after the others it is live.

    =============  ====================================  ==========================================
    member         who moves a message there             what happens next
    =============  ====================================  ==========================================
    ``ARCHIVED``   its holder, or a handler that         deleted after the queue's retention,
                   returned                              unless it is put into the queue again
    ``DISCARDED``  its holder; `Discard`                 the same
    ``DEAD``       the last attempt, which failed;       the same
                   `DeadLetter`; what cannot be decoded
    ``CANCELLED``  `Messages.cancel`, while it is not    the same
                   leased
    ``RETRIED``    a failed attempt; `RetryIn`           leased again after the delay
    ``RELEASED``   `Snooze`; a consumer that stops; a    leased again after the delay, if any; the
                   conflict of transactions              attempt is not charged
    ``LOST``       a lease that expired, or a message    its new holder decides
                   that somebody else settled
    =============  ====================================  ==========================================

    docs/reference/states.md has the whole life of a message, with the hook of each outcome.
    """

    ARCHIVED = "archived"
    DISCARDED = "discarded"
    DEAD = "dead"
    CANCELLED = "cancelled"
    RETRIED = "retry"
    RELEASED = "released"
    LOST = "lease lost"


@dataclass(frozen=True, slots=True)
class Item:
    """One message for `enqueue_many`, with options of its own.

    Attributes:
        payload: Any strict JSON value; or objects that a handler's annotation reads back.
        delay: Seconds (or a timedelta) until it becomes visible.
        at: An aware datetime at which it becomes visible; not together with ``delay``.
        priority: Lower goes first; -32768 to 32767.
        headers: A dict stored with the payload.
        key: Deduplicates among the live messages of the queue.
        max_read_ct: Attempts before it is dead; None for the queue's own limit.
    """

    payload: Any
    delay: float | timedelta | None = None
    at: datetime | None = None
    priority: int = 0
    headers: Mapping[str, Any] | None = None
    key: str | None = None
    max_read_ct: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What enqueue gives back.

    Attributes:
        id: The message's id.
        vt: When it becomes visible, by the database's clock.
        duplicate: True when a live message with the same key was there already; ``id`` and
            ``vt`` are that message's.
    """

    id: int
    vt: datetime
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class _Content:
    """The parts that live, leased and archived messages share.

    A payload that cannot be decoded stays a value like any other until somebody reads it, so
    that one such row never hides its neighbours. `dequeue` makes a dead letter of it.
    """

    id: int
    queue: str
    text: str = field(repr=False)
    decoded: Any = field(repr=False, compare=False)
    headers: dict[str, Any] | None = field(repr=False)
    priority: int
    vt: datetime
    enqueued_at: datetime
    read_ct: int
    max_read_ct: int | None
    key: str | None
    last_error: str | None = field(repr=False)

    @property
    def payload(self) -> Any:
        """The decoded payload.

        Raises:
            PayloadError: when the stored text cannot be decoded; ``text`` holds it as it is.
        """
        if isinstance(self.decoded, PayloadError):
            raise self.decoded
        return self.decoded


def unwatched() -> bool:
    """Return False: nobody renews this lease."""
    return False


@dataclass(frozen=True, slots=True)
class Delivery(_Content):
    """A message under lease: yours until ``leased_until``, unless you extend it.

    A settle by anyone but the holder changes nothing: ``fencing_token`` says whose lease it is.

    Attributes:
        id: The message's id.
        queue: The name of its queue.
        text: The payload as stored, undecoded.
        payload: The payload, decoded.
        headers: The producer's headers, or None.
        priority: Lower goes first.
        vt: When it became visible, by the database's clock.
        enqueued_at: When it was enqueued, by the database's clock.
        read_ct: Which attempt this is; the first is 1.
        max_read_ct: Attempts before the message is dead.
        key: Its deduplication key, or None.
        last_error: The error of the previous attempt, or None.
        leased_until: The end of the lease, by the database's clock.
        fencing_token: The number of this lease. No other lease has it, and each later lease of the
            message has a greater one, even after a rollback. Pass it to a system that refuses a
            number smaller than the greatest it has seen for the message. A failover that loses
            commits may assign a number again: see docs/how-to/high-availability.md.
        worker_id: The registered worker that leased it, or None.
        watch: What `lease_lost` asks; a consumer's own, for the deliveries that it renews.
    """

    leased_until: datetime
    fencing_token: int
    worker_id: int | None
    watch: Callable[[], bool] = field(default=unwatched, repr=False, compare=False)

    @property
    def lease_lost(self) -> bool:
        """True once the consumer that renews this lease knows, or must assume, that it is gone.

        A handler that works for long may ask, and stop: its commit would raise `LeaseLost`. Of a
        delivery that comes from `dequeue`, which nobody renews, it is always False.
        """
        return self.watch()

    def __copy__(self) -> Delivery:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Delivery:
        headers, decoded = deepcopy((self.headers, self.decoded), memo)
        return replace(self, headers=headers, decoded=decoded)

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process the lease is not renewed: the consumer that renews it runs here.
        values = [getattr(self, field.name) for field in fields(self) if field.name != "watch"]
        return type(self), tuple(values)


@dataclass(frozen=True, slots=True)
class MessageInfo(_Content):
    """A live message as seen by a reader, who holds no lease on it.

    Attributes:
        state: ``ready``, ``scheduled``, ``leased`` or ``exhausted``, by the database's clock.
        worker_id: The registered worker that holds it, or None.
        producer_id: The registered worker that enqueued it, or None.
        dequeued_at: When the latest lease began, or None if it was given up.
        leased_until: When that lease ends or has ended, or None.
        content: False if payload, headers, key and error were not read, as `Messages.find` may be
            asked: then ``text`` is empty, the others are None, and ``payload`` raises.
    """

    state: MessageState
    worker_id: int | None
    producer_id: int | None
    dequeued_at: datetime | None
    leased_until: datetime | None
    content: bool = True


@dataclass(frozen=True, slots=True)
class ArchivedInfo(_Content):
    """A message that has been settled.

    Attributes:
        id: The id of the message.
        outcome: ``archived``, ``dead``, ``cancelled`` or ``discarded``.
        reason: Why, for all but ``archived``.
        archived_at: When, by the database's clock.
        content: False if payload, headers, key, error and reason were not read, as
            `Archived.find` may be asked: then ``text`` is empty, the others are None, and
            ``payload`` raises.
    """

    outcome: ArchiveOutcome
    reason: str | None
    archived_at: datetime
    worker_id: int | None
    producer_id: int | None
    dequeued_at: datetime | None
    content: bool = True

    @property
    def original_msg_id(self) -> int:
        """The id, under the name that it has in pgqrs."""
        return self.id


@dataclass(frozen=True, slots=True)
class Failure:
    """What `fail` did with a message.

    Attributes:
        id: The message's id.
        dead: True when it went to the archive as a dead letter.
        vt: When it is tried again, or None when dead.
    """

    id: int
    dead: bool
    vt: datetime | None


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue and the defaults that its messages follow.

    Attributes:
        id: The queue's id.
        name: Its name.
        created_at: When it was created.
        lease_seconds: How long a lease lasts unless `dequeue` says otherwise.
        max_read_ct: Attempts before a message is dead, unless the message says otherwise.
        keep: Which settled messages go to the archive; see `Keep`.
        retention_seconds: How long `archived.prune` keeps settled messages; None for ever.
        failed_retention_seconds: How long it keeps those that are dead, cancelled or discarded;
            None for as long as the others.
        max_payload_bytes: The largest payload accepted, as UTF-8 JSON.
        paused_at: Since when nothing is leased from it, or None.
    """

    id: int
    name: str
    created_at: datetime
    lease_seconds: float
    max_read_ct: int
    keep: Keep
    retention_seconds: float | None
    failed_retention_seconds: float | None
    max_payload_bytes: int
    paused_at: datetime | None


class QueueSettings(TypedDict, total=False):
    """The settings of a queue, as `Queues.create` and `Queues.update` take them.

    Attributes:
        lease: The length of a lease if `dequeue` gives none: seconds, or a timedelta; default:
            30 s.
        max_read_ct: Attempts before a message is dead; default: 5.
        keep: Which settled messages go to the archive: ``all``, the default; ``failed``, those
            that are dead, cancelled or discarded; ``nothing``, not even dead letters. The others
            are deleted when they are settled.
        retention: How long `Archived.prune` keeps settled messages: seconds, or a timedelta;
            None, the default, keeps them.
        failed_retention: The same for those that are dead, cancelled or discarded; None, the
            default, for as long as the others.
        max_payload_bytes: The largest payload, as UTF-8 JSON; default: 1 MiB.
    """

    lease: Seconds
    max_read_ct: int
    keep: Keep
    retention: Seconds | None
    failed_retention: Seconds | None
    max_payload_bytes: int


@dataclass(frozen=True, slots=True)
class QueueDifference:
    """A setting of a declared queue that is another in the database.

    Attributes:
        setting: An attribute of `QueueInfo`: ``lease_seconds``, ``max_read_ct``, ``keep``,
            ``retention_seconds``, ``failed_retention_seconds`` or ``max_payload_bytes``.
        declared: Its declared value.
        found: Its value in the database.
    """

    setting: str
    declared: float | str
    found: float | str | None

    def __str__(self) -> str:
        return f"{self.setting} is {self.found}, declared {self.declared}"


@dataclass(frozen=True, slots=True)
class SyncedQueue:
    """What `Queues.sync` found or did about a declared queue.

    Attributes:
        name: The queue's name.
        status: ``created``; ``unchanged``: it existed with these settings; ``differs``: it existed,
            and was left as it is; ``updated``: its settings were changed to the declared ones;
            ``missing``: it does not exist, in a dry run.
        differences: The settings that differ, or that differed before they were updated.
    """

    name: str
    status: Literal["created", "unchanged", "differs", "updated", "missing"]
    differences: tuple[QueueDifference, ...] = ()


@dataclass(frozen=True, slots=True)
class QueueMetrics:
    """Counts of one queue at one moment.

    Attributes:
        queue: The queue's name.
        ready: Visible now, attempts left.
        scheduled: Waiting for their time; nobody holds them.
        leased: Held by a consumer whose lease has not run out.
        exhausted: Visible, but with no attempts left; `archived.bury` makes them dead letters.
        archived: Settled successfully.
        dead: Dead letters.
        cancelled: Cancelled before anyone took them.
        discarded: Given up on purpose by a consumer.
        oldest_ready_age: How long the longest-waiting ready message has been visible.
        paused: True while nothing is leased from the queue.
        capped: The outcomes that were not counted to the end: there are at least as many as it
            says. See `Messages.metrics`.
    """

    queue: str
    ready: int
    scheduled: int
    leased: int
    exhausted: int
    archived: int
    dead: int
    cancelled: int
    discarded: int
    oldest_ready_age: timedelta | None
    paused: bool
    capped: frozenset[ArchiveOutcome] = frozenset()

    @property
    def live(self) -> int:
        """All messages that are not settled yet."""
        return self.ready + self.scheduled + self.leased + self.exhausted


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One start of one process: a restart is a new row.

    Attributes:
        id: The worker's id, which `dequeue(worker=...)` records.
        name: For people; several starts may share it.
        hostname: Where it runs.
        pid: Its process id there, or None.
        port: A port that identifies it to people, or None.
        version: Of the application, or None.
        queues: The queues that it works on.
        status: ``ready``, ``suspended`` or ``stopped``.
        started_at: When it registered.
        heartbeat_at: Its last heartbeat.
        shutdown_at: When it stopped, or None.
    """

    id: int
    name: str
    hostname: str
    pid: int | None
    port: int | None
    version: str | None
    queues: Sequence[str]
    status: WorkerStatus
    started_at: datetime
    heartbeat_at: datetime
    shutdown_at: datetime | None


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """A worker, and whether its heartbeat is recent.

    Attributes:
        worker: The worker.
        silent_for: Since its last heartbeat, by the database's clock.
        healthy: Not stopped, and silent for no longer than was asked.
        leases: How many messages it held at its last heartbeat, as it reported; None when it does
            not report that. A `Consumer` does, with every heartbeat; others may: see
            `Workers.heartbeat`.
    """

    worker: WorkerInfo
    silent_for: timedelta
    healthy: bool
    leases: int | None

"""Values of the service as rows. ``docs/reference/cli.md`` lists their keys, which stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from .. import types
from ..errors import PayloadError
from .output import Column, Row, span, text

_TIMES = ("vt", "enqueued_at")
_ATTEMPTS = ("read_ct", "max_read_ct")
_MESSAGE = ("headers", "priority", *_TIMES, *_ATTEMPTS, "key", "last_error", "worker_id")

_NAME = 12
"""The width to which a name may be cut in a table."""

_CONTENT = 10
"""That of a payload or an error, which are cut before names are."""

QUEUE_KEYS = tuple(field.name for field in fields(types.QueueInfo))
COUNTS = (
    "ready",
    "scheduled",
    "leased",
    "exhausted",
    "live",
    "archived",
    "dead",
    "cancelled",
    "discarded",
)
"""The states and outcomes by which a queue's messages are counted."""

METRICS_KEYS = (
    "queue",
    *COUNTS,
    "oldest_ready_age_seconds",
    "paused",
    "capped",
    "name",
    "total_messages",
    "pending_messages",
    "locked_messages",
    "archived_messages",
)
MESSAGE_KEYS = (
    "id",
    "queue",
    "state",
    "visible_in_seconds",
    "payload",
    *_MESSAGE,
    "producer_id",
    "dequeued_at",
    "leased_until",
)
DELIVERY_KEYS = ("id", "queue", "fencing_token", "leased_until", "payload", *_MESSAGE)
ARCHIVED_KEYS = (
    "id",
    "queue",
    "outcome",
    "reason",
    "archived_at",
    "payload",
    *_MESSAGE,
    "producer_id",
    "dequeued_at",
)
WORKER_KEYS = (
    "id",
    "name",
    "hostname",
    "pid",
    "port",
    "version",
    "queues",
    "status",
    "started_at",
    "heartbeat_at",
    "shutdown_at",
)
HEALTH_KEYS = (
    "id",
    "name",
    "hostname",
    "status",
    "queues",
    "heartbeat_at",
    "silent_for_seconds",
    "healthy",
    "leases",
)
HEALTH_BY_QUEUE_KEYS = ("queue", "workers", "healthy", "silent", "leases")
DONE_KEYS = ("action", "queue", "count", "dry_run")
"""The keys of the rows of each list: the header of csv where there are no rows."""


def _countdown(row: Row) -> str:
    if row["state"] in ("ready", "exhausted"):
        return "now"
    return f"in {span(row['visible_in_seconds'])}"


def _attempts(row: Row) -> str:
    most = row["max_read_ct"]
    return str(row["read_ct"]) if most is None else f"{row['read_ct']}/{most}"


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else span(seconds)


def _queues(row: Row) -> str:
    return text(", ".join(row["queues"]) or None)


def _kept(seconds: float | None) -> str:
    return "for ever" if seconds is None else span(seconds)


_ID = Column("id", right=True)
_QUEUE = Column("queue", style="bold", least=_NAME)
_NAMED = Column("name", style="bold", least=_NAME)


def _row(value: Any, keys: Sequence[str], **computed: Any) -> dict[str, Any]:
    """Return the attributes of a value by these keys, and what is computed for some of them."""
    return {key: computed[key] if key in computed else getattr(value, key) for key in keys}


def done(action: str, count: int, *, dry_run: bool = False, **about: Any) -> dict[str, Any]:
    """The action of a command and the number of rows; in a dry run, what it would do."""
    return {"action": action, **about, "count": count, "dry_run": dry_run}


def queue(info: types.QueueInfo) -> dict[str, Any]:
    """A queue and its settings."""
    return _row(info, QUEUE_KEYS)


QUEUES = (
    _ID,
    _NAMED,
    Column("lease_seconds", "lease", lambda row: span(row["lease_seconds"]), right=True, rank=2),
    Column("max_read_ct", "attempts", right=True, rank=3),
    Column("keep", rank=7),
    Column("retention_seconds", "retention", lambda row: _kept(row["retention_seconds"]), rank=4),
    Column("max_payload_bytes", "max payload", right=True, rank=6),
    Column("created_at", "created", rank=5),
    Column("paused_at", "paused", rank=1),
)


def synced(queue: types.SyncedQueue, *, dry_run: bool) -> dict[str, Any]:
    """The result of `queue sync` for a declared queue."""
    return {
        "name": queue.name,
        "status": queue.status,
        "differences": "; ".join(map(str, queue.differences)),
        "dry_run": dry_run,
    }


SYNCED = (
    _NAMED,
    Column("status"),
    Column("differences", least=20, wrap=True),
)


def metrics(counts: types.QueueMetrics) -> dict[str, Any]:
    """Counts of a queue."""
    age = counts.oldest_ready_age
    return _row(
        counts,
        METRICS_KEYS,
        oldest_ready_age_seconds=None if age is None else age.total_seconds(),
        capped=sorted(counts.capped),
        # pgqrs' names for the same: a message that is not leased is pending.
        name=counts.queue,
        total_messages=counts.live,
        pending_messages=counts.live - counts.leased,
        locked_messages=counts.leased,
        archived_messages=counts.archived + counts.dead + counts.cancelled + counts.discarded,
    )


def _outcome(key: str) -> Callable[[Row], str]:
    """Return how a table shows a count that may not have been taken to the end."""
    return lambda row: f"{row[key]}{'+' if key in row['capped'] else ''}"


METRICS = (
    _QUEUE,
    *(
        Column(key, right=True, rank=rank)
        for key, rank in (("ready", 1), ("scheduled", 4), ("leased", 2), ("exhausted", 6))
    ),
    *(
        Column(key, render=_outcome(key), right=True, style="dim", rank=rank)
        for key, rank in (("archived", 7), ("dead", 3), ("cancelled", 9), ("discarded", 10))
    ),
    Column(
        "oldest_ready_age_seconds",
        "oldest ready",
        lambda row: _span(row["oldest_ready_age_seconds"]),
        right=True,
        rank=5,
    ),
    Column("paused", rank=8),
)


def message(info: types.MessageInfo, now: datetime) -> dict[str, Any]:
    """A live message, and how long until it is visible, by the database's clock."""
    visible = max(info.vt, info.leased_until or info.vt)
    seconds = max(0.0, (visible - now).total_seconds())
    return _row(info, MESSAGE_KEYS, visible_in_seconds=seconds, payload=payload(info))


MESSAGES = (
    _ID,
    _QUEUE,
    Column("state", rank=1),
    Column("visible_in_seconds", "visible", _countdown, right=True, rank=2),
    Column("vt", rank=9),
    Column("read_ct", "attempt", _attempts, right=True, rank=4),
    Column("priority", right=True, rank=8),
    Column("key", least=_NAME, rank=6),
    Column("worker_id", "worker", right=True, rank=7),
    Column("payload", least=_CONTENT, rank=3),
    Column("last_error", "last error", least=_CONTENT, rank=5),
)


def delivery(leased: types.Delivery) -> dict[str, Any]:
    """A message under lease. ``id`` and ``fencing_token`` are what settling it needs."""
    return _row(leased, DELIVERY_KEYS, payload=payload(leased))


DELIVERIES = (
    _ID,
    Column("fencing_token", "token", right=True),
    Column("queue", style="bold", least=_NAME, rank=1),
    Column("leased_until", "leased until", rank=3),
    Column("read_ct", "attempt", _attempts, right=True, rank=4),
    Column("payload", least=_CONTENT, rank=2),
    Column("last_error", "last error", least=_CONTENT, rank=5),
)


def archived(info: types.ArchivedInfo) -> dict[str, Any]:
    """A settled message."""
    return _row(info, ARCHIVED_KEYS, payload=payload(info))


ARCHIVED = (
    _ID,
    _QUEUE,
    Column("outcome", rank=1),
    Column("archived_at", "when", rank=2),
    Column("read_ct", "attempts", _attempts, right=True, rank=7),
    Column("payload", least=_CONTENT, rank=3),
    Column("reason", least=_CONTENT, rank=4),
    Column("last_error", "last error", least=_CONTENT, rank=6),
)


def receipt(of: types.Receipt, queue: str | None = None) -> dict[str, Any]:
    """The receipt of enqueueing, rescheduling and requeueing."""
    known = {} if queue is None else {"queue": queue}
    return {"id": of.id, **known, "vt": of.vt, "duplicate": of.duplicate}


def worker(info: types.WorkerInfo) -> dict[str, Any]:
    """A worker."""
    return _row(info, WORKER_KEYS)


WORKERS = (
    _ID,
    _NAMED,
    Column("status", rank=1),
    Column("hostname", "host", least=_NAME, rank=4),
    Column("pid", right=True, rank=5),
    Column("port", right=True, rank=6),
    Column("queues", render=_queues, least=_NAME, rank=3),
    Column("started_at", "started", rank=7),
    Column("heartbeat_at", "heartbeat", rank=2),
)


def health(of: types.WorkerHealth) -> dict[str, Any]:
    """A worker, and whether it has a recent heartbeat."""
    return _row(
        of.worker,
        HEALTH_KEYS,
        queues=list(of.worker.queues),
        silent_for_seconds=of.silent_for.total_seconds(),
        healthy=of.healthy,
        leases=of.leases,
    )


HEALTH = (
    _ID,
    _NAMED,
    Column("status", rank=3),
    Column("hostname", "host", least=_NAME, rank=6),
    Column("queues", render=_queues, least=_NAME, rank=4),
    Column(
        "silent_for_seconds",
        "silent",
        lambda row: span(row["silent_for_seconds"]),
        right=True,
        rank=2,
    ),
    Column("healthy", rank=1),
    Column("leases", right=True, rank=5),
)


def leases(of: Iterable[types.WorkerHealth]) -> int | None:
    """How many messages workers hold together; None when none of them reports that."""
    reported = [health.leases for health in of if health.leases is not None]
    return sum(reported) if reported else None


def health_by_queue(of: Iterable[types.WorkerHealth]) -> list[dict[str, Any]]:
    """Workers and what they hold, counted for each queue that any of them is for."""
    by_queue: dict[str, list[types.WorkerHealth]] = {}
    for health in of:
        for name in health.worker.queues or ("",):
            by_queue.setdefault(name, []).append(health)
    return [
        {
            "queue": name or None,
            "workers": len(workers),
            "healthy": sum(worker.healthy for worker in workers),
            "silent": sum(not worker.healthy for worker in workers),
            # A worker of several queues holds these in all of them together.
            "leases": leases(workers),
        }
        for name, workers in sorted(by_queue.items())
    ]


def payload(content: Any) -> Any:
    """The payload, or its text as it is stored where that cannot be decoded."""
    if not getattr(content, "content", True):  # was not read
        return None
    try:
        return content.payload
    except PayloadError:
        return content.text

"""The names of pgqrs 0.5, on this package: ``from pgqrs_sa import pgqrs``.

Programs written for pgqrs run with only their import changed::

    from pgqrs_sa import pgqrs

    admin = pgqrs.Admin("postgresql://localhost/mydb")
    await admin.install()
    await admin.create_queue("reminders")
    producer = pgqrs.Producer(admin, "reminders", "scheduler", 3000)
    await producer.enqueue_delayed({"type": "reminder"}, delay_seconds=3600)

Every call is a transaction of its own, on connections of its own. To enqueue and settle in the
transaction that writes your rows, which is what this package is for, use `pgqrs_sa.QueueService`;
``docs/how-to/pgqrs-to-own-session.md`` names the equivalent of everything here.

Needs the extras ``asyncio`` and a driver, and ``alembic`` for `Admin.install`.
"""

# ruff: noqa: E402 - the extra is checked before the imports that need it

from __future__ import annotations

from .. import extras

extras.require("pgqrs_sa.pgqrs")

from ..settings import Validation
from .admin import Admin
from .config import Config
from .consumer import Consumer
from .errors import (
    DelayError,
    DuplicateMessage,
    InvalidArgument,
    InvalidDsn,
    InvalidStateTransition,
    InvalidWorkerType,
    LeaseLost,
    MessageLeased,
    MessageNotFound,
    NotIntact,
    NotRegistered,
    PayloadError,
    PgqrsError,
    QueueExists,
    QueueInUse,
    QueueNotEmpty,
    QueueNotFound,
    RateLimited,
    SchemaNotOurs,
    SchemaVersionError,
    WorkerHasPendingMessages,
    WorkerInUse,
    WorkerNotFound,
    WorkerNotReady,
)
from .limits import RateLimitStatus
from .producer import Producer
from .tables import Archive, Messages, Queues, Workers
from .types import (
    ArchivedMessage,
    QueueInfo,
    QueueMessage,
    QueueMetrics,
    SystemStats,
    WorkerHealthStats,
    WorkerInfo,
    WorkerStats,
    WorkerStatus,
)

__all__ = [
    "Admin",
    "Archive",
    "ArchivedMessage",
    "Config",
    "Consumer",
    "DelayError",
    "DuplicateMessage",
    "InvalidArgument",
    "InvalidDsn",
    "InvalidStateTransition",
    "InvalidWorkerType",
    "LeaseLost",
    "MessageLeased",
    "MessageNotFound",
    "Messages",
    "NotIntact",
    "NotRegistered",
    "PayloadError",
    "PgqrsError",
    "Producer",
    "QueueExists",
    "QueueInUse",
    "QueueInfo",
    "QueueMessage",
    "QueueMetrics",
    "QueueNotEmpty",
    "QueueNotFound",
    "Queues",
    "RateLimitStatus",
    "RateLimited",
    "SchemaNotOurs",
    "SchemaVersionError",
    "SystemStats",
    "Validation",
    "WorkerHasPendingMessages",
    "WorkerHealthStats",
    "WorkerInUse",
    "WorkerInfo",
    "WorkerNotFound",
    "WorkerNotReady",
    "WorkerStats",
    "WorkerStatus",
    "Workers",
]

"""The message queue that lives inside a SQLAlchemy application, on PostgreSQL.

Declare or take the models, let the host's Alembic history create the tables, and enqueue, lease
and settle with the session that writes the business rows::

    from pgqrs_sa import QueueService

    with Session(engine) as session, session.begin():
        session.add(Order(id=7))
        QueueService(session).enqueue("receipts", {"order": 7})

Both commit, or neither does. See `QueueService` for the API, `pgqrs_sa.models` for the tables,
`pgqrs_sa.migrations` for Alembic and `pgqrs_sa.errors` for what can go wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import flush as _flush  # noqa: F401 - its listeners make session.add() an enqueue
from .codecs import Codec, JsonCodec
from .errors import (
    DelayError,
    DuplicateMessage,
    InvalidArgument,
    LeaseLost,
    MessageLeased,
    MessageNotFound,
    NonAtomicEnqueue,
    PayloadError,
    PgqrsError,
    QueueNotEmpty,
    QueueNotFound,
    SchemaVersionError,
    WorkerInUse,
    WorkerNotFound,
    WorkerNotReady,
)
from .models import (
    ArchivedMessage,
    ArchivedMessageMixin,
    Base,
    Message,
    MessageMixin,
    Models,
    Queue,
    QueueMixin,
    Worker,
    WorkerMixin,
    metadata,
)
from .retry import DEFAULT_BACKOFF, Backoff
from .service import QueueService
from .types import (
    ArchivedInfo,
    Delivery,
    Failure,
    Item,
    MessageInfo,
    QueueInfo,
    QueueMetrics,
    Receipt,
    WorkerHealth,
    WorkerInfo,
)

if TYPE_CHECKING:
    from .aio import AsyncQueueService

__all__ = [
    "DEFAULT_BACKOFF",
    "ArchivedInfo",
    "ArchivedMessage",
    "ArchivedMessageMixin",
    "AsyncQueueService",
    "Backoff",
    "Base",
    "Codec",
    "DelayError",
    "Delivery",
    "DuplicateMessage",
    "Failure",
    "InvalidArgument",
    "Item",
    "JsonCodec",
    "LeaseLost",
    "Message",
    "MessageInfo",
    "MessageLeased",
    "MessageMixin",
    "MessageNotFound",
    "Models",
    "NonAtomicEnqueue",
    "PayloadError",
    "PgqrsError",
    "Queue",
    "QueueInfo",
    "QueueMetrics",
    "QueueMixin",
    "QueueNotEmpty",
    "QueueNotFound",
    "QueueService",
    "Receipt",
    "SchemaVersionError",
    "Worker",
    "WorkerHealth",
    "WorkerInUse",
    "WorkerInfo",
    "WorkerMixin",
    "WorkerNotFound",
    "WorkerNotReady",
    "metadata",
]


def __getattr__(name: str) -> Any:
    # SQLAlchemy 2.1 cannot import its asyncio extension without greenlet, which is an extra.
    if name == "AsyncQueueService":
        from .aio import AsyncQueueService  # noqa: PLC0415

        return AsyncQueueService
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aio import AsyncQueueService
    from .codecs import Codec, JsonCodec
    from .consumer.events import Event, Hooks
    from .consumer.tasks import AsyncConsumer
    from .consumer.threads import Consumer
    from .decisions import (
        DEFAULT_BACKOFF,
        Backoff,
        DeadLetter,
        Decision,
        Discard,
        Retry,
        RetryIn,
        Snooze,
    )
    from .declared import DeclaredQueue, declare_queues
    from .errors import (
        DelayError,
        DuplicateMessage,
        EventLoopLost,
        HandlerTimeout,
        IncompleteSchema,
        InvalidArgument,
        InvalidResult,
        LeaseLost,
        MessageLeased,
        MessageNotFound,
        NonAtomicEnqueue,
        PayloadError,
        PgqrsError,
        PoolTooSmall,
        QueueNotEmpty,
        QueueNotFound,
        ReadOnlyDatabase,
        ReadTimeout,
        SchemaVersionError,
        SplitTransaction,
        TransactionRefused,
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
    from .service import QueueService
    from .types import (
        ArchivedInfo,
        Delivery,
        Failure,
        Item,
        MessageInfo,
        Outcome,
        QueueDifference,
        QueueInfo,
        QueueMetrics,
        Receipt,
        SyncedQueue,
        WorkerHealth,
        WorkerInfo,
    )

__version__: str
"""The version of the installed package."""

__all__ = [
    "DEFAULT_BACKOFF",
    "ArchivedInfo",
    "ArchivedMessage",
    "ArchivedMessageMixin",
    "AsyncConsumer",
    "AsyncQueueService",
    "Backoff",
    "Base",
    "Codec",
    "Consumer",
    "DeadLetter",
    "Decision",
    "DeclaredQueue",
    "DelayError",
    "Delivery",
    "Discard",
    "DuplicateMessage",
    "Event",
    "EventLoopLost",
    "Failure",
    "HandlerTimeout",
    "Hooks",
    "IncompleteSchema",
    "InvalidArgument",
    "InvalidResult",
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
    "Outcome",
    "PayloadError",
    "PgqrsError",
    "PoolTooSmall",
    "Queue",
    "QueueDifference",
    "QueueInfo",
    "QueueMetrics",
    "QueueMixin",
    "QueueNotEmpty",
    "QueueNotFound",
    "QueueService",
    "ReadOnlyDatabase",
    "ReadTimeout",
    "Receipt",
    "Retry",
    "RetryIn",
    "SchemaVersionError",
    "Snooze",
    "SplitTransaction",
    "SyncedQueue",
    "TransactionRefused",
    "Worker",
    "WorkerHealth",
    "WorkerInUse",
    "WorkerInfo",
    "WorkerMixin",
    "WorkerNotFound",
    "WorkerNotReady",
    "declare_queues",
    "metadata",
]


_MODULES = (
    "errors",
    "codecs",
    "types",
    "decisions",
    "models",
    "declared",
    "service",
    "consumer.events",
)
"""The modules with these names, the lightest first. They are imported when a name is first used, so
that importing a part of the package (the command line, a version check) does not import all of it
and SQLAlchemy."""

_NEED_EXTRAS = {
    "AsyncConsumer": "consumer.tasks",
    "AsyncQueueService": "aio",
    "Consumer": "consumer.threads",
}
"""Names whose modules can be imported only with an extra."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = _value(name)
    except ImportError as error:
        value = import_module(".extras", __name__).stand_in(name, error)
    globals()[name] = value
    return value


def _value(name: str) -> Any:
    for path in [_NEED_EXTRAS[name]] if name in _NEED_EXTRAS else _MODULES:
        module = import_module(f".{path}", __name__)
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - seldom needed

    try:
        return version("pgqrs-sa")
    except PackageNotFoundError:  # a folder on the path, which was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})

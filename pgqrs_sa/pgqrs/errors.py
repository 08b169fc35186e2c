"""The errors of the pgqrs module: the package's own, as subclasses of what pgqrs raises.

pgqrs has no exception classes: a missing queue or worker is a ``ValueError``, everything else a
``RuntimeError``. Each class here is a subclass of the same, so that code written for pgqrs still
catches it, and of `pgqrs_sa.PgqrsError`, so that it can be told apart::

    ValueError      InvalidArgument, DelayError, PayloadError (as they are in pgqrs_sa.errors)
                    QueueNotFound, WorkerNotFound
    TypeError       InvalidDsn, a ValueError as well
    RuntimeError    MessageNotFound, MessageLeased, DuplicateMessage, LeaseLost, QueueNotEmpty,
                    WorkerNotReady, SchemaVersionError
                    QueueExists, QueueInUse, InvalidStateTransition, InvalidWorkerType,
                    WorkerHasPendingMessages, WorkerInUse, RateLimited, SchemaNotOurs, NotIntact,
                    NotRegistered

Errors of the driver and of SQLAlchemy pass through as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .. import errors as core
from ..errors import DelayError, InvalidArgument, PayloadError, PgqrsError

__all__ = [
    "DelayError",
    "DuplicateMessage",
    "InvalidArgument",
    "InvalidDsn",
    "InvalidStateTransition",
    "InvalidWorkerType",
    "LeaseLost",
    "MessageLeased",
    "MessageNotFound",
    "NotIntact",
    "NotRegistered",
    "PayloadError",
    "PgqrsError",
    "QueueExists",
    "QueueInUse",
    "QueueNotEmpty",
    "QueueNotFound",
    "RateLimited",
    "SchemaNotOurs",
    "SchemaVersionError",
    "WorkerHasPendingMessages",
    "WorkerInUse",
    "WorkerNotFound",
    "WorkerNotReady",
]


class QueueNotFound(core.QueueNotFound, ValueError):
    """No queue has this name; carries similar names."""


class WorkerNotFound(core.WorkerNotFound, ValueError):
    """No worker has this id."""


class MessageNotFound(core.MessageNotFound, RuntimeError):
    """The message does not exist where it was looked for."""


class MessageLeased(core.MessageLeased, RuntimeError):
    """A consumer holds a lease on the message."""


class DuplicateMessage(core.DuplicateMessage, RuntimeError):
    """A live message has this key."""


class LeaseLost(core.LeaseLost, RuntimeError):
    """The message is no longer this consumer's."""


class QueueNotEmpty(core.QueueNotEmpty, RuntimeError):
    """The queue still holds messages or history."""


class WorkerNotReady(core.WorkerNotReady, RuntimeError):
    """The worker is suspended or stopped."""


class SchemaVersionError(core.SchemaVersionError, RuntimeError):
    """The tables are missing, or not of the version that this release needs."""


class InvalidDsn(InvalidArgument, TypeError):
    """An Admin needs a DSN or a Config; a producer or consumer one of these or an Admin."""

    code = "PGQ-020"


class QueueExists(PgqrsError, RuntimeError):
    """A queue of this name was created already."""

    code = "PGQ-021"

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {queue!r} already exists: get_queue() returns it")
        self.queue = queue


class QueueInUse(PgqrsError, RuntimeError):
    """Workers with a recent heartbeat work on the queue; it was not deleted."""

    code = "PGQ-022"

    def __init__(self, queue: str, workers: list[int]) -> None:
        super().__init__(f"queue {queue!r} has live workers {workers}: shut them down first")
        self.queue = queue
        self.workers = workers


class InvalidStateTransition(PgqrsError, RuntimeError):
    """A worker cannot go from its state to this one.

    Attributes:
        origin: Its state.
        target: The requested state.
    """

    code = "PGQ-023"

    def __init__(self, origin: str, target: str) -> None:
        super().__init__(
            f"a worker that is {origin} cannot become {target}: "
            "ready <-> suspended -> stopped is the order"
        )
        self.origin = origin
        self.target = target


class WorkerHasPendingMessages(PgqrsError, RuntimeError):
    """A consumer holds messages: it has to settle or release them before it is shut down."""

    code = "PGQ-024"

    def __init__(self, id: int, messages: list[int]) -> None:
        super().__init__(f"worker {id} still holds messages {messages}: settle or release them")
        self.id = id
        self.messages = messages


class WorkerInUse(core.WorkerInUse, RuntimeError):
    """See `pgqrs_sa.errors.WorkerInUse`."""


class InvalidWorkerType(PgqrsError, RuntimeError):
    """An admin's worker works on no queue, so it cannot hold messages."""

    code = "PGQ-026"

    def __init__(self, id: int) -> None:
        super().__init__(f"worker {id} is an admin: it holds no messages")
        self.id = id


class RateLimited(PgqrsError, RuntimeError):
    """A producer has used up its rate; nothing was sent.

    Attributes:
        retry_after: Seconds until the same call succeeds, if nothing else is sent before.
    """

    code = "PGQ-027"

    def __init__(self, retry_after: float, per_second: float) -> None:
        super().__init__(
            f"this producer sends faster than {per_second:g} messages/s: "
            f"try again in {retry_after:.3f} s"
        )
        self.retry_after = retry_after


class SchemaNotOurs(PgqrsError, RuntimeError):
    """The tables belong to an application's Alembic history, which has to drop them."""

    code = "PGQ-028"


class NotIntact(PgqrsError, RuntimeError):
    """`verify` found missing tables, or rows that refer to missing rows.

    Attributes:
        findings: The number of findings of each kind.
    """

    code = "PGQ-029"

    def __init__(self, findings: Mapping[str, int]) -> None:
        listed = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in findings.items())
        super().__init__(f"the queue tables are not intact: {listed}")
        self.findings = dict(findings)


class NotRegistered(PgqrsError, RuntimeError):
    """This Admin is not registered as a worker."""

    code = "PGQ-030"

    def __init__(self) -> None:
        super().__init__("this Admin is no worker yet: await admin.register(hostname, port)")


_KINDS: dict[type[PgqrsError], type[PgqrsError]] = {
    kind.__bases__[0]: kind
    for kind in (
        QueueNotFound,
        WorkerNotFound,
        MessageNotFound,
        MessageLeased,
        DuplicateMessage,
        LeaseLost,
        QueueNotEmpty,
        WorkerInUse,
        WorkerNotReady,
        SchemaVersionError,
    )
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise the package's errors as the classes of this module, with the same data."""
    try:
        yield
    except PgqrsError as error:
        kind = _KINDS.get(type(error))
        if kind is None:
            raise
        # Not through the constructor, which would compose the message again.
        same = kind.__new__(kind, *error.args)
        same.__dict__.update(error.__dict__)
        raise same.with_traceback(error.__traceback__) from error.__cause__

"""What the pgqrs module raises: the package's own errors, in the kinds that pgqrs raised.

pgqrs has no exception classes: a queue or worker that is not there is a ``ValueError``, everything
else a ``RuntimeError``. Each class here is one of those too, so that code written for pgqrs still
catches it, and a `pgqrs_sa.PgqrsError`, so that it can be told apart::

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
    """No queue has this name; carries the names that come close."""


class WorkerNotFound(core.WorkerNotFound, ValueError):
    """No worker has this id."""


class MessageNotFound(core.MessageNotFound, RuntimeError):
    """No such message is where it was looked for."""


class MessageLeased(core.MessageLeased, RuntimeError):
    """A consumer is working on the message."""


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
    """An Admin was given neither a DSN nor a Config; or a worker not even an Admin."""

    code = "PGQ-020"


class QueueExists(PgqrsError, RuntimeError):
    """A queue of this name was created already."""

    code = "PGQ-021"

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {queue!r} already exists: get_queue() returns it")
        self.queue = queue


class QueueInUse(PgqrsError, RuntimeError):
    """Workers that were heard of lately work on the queue; it was not deleted."""

    code = "PGQ-022"

    def __init__(self, queue: str, workers: list[int]) -> None:
        super().__init__(f"queue {queue!r} has live workers {workers}: shut them down first")
        self.queue = queue
        self.workers = workers


class InvalidStateTransition(PgqrsError, RuntimeError):
    """A worker cannot go from its state to this one.

    Attributes:
        origin: Its state.
        target: The state that was asked for.
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
        retry_after: Seconds until the same call is let through, if nothing else is sent before.
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
    """`verify` found tables missing, or rows that refer to rows which are not there.

    Attributes:
        findings: How many there are of each kind.
    """

    code = "PGQ-029"

    def __init__(self, findings: Mapping[str, int]) -> None:
        listed = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in findings.items())
        super().__init__(f"the queue tables are not intact: {listed}")
        self.findings = dict(findings)


class NotRegistered(PgqrsError, RuntimeError):
    """This Admin has no worker of its own."""

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
    """Raise the package's errors in the kinds that pgqrs raised, data and all."""
    try:
        yield
    except PgqrsError as error:
        kind = _KINDS.get(type(error))
        if kind is None:
            raise
        # Their constructors compose the message from parts; it is composed already.
        same = kind.__new__(kind, *error.args)
        same.__dict__.update(error.__dict__)
        raise same.with_traceback(error.__traceback__) from error.__cause__

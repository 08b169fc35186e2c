"""The errors that pgqrs_sa raises itself.

::

    PgqrsError
    ├── InvalidArgument (ValueError)     a value that can be refused without the database
    │   ├── DelayError                   a delay or time that is negative, naive or past year 9999
    │   ├── PayloadError                 not JSON, or too large; carries the path inside the payload
    │   └── InvalidResult                a handler returned a value without a meaning: it failed
    ├── QueueNotFound (LookupError)      carries similar names
    ├── QueueNotEmpty                    a queue that still holds messages is not deleted
    ├── MessageNotFound (LookupError)
    ├── MessageLeased                    a consumer holds it: it was not cancelled or rescheduled
    ├── DuplicateMessage                 a live message has this key
    ├── LeaseLost                        the lease is no longer held; nothing was changed
    ├── WorkerNotFound (LookupError)
    ├── WorkerNotReady                   suspended or stopped: it may not lease
    ├── WorkerInUse                      not stopped, or it holds messages: it was not deleted
    ├── NonAtomicEnqueue                 the connection is in AUTOCOMMIT
    ├── SplitTransaction                 messages in one database, rows in another: not atomic
    ├── SchemaVersionError               the database's schema has a version that does not fit
    ├── IncompleteSchema                 some of its tables are missing: the doctor prints their SQL
    ├── TransactionRefused               a handler tried to end the transaction of its session
    ├── HandlerTimeout (TimeoutError)    a handler exceeded its timeout
    ├── EventLoopLost                    the loop that calls the handlers is closed, or does not run
    ├── PoolTooSmall                     fewer connections than a consumer needs
    ├── ReadOnlyDatabase                 a standby: nothing can be leased there
    └── ReadTimeout (TimeoutError)       a search or a count exceeded its timeout

Errors of the driver and of SQLAlchemy are not wrapped: the owner of the transaction handles a
serialization failure or a lost connection. Each class has a stable ``code`` for logs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

__all__ = [
    "Copyable",
    "DelayError",
    "DuplicateMessage",
    "EventLoopLost",
    "HandlerTimeout",
    "IncompleteSchema",
    "InvalidArgument",
    "InvalidResult",
    "LeaseLost",
    "MessageLeased",
    "MessageNotFound",
    "NonAtomicEnqueue",
    "PayloadError",
    "PgqrsError",
    "PoolTooSmall",
    "QueueNotEmpty",
    "QueueNotFound",
    "ReadOnlyDatabase",
    "ReadTimeout",
    "SchemaVersionError",
    "SplitTransaction",
    "TransactionRefused",
    "Whereabouts",
    "WorkerInUse",
    "WorkerNotFound",
    "WorkerNotReady",
]


class Copyable(BaseException):
    """Keeps its text and attributes through pickle and copy, for every kind of constructor."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[Copyable], args: tuple[Any, ...], attributes: dict[str, Any]) -> Copyable:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class PgqrsError(Copyable, Exception):
    """The base of every error that this package raises itself."""

    code: ClassVar[str] = "PGQ-000"


class InvalidArgument(PgqrsError, ValueError):
    """A value was refused before anything was sent to the database."""

    code = "PGQ-001"


class DelayError(InvalidArgument):
    """A delay, lease or time is negative, not finite, naive, or ends past year 9998."""

    code = "PGQ-002"


class PayloadError(InvalidArgument):
    """A payload (or header) is not strict JSON, or is larger than its queue accepts.

    Attributes:
        path: The path inside the value, such as ``payload.items[3].price``.
        problem: The problem at that path.
    """

    code = "PGQ-003"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path = path
        self.problem = problem


class InvalidResult(InvalidArgument):
    """A handler returned work that has not run, or a value that is no decision: the attempt failed.

    If it returned an exception, that is the ``__cause__``.
    """

    code = "PGQ-018"


class QueueNotFound(PgqrsError, LookupError):
    """No queue has this name (or id).

    Attributes:
        queue: The name (or id) that was asked for.
        suggestions: Similar existing names, best first.
    """

    code = "PGQ-004"

    def __init__(self, queue: str | int, suggestions: Sequence[str] = ()) -> None:
        hint = (
            f"did you mean {' or '.join(map(repr, suggestions))}?"
            if suggestions
            else "create it first with service.queues.create(name)"
        )
        super().__init__(f"there is no queue {safe_repr(queue)}: {hint}")
        self.queue = queue
        self.suggestions = tuple(suggestions)


class QueueNotEmpty(PgqrsError):
    """The queue still holds live or archived messages, and was not deleted.

    Attributes:
        queue: Its name.
        messages: How many messages are live.
        archived: How many are in the archive.
    """

    code = "PGQ-005"

    def __init__(self, queue: str, messages: int, archived: int) -> None:
        super().__init__(
            f"queue {queue!r} still holds {messages} live and {archived} archived message(s): "
            "drain or purge it and prune its archive first, or pass force=True to delete them all"
        )
        self.queue = queue
        self.messages = messages
        self.archived = archived


class MessageNotFound(PgqrsError, LookupError):
    """The message does not exist where it was looked for.

    Attributes:
        ids: The ids that were not found.
    """

    code = "PGQ-006"

    def __init__(self, ids: Sequence[int], where: str) -> None:
        super().__init__(f"no message with id {_listed(ids)} {where}")
        self.ids = tuple(ids)


class MessageLeased(PgqrsError):
    """A consumer holds the message: it can be neither cancelled nor rescheduled now.

    Attributes:
        id: The message's id.
        until: When its lease ends.
    """

    code = "PGQ-007"

    def __init__(self, id: int, until: datetime) -> None:
        super().__init__(
            f"message {id} is leased until {until.isoformat()}: "
            "wait for the lease to end, or let its holder settle it"
        )
        self.id = id
        self.until = until


class DuplicateMessage(PgqrsError):
    """A live message of the queue already has this key.

    Attributes:
        key: The deduplication key.
        id: The id of that message.
    """

    code = "PGQ-008"

    def __init__(self, key: str, id: int) -> None:
        super().__init__(
            f"message {id} is live under the key {key!r}: "
            "enqueue(key=...) would have returned it with duplicate=True"
        )
        self.key = key
        self.id = id


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The current state of a message whose lease was lost.

    Attributes:
        id: The message's id.
        state: ``leased``, ``ready``, ``scheduled`` or ``exhausted`` while it is live; its outcome
            if it is in the archive; ``gone`` if it is in neither; ``given up`` by a consumer whose
            handler exceeded its timeout, or did not end in time when the consumer stopped.
        read_ct: The number of attempts so far.
        worker_id: Its holder, if that is a registered worker.
        until: When its current lease, or its delay, ends.
    """

    id: int
    state: str
    read_ct: int | None = None
    worker_id: int | None = None
    until: datetime | None = None

    def __str__(self) -> str:
        if self.state == "gone":
            return f"message {self.id} is gone"
        text = f"message {self.id} is {self.state} (attempt {self.read_ct})"
        if self.worker_id is not None:
            text += f" by worker {self.worker_id}"
        if self.until is not None:
            text += f" until {self.until.isoformat()}"
        return text


class LeaseLost(PgqrsError):
    """A delivery's lease is no longer held; none of the given deliveries was changed.

    Roll the transaction back: the message's new holder will do the work.

    Attributes:
        ids: The ids of the messages whose lease was lost.
        whereabouts: The current state of each of them, by id.
    """

    code = "PGQ-009"

    def __init__(self, whereabouts: Mapping[int, Whereabouts]) -> None:
        known = "; ".join(map(str, whereabouts.values()))
        super().__init__(f"lease lost: {known}. Roll back: nothing was settled")
        self.whereabouts = dict(whereabouts)
        self.ids = tuple(whereabouts)

    @property
    def id(self) -> int:
        """The id of the first message lost; for a single delivery, the only one."""
        return self.ids[0]


class WorkerNotFound(PgqrsError, LookupError):
    """No worker has this id: it was never registered, or it was purged."""

    code = "PGQ-010"

    def __init__(self, id: int) -> None:
        super().__init__(f"there is no worker {id}: register one with service.workers.register()")
        self.id = id


class WorkerNotReady(PgqrsError):
    """The worker is suspended or stopped, and cannot lease messages.

    Attributes:
        id: The worker's id.
        status: ``suspended`` or ``stopped``.
    """

    code = "PGQ-011"

    def __init__(self, id: int, status: str) -> None:
        fix = "resume it first" if status == "suspended" else "register again: a row is one start"
        super().__init__(f"worker {id} is {status}: {fix}")
        self.id = id
        self.status = status


class WorkerInUse(PgqrsError):
    """The worker is not stopped, or holds messages; its row was not deleted.

    Attributes:
        id: The worker's id.
        status: ``ready``, ``suspended`` or ``stopped``.
    """

    code = "PGQ-014"

    def __init__(self, id: int, status: str) -> None:
        what = "still holds messages" if status == "stopped" else f"is {status}"
        fix = "wait for its leases" if status == "stopped" else "stop it first"
        super().__init__(f"worker {id} {what}: {fix}, or release them")
        self.id = id
        self.status = status


class NonAtomicEnqueue(PgqrsError):
    """The session's connection is in AUTOCOMMIT: a rollback would not undo the enqueue."""

    code = "PGQ-012"

    def __init__(self, unless: str = "QueueService(session, allow_autocommit=True)") -> None:
        super().__init__(
            "this session's connection is in AUTOCOMMIT, so the message would not roll back with "
            f"your rows: use a transactional engine, or {unless}"
        )


class SplitTransaction(PgqrsError):
    """A transaction has written the queue's tables in one database, and rows in another.

    One database could commit without the other. Nothing was committed: roll back.

    Attributes:
        queues: The URLs of the databases with the queue's tables, without passwords.
        others: The URLs of the other databases, without passwords.
    """

    code = "PGQ-019"

    def __init__(self, queues: Sequence[str], others: Sequence[str]) -> None:
        super().__init__(
            "this transaction has written messages and other rows through several connections "
            f"({', '.join([*queues, *others])}), and one could commit without the other: bind the "
            "queue's tables and your rows to one engine, use Session(twophase=True), or allow it "
            "with session.info['pgqrs_allow_split'] = True"
        )
        self.queues = tuple(queues)
        self.others = tuple(others)


class SchemaVersionError(PgqrsError):
    """The queue schema of the database does not have the needed version.

    Attributes:
        installed: The version found, or None if there is no stamp.
        needed: The version that this release, or the migration, needs.
    """

    code = "PGQ-013"

    def __init__(
        self,
        installed: int | None,
        needed: int,
        schema: str | None,
        hint: str,
        *,
        subject: str = "this release of pgqrs_sa",
    ) -> None:
        where = f"schema {schema!r}" if schema else "the default schema"
        found = "no known version" if installed is None else f"version {installed}"
        wanted = f"version {needed}" if needed else "no tables"
        super().__init__(
            f"{where} holds {found} of the queue tables, {subject} needs {wanted}: {hint}"
        )
        self.installed = installed
        self.needed = needed


class IncompleteSchema(PgqrsError):
    """A schema has some of the queue tables, but not all.

    Attributes:
        schema: The schema.
        missing: The names of the missing tables.
    """

    code = "PGQ-031"

    def __init__(self, schema: str, missing: Sequence[str]) -> None:
        super().__init__(
            f"schema {schema!r} has queue tables, but not {', '.join(missing)}: run "
            f"`pgqrs --schema {shlex.quote(schema)} doctor`, which prints the SQL to create "
            f"{'it' if len(missing) == 1 else 'them'}"
        )
        self.schema = schema
        self.missing = tuple(missing)


class TransactionRefused(PgqrsError):
    """A handler called ``commit()``, ``rollback()`` or ``close()`` of the session that it got.

    The transaction was not ended. The attempt fails, unless the handler catches this error and
    continues in the same transaction.

    Attributes:
        method: The method that it called.
        handler: The handler's name.
    """

    code = "PGQ-033"

    def __init__(self, method: str, handler: str) -> None:
        super().__init__(
            f"session.{method}() in {handler}: the consumer ends this transaction, together with "
            "the message. Return to commit, raise to roll back; use session.begin_nested() for a "
            "part that may fail, and a session of your own for what is to stay in any case"
        )
        self.method = method
        self.handler = handler


class HandlerTimeout(PgqrsError, TimeoutError):
    """A handler exceeded its ``timeout``; its lease was given up, and the attempt counts.

    Attributes:
        handler: The handler's name.
        seconds: Its timeout, in seconds.
    """

    code = "PGQ-015"

    def __init__(self, handler: str, seconds: float, stack: str | None = None) -> None:
        where = f"; it was at\n{stack}" if stack else ""
        super().__init__(f"handler {handler} took longer than its timeout of {seconds:g} s{where}")
        self.handler = handler
        self.seconds = seconds


class EventLoopLost(PgqrsError):
    """The event loop of an `AsyncConsumer` was closed, or has not run for as long as a lease.

    No handler can be called any more. The consumer has released its messages, and ended.
    """

    code = "PGQ-035"


class PoolTooSmall(PgqrsError):
    """The engine's pool has fewer connections than the consumer may need at the same time.

    Attributes:
        available: ``pool_size + max_overflow``.
        needed: One for each handler that runs at the same time, and those of the consumer itself.
    """

    code = "PGQ-016"

    def __init__(self, available: int, needed: int, why: str) -> None:
        super().__init__(
            f"the pool gives at most {available} connection(s) (pool_size + max_overflow), and "
            f"this consumer needs {needed} ({why}): raise pool_size, or lower concurrency"
        )
        self.available = available
        self.needed = needed


class ReadOnlyDatabase(PgqrsError):
    """The server is a standby, or set to read only: nothing can be leased or settled there."""

    code = "PGQ-017"

    def __init__(self, *, standby: bool) -> None:
        what = "is a standby" if standby else "is set to read only"
        super().__init__(f"the database {what}: connect the consumer to the primary server")


class ReadTimeout(PgqrsError, TimeoutError):
    """A search or a count exceeded its ``timeout``; the transaction can continue.

    Attributes:
        seconds: The timeout, in seconds.
    """

    code = "PGQ-034"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"no answer within {seconds:g} s: the search looks at too many messages; name a queue, "
            "begin further on with after=, or make an index on what is searched for"
        )
        self.seconds = seconds


def _listed(ids: Sequence[int], most: int = 10) -> str:
    shown = ", ".join(map(str, ids[:most]))
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def safe_repr(value: object, most: int = 500) -> str:
    """Return the repr of a value for an error message: bounded in length, and it never raises."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a huge integer, or somebody's own class
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= most else f"{text[:most]}…"

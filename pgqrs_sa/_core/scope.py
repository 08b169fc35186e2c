"""The scope of an operation: a session, the settings of its service, and its time limit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.sql import Executable

from .. import validation
from ..codecs import Codec, JsonCodec, check_json
from ..errors import InvalidArgument, PayloadError, QueueNotFound, ReadTimeout
from . import sessions
from .representation import database_of, represented
from .sql import queues
from .tables import Tables, tables_of

if TYPE_CHECKING:
    from ..models import Models

__all__ = [
    "Context",
    "Resource",
    "Scope",
    "decode_all",
    "decoded",
    "encoded",
    "queue_not_found",
    "within",
]

_STRICT = JsonCodec()
_CANCELED = "57014"

_LIMIT = sa.text(
    "SELECT set_config('statement_timeout',"
    " CAST(least(nullif(CAST(setting AS bigint), 0), :milliseconds) AS text), true)"
    " FROM pg_catalog.pg_settings WHERE name = 'statement_timeout'"
).bindparams(sa.bindparam("milliseconds", type_=sa.BigInteger))

_LONGEST = timedelta(milliseconds=2**31 - 1)
"""The largest ``statement_timeout`` of PostgreSQL, which is an integer of milliseconds."""


@dataclass(frozen=True, slots=True)
class Context:
    """The settings of a service.

    Attributes:
        models: The four classes.
        codec: Turns payloads into JSON text and back.
        worker: The registered worker that enqueues and leases, or None.
        allow_autocommit: Enqueue even where a rollback would not take it back.
        notify: Send a NOTIFY to consumers that wait.
        cursor_key: Tells apart sessions of one engine that see different messages.
        create_queues: Create a queue that does not exist when something is enqueued there.
        tables: The tables of the four classes, which the statements are about.
        mapper: Tells a session with several binds which of them has our tables.
    """

    models: Models
    codec: Codec
    worker: int | None
    allow_autocommit: bool
    notify: bool = False
    cursor_key: str | None = None
    create_queues: bool = False
    tables: Tables = field(init=False, repr=False, compare=False)
    mapper: Mapper[Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tables, mapper = _mapped(self.models)
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "mapper", mapper)

    @classmethod
    def of(
        cls,
        models: Models,
        codec: Codec | None,
        worker: object,
        allow_autocommit: bool,
        *,
        notify: bool = False,
        cursor_key: str | None = None,
        create_queues: bool = False,
    ) -> Context:
        """Return the settings of a service, with defaults for those that are None."""
        return cls(
            models,
            codec or _STRICT,
            validation.validate_worker_id(worker),
            allow_autocommit,
            notify,
            None if cursor_key is None else validation.validate_text(cursor_key, "cursor_key"),
            create_queues,
        )


@cache
def _mapped(models: Models) -> tuple[Tables, Mapper[Any]]:
    return tables_of(models), sa.inspect(models.message)


@dataclass(frozen=True, slots=True)
class Scope:
    """A session and the settings of a service: what every operation takes.

    Attributes:
        session: The caller's session. Its transaction is the operation's.
        context: The settings.
    """

    session: Session
    context: Context

    @property
    def tables(self) -> Tables:
        """The tables of the four classes, which every statement is about."""
        return self.context.tables

    def represented(self, cls: type[Any]) -> str:
        """Return how a service of this class is shown."""
        settings = self.context
        return represented(
            cls,
            database=database_of(self.session),
            worker=settings.worker,
            allow_autocommit=settings.allow_autocommit or None,
            notify=settings.notify or None,
            create_queues=settings.create_queues or None,
        )

    def execute(
        self, statement: Executable, values: Any = None, *, atomic: bool = False
    ) -> Result[Any]:
        """Execute a statement about our tables in the session, after its pending flush.

        With ``atomic`` it is refused where a rollback would not take it back.
        """
        unless = None
        if atomic and not self.context.allow_autocommit:
            unless = "QueueService(session, allow_autocommit=True)"
        return sessions.execute(
            self.session, self.context.mapper, statement, values, atomic_unless=unless
        )


class Resource:
    """Operations in one scope: what ``service.queues`` and the others are."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope


def queue_not_found(scope: Scope, queue: str) -> QueueNotFound:
    """Return the error for a queue that does not exist, with the names that come close."""
    known: Sequence[str] = scope.execute(queues.names(scope.tables.queue)).scalars().all()
    return QueueNotFound(queue, validation.suggestions(queue, known))


def decoded(codec: Codec, id: int, text: str, headers: str | None) -> tuple[Any, Any]:
    """Return payload and headers as values, or the error in the payload's place."""
    try:
        return codec.loads(text), None if headers is None else _STRICT.loads(headers)
    except Exception as error:  # noqa: BLE001 - a host's codec may raise anything
        problem = f"of message {id} cannot be decoded: {validation.error_text(error)}"
        failure = PayloadError("payload", problem)
        failure.__cause__ = error
        return failure, None


def encoded(codec: Codec, value: Any, path: str = "payload") -> str:
    """Return a payload as JSON text, and check what the codec returns.

    Args:
        codec: The service's.
        value: The payload.
        path: What to call it in an error.

    Raises:
        PayloadError: the codec refuses the value, raises something else, or returns no JSON.
    """
    if type(codec) is JsonCodec:
        return codec.dumps(value, path=path)
    try:
        text = codec.dumps(value)
    except PayloadError as error:
        # A codec calls the value "payload"; a batch says which.
        where = path + error.path.removeprefix("payload")
        raise PayloadError(where, error.problem) from error
    except Exception as error:
        raise PayloadError(path, f"cannot be encoded: {validation.error_text(error)}") from error
    check_json(text, path)
    return text


def decode_all(codec: Codec, rows: Sequence[Any]) -> Sequence[tuple[Any, Any]]:
    """Return what `decoded` does, of rows that begin with id, payload and headers."""
    if type(codec) is JsonCodec and not any(row[2] for row in rows):
        values = codec.loads_each([row[1] for row in rows])
        if values is not None:
            return [(value, None) for value in values]
    return [decoded(codec, *row[:3]) for row in rows]


@contextmanager
def within(scope: Scope, timeout: float | timedelta | None) -> Iterator[None]:
    """Let the server end a read that takes too long, without loss to the caller's transaction.

    The limit is set in a savepoint, whose rollback takes it back: nothing may be written inside.

    Args:
        scope: The session, and the settings of the service.
        timeout: Seconds, or a timedelta, at most 2,147,483.647 s (24 days); None for no limit but
            the session's own.

    Raises:
        ReadTimeout: it took longer.
        InvalidArgument: the timeout is too long for PostgreSQL, or the connection is in AUTOCOMMIT,
            where a limit cannot be taken back.
    """
    if timeout is None:
        yield
        return
    span = validation.validate_duration(timeout, "timeout", positive=True)
    if span > _LONGEST:
        raise InvalidArgument(
            f"timeout is {span.total_seconds():.0f} seconds, and PostgreSQL's statement_timeout "
            f"at most {_LONGEST.total_seconds():.0f} (24 days): use a shorter one, or none"
        )
    longest = span.total_seconds()
    scope.session._autoflush()  # noqa: SLF001 - what is pending must not be rolled back with the limit
    connection = scope.session.connection(bind_arguments={"mapper": scope.context.mapper})
    if sessions.is_autocommit(connection):
        raise InvalidArgument("timeout needs a transaction, and this connection is in AUTOCOMMIT")
    savepoint = connection.begin_nested()
    begun = time.monotonic()
    try:
        connection.execute(_LIMIT, {"milliseconds": max(1, round(longest * 1000))})
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "sqlstate", None)
        if code == _CANCELED and time.monotonic() - begun >= longest:
            raise ReadTimeout(longest) from None
        raise
    finally:
        savepoint.rollback()

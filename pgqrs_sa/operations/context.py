"""What a service was built with, and the questions that several operations ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Result, Row
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key
from sqlalchemy.sql import Executable

from .. import arguments
from ..codecs import Codec, JsonCodec
from ..errors import NonAtomicEnqueue, PayloadError, QueueNotFound
from ..models import Models
from ..statements import queues

__all__ = [
    "Context",
    "decoded",
    "forget",
    "forget_all",
    "queue_not_found",
    "refresh",
    "refuse_autocommit",
    "require_atomic",
    "run",
]


# SQLAlchemy 2.0 flushes only before statements about mapped classes, 2.1 before all of them.
_FLUSH_FIRST = sa.__version__ < "2.1"

_READY_MADE = Models()
_STRICT = JsonCodec()


@dataclass(frozen=True, slots=True)
class Context:
    """The settings of a service, handed to every operation.

    Attributes:
        models: The four classes.
        codec: Turns payloads into JSON text and back.
        worker: The registered worker that enqueues and leases, or None.
        allow_autocommit: Enqueue even where a rollback would not take it back.
    """

    models: Models
    codec: Codec
    worker: int | None
    allow_autocommit: bool

    @property
    def mapper(self) -> Mapper[Any]:
        """What tells a session with several binds which of them has our tables."""
        mapper: Mapper[Any] = sa.inspect(self.models.message)
        return mapper

    @classmethod
    def of(
        cls, models: Models | None, codec: Codec | None, worker: object, *, allow_autocommit: bool
    ) -> Context:
        """Return the settings of a service, with what was not given filled in."""
        return cls(
            models or _READY_MADE, codec or _STRICT, arguments.worker_id(worker), allow_autocommit
        )


def require_atomic(session: Session, context: Context, statement: Executable) -> None:
    """Refuse to enqueue where a rollback would leave the message behind."""
    if context.allow_autocommit:
        return
    # The connection that the statement is about to use anyway; no round trip is made for this.
    where = {"mapper": context.mapper, "clause": statement}
    connection = session.connection(bind_arguments=where)
    refuse_autocommit(connection)


def refuse_autocommit(connection: sa.Connection) -> None:
    """Raise when a connection commits each statement by itself."""
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise NonAtomicEnqueue


def queue_not_found(session: Session, context: Context, queue: str) -> QueueNotFound:
    """Return the error for a queue that is not there, with the names that come close."""
    known: Sequence[str] = run(session, context, queues.names(context.models)).scalars().all()
    return QueueNotFound(queue, arguments.suggestions(queue, known))


def decoded(codec: Codec, id: int, text: str, headers: str | None) -> dict[str, Any]:
    """Return payload and headers as values, or the error in the payload's place."""
    try:
        return {
            "decoded": codec.loads(text),
            "headers": None if headers is None else _STRICT.loads(headers),
        }
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        problem = f"of message {id} cannot be decoded: {type(error).__name__}: {error}"
        return {"decoded": PayloadError("payload", problem), "headers": None}


def run(
    session: Session, context: Context, statement: Executable, values: Any = None
) -> Result[Any]:
    """Execute a statement about our tables in the caller's session, after its pending flush."""
    if _FLUSH_FIRST:
        session._autoflush()  # noqa: SLF001
    return session.execute(statement, values, bind_arguments={"mapper": context.mapper})


def refresh(
    session: Session, model: type[Any], rows: Iterable[Row[Any]], names: Iterable[str]
) -> None:
    """Bring loaded objects up to date with rows that a statement returned about them."""
    for row in rows if session.identity_map else ():
        if (loaded := session.identity_map.get(identity_key(model, row.id))) is not None:
            _altered(session, loaded)
            for name in names:
                set_committed_value(loaded, name, row._mapping[name])  # noqa: SLF001


def forget(session: Session, model: type[Any], ids: Iterable[int]) -> None:
    """Expire loaded objects whose rows a statement deleted."""
    for id_ in ids if session.identity_map else ():
        if (loaded := session.identity_map.get(identity_key(model, id_))) is not None:
            _expire(session, loaded)


def forget_all(session: Session, model: type[Any]) -> None:
    """Expire all loaded objects of a class, when a statement does not say which it deleted."""
    for loaded in list(session.identity_map.values()):
        if isinstance(loaded, model):
            _expire(session, loaded)


def _expire(session: Session, loaded: Any) -> None:
    _altered(session, loaded)
    session.expire(loaded)


def _altered(session: Session, loaded: Any) -> None:
    # As an UPDATE by the ORM does: the rollback of a savepoint then takes the object back as well.
    state: InstanceState[Any] = sa.inspect(loaded)
    session._register_altered([state])  # noqa: SLF001

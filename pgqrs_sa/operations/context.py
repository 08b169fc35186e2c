"""What a service was built with, and the questions that several operations ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

from .. import arguments
from ..codecs import Codec, JsonCodec
from ..errors import NonAtomicEnqueue, PayloadError, QueueNotFound
from ..models import Models
from ..statements import queues

__all__ = ["Context", "decoded", "forget", "forget_all", "queue_not_found", "require_atomic"]


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

    @classmethod
    def of(
        cls, models: Models | None, codec: Codec | None, worker: object, *, allow_autocommit: bool
    ) -> Context:
        """Return the settings of a service, with what was not given filled in."""
        return cls(
            models or _READY_MADE, codec or _STRICT, arguments.worker_id(worker), allow_autocommit
        )


def require_atomic(session: Session, context: Context) -> None:
    """Refuse to enqueue where a rollback would leave the message behind."""
    if context.allow_autocommit:
        return
    # The connection that the statement is about to use anyway; no round trip is made for this.
    connection = session.connection(bind_arguments={"mapper": context.models.message})
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise NonAtomicEnqueue


def queue_not_found(session: Session, context: Context, queue: str) -> QueueNotFound:
    """Return the error for a queue that is not there, with the names that come close."""
    known: Sequence[str] = session.execute(queues.names(context.models)).scalars().all()
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


def forget(session: Session, context: Context, ids: Iterable[int]) -> None:
    """Expire loaded messages that a statement moved away behind the session's back."""
    for id_ in ids if session.identity_map else ():
        key = identity_key(context.models.message, id_)
        if (loaded := session.identity_map.get(key)) is not None:
            session.expire(loaded)


def forget_all(session: Session, context: Context) -> None:
    """Expire every loaded message, when a statement does not say which it deleted."""
    for loaded in list(session.identity_map.values()):
        if isinstance(loaded, context.models.message):
            session.expire(loaded)

"""The session that a service was given: unwrapped, or refused with the name of the right thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from ..errors import InvalidArgument
from . import routing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["asynchronous", "registry_of", "synchronous"]


def synchronous(given: object) -> Session:
    """Return the ``Session`` itself: of a registry, the current one of the scope.

    Raises:
        InvalidArgument: it is something else, or not bound to PostgreSQL.
    """
    session = _current(given)
    if not isinstance(session, Session):
        raise InvalidArgument(_refusal(session, "QueueService", "Session"))
    return _on_postgresql(session)


def asynchronous(given: object) -> AsyncSession:
    """Return the ``AsyncSession`` itself: of a registry, the current one of the scope.

    Raises:
        InvalidArgument: it is something else, or not bound to PostgreSQL.
    """
    session: Any = _current(given)
    inner = getattr(session, "sync_session", None)
    if not isinstance(inner, Session):
        raise InvalidArgument(_refusal(session, "AsyncQueueService", "AsyncSession"))
    _on_postgresql(inner)
    found: AsyncSession = session
    return found


def registry_of(given: Any) -> Any:
    """Return a ``scoped_session`` or ``async_scoped_session``; None for anything else."""
    # Not by its class: that of asyncio needs greenlet.
    is_registry = callable(getattr(given, "registry", None)) and hasattr(given, "session_factory")
    return given if is_registry else None


def _current(given: Any) -> object:
    if isinstance(given, Session) or (registry := registry_of(given)) is None:
        return given
    return registry()


def _on_postgresql(session: Session) -> Session:
    if session.bind is not None and routing.is_plain(session):
        routing.refuse_dialect(session.bind)
    return session


def _refusal(given: object, service: str, wanted: str) -> str:
    kind = type(given).__name__
    made = f"{service}({wanted}(engine))"
    if isinstance(given, Session):
        better = "use QueueService, or pass an AsyncSession"
    elif hasattr(given, "sync_session"):
        better = "use AsyncQueueService, or pass a Session"
    elif isinstance(given, (Engine, Connection)) or kind in ("AsyncEngine", "AsyncConnection"):
        better = f"pass a session on it: {made}"
    elif isinstance(given, type) or callable(given):
        kind = given.__name__ if isinstance(given, type) else kind
        better = f"call it, and pass the session that it makes: {service}({kind}())"
        if kind.endswith("sessionmaker"):
            better = "call it, and pass the session that it makes"
    else:
        better = f"pass the session whose transaction is to have the messages: {made}"
    return f"{service} needs {_article(wanted)} {wanted}, not {_article(kind)} {kind}: {better}"


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOaeio" else "a"

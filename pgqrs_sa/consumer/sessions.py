"""The sessions of handlers: what a consumer accepts as a maker of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from .._core import routing
from .._core.scope import Scope
from .._core.sessions import registry_of
from ..errors import InvalidArgument
from .call_context import scope_of

__all__ = ["engine_of", "factory_of", "open_session", "refuse_elsewhere", "sessionmaker_for"]


def sessionmaker_for(given: Any, consumer: str, *, asynchronous: bool) -> Any:
    """Return what makes the session of one call: a context manager, which also ends it.

    Args:
        given: A ``sessionmaker``, a registry such as ``scoped_session``, or any function without
            arguments that returns a session.
        consumer: The name of the consumer's class, for errors.
        asynchronous: Whether it calls for an ``AsyncSession``.

    Raises:
        InvalidArgument: it is something else.
    """
    wanted = "async_sessionmaker" if asynchronous else "sessionmaker"
    factory = factory_of(given)
    made = factory.class_ if isinstance(factory, sessionmaker) else factory
    if isinstance(given, Session) or hasattr(given, "sync_session") or not callable(given):
        raise InvalidArgument(
            f"{consumer} needs a sessionmaker, which makes a session for each message, not "
            f"{type(given).__name__}: pass {consumer}({wanted}(engine))"
        )
    if asynchronous and isinstance(made, type) and issubclass(made, Session):
        raise InvalidArgument(_WRONG_KIND[True])
    if not asynchronous and type(factory).__name__ == "async_sessionmaker":
        raise InvalidArgument(_WRONG_KIND[False])
    return given if registry_of(given) is None else lambda: _InScope(given)


_WRONG_KIND = {
    True: "AsyncConsumer needs an async_sessionmaker; a sessionmaker is for Consumer",
    False: "an async_sessionmaker is for AsyncConsumer, not for Consumer",
}


def factory_of(given: Any) -> Any:
    """Return what makes a session that nobody else uses, of a registry too."""
    return given if registry_of(given) is None else given.session_factory


class _InScope:
    """A new session for one call, which is the registry's current session meanwhile.

    The scope is the call's own: `call_context.check_scopes` refuses registries where it is not.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._scope = scope_of(registry)

    def __enter__(self) -> Any:
        self._registry.remove()  # what an earlier call has left in this scope
        return self._made_current()

    def __exit__(self, *_error: object) -> None:
        try:
            self._session.close()
        finally:
            if self._scope() == self._key:  # unless the handler has moved into another scope
                self._registry.remove()

    async def __aenter__(self) -> Any:
        await self._registry.remove()
        return self._made_current()

    async def __aexit__(self, *_error: object) -> None:
        try:
            await self._session.__aexit__(None, None, None)  # not cut short by a cancellation
        finally:
            if self._scope() == self._key:
                await self._registry.remove()

    def _made_current(self) -> Any:
        self._key = self._scope()
        self._session = self._registry.session_factory()
        self._registry.registry.set(self._session)
        return self._session


def open_session(made: Any, *, asynchronous: bool) -> Any:
    """Return what a maker of sessions has returned, unless it is one of the other kind."""
    if asynchronous != hasattr(made, "sync_session"):
        raise InvalidArgument(_WRONG_KIND[asynchronous])
    return made


def engine_of(scope: Scope) -> Engine:
    """Return the engine that a new session has for the tables of the queue.

    Raises:
        InvalidArgument: a session that uses several databases for a statement, one bound to a
            connection, or not to PostgreSQL.
    """
    bind = routing.bind_of(scope.session, scope.mapper)
    if isinstance(bind, Connection):
        raise InvalidArgument(
            "the sessionmaker is bound to one connection: a consumer needs an engine, with a "
            "connection for each of its threads (in tests, pgqrs_sa.testing.drain runs handlers)"
        )
    routing.refuse_dialect(bind)
    return bind


def refuse_elsewhere(scope: Scope, engine: Engine) -> None:
    """Raise when the session of a call is not of the database that the message was leased in."""
    if scope.session.bind is engine and routing.is_plain(scope.session):
        return
    theirs = routing.bind_of(scope.session, scope.mapper).engine
    if theirs.pool is not engine.pool and theirs.url != engine.url:
        raise InvalidArgument(
            "the sessionmaker has made a session of another database than the consumer leases "
            "from: make one consumer for each database, with sessions that are fixed to it"
        )

"""The sessions of handlers: which factories a consumer accepts, and where it calls them.

Each call of a handler runs in a call context. Calls must not share the session of a registry.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from typing import Any, NoReturn, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from .._core import sessions
from .._core.scope import Scope
from .._core.sessions import registry_of
from ..errors import InvalidArgument, PgqrsError, PoolTooSmall, safe_repr
from .handlers import Handler

__all__ = [
    "AutocommitSession",
    "CallContext",
    "call_context_of",
    "check_call_context",
    "check_pool",
    "check_scopes",
    "check_scopes_of_tasks",
    "engine_of",
    "factory_of",
    "open_session",
    "refuse_autocommit",
    "refuse_autocommit_session",
    "refuse_elsewhere",
    "refuse_suppression",
    "scope_of",
    "sessionmaker_for",
]


def sessionmaker_for(given: Any, consumer: str, *, asynchronous: bool) -> Any:
    """Return the factory of a context manager that opens and closes the session of one call.

    Args:
        given: A ``sessionmaker``, a registry such as ``scoped_session``, or any function without
            arguments that returns a session.
        consumer: The name of the consumer's class, for errors.
        asynchronous: Whether it must return an ``AsyncSession``.

    Raises:
        InvalidArgument: ``given`` is something else.
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
    """Return a factory of new sessions: for a registry, its ``session_factory``."""
    return given if registry_of(given) is None else given.session_factory


class _InScope:
    """A new session for one call, made the registry's current session during the call.

    Each call has its own scope: `check_scopes` refuses other registries.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._scope = scope_of(registry)

    def __enter__(self) -> Any:
        self._registry.remove()  # a session that an earlier call left in this scope
        return self._made_current()

    def __exit__(self, *_error: object) -> None:
        try:
            self._session.close()
        finally:
            if self._scope() == self._key:  # unless the handler switched to another scope
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
    """Return the session of a factory, or raise if it is of the other kind (sync or async)."""
    if asynchronous != hasattr(made, "sync_session"):
        raise InvalidArgument(_WRONG_KIND[asynchronous])
    return made


def engine_of(scope: Scope) -> Engine:
    """Return the engine of a new session for the tables of the queue.

    Raises:
        InvalidArgument: the session uses several databases for one statement, or is bound to a
            connection, or not to PostgreSQL.
    """
    bind = sessions.bind_of(scope.session, scope.context.mapper)
    if isinstance(bind, Connection):
        raise InvalidArgument(
            "the sessionmaker is bound to one connection: a consumer needs an engine, with a "
            "connection for each of its threads (in tests, pgqrs_sa.testing.drain runs handlers)"
        )
    sessions.refuse_dialect(bind)
    return bind


def refuse_elsewhere(scope: Scope, engine: Engine) -> None:
    """Raise if the session of a call is of another database than the message was leased in."""
    if scope.session.bind is engine and sessions.is_plain(scope.session):
        return
    theirs = sessions.bind_of(scope.session, scope.context.mapper).engine
    if theirs.pool is not engine.pool and theirs.url != engine.url:
        raise InvalidArgument(
            "the sessionmaker has made a session of another database than the consumer leases "
            "from: make one consumer for each database, with sessions that are fixed to it"
        )


CallContext: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Returns the context manager in which a handler is called."""


def check_call_context(given: CallContext, name: str) -> CallContext:
    """Return the call context, or raise `InvalidArgument` if it is not callable."""
    if not callable(given):
        raise InvalidArgument(
            f"{name} must be a function that returns a context manager, such as "
            f"app.app_context, not {safe_repr(given)}"
        )
    return given


def call_context_of(given: CallContext | None) -> CallContext:
    """Return the call context of a run that starts in the current context.

    Calls copy the context variables of the caller of run(), including Flask's application context,
    whose identity is the scope of Flask-SQLAlchemy's sessions. So each call gets a new application
    context, and the given context is entered within it.
    """
    within = given or nullcontext
    flask: Any = sys.modules.get("flask")  # not a dependency; if not imported, no app is active
    if flask is None or not flask.has_app_context():
        return within
    app = flask.current_app._get_current_object()  # noqa: SLF001 - as Flask's documentation does
    if given is None:
        own: CallContext = app.app_context
        return own

    @contextmanager
    def both() -> Iterator[None]:
        with app.app_context(), within():
            yield

    return both


def scope_of(registry: Any) -> Callable[[], Hashable]:
    """Return the function that returns the current scope of a registry of sessions."""
    function: Callable[[], Hashable] = getattr(registry.registry, "scopefunc", threading.get_ident)
    return function


def refuse_suppression() -> NoReturn:
    """Raise after a call whose error was suppressed by its call context: it still has failed."""
    raise InvalidArgument("call_context has suppressed what the handler raised: let it pass")


def check_scopes(registry: Any, given: CallContext | None) -> None:
    """Raise unless concurrent calls in threads, and the caller of run(), have different scopes.

    Args:
        registry: A registry of sessions, or None.
        given: The ``call_context`` of the consumer.

    Raises:
        InvalidArgument: two of them would share a session of the registry, its scope cannot be
            determined in a call, or the call context cannot be entered.
    """
    if registry is None and given is None:
        return
    scopes, context = _Scopes(registry, call_context_of(given)), copy_context()

    def call(more: int) -> None:
        with scopes.entered():
            if more:  # within the first, so that both exist at the same time
                pool.submit(context.copy().run, call, more - 1).result()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(context.copy().run, call, 1).result()
    scopes.check()


async def check_scopes_of_tasks(registry: Any, given: CallContext | None) -> None:
    """Do the same as `check_scopes`, for calls in tasks."""
    if registry is None and given is None:
        return
    scopes, context = _Scopes(registry, call_context_of(given)), copy_context()

    async def call(more: int) -> None:
        with scopes.entered():
            if more:
                await asyncio.create_task(call(more - 1), context=context.copy())

    await asyncio.create_task(call(1), context=context.copy())
    scopes.check()


class _Scopes:
    """The scopes of the caller of run() and of the calls."""

    def __init__(self, registry: Any, call_context: CallContext) -> None:
        self._call_context = call_context
        self._scope: Callable[[], Hashable] = object if registry is None else scope_of(registry)
        self._found: list[Hashable] = []
        try:
            self._found.append(self._scope())
        except Exception:  # noqa: BLE001 - the caller of run() needs no session
            self._found.append(object())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the call context, as a call does, and record its scope."""
        try:
            with self._call_context():
                self._note()
                yield
        except PgqrsError:
            raise
        except Exception as error:
            raise InvalidArgument(
                "call_context must be a function without arguments that returns a context "
                f"manager; it raised {type(error).__name__}: {error}"
            ) from error

    def _note(self) -> None:
        try:
            self._found.append(self._scope())
        except Exception as error:
            raise InvalidArgument(
                "the registry of sessions has no scope in the calls of handlers "
                f"({type(error).__name__}: {str(error).splitlines()[0]}): {_REMEDY}"
            ) from error

    def check(self) -> None:
        """Raise unless all scopes differ."""
        shared = [scope for scope in self._found if self._found.count(scope) > 1]
        if shared:
            raise InvalidArgument(
                "calls of handlers would share a session of the registry, with each other or with "
                f"the caller of run(), since its scope is {safe_repr(shared[0])} in both: {_REMEDY}"
            )


_REMEDY = (
    "give each call a scope of its own with call_context (for Flask-SQLAlchemy: "
    "call_context=app.app_context), or pass a sessionmaker instead (sessionmaker(db.engine))"
)


class AutocommitSession(InvalidArgument):
    """The session is in AUTOCOMMIT: the consumer ends before a handler uses it."""


def refuse_autocommit(handlers: Sequence[Handler]) -> None:
    """Raise if a handler takes a session: the sessions' connections are in AUTOCOMMIT.

    Its writes would stay although the attempt has failed, and be repeated by the next.
    """
    names = [handler.name for handler in handlers if handler.call.needs_session]
    if names:
        raise AutocommitSession(
            f"the sessions are in AUTOCOMMIT, and {', '.join(names)} takes a session, whose writes "
            "commit together with the end of the message: make sessionmaker and engine "
            'transactional, as with execution_options(isolation_level="READ COMMITTED")'
        )


def refuse_autocommit_session(session: Session, handlers: Sequence[Handler]) -> None:
    """Do as `refuse_autocommit` if new sessions set AUTOCOMMIT, unlike their engine.

    SQLAlchemy 2.1 has ``sessionmaker(engine, execution_options=...)``.
    """
    options: Any = getattr(session, "execution_options", {})
    if options.get("isolation_level") == "AUTOCOMMIT":
        refuse_autocommit(handlers)


def check_pool(pool: Any, needed: int, why: str) -> None:
    """Raise `PoolTooSmall` if a pool has fewer connections than are needed at the same time.

    A pool without a limit, or whose limit is unknown, is considered large enough.
    """
    size: Any = getattr(pool, "size", None)
    overflow: Any = getattr(pool, "_max_overflow", None)
    if size is None or overflow is None or overflow < 0:
        return
    available = int(size()) + int(overflow)
    if available < needed:
        raise PoolTooSmall(available, needed, why)

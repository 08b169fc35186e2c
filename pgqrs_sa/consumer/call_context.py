"""What a call of a handler is made in, and whether calls share the sessions of a registry."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from typing import Any, NoReturn, TypeAlias

from ..errors import InvalidArgument, PgqrsError, safe_repr

__all__ = [
    "CallContext",
    "call_context_of",
    "check_call_context",
    "check_scopes",
    "check_scopes_of_tasks",
    "refuse_suppression",
    "scope_of",
]

CallContext: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Makes the context manager that a call is made in."""


def check_call_context(given: CallContext, name: str) -> CallContext:
    """Return a call context, or raise `InvalidArgument` unless it is a function."""
    if not callable(given):
        raise InvalidArgument(
            f"{name} must be a function that returns a context manager, such as "
            f"app.app_context, not {safe_repr(given)}"
        )
    return given


def call_context_of(given: CallContext | None) -> CallContext:
    """Return what each call of a run is made in, for a run that is started here and now.

    Calls copy the context variables of the caller of run(), and with them Flask's application
    context, by whose identity Flask-SQLAlchemy tells sessions apart. Each call gets an application
    context of its own, therefore, and what was given is entered within it.
    """
    within = given or nullcontext
    flask: Any = sys.modules.get("flask")  # no dependency: who has not imported it has none active
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
    """Return the function that tells the scopes of a registry of sessions apart."""
    function: Callable[[], Hashable] = getattr(registry.registry, "scopefunc", threading.get_ident)
    return function


def refuse_suppression() -> NoReturn:
    """Raise after a call whose error was suppressed by its call context: it has failed still."""
    raise InvalidArgument("call_context has suppressed what the handler raised: let it pass")


def check_scopes(registry: Any, given: CallContext | None) -> None:
    """Raise unless concurrent calls in threads, and the caller of run(), have different scopes.

    Args:
        registry: A registry of sessions, or None.
        given: The ``call_context`` of the consumer.

    Raises:
        InvalidArgument: two of them would share a session of the registry, its scope is not known
            in a call, or the call context cannot be entered.
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
    """The scopes of the caller of run(), and of calls."""

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
        """Enter the call context, as a call does, and note the scope in it."""
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
        """Raise unless all of them differ."""
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

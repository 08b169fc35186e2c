"""The sessions of tests: plain, scoped or asynchronous."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy.orm import Session, scoped_session

from ..errors import InvalidArgument, safe_repr

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    AsyncSessionLike: TypeAlias = AsyncSession | async_scoped_session[Any]
    """An ``AsyncSession``, or a registry of them."""

__all__ = ["SessionLike", "is_async", "opened", "perform", "plain"]

SessionLike: TypeAlias = Session | scoped_session[Any]
"""A ``Session``, or a registry of them, such as Flask-SQLAlchemy's ``db.session``."""

_Found = TypeVar("_Found")
_Result = TypeVar("_Result")


def opened(session: Any) -> Any:
    """Return the session; for a registry, its current session.

    Raises:
        InvalidArgument: it is not a session.
    """
    registry = getattr(session, "registry", None)
    found = registry() if callable(registry) else session
    if not isinstance(found, Session) and not is_async(found):
        raise InvalidArgument(
            f"a Session or an AsyncSession is needed here, not {safe_repr(session)}: pass the one "
            "of the test's transaction"
        )
    return found


def is_async(session: Any) -> bool:
    """Return whether it is an ``AsyncSession``, without importing its module: it needs greenlet."""
    return isinstance(getattr(session, "sync_session", None), Session)


def plain(session: Any) -> Session:
    """Return the ``Session``, also of an ``AsyncSession``."""
    found = opened(session)
    inner: Session = found.sync_session if is_async(found) else found
    return inner


def perform(
    session: Any, work: Callable[[Session], _Found], then: Callable[[_Found], _Result]
) -> Any:
    """Call a function with a session, and then ``then`` with its result.

    ``then`` runs outside SQLAlchemy's greenlet, so that an assertion that fails in it has a short
    traceback.

    Returns:
        The result; for an ``AsyncSession``, an awaitable of it.
    """
    __tracebackhide__ = True
    found = opened(session)
    if not is_async(found):
        return then(work(found))

    async def performed() -> _Result:
        __tracebackhide__ = True
        return then(await found.run_sync(work))

    return performed()

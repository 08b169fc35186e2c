"""Sessions as tests have them: plain, scoped or asynchronous."""

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
    """Return the session itself: of a registry, the one that is current.

    Raises:
        InvalidArgument: it is none.
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
    """Whether it is an ``AsyncSession``; its module, which needs greenlet, is not imported."""
    return isinstance(getattr(session, "sync_session", None), Session)


def plain(session: Any) -> Session:
    """Return the ``Session`` that does the work."""
    found = opened(session)
    inner: Session = found.sync_session if is_async(found) else found
    return inner


def perform(
    session: Any, work: Callable[[Session], _Found], then: Callable[[_Found], _Result]
) -> Any:
    """Do something in a session, and then something with the result.

    ``then`` runs outside of SQLAlchemy's greenlet, so that an assertion that fails there has a
    short traceback.

    Returns:
        The result; of an ``AsyncSession`` an awaitable of it.
    """
    __tracebackhide__ = True
    found = opened(session)
    if not is_async(found):
        return then(work(found))

    async def performed() -> _Result:
        __tracebackhide__ = True
        return then(await found.run_sync(work))

    return performed()

"""The sessions of tests: plain, scoped or asynchronous, or with a commit that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .._core.scope import Context
from ..errors import InvalidArgument, safe_repr
from ..models import Models, models_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    AsyncSessionLike: TypeAlias = AsyncSession | async_scoped_session[Any]
    """An ``AsyncSession``, or a registry of them."""

__all__ = ["SessionLike", "is_async", "opened", "perform", "plain", "raise_on_commit"]

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


@contextmanager
def raise_on_commit(
    session: SessionLike | AsyncSessionLike | sessionmaker[Any],
    *,
    committed: bool = False,
    models: Models | None = None,
) -> Iterator[None]:
    """Let the next commit raise ``OperationalError``, as when the connection breaks.

    If the session joined the transaction of a test, its commit is the release of a savepoint, and
    this release fails. Releases of the application's own savepoints do not fail.

    Args:
        session: The session whose commit fails; for a ``sessionmaker``, the first commit of any of
            its sessions.
        committed: True if the server commits, and only its reply is lost. Otherwise nothing is
            committed.
        models: A host's own classes, if the session has several binds: the commit on the
            connection with their tables fails.

    Raises:
        AssertionError: nothing was committed in the block.
    """
    __tracebackhide__ = True
    target: Any = session if isinstance(session, sessionmaker) else plain(session)
    mapper = Context.of(models_of(models), None, None, allow_autocommit=True).mapper
    fault = _Fault(committed=committed)

    def before_commit(committing: Session) -> None:
        if not fault.done and not committing.in_nested_transaction():
            fault.watch(committing.connection(bind_arguments={"mapper": mapper}))

    event.listen(target, "before_commit", before_commit)
    try:
        yield
    finally:
        event.remove(target, "before_commit", before_commit)
        fault.unwatch()
    if not fault.done:
        raise AssertionError("raise_on_commit(): nothing was committed in the block")


class _Fault:
    """The fault of a COMMIT, or of the RELEASE SAVEPOINT that is a joined session's commit."""

    def __init__(self, *, committed: bool) -> None:
        self._committed = committed
        self._watched: list[Connection] = []
        self.done = False

    def watch(self, connection: Connection) -> None:
        """Watch a connection for its next commit."""
        if connection not in self._watched:
            event.listen(connection, "commit", self._commit)
            event.listen(connection, "release_savepoint", self._release)
            self._watched.append(connection)

    def unwatch(self) -> None:
        """Stop watching commits."""
        while self._watched:
            connection = self._watched.pop()
            event.remove(connection, "commit", self._commit)
            event.remove(connection, "release_savepoint", self._release)

    def _commit(self, connection: Connection) -> None:
        if self._committed and not self.done:
            connection.dialect.do_commit(connection.connection)
        self._raise("COMMIT")

    def _release(self, connection: Connection, name: str, _context: None) -> None:
        if not self.done:
            if not self._committed:
                # SQLAlchemy does not: to it, this savepoint has ended.
                connection.dialect.do_rollback_to_savepoint(connection, name)
            connection.dialect.do_release_savepoint(connection, name)
        self._raise("RELEASE SAVEPOINT")

    def _raise(self, statement: str) -> None:
        if self.done:
            return
        self.done = True
        reply = "the server had committed" if self._committed else "nothing was committed"
        lost = ConnectionError(f"the connection was lost ({reply}): raise_on_commit()")
        raise OperationalError(statement, None, lost)

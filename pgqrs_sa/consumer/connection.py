"""The consumer's own connections: each statement commits by itself.

A `ConsumerConnection` holds a connection, in AUTOCOMMIT if possible, and replaces it when it
breaks. Only one thread uses its session. In an `AsyncConsumer`, too, that is a thread: it has its
own event loop and a connection of that loop, so that neither a blocked loop nor a cancelled task
of the application delays a renewal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .._core import commits
from .._core.scope import Context, Scope
from .._core.sessions import is_autocommit
from . import store
from .call_transactions import shut_down
from .nonblocking import NonblockingConnection
from .retrying import is_transient, retrying, without_parameters

__all__ = ["AsyncConnector", "Connector", "ConsumerConnection", "Exchange", "Sent", "SyncConnector"]

log = logging.getLogger("pgqrs_sa.consumer")

_P = ParamSpec("_P")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Connector(Protocol):
    """Opens a connection for a thread, and runs functions on it."""

    def run(self, work: Callable[[Connection], _T]) -> _T:
        """Call a function with the connection, which is opened first if necessary."""
        ...

    def discard(self) -> None:
        """Discard a broken connection."""

    def close(self) -> None:
        """Return the connection to its pool."""

    def abort(self) -> None:
        """Abort a call that hangs. Called from another thread."""


class SyncConnector:
    """A connection of the application's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def run(self, work: Callable[[Connection], _T]) -> _T:
        """See `Connector`."""
        if self._connection is None:
            self._connection = self._engine.connect()
        return work(self._connection)

    def discard(self) -> None:
        """See `Connector`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()

    def close(self) -> None:
        """See `Connector`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def abort(self) -> None:
        """See `Connector`: both psycopg's connections tell their socket."""
        connection = self._connection
        with contextlib.suppress(Exception):  # it is closed already
            shut_down(connection.connection.driver_connection if connection else None)


class AsyncConnector:
    """A connection like those of the application's async engine, in this thread's event loop."""

    def __init__(self, engine: Any) -> None:
        self._engine = _engine_for_thread(engine)
        self._connection: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    def run(self, work: Callable[[Connection], _T]) -> _T:
        """See `Connector`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        result: _T = self._loop.run_until_complete(self._cancellable(self._run(work)))
        return result

    async def _cancellable(self, work: Any) -> Any:
        task = self._task = asyncio.ensure_future(work)
        try:
            return await task
        except asyncio.CancelledError:
            raise TimeoutError("the server did not answer in time") from None
        finally:
            self._task = None

    async def _run(self, work: Callable[[Connection], _T]) -> _T:
        if self._connection is None:
            self._connection = await self._engine.connect()
        result: _T = await self._connection.run_sync(work)
        return result

    def discard(self) -> None:
        """See `Connector`."""
        self._end(broken=True)

    def close(self) -> None:
        """See `Connector`."""
        self._end(broken=False)
        if self._loop is not None:
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(self._engine.dispose())
            self._loop.run_until_complete(_finish_tasks())
            self._loop.close()
            self._loop = None

    def _end(self, *, broken: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None or self._loop is None:
            return

        async def end() -> None:
            if broken:
                with contextlib.suppress(Exception):
                    await connection.invalidate()
            with contextlib.suppress(Exception):
                await connection.close()

        self._loop.run_until_complete(end())

    def abort(self) -> None:
        """See `Connector`."""
        task, loop = self._task, self._loop
        if task is not None and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(task.cancel)


async def _finish_tasks() -> None:
    """Wait for the tasks that aborted calls have left in this loop, then cancel them.

    SQLAlchemy closes the connection of a cancelled call in a separate task, which a second
    cancellation does not reach. If the loop ended before it, its socket would stay open. Such a
    task gets a second before it is cancelled, since asyncpg before 0.32 then leaves its socket
    open.
    """
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        _, late = await asyncio.wait(rest, timeout=1)
        for task in late:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _engine_for_thread(engine: Any) -> Any:
    """Return a copy of an async engine with a pool of its own, for another event loop.

    It connects as the application's engine does, with the same dialect, creator and events.
    """
    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 - needs greenlet

    original = engine.sync_engine
    twin: Any = Engine(original.pool.recreate(), original.dialect, original.url)
    # Copied as engine.execution_options() does, which may have returned this engine.
    twin.dispatch = twin.dispatch._join(original.dispatch)  # noqa: SLF001
    twin._has_events = original._has_events  # noqa: SLF001 - or none of them is called
    return AsyncEngine(twin.execution_options(**original.get_execution_options()))


class Exchange(Protocol[_T_co]):
    """A statement in two halves: what is sent, and what is made of the reply."""

    @property
    def statement(self) -> Executable:
        """The statement."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """The parameters of the statement, which is sent at once."""
        ...

    def read(self, rows: Sequence[Any]) -> _T_co | None:
        """Return the result that the rows of the reply stand for, or None."""
        ...

    def result(self, scope: Scope) -> _T_co:
        """Execute other statements, and return the result, if `read` has returned None."""
        ...

    def run(self, scope: Scope) -> _T_co:
        """Do both halves, and wait in between."""
        ...


@dataclass(frozen=True, slots=True)
class Sent(Generic[_T]):
    """A statement that was sent, and whose reply was not read yet."""

    context: Context
    exchange: Exchange[_T]


class ConsumerConnection:
    """A connection in AUTOCOMMIT, which is replaced when it breaks.

    Args:
        connector: Opens the connection.
        stopping: When set, a database that does not answer is no longer waited for.
        deadline: Seconds after which `abort_if_stuck` aborts a call and its connection.
    """

    def __init__(self, connector: Connector, stopping: threading.Event, deadline: float) -> None:
        self._connector = connector
        self._stopping = stopping
        self._deadline = deadline
        self._call_started_at: float | None = None
        self._isolation: str | None = None
        self.is_autocommit = False  # of the application's connections: known after the first call
        self._session: Session | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._nonblocking: NonblockingConnection | None = None
        self._is_blocking = False  # the driver cannot send without waiting
        self._in_flight = False
        self._is_exchanging = False  # in a call of the driver, without the connector

    def run(
        self,
        what: str,
        context: Context,
        operation: Callable[Concatenate[Scope, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Run an operation, and repeat it after transient errors."""
        return self.run_until(self._stopping, what, context, operation, *args, **kwargs)

    def run_until(
        self,
        stopping: threading.Event,
        what: str,
        context: Context,
        operation: Callable[Concatenate[Scope, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Run an operation, and repeat it after transient errors until ``stopping`` is set."""
        once = partial(self.run_once, context, operation, *args, **kwargs)
        return _repeated(stopping, what, context.worker, once)

    def exchange_until(
        self,
        stopping: threading.Event,
        what: str,
        context: Context,
        begin: Callable[Concatenate[Scope, _P], Exchange[_T]],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Do as `run_until` with a statement that `send` takes."""

        def once() -> _T:
            if self.can_send:  # not through SQLAlchemy: a third of the client's time
                return self.receive(self.send(context, begin, *args, **kwargs))
            return self.run_once(context, lambda scope: begin(scope, *args, **kwargs).run(scope))

        return _repeated(stopping, what, context.worker, once)

    def run_transaction(
        self,
        what: str,
        context: Context,
        operation: Callable[Concatenate[Scope, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Run an operation in its own transaction, and repeat it after transient errors."""
        for attempt in retrying(self._stopping, what, context.worker):
            with attempt:
                return self.transaction(context, operation, *args, **kwargs)
        raise AssertionError("a retry ends with a result or an error")

    def run_once(
        self,
        context: Context,
        operation: Callable[Concatenate[Scope, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Run an operation once; after an error, discard the connection."""

        def work(connection: Connection) -> _T:
            session = self._ready(connection, context)
            result = operation(Scope(session, context), *args, **kwargs)
            if self._isolation == "AUTOCOMMIT":  # each statement has committed by itself
                if session.info:  # few operations leave a callback there
                    commits.now(session)
                return result
            session.commit()
            return result

        return self._timed(work)

    def transaction(
        self,
        context: Context,
        operation: Callable[Concatenate[Scope, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Run an operation once, in its own READ COMMITTED transaction."""

        def work(connection: Connection) -> _T:
            if self._session is not None:
                self._session.close()
                self._session = None
            _set(connection, "READ COMMITTED")
            with Session(connection) as session, session.begin():
                return operation(Scope(session, context), *args, **kwargs)

        return self._timed(work)

    @property
    def can_send(self) -> bool:
        """Whether `send` is possible: the one place that decides it.

        Otherwise the consumer waits for each statement. It does so on the first call of each
        connection, where a statement does not commit by itself, with drivers other than psycopg,
        and while listeners of the application watch the statements.
        """
        session = self._session
        if session is None or self._isolation != "AUTOCOMMIT":
            return False
        connection: Any = session.bind
        if _is_watched(connection):
            return False
        if self._nonblocking is None and not self._is_blocking:
            self._nonblocking = NonblockingConnection.of(connection, session)
            self._is_blocking = self._nonblocking is None
        return self._nonblocking is not None

    def send(
        self,
        context: Context,
        begin: Callable[Concatenate[Scope, _P], Exchange[_T]],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> Sent[_T]:
        """Send a statement, which commits by itself, and do not wait for the reply.

        `receive` must be called before the connection is used for anything else.
        """
        session, nonblocking = self._session, self._nonblocking
        assert session is not None and nonblocking is not None, "see can_send"  # noqa: S101, PT018
        exchange = begin(Scope(session, context), *args, **kwargs)
        self._exchange(lambda: nonblocking.send(exchange.statement, exchange.values))
        self._in_flight = True
        return Sent(context, exchange)

    def receive(self, sent: Sent[_T]) -> _T:
        """Wait for the reply to what was sent."""
        session, nonblocking = self._session, self._nonblocking
        assert session is not None and nonblocking is not None, "see send"  # noqa: S101, PT018
        rows = self._exchange(nonblocking.receive)
        self._in_flight = False
        if (result := sent.exchange.read(rows)) is None:
            return self.run_once(sent.context, sent.exchange.result)
        if session.info:
            commits.now(session)
        return result

    def _exchange(self, call: Callable[[], _T]) -> _T:
        self._is_exchanging = True
        try:
            return self._call(call)
        finally:
            self._is_exchanging = False

    def _timed(self, work: Callable[[Connection], _T]) -> _T:
        return self._call(lambda: self._connector.run(work))

    def _call(self, call: Callable[[], _T]) -> _T:
        self._call_started_at = time.monotonic()
        try:
            return call()
        except BaseException:
            self._discard()
            self.on_failure()
            raise
        finally:
            self._call_started_at = None

    def _discard(self) -> None:
        nonblocking, self._nonblocking = self._nonblocking, None
        self._session = None
        self._in_flight = self._is_blocking = False
        if nonblocking is not None:
            nonblocking.discard()
        self._connector.discard()

    def _ready(self, connection: Connection, context: Context) -> Session:
        """Return the session of a connection; it is kept as long as the connection."""
        if self._session is None or self._session.bind is not connection:
            if self._isolation is None:
                self.is_autocommit = is_autocommit(connection)
                # In AUTOCOMMIT the server's own default rules, which may be another than this.
                with Session(connection) as session:
                    default = store.server_info(Scope(session, context))
                alone = default == "read committed" and not _prepares_separately(connection)
                self._isolation = "AUTOCOMMIT" if alone else "READ COMMITTED"
            _set(connection, self._isolation)
            self._session = Session(connection)
        return self._session

    @property
    def stopping(self) -> threading.Event:
        """Set when there is no more time to wait for the database."""
        return self._stopping

    @property
    def stop_requested(self) -> bool:
        """True when there is no more time to wait for the database."""
        return self._stopping.is_set()

    def log_failure(self, error: BaseException, worker: int | None) -> None:
        """Log the error that stopped this thread."""
        if self.stop_requested and is_transient(error):
            name = type(error).__name__
            log.warning("the database is away: %s", name, extra={"worker": worker})
        else:
            what = "the consumer cannot go on"
            log.error(what, exc_info=without_parameters(error), extra={"worker": worker})

    def abort_if_stuck(self) -> None:
        """Abort the connection if a call has exceeded the deadline. Called from another thread."""
        since = self._call_started_at
        if since is not None and time.monotonic() - since > self._deadline:
            self.abort()

    def abort(self) -> None:
        """Abort the connection, even during a call. Called from another thread."""
        nonblocking = self._nonblocking
        if nonblocking is not None and self._is_exchanging:
            nonblocking.abort()
        else:
            self._connector.abort()

    def close(self) -> None:
        """Return the connection to its pool."""
        if self._in_flight:  # after an error of this thread: its reply will not be read
            self._discard()
        if self._nonblocking is not None:
            with contextlib.suppress(Exception):  # it is broken, and was discarded
                self._exchange(self._nonblocking.close)
            self._nonblocking = None
        self._connector.close()


def _repeated(
    stopping: threading.Event, what: str, worker: int | None, once: Callable[[], _T]
) -> _T:
    """Call a function, and call it again after transient errors until ``stopping`` is set."""
    try:
        return once()
    except Exception as error:  # noqa: BLE001 - it is the first attempt's below
        failed = [error]
    # Created only after an error: it would add a twentieth to the time of a quick call.
    for attempt in retrying(stopping, what, worker):
        with attempt:
            if failed:
                raise failed.pop()
            return once()
    raise AssertionError("a retry ends with a result or an error")


def _is_watched(connection: Any) -> bool:
    """Return whether SQLAlchemy calls listeners, which it only does for statements that it sends.

    Those of a dialect are on its events for each statement, not on one for new connections.
    """
    if connection._has_events or connection.engine._has_events:  # noqa: SLF001
        return True
    dialect = connection.dialect
    return dialect._has_events and bool(  # noqa: SLF001
        dialect.dispatch.do_execute or dialect.dispatch.handle_error
    )


def _prepares_separately(connection: Connection) -> bool:
    """Return whether the driver prepares a statement in one message and executes it in the next.

    asyncpg does that without its statement cache, as behind PgBouncer. There, outside a
    transaction, each message may reach another server connection, which has no such statement.
    """
    raw: Any = connection.connection.dbapi_connection
    keeps = getattr(raw, "_prepared_statement_cache", None) is not None
    return connection.dialect.driver == "asyncpg" and not keeps


def _set(connection: Connection, isolation: str) -> None:
    connection.execution_options(isolation_level=isolation)

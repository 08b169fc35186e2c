"""Receiving the NOTIFY of enqueues, on a connection of its own.

A listener has a thread, and in it a connection that is the application's in all but the pool: the
same address, arguments and creators. It says when something may be there to lease, and no more
than that: a notification is a hint, and consumers poll as well. The sending side, and wake-ups in a
process, are `_core.wakeup`.

What is subscribed and dead looks like what is subscribed and idle: a connection that was dropped
without a word, or one through PgBouncer in transaction mode. So the listener sends itself a
notification now and then, and reconnects when it does not receive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import sqlalchemy as sa

from . import dsns
from ._core.sql.wakeup import channel
from ._core.tables import tables_of
from .errors import InvalidArgument
from .models import Models, models_of
from .settings import database_url

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Listener"]

_SHORTEST, _LONGEST = 0.1, 10.0
"""Seconds until the first attempt to connect again, and at most between two of them."""

_log = logging.getLogger(__name__)


class Listener:
    """Calls a function for each notification of an enqueue.

    Args:
        engine: What the database is reached with, by psycopg or asyncpg. Its pool is not used.
        on_wake: Gets the name of a queue in which there may be something now; or None for every
            queue, after each (re)connection. It is called in the listener's thread, and must be
            quick; what it raises is logged.
        models: The host's own classes, if it has any. Tables moved by the engine's
            ``schema_translate_map`` are listened to where they are.
        listen_dsn: Another address of the same database, where the engine's is that of a pooler
            (PgBouncer in transaction mode delivers no notifications). A URL or libpq's keywords,
            with one host or several. The engine's ``connect_args`` are not used for it.
        ping_interval: Seconds between two checks that it still hears.
        ping_timeout: Seconds after which it gives up a connection that it does not hear itself on.

    Raises:
        InvalidArgument: the driver cannot be listened with; or the DSN cannot be read.
    """

    def __init__(
        self,
        engine: sa.Engine | AsyncEngine,
        on_wake: Callable[[str | None], None],
        *,
        models: Models | None = None,
        listen_dsn: str | sa.URL | None = None,
        ping_interval: float = 15.0,
        ping_timeout: float = 5.0,
    ) -> None:
        either: Any = engine
        own: sa.Engine = getattr(either, "sync_engine", either)
        self._engine = own if listen_dsn is None else _engine(listen_dsn, own)
        _check_driver(self._engine)
        self._channel = _channel(own, models_of(models))
        self._on_wake = on_wake
        self._ping_interval = ping_interval
        self._ping_timeout = ping_timeout
        self._attempts = 0
        self._hears = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    @property
    def connected(self) -> bool:
        """Whether it is subscribed, and has received its own notification."""
        return self._hears

    def start(self) -> None:
        """Start to listen, in a thread of its own; a second call does nothing.

        Raises:
            InvalidArgument: it was stopped: make another one.
        """
        if self._stopping.is_set():
            raise InvalidArgument("this listener was stopped: make another one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pgqrs-listener", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Close the connection and end the thread, at once; a second call does nothing."""
        first, thread = not self._stopping.is_set(), self._thread
        self._stopping.set()
        if first and self._running is not None:
            loop, task = self._running
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._main())
        except Exception:  # noqa: BLE001 - there is nobody to raise it to
            _log.exception("the listener has failed: consumers rely on polling from now on")
        finally:
            self._hears = False

    async def _main(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self._running = (asyncio.get_running_loop(), task)
        with contextlib.suppress(asyncio.CancelledError):
            while not self._stopping.is_set():
                try:
                    await self._listen()
                except Exception as error:  # noqa: BLE001 - of any driver: all mean the same here
                    _log.warning("not listening: %s: %s", type(error).__name__, error)
                self._hears = False
                await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        """Return how long to wait before the next attempt to connect."""
        longest: float = min(_SHORTEST * 2**self._attempts, _LONGEST)
        self._attempts = min(self._attempts + 1, 10)
        return longest * random.uniform(0.5, 1)  # noqa: S311 - jitter, not a secret

    async def _listen(self) -> None:
        """Connect, subscribe, and pass on notifications until the connection fails."""
        ping = f"{self._channel}_{secrets.token_hex(8)}"
        pong: asyncio.Future[int]

        def on_notification(name: str, payload: str, pid: int) -> None:
            if name != ping:
                self._wake(payload)
            elif not pong.done():
                pong.set_result(pid)

        async def check(speaker: ListenConnection) -> int:
            nonlocal pong
            pong = asyncio.get_running_loop().create_future()
            speaker.send(f'NOTIFY "{ping}"')
            await wait_for(self._ping_timeout, wire, pong)
            return pong.result()

        async with open_listen_connection(self._engine, on_notification) as wire:
            for name in (self._channel, ping):
                await wait_for(self._ping_timeout, wire, wire.listen(name))
            self._wake(None)
            if await check(wire) != wire.pid:
                # A pooler is between. In transaction mode we hear ourselves, and nobody else.
                async with open_listen_connection(self._engine) as other:
                    try:
                        await check(other)
                    except TimeoutError:
                        wire.send(f'UNLISTEN "{self._channel}"; UNLISTEN "{ping}"')  # in the pool
                        raise
            _log.info("listening on %s", self._channel)
            while True:
                self._hears, self._attempts = True, 0
                await asyncio.wait({wire.lost}, timeout=self._ping_interval)
                await check(wire)

    def _wake(self, queue: str | None) -> None:
        try:
            self._on_wake(queue)
        except Exception:  # noqa: BLE001 - of any kind
            _log.exception("the callback for a notification failed in queue %r", queue)


def _engine(listen_dsn: str | sa.URL, used: sa.Engine) -> sa.Engine:
    """Return an engine for an address, with the driver that is installed."""
    url = database_url(listen_dsn, used.driver if used.driver in _DRIVERS else "psycopg")
    if url.get_driver_name() != "asyncpg":
        return sa.create_engine(url, poolclass=sa.NullPool)
    url, arguments = dsns.connect_args(url)
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - needs greenlet

    return create_async_engine(url, connect_args=arguments, poolclass=sa.NullPool).sync_engine


_DRIVERS = ("psycopg", "asyncpg")


def _check_driver(engine: sa.Engine) -> None:
    if engine.driver not in _DRIVERS:
        raise InvalidArgument(
            f"the driver {engine.driver!r} cannot be listened with, {' and '.join(_DRIVERS)} can: "
            "pass listen_dsn='postgresql+psycopg://…' to listen with another one"
        )


def _channel(engine: sa.Engine, models: Models) -> str:
    schema = tables_of(models).message.schema
    moved = engine.get_execution_options().get("schema_translate_map") or {}
    return channel(moved.get(schema, schema))


OnNotification: TypeAlias = Callable[[str, str, int], None]
"""Gets the channel, the payload, and the process that has notified."""

_CONNECTING = 30.0
"""Seconds that one attempt may take, if the engine's own limit is not shorter."""


class ListenConnection(Protocol):
    """A connection of some driver, reduced to what a listener does with it."""

    lost: asyncio.Future[str]
    pid: int

    def listen(self, name: str) -> asyncio.Future[Any]:
        """Subscribe to a channel; the future is done when the server has said yes."""
        raise NotImplementedError

    def send(self, sql: str) -> None:
        """Execute a statement without waiting for it."""

    async def close(self) -> None:
        """Close, without a round trip if the connection is lost."""


class _Psycopg:
    """Psycopg, synchronous or not, driven through libpq: nothing here ever blocks."""

    def __init__(self, driver: Any, on_notification: OnNotification) -> None:
        self._driver = driver
        self._libpq = driver.pgconn
        self._on_notification = on_notification
        self.pid: int = self._libpq.backend_pid
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[None] | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._socket = self._libpq.socket
        self._loop.add_reader(self._socket, self._readable)

    def listen(self, name: str) -> asyncio.Future[Any]:
        self._answer = self._loop.create_future()
        # A host's own hook may have left a transaction open, in which nothing would be heard.
        commit = "COMMIT; " if self._libpq.transaction_status else ""
        self.send(f'{commit}LISTEN "{name}"')
        return self._answer

    def send(self, sql: str) -> None:
        self._libpq.send_query(sql.encode())
        self._libpq.flush()

    def _readable(self) -> None:
        try:
            self._libpq.consume_input()
            self._take_results()
            while (notify := self._libpq.notifies()) is not None:
                self._on_notification(notify.relname.decode(), notify.extra.decode(), notify.be_pid)
        except Exception as error:  # noqa: BLE001 - after any error the connection is unusable
            _mark_lost(self, str(error))

    def _take_results(self) -> None:
        while not self._libpq.is_busy():
            if (result := self._libpq.get_result()) is None:
                if self._answer is not None:
                    _resolve(self._answer)
                return
            if message := result.error_message:
                raise ConnectionError(message.decode(errors="replace").strip())

    async def close(self) -> None:
        self._loop.remove_reader(self._socket)
        closing = self._driver.close()
        if inspect.isawaitable(closing):
            await closing


class _Asyncpg:
    """asyncpg, which has listeners of its own."""

    def __init__(self, driver: Any, on_notification: OnNotification) -> None:
        self._driver = driver
        self._on_notification = on_notification
        self.pid: int = driver.get_server_pid()
        self._tasks: set[asyncio.Future[Any]] = set()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        driver.add_termination_listener(lambda _: _mark_lost(self, "the connection was closed"))

    def listen(self, name: str) -> asyncio.Future[Any]:
        return self._start(self._listen(name))

    async def _listen(self, name: str) -> None:
        if self._driver.is_in_transaction():  # left open by a host's own hook
            await self._driver.execute("COMMIT")
        await self._driver.add_listener(name, self._listener)

    def _listener(self, _driver: Any, pid: int, name: str, payload: object) -> None:
        self._on_notification(name, str(payload), pid)

    def send(self, sql: str) -> None:
        self._start(self._driver.execute(sql))

    def _start(self, doing: Any) -> asyncio.Future[Any]:
        # A task, never cancelled: asyncpg would open another connection to cancel a statement.
        task: asyncio.Future[Any] = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _mark_lost(self, str(error))

    async def close(self) -> None:
        if not self.lost.done() and not self._tasks:
            with contextlib.suppress(Exception):
                await self._driver.close(timeout=1)
        self._driver.terminate()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _mark_lost(wire: ListenConnection, reason: str) -> None:
    if not wire.lost.done():
        wire.lost.set_result(reason)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def wait_for(seconds: float, wire: ListenConnection, future: asyncio.Future[Any]) -> None:
    """Wait for a future, at most this long, and only while the connection lasts."""
    await asyncio.wait({future, wire.lost}, timeout=seconds, return_when="FIRST_COMPLETED")
    if wire.lost.done():
        raise ConnectionError(wire.lost.result())
    if not future.done():
        _mark_lost(wire, "deaf")  # so that it is not closed with a round trip
        raise TimeoutError(
            f"nothing was heard for {seconds:g} s. If there is a pooler between, give its server's "
            "address as listen_dsn"
        )


def _nothing(_name: str, _payload: str, _pid: int) -> None:
    """Ignore a notification."""


@contextlib.asynccontextmanager
async def open_listen_connection(
    engine: sa.Engine, on_notification: OnNotification = _nothing
) -> AsyncIterator[ListenConnection]:
    """Open a connection as the engine would, outside of its pool."""
    async with asyncio.timeout(_CONNECTING):
        driver = await (_opened(engine) if engine.dialect.is_async else _opened_aside(engine))
    wire = (
        _Asyncpg(driver, on_notification)
        if engine.driver == "asyncpg"
        else _Psycopg(driver, on_notification)
    )
    try:
        yield wire
    finally:
        await wire.close()


async def _opened(engine: sa.Engine) -> Any:
    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 - needs greenlet

    own = sa.Engine(engine.pool.recreate(), engine.dialect, engine.url)
    return _taken(await AsyncEngine(own).raw_connection())


async def _opened_aside(engine: sa.Engine) -> Any:
    """Connect in a thread, which can be abandoned, as a connect cannot be interrupted."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    lock, made, left_alone = threading.Lock(), [], False

    def connect() -> None:
        try:
            driver = _taken(engine.pool.recreate().connect())
        except Exception as error:  # noqa: BLE001 - raised by who waits for it
            deliver(future.set_exception, error)
            return
        with lock:
            if left_alone:
                driver.close()
                return
            made.append(driver)
        deliver(future.set_result, driver)

    def deliver(resolve: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: None if future.done() else resolve(value))

    threading.Thread(target=connect, name="pgqrs-listener-connect", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        with lock:
            left_alone = True
            for driver in made:
                driver.close()
        raise


def _taken(pooled: sa.PoolProxiedConnection) -> Any:
    """Detach the driver's connection from the pool, and return it."""
    driver = pooled.driver_connection
    pooled.detach()
    return driver

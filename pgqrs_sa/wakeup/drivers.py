"""Connections of a driver to listen on, opened outside of the engine's pool."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeAlias

import sqlalchemy as sa

__all__ = ["ListenConnection", "OnNotification", "open_listen_connection", "wait_for"]

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
        except Exception as error:  # noqa: BLE001 - whatever it is, the connection is of no use
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

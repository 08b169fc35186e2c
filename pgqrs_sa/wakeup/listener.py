"""Receiving the NOTIFY of enqueues, on a connection of its own.

A listener has a thread, and in it a connection that is the application's in all but the pool: the
same address, arguments and creators. It says when something may be there to lease, and no more
than that: a notification is a hint, and consumers poll as well.

What is subscribed and dead looks like what is subscribed and idle: a connection that was dropped
without a word, or one through PgBouncer in transaction mode. So the listener sends itself a
notification now and then, and reconnects when it does not receive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from .. import dsns
from .._core.sql.wakeup import channel
from .._core.tables import tables_of
from ..errors import InvalidArgument
from ..models import READY_MADE, Models
from ..settings import database_url
from .drivers import ListenConnection, open_listen_connection, wait_for

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
        self._channel = _channel(own, models or READY_MADE)
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
        except Exception:  # noqa: BLE001 - whatever it is
            _log.exception("what was to be woken failed over queue %r", queue)


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

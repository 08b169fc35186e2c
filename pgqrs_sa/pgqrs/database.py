"""An async engine for each event loop, closed with it, and calls that are transactions.

pgqrs' guides close nothing, and a script may call ``asyncio.run`` twice with one `Admin`. A pool
must not outlive its loop: its connections could neither be used nor closed any more. So each loop
gets an engine of its own, and an async generator that disposes of it. Python closes the async
generators of a loop when ``asyncio.run`` ends (``loop.shutdown_asyncgens``), and when nobody
refers to them any more, which is just when the pool is of no use.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from .. import dsns, models
from ..aio import AsyncQueueService
from ..codecs import Codec
from ..errors import InvalidArgument
from ..models import Models
from ..settings import Settings, database_url
from .errors import translated

__all__ = ["Connected", "Database", "models_in"]

_TIMEOUTS: dict[str, tuple[str, Callable[[float], float]]] = {
    "psycopg": ("connect_timeout", math.ceil),
    "psycopg_async": ("connect_timeout", math.ceil),
    "asyncpg": ("timeout", float),
}
"""The argument of each driver for the time to wait for a connection, and its type."""


def models_in(schema: str | None) -> Models:
    """Return the four classes for a schema, or the ready-made classes for the default schema."""
    return Models() if schema is None else models.models_in(schema)


def _async_url(dsn: str) -> sa.URL:
    url = database_url(dsn)
    driver = url.get_driver_name()
    if driver not in _TIMEOUTS:
        raise InvalidArgument(
            f"{driver!r} is no async driver: name +asyncpg or +psycopg in the DSN, or none"
        )
    return url


@dataclass(frozen=True)
class _Attached:
    """The objects of one event loop."""

    engine: AsyncEngine
    closing: AsyncGenerator[None, None]
    registering: asyncio.Lock = field(default_factory=asyncio.Lock)


async def _closing(engine: AsyncEngine) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await engine.dispose()


_CLOSE_TIMEOUT = 2.0
"""Seconds that a pool may take to close after ``asyncio.run`` has cancelled that."""


class _ClosingTask(asyncio.Task[None]):
    """A task that has `_CLOSE_TIMEOUT` to end by itself before a cancellation takes effect.

    ``asyncio.run`` cancels all tasks at its end, and waits for them: a server that does not answer
    must not keep it waiting.
    """

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the task later; return False, as it is not cancelled yet."""
        self.get_loop().call_later(_CLOSE_TIMEOUT, super().cancel, msg)
        return False


_closing_now: set[_ClosingTask] = set()
"""An event loop has only weak references to its tasks."""


class Database:
    """Sessions on one database, for whichever event loop is running.

    Args:
        settings: The DSN, the schema, and the size of the pool.
    """

    def __init__(self, settings: Settings) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, _Attached] = {}
        self.settings = settings
        self.models = models_in(settings.schema)
        self._url = _async_url(settings.dsn)
        self.pending: list[Callable[[], Awaitable[object]]] = []

    def __del__(self) -> None:
        """Close the pool of the running loop, to the end.

        The loop itself would close the generator in a task, which the end of ``asyncio.run``
        cancels at once; SQLAlchemy logs each connection whose closing is cancelled.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if (attached := self._loops.pop(loop, None)) is not None:
            task = _ClosingTask(attached.closing.aclose(), loop=loop)
            _closing_now.add(task)
            task.add_done_callback(_closing_now.discard)

    async def _attached(self) -> _Attached:
        loop = asyncio.get_running_loop()
        if (attached := self._loops.get(loop)) is None:
            # A generator refers to its loop, so weak references would keep loops that ended.
            self._loops = {loop: it for loop, it in self._loops.items() if not loop.is_closed()}
            engine = self._engine()
            attached = self._loops[loop] = _Attached(engine, _closing(engine))
            await anext(attached.closing)  # registers the generator with the loop
        return attached

    def _engine(self) -> AsyncEngine:
        settings = self.settings
        name, as_number = _TIMEOUTS[self._url.get_driver_name()]
        url, given = dsns.connect_args(self._url)
        timeout: dict[str, Any] = {name: as_number(settings.connection_timeout_seconds)}
        return create_async_engine(
            url,
            pool_size=settings.max_connections,
            max_overflow=0,
            pool_timeout=settings.connection_timeout_seconds,
            # After a restart of the server, a long-lived worker must not fail once for each
            # connection of its pool.
            pool_pre_ping=True,
            connect_args=given if name in self._url.query else timeout | given,
        )

    async def close(self) -> None:
        """Close the connections of the running loop; a later call opens new ones."""
        attached = self._loops.pop(asyncio.get_running_loop(), None)
        if attached is not None:
            await attached.closing.aclose()

    @asynccontextmanager
    async def registering(self) -> AsyncIterator[None]:
        """Let only one task of this loop register workers at a time."""
        async with (await self._attached()).registering:
            yield

    async def register_pending(self) -> None:
        """Register the workers that were constructed since the last call.

        A registration that fails is dropped here; that worker's next call tries it again.
        """
        if self.pending:
            async with self.registering():
                while self.pending:
                    await self.pending.pop(0)()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction without a session, for the schema."""
        attached = await self._attached()
        with translated():
            async with attached.engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a transaction, committed at the end of the block unless that raises."""
        attached = await self._attached()
        with translated():
            async with AsyncSession(attached.engine) as session, session.begin():
                yield session

    def bind(
        self, session: AsyncSession, *, worker: int | None = None, codec: Codec | None = None
    ) -> AsyncQueueService:
        """Return the service for a session of this database."""
        return AsyncQueueService(session, models=self.models, worker=worker, codec=codec)

    @asynccontextmanager
    async def service(
        self, *, worker: int | None = None, codec: Codec | None = None
    ) -> AsyncIterator[AsyncQueueService]:
        """Open a transaction with the service in it: see `session`."""
        async with self.session() as session:
            yield self.bind(session, worker=worker, codec=codec)


class Connected:
    """A handle on a database; each call is a transaction of its own.

    Args:
        database: The database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def settings(self) -> Settings:
        """The settings of the Config with which the Admin was made."""
        return self._database.settings

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[AsyncQueueService]:
        """Open a transaction, after registering the workers that wait for it."""
        await self._database.register_pending()
        async with self._database.service() as service:
            yield service

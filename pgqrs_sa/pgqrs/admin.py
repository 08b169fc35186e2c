"""`Admin`: the tables, the queues, the dead letters and everybody's workers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from ..aio import AsyncQueueService
from ..errors import QueueNotFound as CoreQueueNotFound
from . import schema
from .config import Config
from .counts import Counts
from .database import Database
from .errors import InvalidDsn, NotRegistered, QueueExists, QueueInUse
from .lifecycle import Lifecycle
from .tables import Archive, Messages, Queues, Workers
from .types import QueueInfo, WorkerInfo
from .upkeep import Upkeep

__all__ = ["Admin"]

_CHUNK = 1000


class Admin(Lifecycle, Upkeep, Counts):
    """Everything that is not about one message; see `Producer` and `Consumer` for those.

    Nothing connects before the first awaited call. Each call is one transaction of its own, and
    is committed when it returns. Leaving ``async with`` stops its worker, if it registered one,
    and closes the connections; without, they are closed when the event loop ends.

    Args:
        dsn: A PostgreSQL URL, or a `Config`. Psycopg is the driver unless it names asyncpg.
        schema: Where the tables are, before what the Config says; None for the default.
    """

    def __init__(self, dsn: str | Config, schema: str | None = None) -> None:
        if isinstance(dsn, Config):
            config = dsn
        elif isinstance(dsn, str):
            config = Config(dsn)
        else:
            raise InvalidDsn(f"Admin takes a DSN or a Config, not a {type(dsn).__name__}")
        if schema is not None:
            config = Config(config.settings, schema)
        super().__init__(Database(config.settings))
        self._worker_id: int | None = None

    def __repr__(self) -> str:
        return f"Admin({self._database.settings!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop this Admin's worker, if any, and close the connections of this event loop."""
        try:
            if self._worker_id is not None:
                async with self._database.service() as service:
                    await service.workers.stop(self._worker_id)
        finally:
            await self._database.close()

    # A worker of its own

    @property
    def worker_id(self) -> int | None:
        """The id that `register` gave it, or None."""
        return self._worker_id

    async def register(self, hostname: str, port: int) -> WorkerInfo:
        """Register this Admin as a worker that works on no queue, for people to see.

        Registering again is another start, under another id.
        """
        async with self._service() as service:
            info = await service.workers.register(
                "admin", hostname=hostname, port=port, pid=os.getpid()
            )
        self._worker_id = info.id
        return WorkerInfo.of({}, info)

    async def delete_self(self) -> None:
        """Stop this Admin's worker and delete its row."""
        async with self._service() as service:
            await service.workers.stop(self._own_id())
            await service.workers.delete(self._own_id())
        self._worker_id = None

    def _own_id(self) -> int:
        if self._worker_id is None:
            raise NotRegistered
        return self._worker_id

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[AsyncQueueService]:
        async with super()._service() as service:
            if self._worker_id is not None:
                await self._heard_of(service, self._worker_id)
            yield service

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[tuple[AsyncQueueService, int]]:
        async with self._service() as service:
            yield service, self._own_id()

    # The tables

    async def install(self) -> None:
        """Create the tables, or bring them to this release's version; do nothing if they are.

        These are the steps of a host's migration. Where the tables belong to a host's Alembic
        history, their version is checked instead: it is for that history to change them.

        Raises:
            SchemaNotOurs: They are for a host's Alembic history to make, or to upgrade.
            SchemaVersionError: A newer release made them.
        """
        settings, models = self.settings, self._database.models
        async with self._database.connection() as connection:
            await connection.run_sync(schema.install, settings.schema, models)
        await self._database.register_pending()

    async def uninstall(self) -> None:
        """Drop the tables and all that they hold; do nothing if there are none.

        Raises:
            SchemaNotOurs: They belong to a host's Alembic history.
        """
        self._database.pending.clear()
        async with self._database.connection() as connection:
            await connection.run_sync(schema.uninstall, self.settings.schema)

    async def verify(self) -> None:
        """Raise unless the tables are there, of the right version, and consistent.

        Raises:
            SchemaVersionError: There is no queue schema, or it is too old or too new.
            NotIntact: Tables are missing, or rows refer to rows which are not there.
        """
        await self._database.register_pending()
        async with self._database.session() as session:
            await session.run_sync(schema.verify, self.settings.schema, self._database.models)

    # Queues

    async def create_queue(self, name: str) -> QueueInfo:
        """Create a queue whose messages get ``max_read_ct`` attempts.

        Raises:
            QueueExists: There is one of this name.
        """
        async with self._database.service() as service:
            try:
                await service.queues.get(name)
            except CoreQueueNotFound:
                limit = self.settings.max_read_ct
                info = QueueInfo.of(await service.queues.create(name, max_read_ct=limit))
            else:
                raise QueueExists(name)
        await self._database.register_pending()  # after the queue that they may be waiting for
        return info

    async def get_queue(self, name: str) -> QueueInfo:
        """Return a queue, or raise `QueueNotFound` with the names that come close."""
        async with self._service() as service:
            return QueueInfo.of(await service.queues.get(name))

    async def delete_queue(self, name: str, *, force: bool = False) -> None:
        """Delete a queue.

        Args:
            name: The queue.
            force: Delete its messages and its archive first, each thousand in a transaction of
                its own.

        Raises:
            QueueInUse: Workers with a recent heartbeat work on it.
            QueueNotEmpty: It holds messages, or history, and ``force`` is not given.
        """
        async with self._service() as service:
            await service.queues.get(name)
            known = await service.workers.health(silent_for=self._presumed_dead())
            users = [one.worker.id for one in known if one.healthy and name in one.worker.queues]
            if users:
                raise QueueInUse(name, users)
            if not force:
                await service.queues.delete(name)
                return
        await self.purge_queue(name)
        await Archive(self._database).purge(name)
        async with self._service() as service:
            await service.queues.delete(name, force=True)

    async def purge_queue(self, name: str) -> int:
        """Delete the live messages of a queue, held ones too, and return how many.

        Its archive and its workers stay, and so do messages with ids that are drawn meanwhile.
        Each thousand is a transaction of its own. What is requeued meanwhile, or committed by a
        transaction that was open at the beginning, may be deleted as well.
        """
        async with self._service() as service:
            await service.queues.get(name)
            newest = await service.messages.find(name, limit=1, newest_first=True)
        total = 0
        while newest:
            async with self._service() as service:
                purged = await service.queues.purge(name, limit=_CHUNK, up_to=newest[0].id)
            total += purged
            if purged < _CHUNK:
                break
        return total

    async def get_queues(self) -> Queues:
        """Return the table of queues."""
        await self._database.register_pending()
        return Queues(self._database)

    async def get_messages(self) -> Messages:
        """Return the table of live messages, of all queues."""
        await self._database.register_pending()
        return Messages(self._database)

    async def get_archive(self) -> Archive:
        """Return the table of settled messages, of all queues."""
        await self._database.register_pending()
        return Archive(self._database)

    async def get_workers(self) -> Workers:
        """Return the register of workers."""
        await self._database.register_pending()
        return Workers(self._database)

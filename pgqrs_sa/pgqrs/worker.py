"""`QueueWorker`: the base of producers and consumers, a registered worker of one queue."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

from ..aio import AsyncQueueService
from ..codecs import Codec
from .admin import Admin, RegisteredWorker
from .config import Config
from .errors import InvalidDsn, WorkerNotFound

__all__ = ["QueueWorker"]


class QueueWorker(RegisteredWorker):
    """One start of a producer or consumer.

    It registers with its next awaited call, or its Admin's. Each start is a row of its own:
    another worker with the same host and port, alive or dead, does not matter.
    """

    _kind: str

    def __init__(self, admin: Admin | Config | str, queue: str, hostname: str, port: int) -> None:
        self._owns_admin = not isinstance(admin, Admin)
        if isinstance(admin, (str, Config)):
            admin = Admin(admin)
        elif not isinstance(admin, Admin):
            raise InvalidDsn(
                f"{type(self).__name__} takes an Admin, a Config or a DSN, "
                f"not a {type(admin).__name__}"
            )
        super().__init__(admin._database)  # noqa: SLF001 - the parts of one package
        self._admin = admin
        self.queue = queue
        self.hostname = hostname
        self.port = port
        self._worker_id: int | None = None
        self._queue_id = 0
        self._stopped = False  # by itself; it does not register again then
        self._database.pending.append(self._register)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.queue!r}, {self.hostname!r}, {self.port!r})"

    @property
    def worker_id(self) -> int | None:
        """The id of the worker's row; None before the first awaited call has registered it."""
        return self._worker_id

    async def __aenter__(self) -> Self:
        await self._registered()
        return self

    async def close(self) -> None:
        """Stop this worker; close the connections if no Admin was given to it."""
        self._stopped = True
        try:
            if self._worker_id is not None:
                await self._leave()
                with suppress(WorkerNotFound):  # purged as a dead worker
                    async with self._database.service() as service:
                        await service.workers.stop(self._worker_id)
            elif self._register in self._database.pending:
                self._database.pending.remove(self._register)
        finally:
            if self._owns_admin:
                await self._admin.close()

    async def _leave(self) -> None:
        """Release what this worker holds, before it stops."""

    async def _register(self) -> None:
        async with self._database.service() as service:
            self._queue_id = (await service.queues.get(self.queue)).id
            info = await service.workers.register(
                self._kind,
                queues=[self.queue],
                hostname=self.hostname,
                port=self.port,
                pid=os.getpid(),
            )
        self._worker_id, self._heartbeat_at = info.id, time.monotonic()

    async def _register_again(self) -> bool:
        """Register as a new row if others stopped or purged this worker; return whether it did.

        A silent worker that was considered dead was stopped, and its messages were released. A
        worker that is suspended, or that stopped itself, is left as it is.
        """
        async with self._database.registering():
            if self._stopped or self._worker_id is None:
                return False
            with suppress(WorkerNotFound):  # purged, so it was stopped before
                async with self._database.service() as service:
                    if (await service.workers.get(self._worker_id)).status != "stopped":
                        return False
            await self._register()
        return True

    async def shutdown(self) -> None:
        """Stop for good: see `RegisteredWorker.shutdown`."""
        await super().shutdown()
        self._stopped = True

    async def _registered(self) -> int:
        await self._database.register_pending()
        if self._worker_id is None:
            async with self._database.registering():
                if self._worker_id is None:
                    await self._register()
        assert self._worker_id is not None  # noqa: S101 - for mypy
        return self._worker_id

    @asynccontextmanager
    async def _service(self, codec: Codec | None = None) -> AsyncIterator[AsyncQueueService]:
        id_ = await self._registered()
        async with self._database.service(worker=id_, codec=codec) as service:
            await self._heartbeat_if_due(service, id_)
            yield service

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[tuple[AsyncQueueService, int]]:
        id_ = await self._registered()
        async with self._service() as service:
            yield service, id_

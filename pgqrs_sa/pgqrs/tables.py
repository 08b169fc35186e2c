"""The table handles that an `Admin` gives: queues, live messages, the archive, workers."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from .. import arguments
from ..aio import AsyncQueueService
from ..errors import InvalidArgument
from ..errors import MessageNotFound as CoreMessageNotFound
from ..errors import QueueNotFound as CoreQueueNotFound
from ..types import MessageInfo, QueueMetrics, Seconds
from ..types import WorkerStatus as CoreWorkerStatus
from . import paging
from .connected import Connected
from .errors import QueueNotFound
from .types import ArchivedMessage, QueueInfo, QueueMessage, WorkerInfo

__all__ = ["Archive", "Messages", "Queues", "Workers"]

_CHUNK = 1000


async def _ids(service: AsyncQueueService) -> dict[str, int]:
    return {queue.name: queue.id for queue in await service.queues.list()}


async def _name(service: AsyncQueueService, queue: int | str) -> str:
    """Return the name of a queue that is given by its name or its id."""
    if isinstance(queue, str):
        return (await service.queues.get(queue)).name
    for info in await service.queues.list():
        if info.id == queue:
            return info.name
    raise QueueNotFound(queue)


class Queues(Connected):
    """The queues."""

    async def count(self) -> int:
        """Return how many there are."""
        return len(await self.list())

    async def list(self) -> builtins.list[QueueInfo]:
        """Return all of them, by name."""
        async with self._service() as service:
            return [QueueInfo.of(info) for info in await service.queues.list()]

    async def get(self, id: int) -> QueueInfo:
        """Return a queue by its id, or raise `QueueNotFound`."""
        async with self._service() as service:
            return QueueInfo.of(await service.queues.get(await _name(service, id)))

    async def get_by_name(self, name: str) -> QueueInfo:
        """Return a queue by its name, or raise `QueueNotFound`."""
        async with self._service() as service:
            return QueueInfo.of(await service.queues.get(name))

    async def exists(self, name: str) -> bool:
        """Return whether there is a queue of this name."""
        async with self._service() as service:
            try:
                await service.queues.get(name)
            except CoreQueueNotFound:
                return False
            return True

    async def delete(self, id: int) -> None:
        """Delete an empty queue by its id, or raise `QueueNotEmpty`."""
        async with self._service() as service:
            await service.queues.delete(await _name(service, id))

    async def delete_by_name(self, name: str) -> None:
        """Delete an empty queue by its name, or raise `QueueNotEmpty`."""
        async with self._service() as service:
            await service.queues.delete(name)


class Messages(Connected):
    """The live messages, of all queues unless one is named (by its name or id)."""

    async def count(self) -> int:
        """Return how many there are in all queues."""
        async with self._service() as service:
            return await service.messages.count()

    async def count_for_queue(self, queue: int | str) -> int:
        """Return how many there are in a queue."""
        return (await self._metrics(queue)).live

    async def count_pending(self, queue: int | str) -> int:
        """Return how many a dequeue could take now: neither held, nor scheduled, nor used up."""
        return (await self._metrics(queue)).ready

    async def count_pending_filtered(self, queue: int | str, worker_id: int | None = None) -> int:
        """Return how many a worker holds in a queue; without a worker, see `count_pending`."""
        if worker_id is None:
            return await self.count_pending(queue)
        async with self._service() as service:
            name = await _name(service, queue)
            mine = self._database.models.message.consumer_worker_id == worker_id
            return await service.messages.count(name, state="leased", where=mine)

    async def _metrics(self, queue: int | str) -> QueueMetrics:
        async with self._service() as service:
            return await service.messages.metrics(await _name(service, queue))

    async def get(self, id: int) -> QueueMessage:
        """Return a live message, or raise `MessageNotFound`."""
        async with self._service() as service:
            message = await service.messages.get(id)
            return QueueMessage.of((await service.queues.get(message.queue)).id, message)

    async def get_by_ids(self, ids: Iterable[int]) -> builtins.list[QueueMessage]:
        """Return those of these messages that are live, by id."""
        among = self._database.models.message.id.in_(builtins.list(ids))
        return await self._found(where=among)

    async def list(
        self, queue: int | str | None = None, *, after: int = 0, limit: int = 100
    ) -> builtins.list[QueueMessage]:
        """Return live messages by id, a page at a time, those after the id ``after``."""
        async with self._service() as service:
            name = None if queue is None else await _name(service, queue)
            page = await service.messages.find(name, after=after, limit=limit)
            return await self._shown(service, page)

    async def filter_by_payload(
        self, payload: Any, *, queue: int | str | None = None
    ) -> builtins.list[QueueMessage]:
        """Return the live messages whose payload contains this (``@>`` of PostgreSQL's jsonb).

        Args:
            payload: For example ``{"user_id": 7}``, whatever else the payload has.
            queue: Only of this queue.
        """
        if payload is None:
            raise InvalidArgument("filter_by_payload needs a value to look for, not None")
        return await self._found(queue, payload=payload)

    async def filter_by_fk(
        self, queue: int | str, *, limit: int = _CHUNK
    ) -> builtins.list[QueueMessage]:
        """Return the first live messages of a queue, by id."""
        return await self.list(queue, limit=limit)

    async def _found(
        self, queue: int | str | None = None, **criteria: Any
    ) -> builtins.list[QueueMessage]:
        async with self._service() as service:
            name = None if queue is None else await _name(service, queue)
            found = [one async for one in paging.live(service, queue=name, **criteria)]
            return await self._shown(service, found)

    async def _shown(
        self, service: AsyncQueueService, found: builtins.list[MessageInfo]
    ) -> builtins.list[QueueMessage]:
        ids = await _ids(service) if found else {}
        return [QueueMessage.of(ids[one.queue], one) for one in found]

    async def update_visibility_timeout(self, id: int, vt: datetime) -> bool:
        """Move a message that nobody holds to another time; return whether it could be.

        Raises:
            MessageLeased: A consumer is working on it.
        """
        async with self._service() as service:
            try:
                await service.messages.reschedule(id, at=vt)
            except CoreMessageNotFound:
                return False
            return True

    async def delete(self, id: int) -> bool:
        """Cancel a message that nobody holds; return whether it could be."""
        return (await self.delete_by_ids([id]))[0]

    async def delete_by_ids(self, ids: Iterable[int]) -> builtins.list[bool]:
        """Cancel those that nobody holds, and say of each whether it was."""
        async with self._service() as service:
            return [await service.messages.try_cancel(id_) for id_ in ids]


class Archive(Connected):
    """The settled messages, of all queues. Lists have the newest first."""

    async def count(self) -> int:
        """Return how many there are."""
        async with self._service() as service:
            return await service.archived.count()

    async def get(self, id: int) -> ArchivedMessage:
        """Return a settled message by the archive's id, or raise `MessageNotFound`."""
        async with self._service() as service:
            message = await service.archived.get(id)
            return ArchivedMessage.of((await service.queues.get(message.queue)).id, message)

    async def delete(self, id: int) -> int:
        """Delete a settled message by the archive's id; return how many rows that were."""
        async with self._service() as service:
            return await service.archived.delete([id])

    async def purge(self, queue: int | str) -> int:
        """Delete what is archived of a queue, in chunks of a transaction each; return how many."""
        async with self._service() as service:
            name = await _name(service, queue)
        deleted, chunk = 0, _CHUNK
        while chunk == _CHUNK:
            async with self._service() as service:
                chunk = await service.archived.prune(0, queue=name, limit=_CHUNK)
            deleted += chunk
        return deleted

    async def list(self, limit: int = 100, offset: int = 0) -> builtins.list[ArchivedMessage]:
        """Return settled messages."""
        return await self._newest(limit, offset)

    async def list_dlq_messages(
        self, max_attempts: int = 1, limit: int = 100, offset: int = 0
    ) -> builtins.list[ArchivedMessage]:
        """Return the dead letters that were attempted at least so often."""
        return await self._newest(limit, offset, **self._dead(max_attempts))

    async def dlq_count(self, max_attempts: int = 1) -> int:
        """Count the dead letters that were attempted at least so often."""
        return await self._count(**self._dead(max_attempts))

    async def list_by_worker(
        self, worker_id: int, limit: int = 100, offset: int = 0
    ) -> builtins.list[ArchivedMessage]:
        """Return what a worker has settled."""
        return await self._newest(limit, offset, where=self._by(worker_id))

    async def count_by_worker(self, worker_id: int) -> int:
        """Count what a worker has settled."""
        return await self._count(where=self._by(worker_id))

    async def delete_by_worker(self, worker_id: int) -> int:
        """Delete what a worker has settled, in chunks of a transaction each; return how many."""
        deleted = 0
        while True:
            async with self._service() as service:
                page = await service.archived.find(where=self._by(worker_id), limit=_CHUNK)
                if not page:
                    return deleted
                deleted += await service.archived.delete([one.id for one in page])

    def _dead(self, max_attempts: int) -> dict[str, Any]:
        often = self._database.models.archived.read_ct >= max_attempts
        return {"outcome": "dead", "where": often}

    def _by(self, worker_id: int) -> Any:
        return self._database.models.archived.consumer_worker_id == worker_id

    async def _count(self, **criteria: Any) -> int:
        async with self._service() as service:
            return await service.archived.count(**criteria)

    async def _newest(
        self, limit: int, offset: int, **criteria: Any
    ) -> builtins.list[ArchivedMessage]:
        arguments.checked_limit(limit)
        arguments.check_number(offset, "offset")
        async with self._service() as service:
            newest = await service.archived.find(
                limit=limit + offset, newest_first=True, **criteria
            )
            ids = await _ids(service)
        return [ArchivedMessage.of(ids[one.queue], one) for one in newest[offset:]]


class Workers(Connected):
    """The register of workers; of each start of a producer or consumer there is one."""

    async def count(self) -> int:
        """Return how many there are, stopped ones too."""
        return len(await self.list())

    async def count_for_queue(self, queue: int | str) -> int:
        """Return how many work on a queue, stopped ones too."""
        return len(await self.filter_by_fk(queue))

    async def list(self, status: CoreWorkerStatus | None = None) -> builtins.list[WorkerInfo]:
        """Return all of them by id, or those of a status."""
        async with self._service() as service:
            ids = await _ids(service)
            return [WorkerInfo.of(ids, one) for one in await service.workers.list(status=status)]

    async def filter_by_fk(self, queue: int | str) -> builtins.list[WorkerInfo]:
        """Return those that work on a queue, by id."""
        async with self._service() as service:
            name, ids = await _name(service, queue), await _ids(service)
            return [WorkerInfo.of(ids, one) for one in await service.workers.list(queue=name)]

    async def count_zombies_for_queue(self, queue: int | str, older_than: Seconds = 60) -> int:
        """Return how many workers `list_zombies_for_queue` has."""
        return len(await self.list_zombies_for_queue(queue, older_than))

    async def list_zombies_for_queue(
        self, queue: int | str, older_than: Seconds = 60
    ) -> builtins.list[WorkerInfo]:
        """Return the workers of a queue without a heartbeat for ``older_than`` seconds.

        Those that are stopped are not among them.
        """
        async with self._service() as service:
            name, ids = await _name(service, queue), await _ids(service)
            known = await service.workers.health(silent_for=older_than)
        return [
            WorkerInfo.of(ids, health.worker)
            for health in known
            if not health.healthy and name in health.worker.queues
        ]

    async def get(self, id: int) -> WorkerInfo:
        """Return a worker, or raise `WorkerNotFound`."""
        async with self._service() as service:
            return WorkerInfo.of(await _ids(service), await service.workers.get(id))

    async def delete(self, id: int) -> None:
        """Delete the row of a worker that is stopped, or raise `WorkerInUse`."""
        async with self._service() as service:
            await service.workers.delete(id)

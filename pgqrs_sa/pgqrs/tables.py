"""The table handles that an `Admin` returns: queues, live messages, the archive, workers."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from .. import validation
from ..aio import AsyncQueueService
from ..errors import InvalidArgument
from ..errors import MessageNotFound as CoreMessageNotFound
from ..errors import QueueNotFound as CoreQueueNotFound
from ..models import Models
from ..types import ArchivedInfo, MessageInfo, QueueMetrics, Seconds
from ..types import WorkerStatus as CoreWorkerStatus
from .database import Connected
from .errors import QueueNotFound
from .types import ArchivedMessage, QueueInfo, QueueMessage, WorkerInfo

__all__ = [
    "CHUNK",
    "Archive",
    "Messages",
    "Queues",
    "Workers",
    "found_by",
    "held_by",
    "queue_ids",
]

CHUNK = 1000
"""Rows that are read or deleted in one transaction."""


_Info = TypeVar("_Info", MessageInfo, ArchivedInfo)


async def found_by(
    find: Callable[..., Awaitable[Sequence[_Info]]], **criteria: Any
) -> AsyncIterator[_Info]:
    """Yield what ``messages.find`` or ``archived.find`` finds, by id, from all pages."""
    after = 0
    while page := await find(after=after, limit=CHUNK, **criteria):
        for message in page:
            yield message
        after = page[-1].id


async def held_by(service: AsyncQueueService, models: Models, worker_id: int) -> list[MessageInfo]:
    """Return the messages that a worker holds under leases that have not expired."""
    where = models.message.consumer_worker_id == worker_id
    found = found_by(service.messages.find, state="leased", where=where)
    return [message async for message in found]


async def queue_ids(service: AsyncQueueService) -> dict[str, int]:
    """Return the ids of all queues by their names."""
    return {queue.name: queue.id for queue in await service.queues.list()}


async def _name(service: AsyncQueueService, queue: int | str) -> str:
    """Return the name of a queue, given its name or its id."""
    if isinstance(queue, str):
        return (await service.queues.get(queue)).name
    for info in await service.queues.list():
        if info.id == queue:
            return info.name
    raise QueueNotFound(queue)


class Queues(Connected):
    """The queues."""

    async def count(self) -> int:
        """Return the number of queues."""
        return len(await self.list())

    async def list(self) -> builtins.list[QueueInfo]:
        """Return all queues, by name."""
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
        """Return whether a queue of this name exists."""
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
    """The live messages of all queues, or of the queue with the given name or id."""

    async def count(self) -> int:
        """Return the number of live messages in all queues."""
        async with self._service() as service:
            return await service.messages.count()

    async def count_for_queue(self, queue: int | str) -> int:
        """Return the number of live messages in a queue."""
        return (await self._metrics(queue)).live

    async def count_pending(self, queue: int | str) -> int:
        """Return how many a dequeue could lease now: not leased, scheduled or exhausted."""
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
        return await self._found(where=self._database.models.message.id.in_(builtins.list(ids)))

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
            payload: For example ``{"user_id": 7}``; the payload may have other keys too.
            queue: Only messages of this queue.
        """
        if payload is None:
            raise InvalidArgument("filter_by_payload needs a value to look for, not None")
        return await self._found(queue, payload=payload)

    async def filter_by_fk(
        self, queue: int | str, *, limit: int = CHUNK
    ) -> builtins.list[QueueMessage]:
        """Return the first live messages of a queue, by id."""
        return await self.list(queue, limit=limit)

    async def _found(
        self, queue: int | str | None = None, **criteria: Any
    ) -> builtins.list[QueueMessage]:
        async with self._service() as service:
            name = None if queue is None else await _name(service, queue)
            found = found_by(service.messages.find, queue=name, **criteria)
            return await self._shown(service, [message async for message in found])

    async def _shown(
        self, service: AsyncQueueService, found: builtins.list[MessageInfo]
    ) -> builtins.list[QueueMessage]:
        ids = await queue_ids(service) if found else {}
        return [QueueMessage.of(ids[message.queue], message) for message in found]

    async def update_visibility_timeout(self, id: int, vt: datetime) -> bool:
        """Reschedule a message that is not leased; return whether it was.

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
        """Cancel a message that is not leased; return whether it was."""
        return (await self.delete_by_ids([id]))[0]

    async def delete_by_ids(self, ids: Iterable[int]) -> builtins.list[bool]:
        """Cancel the messages that are not leased; return for each whether it was."""
        async with self._service() as service:
            return [await service.messages.try_cancel(id_) for id_ in ids]


class Archive(Connected):
    """The settled messages of all queues. Lists have the newest first."""

    async def count(self) -> int:
        """Return the number of settled messages."""
        return await self._count()

    async def get(self, id: int) -> ArchivedMessage:
        """Return a settled message by its id, or raise `MessageNotFound`."""
        async with self._service() as service:
            message = await service.archived.get(id)
            return ArchivedMessage.of((await service.queues.get(message.queue)).id, message)

    async def delete(self, id: int) -> int:
        """Delete a settled message by its id; return how many rows were deleted."""
        async with self._service() as service:
            return await service.archived.delete([id])

    async def purge(self, queue: int | str) -> int:
        """Delete the archive of a queue, 1,000 rows a transaction; return how many."""
        async with self._service() as service:
            name = await _name(service, queue)
        deleted, chunk = 0, CHUNK
        while chunk == CHUNK:
            async with self._service() as service:
                chunk = await service.archived.prune(0, queue=name, limit=CHUNK)
            deleted += chunk
        return deleted

    async def list(self, limit: int = 100, offset: int = 0) -> builtins.list[ArchivedMessage]:
        """Return settled messages."""
        return await self._newest(limit, offset)

    async def list_dlq_messages(
        self, max_attempts: int = 1, limit: int = 100, offset: int = 0
    ) -> builtins.list[ArchivedMessage]:
        """Return the dead letters with at least ``max_attempts`` attempts."""
        return await self._newest(limit, offset, **self._dead(max_attempts))

    async def dlq_count(self, max_attempts: int = 1) -> int:
        """Count the dead letters with at least ``max_attempts`` attempts."""
        return await self._count(**self._dead(max_attempts))

    async def list_by_worker(
        self, worker_id: int, limit: int = 100, offset: int = 0
    ) -> builtins.list[ArchivedMessage]:
        """Return the messages that a worker has settled."""
        return await self._newest(limit, offset, where=self._by(worker_id))

    async def count_by_worker(self, worker_id: int) -> int:
        """Count the messages that a worker has settled."""
        return await self._count(where=self._by(worker_id))

    async def delete_by_worker(self, worker_id: int) -> int:
        """Delete the archive of a worker, 1,000 rows a transaction; return how many."""
        deleted = 0
        while True:
            async with self._service() as service:
                page = await service.archived.find(where=self._by(worker_id), limit=CHUNK)
                if not page:
                    return deleted
                deleted += await service.archived.delete([message.id for message in page])

    def _dead(self, max_attempts: int) -> dict[str, Any]:
        where = self._database.models.archived.read_ct >= max_attempts
        return {"outcome": "dead", "where": where}

    def _by(self, worker_id: int) -> Any:
        return self._database.models.archived.consumer_worker_id == worker_id

    async def _count(self, **criteria: Any) -> int:
        async with self._service() as service:
            return await service.archived.count(**criteria)

    async def _newest(
        self, limit: int, offset: int, **criteria: Any
    ) -> builtins.list[ArchivedMessage]:
        validation.validate_limit(limit)
        validation.validate_number(offset, "offset")
        async with self._service() as service:
            newest = await service.archived.find(
                limit=limit + offset, newest_first=True, **criteria
            )
            ids = await queue_ids(service)
        return [ArchivedMessage.of(ids[message.queue], message) for message in newest[offset:]]


class Workers(Connected):
    """The register of workers: a row for each start of a producer, consumer or admin."""

    async def count(self) -> int:
        """Return the number of workers, stopped ones too."""
        return len(await self.list())

    async def count_for_queue(self, queue: int | str) -> int:
        """Return how many work on a queue, stopped ones too."""
        return len(await self.filter_by_fk(queue))

    async def list(self, status: CoreWorkerStatus | None = None) -> builtins.list[WorkerInfo]:
        """Return all workers by id, or those of a status."""
        async with self._service() as service:
            ids = await queue_ids(service)
            found = await service.workers.list(status=status)
            return [WorkerInfo.of(ids, worker) for worker in found]

    async def filter_by_fk(self, queue: int | str) -> builtins.list[WorkerInfo]:
        """Return the workers of a queue, by id."""
        async with self._service() as service:
            name, ids = await _name(service, queue), await queue_ids(service)
            found = await service.workers.list(queue=name)
            return [WorkerInfo.of(ids, worker) for worker in found]

    async def count_zombies_for_queue(self, queue: int | str, older_than: Seconds = 60) -> int:
        """Return how many workers `list_zombies_for_queue` returns."""
        return len(await self.list_zombies_for_queue(queue, older_than))

    async def list_zombies_for_queue(
        self, queue: int | str, older_than: Seconds = 60
    ) -> builtins.list[WorkerInfo]:
        """Return the workers of a queue without a heartbeat for ``older_than`` seconds.

        Stopped workers are left out.
        """
        async with self._service() as service:
            name, ids = await _name(service, queue), await queue_ids(service)
            known = await service.workers.health(silent_for=older_than)
        return [
            WorkerInfo.of(ids, health.worker)
            for health in known
            if not health.healthy and name in health.worker.queues
        ]

    async def get(self, id: int) -> WorkerInfo:
        """Return a worker, or raise `WorkerNotFound`."""
        async with self._service() as service:
            return WorkerInfo.of(await queue_ids(service), await service.workers.get(id))

    async def delete(self, id: int) -> None:
        """Delete the row of a worker that is stopped, or raise `WorkerInUse`."""
        async with self._service() as service:
            await service.workers.delete(id)

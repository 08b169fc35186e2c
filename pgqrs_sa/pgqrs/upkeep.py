"""What an `Admin` does for messages and workers that need help."""

from __future__ import annotations

from ..aio import AsyncQueueService
from ..errors import MessageNotFound as CoreMessageNotFound
from ..types import Seconds
from . import paging
from .connected import Connected
from .errors import InvalidWorkerType
from .types import QueueMessage

__all__ = ["Upkeep", "replay"]

_CHUNK = 1000


class Upkeep(Connected):
    """Reclaiming, dead letters, and other people's workers."""

    async def reclaim_messages(
        self, queue_name: str, older_than_seconds: Seconds | None = None
    ) -> int:
        """Stop workers of a queue that fell silent, and make visible what they hold.

        It only shortens the wait: what a dead worker holds comes back by itself when its lease
        runs out. Attempts stay counted, and a late settle of such a worker changes nothing.

        Args:
            queue_name: The queue.
            older_than_seconds: The silence beyond which a worker counts as dead. Unless given,
                60 seconds or 12 heartbeat intervals, whichever is longer, and only workers that
                hold messages are looked at: an idle producer has nothing to say. A consumer says
                that it lives with every call and, while it holds messages, by a task of its own;
                so only one that blocks the event loop for that long is taken for dead.

        Returns:
            How many messages came back.
        """
        patient = older_than_seconds is None
        limit = self._presumed_dead() if older_than_seconds is None else older_than_seconds
        async with self._service() as service:
            await service.queues.get(queue_name)
            return await service.workers.reclaim(
                silent_for=limit, queue=queue_name, holding=patient
            )

    async def dlq(self) -> list[int]:
        """Make dead letters of messages whose attempts are used up and whose lease has run out.

        Returns:
            The messages' ids of those that were in that state when the call began. `replay_dlq`
            takes the archive's: `Archive.list_dlq_messages` has both.
        """
        buried: list[int] = []
        async with self._service() as service:
            queues = [queue.name for queue in await service.queues.list()]
        for queue in queues:
            buried += await self._bury(queue)
        return buried

    async def _bury(self, queue: str) -> list[int]:
        archive = self._database.models.archived
        async with self._service() as service:
            exhausted = paging.live(service, queue=queue, state="exhausted")
            ids = [message.id async for message in exhausted]
        for _ in range(0, len(ids), _CHUNK):
            async with self._service() as service:
                await service.archived.bury(queue, limit=_CHUNK)
        found: list[int] = []
        for start in range(0, len(ids), _CHUNK):
            among = archive.original_msg_id.in_(ids[start : start + _CHUNK])
            async with self._service() as service:
                dead = paging.archived(service, queue=queue, outcome="dead", where=among)
                found += [message.original_msg_id async for message in dead]
        return found

    async def replay_dlq(self, archived_id: int) -> QueueMessage | None:
        """Put a dead letter back into its queue with fresh attempts, under the id that it had.

        Returns:
            The message, visible now; None when no dead letter has this id in the archive.
        """
        async with self._service() as service:
            return await replay(service, archived_id)

    async def get_worker_messages(self, worker_id: int) -> list[QueueMessage]:
        """Return what a worker holds."""
        async with self._service() as service:
            await service.workers.get(worker_id)
            ids = {queue.name: queue.id for queue in await service.queues.list()}
            held = await paging.held_by(service, self._database.models, worker_id)
            return [QueueMessage.of(ids[message.queue], message) for message in held]

    async def release_worker_messages(self, worker_id: int) -> int:
        """Make visible at once what a worker holds, and return how many messages.

        Raises:
            InvalidWorkerType: It is an admin's, and works on no queue.
        """
        async with self._service() as service:
            if not (await service.workers.get(worker_id)).queues:
                raise InvalidWorkerType(worker_id)
            return await service.workers.release_leases(worker_id)

    async def purge_old_workers(self, older_than: Seconds) -> int:
        """Delete the rows of workers that stopped so many seconds ago and hold nothing."""
        async with self._service() as service:
            return await service.workers.purge(older_than=older_than)

    async def delete_worker(self, worker_id: int) -> None:
        """Delete the row of a worker that is stopped.

        Raises:
            WorkerInUse: It is not stopped, or still holds messages.
        """
        async with self._service() as service:
            await service.workers.delete(worker_id)


async def replay(
    service: AsyncQueueService, archived_id: int, queue: str | None = None
) -> QueueMessage | None:
    """Requeue a dead letter (of one queue, if that is given); None when there is none."""
    try:
        letter = await service.archived.get(archived_id)
    except CoreMessageNotFound:
        return None
    if letter.outcome != "dead" or queue not in (None, letter.queue):
        return None
    receipt = await service.archived.requeue(archived_id)
    queue_id = (await service.queues.get(letter.queue)).id
    return QueueMessage.of(queue_id, await service.messages.get(receipt.id))

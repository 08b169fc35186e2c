"""`Consumer`: takes messages from one queue, and settles them by their ids."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta

import sqlalchemy as sa

from ..arguments import duration
from ..errors import InvalidArgument
from ..types import Delivery, Seconds
from .admin import Admin
from .config import Config
from .errors import WorkerNotFound, WorkerNotReady
from .held import Held
from .types import QueueMessage
from .worker import QueueWorker

__all__ = ["Consumer"]

_log = logging.getLogger("pgqrs_sa.pgqrs")


class Consumer(QueueWorker):
    """Takes messages from one queue and settles them; each call is a transaction of its own.

    A message that was taken is yours for the lock time. If it is not settled by then, because the
    consumer died or is too slow, it becomes visible again by itself. Whatever settles a message
    returns whether it did: False means that it was not this consumer's, or is not any more.

    To settle in the transaction that writes your results, use `pgqrs_sa.AsyncQueueService` with
    your own session instead.

    While it holds messages, a task says every ``heartbeat_interval_seconds`` that it lives.

    Args:
        admin: An `Admin`; or a DSN or `Config`, and the consumer closes its connections itself.
        queue: The name of a queue. That it exists is checked by the next awaited call.
        hostname: Where this runs, or what it is called: for people.
        port: A number to tell it by: for people.
    """

    _kind = "consumer"

    def __init__(self, admin: Admin | Config | str, queue: str, hostname: str, port: int) -> None:
        super().__init__(admin, queue, hostname, port)
        self._held = Held()
        self._beating: asyncio.Task[None] | None = None

    # Taking

    async def dequeue(self) -> list[QueueMessage]:
        """Take the next message for ``default_lock_time_seconds``; see `dequeue_batch`."""
        return await self.dequeue_batch(1)

    async def dequeue_delay(self, vt_seconds: Seconds) -> list[QueueMessage]:
        """Take the next message for so many seconds; see `dequeue_batch`."""
        return await self.dequeue_batch_with_delay(1, vt_seconds)

    async def dequeue_batch(self, limit: int | None = None) -> list[QueueMessage]:
        """Take visible messages for ``default_lock_time_seconds``, and count the attempt.

        Args:
            limit: How many at most, 1 to ``default_max_batch_size``; that many unless given.

        Returns:
            The messages in queue order; none when nothing is visible.

        Raises:
            WorkerNotReady: This consumer is suspended or stopped.
            QueueNotFound: with the names that come close.
            InvalidArgument: The limit is out of range.
        """
        settings = self._database.settings
        most = settings.default_max_batch_size
        return await self.dequeue_batch_with_delay(
            most if limit is None else limit, settings.default_lock_time_seconds
        )

    async def dequeue_batch_with_delay(self, limit: int, vt_seconds: Seconds) -> list[QueueMessage]:
        """Take visible messages for so many seconds; see `dequeue_batch`."""
        most = self._database.settings.default_max_batch_size
        if limit > most:
            raise InvalidArgument(f"limit={limit} is more than default_max_batch_size={most}")
        try:
            taken = await self._lease(limit, vt_seconds)
        except (WorkerNotReady, WorkerNotFound):
            if not await self._register_again():
                raise
            taken = await self._lease(limit, vt_seconds)
        if taken:
            self._held.add(taken, _seconds(vt_seconds))
            self._keep_beating()
        return [QueueMessage.of(self._queue_id, delivery) for delivery in taken]

    async def _lease(self, limit: int, vt_seconds: Seconds) -> list[Delivery]:
        async with self._service() as service:
            return await service.dequeue(self.queue, limit, lease=vt_seconds)

    # Settling

    async def archive(self, message_id: int) -> bool:
        """Settle a message that this consumer holds, keep it in the archive, say whether it did."""
        return (await self.archive_batch([message_id]))[0]

    async def archive_batch(self, message_ids: Sequence[int]) -> list[bool]:
        """Archive those messages that this consumer holds, and say of each whether it did."""
        held = self._held.among(message_ids)
        settled: dict[int, bool] = {}
        if held:
            async with self._service() as service:
                done = await service.try_archive_many(held)
            settled = {one.id: ok for one, ok in zip(held, done, strict=True)}
            self._held.drop(settled)
        return [settled.pop(id_, False) for id_ in message_ids]

    async def delete(self, message_id: int) -> bool:
        """Delete a message that this consumer holds, or cancel one that waits for its time.

        A cancelled message is kept in the archive, as such.

        Returns:
            True if it did; False if the message is settled already, is visible to consumers, or
            is held by another.
        """
        return (await self.delete_many([message_id]))[0]

    async def delete_many(self, message_ids: Sequence[int]) -> list[bool]:
        """Delete or cancel each of these messages, and say of each whether it did: see `delete`."""
        if not message_ids:
            return []
        held = self._held.among(message_ids)
        settled: dict[int, bool] = {}
        async with self._service() as service:
            if held:
                done = await service.try_delete_many(held)
                settled = {one.id: ok for one, ok in zip(held, done, strict=True)}
            # In the order of the ids, like every statement that locks several messages; and of
            # this consumer's queue only, however wrong the id.
            message = self._database.models.message
            for id_ in sorted(set(message_ids)):
                if not settled.get(id_):
                    waiting = sa.and_(message.id == id_, message.scheduled)
                    settled[id_] = await service.messages.cancel_where(self.queue, waiting) == 1
        self._held.drop(settled)
        return [settled.pop(id_, False) for id_ in message_ids]

    async def extend_visibility(self, message_id: int, extension_seconds: Seconds) -> bool:
        """Keep a message that this consumer holds away from others for longer, or put it off.

        Settle it within that time if you are still working on it. If you are not, leave it: it
        comes back then, and no sooner, with another attempt counted.

        Args:
            message_id: The message's id.
            extension_seconds: Seconds, or a timedelta, from now (not from the old end).

        Returns:
            True if it did; False if the message is not this consumer's, or not any more.
        """
        return (await self.extend_visibility_batch([message_id], extension_seconds))[0]

    async def extend_visibility_batch(
        self, message_ids: Sequence[int], extension_seconds: Seconds
    ) -> list[bool]:
        """Extend those messages that this consumer holds, and say of each whether it did."""
        lease = _seconds(extension_seconds)
        held = self._held.among(message_ids)
        if not held:
            return [False] * len(message_ids)
        async with self._service() as service:
            done = await service.try_extend_many(held, extension_seconds)
        kept = {one.id for one, ok in zip(held, done, strict=True) if ok}
        for id_ in kept:
            self._held.extended(id_, lease)
        self._held.drop(one.id for one in held if one.id not in kept)
        self._keep_beating()
        return [id_ in kept for id_ in message_ids]

    async def release_messages(self, message_ids: Iterable[int]) -> int:
        """Give back messages that this consumer holds, and return how many it did.

        They are visible at once, and the attempt is not charged.
        """
        if not (held := self._held.among(message_ids)):
            return 0
        async with self._service() as service:
            done = await service.try_release_many(held)
        self._held.drop(one.id for one in held)
        return sum(done)

    async def _leave(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        # What was put off by extend_visibility comes back at its time, not now.
        await self.release_messages([one.id for one in self._held.at_work()])

    # Living

    def _keep_beating(self) -> None:
        loop = asyncio.get_running_loop()
        if self._beating is None or self._beating.done() or self._beating.get_loop() is not loop:
            interval = self._database.settings.heartbeat_interval_seconds
            self._beating = loop.create_task(_beat(weakref.ref(self), interval))

    async def _beat_once(self) -> bool:
        """Say that this consumer lives, if it holds anything; return whether it does."""
        if not self._held.running():
            return False
        try:
            async with self._service():
                pass
        except Exception:  # noqa: BLE001
            # The next call meets the same trouble and raises it: this one has nobody to tell.
            _log.warning("%r could not say that it lives", self, exc_info=True)
        return True


async def _beat(consumer: weakref.ref[Consumer], interval: float) -> None:
    """Say that a consumer lives for as long as it holds messages, and anybody refers to it."""
    while True:
        await asyncio.sleep(interval)
        alive = consumer()
        if alive is None or not await alive._beat_once():  # noqa: SLF001 - one class in two parts
            return
        del alive


def _seconds(span: Seconds) -> float:
    checked: timedelta = duration(span, "vt_seconds", positive=True)
    return checked.total_seconds()

"""`Consumer`: takes messages from one queue, and settles them by their ids."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa

from ..errors import InvalidArgument
from ..types import Delivery, Seconds
from ..validation import validate_duration
from .errors import WorkerNotFound, WorkerNotReady
from .types import QueueMessage
from .worker import QueueWorker

__all__ = ["Consumer"]

_log = logging.getLogger("pgqrs_sa.pgqrs")

KEPT_SECONDS = 3600.0
"""How long a delivery is kept after its lease: it can be settled until another leases it."""


@dataclass(slots=True)
class _Lease:
    delivery: Delivery
    ends_at: float  # by time.monotonic(): only used to drop old leases
    extended: bool = False


class _Leases:
    """Leases by message id, from the dequeue until they are settled or long expired."""

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}
        self._pruned_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, deliveries: Iterable[Delivery], lease: float) -> None:
        """Keep deliveries that were leased for ``lease`` seconds."""
        self._prune()
        for delivery in deliveries:
            self._leases[delivery.id] = _Lease(delivery, time.monotonic() + lease)

    def get(self, id: int) -> Delivery | None:
        """Return the delivery of a message, or None."""
        lease = self._leases.get(id)
        return None if lease is None else lease.delivery

    def deliveries(self, ids: Iterable[int]) -> list[Delivery]:
        """Return the deliveries of those messages that are leased, without duplicates."""
        return [self._leases[id_].delivery for id_ in dict.fromkeys(ids) if id_ in self._leases]

    def extend(self, id: int, lease: float) -> None:
        """Record that the lease of a message was extended to ``lease`` seconds from now."""
        if (held := self._leases.get(id)) is not None:
            held.ends_at, held.extended = time.monotonic() + lease, True

    def drop(self, ids: Iterable[int]) -> None:
        """Drop messages that were settled, or whose lease was lost."""
        for id_ in ids:
            self._leases.pop(id_, None)

    def any_running(self) -> bool:
        """Return whether any lease has not expired."""
        now = time.monotonic()
        return any(lease.ends_at > now for lease in self._leases.values())

    def never_extended(self) -> list[Delivery]:
        """Return the deliveries whose lease was never extended."""
        return [lease.delivery for lease in self._leases.values() if not lease.extended]

    def _prune(self) -> None:
        now = time.monotonic()
        if now - self._pruned_at < 1:  # it goes through all of them
            return
        self._pruned_at = now
        leases = self._leases.items()
        self.drop([id_ for id_, lease in leases if lease.ends_at + KEPT_SECONDS < now])


class Consumer(QueueWorker):
    """Takes messages from one queue and settles them; each call is a transaction of its own.

    A message is yours for the lock time. If it is not settled by then, because the consumer died
    or is too slow, it becomes visible again. Each method that settles a message returns whether
    it did: False means that this consumer does not hold it, or not any more.

    To settle in the transaction that writes your results, use `pgqrs_sa.AsyncQueueService` with
    your own session instead.

    While it holds messages, a task sends a heartbeat every ``heartbeat_interval_seconds``.

    Args:
        admin: An `Admin`; or a DSN or `Config`, and the consumer closes its connections itself.
        queue: The name of a queue. That it exists is checked by the next awaited call.
        hostname: Where this runs, or what it is called: for people.
        port: A number to tell it by: for people.
    """

    _heartbeats: asyncio.Task[None] | None = None
    _kind = "consumer"

    @cached_property
    def _leases(self) -> _Leases:
        return _Leases()

    # Dequeue

    async def dequeue(self) -> list[QueueMessage]:
        """Take the next message for ``default_lock_time_seconds``; see `dequeue_batch`."""
        return await self.dequeue_batch(1)

    async def dequeue_delay(self, vt_seconds: Seconds) -> list[QueueMessage]:
        """Take the next message for ``vt_seconds``; see `dequeue_batch`."""
        return await self.dequeue_batch_with_delay(1, vt_seconds)

    async def dequeue_batch(self, limit: int | None = None) -> list[QueueMessage]:
        """Take visible messages for ``default_lock_time_seconds``, and count the attempt.

        Args:
            limit: How many at most, 1 to ``default_max_batch_size``, which is the default.

        Returns:
            The messages in queue order; an empty list when none is visible.

        Raises:
            WorkerNotReady: This consumer is suspended or stopped.
            QueueNotFound: with similar names.
            InvalidArgument: The limit is out of range.
        """
        settings = self._database.settings
        most = settings.default_max_batch_size
        return await self.dequeue_batch_with_delay(
            most if limit is None else limit, settings.default_lock_time_seconds
        )

    async def dequeue_batch_with_delay(self, limit: int, vt_seconds: Seconds) -> list[QueueMessage]:
        """Take visible messages for ``vt_seconds``; see `dequeue_batch`."""
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
            self._leases.add(taken, _seconds(vt_seconds))
            self._send_heartbeats()
        return [QueueMessage.of(self._queue_id, delivery) for delivery in taken]

    async def _lease(self, limit: int, vt_seconds: Seconds) -> list[Delivery]:
        async with self._service() as service:
            return await service.dequeue(self.queue, limit, lease=vt_seconds)

    # Settle

    async def archive(self, message_id: int) -> bool:
        """Move a message that this consumer holds to the archive; return whether it did."""
        return (await self.archive_batch([message_id]))[0]

    async def archive_batch(self, message_ids: Sequence[int]) -> list[bool]:
        """Archive those messages that this consumer holds; return for each whether it did."""
        held = self._leases.deliveries(message_ids)
        settled: dict[int, bool] = {}
        if held:
            async with self._service() as service:
                done = await service.try_archive_many(held)
            settled = _by_id(held, done)
            self._leases.drop(settled)
        return [settled.pop(id_, False) for id_ in message_ids]

    async def delete(self, message_id: int) -> bool:
        """Delete a message that this consumer holds, or cancel a scheduled message.

        A cancelled message is kept in the archive with the outcome ``cancelled``.

        Returns:
            True if it did; False if the message is settled already, is visible to consumers, or
            is leased by another.
        """
        return (await self.delete_many([message_id]))[0]

    async def delete_many(self, message_ids: Sequence[int]) -> list[bool]:
        """Delete or cancel each of these messages; return for each whether it did: see `delete`."""
        if not message_ids:
            return []
        held = self._leases.deliveries(message_ids)
        settled: dict[int, bool] = {}
        async with self._service() as service:
            if held:
                done = await service.try_delete_many(held)
                settled = _by_id(held, done)
            # In the order of the ids, like every statement that locks several messages; and only
            # messages of this consumer's queue.
            message = self._database.models.message
            for id_ in sorted(set(message_ids)):
                if not settled.get(id_):
                    waiting = sa.and_(message.id == id_, message.scheduled)
                    settled[id_] = await service.messages.cancel_where(self.queue, waiting) == 1
        self._leases.drop(settled)
        return [settled.pop(id_, False) for id_ in message_ids]

    async def extend_visibility(self, message_id: int, extension_seconds: Seconds) -> bool:
        """Extend the lease of a message that this consumer holds, or postpone the message.

        Settle it within that time if you are still working on it. If you are not, leave it: it
        becomes visible then, and no sooner, and its next dequeue counts as another attempt.

        Args:
            message_id: The message's id.
            extension_seconds: Seconds, or a timedelta, from now (not from the old end).

        Returns:
            True if it did; False if this consumer does not hold the message, or not any more.
        """
        return (await self.extend_visibility_batch([message_id], extension_seconds))[0]

    async def extend_visibility_batch(
        self, message_ids: Sequence[int], extension_seconds: Seconds
    ) -> list[bool]:
        """Extend those messages that this consumer holds; return for each whether it did."""
        lease = _seconds(extension_seconds)
        held = self._leases.deliveries(message_ids)
        if not held:
            return [False] * len(message_ids)
        async with self._service() as service:
            done = await service.try_extend_many(held, extension_seconds)
        extended = _by_id(held, done)
        for id_, ok in extended.items():
            if ok:
                self._leases.extend(id_, lease)
        self._leases.drop(id_ for id_, ok in extended.items() if not ok)
        self._send_heartbeats()
        return [extended.get(id_, False) for id_ in message_ids]

    async def release_messages(self, message_ids: Iterable[int]) -> int:
        """Release messages that this consumer holds, and return how many it did.

        They are visible at once, and the attempt is not counted.
        """
        if not (held := self._leases.deliveries(message_ids)):
            return 0
        async with self._service() as service:
            done = await service.try_release_many(held)
        self._leases.drop(delivery.id for delivery in held)
        return sum(done)

    async def _leave(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.cancel()
        # A message that extend_visibility postponed becomes visible at its time, not now.
        await self.release_messages([delivery.id for delivery in self._leases.never_extended()])

    # Heartbeats

    def _send_heartbeats(self) -> None:
        loop, task = asyncio.get_running_loop(), self._heartbeats
        if task is None or task.done() or task.get_loop() is not loop:
            interval = self._database.settings.heartbeat_interval_seconds
            self._heartbeats = loop.create_task(_heartbeats(weakref.ref(self), interval))

    async def _heartbeat_while_leasing(self) -> bool:
        """Send a heartbeat if this consumer holds messages; return whether it does."""
        if not self._leases.any_running():
            return False
        try:
            async with self._service():
                pass
        except Exception:  # noqa: BLE001
            # The next call fails in the same way, and raises the error to the caller.
            _log.warning("%r could not send a heartbeat", self, exc_info=True)
        return True


async def _heartbeats(consumer: weakref.ref[Consumer], interval: float) -> None:
    """Send heartbeats for as long as the consumer holds messages, and is referenced."""
    while True:
        await asyncio.sleep(interval)
        alive = consumer()
        if alive is None or not await alive._heartbeat_while_leasing():  # noqa: SLF001
            return
        del alive


def _by_id(held: Iterable[Delivery], done: Iterable[bool]) -> dict[int, bool]:
    return {delivery.id: ok for delivery, ok in zip(held, done, strict=True)}


def _seconds(span: Seconds) -> float:
    return validate_duration(span, "vt_seconds", positive=True).total_seconds()

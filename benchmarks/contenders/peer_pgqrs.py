"""pgqrs: the queue whose names ours has."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg

from ..work import Payload, Progress, Tally
from .base import EFFECT, ORDER, POLL, QUEUE, AsyncContender, age_ms, create_orders

__all__ = ["Pgqrs"]

_EFFECT = EFFECT.format("%s").encode()


class Pgqrs(AsyncContender):
    """Its own pool; a business row is committed by another connection, before the message."""

    name = "pgqrs"
    title = "pgqrs"
    packages = ("pgqrs",)
    wakes = ("poll",)

    def install(self) -> None:
        """See `Contender`."""

        async def work() -> None:
            import pgqrs  # noqa: PLC0415 - a peer is not always installed

            store = await pgqrs.connect(self.place.dsn)
            await pgqrs.admin(store).install()
            await store.queue(QUEUE)

        self.wait(work)
        create_orders(self.place)

    async def connect(self) -> None:
        """See `AsyncContender`."""
        import pgqrs  # noqa: PLC0415

        config = pgqrs.Config(self.place.dsn)
        config.max_enqueue_per_second = None
        self._store: Any = await pgqrs.connect_with(config)
        self._producer: Any = await self._store.producer(QUEUE)
        self._consumer: Any = await self._store.consumer(QUEUE)
        self._pgqrs: Any = pgqrs
        self._connection = await psycopg.AsyncConnection.connect(
            self.place.conninfo, autocommit=True
        )

    async def disconnect(self) -> None:
        """See `AsyncContender`; its own connections end with the process."""
        await self._connection.close()

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                await self._producer.enqueue(payload)

        self.wait(work)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                await self._pgqrs.enqueue_batch(self._producer, [payload] * size)

        self.wait(work)
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`; in two transactions, for it cannot join another's."""

        async def work() -> None:
            for _ in range(count):
                await self._connection.execute(ORDER)
                await self._producer.enqueue(payload)

        self.wait(work)
        return Tally(count)

    async def _take(self, batch: int) -> list[Any]:
        found: list[Any] = await self._consumer.dequeue(batch)
        return found

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""

        async def work() -> None:
            while found := await self._take(batch):
                await self._consumer.archive_many([row.id for row in found])
                if not progress.add(len(found)):
                    return

        self.wait(work)

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`; each is archived when its business row is committed."""

        async def work() -> None:
            while found := await self._take(batch):
                for row in found:
                    await self._connection.execute(_EFFECT, [str(row.id)])
                    await self._consumer.archive(row.id)
                    if not progress.add(1):
                        return

        self.wait(work)

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        del wake
        ages: list[float] = []
        end = time.monotonic() + longest

        async def work() -> None:
            while len(ages) < count and time.monotonic() < end:
                found = await self._take(1)
                ages.extend(age_ms(row.payload) for row in found)
                if found:
                    await self._consumer.archive_many([row.id for row in found])
                else:
                    await asyncio.sleep(POLL)

        self.wait(work)
        return Tally(len(ages), {"latency_ms": ages})

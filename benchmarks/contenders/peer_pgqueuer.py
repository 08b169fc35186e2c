"""PgQueuer, on asyncpg."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import timedelta
from typing import Any

from ..work import Payload, Progress, Tally
from .base import EFFECT, ORDER, QUEUE, AsyncContender, age_ms, create_orders

__all__ = ["Pgqueuer"]

_EFFECT = EFFECT.format("$1")


class Pgqueuer(AsyncContender):
    """Its own loop takes a batch, and settles through a buffer of the same size."""

    name = "pgqueuer"
    title = "PgQueuer"
    packages = ("pgqueuer", "asyncpg")
    wakes = ("notify",)

    def install(self) -> None:
        """See `Contender`."""

        async def work() -> None:
            await self.connect()
            await self._queries.install()
            await self.disconnect()

        self.wait(work)
        create_orders(self.place)

    async def connect(self) -> None:
        """See `AsyncContender`."""
        import asyncpg  # noqa: PLC0415 - a peer is not always installed
        from pgqueuer.db import AsyncpgDriver  # noqa: PLC0415
        from pgqueuer.queries import Queries  # noqa: PLC0415

        logging.getLogger("pgqueuer").setLevel(logging.CRITICAL)
        self._connection: Any = await asyncpg.connect(**self.place.keywords)
        self._queries: Any = Queries(AsyncpgDriver(self._connection))

    async def disconnect(self) -> None:
        """See `AsyncContender`."""
        await self._connection.close()

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                await self._queries.enqueue(QUEUE, json.dumps(payload).encode())

        self.wait(work)
        return Tally(count)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            async with self._connection.transaction():
                for _ in range(count):
                    await self._queries.enqueue(QUEUE, json.dumps(payload).encode())

        self.wait(work)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                texts = [json.dumps(payload).encode() for _ in range(size)]
                await self._queries.enqueue([QUEUE] * size, texts, [0] * size)

        self.wait(work)
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                async with self._connection.transaction():
                    await self._connection.execute(ORDER)
                    await self._queries.enqueue(QUEUE, json.dumps(payload).encode())

        self.wait(work)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""

        async def work() -> None:
            manager = self._manager()

            @manager.entrypoint(QUEUE)  # type: ignore[untyped-decorator]
            async def handle(job: Any) -> None:
                json.loads(job.payload)
                if not progress.add(1):
                    manager.shutdown.set()

            await manager.run(batch_size=batch, mode=self._drain)

        self.wait(work)

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`; jobs run at the same time, so their connections are those of a pool."""

        async def work() -> None:
            import asyncpg  # noqa: PLC0415

            manager = self._manager()
            async with asyncpg.create_pool(**self.place.keywords) as pool:

                @manager.entrypoint(QUEUE)  # type: ignore[untyped-decorator]
                async def handle(job: Any) -> None:
                    await pool.execute(_EFFECT, str(job.id))
                    if not progress.add(1):
                        manager.shutdown.set()

                # Without a limit it takes the whole queue while the first rows are written.
                limit = 2 * batch
                await manager.run(batch_size=batch, mode=self._drain, max_concurrent_tasks=limit)

        self.wait(work)

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        del wake
        ages: list[float] = []

        async def work() -> None:
            manager = self._manager()

            @manager.entrypoint(QUEUE)  # type: ignore[untyped-decorator]
            async def handle(job: Any) -> None:
                ages.append(age_ms(json.loads(job.payload)))
                if len(ages) == count:
                    manager.shutdown.set()

            asyncio.get_running_loop().call_later(longest, manager.shutdown.set)
            await manager.run(batch_size=10, dequeue_timeout=timedelta(seconds=30))

        self.wait(work)
        return Tally(len(ages), {"latency_ms": ages})

    def _manager(self) -> Any:
        from pgqueuer import PgQueuer  # noqa: PLC0415
        from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415

        self._drain: Any = QueueExecutionMode.drain
        return PgQueuer.from_asyncpg_connection(self._connection).qm

"""chancy: its worker polls, and a batch is the number of jobs that run at the same time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..work import Payload, Progress, Tally
from .base import EFFECT, ORDER, QUEUE, AsyncContender, age_ms, create_orders

__all__ = ["Chancy", "handle"]

_IDLE = 0.2  # seconds without a job after which the queue is taken to be empty
_TICK = 0.05

_EFFECT = EFFECT.format("%s").encode()

_handler: Any = None


async def handle(payload: Payload, *, job: Any) -> None:
    """Be what chancy imports by its name; it passes the job to what is annotated as one."""
    result = _handler(payload, job)
    if result is not None:
        await result


class Chancy(AsyncContender):
    """Without its plugins; coroutines rather than its process pool; polling as often as it can."""

    name = "chancy"
    title = "chancy"
    packages = ("chancy",)
    wakes = ("notify",)

    def install(self) -> None:
        """See `Contender`."""

        async def work() -> None:
            await self.connect()
            await self._app.migrate()
            await self.disconnect()

        self.wait(work)
        create_orders(self.place)

    async def connect(self) -> None:
        """See `AsyncContender`."""
        import chancy  # noqa: PLC0415 - a peer is not always installed

        log = logging.getLogger("benchmarks.chancy")
        log.setLevel(logging.CRITICAL)
        self._chancy: Any = chancy
        self._app: Any = chancy.Chancy(self.place.conninfo, no_default_plugins=True, log=log)
        await self._app.__aenter__()

    async def disconnect(self) -> None:
        """See `AsyncContender`."""
        await self._app.__aexit__(None, None, None)

    def _job(self, payload: Payload) -> Any:
        return self._chancy.Job(func=f"{__name__}.handle", queue=QUEUE, kwargs={"payload": payload})

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                await self._app.push(self._job(payload))

        self.wait(work)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                jobs = [self._job(payload) for _ in range(size)]
                async for _ in self._app.push_many(jobs, batch_size=size):
                    pass

        self.wait(work)
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            from psycopg.rows import dict_row  # noqa: PLC0415

            for _ in range(count):
                async with (
                    self._app.pool.connection() as connection,
                    connection.cursor(row_factory=dict_row) as cursor,
                ):
                    await cursor.execute(ORDER)
                    await self._app.push_many_ex(cursor, [self._job(payload)])

        self.wait(work)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        counts = {"done": 0}
        stopping = asyncio.Event()

        def count(_payload: Payload, _job: Any) -> None:
            counts["done"] += 1
            if not progress.add(1):
                stopping.set()

        self.wait(self._work, count, batch, stopping, counts, progress.left)

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`; the worker settles a job with a connection of its own."""
        counts = {"done": 0}
        stopping = asyncio.Event()

        async def write(_payload: Payload, job: Any) -> None:
            async with self._app.pool.connection() as connection:
                await connection.execute(_EFFECT, [str(job.id)])
            counts["done"] += 1
            if not progress.add(1):
                stopping.set()

        self.wait(self._work, write, batch, stopping, counts, progress.left)

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        del wake
        ages: list[float] = []
        stopping = asyncio.Event()

        def look(payload: Payload, _job: Any) -> None:
            ages.append(age_ms(payload))
            if len(ages) == count:
                stopping.set()

        self.wait(self._work, look, 10, stopping, None, longest)
        return Tally(len(ages), {"latency_ms": ages})

    async def _work(
        self,
        handler: Any,
        concurrency: int,
        stopping: asyncio.Event,
        counts: dict[str, int] | None,
        longest: float,
    ) -> None:
        from chancy.job import QueuedJob  # noqa: PLC0415
        from chancy.worker import Worker  # noqa: PLC0415

        globals()["_handler"] = handler
        handle.__annotations__["job"] = QueuedJob
        queue = self._chancy.Queue(
            QUEUE,
            concurrency=concurrency,
            executor=self._chancy.Chancy.Executor.Async,
            polling_interval=1,
            eager_polling=True,
        )
        await self._app.declare(queue, upsert=True)
        async with Worker(self._app, register_signal_handlers=False):
            await self._wait(stopping, counts, longest)

    async def _wait(
        self, stopping: asyncio.Event, counts: dict[str, int] | None, longest: float
    ) -> None:
        """Until it is time, or, when jobs are counted, until none are left."""
        passed = 0.0
        while not stopping.is_set() and passed < longest:
            await asyncio.sleep(_TICK)
            passed += _TICK
            if counts is not None and counts["done"] and await self._none_left():
                return

    async def _none_left(self) -> bool:
        async with self._app.pool.connection() as connection:
            found = await connection.execute(
                "SELECT FROM chancy_jobs WHERE state IN ('pending', 'retrying') LIMIT 1"
            )
            return await found.fetchone() is None

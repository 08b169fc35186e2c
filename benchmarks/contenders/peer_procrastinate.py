"""procrastinate: jobs are deferred synchronously, its worker is asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import psycopg

from ..work import Payload, Progress, Tally
from .base import EFFECT, ORDER, QUEUE, AsyncContender, age_ms, create_orders

__all__ = ["Procrastinate"]

_EFFECT = EFFECT.format("%s").encode()


class Procrastinate(AsyncContender):
    """Its worker fetches one job at a time: a batch is the number of jobs that run at once."""

    name = "procrastinate"
    title = "procrastinate"
    packages = ("procrastinate",)
    wakes = ("poll", "notify")

    def install(self) -> None:
        """See `Contender`."""
        self.open()
        self._app.schema_manager.apply_schema()
        self.close()
        create_orders(self.place)

    def open(self) -> None:
        """See `Contender`."""
        import procrastinate  # noqa: PLC0415 - a peer is not always installed

        logging.getLogger("procrastinate").setLevel(logging.CRITICAL)
        connector = procrastinate.SyncPsycopgConnector(conninfo=self.place.conninfo)
        self._app: Any = procrastinate.App(connector=connector)
        self._task: Any = self._app.task(queue=QUEUE, name=QUEUE)(_nothing)
        self._app.open()
        self._connection = psycopg.connect(self.place.conninfo, autocommit=True)

    def close(self) -> None:
        """See `Contender`."""
        self._connection.close()
        self._app.close()
        super().close()

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._task.defer(payload=payload)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._task.batch_defer(*[{"payload": payload}] * size)
        return Tally(count * size)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        with self._connection.transaction():
            for _ in range(count):
                self._task.configure(connection=self._connection).defer(payload=payload)
        return Tally(count)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            with self._connection.transaction():
                self._connection.execute(ORDER)
                self._task.configure(connection=self._connection).defer(payload=payload)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        stopping = asyncio.Event()

        async def handle(payload: Payload) -> None:
            del payload
            if not progress.add(1):
                stopping.set()

        self.wait(self._work, handle, stopping, _until_empty(batch), None)

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`; the worker settles a job with a connection of its own."""
        self.wait(self._effects, batch, progress)

    async def _effects(self, batch: int, progress: Progress) -> None:
        from psycopg_pool import AsyncConnectionPool  # noqa: PLC0415 - procrastinate needs it

        stopping = asyncio.Event()
        async with AsyncConnectionPool(self.place.conninfo, open=False) as pool:

            async def handle(context: Any, payload: Payload) -> None:
                del payload
                async with pool.connection() as connection:
                    await connection.execute(_EFFECT, [str(context.job.id)])
                if not progress.add(1):
                    stopping.set()

            options = _until_empty(batch)
            await self._work(handle, stopping, options, None, pass_context=True)

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        ages: list[float] = []
        stopping = asyncio.Event()

        async def handle(payload: Payload) -> None:
            ages.append(age_ms(payload))
            if len(ages) == count:
                stopping.set()

        options = {"wait": True, "listen_notify": wake == "notify"}
        self.wait(self._work, handle, stopping, options, longest)
        return Tally(len(ages), {"latency_ms": ages})

    async def _work(
        self,
        handle: Any,
        stopping: asyncio.Event,
        options: dict[str, Any],
        longest: float | None,
        *,
        pass_context: bool = False,
    ) -> None:
        import procrastinate  # noqa: PLC0415

        app = procrastinate.App(
            connector=procrastinate.PsycopgConnector(conninfo=self.place.conninfo)
        )
        app.task(queue=QUEUE, name=QUEUE, pass_context=pass_context)(handle)
        async with app.open_async():
            worker = asyncio.ensure_future(
                app.run_worker_async(queues=[QUEUE], install_signal_handlers=False, **options)
            )
            stopper = asyncio.ensure_future(stopping.wait())
            await asyncio.wait(
                [worker, stopper], timeout=longest, return_when=asyncio.FIRST_COMPLETED
            )
            stopper.cancel()
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker


def _until_empty(batch: int) -> dict[str, Any]:
    return {"wait": False, "concurrency": batch, "listen_notify": False}


def _nothing(payload: Payload) -> None:
    """Be a task's name; the worker has a handler of its own."""

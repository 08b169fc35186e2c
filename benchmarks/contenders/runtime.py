"""Ours, through the consumer runtime: `pgqrs_sa.Consumer` and `AsyncConsumer`.

Both are looked up when they are needed, so that the rest runs with a version that lacks them.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import pgqrs_sa
from pgqrs_sa import Delivery

from ..place import Place
from ..work import Progress, Tally
from .base import ORDER, ORDERS_OF, QUEUE, AsyncContender, Contender, age_ms
from .ours import Ours
from .service import Service, ServiceNotify

__all__ = ["AsyncRuntimeAsyncpg", "AsyncRuntimePsycopg", "Runtime", "RuntimeBatches", "listens"]


def _found(name: str) -> Any:
    return getattr(pgqrs_sa, name, None)


def listens() -> bool:
    """Return whether this version has a consumer that can listen."""
    try:
        return _found("Consumer") is not None
    except ImportError:
        return False


def _stop() -> None:
    """End the consumer as its supervisor would: it finishes what it holds."""
    os.kill(os.getpid(), signal.SIGTERM)


def _sender(place: Place) -> Contender:
    # Who sends, sends the wake-up as well, where there is one.
    return (ServiceNotify if ServiceNotify.missing(place) is None else Service)(place)


class _Counting:
    """What a handler does: nothing but to count, and to stop when it is time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stopped = False

    def __call__(self, done: int = 1) -> None:
        if not self._progress.add(done) and not self._stopped:
            self._stopped = True
            _stop()


class _Watching:
    """What the handler of an idle consumer does: note how old each message is."""

    def __init__(self, count: int, longest: float) -> None:
        self.ages: list[float] = []
        self._count = count
        self._end = time.monotonic() + longest

    def __call__(self, delivery: Delivery) -> None:
        self.ages.append(age_ms(delivery.payload))
        if len(self.ages) == self._count or time.monotonic() > self._end:
            _stop()


class _Runtime(Ours):
    """What the two have in common; a batch is what a consumer holds at a time."""

    wakes = ("poll", "notify")
    exact = True
    consumer: str

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """See `Contender`."""
        try:
            found = _found(cls.consumer)
        except ImportError as error:
            return f"{cls.consumer} cannot be imported: {error}"
        if found is None:
            return f"this version of pgqrs_sa has no {cls.consumer}"
        return super().missing(place)

    def open(self) -> None:
        """See `Contender`."""

    def trickle(self, count: int, pause: float) -> Tally:
        """See `Contender`."""
        service = _sender(self.place)
        service.open()
        try:
            return service.trickle(count, pause)
        finally:
            service.close()


class Runtime(_Runtime):
    """A `Consumer`, with one thread."""

    name = "runtime"
    title = "pgqrs_sa Consumer"
    consumer = "Consumer"

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count = _Counting(progress)

        def handler(delivery: Delivery) -> None:
            del delivery
            count()

        self._run(handler, {"prefetch": batch - 1}, {"until_empty": True}, {})

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count, order = _Counting(progress), sa.text(ORDER)

        def handler(delivery: Delivery, session: Session) -> None:
            del delivery
            session.execute(order)
            count()

        self._run(handler, {"prefetch": batch - 1}, {"until_empty": True}, {})

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        look = _Watching(count, longest)

        def handler(delivery: Delivery) -> None:
            look(delivery)

        self._run(handler, {}, {}, {"notify": wake == "notify"})
        return Tally(len(look.ages), {"latency_ms": look.ages})

    def listen(self, count: int, longest: float) -> Tally:
        """Handle ``count`` messages, listening: the load next to what is measured."""
        seen = itertools.count(1)

        def handler(delivery: Delivery) -> None:
            del delivery
            if next(seen) == count:
                _stop()

        timer = threading.Timer(longest, _stop)
        timer.start()
        self._run(handler, {}, {}, {"notify": True})
        timer.cancel()
        return Tally(0)

    def _run(
        self,
        handler: Callable[..., None],
        on: dict[str, Any],
        run: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        engine = sa.create_engine(self.place.url())
        consumer = _found(self.consumer)(sessionmaker(engine), concurrency=1, **settings)
        consumer.on(QUEUE, **on)(handler)
        consumer.run(**run)
        engine.dispose()


class RuntimeBatches(Runtime):
    """A `Consumer` whose handler takes lists, with another list ahead."""

    name = "runtime-batches"
    title = "pgqrs_sa Consumer, handler of batches"
    wakes = ()

    @classmethod
    def offers(cls, work: str) -> bool:
        """See `Contender`: only how it drains differs."""
        return work in ("consume", "drain", "effects_together", "fill")

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count = _Counting(progress)

        def handler(deliveries: list[Delivery]) -> None:
            count(len(deliveries))

        on = {"batch": batch, "prefetch": batch}
        self._run(handler, on, {"until_empty": True}, {})

    def effects_together(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count = _Counting(progress)

        def handler(deliveries: list[Delivery], session: Session) -> None:
            session.execute(sa.text(ORDERS_OF.format(len(deliveries))))
            count(len(deliveries))

        on = {"batch": batch, "prefetch": batch}
        self._run(handler, on, {"until_empty": True}, {})


class AsyncRuntime(AsyncContender, _Runtime):
    """An `AsyncConsumer`, with one task; the driver is the subclass's."""

    consumer = "AsyncConsumer"
    driver: str

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count = _Counting(progress)

        async def handler(delivery: Delivery) -> None:
            del delivery
            count()

        self.wait(self._run, handler, {"prefetch": batch - 1}, {"until_empty": True}, {})

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        count, order = _Counting(progress), sa.text(ORDER)

        async def handler(delivery: Delivery, session: AsyncSession) -> None:
            del delivery
            await session.execute(order)
            count()

        self.wait(self._run, handler, {"prefetch": batch - 1}, {"until_empty": True}, {})

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        look = _Watching(count, longest)

        async def handler(delivery: Delivery) -> None:
            look(delivery)

        self.wait(self._run, handler, {}, {}, {"notify": wake == "notify"})
        return Tally(len(look.ages), {"latency_ms": look.ages})

    async def _run(
        self,
        handler: Callable[[Delivery], Any],
        on: dict[str, Any],
        run: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        engine = create_async_engine(self.place.url(self.driver))
        consumer = _found(self.consumer)(async_sessionmaker(engine), concurrency=1, **settings)
        consumer.on(QUEUE, **on)(handler)
        await consumer.run(**run)
        await engine.dispose()


class AsyncRuntimePsycopg(AsyncRuntime):
    """On psycopg."""

    name = "runtime-async-psycopg"
    title = "pgqrs_sa AsyncConsumer, psycopg"
    driver = "psycopg"


class AsyncRuntimeAsyncpg(AsyncRuntime):
    """On asyncpg."""

    name = "runtime-asyncpg"
    title = "pgqrs_sa AsyncConsumer, asyncpg"
    packages = ("pgqrs-sa", "sqlalchemy", "asyncpg")
    driver = "asyncpg"

"""Ours, through `QueueService` and `AsyncQueueService`."""

from __future__ import annotations

import inspect
import time
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, Delivery, QueueService

from ..place import Place
from ..work import Payload, Progress, Tally
from .base import ORDER, ORDERS_OF, POLL, QUEUE, AsyncContender, age_ms
from .ours import WARM, Ours

__all__ = [
    "AsyncService",
    "Service",
    "ServiceAsyncPsycopg",
    "ServiceAsyncpg",
    "ServiceChained",
    "ServiceNotify",
]

_PREPARED = 6  # psycopg prepares a statement when it has executed it five times
_LEASE = 60  # seconds of a renewed lease


class Service(Ours):
    """A `Session` for each transaction, on psycopg."""

    name = "service"
    title = "pgqrs_sa QueueService"
    wakes: ClassVar[tuple[str, ...]] = ("poll",)
    exact = True
    options: ClassVar[dict[str, Any]] = {}

    def open(self) -> None:
        """See `Contender`."""
        self._engine = sa.create_engine(self.place.url())
        settled = 0
        while settled < _PREPARED:
            self._enqueue(WARM, {})
            # Others warm up at the same time, and may have taken what was there.
            if deliveries := self._dequeue(WARM, 1):
                self._settle(deliveries)
                settled += 1

    def close(self) -> None:
        """See `Contender`."""
        self._engine.dispose()

    def _service(self, session: Session) -> QueueService:
        return QueueService(session, **self.options)

    def _enqueue(self, queue: str, payload: Payload) -> None:
        with Session(self._engine) as session, session.begin():
            self._service(session).enqueue(queue, payload)

    def _dequeue(self, queue: str, limit: int) -> list[Delivery]:
        with Session(self._engine) as session, session.begin():
            return self._service(session).dequeue(queue, limit)

    def _settle(self, deliveries: list[Delivery]) -> None:
        with Session(self._engine) as session, session.begin():
            self._service(session).archive_many(deliveries)

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._enqueue(QUEUE, payload)
        return Tally(count)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        with Session(self._engine) as session, session.begin():
            service = self._service(session)
            for _ in range(count):
                service.enqueue(QUEUE, payload)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                self._service(session).enqueue_many(QUEUE, [payload] * size)
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        order = sa.text(ORDER)
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                session.execute(order)
                self._service(session).enqueue(QUEUE, payload)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while deliveries := self._dequeue(QUEUE, batch):
            self._settle(deliveries)
            if not progress.add(len(deliveries)):
                return

    def renew(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while deliveries := self._dequeue(QUEUE, batch):
            with Session(self._engine) as session, session.begin():
                renewed = self._service(session).extend_many(deliveries, _LEASE)
            self._settle(renewed)
            if not progress.add(len(renewed)):
                return

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        order = sa.text(ORDER)
        while deliveries := self._dequeue(QUEUE, batch):
            for delivery in deliveries:
                with Session(self._engine) as session, session.begin():
                    session.execute(order)
                    self._service(session).archive(delivery)
                if not progress.add(1):
                    return

    def effects_together(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while deliveries := self._dequeue(QUEUE, batch):
            with Session(self._engine) as session, session.begin():
                session.execute(sa.text(ORDERS_OF.format(len(deliveries))))
                self._service(session).archive_many(deliveries)
            if not progress.add(len(deliveries)):
                return

    def dequeue_times(self, count: int, batch: int) -> Tally:
        """See `Contender`."""
        times = []
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                session.connection()
                start = time.perf_counter()
                found = self._service(session).dequeue(QUEUE, batch)
                times.append((time.perf_counter() - start) * 1e3)
            if len(found) != batch:
                raise RuntimeError(f"got {len(found)} messages instead of {batch}")
        return Tally(count * batch, {"times": times})

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        del wake
        ages: list[float] = []
        end = time.monotonic() + longest
        while len(ages) < count and time.monotonic() < end:
            deliveries = self._dequeue(QUEUE, 1)
            ages.extend(age_ms(delivery.payload) for delivery in deliveries)
            if deliveries:
                self._settle(deliveries)
            else:
                time.sleep(POLL)
        return Tally(len(ages), {"latency_ms": ages})


class ServiceNotify(Service):
    """The same with wake-ups."""

    name = "service-notify"
    title = "pgqrs_sa QueueService, notify"
    wakes = ()
    only = ("wake-up",)
    options: ClassVar[dict[str, Any]] = {"notify": True}

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """See `Contender`."""
        if "notify" not in inspect.signature(QueueService).parameters:
            return "this version of pgqrs_sa has no QueueService(session, notify=True)"
        return super().missing(place)


class ServiceChained(Service):
    """What is done is archived in the transaction that leases what comes next."""

    name = "service-chained"
    title = "pgqrs_sa QueueService, archive + next lease"
    wakes = ()
    only = ("cost", "drain", "snapshot")

    @classmethod
    def offers(cls, work: str) -> bool:
        """See `Contender`: only how it drains differs."""
        return work in ("consume", "drain", "fill")

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        deliveries: list[Delivery] = []
        while True:
            with Session(self._engine) as session, session.begin():
                service = self._service(session)
                done = deliveries
                if done:
                    service.archive_many(done)
                deliveries = service.dequeue(QUEUE, batch)
            if (done and not progress.add(len(done))) or not deliveries:
                return


class AsyncService(AsyncContender, Ours):
    """An `AsyncSession` for each transaction; the driver is the subclass's."""

    driver: str
    exact = True

    async def connect(self) -> None:
        """See `Contender`."""
        self._engine: AsyncEngine = create_async_engine(self.place.url(self.driver))
        settled = 0
        while settled < _PREPARED:
            await self._enqueue(WARM, {})
            if deliveries := await self._dequeue(WARM, 1):  # see `Service.open`
                await self._settle(deliveries)
                settled += 1

    async def disconnect(self) -> None:
        """See `Contender`."""
        await self._engine.dispose()

    async def _enqueue(self, queue: str, payload: Payload) -> None:
        async with AsyncSession(self._engine) as session, session.begin():
            await AsyncQueueService(session).enqueue(queue, payload)

    async def _dequeue(self, queue: str, limit: int) -> list[Delivery]:
        async with AsyncSession(self._engine) as session, session.begin():
            return await AsyncQueueService(session).dequeue(queue, limit)

    async def _settle(self, deliveries: list[Delivery]) -> None:
        async with AsyncSession(self._engine) as session, session.begin():
            await AsyncQueueService(session).archive_many(deliveries)

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                await self._enqueue(QUEUE, payload)

        self.wait(work)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""

        async def work() -> None:
            for _ in range(count):
                async with AsyncSession(self._engine) as session, session.begin():
                    await AsyncQueueService(session).enqueue_many(QUEUE, [payload] * size)

        self.wait(work)
        return Tally(count * size)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""

        async def work() -> None:
            while deliveries := await self._dequeue(QUEUE, batch):
                await self._settle(deliveries)
                if not progress.add(len(deliveries)):
                    return

        self.wait(work)

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        order = sa.text(ORDER)

        async def work() -> None:
            while deliveries := await self._dequeue(QUEUE, batch):
                for delivery in deliveries:
                    async with AsyncSession(self._engine) as session, session.begin():
                        await session.execute(order)
                        await AsyncQueueService(session).archive(delivery)
                    if not progress.add(1):
                        return

        self.wait(work)


class ServiceAsyncPsycopg(AsyncService):
    """On psycopg."""

    name = "service-async-psycopg"
    title = "pgqrs_sa AsyncQueueService, psycopg"
    driver = "psycopg"


class ServiceAsyncpg(AsyncService):
    """On asyncpg."""

    name = "service-asyncpg"
    title = "pgqrs_sa AsyncQueueService, asyncpg"
    packages = ("pgqrs-sa", "sqlalchemy", "asyncpg")
    driver = "asyncpg"

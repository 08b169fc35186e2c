"""A database for the guides, and a hand that moves its messages through time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService, Worker, pgqrs
from support.waiting import until_awaited

VISIBLE: sa.ColumnElement[Any] = sa.func.greatest(Message.vt, Message.leased_until)
"""When a message is visible, again if it is leased: what pgqrs calls its ``vt``."""


@dataclass
class Clock:
    """Looks at messages, and lets time pass for them: their times are moved back instead."""

    engine: sa.Engine

    def pass_seconds(self, seconds: float) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(Message).values(
                    vt=Message.vt - timedelta(seconds=seconds),
                    leased_until=Message.leased_until - timedelta(seconds=seconds),
                )
            )

    def waits(self) -> dict[int, float]:
        """Seconds until each message becomes visible, by id."""
        left = sa.func.extract("epoch", VISIBLE - sa.func.clock_timestamp())
        with self.engine.connect() as connection:
            return {i: float(s) for i, s in connection.execute(sa.select(Message.id, left))}

    def now(self) -> datetime:
        """The database's clock."""
        with self.engine.connect() as connection:
            return connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()

    @contextmanager
    def puts_off(self, id_: int, seconds: float, most: float | None = None) -> Iterator[None]:
        """Check that a block makes a message wait for so long, counted from a moment within it."""
        begun = self.now()
        yield
        with self.engine.connect() as connection:
            vt = connection.execute(sa.select(VISIBLE).where(Message.id == id_)).scalar_one()
        assert begun + timedelta(seconds=seconds) <= vt
        assert vt <= self.now() + timedelta(seconds=seconds if most is None else most)

    def vts(self) -> dict[int, datetime]:
        """When each message becomes visible, by id."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(Message.id, VISIBLE.label("vt")))
            return {row.id: row.vt for row in rows}

    def silent(self, worker: int) -> float:
        """Seconds since the last heartbeat of a worker."""
        silence = sa.select(sa.func.clock_timestamp() - Worker.heartbeat_at)
        with self.engine.connect() as connection:
            found = connection.execute(silence.where(Worker.id == worker))
            return found.scalar_one().total_seconds()

    def delays(self) -> list[float]:
        """Seconds between enqueue and visibility, in the order of the ids."""
        delay = sa.func.extract("epoch", Message.vt - Message.enqueued_at)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(delay).order_by(Message.id)).scalars()
            return [float(row) for row in rows]

    def visible(self, queue: str) -> list[int]:
        with Session(self.engine) as session:
            return [message.id for message in QueueService(session).messages.peek(queue, 1000)]

    def payloads(self) -> dict[int, Any]:
        with Session(self.engine) as session:
            return {
                message.id: message.payload for message in QueueService(session).messages.find()
            }

    def metrics(self, queue: str) -> Any:
        with Session(self.engine) as session:
            return QueueService(session).messages.metrics(queue)

    def archived(self, queue: str) -> list[Any]:
        with Session(self.engine) as session:
            return QueueService(session).archived.find(queue)


@pytest.fixture
def clock(database) -> Iterator[Clock]:
    engine = sa.create_engine(database.url)
    yield Clock(engine)
    engine.dispose()


@pytest.fixture
def prepare(database) -> Callable[..., pgqrs.Admin]:
    """Install the tables and create queues, as a program of its own would."""

    def run(*queues: str) -> pgqrs.Admin:
        async def main() -> None:
            async with pgqrs.Admin(database.dsn) as admin:
                await admin.install()
                for queue in queues:
                    await admin.create_queue(queue)

        asyncio.run(main())
        return pgqrs.Admin(database.dsn)

    return run


@pytest.fixture
async def admin(database):
    """An Admin with one queue, ``tasks``."""
    async with pgqrs.Admin(database.dsn) as admin:
        await admin.install()
        await admin.create_queue("tasks")
        yield admin


async def together(loop: Awaitable[Any], *conditions: Callable[[], bool]) -> None:
    """Run an endless loop until each condition has come true, one after the other."""
    task = asyncio.ensure_future(loop)
    try:
        for condition in conditions:
            await until_awaited(lambda: condition() or task.done())  # noqa: B023
            assert not task.done(), task.result()
    finally:
        # Again and again: asyncio.wait_for of Python 3.11, which psycopg uses, may swallow one.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        await asyncio.gather(task, return_exceptions=True)

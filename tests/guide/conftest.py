"""A database for the guides, and a hand that moves its messages through time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService, pgqrs


@dataclass
class Clock:
    """Looks at messages, and lets time pass for them: for its messages, a moved vt is the same."""

    engine: sa.Engine

    def pass_seconds(self, seconds: float) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(Message).values(vt=Message.vt - timedelta(seconds=seconds))
            )

    def waits(self) -> dict[int, float]:
        """Seconds until each message becomes visible, by id."""
        left = sa.func.extract("epoch", Message.vt - sa.func.clock_timestamp())
        with self.engine.connect() as connection:
            return {i: float(s) for i, s in connection.execute(sa.select(Message.id, left))}

    def delays(self) -> list[float]:
        """Seconds between enqueue and visibility, in the order of the ids."""
        delay = sa.func.extract("epoch", Message.vt - Message.enqueued_at)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(delay).order_by(Message.id)).scalars()
            return [float(row) for row in rows]

    def visible(self, queue: str) -> list[int]:
        with Session(self.engine) as session:
            return [one.id for one in QueueService(session).messages.peek(queue, 1000)]

    def payloads(self) -> dict[int, Any]:
        with Session(self.engine) as session:
            return {one.id: one.payload for one in QueueService(session).messages.find()}

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


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    while not condition():
        assert datetime.now(UTC) < end, "it never happened"
        await asyncio.sleep(0.02)


async def together(loop: Awaitable[Any], *conditions: Callable[[], bool]) -> None:
    """Run an endless loop until each condition has come true, one after the other."""
    task = asyncio.ensure_future(loop)
    try:
        for condition in conditions:
            await until(lambda: condition() or task.done())  # noqa: B023
            assert not task.done(), task.result()
    finally:
        # Again and again: asyncio.wait_for of Python 3.11, which psycopg uses, may swallow one.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        await asyncio.gather(task, return_exceptions=True)

"""An asynchronous consumer with two queues: a crawler of a (made up) site, and its index.

Several pages are fetched at the same time, each by its own call; their links are enqueued in the
handler's transaction. The index is written in batches. It runs until both queues are empty::

    pip install 'pgqrs-sa[psycopg,asyncio,alembic,consumer]'
    export PGQRS_DSN=postgresql://localhost/shop
    alembic upgrade head
    python examples/async_consumer.py
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Text, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgqrs_sa import (
    AsyncConsumer,
    AsyncQueueService,
    DeadLetter,
    Delivery,
    Discard,
    Retry,
    RetryIn,
)

SITE = {"/": ["/a", "/b"], "/a": ["/a/1", "/a/gone"], "/b": [], "/a/1": []}


class Base(DeclarativeBase):
    """The registry of this program."""


class Indexed(Base):
    """A page that was fetched."""

    __tablename__ = "indexed_pages"

    url: Mapped[str] = mapped_column(Text, primary_key=True)
    links: Mapped[int]


@dataclass
class Page:
    """The payload of ``pages``."""

    url: str


class GoneError(Exception):
    """The page does not exist."""


class BusyError(Exception):
    """The site does not answer at the moment."""


engine = create_async_engine(
    re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
)
sessions = async_sessionmaker(engine)
consumer = AsyncConsumer(sessions, concurrency=5, poll_interval=0.1)


async def download(url: str, attempt: int) -> list[str]:
    """Return the links of a page."""
    await asyncio.sleep(0.01)
    if url == "/b" and attempt == 1:
        raise BusyError(url)
    if url not in SITE:
        raise GoneError(url)
    return SITE[url]


@consumer.on(
    "pages",
    concurrency=4,
    weight=2,
    timeout=10,
    retry=Retry(
        max_attempts=3, on={BusyError: RetryIn(0), GoneError: Discard("there is no such page")}
    ),
)
async def fetch(page: Page, service: AsyncQueueService, delivery: Delivery) -> None:
    """Fetch a page, and enqueue its links and its text for the index: everything, or nothing."""
    links = await download(page.url, delivery.read_ct)
    for link in links:
        await service.enqueue("pages", {"url": link})
    await service.enqueue("index", {"url": page.url, "links": len(links)})
    print(f"fetched {page.url}")


@consumer.on("index", batch=20, concurrency=1)
async def index(
    rows: list[dict[str, object]], deliveries: list[Delivery], session: AsyncSession
) -> Mapping[int, DeadLetter]:
    """Write a batch in one INSERT; a row that is refused does not fail the others."""
    wrong = {}
    for delivery, row in zip(deliveries, rows, strict=True):
        if row.keys() == {"url", "links"}:
            session.add(Indexed(**row))
        else:
            wrong[delivery.id] = DeadLetter(f"not a page: {sorted(row)}")
    return wrong


async def main() -> int:
    """Begin with the first page, and work until both queues are empty."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    async with sessions.begin() as session:
        service = AsyncQueueService(session)
        for queue in ("pages", "index"):
            await service.queues.create(queue)
        await service.enqueue("pages", {"url": "/"})
        await service.enqueue("index", {"oops": True})
    code = await consumer.run(until_empty=True)
    async with sessions() as session:
        for row in await session.scalars(select(Indexed).order_by(Indexed.url)):
            print(f"indexed {row.url}: {row.links} link(s)")
        for settled in await AsyncQueueService(session).archived.find():
            if settled.outcome != "archived":
                print(f"{settled.outcome} {settled.payload}: {settled.reason}")
    await consumer.dispose()
    return code


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # each attempt that fails is a warning
    sys.exit(asyncio.run(main()))

"""What a type checker sees of the consumers' settings."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, Hooks, Retry


def right(maker: sessionmaker[Session], other: Callable[[], Session]) -> Consumer:
    """Settings are typed, and known by name."""
    Consumer(other)
    return Consumer(
        maker,
        concurrency=8,
        retry=Retry(max_attempts=3),
        poll_interval=0.5,
        drain_timeout=timedelta(seconds=18),
        heartbeat=10,
        housekeeping=None,
        name="shop",
        version="1",
        notify=True,
        hooks=[Hooks()],
        call_context=nullcontext,
    )


async def right_later(maker: async_sessionmaker[AsyncSession]) -> None:
    """The same for asyncio."""
    consumer = AsyncConsumer(maker, concurrency=8, poll_interval=timedelta(seconds=1))
    assert_type(await consumer.run(), int)


def right_handlers(consumer: Consumer) -> None:
    """Options of handlers are typed as well, and the function keeps its type."""

    @consumer.on("mail", lease=60, prefetch=2, timeout=timedelta(minutes=1), acknowledge="first")
    def send(payload: str) -> int:
        return len(payload)

    assert_type(send("text"), int)


def wrong(maker: sessionmaker[Session], later: async_sessionmaker[AsyncSession]) -> None:
    """What cannot be is seen before it runs."""
    Consumer(maker, concurency=8)  # type: ignore[call-arg]
    Consumer(maker, poll_interval="yes")  # type: ignore[arg-type]
    Consumer(maker, concurrency=2.5)  # type: ignore[arg-type]
    Consumer(maker, hooks=[print])  # type: ignore[list-item]
    Consumer(maker, call_context=nullcontext())  # type: ignore[arg-type]
    Consumer(later)  # type: ignore[arg-type]
    AsyncConsumer(later, concurency=8)  # type: ignore[call-arg]
    AsyncConsumer(later, poll_interval="yes")  # type: ignore[arg-type]
    AsyncConsumer(maker)  # type: ignore[arg-type]
    consumer = Consumer(maker)
    consumer.on("mail", prefech=2)  # type: ignore[call-arg]
    consumer.on("mail", prefetch="2")  # type: ignore[arg-type]
    consumer.on("mail", acknowledge="later")  # type: ignore[arg-type]
    AsyncConsumer(later).on("mail", leese=60)  # type: ignore[call-arg]
    AsyncConsumer(later).on("mail", lease="60 s")  # type: ignore[arg-type]

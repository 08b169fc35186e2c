"""How soon an idle consumer begins with a message: from just before its commit to its handler.

    PYTHONPATH=tests python -m support.latency --messages 100

With notifications (consumer and producer in two processes), with the wake (both in one process),
and with polling alone. One message at a time, with pauses that let the consumer fall idle.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from statistics import quantiles
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, QueueService
from support.scripts import Script
from support.servers import Address, own_server, run_sql
from support.waiting import until

Picked = Callable[[], float]
"""Waits for the next message, and returns when its handler began."""

_CODE = """
from support.latency import consume
consume(args["kind"], args["url"], args["settings"], lambda at: say("picked", at=at))
"""


def consume(
    kind: str, url: str, settings: dict[str, Any], picked: Callable[[float], object]
) -> None:
    """Run a consumer of a kind until the process is killed."""
    if kind == "sync":
        make_sync(url, settings, picked).run()
    else:
        asyncio.run(_consume(url, settings, picked))


def make_sync(url: str, settings: dict[str, Any], picked: Callable[[float], object]) -> Consumer:
    """Return a consumer whose handler tells when it began."""
    consumer = Consumer(sessionmaker(sa.create_engine(url)), concurrency=2, **settings)

    @consumer.on("mail")
    def handle(_payload: dict[str, Any]) -> None:
        picked(time.monotonic())

    return consumer


async def _consume(url: str, settings: dict[str, Any], picked: Callable[[float], object]) -> None:
    engine = create_async_engine(url)
    consumer = AsyncConsumer(async_sessionmaker(engine), concurrency=2, **settings)

    @consumer.on("mail")
    async def handle(_payload: dict[str, Any]) -> None:
        picked(time.monotonic())

    await consumer.run()


@contextmanager
def apart(kind: str, address: Address, **settings: Any) -> Iterator[Picked]:
    """A consumer in another process."""
    url = address.url("asyncpg" if kind == "asyncpg" else "psycopg")
    with Script(_CODE, kind=kind, url=url, settings=settings) as process:
        ready = "SELECT 1 FROM pgqrs_workers WHERE status = 'ready'"
        until(lambda: run_sql(address, ready), "it is registered")
        yield lambda: float(process.expect("picked")["at"])
        process.terminate()  # it acknowledges the last one
        assert process.wait() == 0, process.errors


@contextmanager
def beside(address: Address, **settings: Any) -> Iterator[Picked]:
    """A consumer in this process."""
    times: SimpleQueue[float] = SimpleQueue()
    with make_sync(address.url(), settings, times.put):
        yield lambda: times.get(timeout=90)


def measure(
    engine: sa.Engine, picked: Picked, messages: int, pause: float, *, notify: bool
) -> list[float]:
    """Send messages one by one, and return how long each waited, in milliseconds."""
    waits = []
    rest = threading.Event()
    for _ in range(messages + 5):
        rest.wait(pause * random.uniform(0.5, 1.5))
        with Session(engine) as session:
            QueueService(session, notify=notify).enqueue("mail", {"n": 1})
            began = time.monotonic()
            session.commit()
        waits.append((picked() - began) * 1000)
    return waits[5:]  # the first ones open connections


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m support.latency", description=__doc__.split("\n\n")[2]
    )
    parser.add_argument("--messages", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds; default: %(default)s")
    options = parser.parse_args()
    with own_server() as server:
        address = server.database("latency")
        engine = sa.create_engine(address.url())
        print(f"{'':<24} {'p50':>8} {'p90':>8} {'p99':>8}   ms, {options.messages} messages")
        ways: list[tuple[str, Any, bool]] = [
            *((f"NOTIFY, {k}", apart(k, address, notify=True), True) for k in _KINDS),
            ("wake, sync", beside(address), False),
            ("polling, sync", apart("sync", address), False),
        ]
        for name, way, notify in ways:
            with way as picked:
                waits = measure(engine, picked, options.messages, options.pause, notify=notify)
            cuts = quantiles(waits, n=100, method="inclusive")
            shown = " ".join(f"{cuts[at - 1]:8.2f}" for at in (50, 90, 99))
            print(f"{name:<24} {shown}", flush=True)
        engine.dispose()


_KINDS = ("sync", "psycopg", "asyncpg")

if __name__ == "__main__":
    main()

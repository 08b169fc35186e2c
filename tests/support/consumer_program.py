"""A consumer of the queue ``mail``, as an application would run it, which keeps the books.

A payload says what is to be done with it:

==========  ========================================================================
``work``    the effect, after ``ms`` milliseconds
``poison``  raise, each time
``once``    raise at the first attempt
``wait``    say ``begun`` and wait for the gate, then the effect; ``said`` when it is written
``crash``   end the process in the middle, each time; ``oom``: have it killed
``memory``  raise MemoryError, each time
==========  ========================================================================

Each attempt is noted in a transaction of its own before anything else, so that one whose process
dies is seen as well.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, Delivery, Hooks, Retry
from support import bouncer
from support.ledger import Effect, Start

_mouth = threading.Lock()


class Poison(Exception):
    """What a handler raises that is told to."""


class Gate:
    """What handlers wait for: it opens with the first line of the standard input.

    Read without a lock of Python's, which the interpreter could not take away at its end.
    """

    def __init__(self) -> None:
        self.opened = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError):
            if os.read(0, 100):
                self.opened.set()

    async def opened_async(self) -> None:
        # Not in a thread of the loop's executor, for which the end of the loop would wait.
        while not self.opened.is_set():  # noqa: ASYNC110 - it is a thread's
            await asyncio.sleep(0.01)


class Telling(Hooks):
    """Says what the consumer tells, of the hooks that are asked for."""

    def __init__(self, wanted: list[str]) -> None:
        for name in wanted:
            setattr(self, name, lambda event, name=name: say(name, **_facts(event)))


def _facts(event: Any) -> dict[str, Any]:
    error = None if event.error is None else type(event.error).__name__
    return {"id": event.delivery.id, "attempt": event.delivery.read_ct, "error": error}


def start_of(delivery: Delivery, name: str) -> Any:
    return sa.insert(Start).values(message_id=delivery.id, read_ct=delivery.read_ct, by=name)


def effect_of(delivery: Delivery, name: str) -> Effect:
    return Effect(message_id=delivery.id, read_ct=delivery.read_ct, by=name)


def _may_fail(payload: dict[str, Any], delivery: Delivery) -> None:
    match payload.get("do"):
        case "poison":
            raise Poison(payload)
        case "once" if delivery.read_ct == 1:
            raise Poison(payload)
        case "crash":
            os._exit(7)
        case "oom":  # as the kernel does it
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            raise MemoryError


def _engine(args: dict[str, Any]) -> dict[str, Any]:
    """An engine's arguments, with those of docs/how-to/pgbouncer.md where they are needed."""
    driver = "asyncpg" if args["kind"] == "asyncpg" else "psycopg"
    return {**(bouncer.SETTINGS[driver] if args["pooled"] else {}), **args["engine"]}


def make_sync(args: dict[str, Any], gate: Gate) -> tuple[Consumer, sa.Engine]:
    """Return a consumer in threads."""
    name = args["name"]
    engine = sa.create_engine(args["url"], **_engine(args))
    beside = sa.create_engine(args["beside"], isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    consumer = Consumer(
        sessionmaker(engine), hooks=[Telling(args["tell"])], name=name, **args["consumer"]
    )

    @consumer.on("mail", retry=Retry(**args["retry"]), **args["on"])
    def handle(session: Session, payload: dict[str, Any], delivery: Delivery) -> None:
        with beside.connect() as connection:
            connection.execute(start_of(delivery, name))
        _may_fail(payload, delivery)
        time.sleep(payload.get("ms", 0) / 1000)
        if payload.get("do") == "wait":
            say("begun", id=delivery.id, attempt=delivery.read_ct)
            gate.opened.wait()
        session.add(effect_of(delivery, name))
        session.flush()
        if payload.get("do") == "wait":
            say("written", id=delivery.id, lost=delivery.lease_lost)

    return consumer, engine


def make_async(args: dict[str, Any], gate: Gate) -> tuple[AsyncConsumer, AsyncEngine]:
    """Return a consumer in tasks."""
    name = args["name"]
    engine = create_async_engine(args["url"], **_engine(args))
    beside = create_async_engine(
        args["beside"], isolation_level="AUTOCOMMIT", pool_pre_ping=True, max_overflow=20
    )
    consumer = AsyncConsumer(
        async_sessionmaker(engine),
        hooks=[Telling(args["tell"])],
        name=name,
        **args["consumer"],
    )

    @consumer.on("mail", retry=Retry(**args["retry"]), **args["on"])
    async def handle(session: AsyncSession, payload: dict[str, Any], delivery: Delivery) -> None:
        async with beside.connect() as connection:
            await connection.execute(start_of(delivery, name))
        _may_fail(payload, delivery)
        await asyncio.sleep(payload.get("ms", 0) / 1000)
        if payload.get("do") == "wait":
            say("begun", id=delivery.id, attempt=delivery.read_ct)
            await gate.opened_async()
        session.add(effect_of(delivery, name))
        await session.flush()
        if payload.get("do") == "wait":
            say("written", id=delivery.id, lost=delivery.lease_lost)

    return consumer, engine


def say(word: str, **data: Any) -> None:
    """Tell the parent: see `support.scripts`."""
    with _mouth:
        sys.stdout.write(json.dumps([word, {"pid": os.getpid(), **data}]) + "\n")
        sys.stdout.flush()


def main(args: dict[str, Any]) -> None:
    """Run until told to stop; the exit code is the consumer's."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(message)s"
    )
    gate = Gate()
    until_empty = args["until_empty"]
    if args["kind"] == "sync":
        consumer, _ = make_sync(args, gate)
        say("made")
        sys.exit(consumer.run(until_empty=until_empty))

    async def run() -> int:
        consumer, _ = make_async(args, gate)
        say("made")
        return await consumer.run(until_empty=until_empty)

    sys.exit(asyncio.run(run()))

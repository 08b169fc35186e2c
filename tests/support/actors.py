"""Actors that do operations, through one of the drivers, and survive the faults.

::

    actor = Actor(address, "asyncpg", Archive("q"), gate=at)
    outcome = actor.run()          # {"acknowledged": True, "result": 1, "errors": [...], ...}

``gate`` is called with ``begin`` (connected, nothing done), ``executed`` (all done but COMMIT) and
``committed``, with each try. In a process of its own it says so through the pipe and waits: see
`PROCESS`.

What it does about trouble is what an application is told to do: try again, with the same key;
and when a lease is lost, ask whether its own earlier try is why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, LeaseLost, QueueService

from .loops import is_trouble
from .operations import Operation, got
from .servers import Address

DRIVERS = ("psycopg", "psycopg_async", "asyncpg")

PROCESS = """
import signal
from support.actors import Actor
from support.operations import OPERATIONS
from support.servers import Address

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

def gate(point):
    say(point, result=actor.outcome.result)
    hear("go")

operation = OPERATIONS[args["operation"]](args["queue"], args["lease"])
actor = Actor(Address(*args["address"]), args["driver"], operation, gate)
say("outcome", **actor.run().as_dict())
"""
"""For a `Script`: arguments are operation, queue, lease, address (a list) and driver."""


@dataclass
class Outcome:
    """What an actor believes.

    Attributes:
        acknowledged: A commit returned, or its own earlier try turned out to be committed.
        result: What the operation gave, if the commit returned.
        lease_lost: Somebody else has, or had, the message.
        tries: How often it began.
        errors: The trouble it had, by class and SQLSTATE.
    """

    acknowledged: bool = False
    result: Any = None
    lease_lost: bool = False
    tries: int = 0
    errors: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Actor:
    """See the module. ``options`` go to the engine; ``watch`` is given the (sync) engine."""

    def __init__(
        self,
        address: Address,
        driver: str,
        operation: Operation,
        gate: Callable[[str], None] = lambda _: None,
        *,
        options: dict[str, Any] | None = None,
        watch: Callable[[sa.Engine], None] | None = None,
        most: int = 40,
    ) -> None:
        self.operation, self.gate, self.most = operation, gate, most
        self.driver = driver
        self.address = address
        self.options = options or {}
        self.watch = watch
        self.outcome = Outcome()
        self.held: Any = None

    def run(self) -> Outcome:
        """Take a delivery, if the operation needs one, and do it until that is certain."""
        if self.driver == "psycopg":
            _drive(self._run(sa.create_engine(self.address.url("psycopg"), **self.options)))
        else:
            asyncio.run(self._run_async())
        return self.outcome

    async def _run_async(self) -> None:
        await self._run(create_async_engine(self.address.url(self.driver), **self.options))

    async def _run(self, engine: Any) -> None:
        self.engine = engine
        try:
            async with _Transaction(engine) as (session, service):
                self.held = await self.operation.first(session, service)
            if self.watch is not None:
                self.watch(getattr(engine, "sync_engine", engine))
            await self._until_certain()
            await self._until_usable()
        finally:
            await got(engine.dispose())

    async def _until_certain(self) -> None:
        while True:
            self.outcome.tries += 1
            try:
                await self._try()
                self.outcome.acknowledged = True
            except LeaseLost as lost:
                if await self._was_ours(lost):
                    self.outcome.acknowledged = True
                else:
                    self.outcome.lease_lost = True
            except Exception as error:
                if not is_trouble(error) or self.outcome.tries >= self.most:
                    raise
                self.outcome.errors.append(named(error))
                time.sleep(0.02)  # noqa: ASYNC251 - nothing else runs in this loop
                continue
            return

    async def _try(self) -> None:
        async with _Transaction(self.engine) as (session, service):
            await got(session.connection())
            self.gate("begin")
            result = await self.operation.do(session, service, self.held)
            await got(session.flush())
            self.gate("executed")
        self.outcome.result = result
        self.gate("committed")

    async def _until_usable(self) -> None:
        """Go on with the same engine, as an application would."""
        while True:
            try:
                async with _Transaction(self.engine) as (session, _):
                    await got(session.execute(sa.text("SELECT 1")))
            except Exception as error:
                if not is_trouble(error):
                    raise
                self.outcome.errors.append(named(error))
            else:
                return

    async def _was_ours(self, lost: LeaseLost) -> bool:
        while True:
            try:
                async with _Transaction(self.engine) as (session, _):
                    return await self.operation.done_after_all(session, self.held, lost)
            except Exception as error:
                if not is_trouble(error):
                    raise
                self.outcome.errors.append(named(error))


class _Transaction:
    """A session and its service, committed at the end; sync and async alike."""

    def __init__(self, engine: Any) -> None:
        sync = isinstance(engine, sa.Engine)
        self.session: Any = Session(engine) if sync else AsyncSession(engine)
        self.service: Any = (QueueService if sync else AsyncQueueService)(self.session)

    async def __aenter__(self) -> tuple[Any, Any]:
        return self.session, self.service

    async def __aexit__(self, kind: object, error: object, at: object) -> None:
        try:
            if kind is None:
                await got(self.session.commit())
        finally:
            await got(self.session.close())


def named(error: BaseException) -> str:
    """An error's class, its driver's class and its SQLSTATE: short enough for a table."""
    orig = getattr(error, "orig", None)
    if orig is None:
        return type(error).__name__
    return f"{type(error).__name__} {getattr(orig, 'sqlstate', None) or type(orig).__name__}"


def _drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits for anything."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a sync actor waited for something")

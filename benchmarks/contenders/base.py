"""What a contender can do. Each of its methods runs in a process of an `Executor`."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, TypeVar

import psycopg

from ..executor import Assignment, Executor
from ..metering import Meter, MeteredProgress, metering
from ..place import Place
from ..work import Outcome, Payload, Progress, Tally

__all__ = [
    "EFFECT",
    "ORDER",
    "ORDERS_OF",
    "POLL",
    "QUEUE",
    "AsyncContender",
    "Contender",
    "Family",
    "age_ms",
    "create_orders",
]

QUEUE = "bench"
"""The queue that everything goes through."""

POLL = 0.05
"""Seconds between two looks at an empty queue, for those that have no loop of their own."""

_TABLES = (
    "CREATE TABLE bench_orders (id bigserial PRIMARY KEY, customer text, total int)",
    "CREATE TABLE bench_effects (message text PRIMARY KEY, customer text, total int)",
)
ORDER = "INSERT INTO bench_orders (customer, total) VALUES ('Ada', 1200)"
"""The business row."""

ORDERS_OF = (
    "INSERT INTO bench_orders (customer, total) SELECT 'Ada', 1200 FROM generate_series(1, {})"
)
"""So many of them."""

EFFECT = (
    "INSERT INTO bench_effects (message, customer, total) VALUES ({}, 'Ada', 1200)"
    " ON CONFLICT DO NOTHING"
)
"""The same, for a consumer that cannot settle in its transaction: a second time it does nothing."""

T = TypeVar("T")
Family = Literal["ours", "baseline", "peer"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def create_orders(place: Place) -> None:
    """Create the tables of business rows."""
    with psycopg.connect(place.conninfo) as connection:
        for statement in _TABLES:
            connection.execute(statement)


def age_ms(payload: Payload) -> float:
    """Return how long ago a payload of `Contender.trickle` was sent, in milliseconds."""
    return (time.monotonic() - float(payload["sent"])) * 1e3


class Contender:
    """One way to do the work; a method that a class does not have is not offered by it.

    Class attributes:
        name: In records and on the command line.
        title: In tables.
        family: Ours, the baseline, or a peer.
        packages: The distributions whose versions belong into the report, the first one being
            what has to be installed.
        wakes: How a waiting consumer can learn of a message.
        only: The scenarios that it takes part in unless asked for by name; empty is all.
        exact: Whether it settles a message in the transaction of its handler's business row.

    Args:
        place: The database.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    family: ClassVar[Family] = "peer"
    packages: ClassVar[tuple[str, ...]] = ()
    wakes: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False

    def __init__(self, place: Place) -> None:
        self.place = place

    # ---------------------------------------------------------------------- in the parent

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """Return why it cannot take part, or None."""
        del place
        for package in cls.packages[:1]:
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                return f"not installed: pip install {package}"
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Return the versions of its packages."""
        return {package: _version(package) for package in cls.packages}

    @classmethod
    def offers(cls, work: str) -> bool:
        """Return whether it can do this."""
        return getattr(cls, work, None) is not getattr(Contender, work, None)

    @classmethod
    def run(
        cls,
        executor: Executor,
        place: Place,
        work: str,
        arguments: Sequence[dict[str, Any]],
        *,
        warm_up: dict[str, Any] | None = None,
        beside: Sequence[Assignment] = (),
    ) -> Outcome:
        """Do this in as many processes as there are arguments, at the same time.

        Args:
            executor: The processes.
            place: The database.
            work: The name of a method.
            arguments: Its arguments, for each process.
            warm_up: What it is called with before; see `Assignment`.
            beside: The work of other processes at the same time.

        Raises:
            ContenderFailed: one of them could not.
        """
        own = [Assignment(cls, place, work, argument, warm_up=warm_up) for argument in arguments]
        return executor.run([*own, *beside])

    # ------------------------------------------------------------- in the executor's processes

    def open(self) -> None:
        """Connect, and do once what is only slow the first time."""

    def close(self) -> None:
        """Disconnect."""

    def install(self) -> None:
        """Create the tables, the queue `QUEUE` and the table of business rows."""
        raise NotImplementedError

    def fill(self, count: int, payload: Payload) -> None:
        """Fill the queue with a backlog, in the fastest way."""
        size = min(count, 1000)
        for start in range(0, count, size):
            self.batches(1, min(size, count - start), payload)

    def shape(self, kind: str, rows: int, payload: Payload) -> None:
        """Make a database of this shape: see `scenarios.shapes`."""
        raise NotImplementedError

    def singles(self, count: int, payload: Payload) -> Tally:
        """Enqueue one by one, each with its own commit."""
        raise NotImplementedError

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """Enqueue one by one in a transaction that is open already."""
        raise NotImplementedError

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """Enqueue ``count`` batches of this size, each with its own commit."""
        raise NotImplementedError

    def business(self, count: int, payload: Payload) -> Tally:
        """Insert a business row and enqueue, and commit both."""
        raise NotImplementedError

    def drain(
        self, batch: int, longest: float, backlog: int, *, window: float = 0.0, memory: int = 0
    ) -> Tally:
        """Lease and settle messages in batches until the queue is empty or the time is over.

        Args:
            batch: The size of each batch.
            longest: Seconds.
            backlog: The number of messages for all consumers; some contenders must know it first.
            window: See `Progress`.
            memory: See `Progress`.
        """
        del backlog
        progress = Progress(longest, window=window, memory=memory)
        self.consume(batch, progress)
        return progress.tally()

    def consume(self, batch: int, progress: Progress) -> None:
        """Do as `drain` does: report to ``progress``, and stop when it says so."""
        raise NotImplementedError

    def renew(self, batch: int, progress: Progress) -> None:
        """Do what `consume` does, and renew the leases before the messages are settled."""
        raise NotImplementedError

    def effects(self, batch: int, progress: Progress) -> None:
        """Do what `consume` does, writing one business row for each message, exactly once.

        Each message has a transaction of its own, if its business row can be written in the one
        that settles it; else a key of the row keeps a second one out.
        """
        raise NotImplementedError

    def effects_together(self, batch: int, progress: Progress) -> None:
        """Do the same with one transaction for all messages that were taken together."""
        raise NotImplementedError

    def produce_metered(
        self, work: str, warm_up: dict[str, Any], arguments: dict[str, Any], *, wired: bool
    ) -> Tally:
        """Call a method that enqueues, and return what that cost.

        Args:
            work: The name of the method.
            warm_up: Its arguments before it is measured.
            arguments: Its arguments.
            wired: See `metering`.
        """
        with self._metered(wired=wired) as (contender, meter):
            produce = getattr(contender, work)
            produce(**warm_up)
            meter.start()
            tally = produce(**arguments)
            spent = meter.stop()
        return Tally(tally.count, {name: [value] for name, value in spent.items()})

    def consume_metered(
        self, work: str, batch: int, warm: int, count: int, longest: float, *, wired: bool
    ) -> Tally:
        """Call a method that consumes, and return what that cost.

        Args:
            work: The name of the method.
            batch: Messages at a time.
            warm: Messages before it is measured.
            count: Messages measured.
            longest: Seconds after which fewer are enough.
            wired: See `metering`.
        """
        with self._metered(wired=wired) as (contender, meter):
            progress = MeteredProgress(meter, warm, count, longest)
            getattr(contender, work)(batch, progress)
            return progress.tally()

    @contextmanager
    def _metered(self, *, wired: bool) -> Iterator[tuple[Self, Meter]]:
        with metering(self.place, wired=wired) as (place, meter):
            contender = type(self)(place)
            contender.open()
            try:
                yield contender, meter
            finally:
                contender.close()

    def dequeue_times(self, count: int, batch: int) -> Tally:
        """Lease ``count`` batches, each with its own commit; return the milliseconds of each."""
        raise NotImplementedError

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """Wait for ``count`` messages of `trickle`; return how long each took, in milliseconds."""
        raise NotImplementedError

    def trickle(self, count: int, pause: float) -> Tally:
        """Enqueue one message with its time after each pause of about ``pause`` seconds."""
        time.sleep(1.0)  # until the watcher is idle
        for _ in range(count):
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - not in step with a poll
            self.singles(1, {"sent": time.monotonic()})
        return Tally(count)


class AsyncContender(Contender):
    """A contender whose library is asynchronous: each work is one run of its event loop."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._runner = asyncio.Runner()

    def open(self) -> None:
        """See `Contender`."""
        self.wait(self.connect)

    def close(self) -> None:
        """See `Contender`."""
        try:
            self.wait(self.disconnect)
        finally:
            self._runner.close()

    def wait(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run a coroutine function to its end."""

        async def run() -> T:
            return await work(*arguments)

        return self._runner.run(run())

    async def connect(self) -> None:
        """See `Contender.open`."""

    async def disconnect(self) -> None:
        """See `Contender.close`."""

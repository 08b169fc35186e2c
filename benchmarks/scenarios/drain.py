"""Consumers that work off a backlog."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import psycopg

from ..contenders.base import Contender
from ..place import Place
from ..server import Preparation
from ..work import Outcome, payload_of
from .base import Arguments, Bench, Measured, Point, Scenario, Sizes

__all__ = ["Drain", "Memory", "Payloads", "Snapshot"]


def _backlog(count: int, payload: int) -> Preparation:
    arguments = {"count": count, "payload": payload_of(payload)}
    return Preparation(f"backlog-{count}-{payload}", "fill", arguments)


def _drained(
    bench: Bench, contender: type[Contender], place: Place, consumers: int, arguments: Arguments
) -> Outcome:
    everybody = [arguments] * consumers
    return contender.run(bench.executor, place, "drain", everybody)


class Drain(Scenario):
    """A fixed backlog, or as much of it as can be done in ``longest`` seconds."""

    name = "drain"
    title = "Drain a backlog: dequeue and archive"
    work = ("consume",)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [
            Point(f"{n} x {batch}", {"consumers": n, "batch": batch})
            for n in sizes.consumers
            for batch in sizes.takes
        ]

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        del point
        return _backlog(sizes.backlog, sizes.payload)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        arguments: Arguments = {
            "batch": point.number("batch"),
            "longest": bench.sizes.longest,
            "backlog": bench.sizes.backlog,
        }
        done = _drained(bench, contender, place, point.number("consumers"), arguments)
        return Measured(done.rate, {"drained": done.count})


class Payloads(Scenario):
    """The same with payloads of different sizes, one consumer, ten at a time."""

    name = "payloads"
    title = "Drain by size of the payload, 1 consumer x 10"
    work = ("consume",)
    usual = ("service", "bare", "pgbench", "pgmq")

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [Point(f"{size:,} B", {"bytes": size}) for size in sizes.payloads]

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        return _backlog(self._count(sizes), point.number("bytes"))

    @staticmethod
    def _count(sizes: Sizes) -> int:
        return max(10, sizes.backlog // 20)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        del point
        arguments: Arguments = {
            "batch": 10,
            "longest": bench.sizes.longest,
            "backlog": self._count(bench.sizes),
        }
        return Measured(_drained(bench, contender, place, 1, arguments).rate)


class Snapshot(Scenario):
    """A transaction stays open meanwhile, and keeps every dead row: the rate must not decay."""

    name = "snapshot"
    title = "Drain with a REPEATABLE READ snapshot held: rate of the last window / the first"
    unit = "last / first"
    heavy = True
    work = ("consume",)
    usual = (
        "service",
        "service-chained",
        "runtime",
        "runtime-batches",
        "runtime-async-psycopg",
        "pgmq",
        "pgqueuer",
        "pgqrs",
    )
    consumers = 2
    later = 20.0  # seconds after which the peers are compared

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`: pgbench says nothing about windows."""
        return contender.name != "pgbench" and super().takes_part(contender, point)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [Point(f"held for {sizes.hold:g} s", {"consumers": self.consumers, "batch": 10})]

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        del point
        return _backlog(sizes.held_backlog, sizes.payload)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        sizes = bench.sizes
        arguments: Arguments = {
            "batch": point.number("batch"),
            "longest": sizes.hold,
            "backlog": sizes.held_backlog,
            "window": sizes.window,
        }
        with psycopg.connect(place.conninfo) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM pg_class")
            done = _drained(bench, contender, place, self.consumers, arguments)
        rates = [count / sizes.window for count in done.series.get("windows", [])]
        decay = rates[-1] / rates[0] if rates and rates[0] else float("nan")
        more = {"first": rates[0], "last": rates[-1], "rate": done.rate} if rates else {}
        later = int(self.later / sizes.window)
        if len(rates) > later:
            more["later"] = rates[later]
        return Measured(decay, more, {"rates": rates})


class Memory(Scenario):
    """How much a consumer's process grows."""

    name = "memory"
    title = "Growth of a consumer's memory while it drains"
    unit = "MB"
    better = "lower"
    heavy = True
    work = ("consume",)
    usual = ("service", "service-asyncpg", "runtime", "runtime-async-psycopg")
    longest = 600.0

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`: pgbench is no consumer."""
        return contender.name != "pgbench" and super().takes_part(contender, point)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [Point(f"{sizes.memory:,} messages", {"batch": 50})]

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        del point
        return _backlog(sizes.memory, sizes.payload)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`; in a process that has done nothing else before."""
        bench.executor.renew()
        arguments: Arguments = {
            "batch": point.number("batch"),
            "longest": self.longest,
            "backlog": bench.sizes.memory,
            "memory": max(1, bench.sizes.memory // 200),
        }
        done = _drained(bench, contender, place, 1, arguments)
        growth = statistics.fmean(done.series["growth_mb"])
        return Measured(growth, {"rate": done.rate, "drained": done.count})

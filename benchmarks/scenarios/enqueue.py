"""Producers."""

from __future__ import annotations

from collections.abc import Sequence

from ..contenders.base import Contender
from ..contenders.ours import Ours
from ..contenders.runtime import Runtime, listens
from ..executor import Assignment
from ..place import Place
from ..work import payload_of
from .base import Arguments, Bench, Measured, Point, Scenario, Sizes, shares

__all__ = ["Batches", "Business", "InTransaction", "Singles", "WakeUp"]

_WARM = 6  # calls before it counts: psycopg prepares a statement when it has run it five times
_LISTENING = 120.0  # seconds after which a consumer that misses a message gives up


class _Producing(Scenario):
    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        del sizes
        return [Point("1 producer", {"producers": 1})]

    def arguments(self, sizes: Sizes, producers: int) -> list[Arguments]:
        """Return what each producer is told."""
        return [
            {"count": count, "payload": payload_of(sizes.payload)}
            for count in shares(sizes.singles, producers)
        ]

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        done = contender.run(
            bench.executor,
            place,
            self.work[0],
            self.arguments(bench.sizes, point.number("producers")),
            warm_up=self.warm_up(bench.sizes),
            beside=self.beside(point, place, bench.sizes),
        )
        return Measured(done.rate)

    def warm_up(self, sizes: Sizes) -> Arguments:
        """Return what each producer does before it is measured."""
        return {"count": _WARM, "payload": payload_of(sizes.payload)}

    def beside(self, point: Point, place: Place, sizes: Sizes) -> Sequence[Assignment]:
        """Return what others do meanwhile."""
        del point, place, sizes
        return ()


def _by_producers(counts: Sequence[int]) -> list[Point]:
    return [Point(f"{n} producer{'s' * (n > 1)}", {"producers": n}) for n in counts]


class Singles(_Producing):
    """Enqueue one by one, each with its own commit."""

    name = "enqueue-single"
    title = "Single enqueue, own commit"
    work = ("singles",)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return _by_producers(sizes.producers)


class InTransaction(_Producing):
    """Enqueue one by one in one open transaction."""

    name = "enqueue-open"
    title = "Single enqueue in an open transaction"
    work = ("in_transaction",)


class Batches(_Producing):
    """Enqueue batches, each with its own commit."""

    name = "enqueue-batch"
    title = "Enqueue in batches"
    work = ("batches",)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [Point(f"batches of {sizes.batch_size}", {"producers": 1})]

    def arguments(self, sizes: Sizes, producers: int) -> list[Arguments]:
        """See `_Producing`."""
        return [
            {"count": count, "size": sizes.batch_size, "payload": payload_of(sizes.payload)}
            for count in shares(sizes.batches, producers)
        ]

    def warm_up(self, sizes: Sizes) -> Arguments:
        """See `_Producing`."""
        return {**super().warm_up(sizes), "size": sizes.batch_size}


class Business(_Producing):
    """A business row, a message, one commit."""

    name = "business"
    title = "Business row + enqueue + commit"
    work = ("business",)


class WakeUp(_Producing):
    """Producers with and without waking a consumer that waits, while one waits and while none does.

    The enqueue checks whether a consumer waits, so that without one no NOTIFY is sent.
    """

    name = "wake-up"
    title = "Many producers, with and without wake-up"
    work = ("singles",)
    usual = ("service", "service-notify", "bare")

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        count = sizes.waking
        return [
            Point(f"{count} producers, nobody waits", {"producers": count, "listening": 0}),
            Point(f"{count} producers, one listens", {"producers": count, "listening": 1}),
        ]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`: a consumer that listens is our runtime's, on our tables."""
        if not super().takes_part(contender, point):
            return False
        if not point.number("listening"):
            return True
        return issubclass(contender, Ours) and contender.name != "pgbench" and listens()

    def beside(self, point: Point, place: Place, sizes: Sizes) -> Sequence[Assignment]:
        """See `_Producing`."""
        if not point.number("listening"):
            return ()
        producers = point.number("producers")
        count = sum(item["count"] for item in self.arguments(sizes, producers))
        count += producers * int(self.warm_up(sizes)["count"])
        arguments = {"count": count, "longest": _LISTENING}
        return [Assignment(Runtime, place, "listen", arguments, counted=False)]

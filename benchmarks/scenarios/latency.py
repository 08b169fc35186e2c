"""How long a message waits for a consumer that has nothing else to do."""

from __future__ import annotations

from collections.abc import Sequence

from ..contenders.base import Contender
from ..executor import Assignment
from ..place import Place
from .base import Bench, Measured, Point, Scenario, Sizes, middle, quantile

__all__ = ["Latency"]


class Latency(Scenario):
    """From before the enqueue, its commit included, to the moment the consumer has the message."""

    name = "latency"
    title = "Pickup latency of an idle consumer, median"
    unit = "ms"
    better = "lower"
    work = ("watch",)

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        del sizes
        return [Point(wake, {"wake": wake}) for wake in ("poll", "notify")]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`."""
        return point.facts["wake"] in contender.wakes and super().takes_part(contender, point)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        sizes = bench.sizes
        watch = {
            "count": sizes.latencies,
            "wake": str(point.facts["wake"]),
            "longest": 15 + sizes.latencies * sizes.pause * 3,
        }
        trickle = {"count": sizes.latencies, "pause": sizes.pause}
        done = bench.executor.run(
            [
                Assignment(contender, place, "watch", watch),
                Assignment(contender, place, "trickle", trickle),
            ]
        )
        ages = sorted(done.series.get("latency_ms", []))
        return Measured(
            middle(ages),
            {"p99": quantile(ages, 0.99), "seen": len(ages)},
            {"latency_ms": [round(age, 3) for age in ages]},
        )

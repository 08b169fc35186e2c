"""What else is in the tables must not matter to a dequeue."""

from __future__ import annotations

from collections.abc import Sequence

from ..contenders.base import Contender
from ..contenders.ours import SHAPES
from ..place import Place
from ..server import Preparation
from ..work import payload_of
from .base import Bench, Measured, Point, Scenario, Sizes, middle, quantile

__all__ = ["Shapes"]

_LABELS = {
    "empty": "nothing else",
    "ready": "ready",
    "scheduled": "scheduled in front",
    "archived": "archived",
    "priorities": "scheduled at a higher priority",
    "queues": "in 1,000 other queues",
}


class Shapes(Scenario):
    """The time of a dequeue of ten, by what else there is."""

    name = "shapes"
    title = "Time of a dequeue of 10, by the shape of the backlog"
    unit = "ms"
    better = "lower"
    heavy = True
    work = ("dequeue_times", "shape")
    usual = ("service", "bare", "pgmq")

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        return [
            Point(label if shape == "empty" else f"{sizes.rows:,} {label}", {"shape": shape})
            for shape, label in _LABELS.items()
        ]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`."""
        known = SHAPES[:4] if contender.name == "pgmq" else SHAPES
        return point.facts["shape"] in known and super().takes_part(contender, point)

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        kind = str(point.facts["shape"])
        arguments = {"kind": kind, "rows": sizes.rows, "payload": payload_of(sizes.payload)}
        return Preparation(f"shape-{kind}-{sizes.rows}", "shape", arguments)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        del point
        arguments = {"count": bench.sizes.dequeues, "batch": 10}
        done = contender.run(bench.executor, place, "dequeue_times", [arguments])
        times = done.series["times"]
        return Measured(middle(times), {"p99": quantile(times, 0.99)})

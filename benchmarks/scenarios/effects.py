"""Consumers whose handler writes a business row, once for each message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ..contenders.base import Contender
from ..place import Place
from ..server import Preparation
from ..work import payload_of
from .base import Bench, Measured, Point, Scenario, Sizes
from .metered import consumed, needed, per_message

__all__ = ["Effects"]

_BATCH = 50


class Effects(Scenario):
    """As each library's documentation recommends it; the report says who needs a key of the row.

    Who settles a message in the transaction of the row writes it exactly once. With others, a row
    that was committed before its message was settled is written again, unless a key keeps it out.
    """

    name = "work"
    title = "A business row for each message, exactly once, 1 consumer x 50"
    unit = "effects/s"
    work = ()
    columns: ClassVar[Mapping[str, str]] = {
        "commits": "commits",
        "requests": "round trips",
        "client": "client CPU us",
        "server": "server CPU us",
    }

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        del sizes
        return [
            Point("a transaction for each message", {"work": "effects"}),
            Point("a transaction for all that were taken", {"work": "effects_together"}),
        ]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`."""
        return contender.offers(str(point.facts["work"]))

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        del point
        count = needed(_BATCH, sizes.effects)
        arguments = {"count": count, "payload": payload_of(sizes.payload)}
        return Preparation(f"backlog-{count}-{sizes.payload}", "fill", arguments)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        work = str(point.facts["work"])
        cost, wire = consumed(bench, contender, place, work, _BATCH, bench.sizes.effects)
        (seconds,) = cost.series["seconds"]
        return Measured(cost.count / seconds, per_message(cost, wire))

    def remark(self, contender: type[Contender]) -> str:
        """See `Scenario`."""
        return "" if contender.exact else ", not in one transaction: a key of the row"

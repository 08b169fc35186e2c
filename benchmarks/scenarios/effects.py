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


class Effects(Scenario):
    """As each library's documentation recommends it; the report says who needs a key of the row.

    Who settles a message in the transaction of the row writes it exactly once. With others, a row
    that was committed before its message was settled is written again, unless a key keeps it out.
    """

    name = "work"
    title = "A business row for each message, exactly once, 1 consumer"
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
        batch = max(sizes.takes)
        labels = {
            "effects": f"{batch} leased, a transaction for each",
            "effects_together": f"{batch} leased, one transaction",
        }
        return [Point(label, {"work": work, "batch": batch}) for work, label in labels.items()]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`."""
        return contender.offers(str(point.facts["work"]))

    def preparation(self, point: Point, sizes: Sizes) -> Preparation:
        """See `Scenario`."""
        count = needed(point.number("batch"), sizes.effects)
        arguments = {"count": count, "payload": payload_of(sizes.payload)}
        return Preparation(f"backlog-{count}-{sizes.payload}", "fill", arguments)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        work, batch = str(point.facts["work"]), point.number("batch")
        cost, wire = consumed(bench, contender, place, work, batch, bench.sizes.effects)
        (seconds,) = cost.series["seconds"]
        return Measured(cost.count / seconds, per_message(cost, wire))

    def remark(self, contender: type[Contender]) -> str:
        """See `Scenario`."""
        return "" if contender.exact else ", not in one transaction: a key of the row"

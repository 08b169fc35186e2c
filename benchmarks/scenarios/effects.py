"""Consumers with a handler that writes a business row, exactly once for each message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ..contenders.base import Contender
from ..place import Place
from ..server import Preparation
from ..work import payload_of
from .base import Bench, Measured, Point, Scenario, Sizes
from .metered import Amounts, consumed, per_message

__all__ = ["Effects"]


class Effects(Scenario):
    """Each library works as its documentation recommends.

    If the message is settled in the transaction of the row, the row is written exactly once. If a
    library cannot do that, the row can be committed without the message being settled, and is then
    written again; its contender uses a unique key, which prevents that, and the report says so.
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
        count = self._amounts(point, sizes).needed
        arguments = {"count": count, "payload": payload_of(sizes.payload)}
        return Preparation(f"backlog-{count}-{sizes.payload}", "fill", arguments)

    @staticmethod
    def _amounts(point: Point, sizes: Sizes) -> Amounts:
        # One batch is enough, since most statements are executed for each message of it.
        return Amounts(point.number("batch"), sizes.effects, warm=1)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        work, amounts = str(point.facts["work"]), self._amounts(point, bench.sizes)
        cost, wire = consumed(bench, contender, place, work, amounts)
        (seconds,) = cost.series["seconds"]
        return Measured(cost.count / seconds, per_message(cost, wire))

    def remark(self, contender: type[Contender]) -> str:
        """See `Scenario`."""
        return "" if contender.exact else " (not in one transaction: a unique key)"

"""What a scenario is: points to measure, and how one is measured for one contender."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..contenders.base import Contender
from ..executor import Executor
from ..place import Place
from ..server import Preparation

__all__ = ["Bench", "Measured", "Point", "Scenario", "Sizes", "quantile", "shares"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done: the options of the command line.

    Attributes:
        singles: Messages of a measurement that enqueues one by one.
        batches: Batches of a measurement that enqueues batches.
        batch_size: Messages of each of them.
        producers: How many at the same time, one point each.
        waking: How many at the same time where wake-ups are compared.
        backlog: Messages of a drain.
        consumers: How many at the same time, one point each.
        takes: Messages that a consumer takes at a time, one point each.
        longest: Seconds after which a drain counts as it is.
        payload: Bytes of a payload.
        payloads: The same, one point each, where payloads are compared.
        cost: Messages whose cost is measured one by one.
        cost_backlog: Messages whose cost is measured in batches, at most.
        effects: Messages whose handler writes a business row.
        latencies: Messages of a latency measurement.
        pause: Seconds between two of them: long enough for a consumer to be idle again.
        rows: Rows of a backlog shape.
        dequeues: Dequeues timed on it.
        hold: Seconds for which a snapshot is held.
        window: Seconds of each window meanwhile.
        held_backlog: Messages drained meanwhile, at most.
        memory: Messages drained while memory is watched.
    """

    singles: int = 2000
    batches: int = 20
    batch_size: int = 1000
    producers: tuple[int, ...] = (1, 4, 8)
    waking: int = 8
    backlog: int = 50_000
    consumers: tuple[int, ...] = (1, 2, 4)
    takes: tuple[int, ...] = (1, 10, 50)
    longest: float = 15.0
    payload: int = 200
    payloads: tuple[int, ...] = (200, 2_000, 20_000, 100_000)
    cost: int = 600
    cost_backlog: int = 10_000
    effects: int = 500
    latencies: int = 100
    pause: float = 0.5
    rows: int = 1_000_000
    dequeues: int = 50
    hold: float = 60.0
    window: float = 5.0
    held_backlog: int = 1_000_000
    memory: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Point:
    """One thing that is measured.

    Attributes:
        label: For people.
        facts: What distinguishes it from the scenario's other points.
    """

    label: str
    facts: Mapping[str, int | str] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """Return a fact that is a number."""
        return int(self.facts[name])


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out.

    Attributes:
        value: In the scenario's unit.
        more: Further numbers, by name.
        series: Further lists of numbers, by name.
    """

    value: float
    more: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a measurement may use."""

    executor: Executor
    sizes: Sizes


class Scenario(ABC):
    """What is done, and which number counts.

    Class attributes:
        name: In records and on the command line.
        title: For people.
        unit: Of the number.
        better: Which is better, the ``higher`` or the ``lower``.
        heavy: It takes long, and so is repeated less often.
        work: What a contender must offer.
        usual: Who takes part unless asked for by name; None is everybody.
        settings: What the server is told to do differently meanwhile.
        columns: Further numbers, with their names; then each point has a table of its own.
        headline: Whether the report shows it before the targets.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = "msgs/s"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    heavy: ClassVar[bool] = False
    work: ClassVar[tuple[str, ...]]
    usual: ClassVar[tuple[str, ...] | None] = None
    settings: ClassVar[Mapping[str, str]] = {}
    columns: ClassVar[Mapping[str, str]] = {}
    headline: ClassVar[bool] = False

    @abstractmethod
    def points(self, sizes: Sizes) -> Sequence[Point]:
        """Return what is measured, in this order."""

    @abstractmethod
    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """Measure one point for one contender, in a fresh database.

        Raises:
            ContenderFailed: it could not.
        """

    def preparation(self, point: Point, sizes: Sizes) -> Preparation | None:
        """Return what the database must hold before, or None."""
        del point, sizes
        return None

    def remark(self, contender: type[Contender]) -> str:
        """Return what the report says after the name of a contender in a table of one point."""
        del contender
        return ""

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """Return whether a contender can do this."""
        del point
        return all(contender.offers(work) for work in self.work)


def shares(total: int, among: int) -> list[int]:
    """Return how many of a total each of several gets: all the same, at least 1."""
    return [max(1, total // among)] * among


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which this part of the values lies."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values) if values else float("nan")


Arguments = dict[str, Any]

"""The quick mode: a few minutes, ours against a bare `Session` and against pgbench.

It fails on ratios alone. They hold on a slow machine and on a fast one; seconds do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from .contenders import by_name
from .measure import Plan, ratio, summaries
from .records import Run
from .scenarios import Point, Sizes
from .scenarios import by_name as scenario

__all__ = ["ROUNDS", "SIZES", "THRESHOLDS", "Check", "Threshold", "checks", "plan"]

SIZES = Sizes(
    singles=1000,
    batches=12,
    producers=(1,),
    backlog=5000,
    consumers=(1,),
    takes=(10, 50),
    cost=100,
    cost_backlog=2000,
    effects=50,
)
ROUNDS = 5
"""Many short rounds: the median of their ratios stands more noise than a few long ones."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A ratio of ours to another.

    Attributes:
        scenario: Where; at every point of it, unless `point` names one.
        ours: Who of ours.
        against: Of the other.
        limit: Of a rate about 0.8 of what was measured, so that noise does not fail it.
        better: Whether the ratio must be at least the limit, or at most.
        point: The label of a point.
        number: Which number is compared, unless it is the measured value.
    """

    scenario: str
    ours: str
    against: str
    limit: float
    better: Literal["at least", "at most"] = "at least"
    point: str | None = None
    number: str | None = None


THRESHOLDS: tuple[Threshold, ...] = (
    Threshold("enqueue-single", "service", "bare", 0.70),
    Threshold("enqueue-single", "service", "pgbench", 0.15),
    Threshold("enqueue-open", "service", "bare", 0.60),
    Threshold("enqueue-batch", "service", "bare", 0.55),
    Threshold("enqueue-batch", "service", "pgbench", 0.35),
    Threshold("business", "service", "bare", 0.70),
    Threshold("drain", "service", "bare", 0.60),
    Threshold("drain", "service", "pgbench", 0.20),
    # One round is enough for these, since they are the same in each.
    Threshold("work", "service", "bare", 1.01, "at most", number="requests"),
    Threshold("work", "service", "bare", 1.01, "at most", number="commits"),
    Threshold("cost", "service", "bare", 1.10, "at most", number="wal"),
    Threshold("cost", "service", "bare", 1.01, "at most", number="requests"),
    Threshold("cost", "service", "bare", 1.01, "at most", number="commits"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """A threshold at one point."""

    threshold: Threshold
    point: str
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether it was measured, and is good enough."""
        if self.value is None:
            return False
        if self.threshold.better == "at least":
            return self.value >= self.threshold.limit
        return self.value <= self.threshold.limit

    def __str__(self) -> str:
        """Say it in a line."""
        wanted = self.threshold
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        mark = "ok  " if self.passed else "FAIL"
        what = f"{wanted.scenario}, {wanted.number}" if wanted.number else wanted.scenario
        where = f"{what} ({self.point}): {wanted.ours} / {wanted.against}"
        return f"{mark} {where} = {value}, {wanted.better} {wanted.limit:.2f}"


def plan(rounds: int) -> Plan:
    """Return what the quick mode measures."""
    scenarios = dict.fromkeys(threshold.scenario for threshold in THRESHOLDS)
    names = dict.fromkeys(
        name for threshold in THRESHOLDS for name in (threshold.ours, threshold.against)
    )
    return Plan(
        tuple(map(scenario, scenarios)),
        tuple(map(by_name, names)),
        rounds,
        rounds,
        named=True,
        once=("cost", "work"),
    )


def checks(run: Run, thresholds: Iterable[Threshold] = THRESHOLDS) -> Iterator[Check]:
    """Compare a run with the thresholds.

    A comparison that was not made, because of a failure, does not pass; one with somebody who is
    missing on this machine is left out.
    """
    table = summaries(run)
    absent = {name.contender for name in run.missing}
    for wanted in thresholds:
        if {wanted.ours, wanted.against} & absent:
            continue
        points = [
            point
            for scenario, point, name in table
            if (scenario, name) == (wanted.scenario, wanted.ours)
        ]
        for point in points or ["everywhere"]:
            if wanted.point in (None, point):
                ours = table.get((wanted.scenario, point, wanted.ours))
                if ours and not _takes_part(wanted, Point(point, ours.facts)):
                    continue
                other = table.get((wanted.scenario, point, wanted.against))
                value = ratio(ours, other, wanted.number) if ours and other else None
                yield Check(wanted, point, value)


def _takes_part(wanted: Threshold, point: Point) -> bool:
    return scenario(wanted.scenario).takes_part(by_name(wanted.against), point)

"""The quick mode: a few minutes, ours against a bare `Session` and against pgbench.

It fails on ratios alone. They hold on a slow machine and on a fast one; seconds do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .contenders import by_name
from .measure import Plan, ratio, summaries
from .records import Run
from .scenarios import Sizes
from .scenarios import by_name as scenario

__all__ = ["ROUNDS", "SIZES", "THRESHOLDS", "Check", "Threshold", "checks", "plan"]

SIZES = Sizes(
    singles=1000,
    batches=12,
    producers=(1,),
    backlog=5000,
    consumers=(1,),
    takes=(10, 50),
)
ROUNDS = 5
"""Many short rounds: the median of their ratios stands more noise than a few long ones."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """The least ratio of ours to another.

    Attributes:
        scenario: Where; at every point of it, unless `point` names one.
        ours: Who of ours.
        against: Of the other.
        least: About 0.8 of what was measured, so that noise does not fail it.
        point: The label of a point.
    """

    scenario: str
    ours: str
    against: str
    least: float
    point: str | None = None


THRESHOLDS: tuple[Threshold, ...] = (
    Threshold("enqueue-single", "service", "bare", 0.70),
    Threshold("enqueue-single", "service", "pgbench", 0.15),
    Threshold("enqueue-open", "service", "bare", 0.60),
    Threshold("enqueue-batch", "service", "bare", 0.55),
    Threshold("enqueue-batch", "service", "pgbench", 0.35),
    Threshold("business", "service", "bare", 0.70),
    Threshold("drain", "service", "bare", 0.60),
    Threshold("drain", "service", "pgbench", 0.20),
)


@dataclass(frozen=True, slots=True)
class Check:
    """A threshold at one point."""

    threshold: Threshold
    point: str
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether it was measured, and is not below."""
        return self.value is not None and self.value >= self.threshold.least

    def __str__(self) -> str:
        """Say it in a line."""
        wanted = self.threshold
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        mark = "ok  " if self.passed else "FAIL"
        where = f"{wanted.scenario} ({self.point}): {wanted.ours} / {wanted.against}"
        return f"{mark} {where} = {value}, at least {wanted.least:.2f}"


def plan(rounds: int) -> Plan:
    """Return what the quick mode measures."""
    scenarios = dict.fromkeys(threshold.scenario for threshold in THRESHOLDS)
    names = dict.fromkeys(
        name for threshold in THRESHOLDS for name in (threshold.ours, threshold.against)
    )
    return Plan(
        tuple(map(scenario, scenarios)), tuple(map(by_name, names)), rounds, rounds, named=True
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
                other = table.get((wanted.scenario, point, wanted.against))
                value = ratio(ours, other) if ours and other else None
                yield Check(wanted, point, value)

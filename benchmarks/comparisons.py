"""Compare a run with the targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .measure import Summary, Where, quartiles, ratios
from .targets import TARGETS, Target

__all__ = ["Comparison", "comparisons"]

Table = Mapping[Where, Summary]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A target at one point, against one other contender.

    Attributes:
        target: The target.
        point: The label of the point.
        against: The name of the other contender, or of the baseline.
        ours: Our number.
        other: The other number.
        values: The values that are compared with the limit, one of each round.
    """

    target: Target
    point: str
    against: str
    ours: float
    other: float | None
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """The median."""
        return quartiles(self.values)[1]

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, _, high = quartiles(self.values)
        return low, high

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when the rounds do not agree about it.

        They agree when the limit is not between their quartiles. One that is met by the median
        alone has not been shown, nor has the contrary.
        """
        low, high = map(self.target.met_by, self.spread)
        return low if low == high else None


def comparisons(table: Table) -> Iterator[Comparison]:
    """Yield each target at each point for which a run has the numbers."""
    for target in TARGETS:
        for (scenario, point, contender), ours in table.items():
            if (scenario, contender) == (target.scenario, target.ours) and _holds(target, ours):
                yield from _judged(target, point, ours, table)


def _holds(target: Target, ours: Summary) -> bool:
    wanted = target.points or {}
    facts = all(ours.facts.get(name) in values for name, values in wanted.items())
    return facts and bool(ours.rounds(target.number))


def _judged(target: Target, point: str, ours: Summary, table: Table) -> Iterator[Comparison]:
    if target.against:
        places = [(name, (target.scenario, point, name)) for name in target.against]
        others = [(name, table[where]) for name, where in places if where in table]
    elif target.baseline is not None:
        others = list(_baselines(target.baseline, target, table))
    else:
        values = tuple(ours.rounds(target.number).values())
        yield Comparison(target, point, "", statistics.median(values), None, values)
        return
    found = [
        Comparison(target, point, name, _middle(target, ours), _middle(target, other), values)
        for name, other in others
        if (values := tuple(ratios(ours, other, target.number)))
    ]
    if found:
        # The best of the others is the one against which the target is hardest to meet.
        worst = min if target.better == "at least" else max
        yield worst(found, key=lambda comparison: comparison.value)


def _baselines(
    baseline: tuple[str, str], target: Target, table: Table
) -> Iterator[tuple[str, Summary]]:
    fact, wanted = baseline
    for (scenario, _, contender), summary in table.items():
        same = (scenario, contender) == (target.scenario, target.ours)
        if same and summary.facts.get(fact) == wanted:
            yield wanted, summary


def _middle(target: Target, summary: Summary) -> float:
    return statistics.median(summary.rounds(target.number).values())

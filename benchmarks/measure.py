"""Interleaved rounds, and what they come to.

In each round every contender has its turn, in an order that moves on by one from round to round:
what changes on the machine meanwhile meets all of them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .contenders.base import Contender
from .executor import ContenderFailed
from .records import Failure, Missing, Record, Run, Sample
from .scenarios import Bench, Point, Scenario
from .server import Preparation, Server

__all__ = [
    "Plan",
    "Summary",
    "Turn",
    "absent",
    "quartiles",
    "ratio",
    "ratios",
    "run",
    "summaries",
    "turns",
]


class Listener(Protocol):
    """Who is told what is being measured."""

    def begin(self, turn: Turn) -> None:
        """A measurement begins."""

    def end(self, turn: Turn) -> None:
        """It is over."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes:
        scenarios: In this order.
        contenders: In this order.
        rounds: How often.
        heavy_rounds: How often what takes long.
        named: They were asked for by name, and take part in everything they can.
        once: The names of scenarios that one round is enough for.
    """

    scenarios: tuple[Scenario, ...]
    contenders: tuple[type[Contender], ...]
    rounds: int
    heavy_rounds: int
    named: bool = False
    once: tuple[str, ...] = ()

    def rounds_of(self, scenario: Scenario) -> int:
        """Return how often a scenario is measured."""
        if scenario.name in self.once:
            return 1
        return self.heavy_rounds if scenario.heavy else self.rounds


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement of one contender."""

    scenario: Scenario
    point: Point
    contender: type[Contender]
    round: int


def absent(
    contenders: Iterable[type[Contender]], server: Server
) -> tuple[tuple[type[Contender], ...], tuple[Missing, ...]]:
    """Return who can take part, and who cannot and why."""
    present, missing = [], []
    for contender in contenders:
        reason = contender.missing(server.place)
        if reason is None:
            present.append(contender)
        else:
            missing.append(Missing(contender.name, reason))
    return tuple(present), tuple(missing)


def turns(plan: Plan, bench: Bench) -> list[Turn]:
    """Return all measurements in the order in which they are made."""
    found = []
    for scenario in plan.scenarios:
        for point in scenario.points(bench.sizes):
            able = [
                contender
                for contender in plan.contenders
                if _takes_part(plan, scenario, contender, point)
            ]
            for number in range(plan.rounds_of(scenario)):
                start = number % len(able) if able else 0
                order = able[start:] + able[:start]
                found += [Turn(scenario, point, item, number) for item in order]
    return found


def _takes_part(plan: Plan, scenario: Scenario, contender: type[Contender], point: Point) -> bool:
    usual = scenario.usual is None or contender.name in scenario.usual
    usual = usual and (not contender.only or scenario.name in contender.only)
    return (plan.named or usual) and scenario.takes_part(contender, point)


def run(plan: Plan, bench: Bench, server: Server, listener: Listener) -> Iterator[Record]:
    """Make all measurements, and yield a record of each."""
    last: Preparation | None = None
    for turn in turns(plan, bench):
        server.configure(turn.scenario.settings)
        wanted = turn.scenario.preparation(turn.point, bench.sizes)
        if last is not None and (wanted is None or wanted.key != last.key):
            server.forget(last)
        last = wanted
        listener.begin(turn)
        yield _measured(turn, bench, server, wanted)
        listener.end(turn)


def _measured(
    turn: Turn, bench: Bench, server: Server, wanted: Preparation | None
) -> Sample | Failure:
    name, point, who = turn.scenario.name, turn.point, turn.contender
    try:
        with server.fresh(who, wanted) as place:
            done = turn.scenario.measure(bench, who, place, point)
    except ContenderFailed as error:
        return Failure(name, point.label, who.name, turn.round, str(error))
    except Exception as error:  # noqa: BLE001 - what went wrong with one ends no run of hours
        reason = f"{type(error).__name__}: {error}"
        return Failure(name, point.label, who.name, turn.round, reason)
    return Sample(
        name,
        point.label,
        who.name,
        turn.round,
        done.value,
        turn.scenario.unit,
        point.facts,
        done.more,
        done.series,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """What the rounds of one contender at one point come to.

    Attributes:
        median: Of the values.
        low: Their lower quartile.
        high: Their upper quartile.
        by_round: The values, by round.
        more: The medians of the further numbers.
        more_by_round: The further numbers by round, by name.
        facts: Of the point.
        unit: Of the values.
    """

    median: float
    low: float
    high: float
    by_round: Mapping[int, float]
    more: Mapping[str, float]
    more_by_round: Mapping[str, Mapping[int, float]]
    facts: Mapping[str, int | str]
    unit: str

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        """Sum up the samples of one contender at one point."""
        values = [sample.value for sample in samples]
        low, median, high = quartiles(values)
        names = sorted({name for sample in samples for name in sample.more})
        more_by_round = {
            name: {sample.round: sample.more[name] for sample in samples if name in sample.more}
            for name in names
        }
        more = {name: statistics.median(more_by_round[name].values()) for name in names}
        by_round = {sample.round: sample.value for sample in samples}
        facts, unit = samples[0].facts, samples[0].unit
        return cls(median, low, high, by_round, more, more_by_round, facts, unit)

    def rounds(self, number: str | None = None) -> Mapping[int, float]:
        """Return the values, or a further number, by round; empty if there is no such number."""
        return self.by_round if number is None else self.more_by_round.get(number, {})


Where = tuple[str, str, str]
"""Scenario, point, contender."""


def summaries(run: Run) -> dict[Where, Summary]:
    """Return what a run comes to, in the order in which it was measured."""
    by_place: dict[Where, list[Sample]] = defaultdict(list)
    for sample in run.samples:
        by_place[sample.scenario, sample.point, sample.contender].append(sample)
    return {where: Summary.of(samples) for where, samples in by_place.items()}


def ratio(ours: Summary, other: Summary, number: str | None = None) -> float:
    """Return the median of `ratios`, or what is no number when there are none."""
    found = ratios(ours, other, number)
    return statistics.median(found) if found else float("nan")


def ratios(ours: Summary, other: Summary, number: str | None = None) -> list[float]:
    """Return the ratios of the rounds that both have, of the value or of a further number.

    A round's two measurements were made close together, so that a machine that gets slower makes
    no difference; one that is disturbed for a moment does, and shows in how they scatter.
    """
    mine, theirs = ours.rounds(number), other.rounds(number)
    return [mine[n] / theirs[n] for n in sorted(mine.keys() & theirs.keys()) if theirs[n]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high

"""What the project has promised itself, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .measure import Summary, Where, quartiles, ratios

__all__ = ["TARGETS", "Comparison", "Target", "comparisons"]

Table = Mapping[Where, Summary]


@dataclass(frozen=True, slots=True)
class Target:
    """One promise.

    Attributes:
        text: In words.
        scenario: Where it is measured.
        ours: The contender that keeps it.
        limit: What is compared with it.
        against: Other contenders; the ratio to each is compared. Without any, ours alone is.
        points: The facts of the points at which it holds; empty is all.
        number: Which number of ours, unless it is the measured value.
        baseline: The point of ours that it is divided by.
        better: Whether it must be at least the limit, or at most.
    """

    text: str
    scenario: str
    ours: str
    limit: float
    against: tuple[str, ...] = ()
    points: Mapping[str, tuple[int | str, ...]] | None = None
    number: str | None = None
    baseline: tuple[str, str] | None = None
    better: Literal["at least", "at most"] = "at least"

    def met_by(self, value: float) -> bool:
        """Return whether this is good enough; what is no number is not."""
        return value >= self.limit if self.better == "at least" else value <= self.limit


@dataclass(frozen=True, slots=True)
class Comparison:
    """A target at one point, against one other.

    Attributes:
        target: The target.
        point: Where.
        against: The other, or the baseline.
        ours: Our number.
        other: Theirs.
        values: What is compared with the limit, of each round.
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


_DRAIN = "drain, QueueService"
_CHAINED = "drain, QueueService chained"
_RUNTIME = "drain, Consumer"
_BATCHES = "drain, Consumer with batches"

TARGETS: tuple[Target, ...] = (
    Target(
        "batches of 1000: 3 x the peers",
        "enqueue-batch",
        "service",
        3.0,
        ("pgqrs", "pgmq", "pgqueuer"),
    ),
    Target("batches of 1000: 0.6 of pgbench", "enqueue-batch", "service", 0.6, ("pgbench",)),
    Target("open transaction: 0.95 of a bare Session", "enqueue-open", "service", 0.95, ("bare",)),
    Target(
        "single + commit: 1.2 x the peers",
        "enqueue-single",
        "service",
        1.2,
        ("procrastinate", "chancy", "pgmq-sqlalchemy"),
    ),
    Target("single + commit: 0.95 of a bare Session", "enqueue-single", "service", 0.95, ("bare",)),
    Target(
        "business row: 1.3 x the peers",
        "business",
        "service",
        1.3,
        ("pgmq-sqlalchemy", "procrastinate"),
    ),
    Target(f"{_DRAIN}: 20 x pgqrs", "drain", "service", 20.0, ("pgqrs",)),
    Target(f"{_DRAIN}: 1.2 x the peers", "drain", "service", 1.2, ("pgqueuer", "pgmq-sqlalchemy")),
    Target(f"{_CHAINED}: 20 x pgqrs", "drain", "service-chained", 20.0, ("pgqrs",)),
    Target(
        f"{_CHAINED}: 1.2 x the peers",
        "drain",
        "service-chained",
        1.2,
        ("pgqueuer", "pgmq-sqlalchemy", "pgmq-sqlalchemy-chained"),
    ),
    Target(f"{_RUNTIME}: 1.2 x raw pgmq", "drain", "runtime", 1.2, ("pgmq",)),
    Target(f"{_BATCHES}: 1.2 x raw pgmq", "drain", "runtime-batches", 1.2, ("pgmq",)),
    Target(
        f"{_RUNTIME}: 0.7 of pgbench at 50",
        "drain",
        "runtime",
        0.7,
        ("pgbench",),
        points={"batch": (50,)},
    ),
    Target(
        f"{_BATCHES}: 0.7 of pgbench at 50",
        "drain",
        "runtime-batches",
        0.7,
        ("pgbench",),
        points={"batch": (50,)},
    ),
    Target(
        "latency with NOTIFY: p50 in ms",
        "latency",
        "runtime",
        2.0,
        points={"wake": ("notify",)},
        better="at most",
    ),
    Target(
        "latency with NOTIFY: p99 in ms",
        "latency",
        "runtime",
        6.0,
        points={"wake": ("notify",)},
        number="p99",
        better="at most",
    ),
    Target(
        "dequeue among 1M others / alone",
        "shapes",
        "service",
        1.5,
        points={"shape": ("scheduled", "archived", "priorities")},
        baseline=("shape", "empty"),
        better="at most",
    ),
    Target("snapshot held: last window / first", "snapshot", "service", 0.9),
    Target(
        "snapshot held, after 20 s: 10 x pgmq",
        "snapshot",
        "service",
        10.0,
        ("pgmq",),
        number="later",
    ),
    Target("snapshot held, QueueService chained: last / first", "snapshot", "service-chained", 0.9),
    Target(
        "snapshot held, QueueService chained, after 20 s: 10 x pgmq",
        "snapshot",
        "service-chained",
        10.0,
        ("pgmq",),
        number="later",
    ),
    Target("snapshot held, Consumer: last window / first", "snapshot", "runtime", 0.9),
    Target(
        "snapshot held, Consumer, after 20 s: 10 x pgmq",
        "snapshot",
        "runtime",
        10.0,
        ("pgmq",),
        number="later",
    ),
    Target(
        "snapshot held, Consumer with batches: last / first", "snapshot", "runtime-batches", 0.9
    ),
    Target(
        "snapshot held, Consumer with batches, after 20 s: 10 x pgmq",
        "snapshot",
        "runtime-batches",
        10.0,
        ("pgmq",),
        number="later",
    ),
    Target("producers with wake-up / without", "wake-up", "service-notify", 0.9, ("service",)),
    Target("memory: growth in MB", "memory", "service", 20.0, better="at most"),
    Target("memory, Consumer: growth in MB", "memory", "runtime", 20.0, better="at most"),
)


def comparisons(table: Table) -> Iterator[Comparison]:
    """Yield each target at each point at which a run has what it takes to judge."""
    for target in TARGETS:
        for (scenario, point, contender), ours in table.items():
            if (scenario, contender) == (target.scenario, target.ours) and _holds(target, ours):
                yield from _judged(target, point, ours, table)


def _holds(target: Target, ours: Summary) -> bool:
    wanted = target.points or {}
    return all(ours.facts.get(name) in values for name, values in wanted.items())


def _judged(target: Target, point: str, ours: Summary, table: Table) -> Iterator[Comparison]:
    for name in target.against:
        other = table.get((target.scenario, point, name))
        found = () if other is None else _compared(target, ours, other)
        if other is not None and found:
            mine, theirs = _shown(target, ours), _shown(target, other)
            yield Comparison(target, point, name, mine, theirs, found)
    if target.against:
        return
    if target.baseline is None:
        values = (_shown(target, ours),) if target.number else tuple(ours.by_round.values())
        yield Comparison(target, point, "", _shown(target, ours), None, values)
        return
    fact, wanted = target.baseline
    for (scenario, _, contender), other in table.items():
        same = (scenario, contender) == (target.scenario, target.ours)
        if same and other.facts.get(fact) == wanted and (found := _compared(target, ours, other)):
            yield Comparison(target, point, wanted, ours.median, other.median, found)


def _shown(target: Target, summary: Summary) -> float:
    return summary.more[target.number] if target.number else summary.median


def _compared(target: Target, ours: Summary, other: Summary) -> tuple[float, ...]:
    """The ratios round by round; of a further number, of which the median is kept, the one."""
    if target.number is None:
        return tuple(ratios(ours, other))
    if target.number not in ours.more or target.number not in other.more:
        return ()
    return (ours.more[target.number] / other.more[target.number],)

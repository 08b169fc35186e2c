"""The report on the terminal: a bar while it runs, tables when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .contenders import CONTENDERS
from .measure import Summary, Turn, Where, ratio, summaries
from .records import Run
from .scenarios import SCENARIOS, Scenario
from .targets import Comparison, comparisons

__all__ = ["TARGET_COLUMNS", "Bar", "Grid", "grids", "judged", "number", "show"]

REFERENCE = "service"
"""Ratios are of ours to another: who has twice our number has 0.5."""

TARGET_COLUMNS = (
    "target",
    "at",
    "ours",
    "against",
    "theirs",
    "value",
    "rounds",
    "limit",
    "met",
)
"""Met is "unclear" when the rounds do not agree: see `Comparison.met`."""

_TITLES = {contender.name: contender.title for contender in CONTENDERS}
_LARGE = 100


class Bar:
    """A bar with what is being measured; a context manager, and a listener of `measure.run`.

    Args:
        console: Where.
        total: How many measurements there are.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, turn: Turn) -> None:
        """See `measure.Listener`."""
        what = f"{turn.scenario.name} | {turn.point.label} | {turn.contender.name}"
        self._progress.update(self._task, description=f"{what} | round {turn.round + 1}")

    def end(self, turn: Turn) -> None:
        """See `measure.Listener`."""
        del turn
        self._progress.advance(self._task)


@dataclass(frozen=True, slots=True)
class Grid:
    """A scenario as a table of text: contenders down, points across."""

    scenario: Scenario
    points: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def caption(self) -> str:
        """The title, and how to read the cells."""
        return f"{self.scenario.title} ({self.scenario.unit}, {self.scenario.better} is better)"


def grids(run: Run) -> list[Grid]:
    """Return the tables of a run: median, quartiles, and ours as a multiple of the other."""
    table = summaries(run)
    failed = {(failure.scenario, failure.point, failure.contender) for failure in run.failures}
    places = [*table, *failed]
    found = []
    for scenario in SCENARIOS:
        points = _in_order(where[1] for where in table if where[0] == scenario.name)
        names = {where[2] for where in places if where[0] == scenario.name}
        rows = [
            (
                _TITLES[contender.name],
                *(_cell(table, failed, scenario, p, contender.name) for p in points),
            )
            for contender in CONTENDERS
            if contender.name in names
        ]
        if points:
            found.append(Grid(scenario, points, tuple(rows)))
    return found


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _cell(
    table: dict[Where, Summary],
    failed: set[Where],
    scenario: Scenario,
    point: str,
    name: str,
) -> str:
    where = (scenario.name, point, name)
    found, ours = table.get(where), table.get((scenario.name, point, REFERENCE))
    if found is None:
        return "failed" if where in failed else "-"
    spread = f"{number(found.median)} [{number(found.low)}..{number(found.high)}]"
    for extra in ("p99", "first", "last"):
        if extra in found.more:
            spread += f" {extra} {number(found.more[extra])}"
    if ours is None or name == REFERENCE:
        return spread
    return f"{spread} x{ratio(ours, found):.2f}"


def number(value: float) -> str:
    """Return a number as people read it."""
    if value != value:  # noqa: PLR0124 - not a number
        return "?"
    return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:.3g}"


def judged(run: Run) -> list[Comparison]:
    """Return the targets that a run can judge."""
    return list(comparisons(summaries(run)))


def show(console: Console, run: Run, *, targets: bool = True) -> None:
    """Print the tables of a run, what was missing, and the targets if they are wanted."""
    for grid in grids(run):
        table = Table(title=grid.caption, title_justify="left")
        for column in ("", *grid.points):
            table.add_column(column, overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    if any(True for _ in run.samples):
        console.print(f"x: {_TITLES[REFERENCE]} as a multiple of the other, round by round")
    for missing in run.missing:
        console.print(f"missing: {missing.contender}: {missing.reason}", markup=False)
    for reason in _reasons(run):
        console.print(reason, markup=False)
    if targets:
        _show_targets(console, judged(run))


def _reasons(run: Run) -> list[str]:
    texts = [
        f"failed: {failure.contender} in {failure.scenario} ({failure.point}): {failure.reason}"
        for failure in run.failures
    ]
    return list(_in_order(texts))


def _show_targets(console: Console, found: list[Comparison]) -> None:
    if not found:
        return
    table = Table(title="Targets", title_justify="left")
    for column in TARGET_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in map(target_row, found):
        table.add_row(*row)
    console.print(table)


def target_row(comparison: Comparison) -> tuple[str, ...]:
    """Return the cells of a target."""
    target = comparison.target
    low, high = comparison.spread
    sign = ">=" if target.better == "at least" else "<="
    return (
        target.text,
        comparison.point,
        number(comparison.ours),
        comparison.against or "-",
        "-" if comparison.other is None else number(comparison.other),
        f"{comparison.value:.2f} [{low:.2f}..{high:.2f}]",
        str(len(comparison.values)),
        f"{sign} {target.limit:g}",
        {True: "yes", False: "NO", None: "unclear"}[comparison.met],
    )

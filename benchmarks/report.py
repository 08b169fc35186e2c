"""The report on the terminal: a bar while it runs, tables when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .comparisons import Comparison, comparisons
from .contenders import CONTENDERS, by_name
from .measure import Summary, Turn, Where, ratio, summaries
from .records import Run
from .scenarios import SCENARIOS, Scenario

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
    """A table of text, with contenders down.

    Attributes:
        caption: The title, and how to read the cells.
        columns: The names of the columns; that of the contenders is empty.
        rows: The cells.
        headline: Whether it comes before the targets.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    headline: bool


def grids(run: Run) -> list[Grid]:
    """Return the tables of a run: median, quartiles, and ours as a multiple of the other."""
    table = summaries(run)
    failed = {(failure.scenario, failure.point, failure.contender) for failure in run.failures}
    found: list[Grid] = []
    for scenario in SCENARIOS:
        made = _by_point if scenario.columns else _all_points
        found += made(scenario, table, failed)
    return found


def _all_points(
    scenario: Scenario, table: dict[Where, Summary], failed: set[Where]
) -> Iterator[Grid]:
    """Yield one table with the points across."""
    points = _in_order(where[1] for where in table if where[0] == scenario.name)
    if not points:
        return
    rows = [
        (_TITLES[name], *(_cell(table, failed, (scenario.name, point, name)) for point in points))
        for name in _present([*table, *failed], scenario)
    ]
    caption = f"{scenario.title} ({scenario.unit}, {scenario.better} is better)"
    yield Grid(caption, ("", *points), tuple(rows), scenario.headline)


def _by_point(
    scenario: Scenario, table: dict[Where, Summary], failed: set[Where]
) -> Iterator[Grid]:
    """Yield a table for each point, with the scenario's numbers across."""
    for point in _in_order(where[1] for where in table if where[0] == scenario.name):
        rows = []
        for name in _present([*table, *failed], scenario, point):
            where = (scenario.name, point, name)
            more = table[where].more if where in table else {}
            numbers = [number(more[key]) if key in more else "-" for key in scenario.columns]
            title = f"{_TITLES[name]}{scenario.remark(by_name(name))}"
            rows.append((title, _cell(table, failed, where), *numbers))
        caption = f"{scenario.title}: {point} ({scenario.unit}, {scenario.better} is better)"
        columns = ("", scenario.unit, *scenario.columns.values())
        yield Grid(caption, columns, tuple(rows), scenario.headline)


def _present(places: Iterable[Where], scenario: Scenario, point: str | None = None) -> list[str]:
    """Return the names of those that took part, in the order of the tables."""
    names = {
        where[2] for where in places if where[0] == scenario.name and point in (None, where[1])
    }
    return [contender.name for contender in CONTENDERS if contender.name in names]


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _cell(table: dict[Where, Summary], failed: set[Where], where: Where) -> str:
    scenario, point, name = where
    found, ours = table.get(where), table.get((scenario, point, REFERENCE))
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
    """Print the headline of a run, the targets if they are wanted, and everything else."""
    made = grids(run)
    _show_grids(console, (grid for grid in made if grid.headline))
    if targets:
        _show_targets(console, judged(run))
    _show_grids(console, (grid for grid in made if not grid.headline))
    if any(True for _ in run.samples):
        console.print(f"x: {_TITLES[REFERENCE]} as a multiple of the other, round by round")
    for missing in run.missing:
        console.print(f"missing: {missing.contender}: {missing.reason}", markup=False)
    for reason in _reasons(run):
        console.print(reason, markup=False)


def _show_grids(console: Console, found: Iterable[Grid]) -> None:
    for grid in found:
        table = Table(title=grid.caption, title_justify="left")
        for column in grid.columns:
            table.add_column(column, overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


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

"""Fit a table to the width of a terminal, so that each row stays on one line.

Cells are cut first: of the columns that can be cut furthest, then of the others. If that is not
enough, there is room for the columns of the lowest rank, with values before those without.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = ["GAP", "Space", "fit", "note"]

GAP = 2
"""Blanks between two columns."""


class Space(NamedTuple):
    """What a column needs.

    Attributes:
        natural: The width that shows all of it.
        least: The width to which its cells may be cut.
        rank: Which columns get room first, the lowest before others; 0 for always.
        empty: No row has a value.
    """

    natural: int
    least: int
    rank: int = 0
    empty: bool = False


def fit(columns: Sequence[Space], width: int) -> dict[int, int]:
    """Return the width of each column that is shown, by its place.

    Args:
        columns: From left to right.
        width: Of the terminal, in characters.
    """
    kept = _kept(columns, width)
    widths = {place: columns[place].natural for place in kept}
    for least in sorted({columns[place].least for place in kept}):
        _cut(widths, {place: least for place in kept if columns[place].least == least}, width)
    # Not even the columns that stay have room: what can be cut is cut to what is left.
    _cut(
        widths, {place: 1 for place in kept if columns[place].least < columns[place].natural}, width
    )
    return widths


def note(hidden: int) -> str:
    """Return what to say about columns that are left out, if any are."""
    if not hidden:
        return ""
    return f"{hidden} column{' is' if hidden == 1 else 's are'} hidden: --format json shows all"


def _kept(columns: Sequence[Space], width: int) -> list[int]:
    """Return the places of the columns that are shown, as narrow as each can be."""
    kept: list[int] = []
    for place in sorted(range(len(columns)), key=lambda place: _order(columns[place])):
        wanted = [*kept, place]
        if not columns[place].rank or _total([columns[shown].least for shown in wanted]) <= width:
            kept = wanted
    return sorted(kept)


def _order(column: Space) -> tuple[bool, int]:
    return (column.empty and column.rank > 0, column.rank)


def _cut(widths: dict[int, int], leasts: dict[int, int], width: int) -> None:
    """Narrow some columns until the table fits, the widest of them first."""
    for _ in range(_total(widths.values()) - width):
        place = max(leasts, key=widths.__getitem__, default=None)
        if place is None or widths[place] <= leasts[place]:
            return
        widths[place] -= 1


def _total(widths: Collection[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)

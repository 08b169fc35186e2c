"""Data to stdout (or ``--out``): a table for people; json, ndjson or csv for programs.

Commands hand over rows: dicts whose keys are the documented, stable ones, with plain values. The
formats for programs write all of a row::

    a datetime    "2030-01-01T08:00:00+00:00", in UTC
    a timedelta   a number of seconds
    None          null; nothing in csv
    a list, dict  as it is; JSON text in csv

A table shows the columns that are named, all of them unless any are::

    COLUMNS = (Column("id"), Column("vt", "visible", render=lambda row: countdown(row)))
    app.emit(rows, COLUMNS)         app.emit_one(row)           app.show(produce, COLUMNS, every)

On a terminal up to 1,000 rows are fitted to the width (see `fit`); in a pipe, and where there
are more rows, it is plain text, a line for each row, nothing cut off. `Output.table` returns it for
a live view of your own, `text` renders any value as tables do, and `Output.console` is the rich
console of stdout.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import click

from .failures import USAGE, Failed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "FITTED",
    "FORMATS",
    "Column",
    "Columns",
    "Output",
    "Row",
    "Space",
    "aligned",
    "fit",
    "fitted",
    "note",
    "plain",
    "span",
    "text",
]

GAP = 2
"""Blanks between two columns."""

FORMATS = ("table", "json", "ndjson", "csv")

_LONGEST_CELL = 1000
"""Characters of a cell of a table; the formats for programs have everything."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, which a terminal may obey, except tab and line feed."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""The first characters of text that a spreadsheet takes for a formula.

See https://owasp.org/www-community/attacks/CSV_Injection.
"""

_NOTHING = "-"
"""Shown in a table for a missing value."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        key: Of the row.
        heading: The heading; default: the key.
        render: Converts the row to text; default: `text` of the value.
        right: Aligned to the right, as numbers are.
        style: Of rich, for the whole column.
        least: The width to which its cells may be cut on a narrow terminal; None for never.
        rank: Which columns get room first where that is not enough, the lowest before others; 0
            for always.
        wrap: Go on in a further line instead of cutting, for sentences.
    """

    key: str
    heading: str | None = None
    render: Callable[[Row], str] | None = None
    right: bool = False
    style: str | None = None
    least: int | None = None
    rank: int = 0
    wrap: bool = False

    @property
    def title(self) -> str:
        """The heading of the column."""
        return self.heading or self.key

    def cell(self, row: Row) -> str:
        """Return what the table shows."""
        return text(row.get(self.key)) if self.render is None else self.render(row)


Columns = Sequence[Column] | None

_PAIR = (Column("key", style="bold"), Column("value", least=10, wrap=True))
"""The columns of a single thing, which need no headings."""

FITTED = 1000
"""Up to how many rows are fitted to the width of a terminal; more are printed as in a pipe."""


def plain(value: Any) -> Any:
    """Return a value as the formats for programs have it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def text(value: Any) -> str:
    """Return a value as tables have it: on one line, with no control characters."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S%z")
    if isinstance(value, timedelta):
        return span(value.total_seconds())
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"))
    return _printable(str(value))


def _printable(value: str) -> str:
    """Return text with its control characters escaped."""
    if value.isprintable():
        return value
    return "".join(
        character if character.isprintable() else _escaped(character) for character in value
    )


def span(seconds: float) -> str:
    """Return a number of seconds as text for people: the two largest units."""
    sign, left = ("-", -seconds) if seconds < 0 else ("", seconds)
    if left < 10:  # noqa: PLR2004 - below this, tenths matter
        return f"{sign}{left:.1f}s"
    left, parts = round(left), []
    for name, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{name}")
    return sign + " ".join(parts[:2])


def _cut(value: str) -> str:
    """Return text that is no longer than a cell of a table may be."""
    if len(value) <= _LONGEST_CELL:
        return value
    return f"{value[:_LONGEST_CELL]}… ({len(value):,} characters; --format json has all)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def abandon_stdout() -> None:
    """Redirect stdout to the null device, after its reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def abandon_full_stdout() -> None:
    """Flush stdout, or abandon it: Python would try again at exit, and print an error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        abandon_stdout()


class Output:
    """The file for data, and the format."""

    def __init__(self, format: str, path: str | None) -> None:
        self.format = format
        self._path = None if path == "stdout" else path
        self._file: IO[str] | None = None

    def check(self) -> None:
        """Refuse to begin where nothing can be written.

        Raises:
            Failed: the process was started with its stdout closed, and there is no ``--out``.
        """
        if self._path is None and sys.stdout is None:
            raise Failed("stdout is closed", hint="redirect it, as > /dev/null, or give --out FILE")

    @property
    def file(self) -> IO[str]:
        """The file of ``--out``, or stdout."""
        if self._path is None:
            return sys.stdout
        if self._file is None:
            try:
                self._file = open(self._path, "w", encoding="utf-8", newline="")  # noqa: PTH123, SIM115
            except OSError as error:
                raise Failed(f"--out cannot be opened: {error}", code=USAGE) from error
        return self._file

    @property
    def console(self) -> Console:
        """A rich console on stdout; outside a terminal it wraps and colours nothing."""
        from rich.console import Console  # noqa: PLC0415 - of the extra `cli`, and slow

        if self.file.isatty():
            return Console(file=self.file)
        return Console(file=self.file, width=1_000_000, no_color=True, force_terminal=False)

    def close(self) -> None:
        """Close the file of ``--out``.

        Raises:
            OSError: what was left to write did not fit.
        """
        if self._file is not None:
            self._file.close()

    def emit(self, rows: Sequence[Row], columns: Columns = None, keys: Sequence[str] = ()) -> None:
        """Write a list. ``keys`` are the header of csv where there are no rows to take it from."""
        if self.format == "table":
            self._print(rows, columns)
        elif self.format == "json":
            self._line(_json(rows, indent=2))
        elif self.format == "ndjson":
            for row in rows:
                self._line(_json(row))
        else:
            self._csv(rows, keys)
        self.file.flush()

    def emit_one(self, row: Row, columns: Columns = None) -> None:
        """Write one thing: an object rather than a list of one, a table of two columns."""
        if self.format == "json":
            self._line(_json(row, indent=2))
            self.file.flush()
        elif self.format == "table":
            shown = columns or [Column(key) for key in row]
            pairs = [{"key": column.title, "value": column.cell(row)} for column in shown]
            self._print(pairs, _PAIR)
        else:
            self.emit([row], columns)

    def table(self, rows: Sequence[Row], columns: Columns = None) -> Table:
        """Return rows as a table of rich, as wide as the console or less."""
        shown = _shown(rows, columns)
        cells = [[_cut(column.cell(row)) for column in shown] for row in rows]
        return fitted(shown, cells, self.console.width)

    def watch(
        self,
        produce: Callable[[], Sequence[Row]],
        columns: Columns,
        every: timedelta,
        keys: Sequence[str] = (),
    ) -> None:
        """Write a list again and again, until interrupted."""
        if self.format != "table" or not self.file.isatty():
            while True:
                self.emit(produce(), columns, keys)
                time.sleep(every.total_seconds())
        from rich.live import Live  # noqa: PLC0415

        with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                live.update(self.table(produce(), columns), refresh=True)
                time.sleep(every.total_seconds())

    def _print(self, rows: Sequence[Row], columns: Columns) -> None:
        if self.file.isatty() and len(rows) <= FITTED:
            self.console.print(self.table(rows, columns))
            return
        shown = _shown(rows, columns)
        headings = None if columns is _PAIR else [column.title.upper() for column in shown]
        cells = [[_cut(column.cell(row)) for column in shown] for row in rows]
        right = {place for place, column in enumerate(shown) if column.right}
        self.lines(aligned(headings, cells, right))

    def lines(self, lines: Iterable[str]) -> None:
        """Write text as it is."""
        self._line("\n".join(lines))
        self.file.flush()

    def _csv(self, rows: Sequence[Row], keys: Sequence[str]) -> None:
        header = list(rows[0]) if rows else keys
        if not header:
            return
        writer = csv.writer(self.file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([_csv_cell(plain(value)) for value in row.values()])

    def _line(self, line: str) -> None:
        click.echo(line, file=self.file)


def _shown(rows: Sequence[Row], columns: Columns) -> Sequence[Column]:
    keys = rows[0] if rows else ()
    return columns or [Column(key, rank=place) for place, key in enumerate(keys)]


def fitted(
    columns: Sequence[Column],
    cells: Sequence[Sequence[str]],
    width: int,
    styles: Sequence[str] = (),
    *,
    noted: bool = True,
) -> Table:
    """Return a table of rich that is no wider than a terminal.

    Args:
        columns: All that there are.
        cells: Those of each row.
        width: Of the terminal.
        styles: Of each row; default: none.
        noted: Say below it how many columns are hidden.
    """
    from rich import box  # noqa: PLC0415 - of the extra `cli`, and slow
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    widths = fit([_space(column, place, cells) for place, column in enumerate(columns)], width)
    caption = note(len(columns) - len(widths)) if noted else ""
    made = Table(
        box=box.SIMPLE_HEAD,
        show_header=columns is not _PAIR,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        caption=Text(caption, style="dim") if caption else None,
        caption_justify="left",
    )
    for place, given in widths.items():
        column = columns[place]
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            style=column.style,
            width=given,
            no_wrap=not column.wrap,
            overflow="fold" if column.wrap else "ellipsis",
        )
    for row, style in zip(cells, styles or [""] * len(cells), strict=True):
        # Text, not str: what looks like markup is data.
        made.add_row(*(Text(row[place]) for place in widths), style=style or None)
    return made


def _space(column: Column, place: int, cells: Sequence[Sequence[str]]) -> Space:
    from rich.cells import cell_len  # noqa: PLC0415 - of the extra `cli`, and slow

    title = cell_len(column.title)
    natural = max([title, *(cell_len(row[place]) for row in cells)])
    least = natural if column.least is None else min(natural, max(title, column.least))
    empty = all(row[place] == _NOTHING for row in cells)
    return Space(natural, least, column.rank, empty)


class Space(NamedTuple):
    """The widths of a column.

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
    """Return the width of each column that is shown, by its place: each row stays on one line.

    Cells are cut first: of the columns that can be cut furthest, then of the others. If that is not
    enough, there is room for the columns of the lowest rank, with values before those without.

    Args:
        columns: From left to right.
        width: Of the terminal, in characters.
    """
    kept = _kept(columns, width)
    widths = {place: columns[place].natural for place in kept}
    for least in sorted({columns[place].least for place in kept}):
        _narrow(widths, {place: least for place in kept if columns[place].least == least}, width)
    # Not even the columns that stay have room: what can be cut is cut to what is left.
    _narrow(
        widths, {place: 1 for place in kept if columns[place].least < columns[place].natural}, width
    )
    return widths


def note(hidden: int) -> str:
    """Return the text about hidden columns, or an empty text."""
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


def _narrow(widths: dict[int, int], leasts: dict[int, int], width: int) -> None:
    """Narrow some columns until the table fits, the widest of them first."""
    for _ in range(_total(widths.values()) - width):
        place = max(leasts, key=widths.__getitem__, default=None)
        if place is None or widths[place] <= leasts[place]:
            return
        widths[place] -= 1


def _total(widths: Collection[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def aligned(
    headings: Sequence[str] | None, rows: Sequence[Sequence[str]], right: Collection[int]
) -> Iterator[str]:
    """Yield a table as lines, one for each row: rich takes a millisecond for a row.

    Args:
        headings: Over the columns.
        rows: The cells of each row.
        right: Which columns are aligned to the right, counted from 0.
    """
    from rich.cells import cell_len  # noqa: PLC0415 - of the extra `cli`, and slow

    lines = [*([] if headings is None else [headings]), *rows]
    widths = [max(map(cell_len, cells), default=0) for cells in zip(*lines, strict=True)]
    for cells in lines:
        padded = []
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            blanks = " " * (width - cell_len(cell))
            padded.append(blanks + cell if place in right else cell + blanks)
        yield "  ".join(padded).rstrip()


def _csv_cell(value: Any) -> Any:
    """Return a cell without control characters, which no spreadsheet takes for a formula."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    return _CONTROL.sub(lambda found: _escaped(found[0]), _unformulated(value))


def _unformulated(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def _json(value: Any, **options: Any) -> str:
    """Return JSON text; control characters that JSON would let through are escaped."""
    made = json.dumps(plain(value), ensure_ascii=False, **options)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", made)

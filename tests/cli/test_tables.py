"""A table on a terminal has a line for each row, and keeps what names a row at any width."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pgqrs_sa.cli import output, views
from pgqrs_sa.cli.output import GAP, Space, fit
from pgqrs_sa.cli.queries import QueueActivity
from pgqrs_sa.cli.top import Frame
from support.cases import each_case

WIDTHS = [200, 120, 80, 50, 30]
ANSI = re.compile(r"\x1b\[[0-9;]*m")
HIDDEN = re.compile(r"(\d+) columns? (?:is|are) hidden:\s+--format\s+json\s+shows\s+all")
MOMENT = datetime(2030, 1, 31, 9, tzinfo=UTC)

MESSAGE: dict[str, Any] = {
    "id": 1_234_567,
    "queue": "reminders",
    "state": "scheduled",
    "visible_in_seconds": 5400.0,
    "payload": {"user": 7, "text": "please water the plants " * 10},
    "headers": None,
    "priority": 0,
    "vt": MOMENT,
    "enqueued_at": MOMENT,
    "read_ct": 0,
    "max_read_ct": 5,
    "key": None,
    "last_error": None,
    "worker_id": None,
    "producer_id": None,
    "dequeued_at": None,
    "leased_until": None,
}
QUEUE: dict[str, Any] = {
    "id": 1_234_567,
    "name": "reminders",
    "lease_seconds": 30.0,
    "max_read_ct": 5,
    "retention_seconds": None,
    "max_payload_bytes": 1_048_576,
    "created_at": MOMENT,
    "paused_at": MOMENT,
}
SETTLED = MESSAGE | {"outcome": "archived", "reason": "x " * 99}
SETTLED["archived_at"] = MOMENT


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Print rows on a terminal of a width; return the lines."""

    def printed(width: int, rows: list[Any], columns: output.Columns) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        output.Output("table", None).emit(rows, columns)
        return ANSI.sub("", capsys.readouterr().out).splitlines()

    return printed


def hidden(lines: list[str]) -> int:
    found = HIDDEN.search("\n".join(lines))
    return int(found[1]) if found else 0


@each_case("width", WIDTHS)
@each_case(
    ("row", "columns", "kept"),
    [
        (MESSAGE, views.MESSAGES, ["1234567", "reminders"]),
        (QUEUE, views.QUEUES, ["1234567", "reminders"]),
        (SETTLED | {"id": 1_234_567}, views.ARCHIVED, ["1234567", "reminders"]),
    ],
)
def test_a_row_takes_one_line_and_keeps_its_name(terminal, width, row, columns, kept):
    rows = [row] * 3
    lines = terminal(width, rows, columns)
    assert max(map(len, lines)) <= width
    named = [line for line in lines if all(text in line for text in kept)]
    assert len(named) == len(rows)
    headings = re.split(r" {2,}", lines[0].strip())
    assert len(headings) + hidden(lines) == len(columns)
    notes = 2 if hidden(lines) else 0  # lines, on a narrow terminal
    assert len(lines) <= len(rows) + 2 + notes
    for line in named:
        # A time is shown whole or not at all.
        assert len(re.findall(r"\d{4}-\d\d-\d\d", line)) == line.count("+0000")


def test_all_columns_are_shown_where_there_is_room(terminal):
    row = MESSAGE | {"payload": 1}
    lines = terminal(140, [row], views.MESSAGES)
    assert hidden(lines) == 0
    assert "…" not in "".join(lines)


def test_the_payload_is_cut_before_anything_else(terminal):
    wide = MESSAGE | {"queue": "reminders-of-a-long-name", "key": "k" * 20}
    lines = terminal(160, [wide], views.MESSAGES)
    assert hidden(lines) == 0
    assert wide["queue"] in lines[2]
    assert wide["key"] in lines[2]
    assert '{"user":7' in lines[2]
    assert "…" in lines[2]


def test_columns_without_values_are_left_out_first(terminal):
    lines = terminal(80, [MESSAGE | {"worker_id": 3}], views.MESSAGES)
    assert "worker" in lines[0]
    assert "last error" not in lines[0]


def test_a_single_thing_is_shown_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.Output("table", None).emit_one({"id": 7, "payload": "x" * 100})
    shown = ANSI.sub("", capsys.readouterr().out)
    assert shown.count("x") == 100
    assert max(map(len, shown.splitlines())) <= 30


@each_case("width", WIDTHS)
@each_case("height", [None, 24])
def test_top_keeps_the_names_of_the_queues(width, height):
    class App:
        target = "db.example.internal:5432/shop"

    names = ["reminders", "reports"]
    frame = Frame(App(), timedelta(seconds=2))  # type: ignore[arg-type]
    frame.queues = [
        QueueActivity(
            queue=name,
            paused=False,
            ready=10_000,
            leased=12,
            scheduled=0,
            exhausted=0,
            dead=10_000,
            dead_capped=True,
            oldest_ready_age=timedelta(days=3, hours=4),
            incoming=12.5,
            outgoing=(1.0,) * 8,
        )
        for name in names
    ]
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(frame.render(width, height=height))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    for name in names:
        (line,) = [line for line in lines if name in line]
        assert "10000" in line
    assert bool([line for line in lines if "hidden" in line]) is (width < 80)


SPACES = st.lists(
    st.builds(
        lambda natural, cut, rank, empty: Space(natural, max(1, natural - cut), rank, empty),
        st.integers(1, 60),
        st.integers(0, 60),
        st.integers(0, 5),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def total(widths: list[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


@given(columns=SPACES, width=st.integers(1, 300))
def test_what_is_shown_fits_and_leaves_out_no_more_than_it_must(columns, width):
    widths = fit(columns, width)
    always = [place for place, column in enumerate(columns) if not column.rank]
    assert list(widths) == sorted(widths)
    assert set(always) <= set(widths)
    assert all(1 <= given <= columns[place].natural for place, given in widths.items())
    if total([columns[place].least for place in always]) <= width:
        assert total(list(widths.values())) <= width
        assert all(given >= columns[place].least for place, given in widths.items())
        least = [columns[place].least for place in widths]
        for place in set(range(len(columns))) - set(widths):
            assert total([*least, columns[place].least]) > width
    if total([column.natural for column in columns]) <= width:
        assert widths == {place: column.natural for place, column in enumerate(columns)}

"""What the command line shows of large tables, and for how long it looks."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from rich.console import Console

from pgqrs_sa.cli import output


@pytest.fixture
def filled(pgqrs, work, engine):
    """A queue with 10,001 dead letters and as many settled messages."""
    with work() as service:
        service.queues.create("mail")
    with engine.begin() as connection:
        for outcome, before in (("dead", 0), ("archived", 20_000)):
            connection.execute(
                sa.text(
                    "INSERT INTO pgqrs_archive (id, queue_id, payload, outcome)"
                    " SELECT :before + g, 1, '1', :outcome FROM generate_series(1, 10001) g"
                ),
                {"outcome": outcome, "before": before},
            )
    return pgqrs


def test_a_count_that_is_cut_off_has_a_plus(filled):
    shown = filled("queue", "metrics").stdout
    assert " 10000+ " in shown
    row = filled.json("queue", "metrics", "mail")
    assert (row["dead"], row["capped"]) == (10_000, ["archived", "dead"])
    assert " 10000+ " in filled("top", "--once").stdout
    (queue,) = filled.json("top", "--once")["queues"]
    assert (queue["dead"], queue["dead_capped"]) == (10_000, True)
    assert filled.json("admin", "stats")["capped"] == ["archived", "dead"]


def test_the_archive_is_counted_to_the_end_on_request(filled):
    for args in (["queue", "metrics", "--exact"], ["queue", "metrics", "mail", "--exact"]):
        found = filled.json(*args)
        (row,) = found if isinstance(found, list) else [found]
        assert (row["dead"], row["archived"], row["capped"]) == (10_001, 10_001, [])
    stats = filled.json("admin", "stats", "--exact")
    assert (stats["dead"], stats["archived"], stats["capped"]) == (10_001, 10_001, [])
    assert filled.json("archive", "count", "mail")["count"] == 20_002


@pytest.mark.parametrize("command", ["message", "archive", "dead"])
def test_content_may_be_left_out_of_a_list(pgqrs, work, command):
    with work() as service:
        service.queues.create("mail")
        service.enqueue("mail", "secret", headers={"h": "secret"})
        service.enqueue("mail", "secret", priority=-1)
        service.fail(service.dequeue("mail")[0], "secret", dead=True)
    assert "secret" in pgqrs(command, "list").stdout
    assert "secret" not in pgqrs(command, "list", "--no-content").stdout
    (row,) = pgqrs.json(command, "list", "--no-content")
    assert set(row) == set(pgqrs.json(command, "list")[0])
    assert (row["payload"], row["headers"], row["last_error"]) == (None, None, None)


@pytest.mark.parametrize("command", ["message", "archive"])
def test_a_list_gives_up_after_its_timeout(pgqrs, work, engine, command):
    with work() as service:
        service.queues.create("mail")
    table = {"message": "pgqrs_messages", "archive": "pgqrs_archive"}[command]
    with engine.connect() as connection:
        connection.execute(sa.text(f"LOCK TABLE {table}"))
        result = pgqrs(command, "list", "--timeout", "0.2s", code=1)
    assert "no answer within 0.2 s" in result.stderr
    assert "hint: " in result.stderr
    pgqrs(command, "list", "--timeout", "0")


def test_a_long_table_is_not_left_to_rich(pgqrs, engine, monkeypatch):
    """It takes a millisecond for each row."""
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO pgqrs_queues (queue_name) SELECT 'q' || generate_series(1, 10000)")
        )
    monkeypatch.setattr(Console, "print", None)
    assert len(pgqrs("top", "--once").stdout.splitlines()) == 10_005
    lines = pgqrs("queue", "list").stdout.splitlines()
    assert len(lines) == 10_001
    assert {len(line.split()) for line in lines[1:]} == {len(lines[1].split())}


def test_a_table_in_a_pipe_is_aligned_by_what_is_seen():
    rows = [["7", "\u65e5\u672c", "x"], ["10", "ab", "-"]]
    assert list(output.aligned(["ID", "PAYLOAD", "KEY"], rows, {0})) == [
        "ID  PAYLOAD  KEY",
        " 7  \u65e5\u672c     x",
        "10  ab       -",
    ]


def test_a_terminal_shows_a_long_table_line_by_line(monkeypatch, capsys):
    shown = output.Output("table", None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rows = [{"id": n, "payload": "x" * 300} for n in range(output.FITTED + 1)]
    shown.emit(rows)
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), len(lines[-1])) == (len(rows) + 1, 306)

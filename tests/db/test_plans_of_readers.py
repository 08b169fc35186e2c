"""What looking costs does not grow with queues times messages, nor with the archive.

Pages and rows are counted, not seconds: they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa._core.sql import counts, health, queries
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from support.cases import each_case

from .test_plans import explain, nodes

TABLES = tables_of(READY_MADE)
STEP = {"since": timedelta(seconds=2), "step": timedelta(seconds=2), "step_seconds": 2.0}

QUEUES = "INSERT INTO pgqrs_queues (queue_name) SELECT 'q' || g FROM generate_series(1, :queues) g"
LIVE = """
    INSERT INTO pgqrs_messages
        (queue_id, payload, vt, read_ct, max_read_ct, dequeued_at, leased_until)
    SELECT 1 + g % :queues, '{"n": 1}',
        statement_timestamp()
            + CASE WHEN g % 97 BETWEEN 5 AND 9 THEN 1 ELSE -1 END * interval '1 hour',
        CASE WHEN g % 97 < 7 THEN 1 WHEN g % 97 < 12 THEN 5 ELSE 0 END,
        CASE WHEN g % 97 < 12 THEN 5 END,
        CASE WHEN g % 97 < 5 THEN statement_timestamp() END,
        CASE WHEN g % 97 < 5 THEN statement_timestamp() + interval '1 hour' END
    FROM generate_series(1, :rows) g"""
SETTLED = """
    INSERT INTO pgqrs_archive
        (id, queue_id, payload, vt, read_ct, max_read_ct, archived_at, outcome)
    SELECT g + :rows, 1 + g % :queues, '{"n": 1}', statement_timestamp(), 1, 5,
        statement_timestamp() - (:rows - g) * interval '1 s',
        CASE WHEN g % 89 = 0 THEN 'dead' WHEN g % 89 = 1 THEN 'cancelled' ELSE 'archived' END
    FROM generate_series(1, :rows) g"""


@dataclass(frozen=True)
class Size:
    rows: int
    queues: int
    analysed: bool = True


def size(rows: int, queues: int, *, analysed: bool = True) -> Any:
    name = f"{rows}_in_{queues}_{'analysed' if analysed else 'never_analysed'}"
    marks = [pytest.mark.long] if rows > 100_000 else []
    return pytest.param(Size(rows, queues, analysed), id=name, marks=marks)


@pytest.fixture(
    scope="module",
    params=[
        size(40_000, 20),
        size(40_000, 20, analysed=False),
        size(40_000, 1_000),
        size(1_000_000, 20),
        size(1_000_000, 20, analysed=False),
        size(1_000_000, 10_000),
        size(1_000_000, 10_000, analysed=False),
    ],
)
def loaded(request: pytest.FixtureRequest, kept: Any) -> Iterator[tuple[Size, sa.Connection]]:
    wanted = request.param
    with reading_connection(kept) as connection:
        renew(connection)
        for statement in (QUEUES, LIVE, SETTLED):
            values = {"rows": wanted.rows, "queues": wanted.queues}
            text = sa.text(statement)
            named = text.compile().params.keys()
            connection.execute(text, {key: values[key] for key in named})
        if wanted.analysed:
            connection.exec_driver_sql("VACUUM ANALYZE")
        yield wanted, connection
        renew(connection)


def reading_connection(database: Any) -> Any:
    # Without parallel workers, a scan is one node that runs once.
    options = {"options": "-c max_parallel_workers_per_gather=0"}
    engine = sa.create_engine(database.url, connect_args=options, poolclass=sa.NullPool)
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def renew(connection: sa.Connection) -> None:
    """Empty the tables, and forget what was known about their contents."""
    names = ", ".join(table.name for table in TABLES)
    connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    for table in ("pgqrs_messages", "pgqrs_archive"):
        connection.exec_driver_sql(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        known = sa.text("DELETE FROM pg_statistic WHERE starelid = CAST(:name AS regclass)")
        connection.execute(known, {"name": table})


def pages(plan: dict[str, Any]) -> int:
    found: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return found


def pages_of(connection: sa.Connection, table: str) -> int:
    found: int = connection.exec_driver_sql(
        f"SELECT pg_relation_size('{table}') / current_setting('block_size')::int"
    ).scalar_one()
    return found


def looked_at(plan: dict[str, Any], table: str) -> tuple[int, int]:
    """How often a table was scanned as a whole, and how many rows of it were read by an index."""
    scans, rows = 0, 0
    for node in nodes(plan):
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] == table:
            scans += node["Actual Loops"]
        elif node.get("Index Name", "").startswith(f"{table}_"):
            read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            rows += round(read * node["Actual Loops"])
    return scans, rows


def test_all_queues_are_counted_by_one_read_of_the_messages(
    loaded: tuple[Size, sa.Connection],
) -> None:
    wanted, connection = loaded
    whole = pages_of(connection, "pgqrs_messages")
    for statement in (
        queries.metrics(TABLES, one_queue=False),
        health.overview(TABLES),
        health.backlog(TABLES),
    ):
        given = {key: STEP[key] for key in STEP if key in statement.compile().params}
        plan = explain(connection, statement, given)
        assert looked_at(plan, "pgqrs_messages") == (1, 0)
        scans, rows = looked_at(plan, "pgqrs_archive")
        most = min(counts.MOST, counts.MOST_OF_ALL // wanted.queues)
        assert scans == 0
        # For each queue: of each outcome one more than the most, and as many more of all.
        assert rows <= 4 * wanted.queues * (most + 1) + wanted.rows // 20
        # An index page for each look of a queue, and what the rows are on if vacuum was not there.
        assert pages(plan) <= whole + 20 * wanted.queues + rows + 100


def test_what_flowed_out_just_now_is_read_by_one_look_for_each_queue(
    loaded: tuple[Size, sa.Connection],
) -> None:
    wanted, connection = loaded
    values = {key: STEP[key] for key in ("step", "step_seconds")}
    plan = explain(connection, health.outflow(TABLES), values)
    scans, rows = looked_at(plan, "pgqrs_archive")
    assert (scans, rows) <= (0, 100)
    assert pages(plan) <= 5 * wanted.queues + 100


def test_one_queue_is_counted_by_its_own_entries(loaded: tuple[Size, sa.Connection]) -> None:
    wanted, connection = loaded
    statement = queries.metrics(TABLES, one_queue=True)
    plan = explain(connection, statement, {"queue_id": 2})
    own = wanted.rows // wanted.queues
    scans, rows = looked_at(plan, "pgqrs_messages")
    assert (scans, rows <= own) == (0, True), rows
    scans, rows = looked_at(plan, "pgqrs_archive")
    assert (scans, rows <= min(own, 2 * counts.MOST) * 2) == (0, True), rows
    assert pages(plan) <= 3 * own + 200


@each_case("state", [None, "ready", "scheduled", "leased", "exhausted"])
def test_counting_the_messages_of_a_queue_reads_that_queue(
    loaded: tuple[Size, sa.Connection], state: Any
) -> None:
    wanted, connection = loaded
    found = queries.find(TABLES, in_queue=True, state=state, by_payload=False)
    values = {"queue_id": 2, "after": 0, "limit": None}
    plan = explain(connection, queries.count(found), values)
    scans, rows = looked_at(plan, "pgqrs_messages")
    # Its entries twice: both halves of the order index's predicate lead to it.
    assert (scans, rows <= 2 * (wanted.rows // wanted.queues) + 10) == (0, True), rows


@each_case("in_queue", [True, False])
def test_what_is_exhausted_is_found_by_one_read_of_what_is_live(
    loaded: tuple[Size, sa.Connection], in_queue: bool
) -> None:
    wanted, connection = loaded
    found = queries.find(TABLES, in_queue=in_queue, state="exhausted", by_payload=False)
    given = {"after": 0, "limit": 100} | ({"queue_id": 2} if in_queue else {})
    plan = explain(connection, found, given)
    there = wanted.rows * 2 // 97 // (wanted.queues if in_queue else 1)
    # No index tells it: a lease counts the attempt, and would have to write its entry.
    live = wanted.rows // wanted.queues + 1 if in_queue else 0
    scans, rows = looked_at(plan, "pgqrs_messages")
    assert (scans, rows <= live + 3 * there + 10) == (0 if in_queue else 1, True), rows

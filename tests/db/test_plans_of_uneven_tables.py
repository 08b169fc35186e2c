"""What looking and pruning cost in tables of which one queue has nearly all, or nearly nothing.

The planner knows the average queue. These are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa._core.sql import archive, counts, health, queries
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE

from .test_plans import explain
from .test_plans_of_readers import (
    LIVE,
    QUEUES,
    SETTLED,
    STEP,
    looked_at,
    pages,
    reading_connection,
    renew,
)

TABLES = tables_of(READY_MADE)


@pytest.fixture
def unequal(kept: Any) -> Iterator[sa.Connection]:
    """Two queues; the second has a hundredth of all messages, and no third exists to compare."""
    with reading_connection(kept) as connection:
        renew(connection)
        connection.execute(sa.text(QUEUES), {"queues": 2})
        connection.execute(sa.text(LIVE), {"queues": 1, "rows": 30_000})
        connection.execute(sa.text(SETTLED), {"queues": 1, "rows": 30_000})
        for table in ("pgqrs_messages", "pgqrs_archive"):
            connection.execute(
                sa.text(f"UPDATE {table} SET queue_id = 2 WHERE id % 100 = 0")  # noqa: S608
            )
        connection.exec_driver_sql("VACUUM ANALYZE")
        yield connection
        renew(connection)


def test_a_small_queue_beside_a_large_one_is_counted_by_its_own_entries(
    unequal: sa.Connection,
) -> None:
    plan = explain(unequal, queries.metrics(TABLES, one_queue=True), {"queue_id": 2})
    scans, rows = looked_at(plan, "pgqrs_messages")
    assert (scans, rows <= 300) == (0, True), rows
    found = queries.find(TABLES, in_queue=True, state=None, by_payload=False)
    plan = explain(unequal, queries.count(found), {"queue_id": 2, "after": 0, "limit": None})
    assert looked_at(plan, "pgqrs_messages")[0] == 0


@pytest.mark.parametrize("analysed", [True, False])
def test_dead_letters_of_one_queue_are_not_looked_for_in_the_others(
    kept: Any, analysed: bool
) -> None:
    """Where nearly all are dead, the planner expects to meet one at every step of a scan."""
    with reading_connection(kept) as connection:
        renew(connection)
        connection.execute(sa.text(QUEUES), {"queues": 20})
        connection.execute(sa.text(SETTLED), {"queues": 1, "rows": 30_000})
        connection.exec_driver_sql("UPDATE pgqrs_archive SET outcome = 'dead'")
        if analysed:
            connection.exec_driver_sql("ANALYZE pgqrs_archive")
        for statement in (queries.metrics(TABLES, one_queue=False), health.overview(TABLES)):
            given = {key: STEP[key] for key in STEP if key in statement.compile().params}
            plan = explain(connection, statement, given)
            scans, rows = looked_at(plan, "pgqrs_archive")
            assert (scans, rows <= 3 * (counts.MOST + 1)) == (0, True), rows
        renew(connection)


@pytest.mark.parametrize("by_retention", [True, False])
@pytest.mark.parametrize("one_queue", [True, False])
@pytest.mark.parametrize("analysed", [True, False])
def test_a_chunk_of_a_prune_reads_what_it_deletes(
    kept: Any, one_queue: bool, by_retention: bool, analysed: bool
) -> None:
    """And nothing of what is kept: not of other queues, not of what is younger."""
    chunk = 1_000
    with reading_connection(kept) as connection:
        renew(connection)
        connection.execute(sa.text(QUEUES), {"queues": 3})
        connection.execute(sa.text(SETTLED), {"queues": 3, "rows": 60_000})
        # The first keeps for ever, or is young; of the others most is to go.
        connection.exec_driver_sql(
            "UPDATE pgqrs_queues SET retention_seconds = 3600 WHERE id > 1;"
            "UPDATE pgqrs_archive SET archived_at = archived_at + interval '1 day'"
            " WHERE queue_id = 1"
        )
        if analysed:
            connection.exec_driver_sql("VACUUM ANALYZE pgqrs_archive")
        values: dict[str, Any] = {"limit": chunk}
        if one_queue:
            values["queue"] = "q2"
        if not by_retention:
            values["older_than"] = timedelta(hours=1)
        statement = archive.prune(TABLES, one_queue=one_queue)
        if by_retention:
            statement = archive.prune_by_retention(TABLES, failed=False, one_queue=one_queue)
        for _ in range(3):
            plan = explain(connection, statement, values)
            scans, rows = looked_at(plan, "pgqrs_archive")
            # Once to choose, once to delete. A planner that knows nothing of the table takes a few
            # rows to be old, and sorts all of a queue that are.
            most = 2 * chunk if analysed else 40_000
            assert (scans, rows <= most) == (0, True), rows
            assert pages(plan) <= 8 * chunk
        renew(connection)

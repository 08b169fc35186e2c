"""What a call reads must not depend on what is in the tables: backlog, schedule, archive.

The statements are those that the service sends, caught on their way and run again under EXPLAIN.
What the planner makes of each state of its statistics is in tests/db/test_plans.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import Delivery, Item, QueueService
from pgqrs_sa._core import cursors
from support.results import Results
from support.servers import Address, OwnServer, run_sql

FILL = """
INSERT INTO pgqrs_messages (queue_id, payload, vt, priority)
SELECT (SELECT id FROM pgqrs_queues WHERE queue_name = :queue), '{"n": 1}',
    statement_timestamp() + :ahead * interval '1 h' + n * interval '1 us' * sign(:ahead), 0
FROM generate_series(1, :rows) AS n
"""
KEEP = """
INSERT INTO pgqrs_archive (id, queue_id, payload, read_ct, max_read_ct, archived_at)
SELECT -n, (SELECT id FROM pgqrs_queues WHERE queue_name = :queue), '{"n": 1}', 1, 5,
    statement_timestamp() - n * interval '1 us'
FROM generate_series(1, :rows) AS n
"""
BATCH = 50
CALLS: dict[str, tuple[Callable[[QueueService, list[Delivery]], Any], int]] = {
    "enqueue, key": (lambda queue, _: queue.enqueue("mail", {}, key="one"), 1),
    "enqueue 50": (
        lambda queue, _: queue.enqueue_many("mail", [Item(n) for n in range(BATCH)]),
        BATCH,
    ),
    "dequeue 1": (lambda queue, _: queue.dequeue("mail"), 1),
    "dequeue 50": (lambda queue, _: queue.dequeue("mail", BATCH), BATCH),
    "dequeue, empty queue": (lambda queue, _: queue.dequeue("empty"), 1),
    "extend 50": (lambda queue, held: queue.extend_many(held, 60), BATCH),
    "release 50": (lambda queue, held: queue.release_many(held), BATCH),
    "fail 50": (lambda queue, held: queue.fail_many(held, "broken"), BATCH),
    "archive 50": (lambda queue, held: queue.archive_many(held), BATCH),
    "bury, none": (lambda queue, _: queue.archived.bury("mail"), 1),
    "prune, none": (lambda queue, _: queue.archived.prune(3600, queue="mail"), 1),
}


@dataclass(frozen=True)
class Amount:
    """How many messages are ready, wait for their time, and are in the archive."""

    ready: int
    scheduled: int = 0
    archived: int = 0

    def __str__(self) -> str:
        return f"{self.ready} ready, {self.scheduled} scheduled, {self.archived} archived"


AMOUNTS = [
    pytest.param(Amount(1_000), id="1k"),
    pytest.param(Amount(1_000, 20_000, 20_000), id="1k, others"),
    pytest.param(Amount(100_000), id="100k", marks=pytest.mark.long),
    pytest.param(Amount(1_000_000), id="1M", marks=pytest.mark.long),
    pytest.param(Amount(1_000, 1_000_000, 1_000_000), id="1k, 1M others", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def results(own: OwnServer, chaos_results: Callable[..., Results]) -> Results:
    ((version,),) = run_sql(own.address, "SHOW server_version")
    counts = ["buffers", "rate", "percent_of_rate"]
    return chaos_results("scale", postgresql=version, counts=counts)


@pytest.fixture
def filled(request: pytest.FixtureRequest, address: Address, engine: sa.Engine) -> Iterator[Amount]:
    amount: Amount = request.param
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("empty")
    run_sql(address, FILL, queue="mail", rows=amount.ready, ahead=0)
    run_sql(address, FILL, queue="mail", rows=amount.scheduled, ahead=1)
    run_sql(address, KEEP, queue="mail", rows=amount.archived)
    run_sql(address, "VACUUM ANALYZE")
    yield amount
    engine.dispose()
    run_sql(replace(address, dbname="postgres"), f'DROP DATABASE "{address.dbname}"')


@contextmanager
def caught(engine: sa.Engine) -> Iterator[list[tuple[str, Any]]]:
    """The statements about messages that are sent, with their parameters."""
    found: list[tuple[str, Any]] = []

    def note(_c: object, _u: object, statement: str, parameters: Any, *_: object) -> None:
        if "pgqrs_messages" in statement or "pgqrs_archive" in statement:
            found.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "before_cursor_execute", note)


def plans(engine: sa.Engine, call: Callable[[QueueService, list[Delivery]], Any], held: int) -> Any:
    """Run a call and take it back; run its statements under EXPLAIN, and take them back."""
    with Session(engine) as session:
        service = QueueService(session)
        deliveries = service.dequeue("mail", held) if held else []
        with caught(engine) as statements, session.begin_nested() as savepoint:
            call(service, deliveries)
            session.flush()
            savepoint.rollback()
        found = []
        for statement, parameters in statements:
            with session.begin_nested() as savepoint:
                explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
                rows = session.connection().exec_driver_sql(explain, parameters)
                found.append(rows.scalar_one()[0])
                savepoint.rollback()
        session.rollback()
    return found


def pages(found: list[dict[str, Any]]) -> int:
    """How many were looked at, in memory or not."""
    plans = [row["Plan"] for row in found]
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)


def live_pages(engine: sa.Engine) -> int:
    """How many the table of live messages and its order index have."""
    sizes = "SELECT pg_relation_size('{0}') + pg_relation_size('{0}_order_idx')"
    with engine.connect() as connection:
        return int(connection.scalar(sa.text(sizes.format("pgqrs_messages"))) or 0) // 8192


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


@pytest.mark.parametrize("filled", AMOUNTS, indirect=True)
def test_a_call_reads_what_it_needs_and_no_more(engine, filled, results):
    """A bounded number of pages, never a whole table, next to any other content."""
    for name, (call, rows) in CALLS.items():
        needs = BATCH if name.startswith(("extend", "release", "fail", "archive")) else 0
        plans(engine, call, needs)  # marks what is dead in the indexes as dead
        found = plans(engine, call, needs)
        assert found, name
        read = pages(found)
        scanned = {
            node["Relation Name"]
            for row in found
            for node in nodes(row["Plan"])
            if node["Node Type"] == "Seq Scan"
            and node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        }
        results.write(
            amount=str(filled),
            operation=name,
            buffers=read,
            milliseconds=round(sum(row["Execution Time"] for row in found), 2),
        )
        assert not scanned & {"pgqrs_messages", "pgqrs_archive"}, name
        # No index tells what is out of attempts: it reads what is visible, each page once.
        once = live_pages(engine) if name == "bury, none" else 0
        assert read < 300 + 40 * rows + once, (name, read)


# --- bloat ---------------------------------------------------------------------------------------


def cycle(engine: sa.Engine, rounds: int, *, forget: bool = False) -> float:
    """Enqueue, lease and archive in batches; return messages per second.

    ``forget``: each dequeue begins as that of a new process, at the beginning of the index.
    """
    began = time.perf_counter()
    with Session(engine) as session:
        service = QueueService(session)
        for _ in range(rounds):
            service.enqueue_many("mail", range(BATCH))
            session.commit()
            if forget:
                cursors._cursors.clear()
            service.archive_many(service.dequeue("mail", BATCH))
            session.commit()
    return rounds * BATCH / (time.perf_counter() - began)


@pytest.mark.long
def test_a_transaction_held_open_slows_a_drain_down_but_does_not_stop_it(address, engine, results):
    """F37: what is dead cannot be cleaned while somebody may still look at it."""
    pooled = sa.create_engine(address.url())
    cycle(pooled, 20)
    first: dict[str, float] = {}

    def measure(when: str, *, forget: bool = False) -> float:
        """The rate, and the pages of one more dequeue: those do not depend on this computer."""
        rate = cycle(pooled, 200, forget=forget)
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue("mail", {})
        read = pages(plans(engine, CALLS["dequeue 1"][0], 0))
        with Session(engine) as session, session.begin():
            QueueService(session).queues.purge("mail")
        ratios = {
            "rate": rate / first.setdefault("rate", rate),
            "pages": read / first.setdefault("pages", read),
        }
        results.write(
            amount="a transaction held open",
            operation=when,
            buffers=read,
            rate=round(rate),
            percent_of_rate=round(100 * ratios["rate"]),
            ratio_of_pages=round(ratios["pages"], 2),
        )
        print(f"{when:20} {rate:8.0f} messages/s {ratios['rate']:6.2f}  {read:6} pages a dequeue")
        return ratios["pages"]

    measure("before")
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as holder:
        holder.execute(sa.text("SELECT count(*) FROM pgqrs_messages"))
        for number in (1, 2, 3):
            measure(f"held, {number}0,000 on")
        measure("held, 40,000 on, without `pgqrs_sa._core.cursor`", forget=True)
    run_sql(address, "VACUUM pgqrs_messages")
    assert measure("after") <= 3
    pooled.dispose()


@pytest.mark.long
def test_scheduled_messages_of_a_higher_priority_stand_in_front(address, engine, results):
    """The order index has them first: how many pages a dequeue reads past 100,000 of them."""
    run_sql(address, FILL, queue="mail", rows=100_000, ahead=1)
    with Session(engine) as session, session.begin():
        QueueService(session).enqueue_many("mail", [Item(n, priority=1) for n in range(10)])
    run_sql(address, "VACUUM ANALYZE")
    call, _ = CALLS["dequeue 1"]
    plans(engine, call, 0)
    found = plans(engine, call, 0)
    read = pages(found)
    results.write(
        amount="100000 scheduled of a higher priority",
        operation="dequeue 1",
        buffers=read,
        milliseconds=sum(row["Execution Time"] for row in found),
    )
    print(f"{read} pages")
    assert read < 1_000

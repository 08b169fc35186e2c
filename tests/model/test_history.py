"""No two leases of a message overlap, and what was acknowledged is what was done.

Threads and processes work on one queue at random, with leases of milliseconds, and write down what
they did; `history` judges it. That judge is judged first, by histories that are wrong.

``pytest -m long tests/model`` does the same with more of both, and for longer.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Message, QueueService
from support import random_worker
from support.cases import each_case

from .history import Event, Tables, faults

# --- the judge -----------------------------------------------------------------------------------


def told(*events: Event, live: Any = (), archived: Any = (), effects: Any = ()) -> list[str]:
    """The faults of a history of message 1, which was enqueued before."""
    begun = Event("enqueue", 1, 0, "p", 0, 0)
    return faults([begun, *events], Tables(live, archived, effects))


def lease(token: int, start: float, until: float, worker: str = "a", end: float = 0) -> Event:
    return Event("lease", 1, token, worker, start, end or start + 0.1, until=until)


def act(op: str, token: int, start: float, worker: str = "a", **more: Any) -> Event:
    return Event(op, 1, token, worker, start, more.pop("end", start + 0.1), **more)


DONE = {"archived": [1], "effects": [1]}


@each_case(
    "events",
    [
        [lease(1, 1, 9), act("archive", 1, 2)],
        [lease(1, 1, 3), lease(2, 3, 9, "b"), act("archive", 2, 4, "b")],
        [lease(1, 1, 9), act("release", 1, 2), lease(2, 2, 9, "b"), act("archive", 2, 3, "b")],
        [lease(1, 1, 9), act("expire", 1, 2, "c"), lease(2, 2, 9, "b"), act("archive", 2, 3, "b")],
        [lease(1, 1, 2), act("extend", 1, 1.5, until=5), lease(2, 5, 9), act("archive", 2, 6)],
        # An extension may shorten, and a settle may take so long that the next lease is seen first.
        [lease(1, 1, 9), act("extend", 1, 2, until=3), lease(2, 3, 9), act("archive", 2, 4)],
        [lease(1, 1, 9), act("fail", 1, 2, end=8), lease(2, 2.5, 9), act("archive", 2, 9, end=9.5)],
        # It may have been either of two extensions at the same time that came last.
        [
            lease(1, 1, 3),
            act("extend", 1, 1.5, until=9),
            act("extend", 1, 1.5, until=2),
            lease(2, 2, 9, "b"),
            act("archive", 2, 3, "b"),
        ],
        # A late settle that was refused, and one of a lease that ran out and that nobody took.
        [
            lease(1, 1, 2),
            lease(2, 3, 9, "b"),
            act("archive", 1, 4, ok=False),
            act("archive", 2, 4, "b"),
        ],
        [lease(1, 1, 2), act("archive", 1, 7)],
    ],
)
def test_a_history_that_keeps_the_promises_has_no_fault(events: list[Event]) -> None:
    assert told(*events, **DONE) == []


@each_case(
    ("events", "fault"),
    [
        ([lease(1, 1, 9), lease(2, 2, 9, "b")], "ran until 9.000000, lease 2 came by 2.1"),
        ([lease(1, 1, 9), lease(1, 2, 9, "b")], "lease 1 was given 2 times"),
        ([lease(1, 5, 6), lease(2, 1, 2)], "lease 1 was given after lease 2"),
        (
            [lease(1, 1, 2), act("extend", 1, 1.5, until=8), lease(2, 3, 9)],
            "ran until 8.000000, lease 2 came by 3.1",
        ),
        (
            [lease(1, 1, 9), act("release", 1, 5), lease(2, 3, 9)],
            "ran until 5.000000, lease 2 came by 3.1",
        ),
        (
            [lease(1, 1, 9), act("expire", 1, 5, "c"), lease(2, 3, 9)],
            "ran until 5.000000, lease 2 came by 3.1",
        ),
        (
            [lease(1, 1, 2), lease(2, 3, 9, "b"), act("archive", 1, 4)],
            "archive by its former holder succeeded",
        ),
        (
            [lease(1, 1, 2), lease(2, 3, 9, "b"), act("extend", 1, 4, until=9)],
            "extend by its former holder succeeded",
        ),
        ([lease(1, 1, 9), act("archive", 1, 2), act("release", 1, 2)], "was ended 2 times"),
        ([lease(1, 1, 9), act("archive", 1, 0, end=0.5)], "was ended by archive before it began"),
        (
            [lease(1, 1, 9), act("archive", 1, 2), act("extend", 1, 3, until=9)],
            "was extended after it had been ended",
        ),
        ([lease(1, 1, 9), act("archive", 1, 2, "b")], "b did archive without having lease 1"),
        ([lease(1, 1, 9), act("archive", 2, 2)], "a did archive without having lease 2"),
    ],
)
def test_a_lease_that_cannot_have_been_is_found(events: list[Event], fault: str) -> None:
    found = told(*events, **DONE)
    assert any(fault in row for row in found), found


ACKNOWLEDGED = [lease(1, 1, 9), act("archive", 1, 2)]


@each_case(
    ("events", "books", "fault"),
    [
        (ACKNOWLEDGED, {"archived": [1]}, "acknowledged without an effect"),
        (ACKNOWLEDGED, {"archived": [1], "effects": [1, 1]}, "had an effect 2 times"),
        (ACKNOWLEDGED, {"archived": [1, 1], "effects": [1]}, "is in the archive 2 times"),
        (ACKNOWLEDGED, {"effects": [1]}, "acknowledged and is not in the archive"),
        (ACKNOWLEDGED, {"effects": [1], "archived": [1], "live": [1]}, "is in 2 places"),
        ([], {"live": [1], "effects": [1]}, "had an effect without an acknowledgement"),
        ([], {"archived": [1]}, "is in the archive and was not acknowledged"),
        ([], {}, "is in 0 places"),
        ([], {"live": [1, 1]}, "is live 2 times"),
        ([], {"live": [1, 2]}, "message 2 exists, and was never enqueued"),
        ([lease(1, 1, 9), act("delete", 1, 2)], {"live": [1]}, "is in 2 places"),
    ],
)
def test_an_account_that_does_not_balance_is_found(
    events: list[Event], books: Any, fault: str
) -> None:
    found = told(*events, **books)
    assert any(fault in row for row in found), found


# --- the judged ----------------------------------------------------------------------------------


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    engine = sa.create_engine(migrated.url)
    with engine.begin() as connection:
        random_worker.SIDE.drop_all(connection)
        random_worker.SIDE.create_all(connection)
        connection.execute(
            sa.text("TRUNCATE pgqrs_messages, pgqrs_archive, pgqrs_queues, pgqrs_workers CASCADE")
        )
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail", max_read_ct=100_000)
    yield engine
    with engine.begin() as connection:
        random_worker.SIDE.drop_all(connection)
    engine.dispose()


def run(url: str, threads: int, processes: int, steps: int) -> None:
    """Let them all work together, to their ends."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(threads + processes)
    common = {"url": url, "steps": steps, "barrier": barrier}
    others = [
        spawn.Process(
            target=random_worker.work,
            kwargs={"name": f"process {n}", **common},
        )
        for n in range(processes)
    ]
    for other in others:
        other.start()
    with ThreadPoolExecutor(threads) as pool:
        futures = [
            pool.submit(random_worker.work, name=f"thread {n}", **common) for n in range(threads)
        ]
    for future in futures:
        future.result()
    for other in others:
        other.join(600)
    assert [other.exitcode for other in others] == [0] * processes


def read(engine: sa.Engine) -> tuple[list[Event], Tables]:
    with engine.connect() as connection:
        events = [
            Event(
                row.op,
                row.id,
                row.token,
                row.worker,
                row.start.timestamp(),
                row.end.timestamp(),
                row.ok,
                None if row.until is None else row.until.timestamp(),
            )
            for row in connection.execute(sa.select(random_worker.HISTORY))
        ]
        columns = (Message.id, ArchivedMessage.id, random_worker.EFFECTS.c.id)
        return events, Tables(*(connection.scalars(sa.select(column)).all() for column in columns))


def judge(engine: sa.Engine) -> Counter[tuple[str, bool]]:
    """Find no fault, and see that there was something to find one in."""
    events, books = read(engine)
    assert faults(events, books) == []
    seen = Counter((event.op, event.ok) for event in events)
    for op in ("archive", "release", "fail", "delete", "extend"):
        assert seen[op, True], f"no {op} succeeded: nothing is shown"
        assert seen[op, False], f"no {op} came too late: nothing is shown"
    assert seen["expire", True]
    assert max(event.token for event in events) > 1
    return seen


def told_of(seen: Counter[tuple[str, bool]]) -> dict[str, int]:
    return {op if ok else f"{op}, refused": n for (op, ok), n in sorted(seen.items())}


def test_threads_and_processes_make_a_history_without_a_fault(engine, migrated, note) -> None:
    about = {"threads": 4, "processes": 2, "steps": 250}
    run(migrated.url, **about)
    seen = judge(engine)
    note(operations=seen.total(), **about, seen=told_of(seen))


@pytest.mark.long
def test_many_threads_and_processes_make_a_long_history_without_a_fault(
    engine, migrated, note
) -> None:
    about = {"threads": 8, "processes": 4, "steps": 1500}
    run(migrated.url, **about)
    seen = judge(engine)
    note(operations=seen.total(), **about, seen=told_of(seen))
    assert seen.total() > 10_000


def test_a_real_history_with_one_lie_in_it_is_found_out(engine, migrated) -> None:
    """The judge is no less strict with many events than with a few."""
    run(migrated.url, threads=3, processes=0, steps=120)
    events, books = read(engine)
    assert faults(events, books) == []
    late = next(event for event in events if event.op == "archive" and not event.ok)
    told = Event(late.op, late.id, late.token, late.worker, late.start, late.end)
    assert faults([*events, told], books)
    first = next(event for event in events if event.op == "lease")
    twin = Event("lease", first.id, first.token, "twin", first.start, first.end, until=first.until)
    assert faults([*events, twin], books)

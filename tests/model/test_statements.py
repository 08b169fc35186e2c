"""Each statement changes exactly the rows that it is about, and of these exactly what it says.

Every WHERE, join and assignment is here looked at by itself, on a scene that has a row for each
condition to leave out. What waits for whom is in ``test_holes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.orm import Session

from pgqrs_sa import Message
from pgqrs_sa._core.sql import (
    archive,
    consume,
    counts,
    enqueue,
    health,
    lease,
    messages,
    queries,
    queues,
    settle,
    wakeup,
    workers,
)
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from support import every_row
from support.cases import each_case
from support.every_row import MAIL, OTHER, Seen

TABLES = tables_of(READY_MADE)
SPAN = timedelta(minutes=10)
# The fencing token stays: each lease sets a new one.
HELD = ("leased_until", "dequeued_at", "consumer_worker_id")


@pytest.fixture(scope="module")
def staged(kept: Any) -> Iterator[sa.Engine]:
    """The scene, which every test leaves by a rollback."""
    engine = sa.create_engine(kept.url, connect_args={"options": "-c statement_timeout=90s"})
    with engine.begin() as connection:
        every_row.set_up(connection)
    yield engine
    engine.dispose()


@pytest.fixture
def session(staged: sa.Engine) -> Iterator[Session]:
    with Session(staged) as session:
        yield session


def ids(seen: Seen) -> list[Any]:
    return [row.id for row in seen.rows]


def about(moment: datetime, span: timedelta = timedelta(0)) -> bool:
    return abs(moment - datetime.now(UTC) - span) < timedelta(minutes=1)


# --- settling ------------------------------------------------------------------------------------

TOKENS = [
    # id and token: of a live lease, of another one, and of one that has run out;
    *(
        (id_, every_row.token(id_))
        for id_ in (every_row.LEASED, every_row.SILENTS, every_row.LAPSED)
    ),
    # of an earlier and of a later lease, and of that of another message,
    (every_row.NOBODYS, every_row.token(every_row.NOBODYS) - 1),
    (every_row.LAST, every_row.token(every_row.LAST) + 1),
    (every_row.HOLDINGS, every_row.token(every_row.LEASED)),
    # of what is not held, and of what is not there.
    (every_row.READY, every_row.token(every_row.READY)),
    (every_row.HALF, every_row.token(every_row.HALF)),
    (999, every_row.token(999)),
]
MINE = {every_row.LEASED, every_row.SILENTS, every_row.LAPSED}


def fence(tokens: Any = TOKENS, **more: Any) -> dict[str, Any]:
    found, numbers = zip(*tokens, strict=True)
    return {"ids": list(found), "tokens": list(numbers), "required": 0, **more}


def settling(tokens: Any = TOKENS, **more: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    n = len(tokens)
    texts = {"reasons": ["why"] * n, "errors": ["err"] * n}
    return {
        "archive": (
            settle.archive(TABLES),
            fence(tokens, outcome="discarded", **texts, **more),
        ),
        "archive without a reason": (
            settle.archive(TABLES, with_reason=False),
            fence(tokens, outcome="archived", **more),
        ),
        "delete": (settle.delete(TABLES), fence(tokens, **more)),
        "extend": (settle.extend(TABLES), fence(tokens, lease=SPAN, **more)),
        "release": (settle.release(TABLES), fence(tokens, **more)),
        "release with a delay": (
            settle.release(TABLES, delayed=True),
            fence(tokens, delay=SPAN, **more),
        ),
        "fail": (
            settle.reschedule_failed(TABLES),
            fence(tokens, errors=["err"] * n, delays=[SPAN] * n, **more),
        ),
    }


@each_case("way", list(settling()), before="rollback")
def test_only_what_is_held_as_the_fence_says_is_settled(session: Session, way: str) -> None:
    seen = Seen(session, *settling()[way])
    updates = {"extend", "release", "release with a delay", "fail"}
    touched = seen.changed if way in updates else seen.gone
    assert touched == {"messages": MINE}
    assert sorted(ids(seen)) == sorted(MINE)


ONE: dict[str, tuple[Any, dict[str, Any]]] = {
    "archive": (
        settle.archive_one(TABLES),
        {"outcome": "discarded", "reasons": "why", "errors": "err"},
    ),
    "archive without a reason": (
        settle.archive_one(TABLES, with_reason=False),
        {"outcome": "archived"},
    ),
    "delete": (settle.delete_one(TABLES), {}),
}


@each_case("way", list(ONE), before="rollback")
def test_one_message_is_settled_only_if_it_is_held_as_the_fence_says(
    session: Session, way: str
) -> None:
    statement, values = ONE[way]
    for id_, number in TOKENS:
        mine = [id_] if id_ in MINE else []
        with session.begin_nested() as savepoint:
            seen = Seen(session, statement, {"id": id_, "token": number, **values})
            assert ids(seen) == mine
            assert seen.gone.get("messages", set()) == set(mine)
            assert (seen.changed, [row["id"] for row in seen.new]) == (
                {},
                [] if way == "delete" else mine,
            )
            savepoint.rollback()


@each_case("way", list(settling()), before="rollback")
def test_a_batch_of_which_one_is_not_held_is_not_settled_at_all(session: Session, way: str) -> None:
    seen = Seen(session, *settling(required=4)[way])
    assert (seen.changed, seen.gone, seen.new, seen.rows) == ({}, {}, [], [])
    seen = Seen(session, *settling(required=3)[way])
    assert sorted(ids(seen)) == sorted(MINE)


def test_what_is_archived_is_there_as_it_was_with_its_outcome(session: Session) -> None:
    before = every_row.everything(session)
    seen = Seen(session, *settling()["archive"])
    for row in seen.new:
        assert (row["outcome"], row["reason"], row["last_error"]) == ("discarded", "why", "err")
        old = before["messages", row["id"]]
        kept = old.keys() - {"leased_until", "last_error"}
        assert all(row[name] == old[name] for name in kept)
    assert {row["id"] for row in seen.new} == MINE


@each_case(
    ("way", "columns"),
    [
        ("extend", ("leased_until",)),
        ("release", ("max_read_ct", *HELD)),
        ("release with a delay", ("vt", "max_read_ct", *HELD)),
        ("fail", ("vt", "last_error", *HELD)),
    ],
    before="rollback",
)
def test_a_lease_that_is_given_up_or_extended_changes_these_columns(
    session: Session, way: str, columns: tuple[str, ...]
) -> None:
    seen = Seen(session, *settling()[way])
    for id_ in MINE:
        assert seen.columns("messages", id_) == set(columns)
        row = seen.now["messages", id_]
        if "vt" in columns:
            assert about(row["vt"], SPAN)
        if way == "extend":
            assert about(row["leased_until"], SPAN)
        else:
            assert [row[name] for name in HELD] == [None] * 3
    raised = way.startswith("release")
    assert seen.now["messages", every_row.LEASED]["max_read_ct"] == 5 + raised


def test_a_failure_is_put_back_only_with_an_attempt_left(session: Session) -> None:
    tokens = [(id_, every_row.token(id_)) for id_ in (every_row.LAST, every_row.LEASED)]
    seen = Seen(session, *settling(tokens)["fail"])
    assert seen.changed == {"messages": {every_row.LEASED}}


def test_whereabouts_are_of_the_messages_asked_for(session: Session) -> None:
    asked = [every_row.READY, every_row.LEASED, 101, 999]
    rows = session.execute(settle.whereabouts(TABLES), {"ids": asked}).all()
    assert [(row.id, row.state, row.held, row.settled) for row in rows] == [
        (every_row.READY, "ready", False, False),
        (every_row.LEASED, "leased", True, False),
        (101, "archived", False, True),
    ]


# --- leasing -------------------------------------------------------------------------------------

TAKEN = [every_row.URGENT, every_row.READY, every_row.LAPSED, every_row.LIMITED]
"""What can be leased of the first queue, in its order."""


def leasing(**more: Any) -> dict[str, Any]:
    plain = {"queue": "mail", "limit": 9, "lease": None, "attempts": None, "worker": every_row.BUSY}
    return plain | more


def test_what_is_visible_in_one_queue_and_has_attempts_is_leased(session: Session) -> None:
    seen = Seen(session, lease.dequeue(TABLES, by_worker=True), leasing())
    assert seen.changed == {"messages": set(TAKEN)}
    assert sorted(ids(seen)) == sorted(TAKEN)
    for id_ in TAKEN:
        row = seen.now["messages", id_]
        assert seen.columns("messages", id_) <= {"read_ct", "max_read_ct", "fencing_token", *HELD}
        assert about(row["leased_until"], timedelta(seconds=30))
        assert about(row["dequeued_at"])
        assert row["consumer_worker_id"] == every_row.BUSY
        assert row["read_ct"] == 1 + (id_ == every_row.LAPSED)
        assert row["max_read_ct"] == {every_row.LIMITED: 3}.get(id_, 5)


def test_the_lease_and_the_attempts_may_be_given_with_the_call(session: Session) -> None:
    values = leasing(lease=SPAN, attempts=2, worker=None, limit=2)
    seen = Seen(session, lease.dequeue(TABLES, by_worker=False), values)
    assert seen.changed == {"messages": set(TAKEN[:2])}
    for id_ in TAKEN[:2]:
        row = seen.now["messages", id_]
        assert about(row["leased_until"], SPAN)
        assert (row["max_read_ct"], row["consumer_worker_id"]) == (2, None)


@each_case("worker", [every_row.SUSPENDED, every_row.GONE, 999], before="rollback")
def test_a_worker_that_may_not_leases_nothing(session: Session, worker: int) -> None:
    statement = lease.dequeue(TABLES, by_worker=True)
    assert session.execute(statement, leasing(worker=worker)).all() == []
    assert session.execute(statement, leasing(queue="paused")).all() == []
    assert session.execute(statement, leasing(queue="short")).all() == []


def places(session: Session, table: str = "f{}", ids: Sequence[int] = (every_row.READY,)) -> Any:
    """Where a dequeue goes on from: these messages, at their levels."""
    last = [session.get_one(Message, id_) for id_ in ids]
    oid = session.scalar(sa.text("SELECT CAST('pgqrs_messages'::regclass AS oid)"))
    rows = [f'{{"level": {item.priority}, "vt": "{item.vt}", "id": {item.id}}}' for item in last]
    cursor = f'{{"{table.format(oid)}": [{", ".join(rows)}]}}'
    return {"cursor": cursor}


def test_behind_a_place_only_what_lies_behind_it_is_leased_at_its_own_level(
    session: Session,
) -> None:
    values = leasing(**places(session))
    seen = Seen(session, lease.dequeue(TABLES, by_worker=True), values)
    assert seen.changed == {"messages": {every_row.URGENT, every_row.LAPSED, every_row.LIMITED}}
    assert {row.cursor_table[0] for row in seen.rows} == {"f"}


@each_case("order", [1, -1], before="rollback")
def test_places_may_come_in_any_order(session: Session, order: int) -> None:
    ids = [every_row.URGENT, every_row.READY][::order]
    seen = Seen(session, lease.dequeue(TABLES, by_worker=True), leasing(**places(session, ids=ids)))
    assert seen.changed == {"messages": {every_row.LAPSED, every_row.LIMITED}}


@each_case("table", ["t{}", "f{}0", "f"], before="rollback")
def test_places_of_another_table_are_not_used(session: Session, table: str) -> None:
    seen = Seen(session, lease.dequeue(TABLES, by_worker=True), leasing(**places(session, table)))
    assert seen.changed == {"messages": set(TAKEN)}


def test_criteria_leave_out_what_does_not_match(session: Session) -> None:
    where = (TABLES.message.c.id != every_row.URGENT,)
    statement = lease.dequeue_where(TABLES, where, by_worker=True)
    seen = Seen(session, statement, leasing())
    assert seen.changed == {"messages": set(TAKEN[1:])}


# --- what a consumer executes --------------------------------------------------------------------


def test_a_turn_archives_what_is_held_and_leases_what_comes_next(session: Session) -> None:
    values = fence(TOKENS[:2] + TOKENS[3:]) | leasing(limit=2)
    seen = Seen(session, consume.settle_and_lease(TABLES), values)
    assert seen.gone == {"messages": {every_row.LEASED, every_row.SILENTS}}
    assert seen.changed == {"messages": set(TAKEN[:2])}
    assert {row["outcome"] for row in seen.new} == {"archived"}
    leased = {row.id: row.settled for row in seen.rows}
    assert sorted(leased.pop(None)) == [every_row.LEASED, every_row.SILENTS]
    assert leased == dict.fromkeys(TAKEN[:2])


@each_case(
    ("named", "worker", "found"),
    [
        (["mail"], every_row.BUSY, ["mail exhausted", "mail ready"]),
        (
            ["short", "mail", "other"],
            every_row.BUSY,
            ["mail exhausted", "mail ready", "other exhausted", "other ready"],
        ),
        (["short"], every_row.BUSY, []),
        (["paused"], every_row.BUSY, []),
        (["mail"], every_row.SUSPENDED, ["mail exhausted"]),
        (["mail"], every_row.STOPPED, ["mail exhausted"]),
        (["mail"], 999, ["mail exhausted"]),
        (["no such queue", "short"], every_row.BUSY, ["no such queue missing"]),
    ],
    before="rollback",
)
def test_a_look_finds_what_this_worker_could_lease_and_what_is_exhausted(
    session: Session, named: list[str], worker: int, found: list[str]
) -> None:
    values = {"queues": named, "worker": worker}
    rows = session.execute(consume.check_queues(TABLES), values)
    assert sorted(f"{row.queue} {row.found}" for row in rows) == found


def test_nothing_is_ready_in_a_queue_of_leases_and_scheduled_messages(session: Session) -> None:
    session.execute(sa.delete(TABLES.message).where(TABLES.message.c.id == every_row.ELSEWHERE))
    values = {"queues": ["other"], "worker": every_row.BUSY}
    rows = session.execute(consume.check_queues(TABLES), values).all()
    assert [(row.queue, row.found) for row in rows] == [("other", "exhausted")]


def test_a_look_finds_what_is_ready_behind_an_urgent_message_that_is_scheduled(
    session: Session,
) -> None:
    behind = sa.insert(TABLES.message).values(queue_id=every_row.SHORT, payload="1")
    session.execute(behind.values(priority=-5, vt=sa.text("now() + interval '1 day'")))
    values = {"queues": ["short"], "worker": every_row.BUSY}
    assert session.execute(consume.check_queues(TABLES), values).all() == []
    session.execute(behind.values(priority=3))
    assert session.execute(consume.check_queues(TABLES), values).all() == [("short", "ready")]


def test_what_a_turn_without_a_reply_has_leased_is_handed_back_uncharged(session: Session) -> None:
    values = every_row.unanswered(every_row.BUSY, known=[every_row.token(every_row.LEASED)])
    seen = Seen(session, consume.release_unanswered(TABLES), values)
    assert seen.changed == {"messages": {every_row.LAST}}
    assert ids(seen) == [every_row.LAST]
    assert seen.columns("messages", every_row.LAST) == {"max_read_ct", *HELD}
    row = seen.now["messages", every_row.LAST]
    assert (row["max_read_ct"], row["read_ct"]) == (2, 1)
    assert [row[name] for name in HELD] == [None] * 3


@each_case(
    ("changes", "given_back"),
    [
        ({}, {every_row.LEASED, every_row.LAST}),
        # Of another worker, from another queue, for another time, before and after it was sent.
        ({"worker_id": every_row.SILENT}, {every_row.SILENTS}),
        ({"queue": "other"}, set()),
        ({"lease": timedelta(hours=23)}, set()),
        ({"since": timedelta(minutes=4)}, set()),
        ({"until": timedelta(minutes=-4)}, set()),
        ({"known": [every_row.token(every_row.LEASED), every_row.token(every_row.LAST)]}, set()),
    ],
    before="rollback",
)
def test_only_what_a_turn_without_a_reply_can_have_leased_is_handed_back(
    session: Session, changes: dict[str, Any], given_back: set[int]
) -> None:
    values = every_row.unanswered(every_row.BUSY, **changes)
    assert {*ids(Seen(session, consume.release_unanswered(TABLES), values))} == given_back


def test_a_lease_that_was_extended_is_not_handed_back(session: Session) -> None:
    """Nobody extends what nobody knows of."""
    longer = sa.text(
        "UPDATE pgqrs_messages SET leased_until = leased_until + interval '1 s' WHERE id = :id"
    )
    session.execute(longer, {"id": every_row.LEASED})
    seen = Seen(session, consume.release_unanswered(TABLES), every_row.unanswered(every_row.BUSY))
    assert ids(seen) == [every_row.LAST]


# --- the archive ---------------------------------------------------------------------------------


def test_only_the_exhausted_of_one_queue_are_buried(session: Session) -> None:
    values = {"queue": "mail", "limit": 9, "look": None}
    seen = Seen(session, archive.dead_letter_exhausted(TABLES), values)
    assert seen.gone == {"messages": {every_row.SPENT}}
    assert ids(seen) == [every_row.SPENT]
    (row,) = seen.new
    assert (row["outcome"], row["reason"]) == ("dead", archive.EXHAUSTED_REASON)


def requeueing(*which: int, required: int | None = None) -> dict[str, Any]:
    n = len(which) if required is None else required
    return {"ids": list(which), "attempts": None, "delay": SPAN, "required": n}


def test_what_is_requeued_is_what_was_asked_for(session: Session) -> None:
    which = (every_row.OLD, every_row.DEAD, every_row.OLD_ELSEWHERE)
    seen = Seen(session, archive.requeue(TABLES), requeueing(*which))
    assert (seen.gone, seen.changed) == ({"archive": set(which)}, {})
    assert {row["id"]: row["max_read_ct"] for row in seen.new} == {101: 6, 102: 10, 103: 8}
    for row in seen.new:
        assert about(row["vt"], SPAN)
        assert (row["dequeued_at"], row["consumer_worker_id"]) == (None, None)
        assert row["queue_id"] == (OTHER if row["id"] == 103 else MAIL)


@each_case(
    "which",
    [
        (every_row.LIVE_KEY,),
        (every_row.DEAD, every_row.LIVE_KEY),
        (every_row.OLD, every_row.TWIN),
        (every_row.DEAD, 999),
    ],
    before="rollback",
)
def test_none_is_requeued_when_one_cannot_be(session: Session, which: tuple[int, ...]) -> None:
    seen = Seen(session, archive.requeue(TABLES), requeueing(*which))
    assert (seen.gone, seen.new, seen.rows) == ({}, [], [])


@each_case("id_", [every_row.OLD, every_row.TWIN], before="rollback")
def test_a_key_that_another_archived_message_has_is_no_hindrance(
    session: Session, id_: int
) -> None:
    seen = Seen(session, archive.requeue(TABLES), requeueing(id_))
    assert seen.gone == {"archive": {id_}}


def test_a_key_that_is_live_in_another_queue_is_no_hindrance(session: Session) -> None:
    table = TABLES.message
    elsewhere = sa.update(table).where(table.c.id == every_row.ELSEWHERE).values(dedup_key="k")
    session.execute(elsewhere)
    seen = Seen(session, archive.requeue(TABLES), requeueing(every_row.OLD))
    assert seen.gone == {"archive": {every_row.OLD}}


def test_which_live_message_has_the_key_of_an_archived_one(session: Session) -> None:
    asked = {"ids": [every_row.OLD, every_row.DEAD, every_row.LIVE_KEY, 999]}
    rows = session.execute(archive.requeue_candidates(TABLES), asked).all()
    assert sorted((row.id, row.live_id) for row in rows) == [
        (every_row.OLD, None),
        (every_row.DEAD, None),
        (every_row.LIVE_KEY, every_row.READY),
    ]


@each_case("by_retention", [True, False])
@each_case("one_queue", [True, False], before="rollback")
def test_what_is_pruned_is_old_enough_for_its_queue(
    session: Session, one_queue: bool, by_retention: bool
) -> None:
    statement = archive.prune(TABLES, one_queue=one_queue)
    if by_retention:
        statement = archive.prune_by_retention(TABLES, failed=False, one_queue=one_queue)
    values = {"limit": 9, "queue": "mail", "older_than": timedelta(hours=1)}
    expected = {every_row.OLD}
    if not one_queue:
        expected |= {every_row.OLD_ELSEWHERE} | (set() if by_retention else {every_row.KEPT})
    assert Seen(session, statement, values).gone == {"archive": expected}


@each_case("one_queue", [True, False], before="rollback")
def test_what_failed_is_pruned_by_the_retention_that_its_queue_has_for_it(
    session: Session, one_queue: bool
) -> None:
    def gone(*, failed: bool) -> set[int]:
        statement = archive.prune_by_retention(TABLES, failed=failed, one_queue=one_queue)
        with session.begin_nested() as savepoint:
            found = Seen(session, statement, {"limit": 9, "queue": "mail"}).gone
            savepoint.rollback()
        return found.get("archive", set())

    archived, queue = TABLES.archived, TABLES.queue
    old = sa.update(archived).where(archived.c.id == every_row.DEAD)
    session.execute(old.values(archived_at=sa.func.now() - timedelta(hours=2)))
    elsewhere = set() if one_queue else {every_row.OLD_ELSEWHERE}
    # Without one of its own it is that of all.
    assert gone(failed=True) == set()
    assert gone(failed=False) == {every_row.OLD, every_row.DEAD} | elsewhere
    for seconds, failures in ((86_400, set()), (3_600, {every_row.DEAD})):
        of_mail = sa.update(queue).where(queue.c.id == MAIL)
        session.execute(of_mail.values(failed_retention_seconds=seconds))
        assert gone(failed=True) == failures
        assert gone(failed=False) == {every_row.OLD} | elsewhere


def test_only_these_archived_messages_are_deleted(session: Session) -> None:
    seen = Seen(session, archive.delete(TABLES), {"ids": [every_row.OLD, 999]})
    assert seen.gone == {"archive": {every_row.OLD}}
    assert ids(seen) == [every_row.OLD]


# --- workers -------------------------------------------------------------------------------------


def test_one_worker_is_read_and_one_is_written(session: Session) -> None:
    asked = {"worker_id": every_row.SILENT}
    assert [row.id for row in session.execute(workers.get(TABLES), asked)] == [every_row.SILENT]
    seen = Seen(session, workers.heartbeat(TABLES), asked | {"leased": 1})
    assert seen.changed == {"workers": {every_row.SILENT}}
    assert seen.columns("workers", every_row.SILENT) == {"heartbeat_at"}
    assert about(seen.now["workers", every_row.SILENT]["heartbeat_at"])
    seen = Seen(session, workers.heartbeat(TABLES), asked | {"leased": 7})
    assert seen.now["workers", every_row.SILENT]["leased"] == 7
    seen = Seen(session, workers.heartbeat(TABLES), asked | {"leased": None})
    assert seen.now["workers", every_row.SILENT]["leased"] is None
    seen = Seen(session, workers.set_status(TABLES, "suspended"), asked)
    assert seen.changed == {"workers": {every_row.SILENT}}
    assert seen.columns("workers", every_row.SILENT) == {"status"}
    seen = Seen(session, workers.set_status(TABLES, "stopped"), asked)
    assert seen.columns("workers", every_row.SILENT) == {"status", "shutdown_at"}
    assert seen.now["workers", every_row.SILENT]["status"] == "stopped"


def test_a_worker_that_is_stopped_stays_as_it_is(session: Session) -> None:
    asked = {"worker_id": every_row.STOPPED}
    for statement in (
        workers.heartbeat(TABLES),
        workers.set_status(TABLES, "ready"),
        workers.set_status(TABLES, "stopped"),
    ):
        seen = Seen(session, statement, asked | {"leased": None})
        assert (seen.changed, seen.rows) == ({}, [])


@each_case(
    ("status", "in_queue", "found"),
    [
        (None, False, [1, 2, 3, 4, 5, 6, 7]),
        ("ready", False, [1, 2, 7]),
        (None, True, [5]),
        ("ready", True, []),
    ],
    before="rollback",
)
def test_workers_are_listed_by_status_and_queue(
    session: Session, status: Any, in_queue: bool, found: list[int]
) -> None:
    statement = workers.everything(TABLES, status=status, in_queue=in_queue)
    rows = session.execute(statement, {"queue": "other"} if in_queue else {})
    assert [row.id for row in rows] == found


def test_the_health_of_workers_is_what_each_of_them_has_reported(session: Session) -> None:
    rows = session.execute(workers.health(TABLES)).all()
    assert {row.id: row.leased for row in rows} == {
        every_row.BUSY: 2,
        every_row.SILENT: 1,
        every_row.SUSPENDED: None,
        every_row.QUIET: 0,
    }


@each_case(
    ("in_queue", "holding", "found"),
    [
        (False, False, {every_row.SILENT, every_row.SUSPENDED, every_row.QUIET}),
        (True, False, {every_row.SILENT, every_row.QUIET}),
        (False, True, {every_row.SILENT, every_row.SUSPENDED}),
        (True, True, {every_row.SILENT}),
    ],
    before="rollback",
)
def test_the_silent_are_stopped_and_nobody_else(
    session: Session, in_queue: bool, holding: bool, found: set[int]
) -> None:
    statement = workers.stop_silent(TABLES, in_queue=in_queue, holding=holding)
    seen = Seen(session, statement, {"silent_for": timedelta(days=1), "queue": "mail"})
    assert seen.changed == {"workers": found}
    for id_ in found:
        assert seen.columns("workers", id_) == {"status", "shutdown_at"}
        assert about(seen.now["workers", id_]["shutdown_at"])


def test_the_leases_of_these_workers_are_released_with_the_attempt_charged(
    session: Session,
) -> None:
    seen = Seen(
        session, workers.release_leases(TABLES), {"ids": [every_row.BUSY, every_row.SUSPENDED]}
    )
    expected = {every_row.LEASED, every_row.LAST, every_row.SUSPENDEDS}
    assert seen.changed == {"messages": expected}
    assert sorted(ids(seen)) == sorted(expected)
    for id_ in expected:
        assert seen.columns("messages", id_) == set(HELD)
        row = seen.now["messages", id_]
        assert [row[name] for name in HELD] == [None] * 3


def test_only_workers_that_stopped_long_ago_and_hold_nothing_are_forgotten(
    session: Session,
) -> None:
    back = sa.text("UPDATE pgqrs_workers SET shutdown_at = now() - interval '9 days' WHERE id = 7")
    session.execute(back)  # it is said to have stopped, but it works: the status counts
    seen = Seen(session, workers.purge(TABLES), {"older_than": timedelta(days=7)})
    assert seen.gone == {"workers": {every_row.GONE}}


@each_case(
    ("id_", "gone"),
    [
        (every_row.GONE, True),
        (every_row.STOPPED, True),
        (every_row.HOLDING, False),
        (every_row.QUIET, False),
        (every_row.SUSPENDED, False),
    ],
    before="rollback",
)
def test_only_a_worker_that_is_stopped_and_holds_nothing_is_deleted(
    session: Session, id_: int, gone: bool
) -> None:
    seen = Seen(session, workers.delete(TABLES), {"worker_id": id_})
    assert seen.gone == ({"workers": {id_}} if gone else {})


# --- what nobody holds ---------------------------------------------------------------------------


def test_messages_are_cancelled_unless_somebody_holds_them(session: Session) -> None:
    asked = [
        every_row.READY,
        every_row.LEASED,
        every_row.LATER,
        every_row.LAPSED,
        every_row.NOBODYS,
        999,
    ]
    values = {"ids": asked, "reason": "no more"}
    seen = Seen(session, messages.cancel(TABLES), values)
    assert seen.gone == {"messages": {every_row.READY, every_row.LATER, every_row.LAPSED}}
    assert {(row["outcome"], row["reason"]) for row in seen.new} == {("cancelled", "no more")}


def test_the_messages_of_a_queue_that_match_are_cancelled(session: Session) -> None:
    where = (TABLES.message.c.id != every_row.LATER,)
    values = {"queue": "mail", "reason": None, "contains": "{}"}
    statement = messages.cancel_where(TABLES, where, by_payload=True)
    assert Seen(session, statement, values).gone == {"messages": {every_row.READY}}
    session.rollback()
    statement = messages.cancel_where(TABLES, where, by_payload=False)
    unheld = {*TAKEN, every_row.SPENT, every_row.HALF}
    assert Seen(session, statement, values).gone == {"messages": unheld}


@each_case(
    ("id_", "columns"),
    [
        (every_row.LATER, ("vt",)),
        (every_row.LAPSED, ("vt", *HELD)),
        (every_row.SPENT, ("vt", "max_read_ct", *HELD)),
        (every_row.LEASED, None),
        (999, None),
    ],
    before="rollback",
)
def test_a_message_is_rescheduled_unless_somebody_holds_it(
    session: Session, id_: int, columns: tuple[str, ...] | None
) -> None:
    values = {"message_id": id_, "delay": SPAN, "at": None}
    seen = Seen(session, messages.reschedule(TABLES), values)
    assert seen.changed == ({} if columns is None else {"messages": {id_}})
    if columns is not None:
        assert seen.columns("messages", id_) == set(columns)
        assert about(seen.now["messages", id_]["vt"], SPAN)
        assert ids(seen) == [id_]


def test_until_when_these_messages_are_leased(session: Session) -> None:
    asked = {"ids": [every_row.READY, every_row.LEASED, every_row.LAPSED, every_row.LATER, 999]}
    rows = session.execute(messages.leased_until(TABLES), asked).all()
    assert {row.id: row.until is not None for row in rows} == {
        every_row.READY: False,
        every_row.LEASED: True,
        every_row.LAPSED: False,
        every_row.LATER: False,
    }


# --- waking --------------------------------------------------------------------------------------


def test_one_worker_waits(session: Session) -> None:
    seen = Seen(session, wakeup.waiting(TABLES), {"worker_id": every_row.QUIET, "span": SPAN})
    assert seen.changed == {"workers": {every_row.QUIET}}
    assert about(seen.now["workers", every_row.QUIET]["waiting_until"], SPAN)


@each_case(
    ("change", "awaited"),
    [
        ("name = name", True),
        ("status = 'suspended'", False),
        ("waiting_until = now() - interval '1 s'", False),
        ("waiting_until = NULL", False),
        ("queues = '{other}'", False),
    ],
    before="rollback",
)
def test_a_queue_is_awaited_by_a_worker_of_its_own_that_is_ready_and_waits(
    session: Session, change: str, awaited: bool
) -> None:
    session.execute(sa.text(f"UPDATE pgqrs_workers SET {change} WHERE id = 1"))  # noqa: S608
    found = session.scalar(sa.select(wakeup.awaited(TABLES.worker)), {"queue": "mail"})
    assert found is awaited


def test_the_queues_in_which_these_messages_are_visible(session: Session) -> None:
    visible = wakeup.visible(TABLES.queue, TABLES.message, TABLES.worker, notify=False)
    asked = {"ids": [every_row.READY, every_row.LATER, every_row.SUSPENDEDS]}
    assert session.scalars(visible, asked).all() == ["mail"]
    assert session.scalars(visible, {"ids": [every_row.ELSEWHERE]}).all() == ["other"]
    assert session.scalars(visible, {"ids": [every_row.LATER]}).all() == []


# --- enqueueing ----------------------------------------------------------------------------------

ENQUEUED = {
    "queue": "mail",
    "payload": '"x"',
    "size": 3,
    "delay": None,
    "at": None,
    "priority": 0,
    "headers": None,
    "max_read_ct": None,
    "key": None,
    "producer": None,
    "items": '[["x",null,null,0,null,null,null]]',
    "keys": [],
}


@each_case("way", ["one", "many"], before="rollback")
def test_a_message_gets_into_the_queue_that_is_named_if_that_takes_it(
    session: Session, way: str
) -> None:
    statement = getattr(enqueue, way)(TABLES, keyed=False, notify=False)
    values = ENQUEUED | {"delay": timedelta(0)}
    seen = Seen(session, statement, values)
    assert [(row["queue_id"], row["payload"]) for row in seen.new] == [(MAIL, "x")]
    assert seen.changed == {}
    for refused in ({"queue": "no such queue"}, {"queue": "short", "size": 11}):
        assert Seen(session, statement, values | refused).new == []
    assert len(Seen(session, statement, values | {"queue": "short", "size": 10}).new) == 1


@each_case(
    ("queue", "delay", "told"),
    [("mail", timedelta(0), True), ("mail", SPAN, False), ("other", timedelta(0), False)],
    before="rollback",
)
def test_an_enqueue_notifies_of_what_is_visible_where_somebody_waits(
    session: Session, queue: str, delay: timedelta, told: bool
) -> None:
    seconds = delay.total_seconds()
    items = f'[["x",{seconds},null,0,null,null,null]]'
    values = ENQUEUED | {"queue": queue, "delay": delay, "items": items, "channel": "pgqrs_test"}
    query = sa.select(sa.literal("x").label("payload"), sa.literal(seconds).label("delay"))
    for statement in (
        enqueue.one(TABLES, keyed=False, notify=True),
        enqueue.many(TABLES, keyed=True, notify=True),
        enqueue.from_select(TABLES, query, notify=True),
    ):
        (row,) = Seen(session, statement, values).rows
        assert (row.notified is not None) is told


def test_what_is_made_visible_notifies_where_somebody_waits(session: Session) -> None:
    visible = wakeup.visible(TABLES.queue, TABLES.message, TABLES.worker, notify=True)
    asked = {
        "ids": [every_row.READY, every_row.ELSEWHERE, every_row.LATER],
        "channel": "pgqrs_test",
    }
    rows = session.execute(visible, asked).all()
    assert {row.queue_name: row.notified is not None for row in rows} == {
        "mail": True,
        "other": False,
    }


def test_what_a_query_returns_gets_into_the_queue_that_is_named_if_that_takes_it(
    session: Session,
) -> None:
    def put(queue: str, text: str) -> list[int]:
        statement = enqueue.from_select(TABLES, sa.select(sa.literal(text)), notify=False)
        seen = Seen(session, statement, {"queue": queue, "producer": None})
        return [row["queue_id"] for row in seen.new]

    assert put("mail", "x") == [MAIL]
    assert put("no such queue", "x") == []
    assert put("short", "123456789") == []
    assert put("short", "12345678") == [every_row.SHORT]


def test_a_keyed_batch_returns_the_live_messages_of_the_keys_that_it_could_not_insert(
    session: Session,
) -> None:
    def item(key: str) -> str:
        return f'["x",null,null,0,null,null,"{key}"]'

    keys = ["k", "live", "more"]
    values = ENQUEUED | {"items": f"[{','.join(map(item, keys))}]", "keys": keys}
    seen = Seen(session, enqueue.many(TABLES, keyed=True, notify=False), values)
    assert [row["dedup_key"] for row in seen.new] == ["k", "more"]
    assert {row.dedup_key: row.id for row in seen.rows if row.duplicate} == {
        "live": every_row.READY
    }
    assert {row.dedup_key for row in seen.rows if not row.duplicate} == {"k", "more"}
    assert seen.changed == {}


def test_live_keys_are_those_of_one_queue(session: Session) -> None:
    def live(**values: Any) -> list[int]:
        return [row.id for row in session.execute(enqueue.live_keys(TABLES), values)]

    assert live(queue="mail", keys=["live", "k"]) == [every_row.READY]
    assert live(queue="other", keys=["live", "free"]) == [every_row.ELSEWHERE]
    assert live(queue="paused", keys=["live"]) == []


def test_a_flush_asks_for_the_queues_that_its_messages_name(session: Session) -> None:
    accepts = enqueue.accepts(TABLES.queue, TABLES.message)

    def accepted(**values: Any) -> list[int]:
        return sorted(row.id for row in session.execute(accepts, values))

    assert accepted(names=["mail"], ids=[]) == [MAIL]
    assert accepted(names=[], ids=[OTHER]) == [OTHER]
    assert accepted(names=["mail"], ids=[OTHER, 999]) == [MAIL, OTHER]
    assert accepted(names=["no"], ids=[]) == []
    assert Seen(session, accepts, {"names": ["mail"], "ids": []}).new == []


def test_a_flush_asks_for_the_keys_of_its_messages(session: Session) -> None:
    keyed = enqueue.live_keys_by_queue_id(TABLES.message)

    def found(*values: list[Any]) -> list[int]:
        queue_ids, keys = values
        rows = session.execute(keyed, {"ids": queue_ids, "keys": keys})
        return sorted(row.id for row in rows)

    assert found([MAIL], ["live"]) == [every_row.READY]
    assert found([MAIL, OTHER], ["live", "no"]) == [every_row.READY, every_row.ELSEWHERE]
    assert found([OTHER], ["free"]) == []


# --- queues --------------------------------------------------------------------------------------


def test_one_queue_is_read_changed_and_emptied(session: Session) -> None:
    asked = {"queue": "mail"}
    assert [row.id for row in session.execute(queues.get(TABLES), asked)] == [MAIL]
    seen = Seen(session, queues.pause(TABLES), asked)
    assert seen.changed == {"queues": {MAIL}}
    assert seen.columns("queues", MAIL) == {"paused_at"}
    seen = Seen(session, queues.resume(TABLES), {"queue": "paused"})
    assert seen.changed == {"queues": {every_row.PAUSED}}
    assert seen.now["queues", every_row.PAUSED]["paused_at"] is None
    update = queues.update(TABLES, ("lease_seconds",))
    seen = Seen(session, update, {"queue": "other", "new_lease_seconds": 99})
    assert (seen.changed, seen.columns("queues", OTHER)) == ({"queues": {OTHER}}, {"lease_seconds"})
    counted = session.execute(queues.contents(TABLES), {"queue": "other"}).one()
    assert tuple(counted) == (3, 1)
    # Of another queue, unchanged, leased since, gone; the tokens are those of the scene.
    ids = [every_row.READY, every_row.ELSEWHERE, every_row.SUSPENDEDS, 99]
    read = {"queue": "other", "ids": ids, "tokens": [501, 507, 501, 508]}
    with session.begin_nested() as savepoint:
        seen = Seen(session, queues.purge_unchanged(TABLES), read)
        assert seen.gone == {"messages": {every_row.ELSEWHERE}}
        savepoint.rollback()
    seen = Seen(session, queues.purge(TABLES), {"queue": "other", "limit": None, "up_to": None})
    assert seen.gone == {
        "messages": {every_row.ELSEWHERE, every_row.SUSPENDEDS, every_row.SPENT_ELSEWHERE},
    }
    seen = Seen(session, queues.delete_history(TABLES), {"queue": "other"})
    assert seen.gone == {"archive": {every_row.OLD_ELSEWHERE}}
    assert Seen(session, queues.delete(TABLES), {"queue": "other"}).gone == {"queues": {OTHER}}
    assert Seen(session, queues.delete(TABLES), {"queue": "no such queue"}).gone == {}


def test_a_queue_is_created_under_its_name_with_its_settings(session: Session) -> None:
    create = queues.create(TABLES, ("lease_seconds",))
    (row,) = Seen(session, create, {"queue": "new", "new_lease_seconds": 9}).new
    assert (row["queue_name"], row["lease_seconds"], row["max_read_ct"]) == ("new", 9, 5)
    assert Seen(session, create, {"queue": "mail", "new_lease_seconds": 9}).rows == []


# --- reading -------------------------------------------------------------------------------------


def test_a_peek_is_what_a_dequeue_would_take(session: Session) -> None:
    rows = session.execute(queries.peek(TABLES), {"queue": "mail", "limit": 9}).all()
    assert [row.id for row in rows] == TAKEN
    assert {row.queue for row in rows} == {"mail"}


def paged(**more: Any) -> dict[str, Any]:
    return {"queue_id": OTHER, "after": 0, "limit": 99, "contains": '{"n": 1}'} | more


def test_what_is_found_is_what_was_asked_for(session: Session) -> None:
    def find(values: dict[str, Any], **options: Any) -> list[int]:
        given = {"in_queue": False, "state": None, "by_payload": False} | options
        where = given.pop("where", ())
        statement = queries.find(TABLES, **given)
        if where:
            statement = queries.find_where(TABLES, where, **given)
        binds = statement.compile().params.keys()
        rows = session.execute(statement, {k: v for k, v in values.items() if k in binds})
        return [row.id for row in rows]

    everything = [*range(1, 17)]
    assert find(paged()) == everything
    assert find(paged(after=14)) == [15, 16]
    assert find(paged(), in_queue=True) == [7, 8, 9]
    assert find(paged(), in_queue=True, state="exhausted") == [9]
    assert find(paged(), by_payload=True) == [1, 7]
    assert find(paged(), where=(TABLES.message.c.id > 15,)) == [16]
    assert find(paged(), newest_first=True) == everything[::-1]
    assert find(paged(after=3), newest_first=True) == [2, 1]


def test_what_is_found_in_the_archive_is_what_was_asked_for(session: Session) -> None:
    def find(values: dict[str, Any], **options: Any) -> list[int]:
        given = {"in_queue": False, "outcome": None, "by_payload": False} | options
        where = given.pop("where", ())
        statement = queries.find_archived(TABLES, **given)
        if where:
            statement = queries.find_archived_where(TABLES, where, **given)
        binds = statement.compile().params.keys()
        rows = session.execute(statement, {k: v for k, v in values.items() if k in binds})
        return [row.id for row in rows]

    assert find(paged()) == [101, 102, 103, 104, 105, 106]
    assert find(paged(), in_queue=True) == [103]
    assert find(paged(), outcome="dead") == [102]
    assert find(paged(contains="105"), by_payload=True) == [105]
    assert find(paged(), where=(TABLES.archived.c.id > 105,)) == [106]
    assert find(paged(after=103), newest_first=True) == [102, 101]


def test_one_message_and_one_archived_message_are_read(session: Session) -> None:
    (row,) = session.execute(queries.message_by_id(TABLES), {"id": every_row.ELSEWHERE}).all()
    assert (row.id, row.queue, row.state) == (every_row.ELSEWHERE, "other", "ready")
    (row,) = session.execute(queries.archived_by_id(TABLES), {"id": every_row.DEAD}).all()
    assert (row.id, row.queue, row.outcome) == (every_row.DEAD, "mail", "dead")


COUNTS = {
    # ready, scheduled, leased, exhausted; archived, dead
    "mail": (4, 2, 5, 1, 3, 1),
    "other": (1, 0, 1, 1, 1, 0),
    "paused": (1, 0, 0, 0, 1, 0),
    "short": (0, 0, 0, 0, 0, 0),
}


def test_metrics_are_those_of_each_queue(session: Session) -> None:
    def told(rows: Any) -> dict[str, tuple[int, ...]]:
        names = ("ready", "scheduled", "leased", "exhausted", "settled", "dead")
        found = {row.queue: [getattr(row, name) for name in names] for row in rows}
        return {
            name: (*live, settled - dead, dead) for name, (*live, settled, dead) in found.items()
        }

    rows = session.execute(queries.metrics(TABLES, one_queue=False)).all()
    assert told(rows) == COUNTS
    assert {row.most for row in rows} == {10_000}
    exact = session.execute(queries.metrics(TABLES, one_queue=False, exact=True)).all()
    assert told(exact) == COUNTS
    assert {row.most for row in exact} == {None}
    ages = {row.queue: row.oldest_ready_age and row.oldest_ready_age.days for row in rows}
    assert ages == {"mail": 9, "other": 6, "paused": 4, "short": None}
    for exact in (False, True):
        item = queries.metrics(TABLES, one_queue=True, exact=exact)
        rows = session.execute(item, {"queue_id": OTHER}).all()
        assert told(rows) == {"other": COUNTS["other"]}
        assert rows[0].oldest_ready_age.days == 6


@each_case(("of_all", "most"), [(200_000, 10_000), (8, 2), (2, 1)], before="rollback")
def test_the_queues_share_what_is_counted_of_the_archive(
    session: Session, monkeypatch: pytest.MonkeyPatch, of_all: int, most: int
) -> None:
    monkeypatch.setattr(counts, "MOST_OF_ALL", of_all)
    assert session.scalar(sa.select(counts.cap(TABLES))) == most  # for each of four


# --- what the doctor and the live view ask -------------------------------------------------------


def test_the_backlog_of_each_queue(session: Session) -> None:
    rows = session.execute(health.backlog(TABLES)).all()
    found = {row.queue: (row.ready, row.exhausted) for row in rows}
    assert found == {name: (counts[0], counts[3]) for name, counts in COUNTS.items()}
    (mail,) = (row for row in rows if row.queue == "mail")
    assert [age.days for age in (mail.ready_age, mail.exhausted_age)] == [9, 8]
    assert [row.queue for row in rows if row.paused_age is not None] == ["paused"]


def test_the_overview_counts_what_is_live_and_what_is_dead(session: Session) -> None:
    moment = sa.func.now() - timedelta(days=2)
    table = TABLES.message
    session.execute(
        sa.update(table).where(table.c.id == every_row.READY).values(enqueued_at=moment)
    )
    older = {"vt": sa.func.now() - timedelta(days=30)}  # but what is exhausted does not wait
    session.execute(sa.update(table).where(table.c.id == every_row.SPENT).values(older))
    archived = TABLES.archived
    cancelled = (
        sa.update(archived).where(archived.c.id == every_row.KEPT).values(outcome="cancelled")
    )
    session.execute(cancelled)
    rows = session.execute(health.overview(TABLES), {"since": timedelta(days=1)}).all()
    found = {
        row.queue: (row.ready, row.scheduled, row.leased, row.exhausted, row.dead) for row in rows
    }
    assert found == {name: (*counts[:4], counts[5]) for name, counts in COUNTS.items()}
    assert {row.queue: row.arrived for row in rows} == {
        "mail": 11,
        "other": 3,
        "paused": 1,
        "short": 0,
    }
    assert {row.queue: row.oldest and row.oldest.days for row in rows} == {
        "mail": 9,
        "other": 6,
        "paused": 4,
        "short": None,
    }
    assert [row.queue for row in rows if row.paused] == ["paused"]


def test_the_outflow_of_each_queue_is_told_by_spans_of_time(session: Session) -> None:
    table = TABLES.archived
    moments = {
        every_row.OLD: timedelta(minutes=25),
        every_row.DEAD: timedelta(0),
        every_row.OLD_ELSEWHERE: timedelta(0),
        every_row.LIVE_KEY: timedelta(minutes=-30),
        every_row.TWIN: SPAN * 9,
    }
    for id_, ago in moments.items():
        values = {"archived_at": sa.func.now() - ago, "enqueued_at": sa.func.now() - ago}
        session.execute(sa.update(table).where(table.c.id == id_).values(values))
    asked = {"step": SPAN, "step_seconds": SPAN.total_seconds()}
    rows = session.execute(health.outflow(TABLES), asked).all()
    found = {(row.queue_id, row.bucket): (row.settled, row.arrived) for row in rows}
    assert found == {(MAIL, 0): (1, 1), (MAIL, 2): (1, 0), (OTHER, 0): (1, 1)}


def test_leases_that_are_stuck_are_those_of_workers_that_are_stopped_or_gone(
    session: Session,
) -> None:
    table = TABLES.message
    for id_, worker in (
        (every_row.SILENTS, 999),
        (every_row.LATER, 998),
        (every_row.NOBODYS, None),
    ):
        values = {"consumer_worker_id": worker}
        session.execute(sa.update(table).where(table.c.id == id_).values(values))
    far = sa.func.now() + timedelta(days=3)
    leases = [every_row.LEASED, every_row.SILENTS, every_row.HOLDINGS, every_row.NOBODYS]
    session.execute(sa.update(table).where(table.c.id.in_(leases)).values(leased_until=far))
    session.execute(sa.update(table).where(table.c.id == every_row.LATER).values(vt=far))
    values = {"consumer_worker_id": every_row.STOPPED}  # not for long any more
    session.execute(sa.update(table).where(table.c.id == every_row.LAST).values(values))
    rows = session.execute(health.stuck_leases(TABLES), {"ahead": timedelta(days=2)}).all()
    assert {row.worker_id: row.leases for row in rows} == {every_row.HOLDING: 1, 999: 1}


def test_what_one_worker_holds_is_given_back(session: Session) -> None:
    seen = Seen(session, workers.release_worker(TABLES), {"worker_id": every_row.BUSY})
    assert seen.changed == {"messages": {every_row.LEASED, every_row.LAST}}
    for id_ in (every_row.LEASED, every_row.LAST):
        assert seen.columns("messages", id_) == set(HELD)
        row = seen.now["messages", id_]
        assert [row[name] for name in HELD] == [None] * 3


def test_the_workers_that_are_silent(session: Session) -> None:
    values = {"silence": timedelta(days=1)}
    rows = session.execute(health.silent_workers(TABLES), values).all()
    assert [row.id for row in rows] == [every_row.SILENT, every_row.SUSPENDED, every_row.QUIET]


def test_queues_that_are_not_there_are_found_by_what_refers_to_them(session: Session) -> None:
    message, archived = TABLES.message, TABLES.archived
    lost = {
        every_row.READY: 50,
        every_row.SPENT: 60,
        every_row.LEASED: 50,
        every_row.LAST: 70,
        every_row.URGENT: 80,
    }
    for id_, queue in lost.items():
        session.execute(sa.update(message).where(message.c.id == id_).values(queue_id=queue))
    for id_, queue in {every_row.OLD: 90, every_row.DEAD: 95}.items():
        session.execute(sa.update(archived).where(archived.c.id == id_).values(queue_id=queue))
    live, settled = health.missing_queues(TABLES)
    assert session.scalars(live).all() == [50, 60, 70, 80]
    assert session.scalars(settled).all() == [90, 95]
    values = {"consumer_worker_id": 999}
    for id_ in (
        every_row.SILENTS,
        every_row.LAPSED,
        every_row.LATER,
    ):  # held, run out, and not held
        session.execute(sa.update(message).where(message.c.id == id_).values(values))
    row = session.execute(health.orphans(TABLES)).one()
    assert tuple(row) == (5, 2, 1)


def test_there_are_no_orphans_in_the_scene(session: Session) -> None:
    """Nor is a lease of nobody's one, although no worker has it."""
    assert [session.scalars(queue).all() for queue in health.missing_queues(TABLES)] == [[], []]
    assert tuple(session.execute(health.orphans(TABLES)).one()) == (0, 0, 0)


OFTEN = {
    "turn": consume.settle_and_lease(TABLES),
    "dequeue": lease.dequeue(TABLES, by_worker=True),
    "archive": settle.archive(TABLES),
    "enqueue": enqueue.one(TABLES, keyed=True, notify=True),
    "enqueue many": enqueue.many(TABLES, keyed=True, notify=True),
}


@each_case("name", list(OFTEN), before="rollback")
def test_what_is_executed_often_is_short_enough_for_psycopg_to_keep(name: str) -> None:
    """What it has made of a text it keeps up to 4,096 characters. A schema may have a name, too."""
    text = str(OFTEN[name].compile(dialect=psycopg.dialect()))  # type: ignore[attr-defined]
    assert len(text) < 4096 - 3 * 63

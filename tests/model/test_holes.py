"""Conditions of statements that no other test missed when they were gone: see `tools.mutation`.

Most of them only show when a statement is looked at by itself, or next to another session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Message, metadata
from pgqrs_sa._core.sql import archive, consume, lease, messages, queues, settle, workers
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from support import every_row
from support.waiting import PATIENCE, until_blocked

TABLES = tables_of(READY_MADE)


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """On empty tables; who waits for a lock fails."""
    engine = sa.create_engine(migrated.url, connect_args={"options": "-c lock_timeout=3s"})
    with engine.begin() as connection:
        names = ", ".join(table.name for table in metadata.sorted_tables)
        connection.execute(sa.text(f"TRUNCATE {names} CASCADE"))
    yield engine
    engine.dispose()


def fence(deliveries: Any, **more: Any) -> dict[str, Any]:
    """The parameters of a settle of these, as many as are still held."""
    return {
        "ids": [delivery.id for delivery in deliveries],
        "tokens": [delivery.fencing_token for delivery in deliveries],
        "required": 0,
        **more,
    }


SKIPPING: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]] = {
    "archive": (
        lambda: settle.archive(TABLES, skip_locked=True),
        lambda n: {"outcome": "archived", "reasons": [None] * n, "errors": [None] * n},
    ),
    "archive without a reason": (
        lambda: settle.archive(TABLES, with_reason=False, skip_locked=True),
        lambda _: {"outcome": "archived"},
    ),
    "archive plainly": (lambda: settle.archive_done(TABLES), lambda _: {}),
    "delete": (lambda: settle.delete(TABLES, skip_locked=True), lambda _: {}),
    "extend": (
        lambda: settle.extend(TABLES, skip_locked=True),
        lambda _: {"lease": timedelta(minutes=1)},
    ),
    "release": (lambda: settle.release(TABLES, skip_locked=True), lambda _: {}),
    "release with a delay": (
        lambda: settle.release(TABLES, delayed=True, skip_locked=True),
        lambda _: {"delay": timedelta(minutes=1)},
    ),
    "fail": (
        lambda: settle.reschedule_failed(TABLES, skip_locked=True),
        lambda n: {"errors": ["no"] * n, "delays": [timedelta(0)] * n},
    ),
}


@pytest.mark.parametrize("way", SKIPPING)
def test_a_settle_that_is_to_skip_what_is_locked_settles_the_others_and_does_not_wait(
    engine, service, session, way: str
) -> None:
    build, more = SKIPPING[way]
    service.enqueue_many("mail", range(3))
    deliveries = service.dequeue("mail", 3)
    session.commit()
    locked = deliveries[1].id
    with Session(engine) as other:
        other.execute(sa.select(Message.id).where(Message.id == locked).with_for_update())
        rows = session.execute(build(), fence(deliveries, **more(3))).all()
    assert {row.id for row in rows} == {delivery.id for delivery in deliveries} - {locked}


def test_whereabouts_are_read_of_the_messages_asked_for_and_no_others(service, session) -> None:
    """A lost lease would otherwise cost a look at the whole backlog and the whole history."""
    service.enqueue_many("mail", range(6))
    service.archive_many(service.dequeue("mail", 3))
    live = [message.id for message in service.messages.find("mail")]
    settled = [message.id for message in service.archived.find("mail")]
    asked = [live[0], settled[0], 10**9]
    rows = session.execute(settle.whereabouts(TABLES), {"ids": asked}).all()
    assert [row.id for row in rows] == [live[0], settled[0]]


# --- what is locked just now ---------------------------------------------------------------------

LOCKED_OUT: dict[str, tuple[Callable[[], Any], dict[str, Any], str, int, set[int]]] = {
    # What builds the statement, its values, a row that is locked, and the rows that it then takes.
    "bury": (
        lambda: archive.dead_letter_exhausted(TABLES),
        {"queue": "mail", "limit": 9, "look": None},
        "messages",
        every_row.SPENT,
        set(),
    ),
    "release leases": (
        lambda: workers.release_leases(TABLES),
        {"ids": [every_row.BUSY]},
        "messages",
        every_row.LEASED,
        {every_row.LAST},
    ),
    "hand back": (
        lambda: consume.release_unanswered(TABLES),
        every_row.unanswered(every_row.BUSY),
        "messages",
        every_row.LEASED,
        {every_row.LAST},
    ),
    "stop the silent": (
        lambda: workers.stop_silent(TABLES, in_queue=False, holding=False),
        {"silent_for": timedelta(days=1)},
        "workers",
        every_row.SILENT,
        {every_row.SUSPENDED, every_row.QUIET},
    ),
    "prune": (
        lambda: archive.prune(TABLES, one_queue=False),
        {"limit": 9, "older_than": timedelta(hours=1)},
        "archive",
        every_row.OLD,
        {every_row.OLD_ELSEWHERE, every_row.KEPT},
    ),
    "dequeue": (
        lambda: lease.dequeue(TABLES, by_worker=False),
        {"queue": "mail", "limit": 2, "lease": None, "attempts": None, "worker": None},
        "messages",
        every_row.READY,
        {every_row.URGENT, every_row.LAPSED},
    ),
}


@pytest.fixture
def staged(engine: sa.Engine) -> sa.Engine:
    with engine.begin() as connection:
        every_row.set_up(connection)
    return engine


@pytest.mark.parametrize("what", LOCKED_OUT)
def test_what_somebody_has_locked_is_left_to_them_without_a_wait(staged, what: str) -> None:
    build, values, table, locked, taken = LOCKED_OUT[what]
    lock = sa.text(f"SELECT id FROM pgqrs_{table} WHERE id = :id FOR UPDATE")  # noqa: S608
    with Session(staged) as other, Session(staged) as session:
        other.execute(lock, {"id": locked})
        seen = every_row.Seen(session, build(), values)
        assert (seen.changed.get(table) or seen.gone.get(table) or set()) == taken


class Waiting:
    """A call in a thread and a session of its own; entered once it waits for a lock."""

    def __init__(self, engine: sa.Engine, call: Callable[[Session], Any]) -> None:
        self._engine = engine.execution_options()
        self._pool = ThreadPoolExecutor(1)
        self._call = call
        self._pid = Future[int]()

    def _run(self) -> Any:
        with Session(self._engine) as session, session.begin():
            session.execute(sa.text("SET LOCAL lock_timeout = '90s'"))
            self._pid.set_result(session.scalar(sa.select(sa.func.pg_backend_pid())))
            return self._call(session)

    def __enter__(self) -> Future[Any]:
        future = self._pool.submit(self._run)
        until_blocked(self._engine, self._pid.result(PATIENCE), future)
        return future

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def rows_of(statement: Any, **values: Any) -> Callable[[Session], list[int]]:
    return lambda session: [row.id for row in session.execute(statement, values).all()]


def test_a_batch_of_which_one_is_settled_this_very_moment_is_not_settled_at_all(staged) -> None:
    """What was counted before the wait is counted once more after it."""
    delete = settle.delete(TABLES)
    tokens = [every_row.token(every_row.LEASED), every_row.token(every_row.LAST)]
    both = {"ids": [every_row.LEASED, every_row.LAST], "tokens": tokens, "required": 2}
    with Session(staged) as first:
        item = {"ids": [every_row.LEASED], "tokens": tokens[:1], "required": 1}
        assert rows_of(delete, **item)(first) == [every_row.LEASED]
        with Waiting(staged, rows_of(delete, **both)) as second:
            first.commit()
            assert second.result(20) == []
        assert first.scalars(sa.select(Message.id).where(Message.id == every_row.LAST)).all()


def test_a_batch_of_which_one_is_requeued_this_very_moment_is_not_requeued_at_all(staged) -> None:
    requeue = archive.requeue(TABLES)
    values = {"attempts": None, "delay": timedelta(0)}
    both = values | {"ids": [every_row.OLD, every_row.DEAD], "required": 2}
    with Session(staged) as first:
        item = values | {"ids": [every_row.OLD], "required": 1}
        assert rows_of(requeue, **item)(first) == [every_row.OLD]
        with Waiting(staged, rows_of(requeue, **both)) as second:
            first.commit()
            assert second.result(20) == []
        kept = sa.select(ArchivedMessage.id).where(ArchivedMessage.id == every_row.DEAD)
        assert first.scalars(kept).all()


CANCEL = {
    "cancel": (
        lambda: messages.cancel(TABLES),
        {"ids": [every_row.READY, every_row.LATER], "reason": None},
    ),
    "cancel where": (
        lambda: messages.cancel_where(TABLES, (Message.id.in_([1, 4]),), by_payload=False),
        {"queue": "mail", "reason": None},
    ),
}


@pytest.mark.parametrize("way", CANCEL)
def test_what_is_leased_this_very_moment_is_not_cancelled(staged, way: str) -> None:
    build, values = CANCEL[way]
    leasing = {"queue": "mail", "limit": 2, "lease": None, "attempts": None, "worker": None}
    with Session(staged) as first:
        taken = rows_of(lease.dequeue(TABLES, by_worker=False), **leasing)(first)
        assert every_row.READY in taken
        with Waiting(staged, rows_of(build(), **values)) as second:
            first.commit()
            assert second.result(20) == [every_row.LATER]


def test_a_purge_takes_others_in_the_place_of_what_was_purged_this_very_moment(staged) -> None:
    purge = queues.purge(TABLES)
    values = {"queue": "mail", "limit": 2, "up_to": None}

    def count(session: Session) -> Any:
        result: Any = session.execute(purge, values)
        return result.rowcount

    with Session(staged) as first:
        assert count(first) == 2
        with Waiting(staged, count) as second:
            first.commit()
            assert second.result(20) == 2

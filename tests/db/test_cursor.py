"""A dequeue goes on from where its process was, and passes nothing over for long."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import InvalidArgument, Item, QueueNotFound, QueueService, metadata
from pgqrs_sa._core import cursors
from pgqrs_sa._core.cursor import CursorSnapshot, CursorUpdate, DequeueCursor, Position
from pgqrs_sa._core.sql import lease
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from support.cases import each_case


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock of all cursors, which stands still until a test moves it."""
    moments = [1_000.0]
    cursors._cursors.clear()
    monkeypatch.setattr(cursors, "DequeueCursor", lambda: DequeueCursor(clock=lambda: moments[0]))
    monkeypatch.setattr(
        "pgqrs_sa._core.cursor.interval", lambda _took: 1.0
    )  # however slow the machine
    yield moments
    cursors._cursors.clear()


@pytest.fixture
def sent(engine: sa.Engine) -> list[str]:
    """Where each dequeue began."""
    statements: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_c: Any, _cur: Any, sql: str, values: Any, *_rest: Any) -> None:
        if "to_regclass" in sql:
            statements.append("cursor" if values.get("cursor") else "beginning")

    return statements


@pytest.fixture
def take(engine: sa.Engine, service: QueueService) -> Callable[..., list[Any]]:
    def take(limit: int = 1, **options: Any) -> list[Any]:
        with Session(engine) as session, session.begin():
            found = QueueService(session).dequeue("mail", limit, **options)
            return [row.payload for row in found]

    return take


def test_a_process_goes_on_behind_what_it_has_leased(service, session, take, sent, clock):
    service.enqueue_many("mail", list(range(6)))
    session.commit()

    assert [take(2), take(2), take(2)] == [[0, 1], [2, 3], [4, 5]]
    assert sent == ["beginning", "cursor", "cursor"]


def test_nothing_behind_the_cursor_is_followed_by_a_look_at_the_beginning(
    service, session, take, sent, clock
):
    service.enqueue("mail", 1)
    session.commit()
    take()
    assert take() == []
    assert sent == ["beginning", "cursor", "beginning"]
    assert take() == []  # an empty queue has no cursor
    assert sent[3:] == ["beginning"]


def test_a_message_whose_transaction_commits_late_waits_for_the_sweep_and_no_longer(
    engine, service, session, take, clock
):
    with Session(engine) as late:
        QueueService(late).enqueue("mail", "late")
        service.enqueue_many("mail", ["a", "b", "c", "d"])
        session.commit()
        assert take() == ["a"]
        late.commit()
    assert take() == ["b"]
    clock[0] += 0.99
    assert take() == ["c"]
    clock[0] += 0.02
    assert take() == ["late"]
    assert take() == ["d"]


def test_a_lease_that_is_rolled_back_does_not_move_the_cursor(
    engine, service, session, take, clock
):
    service.enqueue_many("mail", ["a", "b", "c"])
    session.commit()
    assert take() == ["a"]
    with Session(engine) as other:
        assert QueueService(other).dequeue("mail")[0].payload == "b"
        other.rollback()
    assert take() == ["b"]


def test_a_lease_in_a_savepoint_counts_when_all_is_committed(engine, service, session, sent, clock):
    service.enqueue_many("mail", list(range(4)))
    session.commit()
    with Session(engine) as other, other.begin():
        with other.begin_nested():
            QueueService(other).dequeue("mail")
        QueueService(other).dequeue("mail")  # nothing is committed yet
    with Session(engine) as other, other.begin():
        assert [d.payload for d in QueueService(other).dequeue("mail")] == [2]
    assert sent == ["beginning", "beginning", "cursor"]


def test_what_is_released_or_comes_back_lies_behind_the_cursor(
    engine, service, session, take, clock
):
    service.enqueue_many("mail", ["a", "b"])
    session.commit()
    with Session(engine) as other, other.begin():
        (first,) = QueueService(other).dequeue("mail")
    with Session(engine) as other, other.begin():
        QueueService(other).release(first)
    assert [take(), take()] == [["b"], ["a"]]


def test_a_more_urgent_priority_than_any_before_is_seen_by_the_very_next_dequeue(
    engine, service, session, take, sent, clock
):
    service.enqueue_many("mail", [Item(n, priority=2 * n) for n in range(20)])
    service.enqueue_many("mail", [Item(n, priority=38) for n in range(20, 60)])
    session.commit()
    assert take(20) == list(range(20))
    for priority in (-1, -32768, 7, 37):
        with Session(engine) as late:
            QueueService(late).enqueue("mail", priority, priority=priority)
            (passed,) = take()
            late.commit()  # it was sent before that was leased
        assert take(2) == [priority, passed + 1]
    assert set(sent[1:]) == {"cursor"}


def test_a_queue_that_was_empty_is_read_from_its_beginning_until_a_lease_is_committed(
    engine, service, session, take, sent, clock
):
    service.enqueue("mail", 1)
    session.commit()
    assert take() == [1]
    clock[0] += 1.1
    assert take() == []
    service.enqueue("mail", 2)
    session.commit()
    with Session(engine) as other:
        QueueService(other).dequeue("mail")
        other.rollback()
    assert take() == [2]
    assert sent == ["beginning"] * 4


def test_a_reading_that_found_a_late_message_is_gone_on_from_although_it_was_rolled_back(
    engine, service, session, take, sent, clock
):
    with Session(engine) as late:
        QueueService(late).enqueue("mail", "late")
        service.enqueue("mail", 1)
        session.commit()
        assert take() == [1]
        late.commit()
    with Session(engine) as other:
        assert [delivery.payload for delivery in QueueService(other).dequeue("mail")] == ["late"]
        other.rollback()
    assert take() == ["late"]
    assert sent == ["beginning", "cursor", "beginning", "cursor"]


def test_what_is_found_while_all_places_are_forgotten_is_none(
    engine, service, session, take, sent, clock
):
    service.enqueue_many("mail", [1, 2, 3])
    session.commit()
    take()
    forgetful = [True]

    @sa.event.listens_for(engine, "after_cursor_execute")
    def forget(*_: Any) -> None:
        if forgetful and sent[-1] == "cursor":
            cursors.reset()
            forgetful.clear()

    assert [take(), take()] == [[2], [3]]
    assert sent == ["beginning", "cursor", "beginning"]


def test_the_time_of_a_dequeue_is_that_of_its_statement(
    engine, service, session, take, monkeypatch
):
    taken: list[float] = []

    class Noting(DequeueCursor):
        def record(self, *found: Any, seconds: float, **how: Any) -> CursorUpdate:
            taken.append(seconds)
            return super().record(*found, seconds=seconds, **how)

    cursors.reset()
    monkeypatch.setattr(cursors, "DequeueCursor", Noting)
    service.enqueue("mail", 1)
    session.commit()
    statement: list[float] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def begins(*_: Any) -> None:
        statement.append(time.monotonic())

    @sa.event.listens_for(engine, "after_cursor_execute")
    def ends(*_: Any) -> None:
        statement.append(time.monotonic())

    began = time.monotonic()
    take()
    cursors.reset()
    assert statement[1] - statement[0] <= taken[0] <= time.monotonic() - began


@pytest.mark.parametrize(("limit", "full"), [(1, True), (2, True), (3, False)])
def test_a_dequeue_that_could_have_taken_more_was_not_full(
    service, session, take, monkeypatch, limit, full
):
    told: list[bool] = []

    class Noting(DequeueCursor):
        def record(self, *found: Any, full: bool, **how: Any) -> CursorUpdate:
            told.append(full)
            return super().record(*found, full=full, **how)

    cursors.reset()
    monkeypatch.setattr(cursors, "DequeueCursor", Noting)
    service.enqueue_many("mail", [1, 2])
    session.commit()
    take(limit)
    cursors.reset()
    assert told == [full]


def test_a_child_of_a_fork_waits_for_no_thread_of_its_parent(engine):
    with cursors._cursors._lock:
        if (pid := os.fork()) == 0:
            signal.alarm(10)
            os._exit(0 if cursors._cursors.get(engine.pool, "mail") is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    lock = cursors._cursors._lock
    cursors._cursors.reset()  # as the child has done
    assert cursors._cursors._lock is not lock


@each_case(
    ("table", "key", "expected"),
    [
        ("f", None, False),  # there is no such table
        ("f", "acme", False),
        ("f1", None, True),
        ("t1", None, False),  # whose rows depend on who asks
        ("t1", "acme", True),
        ("repef1", "acme", False),  # what keeps a snapshot does not see what came since
        ("serit1", "acme", False),
    ],
)
def test_places_are_remembered_of_tables_whose_rows_are_the_same_for_all_or_by_key(
    table, key, expected
):
    taking: Any = SimpleNamespace(_scope=SimpleNamespace(context=SimpleNamespace(cursor_key=key)))
    assert cursors.CursorUse._may_remember(taking, table) is expected


def test_criteria_look_at_all_messages(service, session, take, sent, clock):
    from pgqrs_sa import Message

    service.enqueue_many("mail", [1, 2, 3])
    session.commit()
    take(2)
    assert take(where=Message.id > 0) == [3]
    assert sent == ["beginning", "beginning"]


def test_twenty_levels_are_gone_on_from(service, session, take, sent, clock):
    service.enqueue_many("mail", [Item(n, priority=n % 20) for n in range(200)])
    session.commit()
    taken = [delivery for _ in range(28) for delivery in take(7)]
    assert taken == sorted(range(200), key=lambda n: (n % 20, n))[:196]
    assert sent == ["beginning"] + ["cursor"] * 27


def test_two_engines_have_cursors_of_their_own(engine, service, session, take, sent, clock):
    service.enqueue_many("mail", list(range(4)))
    session.commit()
    take()
    other = sa.create_engine(engine.url)
    with Session(other) as elsewhere, elsewhere.begin():
        assert [d.payload for d in QueueService(elsewhere).dequeue("mail")] == [1]
    other.dispose()
    assert take() == [2]
    assert sent == ["beginning", "cursor"]


# ------------------------------------------------------- whose places they are, and how many

JOINED = ["conditional_savepoint", "rollback_only", "create_savepoint"]


@pytest.mark.parametrize("mode", JOINED)
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_only_the_outermost_commit_of_a_joined_session_moves_a_place(
    engine, service, session, take, clock, mode, end
):
    service.enqueue_many("mail", list(range(9)))
    session.commit()
    assert take(2) == [0, 1]
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as joined:
            assert [delivery.payload for delivery in QueueService(joined).dequeue("mail", 2)] == [
                2,
                3,
            ]
            joined.commit()
            assert place(0) == 2
        getattr(outer, end)()
    assert place(0) == (4 if end == "commit" else 2)
    assert take(2) == ([4, 5] if end == "commit" else [2, 3])


@pytest.mark.parametrize("mode", JOINED)
def test_a_savepoint_of_a_connection_that_is_rolled_back_moves_no_place(
    engine, service, session, take, clock, mode
):
    """After the session that was joined to it has committed."""
    service.enqueue_many("mail", list(range(9)))
    session.commit()
    assert take(2) == [0, 1]
    with engine.begin() as connection:
        savepoint = connection.begin_nested()
        with Session(connection, join_transaction_mode=mode) as joined:
            assert [delivery.payload for delivery in QueueService(joined).dequeue("mail", 2)] == [
                2,
                3,
            ]
            joined.commit()
        savepoint.rollback()
    assert place(0) == 2
    assert take(2) == [2, 3]


def place(level: int) -> int:
    """The id of the last message that was leased, of the one queue that there is."""
    ((_, by_key),) = cursors._cursors._by_pool.items()
    (item,) = by_key.values()
    return item.snapshot().positions[level].id


def test_a_joined_session_that_is_rolled_back_moves_no_place(engine, service, session, take, clock):
    service.enqueue_many("mail", list(range(9)))
    session.commit()
    assert take(2) == [0, 1]
    mode = "create_savepoint"
    with (
        engine.begin() as connection,
        Session(connection, join_transaction_mode=mode) as joined,  # type: ignore[arg-type]
    ):
        QueueService(joined).dequeue("mail", 2)
        joined.rollback()
        assert [delivery.payload for delivery in QueueService(joined).dequeue("mail")] == [2]
        joined.commit()
    assert take(2) == [3, 4]


def test_a_savepoint_that_is_rolled_back_moves_no_place(engine, service, session, take, clock):
    service.enqueue_many("mail", list(range(9)))
    session.commit()
    assert take(2) == [0, 1]
    with Session(engine) as other, other.begin(), other.begin_nested() as savepoint:
        QueueService(other).dequeue("mail", 2)
        savepoint.rollback()
    assert take(2) == [2, 3]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_keeps_one_snapshot_puts_off_no_reading(
    engine, service, session, take, clock, level
):
    """It does not see the message that the reading is for."""
    service.enqueue("mail", "other", priority=5)
    session.commit()
    with Session(engine.execution_options(isolation_level=level)) as old, Session(engine) as late:
        old.execute(sa.text("SELECT 1 FROM pgqrs_queues"))
        QueueService(late).enqueue("mail", "late")
        service.enqueue_many("mail", [1, 2, 3])
        session.commit()
        assert take() == [1]
        late.commit()
        clock[0] += 1.0
        assert [delivery.payload for delivery in QueueService(old).dequeue("mail")] == ["other"]
        assert take() == ["late"]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_keeps_one_snapshot_moves_no_place(
    engine, service, session, take, clock, level
):
    service.enqueue_many("mail", list(range(9)))
    session.commit()
    with Session(engine.execution_options(isolation_level=level)) as old, old.begin():
        assert len(QueueService(old).dequeue("mail", 3)) == 3
    assert cursors._cursors._by_pool == {}
    assert take(2) == [3, 4]
    assert place(0) == 5


def test_engines_of_one_pool_share_their_places(engine, service, session, sent, clock):
    service.enqueue_many("mail", list(range(4)))
    session.commit()
    for number in range(4):
        request = engine.execution_options(request=number)
        with Session(request) as other, other.begin():
            assert [d.payload for d in QueueService(other).dequeue("mail")] == [number]
    assert sent == ["beginning", "cursor", "cursor", "cursor"]


def test_nothing_is_remembered_of_queues_that_do_not_exist_or_gave_nothing(service, session, clock):
    for name in ("mail", "nowhere"):
        with contextlib.suppress(QueueNotFound):
            service.dequeue(name)
    session.commit()
    assert cursors._cursors._by_pool == {}


def test_the_queues_of_the_latest_leases_are_remembered(
    service, session, take, sent, clock, monkeypatch
):
    assert cursors._MOST == 1_000  # as docs/explanation/performance.md has it
    monkeypatch.setattr(cursors, "_MOST", 2)
    for name in ("one", "two", "three"):
        service.queues.create(name)
        service.enqueue_many(name, [1, 2, 3])
    session.commit()
    for name in ("one", "two", "one", "three", "one", "two"):
        service.dequeue(name)
        session.commit()
    assert sent == ["beginning", "beginning", "cursor", "beginning", "cursor", "beginning"]


def test_pools_are_not_kept_for_it(migrated, service, session, clock):
    service.enqueue("mail", 1)
    session.commit()
    other = sa.create_engine(migrated.url)
    with Session(other) as elsewhere, elsewhere.begin():
        QueueService(elsewhere).dequeue("mail")
    assert len(cursors._cursors._by_pool) == 1
    other.dispose()
    del other, elsewhere
    gc.collect()
    assert len(cursors._cursors._by_pool) == 0


def test_a_key_of_the_callers_keeps_places_apart(engine, service, session, sent, clock):
    service.enqueue_many("mail", list(range(4)))
    session.commit()
    for key in ("acme", "acme", "other"):
        with Session(engine) as other, other.begin():
            QueueService(other, cursor_key=key).dequeue("mail")
    assert sent == ["beginning", "cursor", "beginning"]


@pytest.fixture
def tenants(engine: sa.Engine) -> Iterator[list[str]]:
    """Two schemas, each with tables of its own; one has what SQL would take for something else."""
    names = ["first", "the %s ':second' \"$1\""]
    with engine.begin() as connection:
        for name in names:
            connection.execute(sa.schema.CreateSchema(name))
            translated = connection.execution_options(schema_translate_map={None: name})
            metadata.create_all(translated, checkfirst=False)
    yield names
    with engine.begin() as connection:
        for name in names:
            connection.execute(sa.schema.DropSchema(name, cascade=True))


def test_a_schema_that_a_hook_gives_each_statement_keeps_places_apart(engine, clock, tenants, sent):
    class Translated(Session):
        """A session of a tenant, as a host writes it: the connection knows nothing of that."""

    @sa.event.listens_for(Translated, "do_orm_execute")
    def translate(state: Any) -> None:
        tenant = state.session.info["tenant"]
        state.update_execution_options(schema_translate_map={None: tenant})

    def run(tenant: str, call: Callable[[QueueService], Any]) -> Any:
        with Translated(engine, info={"tenant": tenant}) as session, session.begin():
            return call(QueueService(session))

    def take(tenant: str) -> list[Any]:
        return run(tenant, lambda queue: [delivery.payload for delivery in queue.dequeue("mail")])

    first, second = tenants
    for tenant in tenants:
        run(tenant, lambda queue: queue.queues.create("mail"))
    run(second, lambda queue: queue.enqueue("mail", "early"))
    run(first, lambda queue: queue.enqueue_many("mail", [1, 2, 3, 4]))
    run(second, lambda queue: queue.enqueue_many("mail", ["late", "later"]))
    assert [take(first), take(first)] == [[1], [2]]
    assert [take(second), take(second), take(second)] == [["early"], ["late"], ["later"]]
    assert sent == ["beginning", "cursor", "cursor", "cursor", "cursor"]


def test_a_key_is_a_text_that_is_not_empty(session):
    for key in ("", 7):
        with pytest.raises(InvalidArgument, match="cursor_key must be text"):
            QueueService(session, cursor_key=key)


@pytest.mark.parametrize("levels", [1, 20])
def test_dead_entries_are_not_read_again_while_a_snapshot_keeps_them(
    engine, service, session, clock, levels
):
    """The cure for what slows down every queue in a table.

    With places each level costs a few blocks, and the dead entries none: there are so many that
    the levels do not count, however the pages happen to be filled.
    """
    n_all, limit = 24_000, 800
    priorities = [n * levels // n_all for n in range(n_all)]
    service.enqueue_many(
        "mail", [Item(n, priority=priority) for n, priority in enumerate(priorities)]
    )
    session.commit()
    with engine.connect() as reader:
        reader.execution_options(isolation_level="REPEATABLE READ")
        reader.execute(sa.text("SELECT count(*) FROM pgqrs_queues"))
        last: dict[int, Position] = {}
        for _ in range(n_all // limit - 1):
            with Session(engine) as other, other.begin():
                deliveries = QueueService(other).dequeue("mail", limit)
                for delivery in deliveries:
                    last[delivery.priority] = Position(delivery.enqueued_at, delivery.id, 0, 0.0)
                QueueService(other).delete_many(deliveries)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            reads = {
                "beginning": _blocks(connection, None),
                "places": _blocks(connection, last),
            }
    assert reads["places"] * 3 < reads["beginning"], reads


def _blocks(connection: sa.Connection, places: dict[int, Position] | None) -> int:
    values: dict[str, Any] = {
        "queue": "mail",
        "limit": 1,
        "lease": None,
        "worker": None,
        "attempts": None,
    }
    if places is not None:
        oid = connection.exec_driver_sql("SELECT 'pgqrs_messages'::regclass::oid").scalar_one()
        values["cursor"] = CursorSnapshot(f"f{oid}", places).as_json()
    statement = lease.dequeue(tables_of(READY_MADE), by_worker=False)
    compiled = statement.compile(dialect=connection.dialect)
    found = connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}", compiled.construct_params(values)
    ).scalar_one()[0]["Plan"]
    return found["Shared Hit Blocks"] + found["Shared Read Blocks"]

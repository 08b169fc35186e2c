"""A dequeue goes on from where its process was, and passes nothing over for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from pgqrs_sa.floor import Floor
from pgqrs_sa.operations import floors


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock of all floors, which stands still until a test moves it."""
    moments = [1_000.0]
    floors._floors.clear()
    monkeypatch.setattr(floors, "Floor", lambda: Floor(clock=lambda: moments[0]))
    yield moments
    floors._floors.clear()


@pytest.fixture
def sent(engine: sa.Engine) -> list[str]:
    """Where each dequeue began."""
    statements: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_c: Any, _cur: Any, sql: str, *_rest: Any) -> None:
        if "pq_picked" in sql:
            statements.append("floor" if "pq_floor" in sql else "beginning")

    return statements


@pytest.fixture
def take(engine: sa.Engine, service: QueueService) -> Callable[..., list[Any]]:
    def take(limit: int = 1, **options: Any) -> list[Any]:
        with Session(engine) as session, session.begin():
            found = QueueService(session).dequeue("mail", limit, **options)
            return [one.payload for one in found]

    return take


def test_a_process_goes_on_behind_what_it_has_leased(service, session, take, sent, clock):
    service.enqueue_many("mail", list(range(6)))
    session.commit()

    assert [take(2), take(2), take(2)] == [[0, 1], [2, 3], [4, 5]]
    assert sent == ["beginning", "floor", "floor"]


def test_nothing_behind_the_floor_is_followed_by_a_look_at_the_beginning(
    service, session, take, sent, clock
):
    service.enqueue("mail", 1)
    session.commit()
    take()
    assert take() == []
    assert sent == ["beginning", "floor", "beginning"]
    assert take() == []  # an empty queue has no floor
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


def test_a_lease_that_is_rolled_back_does_not_move_the_floor(engine, service, session, take, clock):
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
    assert sent == ["beginning", "beginning", "floor"]


def test_what_is_released_or_comes_back_lies_behind_the_floor(
    engine, service, session, take, clock
):
    service.enqueue_many("mail", ["a", "b"])
    session.commit()
    with Session(engine) as other, other.begin():
        (first,) = QueueService(other).dequeue("mail")
    with Session(engine) as other, other.begin():
        QueueService(other).release(first)
    assert [take(), take()] == [["b"], ["a"]]


def test_a_more_urgent_priority_than_any_before_is_found_by_the_next_sweep(
    service, session, take, clock
):
    service.enqueue_many("mail", list(range(5)))
    session.commit()
    assert take() == [0]
    service.enqueue("mail", "urgent", priority=-1)
    session.commit()
    assert take() == [1]
    clock[0] += 1.01
    assert take() == ["urgent"]
    service.enqueue("mail", "urgent again", priority=-1)
    session.commit()
    assert take() == ["urgent again"]  # the priority is known by now


def test_criteria_look_at_all_messages(service, session, take, sent, clock):
    from pgqrs_sa import Message

    service.enqueue_many("mail", [1, 2, 3])
    session.commit()
    take(2)
    assert take(where=Message.id > 0) == [3]
    assert sent == ["beginning", "beginning"]


def test_two_engines_have_floors_of_their_own(engine, service, session, take, sent, clock):
    service.enqueue_many("mail", list(range(4)))
    session.commit()
    take()
    other = sa.create_engine(engine.url)
    with Session(other) as elsewhere, elsewhere.begin():
        assert [d.payload for d in QueueService(elsewhere).dequeue("mail")] == [1]
    other.dispose()
    assert take() == [2]
    assert sent == ["beginning", "floor"]


def test_dead_entries_are_not_read_again_while_a_snapshot_keeps_them(
    engine, service, session, clock
):
    """The cure for what slows down every queue in a table."""
    service.enqueue_many("mail", list(range(3_000)))
    session.commit()
    with engine.connect() as reader:
        reader.execution_options(isolation_level="REPEATABLE READ")
        reader.execute(sa.text("SELECT count(*) FROM pgqrs_queues"))
        for _ in range(28):
            with Session(engine) as other, other.begin():
                QueueService(other).delete_many(QueueService(other).dequeue("mail", 100))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            reads = {
                how: _blocks(connection, floored)
                for how, floored in (("beginning", False), ("floor", True))
            }
    assert reads["floor"] * 3 < reads["beginning"], reads


def _blocks(connection: sa.Connection, floored: bool) -> int:
    from pgqrs_sa import Models
    from pgqrs_sa.statements import lease

    values: dict[str, Any] = {
        "queue": "mail",
        "limit": 1,
        "lease": None,
        "worker": None,
        "attempts": None,
    }
    if floored:
        row = connection.execute(
            sa.text("SELECT vt, id FROM pgqrs_messages ORDER BY vt, id")
        ).first()
        values |= {"floor_levels": [0], "floor_vts": [row.vt], "floor_ids": [row.id]}
    statement = lease.dequeue(Models(), by_worker=False, floored=floored)
    compiled = statement.compile(dialect=connection.dialect)
    found = connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}", compiled.construct_params(values)
    ).scalar_one()[0]["Plan"]
    return found["Shared Hit Blocks"] + found["Shared Read Blocks"]

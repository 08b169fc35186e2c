"""A requeue next to a transaction that is just enqueueing the same key: one waits for the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import DuplicateMessage, Item, Message, QueueService
from support.waiting import PATIENCE, until_blocked


@contextmanager
def waiting(engine: sa.Engine, call: Callable[[Session], Any]) -> Iterator[Future[Any]]:
    """Run a call in a session of its own, and enter once it waits for a lock."""
    begun, pid = threading.Event(), [0]

    def run() -> Any:
        with Session(engine) as session, session.begin():
            pid[0] = session.scalar(sa.select(sa.func.pg_backend_pid()))
            begun.set()
            return call(session)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert begun.wait(PATIENCE)
        until_blocked(engine, pid[0], future)
        yield future


@pytest.fixture
def archived(service: QueueService, session: Session) -> Callable[..., list[int]]:
    """Return a function that makes archived messages, and returns the archive's ids."""

    def make(*keys: str | None) -> list[int]:
        service.enqueue_many("mail", [Item(key, key=key) for key in keys])
        taken = {delivery.payload: delivery for delivery in service.dequeue("mail", len(keys))}
        for key in keys:
            service.archive(taken[key])
        session.commit()
        ids = [message.id for message in service.archived.find("mail")]
        session.commit()
        return ids

    return make


def live(engine: sa.Engine) -> list[tuple[int, str]]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(Message.id, Message.dedup_key).order_by(Message.id))
        return [(row.id, row.dedup_key) for row in rows]


def requeue(*ids: int) -> Callable[[Session], Any]:
    return lambda session: QueueService(session).archived.requeue_many(ids)


def test_a_key_that_another_transaction_enqueues_is_a_duplicate_once_that_commits(
    engine, service, session, archived
) -> None:
    ids = archived("k", "l")
    new = service.enqueue("mail", 2, key="k")
    with waiting(engine, requeue(*ids)) as second:
        session.commit()
        with pytest.raises(DuplicateMessage) as refused:
            second.result(10)
    assert (refused.value.key, refused.value.id) == ("k", new.id)
    assert live(engine) == [(new.id, "k")]
    assert len(service.archived.find("mail")) == 2


def test_it_is_requeued_when_that_is_rolled_back(engine, service, session, archived) -> None:
    ids = archived("k")
    service.enqueue("mail", 2, key="k")
    with waiting(engine, requeue(*ids)) as second:
        session.rollback()
        (receipt,) = second.result(10)
    assert live(engine) == [(receipt.id, "k")]
    assert service.archived.find("mail") == []


def test_the_callers_transaction_goes_on_after_the_refusal(
    engine, service, session, archived
) -> None:
    ids = archived("k")
    service.enqueue("mail", 2, key="k")

    def attempt(other: Session) -> None:
        mine = QueueService(other)
        mine.enqueue("mail", "before", key="before")
        with pytest.raises(DuplicateMessage):
            mine.archived.requeue(ids[0])
        other.add(Message(queue_name="mail", payload="after", dedup_key="after"))

    with waiting(engine, attempt) as second:
        session.commit()
        second.result(10)
    assert sorted(key for _, key in live(engine)) == ["after", "before", "k"]


def test_in_a_savepoint_of_the_callers_it_is_refused_as_well(
    engine, service, session, archived
) -> None:
    ids = archived("k")
    service.enqueue("mail", 2, key="k")

    def attempt(other: Session) -> None:
        QueueService(other).enqueue("mail", "before", key="before")
        savepoint = other.begin_nested()
        QueueService(other).enqueue("mail", "inside", key="inside")
        with pytest.raises(DuplicateMessage):
            QueueService(other).archived.requeue(ids[0])
        savepoint.rollback()

    with waiting(engine, attempt) as second:
        session.commit()
        second.result(10)
    assert sorted(key for _, key in live(engine)) == ["before", "k"]


def test_a_key_that_is_free_again_by_the_time_it_is_looked_up_is_requeued(
    engine, service, session, archived
) -> None:
    """The INSERT found it taken; by the next statement its message was settled."""
    ids = archived("k")
    new = service.enqueue("mail", 2, key="k")
    rolled_back = threading.Event()

    @event.listens_for(engine, "rollback_savepoint")
    def settle(*_: Any) -> None:
        if not rolled_back.is_set():
            rolled_back.set()
            with Session(engine) as third, third.begin():
                third.execute(sa.delete(Message).where(Message.id == new.id))

    with waiting(engine, requeue(*ids)) as second:
        session.commit()
        (receipt,) = second.result(10)
    assert rolled_back.is_set()
    assert live(engine) == [(receipt.id, "k")]


def test_on_a_connection_in_autocommit_it_is_refused_as_well(
    engine, service, session, archived
) -> None:
    ids = archived("k", "l")
    new = service.enqueue("mail", 2, key="l")
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with waiting(alone, requeue(*ids)) as second:
        session.commit()
        with pytest.raises(DuplicateMessage):
            second.result(10)
    assert live(engine) == [(new.id, "l")]
    assert len(service.archived.find("mail")) == 2


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_does_not_show_the_key_ends_in_an_error_of_the_databases(
    engine, service, session, archived, level: str
) -> None:
    ids = archived("k")
    with Session(engine.execution_options(isolation_level=level)) as old:
        old.execute(sa.select(Message.id)).all()
        new = service.enqueue("mail", 2, key="k")
        session.commit()
        with pytest.raises(sa.exc.DBAPIError) as failure:
            QueueService(old).archived.requeue(ids[0])
        assert failure.value.orig.sqlstate in {"23505", "40001"}
    assert live(engine) == [(new.id, "k")]


def test_a_requeue_and_enqueues_of_the_same_keys_do_not_deadlock(
    engine, service, session, archived
) -> None:
    """Each takes the keys in their order: the one that waits has none that the other needs."""
    ids = archived("l", "k", "K")
    service.enqueue("mail", 2, key="K")
    with waiting(engine, requeue(*ids)) as second:
        service.enqueue("mail", 2, key="k")
        service.enqueue("mail", 2, key="l")
        session.commit()
        with pytest.raises(DuplicateMessage):
            second.result(10)
    assert [key for _, key in live(engine)] == ["K", "k", "l"]

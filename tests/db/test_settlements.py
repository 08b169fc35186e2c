"""Settlements in detail: what is kept, what is left to others, and what is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Delivery, LeaseLost, Message, QueueService
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.disposition import Disposition

LOCK = sa.text("SELECT FROM pgqrs_messages FOR UPDATE")
UNDECODABLE = sa.text(
    "INSERT INTO pgqrs_messages (queue_id, payload)"
    " SELECT id, repeat('9', 5000)::jsonb FROM pgqrs_queues"
)


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """As everywhere, but a wait for a lock fails soon."""
    engine = sa.create_engine(migrated.url, connect_args={"options": "-c lock_timeout=50ms"})
    yield engine
    engine.dispose()


@pytest.fixture
def delivery(service: QueueService, session: Session) -> Delivery:
    service.enqueue("mail", 1)
    (delivery,) = service.dequeue("mail")
    session.commit()
    return delivery


def test_no_reason_is_made_up_for_what_is_archived(service, session, delivery):
    service.archive(delivery)
    row = session.execute(sa.select(ArchivedMessage.reason, ArchivedMessage.last_error)).one()
    assert row == (None, None)


def test_the_reason_is_kept_of_what_is_discarded(service, session, delivery):
    service.archive(delivery, outcome="discarded", reason="why")
    assert session.scalars(sa.select(ArchivedMessage.reason)).one() == "why"


@pytest.mark.parametrize(
    "put_back",
    [
        lambda service, item: service.release(item, delay=60),
        lambda service, item: service.fail(item, "error", delay=60),
        lambda service, item: service.fail(item, "error"),
    ],
    ids=["release", "fail", "fail_with_backoff"],
)
def test_what_is_put_back_for_later_takes_one_statement(
    session: Session, delivery: Delivery, put_back: Callable[[QueueService, Delivery], Any]
) -> None:
    """Nobody is asked for who waits, as nothing can be seen yet."""
    sent: list[str] = []
    event.listen(
        session.connection(), "after_cursor_execute", lambda _c, _cur, sql, *_: sent.append(sql)
    )
    put_back(QueueService(session, notify=True), delivery)
    assert len(sent) == 1


def test_an_undecodable_message_that_is_locked_meanwhile_stays_leased(engine, service, session):
    """Where each statement commits by itself, others may lock it before it is a dead letter."""
    session.execute(UNDECODABLE)
    session.commit()
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as holder, Session(alone) as own:

        def lock(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
            if "pgqrs_messages" in sql and not holder.in_transaction():
                holder.execute(LOCK)

        event.listen(own.connection(), "after_cursor_execute", lock)
        assert QueueService(own).dequeue("mail") == []
        assert holder.in_transaction()
    assert service.archived.find("mail") == []
    session.execute(sa.update(Message).values(leased_until=sa.func.now() - timedelta(seconds=1)))
    session.commit()
    assert service.dequeue("mail") == []
    assert [message.outcome for message in service.archived.find("mail")] == ["dead"]


def test_a_failure_that_has_met_a_lock_is_no_dead_letter(engine, service, session, delivery):
    """With attempts left it is tried again later, also if the lock is given up meanwhile."""
    with engine.connect() as holder:
        holder.execute(LOCK)
        event.listen(session.connection(), "after_cursor_execute", lambda *_: holder.rollback())
        wanted = [Disposition(delivery, "retry")]
        assert store.apply(service._scope, wanted, strict=False) == {}
        assert not holder.in_transaction()
    session.commit()
    assert service.archived.find("mail") == []
    assert service.try_archive(delivery)


def test_a_renewal_leaves_a_row_that_is_locked_alone(engine, service, session, delivery):
    def renewed() -> frozenset[int]:
        return store.renew(service._scope, [delivery], timedelta(minutes=1))

    with engine.connect() as holder:
        holder.execute(LOCK)
        assert renewed() == frozenset()
    assert renewed() == {delivery.id}


SETTLED = {
    "archive": "archived",
    "discard": "discarded",
    "retry": "retry",
    "dead": "dead",
    "release": "released",
}


@pytest.mark.parametrize("kind", SETTLED)
def test_a_settlement_leaves_a_row_that_is_locked_alone_unless_it_is_strict(
    engine, service, session, delivery, kind
):
    wanted = [Disposition(delivery, kind, reason="why")]
    with engine.connect() as holder:
        holder.execute(LOCK)
        assert store.apply(service._scope, wanted, strict=False) == {}
        with pytest.raises(sa.exc.OperationalError):
            store.apply(service._scope, wanted, strict=True)
        session.rollback()
    settled = store.apply(service._scope, wanted, strict=False)
    assert settled == {delivery.id: SETTLED[kind]}


def test_a_batch_of_which_a_lease_is_lost_is_left_as_it_is_also_when_that_is_caught(
    service, session
):
    service.enqueue_many("mail", [1, 2])
    deliveries = service.dequeue("mail", 2)
    session.commit()
    service.delete(deliveries[0])
    with pytest.raises(LeaseLost):
        service.archive_many(deliveries)
    session.commit()
    assert service.messages.count("mail") == 1
    assert service.try_archive_many(deliveries) == [False, True]

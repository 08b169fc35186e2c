"""What ``repr`` shows: enough to tell objects apart, nothing secret, and nothing loaded for it."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import (
    ArchivedMessage,
    AsyncConsumer,
    AsyncQueueService,
    Base,
    Consumer,
    Message,
    Queue,
    QueueService,
    Worker,
)

SECRET = "s3cret-of-somebody"  # noqa: S105
URL = f"postgresql+psycopg://shop:{SECRET}@db.example/shop?password={SECRET}"


def test_a_service_shows_its_database_and_its_settings():
    with Session(sa.create_engine(URL)) as session:
        assert repr(QueueService(session)) == "<QueueService database='shop@db.example'>"
        assert repr(QueueService(session, worker=7, notify=True, allow_autocommit=True)) == (
            "<QueueService database='shop@db.example' worker=7 allow_autocommit=True notify=True>"
        )
    session = AsyncSession(create_async_engine(URL))
    assert repr(AsyncQueueService(session)) == "<AsyncQueueService database='shop@db.example'>"


def test_a_service_of_several_databases_or_none_shows_none():
    engine = sa.create_engine(URL)
    assert repr(QueueService(Session())) == "<QueueService>"
    assert repr(QueueService(Session(binds={Base: engine}))) == "<QueueService>"


def test_a_consumer_shows_its_name_and_queues():
    consumer = Consumer(sessionmaker(sa.create_engine(URL)), name="mailer", concurrency=3)
    consumer.on("mail")(lambda payload: None)
    assert repr(consumer) == "<Consumer name='mailer' queues=['mail'] concurrency=3>"
    other = AsyncConsumer(async_sessionmaker(create_async_engine(URL)), name="other")
    assert repr(other) == "<AsyncConsumer name='other' queues=[] concurrency=10>"


def test_a_consumer_of_many_queues_is_shown_short():
    consumer = Consumer(sessionmaker(sa.create_engine(URL)))
    for number in range(200):
        consumer.on(f"queue-{number}")(lambda payload: None)
    assert len(repr(consumer)) < 200


def test_a_message_that_is_not_flushed_shows_what_it_has():
    message = Message(queue_name="mail", payload={"token": SECRET}, delay=60)
    assert repr(message) == "<Message vt=... payload=<dict of 1> queue_name='mail'>"
    assert repr(Message()) == "<Message>"
    assert repr(Message(payload=SECRET)) == f"<Message payload=<str of {len(SECRET)}>>"
    assert repr(Message(payload=7)) == "<Message payload=<int>>"


@pytest.fixture
def rows(service: QueueService, session: Session) -> list[Any]:
    """A row of each table, loaded."""
    worker = service.workers.register("mailer", queues=["mail"])
    service.enqueue_many("mail", [{"token": SECRET}, {"token": SECRET}])
    first, _ = service.dequeue("mail", 2, worker=worker)
    service.fail(first, SECRET, reason="bounced", dead=True)
    session.commit()
    return [
        session.scalars(sa.select(case)).one() for case in (Queue, Message, ArchivedMessage, Worker)
    ]


def test_a_loaded_row_shows_its_columns(rows):
    queue, message, archived, worker = map(repr, rows)
    assert queue == f"<Queue id={rows[0].id} queue_name='mail'>"
    assert message.startswith(f"<Message id={rows[1].id} queue_id={rows[0].id} priority=0 vt=2")
    assert message.endswith("read_ct=1 max_read_ct=5 payload=<dict of 1>>")
    assert "outcome='dead'" in archived
    assert "name='mailer'" in worker
    assert "status='ready'" in worker
    assert "queues=['mail']" in worker


def test_nothing_is_loaded_for_it_and_nothing_raised(rows, session, engine):
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    session.commit()  # expires them
    assert [repr(row) for row in rows] == ["<Queue>", "<Message>", "<ArchivedMessage>", "<Worker>"]
    session.close()  # detaches them
    assert [repr(row) for row in rows] == ["<Queue>", "<Message>", "<ArchivedMessage>", "<Worker>"]
    assert sent == []


def test_nothing_that_is_shown_is_secret(rows, service, session):
    service.enqueue("mail", {"token": SECRET}, headers={"authorization": SECRET})
    (delivery,) = service.dequeue("mail")
    service.fail(delivery, SECRET, delay=0)
    deliveries = service.dequeue("mail")
    shown = [*rows, *deliveries, *service.messages.find("mail"), *service.archived.find("mail")]
    assert deliveries
    for case in [*shown, service]:
        assert SECRET not in repr(case)

"""What a service and a consumer take for a session: registries too, and nothing else."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    AsyncQueueService,
    Consumer,
    InvalidArgument,
    Message,
    QueueService,
)


@pytest.fixture
def scoped(engine: sa.Engine) -> Iterator[scoped_session[Session]]:
    registry = scoped_session(sessionmaker(engine))
    yield registry
    registry.remove()


def left(engine: sa.Engine) -> int:
    with Session(engine) as session:
        return session.execute(sa.select(sa.func.count()).select_from(Message)).scalar_one()


# --- registries ----------------------------------------------------------------------------------


def test_a_service_takes_a_registry_of_sessions(service, scoped):
    queue = QueueService(scoped)
    queue.enqueue("mail", 1)
    assert scoped().in_transaction()  # that of the scope, and no other
    (delivery,) = queue.dequeue("mail")
    queue.archive(delivery)
    assert queue.messages.count("mail") == 0
    scoped.commit()


def test_a_service_is_bound_to_the_session_that_is_current_as_it_is_built(service, scoped, engine):
    first = QueueService(scoped)
    first.enqueue("mail", 1)
    scoped.remove()
    QueueService(scoped).enqueue("mail", 2)
    scoped.commit()
    with Session(engine) as session:
        assert session.scalars(sa.select(Message.payload)).all() == [2]


def test_a_service_takes_flask_sqlalchemys_session(service, migrated):
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy()
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = migrated.url
    db.init_app(app)
    with app.app_context():
        QueueService(db.session).enqueue("mail", 1)
        db.session.commit()
        (delivery,) = QueueService(db.session).dequeue("mail")
        assert delivery.payload == 1
        db.session.commit()
        with pytest.raises(InvalidArgument, match="not a SQLAlchemy"):
            QueueService(db)
        db.engine.dispose()


async def test_an_async_service_takes_a_registry_of_sessions(async_engine, async_service):
    scoped = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    queue = AsyncQueueService(scoped)
    await queue.enqueue("mail", 1)
    (delivery,) = await queue.dequeue("mail")
    await queue.archive(delivery)
    await scoped.commit()
    await scoped.remove()


def test_a_consumer_takes_a_registry_of_sessions(service, scoped, engine):
    """A handler is given the session that the application reaches through the registry."""
    service.enqueue_many("mail", [1, 2])
    service.session.commit()
    mine = scoped()
    mine.connection()
    consumer = Consumer(scoped, concurrency=1)
    seen: list[Any] = []

    @consumer.on("mail")
    def handle(payload: int, session: Session) -> None:
        seen.append((scoped() is session, session))

    consumer.check()
    assert mine.in_transaction()  # the caller's own is left alone
    consumer.run(until_empty=True)

    assert [same for same, _ in seen] == [True, True]
    assert seen[0][1] is not seen[1][1]
    assert left(engine) == 0
    assert scoped() is mine


def test_a_handler_that_fails_leaves_no_session_in_its_scope(service, engine):
    made: list[Session] = []
    ended = threading.Event()

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    scoped = scoped_session(factory)
    service.enqueue("mail", 1, max_read_ct=1)
    service.session.commit()
    consumer = Consumer(scoped, concurrency=1)

    @consumer.on("mail")
    def handle(payload: int, session: Session) -> None:
        session.execute(sa.select(1))
        ended.set()
        raise ValueError("no")

    consumer.run(until_empty=True)

    assert ended.is_set()
    assert not any(session.in_transaction() for session in made)
    assert not scoped.registry.has()


async def test_an_async_consumer_takes_a_registry_of_sessions(async_engine, async_service):
    await async_service.enqueue_many("mail", [1, 2])
    await async_service.session.commit()
    scoped = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    consumer = AsyncConsumer(scoped, concurrency=1)
    seen: list[bool] = []

    @consumer.on("mail")
    async def handle(payload: int, session: AsyncSession) -> None:
        seen.append(scoped() is session)

    await consumer.run(until_empty=True)

    assert seen == [True, True]
    assert not scoped.registry.registry


# --- what is no session --------------------------------------------------------------------------


class Application:
    """Something else."""


@pytest.fixture
def things(engine: sa.Engine) -> Iterator[dict[str, Any]]:
    async_engine = create_async_engine(engine.url)
    with engine.connect() as connection, Session(engine) as session:
        yield {
            "Session": session,
            "AsyncSession": AsyncSession(async_engine),
            "Engine": engine,
            "AsyncEngine": async_engine,
            "Connection": connection,
            "sessionmaker": sessionmaker(engine),
            "async_sessionmaker": async_sessionmaker(async_engine),
            "scoped_session": scoped_session(sessionmaker(engine)),
            "async_scoped_session": async_scoped_session(
                async_sessionmaker(async_engine), lambda: 1
            ),
            "class": Session,
            "None": None,
            "DSN": engine.url.render_as_string(hide_password=False),
            "object": Application(),
        }


BETTER = {
    ("Session", QueueService): None,
    ("AsyncSession", QueueService): "use AsyncQueueService",
    ("Engine", QueueService): r"not an Engine: .*QueueService\(Session\(engine\)\)",
    ("AsyncEngine", QueueService): r"QueueService\(Session\(engine\)\)",
    ("Connection", QueueService): r"not a Connection: .*QueueService\(Session\(engine\)\)",
    ("sessionmaker", QueueService): "not a sessionmaker: call it",
    ("async_sessionmaker", QueueService): "not an async_sessionmaker: call it",
    ("scoped_session", QueueService): None,
    ("async_scoped_session", QueueService): "use AsyncQueueService",
    ("class", QueueService): r"call it.*QueueService\(Session\(\)\)",
    ("None", QueueService): r"not a NoneType: .*QueueService\(Session\(engine\)\)",
    ("DSN", QueueService): r"not a str: .*QueueService\(Session\(engine\)\)",
    ("object", QueueService): "not an Application",
    ("Session", AsyncQueueService): "use QueueService",
    ("AsyncSession", AsyncQueueService): None,
    ("Engine", AsyncQueueService): r"AsyncQueueService\(AsyncSession\(engine\)\)",
    ("AsyncEngine", AsyncQueueService): r"AsyncQueueService\(AsyncSession\(engine\)\)",
    ("Connection", AsyncQueueService): r"AsyncQueueService\(AsyncSession\(engine\)\)",
    ("sessionmaker", AsyncQueueService): "call it",
    ("async_sessionmaker", AsyncQueueService): "call it",
    ("scoped_session", AsyncQueueService): "use QueueService",
    ("async_scoped_session", AsyncQueueService): None,
    ("class", AsyncQueueService): "call it",
    ("None", AsyncQueueService): r"AsyncQueueService\(AsyncSession\(engine\)\)",
    ("DSN", AsyncQueueService): r"AsyncQueueService\(AsyncSession\(engine\)\)",
    ("object", AsyncQueueService): "not an Application",
    ("Session", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("AsyncSession", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("Engine", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("AsyncEngine", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("Connection", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("sessionmaker", Consumer): None,
    ("async_sessionmaker", Consumer): "is for AsyncConsumer",
    ("scoped_session", Consumer): None,
    ("async_scoped_session", Consumer): "is for AsyncConsumer",
    ("class", Consumer): None,
    ("None", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("DSN", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("object", Consumer): r"Consumer\(sessionmaker\(engine\)\)",
    ("Session", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("AsyncSession", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("Engine", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("AsyncEngine", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("Connection", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("sessionmaker", AsyncConsumer): "a sessionmaker is for Consumer",
    ("async_sessionmaker", AsyncConsumer): None,
    ("scoped_session", AsyncConsumer): "a sessionmaker is for Consumer",
    ("async_scoped_session", AsyncConsumer): None,
    ("class", AsyncConsumer): "a sessionmaker is for Consumer",
    ("None", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("DSN", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
    ("object", AsyncConsumer): r"AsyncConsumer\(async_sessionmaker\(engine\)\)",
}


@pytest.mark.parametrize("cls", [QueueService, AsyncQueueService, Consumer, AsyncConsumer])
def test_what_is_no_session_is_refused_with_the_name_of_the_right_thing(service, things, cls):
    said = {}
    for name, thing in things.items():
        try:
            cls(thing)
        except InvalidArgument as error:
            said[name] = str(error)
    accepted = {name for (name, item), better in BETTER.items() if item is cls and better is None}

    assert set(things) - set(said) == accepted
    for name, text in said.items():
        better = BETTER[name, cls]
        assert better is not None
        with pytest.raises(InvalidArgument, match=better):
            raise InvalidArgument(text)
        assert "://" not in text  # no DSN


def test_every_combination_is_tried(things):
    classes = [QueueService, AsyncQueueService, Consumer, AsyncConsumer]
    assert set(BETTER) == set(itertools.product(things, classes))


def test_a_database_that_is_not_postgresql_is_refused():
    sqlite = sa.create_engine("sqlite://")
    with pytest.raises(InvalidArgument, match=r"needs PostgreSQL, .* bound to sqlite"):
        QueueService(Session(sqlite))
    with pytest.raises(InvalidArgument, match="bound to sqlite"):
        QueueService(scoped_session(sessionmaker(sqlite)))
    session = AsyncSession()
    session.sync_session.bind = sqlite
    with pytest.raises(InvalidArgument, match="bound to sqlite"):
        AsyncQueueService(session)


def test_what_is_known_only_in_use_is_refused_then():
    class Routed(Session):
        def get_bind(self, *_: Any, **__: Any) -> sa.Engine:
            return sqlite

    sqlite = sa.create_engine("sqlite://")
    with Routed() as session, pytest.raises(InvalidArgument, match="bound to sqlite"):
        QueueService(session).enqueue("mail", 1)
    with Session(sqlite) as session:
        session.add(Message(queue_name="mail", payload=1))
        with pytest.raises(InvalidArgument, match="bound to sqlite"):
            session.flush()
    consumer = Consumer(sessionmaker(sqlite))
    consumer.on("mail")(lambda payload: None)
    with pytest.raises(InvalidArgument, match="bound to sqlite"):
        consumer.check()


def test_a_session_without_a_bind_is_no_reason_to_refuse():
    assert QueueService(Session()).queues

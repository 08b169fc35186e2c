"""Sessions that may reach several databases: what they can do, and what they are refused.

Two servers: ``engine`` is that of the other tests, ``second`` one of its own. Both have the queue's
tables, the queue ``mail`` and the table of orders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import pgqrs_sa
from pgqrs_sa import (
    ArchivedMessage,
    AsyncQueueService,
    Consumer,
    InvalidArgument,
    Message,
    Queue,
    QueueService,
    SplitTransaction,
    embedded,
    metadata,
)
from support.cases import each_case


class Base(DeclarativeBase):
    """The application."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(scope="module")
def second_server() -> Iterator[sa.Engine]:
    with embedded.start() as server:
        engine = sa.create_engine(server.dsn().replace("postgresql:", "postgresql+psycopg:"))
        metadata.create_all(engine)
        Base.metadata.create_all(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def second(second_server: sa.Engine) -> sa.Engine:
    """Another server."""
    _prepare(second_server)
    return second_server


@pytest.fixture
def first(engine: sa.Engine) -> sa.Engine:
    """The server of the other tests."""
    Base.metadata.create_all(engine)
    _prepare(engine)
    return engine


@pytest.fixture
def prepare(first: sa.Engine, second: sa.Engine) -> Callable[[], None]:
    """Return what prepares both again: see `each_case`."""

    def prepare() -> None:
        _prepare(first)
        _prepare(second)

    return prepare


def _prepare(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        for model in (Message, ArchivedMessage, Queue, Order, Note):
            session.execute(sa.delete(model))
        QueueService(session).queues.create("mail")


def count(engine: sa.Engine, model: Any = Message) -> int:
    with Session(engine) as session:
        return session.execute(sa.select(sa.func.count()).select_from(model)).scalar_one()


def sharded(
    first: sa.Engine,
    second: sa.Engine,
    *,
    executes: Callable[[Any], list[str]],
    holds: Callable[..., str] = lambda *_, **__: "first",
    **options: Any,
) -> ShardedSession:
    return ShardedSession(
        shards={"first": first, "second": second},
        shard_chooser=holds,
        identity_chooser=lambda *_, **__: ["first", "second"],
        execute_chooser=executes,
        **options,
    )


def everywhere(_state: Any) -> list[str]:
    return ["first", "second"]


def only_first(_state: Any) -> list[str]:
    return ["first"]


# --- sessions that fan out -----------------------------------------------------------------------


CALLS = {
    "enqueue": lambda queue, _: queue.enqueue("mail", 1),
    "enqueue_many": lambda queue, _: queue.enqueue_many("mail", [1, 2]),
    "enqueue_from": lambda queue, _: queue.enqueue_from("mail", sa.select(sa.literal(1))),
    "dequeue": lambda queue, _: queue.dequeue("mail"),
    "archive": lambda queue, delivery: queue.archive(delivery),
    "try_archive": lambda queue, delivery: queue.try_archive(delivery),
    "delete": lambda queue, delivery: queue.delete(delivery),
    "extend": lambda queue, delivery: queue.extend(delivery, 60),
    "release": lambda queue, delivery: queue.release(delivery),
    "fail": lambda queue, delivery: queue.fail(delivery, "no"),
    "queues.create": lambda queue, _: queue.queues.create("other"),
    "queues.purge": lambda queue, _: queue.queues.purge("mail"),
    "metrics": lambda queue, _: queue.messages.metrics("mail"),
    "cancel": lambda queue, delivery: queue.messages.cancel(delivery.id),
    "prune": lambda queue, _: queue.archived.prune(0),
    "register": lambda queue, _: queue.workers.register("w"),
}


@each_case("call", list(CALLS), before="prepare")
def test_a_session_that_runs_a_statement_in_several_shards_is_refused(first, second, call):
    for engine in (first, second):
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue_many("mail", [1, 2])
    with Session(first) as session, session.begin():
        (delivery,) = QueueService(session).dequeue("mail")

    with sharded(first, second, executes=everywhere) as session:
        with pytest.raises(InvalidArgument, match=r"in 2 shards \('first', 'second'\)"):
            CALLS[call](QueueService(session), delivery)
        session.commit()

    assert (count(first), count(second)) == (2, 2)
    assert (count(first, ArchivedMessage), count(second, ArchivedMessage)) == (0, 0)
    with Session(second) as session:
        assert session.scalars(sa.select(Message.read_ct)).all() == [0, 0]


def test_a_session_whose_chooser_names_no_shard_is_refused(first, second):
    with (
        sharded(first, second, executes=lambda _: []) as session,
        pytest.raises(InvalidArgument, match="in 0 shards"),
    ):
        QueueService(session).dequeue("mail")


def test_a_message_that_is_added_to_a_session_that_fans_out_is_refused(first, second):
    with sharded(first, second, executes=everywhere) as session:
        session.add(Message(queue_name="mail", payload=1))
        with pytest.raises(InvalidArgument, match="in 2 shards"):
            session.commit()

    assert (count(first), count(second)) == (0, 0)


def test_a_message_that_its_chooser_puts_into_another_shard_is_refused(first, second):
    holds = lambda *_, **__: "second"  # noqa: E731
    with sharded(first, second, executes=only_first, holds=holds) as session:
        session.add(Message(queue_name="mail", payload=1))
        with pytest.raises(InvalidArgument, match="another shard"):
            session.commit()

    assert (count(first), count(second)) == (0, 0)


async def test_an_async_session_that_fans_out_is_refused(first, second):
    engines = [
        create_async_engine(case.url.set(drivername="postgresql+asyncpg"))
        for case in (first, second)
    ]
    options = {
        "sync_session_class": ShardedSession,
        "shards": dict(zip(("first", "second"), (e.sync_engine for e in engines), strict=True)),
        "shard_chooser": lambda *_, **__: "first",
        "identity_chooser": everywhere,
    }
    try:
        async with AsyncSession(**options, execute_chooser=everywhere) as session:
            with pytest.raises(InvalidArgument, match="in 2 shards"):
                await AsyncQueueService(session).enqueue("mail", 1)
        async with AsyncSession(**options, execute_chooser=only_first) as session, session.begin():
            await AsyncQueueService(session).enqueue("mail", 1)
    finally:
        for engine in engines:
            await engine.dispose()

    assert (count(first), count(second)) == (1, 0)


# --- sessions that are fixed to one database -----------------------------------------------------


@each_case("shard", ["first", "second"], before="prepare")
def test_a_sharded_session_with_a_fixed_shard_works(first, second, shard):
    chosen = {"first": first, "second": second}
    with sharded(
        first, second, executes=lambda _: [shard], holds=lambda *_, **__: shard
    ) as session:
        queue = QueueService(session)
        queue.enqueue_many("mail", [1, 2, 3])
        session.add_all([Order(id=7), Message(queue_name="mail", payload=4)])
        session.flush()
        queue.enqueue_from("mail", sa.select(Order.id))
        deliveries = queue.dequeue("mail", 10)
        assert [delivery.payload for delivery in deliveries] == [1, 2, 3, 4, 7]
        queue.archive_many(deliveries[:2])
        queue.release(queue.extend(deliveries[2], 60))
        old = queue.archived.find("mail")[0]
        queue.archived.requeue(old.id)
        session.commit()

    other = second if shard == "first" else first
    assert (count(chosen[shard]), count(chosen[shard], ArchivedMessage)) == (4, 1)
    assert (count(other), count(other, Order)) == (0, 0)


def test_a_message_loaded_from_a_shard_follows_its_lease(first, second):
    with sharded(first, second, executes=only_first) as session:
        queue = QueueService(session)
        receipt = queue.enqueue("mail", 1)
        loaded = session.scalars(sa.select(Message)).one()
        (delivery,) = queue.dequeue("mail")
        assert (loaded.read_ct, loaded.leased_until) == (1, delivery.leased_until)
        queue.archive(delivery)
        assert session.scalars(sa.select(Message)).all() == []
        assert session.get(Message, receipt.id) is None


def test_a_get_bind_with_one_engine_for_each_session_works(first, second):
    class Tenant(Session):
        tenant: sa.Engine

        def get_bind(self, *_: Any, **__: Any) -> sa.Engine:
            return self.tenant

    for tenant, payload in ((first, "a"), (second, "b")):
        with Tenant() as session, session.begin():
            session.tenant = tenant
            session.add(Order(id=1))
            QueueService(session).enqueue("mail", payload)
    for tenant, payload in ((first, "a"), (second, "b")):
        with Tenant() as session, session.begin():
            session.tenant = tenant
            (delivery,) = QueueService(session).dequeue("mail")
            assert delivery.payload == payload
            session.add(Order(id=2))
            QueueService(session).archive(delivery)


# --- transactions over two databases -------------------------------------------------------------


def split(first: sa.Engine, second: sa.Engine, **options: Any) -> Session:
    """A session whose queue is in the first database, and whose orders are in the second."""
    return Session(binds={pgqrs_sa.Base: first, Order: second, Note: first}, **options)


def enqueue(session: Session) -> None:
    QueueService(session).enqueue("mail", 1)


def enqueue_later(session: Session) -> None:
    QueueService(session).enqueue("mail", 1, delay=60)


def add_message(session: Session) -> None:
    session.add(Message(queue_name="mail", payload=1))


def add_order(session: Session) -> None:
    session.add(Order(id=1))


def insert_order(session: Session) -> None:
    session.execute(sa.insert(Order).values(id=1))


@each_case("message", [enqueue, enqueue_later, add_message])
@each_case("order", [add_order, insert_order])
@each_case("turned", {"order first": False, "message first": True}, before="prepare")
def test_an_order_and_its_message_in_two_databases_are_refused(
    first, second, message, order, turned
):
    steps = [message, order] if turned else [order, message]
    with split(first, second) as session:

        def both() -> None:
            for step in steps:
                step(session)
            session.commit()

        with pytest.raises(SplitTransaction) as refused:
            both()
        session.rollback()

    assert "pgqrs_allow_split" in str(refused.value)
    assert [sa.make_url(url).database for url in refused.value.queues] == [first.url.database]
    assert (count(first), count(second, Order)) == (0, 0)


def test_what_a_flush_adds_after_the_commit_began_is_refused_too(first, second):
    with split(first, second) as session:
        enqueue(session)

        @sa.event.listens_for(session, "before_commit")
        def _add(session: Session) -> None:
            session.add(Order(id=1))

        with pytest.raises(SplitTransaction):
            session.commit()
    assert (count(first), count(second, Order)) == (0, 0)


def write_before_commit(session: Session) -> None:
    enqueue(session)
    sa.event.listen(session, "before_commit", insert_order)


def write_after_flush(session: Session) -> None:
    sa.event.listen(session, "after_flush", lambda session, _: insert_order(session))
    add_message(session)


def write_before_commit_again(session: Session) -> None:
    insert_order(session)
    enqueue(session)
    session.execute(sa.delete(Order))
    sa.event.listen(session, "before_commit", insert_order)


LISTENERS = [write_before_commit, write_after_flush, write_before_commit_again]


@each_case("work", LISTENERS, before="prepare")
def test_what_a_listener_of_the_host_writes_last_is_refused_too(first, second, work):
    with split(first, second) as session:
        work(session)
        with pytest.raises(SplitTransaction):
            session.commit()
        session.rollback()
        assert session.scalars(sa.select(Order)).all() == []
    assert (count(first), count(second, Order)) == (0, 0)

    with pytest.raises(SplitTransaction), split(first, second) as session, session.begin():
        work(session)
    assert (count(first), count(second, Order)) == (0, 0)


@each_case("work", LISTENERS, before="prepare")
def test_what_a_listener_of_the_host_writes_last_may_be_allowed(first, second, work):
    with split(first, second, info={"pgqrs_allow_split": True}) as session, session.begin():
        work(session)
    assert (count(first), count(second, Order)) == (1, 1)


async def test_an_async_session_is_looked_at_last_too(first, second):
    engines = [
        create_async_engine(case.url.set(drivername="postgresql+asyncpg"))
        for case in (first, second)
    ]
    binds = dict(zip((pgqrs_sa.Base, Order), engines, strict=True))
    try:
        async with AsyncSession(binds=binds) as session:
            await AsyncQueueService(session).enqueue("mail", 1)
            sa.event.listen(session.sync_session, "before_commit", insert_order)
            with pytest.raises(SplitTransaction):
                await session.commit()
    finally:
        for engine in engines:
            await engine.dispose()
    assert (count(first), count(second, Order)) == (0, 0)


def test_a_connection_of_the_caller_that_the_session_commits_is_not_watched_for_ever(first, second):
    with first.connect() as connection, second.connect() as two:
        for _ in range(3):
            with Session(binds={pgqrs_sa.Base: connection, Order: two}) as session:
                session.execute(sa.select(Order))
                enqueue(session)
                session.commit()
        assert [list(held.dispatch.commit) for held in (connection, two)] == [[], []]
    assert count(first) == 3


def test_the_error_has_no_password(first, second):
    url = second.url.set(password="hidden")  # noqa: S106
    engine = sa.create_engine(url)
    with split(first, engine) as session:
        enqueue(session)
        add_order(session)
        with pytest.raises(SplitTransaction) as refused:
            session.commit()
    engine.dispose()
    assert "hidden" not in str(refused.value)


def test_an_acknowledgement_of_writes_in_another_database_is_refused(first, second):
    with Session(first) as session, session.begin():
        QueueService(session).enqueue("mail", 1)
        (delivery,) = QueueService(session).dequeue("mail")
    with split(first, second) as session:
        add_order(session)
        QueueService(session).archive(delivery)
        with pytest.raises(SplitTransaction):
            session.commit()

    assert (count(first), count(first, ArchivedMessage), count(second, Order)) == (1, 0, 0)


def test_two_engines_of_one_database_are_two_transactions(first, second):
    with split(first, sa.create_engine(first.url, poolclass=sa.NullPool)) as session:
        enqueue(session)
        add_order(session)
        with pytest.raises(SplitTransaction):
            session.commit()
    assert (count(first), count(first, Order)) == (0, 0)


def test_a_database_of_another_kind_is_refused_too(first):
    other = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    Base.metadata.create_all(other)
    with split(first, other) as session:
        enqueue(session)
        add_order(session)
        with pytest.raises(SplitTransaction):
            session.commit()
        session.rollback()
        assert session.scalars(sa.select(Order)).all() == []
    other.dispose()
    assert count(first) == 0


def test_binds_that_keep_the_rows_and_the_messages_together_work(first, second):
    with split(first, second) as session, session.begin():
        session.add(Note(id=1))
        enqueue(session)
        add_message(session)
        assert session.scalars(sa.select(Order)).all() == []  # reading elsewhere is no harm
    assert (count(first), count(first, Note)) == (2, 1)


def test_looking_at_the_queue_is_no_reason_to_refuse(first, second):
    with split(first, second) as session, session.begin():
        QueueService(session).messages.metrics("mail")
        add_order(session)
    assert count(second, Order) == 1


def test_a_transaction_over_two_databases_may_be_allowed(first, second):
    with split(first, second, info={"pgqrs_allow_split": True}) as session, session.begin():
        enqueue(session)
        add_order(session)
    assert (count(first), count(second, Order)) == (1, 1)


def test_the_next_transaction_of_a_session_is_judged_by_itself(first, second):
    with split(first, second) as session:
        enqueue(session)
        session.commit()
        add_order(session)
        session.commit()
    assert (count(first), count(second, Order)) == (1, 1)


def test_the_end_of_a_savepoint_is_not_a_commit(first, second):
    with split(first, second) as session:
        insert_order(session)
        with session.begin_nested():
            enqueue(session)
        with pytest.raises(SplitTransaction):
            session.commit()
    assert (count(first), count(second, Order)) == (0, 0)


def test_connections_that_the_caller_commits_are_the_callers(first, second):
    with first.connect() as connection, second.connect() as two:
        outer = [connection.begin(), two.begin()]
        with Session(
            binds={pgqrs_sa.Base: connection, Order: two}, join_transaction_mode="create_savepoint"
        ) as session:
            enqueue(session)
            add_order(session)
            session.commit()
        for transaction in outer:
            transaction.rollback()
    assert (count(first), count(second, Order)) == (0, 0)


def test_a_query_that_reads_another_database_is_refused(first, second):
    with Session(second) as session, session.begin():
        session.add(Order(id=5))
    queries = [
        sa.select(Order.id),
        sa.select(sa.func.jsonb_build_object("order", Order.id)).where(Order.id > 1),
        sa.select(Note.id).where(sa.exists().where(Order.id == Note.id)),
        sa.select(Order.__table__.c.id),
    ]
    with split(first, second) as session:
        for query in queries:
            with pytest.raises(InvalidArgument, match="another bind"):
                QueueService(session).enqueue_from("mail", query)
        assert QueueService(session).enqueue_from("mail", sa.select(Note.id)) == 0


# --- consumers -----------------------------------------------------------------------------------


def test_a_consumer_of_sessions_that_fan_out_does_not_start(first, second):
    consumer = Consumer(lambda: sharded(first, second, executes=everywhere), concurrency=1)
    consumer.on("mail")(lambda payload: None)

    with pytest.raises(InvalidArgument, match="in 2 shards"):
        consumer.check()
    with pytest.raises(InvalidArgument, match="in 2 shards"):
        consumer.run(until_empty=True)


def test_a_consumer_works_on_the_shard_that_its_sessions_are_fixed_to(first, second):
    for engine in (first, second):
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue("mail", 1)
    make = sessionmaker(
        class_=ShardedSession,
        shards={"first": first, "second": second},
        shard_chooser=lambda *_, **__: "second",
        identity_chooser=everywhere,
        execute_chooser=lambda _: ["second"],
    )
    consumer = Consumer(make, concurrency=1)

    @consumer.on("mail")
    def handle(payload: int, session: Session) -> None:
        session.add(Order(id=payload))

    consumer.run(until_empty=True)

    assert (count(first), count(second), count(second, Order)) == (1, 0, 1)


def test_a_handler_whose_session_is_of_another_database_changes_nothing(first, second):
    """The message was leased in one; a settlement in the other could meet another message."""
    with Session(first) as session, session.begin():
        QueueService(session).enqueue("mail", 1, max_read_ct=1)

    def make() -> Session:
        called = threading.current_thread().name.startswith("pgqrs-handler")
        return Session(second if called else first)

    consumer = Consumer(make, concurrency=1)

    @consumer.on("mail")
    def handle(payload: int, session: Session) -> None:
        session.add(Order(id=payload))

    consumer.run(until_empty=True)

    assert (count(first, Order), count(second, Order)) == (0, 0)
    with Session(first) as session:
        (dead,) = QueueService(session).archived.find("mail", outcome="dead")
    assert "another database" in (dead.last_error or "")

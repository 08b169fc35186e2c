"""What the service does to the session that it is given: section C of the design, row by row.

Most bodies are functions of a plain ``Session``. `run` runs them on each driver, those of asyncio
through ``run_sync``, as `AsyncQueueService` runs its operations. `whole_api` calls every public
method there is, of the service or of its awaited twin.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
)

import pgqrs_sa
from pgqrs_sa import (
    ArchivedMessage,
    ArchivedMessageMixin,
    AsyncQueueService,
    DeclaredQueue,
    Delivery,
    DuplicateMessage,
    Item,
    LeaseLost,
    Message,
    MessageLeased,
    MessageMixin,
    Models,
    NonAtomicEnqueue,
    Queue,
    QueueMixin,
    QueueNotEmpty,
    QueueNotFound,
    QueueService,
    SchemaVersionError,
    WorkerMixin,
    WorkerNotReady,
    embedded,
    metadata,
    resources,
)
from support.cases import each_case
from support.waiting import until_awaited

DRIVERS = ["psycopg", "psycopg_async", "asyncpg"]


class AppBase(DeclarativeBase):
    """The application that the queue lives in."""


class Order(AppBase):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


class Run:
    """Runs a function of a session on one driver."""

    def __init__(self, driver: str, url: str) -> None:
        self.is_async = driver != "psycopg"
        self.url = sa.make_url(url).set(drivername=f"postgresql+{driver}")

    def __call__(
        self,
        body: Callable[[Session], Any],
        *,
        engine: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        if self.is_async:
            return asyncio.run(self._run(body, engine or {}, options))
        bind = sa.create_engine(self.url, **(engine or {}))
        try:
            with Session(bind, **options) as session:
                return body(session)
        finally:
            bind.dispose()

    async def _run(
        self, body: Callable[[Session], Any], engine: dict[str, Any], options: dict[str, Any]
    ) -> Any:
        bind = create_async_engine(self.url, **engine)
        try:
            async with AsyncSession(bind, **options) as session:
                return await session.run_sync(body)
        finally:
            await bind.dispose()


@pytest.fixture
def database(kept_empty: Any) -> Any:
    """Another one, in which nothing is left."""
    engine = sa.create_engine(kept_empty.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
        connection.execute(sa.text("DROP SCHEMA IF EXISTS public, tenant, jobs CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    return kept_empty


@pytest.fixture(params=DRIVERS)
def run(request: pytest.FixtureRequest, service: QueueService, migrated: Any) -> Run:
    return Run(request.param, migrated.url)


@pytest.fixture
def orders(engine: sa.Engine) -> None:
    AppBase.metadata.create_all(engine)


def count(bind: sa.Engine | Session, model: Any = Message) -> int:
    statement = sa.select(sa.func.count()).select_from(model)
    if isinstance(bind, Session):
        return bind.execute(statement).scalar_one()
    with bind.connect() as connection:
        return connection.execute(statement).scalar_one()


def sent_by(session: Session) -> list[str]:
    """The statements that the session's engine sends from now on."""
    statements: list[str] = []
    event.listen(
        session.get_bind(mapper=Message),
        "before_cursor_execute",
        lambda _c, _cursor, statement, *_: statements.append(statement),
    )
    return statements


def lend(session: Session, n: int = 1, **options: Any) -> list[Delivery]:
    """Messages of ``mail``, under lease."""
    queue = QueueService(session)
    queue.enqueue_many("mail", [Item(i, **options) for i in range(n)])
    return queue.dequeue("mail", n)


def sqlstate(error: sa.exc.DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def settle_by_sql(session: Session, id: int, **values: Any) -> None:
    session.execute(sa.update(Message.__table__).where(Message.id == id).values(**values))


# --- the whole API, as a generator of what the calls return --------------------------------------


def whole_api(queue: Any) -> Generator[Any, Any, None]:
    yield queue.check_schema()
    assert not any((yield queue.orphans()).values())
    info = yield queue.queues.create("jobs", lease=60, max_read_ct=2, retention=0)
    assert (yield queue.queues.get("jobs")) == info
    assert info in (yield queue.queues.list())
    assert (yield queue.queues.update("jobs", max_payload_bytes=1000)).max_payload_bytes == 1000
    assert (yield queue.queues.pause("jobs")).paused_at is not None
    assert (yield queue.dequeue("jobs")) == []
    assert (yield queue.queues.resume("jobs")).paused_at is None
    assert [item.name for item in (yield queue.queues.sync(DeclaredQueue("jobs")))] == ["jobs"]
    with pytest.raises(QueueNotFound):
        yield queue.enqueue("job", 1)
    yield from _settling(queue)
    yield from _waiting(queue)
    yield from _archive(queue)
    yield from _workers(queue)
    yield queue.enqueue_many("jobs", [1, 2, 3])
    assert (yield queue.queues.purge("jobs", limit=1)) == 1
    with pytest.raises(QueueNotEmpty):
        yield queue.queues.delete("jobs")
    yield queue.queues.delete("jobs", force=True)
    with pytest.raises(QueueNotFound):
        yield queue.queues.get("jobs")


def _leased(queue: Any, n: int) -> Generator[Any, Any, list[Delivery]]:
    assert len((yield queue.enqueue_many("jobs", range(n)))) == n
    deliveries = yield queue.dequeue("jobs", n)
    assert [delivery.payload for delivery in deliveries] == list(range(n))
    return deliveries


def _settling(queue: Any) -> Generator[Any, Any, None]:
    a, *rest = yield from _leased(queue, 4)
    yield queue.archive(a)
    with pytest.raises(LeaseLost) as lost:
        yield queue.archive(a)
    assert lost.value.whereabouts[a.id].state == "archived"
    assert (yield queue.try_archive(a)) is False
    yield queue.archive_many(rest[:2])
    assert (yield queue.try_archive_many(rest)) == [False, False, True]

    a, *rest = yield from _leased(queue, 4)
    yield queue.delete(a)
    with pytest.raises(LeaseLost):
        yield queue.delete_many([a, *rest])
    assert (yield queue.try_delete(a)) is False
    yield queue.delete_many(rest[:2])
    assert (yield queue.try_delete_many(rest)) == [False, False, True]

    a, b = yield from _leased(queue, 2)
    longer = yield queue.extend(a, 600)
    assert longer.leased_until > a.leased_until
    assert longer.vt == a.vt
    assert [item.id for item in (yield queue.extend_many([b, a], 600))] == [b.id, a.id]
    assert (yield queue.try_extend(a, 600)) is True
    assert (yield queue.try_extend_many([a, b], 600)) == [True, True]
    yield queue.release(a, delay=60)
    with pytest.raises(LeaseLost):
        yield queue.extend(a, 600)
    yield queue.release_many([b])
    (b,) = yield queue.dequeue("jobs", 5)
    assert (yield queue.try_release(b)) is True
    assert (yield queue.try_release_many([a, b])) == [False, False]

    (b,) = yield queue.dequeue("jobs")
    assert not (yield queue.fail(b, ValueError("no"), delay=0)).dead
    (b,) = yield queue.dequeue("jobs")
    assert (yield queue.try_fail(b, "no", dead=True)) is True
    with pytest.raises(LeaseLost):
        yield queue.fail_many([b], "no")
    assert (yield queue.try_fail_many([b], "no")) == [False]
    assert (yield queue.queues.purge("jobs")) == 1


def _waiting(queue: Any) -> Generator[Any, Any, None]:
    receipt = yield queue.enqueue("jobs", {"n": 1}, delay=60, key="k", headers={"h": 1})
    assert (yield queue.enqueue("jobs", {"n": 1}, key="k")).duplicate
    assert (yield queue.messages.get(receipt.id)).key == "k"
    assert (yield queue.messages.peek("jobs")) == []
    assert len((yield queue.messages.find("jobs", state="scheduled", payload={"n": 1}))) == 1
    assert (yield queue.messages.count("jobs", state="scheduled", payload={"n": 1})) == 1
    assert (yield queue.messages.metrics("jobs")).scheduled == 1
    assert (yield queue.messages.all_metrics())
    yield queue.messages.reschedule(receipt.id, delay=0)
    (delivery,) = yield queue.dequeue("jobs", where=Message.priority == 0)
    with pytest.raises(MessageLeased):
        yield queue.messages.cancel(receipt.id)
    yield queue.release(delivery)
    yield queue.messages.cancel(receipt.id, reason="test")
    assert (yield queue.messages.try_cancel(receipt.id)) is False
    yield queue.enqueue_from("jobs", sa.select(sa.func.generate_series(1, 3).label("payload")))
    nothing = sa.select(sa.literal(1).label("payload")).where(sa.false())
    assert (yield queue.enqueue_from("jobs", nothing)) == 0
    assert (yield queue.messages.cancel_where("jobs", payload=2)) == 1
    assert (yield queue.messages.cancel_where("jobs", Message.ready)) == 2


def _archive(queue: Any) -> Generator[Any, Any, None]:
    (a,) = yield from _leased(queue, 1)
    yield queue.archive(a, outcome="discarded")
    (old,) = yield queue.archived.find("jobs", outcome="discarded")
    assert (yield queue.archived.get(old.id)) == old
    assert (yield queue.archived.requeue(old.id)).id == a.id
    (a,) = yield queue.dequeue("jobs")
    yield queue.archive(a, outcome="discarded")
    (old,) = yield queue.archived.find("jobs", outcome="discarded")
    assert len((yield queue.archived.requeue_many([old.id]))) == 1
    assert (yield queue.archived.bury("jobs")) == 0
    assert (yield queue.archived.count("jobs", outcome="dead")) == 1
    (dead,) = yield queue.archived.find("jobs", outcome="dead")
    assert (yield queue.archived.delete([dead.id])) == 1
    assert (yield queue.archived.prune(queue="jobs")) > 0
    yield queue.archived.prune(older_than=0)
    yield queue.queues.purge("jobs")


def _workers(queue: Any) -> Generator[Any, Any, None]:
    worker = yield queue.workers.register("w", queues=["jobs"])
    assert (yield queue.workers.get(worker.id)) == worker
    assert worker in (yield queue.workers.list(status="ready", queue="jobs"))
    yield queue.workers.suspend(worker.id)
    yield queue.enqueue("jobs", 1)
    with pytest.raises(WorkerNotReady):
        yield queue.dequeue("jobs", worker=worker)
    yield queue.workers.resume(worker.id)
    (delivery,) = yield queue.dequeue("jobs", worker=worker)
    assert worker.id in [item.worker.id for item in (yield queue.workers.health())]
    assert (yield queue.workers.heartbeat(worker.id)).status == "ready"
    assert (yield queue.workers.release_leases(worker.id)) == 1
    assert (yield queue.try_archive(delivery)) is False
    assert (yield queue.workers.reclaim()) == 0
    assert (yield queue.workers.stop(worker.id)).status == "stopped"
    other = yield queue.workers.register("v")
    yield queue.workers.stop(other.id)
    yield queue.workers.delete(other.id)
    assert (yield queue.workers.purge(older_than=0)) >= 1


def call_all(queue: QueueService, api: Callable[..., Any] = whole_api) -> None:
    steps = api(queue)
    value = None
    while True:
        try:
            value = steps.send(value)
        except StopIteration:
            return


async def await_all(queue: AsyncQueueService, api: Callable[..., Any] = whole_api) -> None:
    steps = api(queue)
    try:
        awaitable = steps.send(None)
        while True:
            try:
                value = await awaitable
            except Exception as error:  # noqa: BLE001 - for the generator to judge
                awaitable = steps.throw(error)
            else:
                awaitable = steps.send(value)
    except StopIteration:
        return


def test_the_whole_api_is_what_whole_api_calls():
    source = "".join(map(inspect.getsource, (whole_api, _settling, _waiting, _archive, _workers)))
    places = {
        "queue": QueueService,
        "queue.queues": resources.Queues,
        "queue.messages": resources.Messages,
        "queue.archived": resources.Archived,
        "queue.workers": resources.Workers,
    }
    for place, cls in places.items():
        for name in vars(cls):
            if not name.startswith("_") and callable(getattr(cls, name)):
                assert f"{place}.{name}(" in source, f"{place}.{name} is not tried"


# --- 1: the clock --------------------------------------------------------------------------------


def test_times_are_those_of_the_statement_in_a_transaction_that_is_old(run):
    """Row 1 (and F50)."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        session.execute(sa.text("SELECT pg_sleep(0.3)"))
        begun = session.execute(sa.select(sa.func.transaction_timestamp())).scalar_one()
        old = begun + timedelta(seconds=0.3)

        queue.enqueue("mail", 1)
        (delivery,) = queue.dequeue("mail", lease=20)
        assert delivery.enqueued_at >= old
        assert delivery.leased_until >= old + timedelta(seconds=20)
        queue.archive(delivery)
        assert queue.archived.find("mail")[0].archived_at >= old

        assert queue.enqueue("mail", 2, at=begun).vt >= old
        assert queue.enqueue("mail", 2, delay=1).vt >= old + timedelta(seconds=1)
        added = [
            Message(queue_name="mail", payload=3),
            Message(queue_name="mail", payload=4, at=begun),
        ]
        session.add_all(added)
        session.flush()
        assert min(message.vt for message in added) >= old

    run(body)


def test_no_time_comes_from_this_computer(engine, service, session):
    """F49: with a clock that is wrong here, nothing would change."""
    sent: list[Any] = []
    event.listen(
        engine,
        "before_cursor_execute",
        lambda _c, _cur, _s, parameters, *_: sent.append(parameters),
    )
    call_all(service)
    assert sent
    assert not [
        item for item in sent if any(isinstance(v, datetime) for v in (item or {}).values())
    ]


# --- 2: savepoints -------------------------------------------------------------------------------


def test_a_savepoint_takes_its_messages_back(run, engine):
    """Row 2."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.enqueue("mail", "kept", key="outer")
        with session.begin_nested() as savepoint:
            queue.enqueue("mail", "gone")
            queue.enqueue_many("mail", ["gone", Item("gone", key="inner")])
            session.add(Message(queue_name="mail", payload="gone"))
            session.flush()
            savepoint.rollback()
        assert not queue.enqueue("mail", "kept", key="inner").duplicate
        with session.begin_nested():
            queue.enqueue("mail", "kept")
        session.commit()

    run(body)
    with Session(engine) as other:
        assert other.scalars(sa.select(Message.payload)).all() == ["kept"] * 3


def test_a_savepoint_takes_leases_and_settlements_back(run):
    """Row 2: the attempt is not counted, and what was settled is held again."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.enqueue("mail", 1)
        with session.begin_nested() as savepoint:
            (undone,) = queue.dequeue("mail")
            savepoint.rollback()
        (delivery,) = queue.dequeue("mail")
        assert (undone.read_ct, delivery.read_ct) == (1, 1)
        with session.begin_nested() as savepoint:
            queue.archive(delivery)
            savepoint.rollback()
        queue.archive(delivery)
        session.commit()
        assert len(queue.archived.find("mail")) == 1

    run(body)


def test_an_error_of_the_queue_inside_a_savepoint_spares_the_outer_transaction(run, engine):
    """Row 2: the errors of this package leave the transaction as it was."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        (delivery,) = lend(session)
        queue.archive(delivery)
        with pytest.raises(LeaseLost), session.begin_nested():  # noqa: PT012
            queue.enqueue("mail", "gone")
            queue.archive(delivery)
        with pytest.raises(LeaseLost):
            queue.archive(delivery)
        queue.enqueue("mail", "kept")
        session.commit()

    run(body)
    with Session(engine) as other:
        assert other.scalars(sa.select(Message.payload)).all() == ["kept"]


# --- 3: autoflush --------------------------------------------------------------------------------

CALLS: dict[str, Callable[[QueueService], Any]] = {
    "enqueue": lambda queue: queue.enqueue("mail", 1),
    "enqueue with a key": lambda queue: queue.enqueue("mail", 1, key="k"),
    "enqueue_many": lambda queue: queue.enqueue_many("mail", [1, 2]),
    "enqueue_from": lambda queue: queue.enqueue_from("mail", sa.select(Order.id)),
    "dequeue": lambda queue: queue.dequeue("mail"),
    "peek": lambda queue: queue.messages.peek("mail"),
    "cancel_where": lambda queue: queue.messages.cancel_where("mail", Message.ready),
}


@each_case("call", list(CALLS), before="reset")
def test_pending_rows_are_flushed_first(run, orders, call):
    """Row 3."""

    def body(session: Session) -> None:
        sent = sent_by(session)
        order = Order(id=7)
        session.add(order)
        CALLS[call](QueueService(session))
        assert order not in session.new
        assert sent[0].startswith("INSERT INTO orders")
        assert "pgqrs_" in sent[-1]

    run(body)


@each_case("call", list(CALLS), before="reset")
def test_autoflush_is_left_off_where_it_is_off(run, orders, call):
    """Row 3."""

    def body(session: Session) -> None:
        order = Order(id=7)
        session.add(order)
        CALLS[call](QueueService(session))
        assert order in session.new
        session.autoflush = True
        with session.no_autoflush:
            CALLS[call](QueueService(session))
            assert order in session.new

    run(body, autoflush=False)


def test_a_settlement_flushes_the_rows_of_the_work_first(run, orders, engine):
    """Row 3: and a lost lease rolls them back."""

    def body(session: Session) -> None:
        (delivery,) = lend(session)
        session.commit()
        sent = sent_by(session)
        session.add(Order(id=1))
        QueueService(session).archive(delivery)
        assert sent[0].startswith("INSERT INTO orders")
        session.commit()
        session.add(Order(id=2))
        with pytest.raises(LeaseLost):
            QueueService(session).archive(delivery)
        session.rollback()

    run(body)
    with Session(engine) as other:
        assert other.scalars(sa.select(Order.id)).all() == [1]


# --- 4: values -----------------------------------------------------------------------------------


def test_deliveries_are_frozen(service):
    """Row 4."""
    service.enqueue("mail", {"a": [1]})
    (delivery,) = service.dequeue("mail")
    for name in (field.name for field in dataclasses.fields(delivery)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(delivery, name, None)
    with pytest.raises((AttributeError, TypeError)):
        delivery.payload = None


@each_case("expire_on_commit", [True, False], before="reset")
def test_values_are_readable_after_commit_and_close(run, expire_on_commit):
    """Row 4: without a statement, and without a session."""

    def body(session: Session) -> tuple[Any, ...]:
        queue = QueueService(session)
        receipt = queue.enqueue("mail", {"a": [1]}, headers={"h": "x"}, key="k")
        info = queue.messages.get(receipt.id)
        (delivery,) = queue.dequeue("mail")
        assert not list(session.identity_map.values())
        session.commit()
        sent = sent_by(session)
        assert {name: getattr(delivery, name) for name in ("payload", "headers", "key")}
        assert not sent
        return receipt, info, delivery

    receipt, info, delivery = run(body, expire_on_commit=expire_on_commit)
    assert receipt.id == info.id == delivery.id
    assert (delivery.payload, delivery.headers, delivery.key) == ({"a": [1]}, {"h": "x"}, "k")
    assert delivery.leased_until > delivery.vt == delivery.enqueued_at
    assert info.state == "ready"


def test_changing_a_payload_in_place_writes_nothing(run):
    """Row 4: an entity would have written the queue's row."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.enqueue("mail", {"a": [1]})
        (delivery,) = queue.dequeue("mail")
        delivery.payload["a"].append(2)
        session.flush()
        assert not session.dirty
        session.commit()
        assert queue.messages.get(delivery.id).payload == {"a": [1]}

    run(body)


# --- 5: loaded entities --------------------------------------------------------------------------


def stored(session: Session, entity: Any) -> dict[str, Any]:
    """The columns of an entity, as the database has them."""
    table = type(entity).__table__
    identity = sa.inspect(entity).identity[0]
    return dict(session.execute(sa.select(table).where(table.c.id == identity)).mappings().one())


def loaded(entity: Any) -> dict[str, Any]:
    return {column.name: getattr(entity, column.name) for column in type(entity).__table__.c}


HELD: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "extend": lambda queue, delivery: queue.extend(delivery, 600),
    "release": lambda queue, delivery: queue.release(delivery, delay=60),
    "fail": lambda queue, delivery: queue.fail(delivery, "no", delay=60),
    "release_leases": lambda queue, delivery: queue.workers.release_leases(delivery.worker_id),
}
GONE: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "archive": lambda queue, delivery: queue.archive(delivery),
    "delete": lambda queue, delivery: queue.delete(delivery),
    "fail, dead": lambda queue, delivery: queue.fail(delivery, "no", dead=True),
    "purge": lambda queue, _: queue.queues.purge("mail"),
    "queues.delete": lambda queue, _: queue.queues.delete("mail", force=True),
    "release and cancel": lambda queue, delivery: (
        queue.release(delivery),
        queue.messages.cancel(delivery.id),
    ),
    "release and cancel_where": lambda queue, delivery: (
        queue.release(delivery),
        queue.messages.cancel_where("mail", Message.ready),
    ),
}


def test_a_loaded_message_follows_its_lease(run):
    """Row 5."""

    def body(session: Session) -> None:
        worker = QueueService(session).workers.register("w")
        queue = QueueService(session, worker=worker)
        message = Message(queue_name="mail", payload=1)
        session.add(message)
        session.flush()
        session.refresh(message)
        (delivery,) = queue.dequeue("mail")
        assert loaded(message) == stored(session, message)
        assert (message.read_ct, message.consumer_worker_id) == (1, worker.id)
        assert (message.vt, message.leased_until) == (delivery.vt, delivery.leased_until)

    run(body)


@each_case("call", list(HELD), before="reset")
def test_a_loaded_message_follows_what_its_holder_does(run, call):
    """Row 5."""

    def body(session: Session) -> None:
        worker = QueueService(session).workers.register("w")
        queue = QueueService(session, worker=worker)
        (delivery,) = lend(session)
        settle_by_sql(session, delivery.id, consumer_worker_id=worker.id)
        delivery = dataclasses.replace(delivery, worker_id=worker.id)
        message = session.get_one(Message, delivery.id)
        loaded(message)
        HELD[call](queue, delivery)
        assert loaded(message) == stored(session, message)
        assert not session.dirty

    run(body)


@each_case("call", list(GONE), before="reset")
def test_a_loaded_message_that_left_the_queue_is_not_passed_off_as_there(run, call):
    """Row 5."""

    def body(session: Session) -> None:
        (delivery,) = lend(session)
        message = session.get_one(Message, delivery.id)
        GONE[call](QueueService(session), delivery)
        if sa.inspect(message).persistent:
            with pytest.raises(sa.orm.exc.ObjectDeletedError):
                _ = message.payload
        session.commit()
        assert session.get(Message, delivery.id) is None

    run(body)


def test_reschedule_is_seen_on_a_loaded_message(run):
    """Row 5."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        message = Message(queue_name="mail", payload=1)
        session.add(message)
        session.flush()
        loaded(message)
        queue.messages.reschedule(message.id, delay=600)
        assert loaded(message) == stored(session, message)

    run(body)


def test_a_dequeue_corrects_a_loaded_message_that_was_stale(run, engine):
    """Row 5: others had it in between, so nothing can be summed up from what was loaded."""

    def body(session: Session) -> None:
        message = session.scalars(sa.select(Message)).one()
        assert message.read_ct == 0
        with Session(engine) as other:
            (theirs,) = QueueService(other).dequeue("mail")
            QueueService(other).fail(theirs, "no", delay=0)
            other.commit()
        (delivery,) = QueueService(session).dequeue("mail")
        assert delivery.read_ct == 2
        assert loaded(message) == stored(session, message)

    with Session(engine) as first:
        QueueService(first).enqueue("mail", 1)
        first.commit()
    run(body)


def test_a_release_corrects_a_loaded_message_that_was_stale(run, engine):
    """Row 5: a delivery may be settled in another session than the one that leased it."""

    def body(session: Session) -> None:
        message = session.scalars(sa.select(Message)).one()
        assert message.max_read_ct is None
        with Session(engine) as other:
            (delivery,) = QueueService(other).dequeue("mail")
            other.commit()
        QueueService(session).release(delivery)
        assert loaded(message) == stored(session, message)

    with Session(engine) as first:
        QueueService(first).enqueue("mail", 1)
        first.commit()
    run(body)


HELD_OR_GONE = {**HELD, **{name: GONE[name] for name in ("archive", "delete", "fail, dead")}}


@each_case("call", list(HELD_OR_GONE), before="reset")
def test_a_loaded_message_goes_back_with_the_savepoint(run, call):
    """Rows 2 and 5: what was undone in the database is not left standing on the object."""

    def body(session: Session) -> None:
        worker = QueueService(session).workers.register("w")
        queue = QueueService(session, worker=worker)
        queue.enqueue("mail", 1)
        (delivery,) = queue.dequeue("mail")
        message = session.get_one(Message, delivery.id)
        loaded(message)
        with session.begin_nested() as savepoint:
            HELD_OR_GONE[call](queue, delivery)
            savepoint.rollback()
        assert loaded(message) == stored(session, message)

    run(body)


def test_a_loaded_message_goes_back_with_the_savepoint_of_its_lease(run):
    """Rows 2 and 5."""

    def body(session: Session) -> None:
        message = Message(queue_name="mail", payload=1)
        session.add(message)
        session.flush()
        session.refresh(message)
        with session.begin_nested() as savepoint:
            assert QueueService(session).dequeue("mail")
            assert message.read_ct == 1
            savepoint.rollback()
        assert loaded(message) == stored(session, message)

    run(body)


def test_a_message_that_was_expired_is_loaded_whole_after_its_lease(run):
    """Row 5 (F35): the commit before expired it, the dequeue knows only some of its columns."""

    def body(session: Session) -> None:
        message = Message(queue_name="mail", payload={"a": 1}, priority=3)
        session.add(message)
        session.commit()
        (delivery,) = QueueService(session).dequeue("mail")
        assert loaded(message) == stored(session, message)
        assert (message.payload, message.read_ct, message.vt) == ({"a": 1}, 1, delivery.vt)
        assert message.leased_until == delivery.leased_until

    run(body)


def test_a_change_of_the_application_to_a_loaded_message_is_not_lost(run):
    """Row 5 (F35): where autoflush is off, it is still pending when the lease is taken."""

    def body(session: Session) -> None:
        QueueService(session).enqueue("mail", 1)
        message = session.scalars(sa.select(Message)).one()
        message.priority = 7
        assert QueueService(session).dequeue("mail")
        assert message in session.dirty
        session.commit()
        assert (message.priority, message.read_ct) == (7, 1)

    run(body, autoflush=False)


def test_a_loaded_archived_message_follows_requeue_and_delete(run):
    """Row 5, on the other side."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.archive_many(lend(session, 2))
        first, second = session.scalars(sa.select(ArchivedMessage).order_by(ArchivedMessage.id))
        queue.archived.delete([first.id])
        queue.archived.requeue(second.id)
        session.commit()
        assert [session.get(ArchivedMessage, case) for case in (1, 2)] == [None, None]

    run(body)


def test_a_requeued_message_is_not_still_loaded_as_archived(run):
    """Row 5, on the other side: before the commit too."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.archive_many(lend(session))
        archived = session.scalars(sa.select(ArchivedMessage)).one()
        queue.archived.requeue(archived.id)
        if sa.inspect(archived).persistent:
            with pytest.raises(sa.orm.exc.ObjectDeletedError):
                _ = archived.outcome

    run(body)


def test_a_loaded_queue_and_worker_follow_their_changes(run):
    """Row 5."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        worker = session.get_one(pgqrs_sa.Worker, queue.workers.register("w").id)
        mail = session.scalars(sa.select(Queue)).one()
        queue.queues.update("mail", lease=5, max_read_ct=1)
        queue.queues.pause("mail")
        queue.workers.suspend(worker.id)
        queue.workers.heartbeat(worker.id)
        assert loaded(mail) == stored(session, mail)
        assert loaded(worker) == stored(session, worker)

    run(body)


async def test_a_message_loaded_by_an_async_session_follows_without_a_refresh(
    async_service, async_session
):
    """Row 5: what was expired instead could only be loaded by awaiting."""
    message = Message(queue_name="mail", payload=1)
    async_session.add(message)
    await async_session.flush()
    await async_session.refresh(message)
    (delivery,) = await async_service.dequeue("mail")
    assert (message.read_ct, message.vt, message.max_read_ct) == (1, delivery.vt, 5)
    assert message.leased_until == delivery.leased_until
    delivery = await async_service.extend(delivery, 600)
    assert (message.leased_until, message.state) == (delivery.leased_until, "leased")
    await async_service.release(delivery)
    assert (message.dequeued_at, message.leased_until, message.max_read_ct) == (None, None, 6)
    assert message.vt == delivery.vt
    (delivery,) = await async_service.dequeue("mail")
    await async_service.fail(delivery, "no", delay=0)
    assert (message.last_error, message.read_ct) == ("no", 2)
    await async_service.delete_many(await async_service.dequeue("mail"))
    assert await async_session.get(Message, delivery.id) is None


# --- 6: order ------------------------------------------------------------------------------------


def test_receipts_come_in_the_order_of_the_items(run):
    """Row 6: keyed and repeated ones among them."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        there = queue.enqueue("mail", "there", key="there")
        items: list[Any] = [
            Item({"n": n}, key=f"k{n}") if n % 7 == 0 else {"n": n} for n in range(2500)
        ]
        items[1000] = Item({"n": 1000}, key="there")
        items[2000] = Item({"n": 2000}, key="k7")
        receipts = queue.enqueue_many("mail", items)
        stored = dict(session.execute(sa.select(Message.id, Message.payload)).all())
        assert len(receipts) == 2500
        duplicates = {n: receipt for n, receipt in enumerate(receipts) if receipt.duplicate}
        assert {n: duplicate.id for n, duplicate in duplicates.items()} == {
            1000: there.id,
            2000: receipts[7].id,
        }
        for n, receipt in enumerate(receipts):
            if n not in duplicates:
                assert stored[receipt.id] == {"n": n}

    run(body)


def test_deliveries_come_in_the_order_of_the_queue(run):
    """Row 6: RETURNING follows the plan."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        shuffled = random.Random(6)
        items = [Item(n, priority=shuffled.randint(-5, 5)) for n in range(300)]
        queue.enqueue_many("mail", items)
        places = session.execute(
            sa.select(Message.id).order_by(Message.priority, Message.vt, Message.id)
        ).scalars()
        expected = list(places)
        session.execute(sa.text("SET LOCAL enable_nestloop = off"))
        taken = [delivery.id for n in (1, 99, 200) for delivery in queue.dequeue("mail", n)]
        assert taken == expected

    run(body)


@each_case("queue_name", ["nowhere", "small"], before="reset")
def test_a_batch_of_keyed_and_other_items_is_refused_as_any_other(run, queue_name):
    """Row 6: with no row inserted, there is no order to restore, but a reason to name."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.queues.create("small", max_payload_bytes=5)
        with pytest.raises((QueueNotFound, pgqrs_sa.PayloadError)):
            queue.enqueue_many(queue_name, ["too large", Item("too large", key="k")])

    run(body)


REFUSED: dict[str, list[Any]] = {
    "keyed": [Item("a", key="a"), Item("too large", key="b")],
    "in a later chunk": [*["a"] * 5000, "too large"],
}


@each_case("name", list(REFUSED), before="reset")
def test_a_batch_that_is_refused_leaves_nothing_behind(service, session, name):
    """Row 6: not in the transaction either, which the caller may well go on with."""
    service.queues.create("small", max_payload_bytes=5)
    with pytest.raises(pgqrs_sa.PayloadError):
        service.enqueue_many("small", REFUSED[name])
    assert count(session) == 0


# --- 7: never more than limit --------------------------------------------------------------------

PLANS = {
    "nested loop": ("enable_hashjoin", "enable_mergejoin"),
    "nested loop over seq scans": (
        "enable_hashjoin",
        "enable_mergejoin",
        "enable_indexscan",
        "enable_bitmapscan",
        "enable_indexonlyscan",
        "enable_material",
        "enable_memoize",
    ),
    "hash join": ("enable_nestloop", "enable_mergejoin"),
    "merge join": ("enable_nestloop", "enable_hashjoin"),
}


@each_case("plan", list(PLANS), before="reset")
def test_a_lease_never_takes_more_than_its_limit(service, session, plan):
    """Row 7."""
    session.execute(sa.text("ANALYZE pgqrs_messages"))
    service.enqueue_many("mail", range(50))
    for setting in PLANS[plan]:
        session.execute(sa.text(f"SET LOCAL {setting} = off"))
    deliveries = [service.dequeue("mail", n) for n in (1, 1, 7)]
    assert [len(delivery) for delivery in deliveries] == [1, 1, 7]
    assert [item.payload for some in deliveries for item in some] == list(range(9))
    assert service.messages.metrics("mail").leased == 9

    service.archive_many(deliveries[2][:3])
    service.delete(deliveries[0][0])
    service.release(deliveries[1][0])
    assert service.messages.cancel_where("mail", Message.id == deliveries[1][0].id) == 1
    metrics = service.messages.metrics("mail")
    assert (metrics.leased, metrics.archived, metrics.cancelled, metrics.ready) == (4, 3, 1, 41)


# --- 8: two-phase commit -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_phase_url() -> Iterator[sa.URL]:
    with embedded.start(settings={"max_prepared_transactions": "10"}) as server:
        url = sa.make_url(server.dsn()).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url)
        metadata.create_all(engine)
        with Session(engine) as session:
            QueueService(session).queues.create("mail")
            session.commit()
        engine.dispose()
        yield url


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_two_phase_session_enqueues_leases_and_settles(two_phase_url, driver):
    """Row 8."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.enqueue("mail", 1)
        queue.enqueue_many("mail", [2, Item(3, key="k")])
        session.prepare()
        session.commit()
        deliveries = queue.dequeue("mail", 5)
        session.commit()
        assert [delivery.payload for delivery in deliveries] == [1, 2, 3]
        queue.archive(deliveries[0])
        queue.enqueue("mail", 4)
        session.prepare()
        session.rollback()
        queue.delete_many(deliveries)
        session.commit()
        assert queue.messages.metrics("mail").live == 0

    Run(driver, two_phase_url.render_as_string(hide_password=False))(body, twophase=True)


def test_a_prepared_message_is_there_once_its_transaction_commits(two_phase_url):
    """Row 8: seen by others after COMMIT PREPARED, and not before."""
    engine = sa.create_engine(two_phase_url)
    try:
        with Session(engine, twophase=True) as session, Session(engine) as other:
            QueueService(session).enqueue("mail", "prepared", key="two-phase")
            session.prepare()
            assert QueueService(other).dequeue("mail") == []
            session.commit()
            (delivery,) = QueueService(other).dequeue("mail")
            assert delivery.payload == "prepared"
            QueueService(other).delete(delivery)
            other.commit()
    finally:
        engine.dispose()


# --- 9: several binds ----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(database: Any) -> Iterator[sa.Engine]:
    """The application's own database, which has no queue."""
    engine = sa.create_engine(database.url)
    AppBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_the_whole_api_finds_its_engine_among_several(engine, elsewhere):
    """Row 9: an order that commits elsewhere has to be allowed."""
    binds = {pgqrs_sa.Base: engine, AppBase: elsewhere}
    with Session(binds=binds, info={"pgqrs_allow_split": True}) as session:
        session.add(Order(id=1))
        call_all(QueueService(session))
        session.add(Message(queue_name=QueueService(session).queues.create("mail").name, payload=1))
        session.commit()
    assert count(engine) == 1


FENCED = {
    name: call
    for name, call in {**HELD, **GONE}.items()
    if name not in ("release_leases", "purge", "queues.delete")
}


@each_case("call", list(FENCED), before="reset")
def test_a_lost_lease_is_told_by_a_session_of_several_engines(engine, service, elsewhere, call):
    """Row 9: the error, not one of SQLAlchemy about the question behind it."""
    (delivery,) = lend(service.session)
    service.delete(delivery)
    service.session.commit()
    with Session(binds={pgqrs_sa.Base: engine, AppBase: elsewhere}) as session:
        with pytest.raises(LeaseLost) as lost:
            FENCED[call](QueueService(session), delivery)
        assert lost.value.whereabouts[delivery.id].state == "gone"


@pytest.mark.parametrize(
    ("queue_name", "error"), [("mail", None), ("nowhere", QueueNotFound)], ids=["empty", "missing"]
)
def test_a_query_without_a_table_finds_its_engine_among_several(
    engine, service, elsewhere, queue_name, error
):
    """Row 9: also when it returns nothing, or the queue is not there."""
    query = sa.select(sa.literal(1).label("payload")).where(sa.false())
    with Session(binds={pgqrs_sa.Base: engine, AppBase: elsewhere}) as session:
        if error is None:
            assert QueueService(session).enqueue_from(queue_name, query) == 0
        else:
            with pytest.raises(error):
                QueueService(session).enqueue_from(queue_name, query)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_the_whole_async_api_finds_its_engine_among_several(migrated, elsewhere, driver):
    """Row 9: an order that commits elsewhere has to be allowed."""
    bind = create_async_engine(migrated.async_url(driver))
    other = create_async_engine(elsewhere.url.set(drivername=f"postgresql+{driver}"))
    try:
        async with AsyncSession(
            binds={pgqrs_sa.Base: bind, AppBase: other}, info={"pgqrs_allow_split": True}
        ) as session:
            session.add(Order(id=1))
            await await_all(AsyncQueueService(session))
            await session.commit()
    finally:
        await bind.dispose()
        await other.dispose()


def test_a_session_may_route_by_the_mapper(engine, elsewhere):
    """Row 9: as SQLAlchemy's documentation has it, ``mapper.class_`` decides."""

    class Routed(Session):
        def get_bind(self, mapper: Any = None, **_: Any) -> sa.Engine:
            ours = mapper is not None and issubclass(mapper.class_, pgqrs_sa.Base)
            return engine if ours else elsewhere

    with Routed() as session:
        call_all(QueueService(session))


def test_a_session_may_route_by_the_statement(engine, service, elsewhere):
    """Row 9: what writes goes to one server; nothing is asked of the other on the way."""

    class Routed(Session):
        def get_bind(self, _mapper: Any = None, *, clause: Any = None, **_: Any) -> sa.Engine:
            writes = self._flushing or isinstance(clause, (sa.Insert, sa.Update, sa.Delete))
            return engine if writes else elsewhere

    opened: list[Any] = []
    event.listen(elsewhere, "engine_connect", opened.append)
    with Routed() as session:
        queue = QueueService(session)
        queue.enqueue("mail", 1)
        queue.enqueue_many("mail", [2, Item(3, key="k")])
        queue.enqueue_many("mail", [Item(3, key="k")])
        queue.enqueue_from("mail", sa.select(sa.literal(4).label("payload")))
        first, *rest = queue.dequeue("mail", 4)
        queue.archive(queue.extend(first, 60))
        queue.release_many(rest)
        session.add(Message(queue_id=1, payload=5))
        session.commit()
    assert not opened
    assert (count(engine), count(engine, ArchivedMessage)) == (4, 1)


# --- 10: prepared statements and the compiled cache ----------------------------------------------


def _rounds(session: Session, sizes: Any) -> None:
    queue = QueueService(session)
    for n in sizes:
        queue.enqueue_many("mail", range(n))
        queue.enqueue_many("mail", [Item(i, key=f"{n}-{i}") for i in range(n)])
        queue.enqueue("mail", n, delay=n % 2, priority=n)
        deliveries = queue.dequeue("mail", 2 * n)
        assert len(deliveries) == 2 * n
        queue.extend_many(deliveries, n)
        queue.archive_many(deliveries[:n], reason=None)
        queue.archive_many(deliveries[n : n + n // 2] or deliveries[n : n + 1], reason="why")
        rest = deliveries[n + max(n // 2, 1) :]
        if rest:
            queue.release_many(rest)
            queue.delete_many(queue.dequeue("mail", len(rest)))
        queue.messages.peek("mail", n)
        queue.messages.find("mail", limit=n)
        queue.archived.prune(0, limit=n)
        queue.queues.purge("mail", limit=n)
        queue.queues.purge("mail")
        session.commit()


@pytest.mark.parametrize("driver", DRIVERS)
def test_lengths_and_limits_make_no_more_prepared_statements(service, migrated, driver):
    """Row 10: one statement for every length of list, and another for a single message."""
    options = {} if driver == "asyncpg" else {"connect_args": {"prepare_threshold": 0}}
    prepared = sa.text("SELECT count(*) FROM pg_prepared_statements")

    def body(session: Session) -> None:
        _rounds(session, [2, 3, 4, 1])  # each list with one member, and with more
        cache = session.get_bind()._compiled_cache
        before = session.execute(prepared).scalar_one(), len(cache)
        assert before > (5, 5)
        _rounds(session, range(1, 9))
        _rounds(session, range(8, 0, -1))
        assert (session.execute(prepared).scalar_one(), len(cache)) == before

    Run(driver, migrated.url)(body, engine={"pool_size": 1, "max_overflow": 0, **options})


def test_repeated_calls_of_the_whole_api_compile_nothing_new(run):
    """Row 10."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        call_all(queue)
        call_all(queue)
        cache = session.get_bind()._compiled_cache
        before = set(cache)
        for _ in range(3):
            call_all(QueueService(session))
        assert set(cache) == before

    run(body)


def test_criteria_with_other_values_are_the_same_statement(run):
    """Row 10: the value is a parameter, in `where` as well."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        cache = session.get_bind()._compiled_cache

        def look(n: int) -> None:
            queue.dequeue(
                "mail", where=[Message.priority == n, Message.payload["n"].as_integer() == n]
            )
            queue.messages.find("mail", where=Message.priority > n)
            queue.messages.cancel_where("mail", Message.priority == n, payload={"n": n})

        look(0)
        before = set(cache)
        for n in range(1, 6):
            look(n)
        assert set(cache) == before

    run(body)


# --- 11 and 12: isolation ------------------------------------------------------------------------


def _race(engine: sa.Engine) -> Callable[[Session], list[Delivery]]:
    """Dequeue with a snapshot from before somebody else took the first message."""

    def body(session: Session) -> list[Delivery]:
        count(session)
        with Session(engine) as other:
            assert QueueService(other).dequeue("mail")[0].payload == 1
            other.commit()
        return QueueService(session).dequeue("mail")

    with Session(engine) as first:
        QueueService(first).enqueue_many("mail", [1, 2])
        first.commit()
    return body


def test_read_committed_goes_on_to_the_next_message(run, engine):
    """Row 11."""
    (delivery,) = run(_race(engine))
    assert delivery.payload == 2


@each_case("level", ["REPEATABLE READ", "SERIALIZABLE"], before="reset")
def test_a_snapshot_that_is_too_old_is_a_serialization_failure(run, engine, level):
    """Row 11 (F32): the driver's error, as it is."""
    with pytest.raises(sa.exc.DBAPIError) as failure:
        run(_race(engine), engine={"isolation_level": level})
    assert sqlstate(failure.value) == "40001"
    assert count(engine) == 2


@each_case("level", ["REPEATABLE READ", "SERIALIZABLE"], before="reset")
def test_what_others_still_lock_is_skipped_at_every_level(run, engine, level):
    """Row 11: only a committed change is a conflict."""
    with Session(engine) as other:
        QueueService(other).enqueue_many("mail", [1, 2])
        other.commit()
        assert QueueService(other).dequeue("mail")[0].payload == 1
        (delivery,) = run(
            lambda session: QueueService(session).dequeue("mail"),
            engine={"isolation_level": level},
        )
        assert delivery.payload == 2


def test_a_retry_after_a_serialization_failure_enqueues_once(run, engine):
    """F33: the service remembers nothing of the attempt that failed."""

    def attempt(session: Session, queue: QueueService) -> None:
        limit = session.scalars(sa.select(Queue.max_read_ct)).one()
        queue.enqueue("mail", 1)
        queue.enqueue("mail", 2, key="k")
        if limit == 5:
            with Session(engine) as other:
                QueueService(other).queues.update("mail", max_read_ct=6)
                other.commit()
        queue.queues.update("mail", max_read_ct=limit + 1)
        session.commit()

    def body(session: Session) -> None:
        queue = QueueService(session)
        with pytest.raises(sa.exc.DBAPIError) as failure:
            attempt(session, queue)
        assert sqlstate(failure.value) == "40001"
        session.rollback()
        attempt(session, queue)

    run(body, engine={"isolation_level": "REPEATABLE READ"})
    assert count(engine) == 2


@each_case("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"], before="reset")
def test_the_level_of_the_session_holds_for_the_queue(run, level):
    """Row 12."""

    def body(session: Session) -> None:
        session.connection(execution_options={"isolation_level": level})
        QueueService(session).enqueue("mail", 1)
        assert QueueService(session).dequeue("mail")
        shown = session.execute(sa.text("SHOW transaction_isolation")).scalar_one()
        assert shown == level.lower()
        session.commit()

    run(body)


# --- 13: AUTOCOMMIT ------------------------------------------------------------------------------

ENQUEUES: dict[str, Callable[[QueueService], Any]] = {
    "enqueue": CALLS["enqueue"],
    "enqueue_many": CALLS["enqueue_many"],
    "enqueue_from": lambda queue: queue.enqueue_from(
        "mail", sa.select(sa.literal(1).label("payload"))
    ),
}


@each_case("call", list(ENQUEUES))
@each_case("how", ["engine", "session"], before="reset")
def test_autocommit_is_refused(run, engine, call, how):
    """Row 13."""

    def body(session: Session) -> None:
        if how == "session":
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(NonAtomicEnqueue):
            ENQUEUES[call](QueueService(session))

    run(body, engine={"isolation_level": "AUTOCOMMIT"} if how == "engine" else {})
    assert count(engine) == 0


def test_a_connection_in_autocommit_is_refused(engine, service):
    """Row 13: the session is bound to it."""
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        Session(connection) as session,
        pytest.raises(NonAtomicEnqueue),
    ):
        QueueService(session).enqueue("mail", 1)
    assert count(engine) == 0


@each_case("call", list(ENQUEUES), before="reset")
def test_a_host_that_listens_to_what_its_session_executes_sees_our_statements(run, engine, call):
    seen = []

    def body(session: Session) -> None:
        event.listen(session, "do_orm_execute", seen.append)
        ENQUEUES[call](QueueService(session))
        session.commit()

    run(body)
    assert any(item.is_insert for item in seen)
    assert count(engine) >= 1


def test_a_session_with_an_execute_of_its_own_executes_our_statements(engine, service):
    seen = []

    class Watching(Session):
        def execute(self, statement, *args, **kwargs):
            seen.append(statement)
            return super().execute(statement, *args, **kwargs)

    with Watching(engine) as session, session.begin():
        QueueService(session).enqueue("mail", 1)
    assert len(seen) == 1


@each_case("call", list(ENQUEUES), before="reset")
def test_autocommit_is_refused_to_a_host_that_listens_as_well(run, engine, call):
    def body(session: Session) -> None:
        event.listen(session, "do_orm_execute", lambda state: None)
        with pytest.raises(NonAtomicEnqueue):
            ENQUEUES[call](QueueService(session))

    run(body, engine={"isolation_level": "AUTOCOMMIT"})
    assert count(engine) == 0


@each_case("call", list(ENQUEUES), before="reset")
def test_autocommit_may_be_allowed(run, engine, call):
    """Row 13: a rollback then takes nothing back."""

    def body(session: Session) -> None:
        ENQUEUES[call](QueueService(session, allow_autocommit=True))
        session.rollback()

    run(body, engine={"isolation_level": "AUTOCOMMIT"})
    assert count(engine) >= 1


def test_a_lease_is_exclusive_in_autocommit(run, engine):
    """Row 13."""

    def body(session: Session) -> None:
        queue = QueueService(session)
        (delivery,) = queue.dequeue("mail")
        session.rollback()
        with Session(engine) as other:
            assert QueueService(other).dequeue("mail") == []
        queue.archive(delivery)
        session.rollback()

    with Session(engine) as first:
        QueueService(first).enqueue("mail", 1)
        first.commit()
    run(body, engine={"isolation_level": "AUTOCOMMIT"})
    assert (count(engine), count(engine, ArchivedMessage)) == (0, 1)


# --- 14: read-only -------------------------------------------------------------------------------


def test_a_read_only_transaction_can_look(run):
    """Row 14: on a standby as well, then."""

    def body(session: Session) -> None:
        lend(session)
        session.commit()
        queue = QueueService(session)
        session.execute(sa.text("SET TRANSACTION READ ONLY"))
        queue.check_schema()
        assert queue.messages.metrics("mail").leased == 1
        assert queue.messages.all_metrics()
        assert queue.messages.peek("mail") == []
        assert len(queue.messages.find("mail", state="leased")) == 1
        assert queue.archived.find("mail") == []
        assert queue.queues.list()
        assert queue.workers.health() == []

    run(body)


@each_case("call", ["enqueue", "enqueue with a key", "enqueue_many", "dequeue"], before="reset")
def test_a_read_only_transaction_cannot_write(run, call):
    """Row 14: the driver's error, as it is."""

    def body(session: Session) -> None:
        session.execute(sa.text("SET TRANSACTION READ ONLY"))
        with pytest.raises(sa.exc.DBAPIError) as refused:
            CALLS[call](QueueService(session))
        assert sqlstate(refused.value) == "25006"

    run(body)


# --- 15: the rolled-back transaction of a test suite ---------------------------------------------


def test_a_rolled_back_test_transaction_leaves_nothing(engine, service, orders):
    """Row 15: ``join_transaction_mode="create_savepoint"``, as SQLAlchemy's recipe has it."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            queue = QueueService(session)
            session.add(Order(id=1))
            queue.enqueue("mail", 1)
            session.commit()
            queue.enqueue("mail", 2)
            session.rollback()
            (delivery,) = queue.dequeue("mail", 5)
            session.commit()
            assert delivery.payload == 1
            queue.archive(delivery)
            session.commit()
            assert len(queue.archived.find("mail")) == 1
        outer.rollback()
    assert (count(engine), count(engine, ArchivedMessage), count(engine, Order)) == (0, 0, 0)


async def test_a_rolled_back_async_test_transaction_leaves_nothing(
    async_service, async_engine, engine
):
    """Row 15."""
    async with async_engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            queue = AsyncQueueService(session)
            await queue.enqueue("mail", 1)
            await session.commit()
            await queue.enqueue("mail", 2)
            await session.rollback()
            assert [delivery.payload for delivery in await queue.dequeue("mail", 5)] == [1]
            await session.commit()
        await outer.rollback()
    assert count(engine) == 0


# --- 16: cancellation ----------------------------------------------------------------------------


def is_blocked(engine: sa.Engine, pid: int) -> bool:
    with engine.connect() as connection:
        blocked = sa.select(sa.func.cardinality(sa.func.pg_blocking_pids(pid)) > 0)
        return connection.execute(blocked).scalar_one()


async def until_blocked(engine: sa.Engine, pid: int) -> None:
    await until_awaited(lambda: is_blocked(engine, pid), "it waits for a lock")


BLOCKED: dict[str, Callable[[AsyncQueueService, Delivery], Any]] = {
    "dequeue": lambda queue, _: queue.dequeue("mail"),
    "enqueue": lambda queue, _: queue.enqueue("mail", 1),
    "archive": lambda queue, delivery: queue.archive(delivery),
    "fail": lambda queue, delivery: queue.fail(delivery, "no"),
}


@each_case("call", list(BLOCKED), before="reset_async")
async def test_a_cancelled_call_changes_nothing(async_engine, async_service, engine, call):
    """Row 16 (F8): the session must be rolled back, and nobody is left with a lease."""
    with Session(engine) as setup:
        (delivery,) = lend(setup)
        free = QueueService(setup).enqueue("mail", "free")
        setup.commit()

    with engine.connect() as blocker:
        blocker.execute(sa.text("LOCK TABLE pgqrs_messages IN ACCESS EXCLUSIVE MODE"))
        async with AsyncSession(async_engine) as session:
            pid = (await session.execute(sa.select(sa.func.pg_backend_pid()))).scalar_one()
            task = asyncio.ensure_future(BLOCKED[call](AsyncQueueService(session), delivery))
            await until_blocked(engine, pid)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(sa.exc.SQLAlchemyError):
                await session.execute(sa.select(1))
            await session.rollback()
            assert (await session.execute(sa.select(1))).scalar_one() == 1

    with Session(engine) as after:
        queue = QueueService(after)
        assert (count(after), count(after, ArchivedMessage)) == (2, 0)
        assert queue.messages.get(free.id).state == "ready"
        assert queue.messages.get(free.id).read_ct == 0
        queue.archive(delivery)
        after.commit()


async def test_closing_the_session_is_enough_after_a_cancellation(
    async_engine, async_service, engine
):
    """Row 16: what ``async with`` does while the CancelledError passes through."""
    with Session(engine) as setup:
        QueueService(setup).enqueue("mail", 1)
        setup.commit()
    pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with AsyncSession(async_engine) as session, session.begin():
            result = await session.execute(sa.select(sa.func.pg_backend_pid()))
            pid.set_result(result.scalar_one())
            await AsyncQueueService(session).dequeue("mail")

    with engine.connect() as blocker:
        blocker.execute(sa.text("LOCK TABLE pgqrs_messages IN ACCESS EXCLUSIVE MODE"))
        task = asyncio.ensure_future(work())
        await until_blocked(engine, await pid)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with Session(engine) as after:
        assert [delivery.read_ct for delivery in QueueService(after).dequeue("mail")] == [1]


async def test_services_of_two_sessions_run_side_by_side(async_engine, async_service, engine):
    """Row 16: run_sync blocks the task, not the loop."""
    with Session(engine) as setup:
        QueueService(setup).enqueue_many("mail", range(40))
        setup.commit()

    async def drain() -> list[int]:
        taken: list[int] = []
        async with AsyncSession(async_engine) as session:
            while deliveries := await AsyncQueueService(session).dequeue("mail", 3):
                taken += [delivery.payload for delivery in deliveries]
                await AsyncQueueService(session).archive_many(deliveries)
                await session.commit()
        return taken

    taken = await asyncio.gather(*(drain() for _ in range(4)))
    assert sorted(payload for some in taken for payload in some) == list(range(40))


# --- 17: without greenlet ------------------------------------------------------------------------

WITHOUT_GREENLET = """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "greenlet":
                raise ModuleNotFoundError("No module named 'greenlet'", name="greenlet")

    sys.meta_path.insert(0, Hidden())
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    import pgqrs_sa

    assert "sqlalchemy.ext.asyncio" not in sys.modules
    engine = sa.create_engine(sys.argv[1])
    with Session(engine) as session:
        queue = pgqrs_sa.QueueService(session)
        queue.queues.create("mail")
        queue.enqueue("mail", 1)
        queue.archive_many(queue.dequeue("mail"))
        session.commit()
    engine.dispose()
    try:
        pgqrs_sa.AsyncQueueService(session)  # it can be imported, and says at use what is missing
    except ImportError as error:
        assert "pgqrs-sa[asyncio]" in str(error), error
    except pgqrs_sa.InvalidArgument:
        assert sa.__version__ < "2.1"  # whose asyncio can be imported without greenlet
    else:
        raise AssertionError("a synchronous session was taken")
    print("done")
"""


def test_the_synchronous_service_works_without_greenlet(migrated):
    """Row 17."""
    code = textwrap.dedent(WITHOUT_GREENLET)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, migrated.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert (done.stdout.strip(), done.stderr) == ("done", "")


def test_importing_the_package_imports_nothing_of_asyncio():
    """Row 17: nor drivers, nor Alembic."""
    code = """
        import sys, pgqrs_sa
        heavy = ("sqlalchemy.ext.asyncio", "alembic", "psycopg", "asyncpg", "click", "rich")
        print([name for name in heavy if name in sys.modules])
        pgqrs_sa.AsyncQueueService
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# --- the transaction stays the caller's ----------------------------------------------------------


def _watch(engine: sa.Engine) -> list[str]:
    seen: list[str] = []
    for name in ("begin", "commit", "rollback", "savepoint", "checkout"):
        event.listen(engine, name, lambda *_, name=name: seen.append(name))
    return seen


REQUEUES = ["savepoint"] * 2
"""A requeue whose key another transaction has just enqueued is taken back by itself."""
ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}


def test_the_whole_api_stays_in_the_transaction_and_on_the_connection_of_the_session(
    migrated, engine
):
    """F24, and the promise of the service's first paragraph."""
    single = sa.create_engine(migrated.url, **ONE_CONNECTION)
    try:
        with Session(single) as session:
            seen = _watch(single)
            call_all(QueueService(session))
            assert seen == ["checkout", "begin", *REQUEUES]
            QueueService(session).queues.create("mail")
            QueueService(session).enqueue("mail", 1)
            session.rollback()
        assert seen == ["checkout", "begin", *REQUEUES, "rollback"]
    finally:
        single.dispose()
    assert (count(engine, Queue), count(engine)) == (0, 0)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_the_whole_async_api_stays_in_the_transaction_and_on_the_connection_of_the_session(
    migrated, engine, driver
):
    """F24."""
    single = create_async_engine(migrated.async_url(driver), **ONE_CONNECTION)
    try:
        async with AsyncSession(single) as session:
            seen = _watch(single.sync_engine)
            await await_all(AsyncQueueService(session))
            assert seen == ["checkout", "begin", *REQUEUES]
            await session.rollback()
        assert seen == ["checkout", "begin", *REQUEUES, "rollback"]
    finally:
        await single.dispose()
    assert count(engine, Queue) == 0


def test_a_session_bound_to_a_connection_works(engine):
    """F36."""
    with engine.connect() as connection:
        with Session(connection) as session:
            call_all(QueueService(session))
            QueueService(session).queues.create("mail")
            session.commit()
        connection.rollback()
    assert count(engine, Queue) == 1


def test_the_json_settings_of_the_engine_do_not_matter(run):
    """F45: what is stored and read passes through the service's codec alone."""

    def refuse(_: Any) -> Any:
        raise AssertionError

    def body(session: Session) -> None:
        queue = QueueService(session)
        queue.enqueue("mail", {"a": 1.5}, headers={"h": 1})
        queue.enqueue_many("mail", [{"a": 1.5}, Item(2, headers={"h": 1})])
        (delivery, *_) = queue.dequeue("mail", 3)
        assert (delivery.payload, delivery.headers) == ({"a": 1.5}, {"h": 1})
        queue.archive(delivery)
        assert queue.messages.find("mail", payload=2)[0].headers == {"h": 1}
        assert queue.archived.find("mail")[0].payload == {"a": 1.5}

    run(body, engine={"json_serializer": refuse, "json_deserializer": refuse})


@each_case(
    "zone", ["Pacific/Kiritimati", "America/St_Johns", "Asia/Kolkata", "UTC"], before="reset"
)
def test_times_are_moments_in_every_time_zone(run, zone):
    """F48: the session's zone moves no time, nor makes one unreadable."""
    last = datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)

    def body(session: Session) -> None:
        session.execute(sa.text(f"SET LOCAL TIME ZONE '{zone}'"))
        queue = QueueService(session)
        assert queue.enqueue("mail", "late", at=last).vt == last
        assert queue.enqueue_many("mail", [Item("late", at=last)])[0].vt == last
        assert {message.vt for message in queue.messages.find("mail")} == {last}
        queue.enqueue("mail", "now")
        (delivery,) = queue.dequeue("mail", 5)
        assert abs(delivery.enqueued_at - datetime.now(UTC)) < timedelta(minutes=5)

    run(body)


# --- other schemas, other hosts ------------------------------------------------------------------


def _create(engine: sa.Engine, schema: str, tables: sa.MetaData = metadata) -> None:
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(schema))
        tables.create_all(connection)


TRANSLATED = {"execution_options": {"schema_translate_map": {None: "tenant"}}}


@pytest.fixture
def tenant(database: Any) -> Iterator[sa.Engine]:
    """The ready-made tables in a schema that only a translation names."""
    engine = sa.create_engine(database.url, **TRANSLATED)
    _create(engine, "tenant")
    yield engine
    engine.dispose()


def test_a_schema_translate_map_moves_the_queue(tenant):
    with Session(tenant) as session:
        queue = QueueService(session)
        queue.queues.create("mail")
        session.add(Message(queue_name="mail", payload=1))
        queue.enqueue("mail", 2, key="k")
        queue.enqueue_many("mail", [3, Item(4, key="l")])
        queue.enqueue_from("mail", sa.select(sa.literal(5).label("payload")))
        deliveries = queue.dequeue("mail", 9)
        queue.archive_many(deliveries[:1])
        queue.fail(deliveries[1], "no", dead=True)
        queue.release_many(deliveries[2:])
        assert queue.messages.metrics("mail").ready == 3
        with pytest.raises(QueueNotEmpty):
            queue.queues.delete("mail")
        queue.queues.delete("mail", force=True)
        session.commit()
        tables = sa.text("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename ~ '^pgqrs_'")
        assert session.execute(tables).scalars().all() == ["tenant"]


def test_the_schema_is_checked_where_the_translation_puts_it(tenant):
    with Session(tenant) as session:
        QueueService(session).check_schema()


def test_a_schema_that_the_translation_does_not_have_fails_the_check(engine):
    other = engine.execution_options(schema_translate_map={None: "nowhere"})
    with Session(other) as session, pytest.raises(SchemaVersionError):
        QueueService(session).check_schema()


def test_a_translation_given_to_the_session_alone_moves_the_queue(tenant, database):
    plain = sa.create_engine(database.url)
    try:
        with Session(plain) as session:
            session.connection(execution_options={"schema_translate_map": {None: "tenant"}})
            queue = QueueService(session)
            queue.queues.create("mail")
            queue.enqueue("mail", 1)
            assert len(queue.dequeue("mail")) == 1
            queue.queues.delete("mail", force=True)
    finally:
        plain.dispose()


class Host(DeclarativeBase):
    """A host that has its own classes, in a schema, next to its own tables."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class HostQueues(DeclarativeBase):
    metadata = Host.metadata
    __pgqrs_schema__ = "jobs"


class HostQueue(QueueMixin, HostQueues):
    pass


class HostMessage(MessageMixin, HostQueues):
    tenant_id: Mapped[int | None] = mapped_column(index=True)


class HostArchived(ArchivedMessageMixin, HostQueues):
    pass


class HostWorker(WorkerMixin, HostQueues):
    pass


class Invoice(Host):
    __tablename__ = "invoices"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey("jobs.pgqrs_messages.id", ondelete="SET NULL"), index=True
    )
    message: Mapped[HostMessage | None] = relationship(HostMessage)


class DataHost(MappedAsDataclass, DeclarativeBase):
    """A host whose own classes are dataclasses."""


class DataQueues(DeclarativeBase):
    metadata = DataHost.metadata
    __pgqrs_schema__ = "jobs"


class DataQueue(QueueMixin, DataQueues):
    pass


class DataMessage(MessageMixin, DataQueues):
    pass


class DataArchived(ArchivedMessageMixin, DataQueues):
    pass


class DataWorker(WorkerMixin, DataQueues):
    pass


class DataInvoice(DataHost):
    __tablename__ = "data_invoices"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey(DataMessage.id, ondelete="SET NULL"), default=None
    )
    message: Mapped[DataMessage | None] = relationship(DataMessage, default=None)


HOST = Models(HostQueue, HostMessage, HostArchived, HostWorker)
DATA_HOST = Models(DataQueue, DataMessage, DataArchived, DataWorker)


def _with(models: Models) -> Callable[[Any], Generator[Any, Any, None]]:
    """`whole_api`, of a service whose message class is not the ready-made one."""

    def api(queue: Any) -> Generator[Any, Any, None]:
        yield queue.check_schema()
        yield queue.queues.create("jobs", retention=0)
        yield from _settling(queue)
        yield from _archive(queue)
        yield from _workers(queue)
        yield queue.queues.purge("jobs")
        assert (yield queue.enqueue("jobs", 1, key="k")).duplicate is False
        assert (yield queue.enqueue("jobs", 1, key="k")).duplicate is True
        assert (yield queue.messages.cancel_where("jobs", models.message.ready)) == 1
        yield queue.queues.delete("jobs", force=True)

    return api


@pytest.fixture
def hosts(database: Any) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("models", [HOST, DATA_HOST], ids=["conventions", "dataclasses"])
def test_a_host_has_its_own_classes_in_its_own_schema(hosts, models):
    _create(hosts, "jobs", models.queue.metadata)
    with Session(hosts) as session:
        call_all(QueueService(session, models=models), _with(models))
        session.commit()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_host_awaits_its_own_classes(hosts, database, driver):
    _create(hosts, "jobs", Host.metadata)
    engine = create_async_engine(database.async_url(driver))
    try:
        async with AsyncSession(engine) as session:
            await await_all(AsyncQueueService(session, models=HOST), _with(HOST))
            await session.commit()
    finally:
        await engine.dispose()


def test_a_naming_convention_of_the_host_renames_nothing_of_the_queue(hosts, engine):
    """The names are those of the migrations, which know no convention."""
    _create(hosts, "jobs", Host.metadata)
    named = sa.text(
        "SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(:table) AND contype <> 'n'"
        " UNION ALL"
        " SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid"
        " WHERE indrelid = to_regclass(:table)"
    )

    def names(bind: sa.Engine, schema: str) -> set[str]:
        with bind.connect() as connection:
            return {
                name
                for table in ("queues", "messages", "archive", "workers")
                for name in connection.execute(
                    named, {"table": f"{schema}.pgqrs_{table}"}
                ).scalars()
            }

    own = {"ix_jobs_pgqrs_messages_tenant_id"}
    assert names(hosts, "jobs") - own == names(engine, "public")
    assert own < names(hosts, "jobs")


def test_a_column_of_the_host_is_written_read_and_asked_for(hosts):
    _create(hosts, "jobs", Host.metadata)
    with Session(hosts) as session:
        queue = QueueService(session, models=HOST)
        queue.queues.create("mail")
        for tenant in (1, 2):
            session.add(HostMessage(queue_name="mail", payload=tenant, tenant_id=tenant))
        invoice = Invoice(id=1)
        invoice.message = HostMessage(queue_name="mail", payload=3, tenant_id=3)
        session.add(invoice)
        (second,) = queue.dequeue("mail", 5, where=HostMessage.tenant_id == 2)
        assert second.payload == 2
        (third,) = queue.dequeue("mail", where=HostMessage.tenant_id == 3)
        assert invoice.message_id == third.id
        queue.archive(third)
        session.commit()
        assert invoice.message_id is None
        assert session.scalars(sa.select(HostMessage.tenant_id).order_by("tenant_id")).all() == [
            1,
            2,
        ]


def test_a_dataclass_of_the_host_refers_to_a_message(hosts):
    _create(hosts, "jobs", DataHost.metadata)
    with Session(hosts) as session:
        queue = QueueService(session, models=DATA_HOST)
        queue.queues.create("mail")
        invoice = DataInvoice(id=1, message=DataMessage(queue_name="mail", payload=1))
        session.add(invoice)
        (delivery,) = queue.dequeue("mail")
        assert invoice.message_id == delivery.id
        queue.delete(delivery)
        session.commit()
        assert invoice.message is None


def test_a_key_of_a_named_schema_is_refused_in_a_flush_as_elsewhere(hosts):
    _create(hosts, "jobs", Host.metadata)
    with Session(hosts) as session:
        queue = QueueService(session, models=HOST)
        queue.queues.create("mail")
        queue.enqueue("mail", 1, key="k")
        session.add(HostMessage(queue_name="mail", payload=1, dedup_key="k"))
        with pytest.raises(DuplicateMessage):
            session.flush()


def test_two_hosts_in_two_schemas_share_a_session(engine, service):
    _create(engine, "jobs", Host.metadata)
    with Session(engine) as session:
        ready_made, own = QueueService(session), QueueService(session, models=HOST)
        own.queues.create("mail")
        ready_made.enqueue("mail", "default", key="k")
        assert not own.enqueue("mail", "jobs", key="k").duplicate
        assert [delivery.payload for delivery in own.dequeue("mail", 5)] == ["jobs"]
        assert [delivery.payload for delivery in ready_made.dequeue("mail", 5)] == ["default"]


def test_payloads_are_plain_json_for_everybody_else(run):
    """What the service stores is what SQL sees."""

    def body(session: Session) -> None:
        payload = {"ä": [1, 2.5, None, True, "\N{SNOWMAN}"], "n": {"deep": []}}
        QueueService(session).enqueue("mail", payload)
        text = session.execute(sa.text("SELECT payload::text FROM pgqrs_messages")).scalar_one()
        assert json.loads(text) == payload

    run(body)

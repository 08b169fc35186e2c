"""The NOTIFY of an enqueue: in every way, once a transaction, and only if a consumer waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from pgqrs_sa import (
    ArchivedMessage,
    AsyncQueueService,
    InvalidArgument,
    Item,
    Message,
    MessageMixin,
    QueueMixin,
    QueueService,
    metadata,
)
from pgqrs_sa._core import wakeup
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa._core.sql import enqueue as statements
from pgqrs_sa._core.sql.wakeup import channel
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.grants import grants
from pgqrs_sa.models import READY_MADE
from support.cases import each_case
from support.engines import new_async_engine, new_engine

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=False)
HOUR = timedelta(hours=1)

PAYLOAD_AND = sa.select(sa.literal(7).label("payload"))

BY_SERVICE = {
    "enqueue": lambda service: service.enqueue("mail", 1),
    "enqueue_keyed": lambda service: service.enqueue("mail", 1, key="k"),
    "enqueue_at_a_time_that_has_passed": lambda service: service.enqueue(
        "mail", 1, at=datetime(2020, 1, 1, tzinfo=UTC)
    ),
    "enqueue_many": lambda service: service.enqueue_many("mail", [1, 2, 3]),
    "enqueue_many_of_a_thousand": lambda service: service.enqueue_many("mail", range(1000)),
    "enqueue_many_keyed": lambda service: service.enqueue_many("mail", [Item(1, key="k")]),
    "enqueue_many_of_which_one_is_visible": lambda service: service.enqueue_many(
        "mail", [Item(1, delay=60), Item(2)]
    ),
    "enqueue_from": lambda service: service.enqueue_from("mail", sa.select(sa.literal(1))),
    "enqueue_from_keyed": lambda service: service.enqueue_from(
        "mail", PAYLOAD_AND.add_columns(sa.literal("k").label("key"))
    ),
    "enqueue_from_of_which_one_is_visible": lambda service: service.enqueue_from(
        "mail",
        sa.union_all(
            PAYLOAD_AND.add_columns(sa.literal(60).label("delay")),
            PAYLOAD_AND.add_columns(sa.literal(0).label("delay")),
        ),
    ),
    "requeue": lambda service: service.archived.requeue(1),
    "reschedule": lambda service: service.messages.reschedule(2, delay=0),
}

BY_OBJECTS = {
    "add": [{}],
    "add_all": [{}, {"priority": 3}],
    "add_keyed": [{"dedup_key": "k"}],
    "add_at_a_time_that_has_passed": [{"at": datetime(2020, 1, 1, tzinfo=UTC)}],
    "add_of_which_one_is_visible": [{"delay": 60}, {"delay": 0}],
}

LATER = {
    "enqueue": lambda service: service.enqueue("mail", 1, delay=60),
    "enqueue_at": lambda service: service.enqueue("mail", 1, at=datetime.now(UTC) + HOUR),
    "enqueue_many": lambda service: service.enqueue_many("mail", [Item(1, delay=60)]),
    "enqueue_from": lambda service: service.enqueue_from(
        "mail", PAYLOAD_AND.add_columns(sa.literal(60).label("delay"))
    ),
    "enqueue_from_no_rows": lambda service: service.enqueue_from(
        "mail", sa.select(sa.literal(1)).where(sa.false())
    ),
    "requeue": lambda service: service.archived.requeue(1, delay=60),
    "reschedule": lambda service: service.messages.reschedule(2, delay=60),
    "a_taken_key": lambda service: service.enqueue("mail", 1, key="taken"),
    "many_with_a_taken_key": lambda service: service.enqueue_many("mail", [Item(1, key="taken")]),
}


@pytest.fixture
def restock(engine, service):
    """Return what makes the database as `stocked` says: see `each_case`."""
    tables = ", ".join(["shop_orders", *(table.name for table in metadata.sorted_tables)])

    def restock():
        with Session(engine) as session, session.begin():
            session.execute(sa.text(f"TRUNCATE {tables} RESTART IDENTITY"))
            service = QueueService(session)
            service.queues.create("mail")
            service.enqueue("mail", 1)
            service.archive(service.dequeue("mail")[0])
            service.enqueue("mail", 2, delay=600)
            service.enqueue("mail", 3, delay=600, key="taken")

    return restock


@pytest.fixture
def stocked(restock):
    """An archived message with id 1, one that is scheduled with id 2, and a key that is taken."""
    restock()


@pytest.fixture(params=["psycopg", "psycopg_async", "asyncpg"])
async def run(request, migrated, stocked):
    """Return a function that runs another one in a committed session, on each driver."""
    if request.param == "psycopg":
        engine = new_engine(migrated.url)

        async def run(body, **info):
            with Session(engine, info=info) as session, session.begin():
                return body(session)

        yield run
        engine.dispose()
        return
    engine = new_async_engine(migrated.async_url(request.param))

    async def run(body, **info):
        async with AsyncSession(engine, info=info) as session, session.begin():
            return await session.run_sync(body)

    yield run
    await engine.dispose()


@each_case("way", list(BY_SERVICE), before="restock")
async def test_what_a_service_makes_visible_notifies_a_waiting_consumer(run, waits, ear, way):
    waits("other", "mail")

    await run(lambda session: BY_SERVICE[way](QueueService(session, notify=True)))

    assert ear.heard() == ["mail"]


@each_case(
    ("put_back", "heard"),
    [
        (lambda service, item: service.release(item), ["mail"]),
        (lambda service, item: service.release(item, delay=60), []),
        (lambda service, item: service.fail(item, "error", delay=0), ["mail"]),
        (lambda service, item: service.fail(item, "error", delay=60), []),
        (lambda service, item: service.fail(item, "error"), []),  # after its backoff
    ],
    ids=["release", "release_later", "fail", "fail_later", "fail_with_backoff"],
    before="reset",
)
def test_what_is_put_back_notifies_if_it_can_be_seen_at_once(
    service, session, waits, ear, put_back, heard
):
    service.enqueue("mail", 1)
    (delivery,) = service.dequeue("mail")
    session.commit()
    waits("mail")
    put_back(QueueService(session, notify=True), delivery)
    session.commit()
    assert ear.heard() == heard


@each_case("way", list(BY_SERVICE), before="restock")
def test_a_session_that_notifies_makes_its_services_do_so(engine, stocked, waits, ear, way):
    waits("mail")
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        BY_SERVICE[way](QueueService(session))

    assert ear.heard() == ["mail"]


@each_case("way", list(BY_OBJECTS), before="restock")
async def test_messages_that_are_added_notify_in_the_flush(run, waits, ear, way):
    waits("mail")

    def add(session):
        session.add_all([Message(queue_name="mail", payload=1, **o) for o in BY_OBJECTS[way]])
        session.flush()
        assert ear.heard() == []

    await run(add, pgqrs_notify=True)

    assert ear.heard() == ["mail"]


@each_case("way", list(BY_SERVICE), before="restock")
def test_without_the_option_a_service_notifies_nobody(engine, stocked, waits, ear, way):
    waits("mail")
    with Session(engine) as session, session.begin():
        BY_SERVICE[way](QueueService(session))

    assert ear.heard() == []


async def test_without_the_option_messages_that_are_added_notify_nobody(run, waits, ear):
    waits("mail")

    await run(lambda session: session.add(Message(queue_name="mail", payload=1)))
    # A service that notifies says nothing of what the application adds by itself.
    await run(
        lambda session: (
            QueueService(session, notify=True),
            session.add(Message(queue_name="mail", payload=1)),
        )
    )

    assert ear.heard() == []


@each_case("way", list(LATER), before="restock")
async def test_what_is_not_visible_yet_notifies_nobody(run, waits, ear, way):
    waits("mail")

    await run(lambda session: LATER[way](QueueService(session, notify=True)))

    assert ear.heard() == []


async def test_added_messages_that_are_not_visible_yet_notify_nobody(run, waits, ear):
    waits("mail")
    later = [{"delay": 60}, {"at": datetime.now(UTC) + HOUR}, {"vt": sa.func.now() + HOUR}]

    await run(
        lambda session: session.add_all(
            [Message(queue_name="mail", payload=1, **options) for options in later]
        ),
        pgqrs_notify=True,
    )

    assert ear.heard() == []


def nobody(_waits, _engine):
    pass


def one_for_another_queue(waits, _engine):
    waits("other", "email", "mail2")


def one_that_waits_no_more(waits, engine):
    with Session(engine) as session, session.begin():
        wakeup.set_waiting(Scope(session, CONTEXT), waits("mail"), None)


def one_whose_wait_is_over(waits, _engine):
    waits("mail", span=timedelta(seconds=-1))


def one_that_is_suspended(waits, engine):
    with Session(engine) as session, session.begin():
        QueueService(session).workers.suspend(waits("mail"))


def one_that_has_stopped(waits, engine):
    with Session(engine) as session, session.begin():
        QueueService(session).workers.stop(waits("mail"))


@each_case(
    "there",
    [
        nobody,
        one_for_another_queue,
        one_that_waits_no_more,
        one_whose_wait_is_over,
        one_that_is_suspended,
        one_that_has_stopped,
    ],
    before="restock",
)
def test_nobody_is_notified_unless_somebody_waits(engine, stocked, waits, ear, there):
    there(waits, engine)
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        for way in ("enqueue", "enqueue_many", "enqueue_from", "requeue", "reschedule"):
            BY_SERVICE[way](QueueService(session))
        session.add(Message(queue_name="mail", payload=1))

    assert ear.heard() == []


async def test_the_awaited_service_notifies_as_well(async_service, async_session, waits, ear):
    waits("mail")
    service = AsyncQueueService(async_session, notify=True)

    await service.enqueue("mail", 1)
    await async_session.commit()
    assert ear.heard() == ["mail"]
    await service.enqueue_many("mail", [1, 2])
    await async_session.commit()
    assert ear.heard() == ["mail"]
    await service.enqueue_from("mail", sa.select(sa.literal(1)))
    await async_session.commit()
    assert ear.heard() == ["mail"]


def test_a_session_maker_can_say_it_for_all(engine, stocked, waits, ear):
    waits("mail")
    maker = sessionmaker(engine, info={"pgqrs_notify": True})

    with maker.begin() as session:
        session.add(Message(queue_name="mail", payload=1))
    assert ear.heard() == ["mail"]


def test_a_hundred_enqueues_of_a_transaction_are_one_notification_a_queue(
    engine, stocked, waits, ear
):
    waits("mail", "post")
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        service = QueueService(session)
        service.queues.create("post")
        for number in range(100):
            service.enqueue("mail", number)
        service.enqueue_many("mail", list(range(100)))
        for number in range(20):
            session.add(Message(queue_name="mail", payload=number))
            session.flush()
        service.enqueue_many("post", list(range(100)))

    assert ear.heard() == ["mail", "post"]


def test_a_rollback_takes_the_notification_back(engine, stocked, waits, ear):
    waits("mail")
    with Session(engine) as session:
        QueueService(session, notify=True).enqueue("mail", 1)
        session.rollback()

    assert ear.heard() == []


def enqueue(session):
    QueueService(session).enqueue("mail", 1)


def add(session):
    session.add(Message(queue_name="mail", payload=1))
    session.flush()


@each_case("put", [enqueue, add])
@each_case(
    ("steps", "heard"),
    [
        ("(put) ", ["mail"]),  # a savepoint that is released
        ("(put! ", []),  # one that is rolled back
        ("(put! put", ["mail"]),  # the second is not folded into the first, which is gone
        ("put (put!", ["mail"]),
        ("(put! (put)", ["mail"]),
        ("(put) (put!", ["mail"]),
        ("( (put) !", []),  # released into one that is rolled back
        ("( (put! put )", ["mail"]),
        ("( (put! (put! !", []),
    ],
    before="restock",
)
def test_savepoints_take_back_their_own_notifications_only(
    engine, stocked, waits, ear, put, steps, heard
):
    waits("mail")
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        open_ = []
        for step in steps.replace("(", " ( ").replace(")", " ) ").replace("!", " ! ").split():
            if step == "(":
                open_.append(session.begin_nested())
            elif step == ")":
                open_.pop().commit()
            elif step == "!":
                open_.pop().rollback()
            else:
                put(session)
        assert not open_

    assert ear.heard() == heard


def test_only_the_queues_that_somebody_waits_for_are_notified_of(engine, stocked, waits, ear):
    waits("post")
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        QueueService(session).queues.create("post")
        session.add_all([Message(queue_name=name, payload=1) for name in ("mail", "post")])

    assert ear.heard() == ["post"]


def test_a_requeue_into_several_queues_notifies_of_each(engine, stocked, waits, ear):
    waits("mail", "post")
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.queues.create("post")
        service.enqueue("post", 1)
        service.archive(service.dequeue("post")[0])
        ids = list(session.scalars(sa.select(ArchivedMessage.id)))
    with Session(engine) as session, session.begin():
        QueueService(session, notify=True).archived.requeue_many(ids)

    assert sorted(ear.heard()) == ["mail", "post"]


def test_a_receipt_and_a_count_are_the_same_with_notifications(engine, stocked, waits):
    waits("mail")
    with Session(engine) as session, session.begin():
        service = QueueService(session, notify=True)
        first = service.enqueue("mail", 1, key="a")
        again = service.enqueue("mail", 1, key="a")
        assert (again.id, again.duplicate) == (first.id, True)
        receipts = service.enqueue_many("mail", [1, Item(2, key="a"), 3, Item(4, key="b")])
        assert [receipt.duplicate for receipt in receipts] == [False, True, False, False]
        assert receipts[0].id < receipts[2].id
        three = sa.select(sa.func.generate_series(1, 3))
        assert service.enqueue_from("mail", three) == 3
        assert service.enqueue_from("mail", three.where(sa.false())) == 0
        with pytest.raises(LookupError, match="mail"):
            service.enqueue("mial", 1)
        with pytest.raises(LookupError, match="mail"):
            service.enqueue_from("mial", three)


def test_tables_that_were_moved_to_another_schema_have_their_own_channel(
    migrated, engine, waits, ear
):
    waits("mail")  # in the default schema: it is not the one that is asked
    moved = engine.execution_options(schema_translate_map={None: "jobs"})
    with moved.begin() as connection:
        connection.execute(sa.schema.CreateSchema("jobs"))
        metadata.create_all(connection)
    with Session(moved) as session, session.begin():
        service = QueueService(session)
        service.queues.create("mail")
        worker = service.workers.register("w", queues=["mail"])
        wakeup.set_waiting(Scope(session, CONTEXT), worker.id, timedelta(minutes=1))

    for info, put in (({}, QueueService), ({"pgqrs_notify": True}, None)):
        ear.listen_to("jobs")
        with Session(moved, info=info) as session, session.begin():
            if put:
                put(session, notify=True).enqueue("mail", 1)
            else:
                session.add(Message(queue_name="mail", payload=1))
        assert ear.heard() == ["mail"]
    ear.listen_to(None)
    with Session(moved) as session, session.begin():
        QueueService(session, notify=True).enqueue("mail", 1)
    assert ear.heard() == []


def test_the_name_of_a_channel_is_short_and_stays_the_same():
    assert channel(None) == channel("public") == "pgqrs_efa1f375d76194fa"
    assert channel("jobs") != channel("Jobs") != channel(None)
    assert len(channel("x" * 63)) <= 63


def test_without_the_option_the_statements_are_what_they_were():
    for keyed in (False, True):
        for builder in (statements.one, statements.many):
            plain = str(builder(tables_of(READY_MADE), keyed=keyed, notify=False))
            assert "notify" not in plain
            assert "pgqrs_workers" not in plain
            assert "notify" in str(builder(tables_of(READY_MADE), keyed=keyed, notify=True))


def test_without_the_option_a_flush_executes_nothing_more(engine, stocked):
    executed = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: executed.append(a[2]))
    with Session(engine) as session, session.begin():
        session.add(Message(queue_name="mail", payload=1))

    assert len(executed) == 2


def test_a_transaction_that_is_to_be_prepared_does_not_notify(engine, stocked, waits):
    # PostgreSQL prepares no transaction that has notified.
    waits("mail")
    with engine.connect() as connection:
        assert wakeup.channel_on(connection, Message.__table__)
        with connection.begin_twophase() as transaction:
            assert wakeup.channel_on(connection, Message.__table__) == {}
            with Session(connection, info={"pgqrs_notify": True}) as session:
                QueueService(session).enqueue("mail", 1)
                session.add(Message(queue_name="mail", payload=1))
                session.flush()
            transaction.rollback()


def test_a_host_without_a_class_of_workers_is_told_what_it_needs(engine, stocked):
    class Base(DeclarativeBase):
        pass

    class Queue(QueueMixin, Base):
        pass

    class OwnMessage(MessageMixin, Base):
        pass

    with Session(engine, info={"pgqrs_notify": True}) as session:
        session.add(OwnMessage(queue_name="mail", payload=1))
        with pytest.raises(InvalidArgument, match="table pgqrs_workers is missing next to"):
            session.flush()


@pytest.fixture
def role(migrated, engine):
    """Return a function that makes a role of a kind, and an engine that works as it."""
    made = []

    @cache
    def make(kind):
        name = f"pgqrs_wakeup_{kind}"
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
            connection.exec_driver_sql(f"CREATE ROLE {name}")
            for statement in grants(kind, name):
                connection.exec_driver_sql(statement)
        used = sa.create_engine(migrated.url, connect_args={"options": f"-c role={name}"})
        made.append((name, used))
        return used

    yield make
    for name, used in made:
        used.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
            connection.exec_driver_sql(f"DROP ROLE {name}")


@each_case("way", [w for w in BY_SERVICE if w not in ("requeue", "reschedule")], before="restock")
def test_a_producer_notifies_with_the_rights_of_one(role, stocked, waits, ear, way):
    waits("mail")
    with Session(role("producer")) as session, session.begin():
        BY_SERVICE[way](QueueService(session, notify=True))

    assert ear.heard() == ["mail"]


def test_what_a_producer_adds_notifies_with_the_rights_of_one(role, stocked, waits, ear):
    waits("mail")
    with Session(role("producer"), info={"pgqrs_notify": True}) as session, session.begin():
        session.add(Message(queue_name="mail", payload=1))

    assert ear.heard() == ["mail"]


def test_a_consumer_says_that_it_waits_with_the_rights_of_one(role, stocked, ear, engine):
    with Session(role("consumer")) as session, session.begin():
        worker = QueueService(session).workers.register("w", queues=["mail"])
        wakeup.set_waiting(Scope(session, CONTEXT), worker.id, timedelta(minutes=1))
    with Session(engine) as session, session.begin():
        QueueService(session, notify=True).enqueue("mail", 1)

    assert ear.heard() == ["mail"]


def test_an_operator_notifies_by_what_it_makes_visible(role, stocked, waits, ear):
    waits("mail")
    operator = role("operator")
    for way in ("requeue", "reschedule"):
        with Session(operator) as session, session.begin():
            BY_SERVICE[way](QueueService(session, notify=True))
        assert ear.heard() == ["mail"]

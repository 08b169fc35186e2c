"""What a host does with messages as objects: relationships, other listeners, later changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    foreign,
    mapped_column,
    registry,
    relationship,
)

from pgqrs_sa import (
    ArchivedMessageMixin,
    InvalidArgument,
    Item,
    Message,
    MessageMixin,
    Models,
    NonAtomicEnqueue,
    Queue,
    QueueMixin,
    QueueService,
    WorkerMixin,
)
from pgqrs_sa._core.orm_events import ALLOW_AUTOCOMMIT
from pgqrs_sa.errors import DelayError, PgqrsError


def own_models(schema: str) -> Models:
    """A host's own classes, of which a message knows its queue as an object."""

    class Base(DeclarativeBase):
        registry = registry()
        __pgqrs_schema__ = schema

    class Queue(QueueMixin, Base): ...

    class Archived(ArchivedMessageMixin, Base): ...

    class Worker(WorkerMixin, Base): ...

    class Own(MessageMixin, Base):
        note: Mapped[str | None] = mapped_column()
        queue = relationship(
            Queue, primaryjoin=lambda: foreign(Own.queue_id) == Queue.id, backref="messages"
        )

    return Models(Queue, Own, Archived, Worker)


@pytest.fixture
def models(engine: sa.Engine) -> Models:
    models = own_models("objects")
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("objects"))
        models.queue.metadata.create_all(connection)
    return models


def test_a_message_may_be_given_its_queue_by_a_relationship(session, models):
    service = QueueService(session, models=models)
    service.queues.create("mail")
    queue = session.scalars(sa.select(models.queue)).one()
    queue.messages.append(models.message(payload=1, note="kept"))
    session.commit()

    (delivery,) = service.dequeue("mail")
    assert delivery.payload == 1
    service.archive(delivery)


def test_the_four_classes_must_belong_together(models):
    with pytest.raises(InvalidArgument, match="share one MetaData and one schema"):
        Models(message=models.message)


def test_a_time_may_be_changed_after_the_flush(service, session):
    message = Message(queue_name="mail", payload=1, delay=60)
    session.add(message)
    session.flush()
    message.at = datetime(2030, 1, 1, tzinfo=UTC)
    session.flush()
    assert message.vt == datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(InvalidArgument, match="set queue_id"):
        message.queue_name = "other"


def test_two_times_contradict_each_other(service):
    with pytest.raises(DelayError, match="contradict"):
        Message(queue_name="mail", payload=1, delay=60, at=datetime(2030, 1, 1, tzinfo=UTC))


def test_a_message_of_another_listener_is_checked_as_its_row_is_inserted(engine, service, session):
    session.rollback()

    class Emitting(Session):
        pass

    @event.listens_for(Emitting, "before_flush")
    def emit(inner: Session, _context: object, _instances: object) -> None:
        if not any(
            isinstance(entry, Message) and entry.payload == "emitted" for entry in inner.new
        ):
            inner.add(Message(queue_name="mail", payload="emitted"))

    with Emitting(engine) as inner:
        inner.add(Message(queue_name="mail", payload="added"))
        inner.commit()
    assert {message.payload for message in service.messages.find("mail")} == {"added", "emitted"}
    plain = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Emitting(plain) as inner:
        inner.add(Message(queue_name="mail", payload="added"))
        with pytest.raises(NonAtomicEnqueue, match=r"session\.info"):
            inner.flush()
    with Session(plain, info={ALLOW_AUTOCOMMIT: True}) as inner:
        inner.add(Message(queue_name="mail", payload="allowed"))
        inner.flush()
    assert service.messages.count("mail") == 3


def test_a_change_of_the_hosts_that_is_not_flushed_yet_stays(service, session):
    service.enqueue("mail", 1)
    message = session.scalars(sa.select(Message)).one()
    with session.no_autoflush:
        message.last_error = "mine"
        service.dequeue("mail")
        assert (message.last_error, message.read_ct) == ("mine", 1)


def test_a_query_with_times_of_no_zone_or_one_that_writes_is_refused(service):
    naive = sa.select(
        sa.literal(1).label("payload"),
        sa.literal(datetime(2030, 1, 1), sa.DateTime).label("at"),  # noqa: DTZ001
    )
    with pytest.raises(DelayError, match="has no time zone"):
        service.enqueue_from("mail", naive)
    writing = sa.insert(Message).values(queue_id=1, payload=1).returning(Message.id).cte()
    with pytest.raises(InvalidArgument, match="the query writes"):
        service.enqueue_from("mail", sa.select(writing.c.id))


def test_rows_that_vanish_do_not_make_an_enqueue_spin_for_ever(service, session):
    session.execute(
        sa.text(
            "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        )
    )
    session.execute(
        sa.text(
            "CREATE TRIGGER drop_it BEFORE INSERT ON pgqrs_messages"
            " FOR EACH ROW EXECUTE FUNCTION drop_it()"
        )
    )
    for call in (
        lambda: service.enqueue("mail", 1),
        lambda: service.enqueue("mail", 1, key="k"),
        lambda: service.enqueue_many("mail", [1]),
        lambda: service.enqueue_many("mail", range(1000)),
    ):
        with pytest.raises(Exception, match="look for a trigger"):
            call()
    session.rollback()


@pytest.mark.parametrize(
    "items",
    [[1, 2, 3], [Item(1), 2, Item(3, priority=1)], range(1000)],
    ids=["plain", "items", "large"],
)
def test_a_batch_of_which_a_row_vanishes_is_no_receipt_too_few(service, session, items):
    session.execute(
        sa.text(
            "CREATE FUNCTION drop_two() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN CASE WHEN NEW.payload = ''2'' THEN NULL ELSE NEW END; END'"
        )
    )
    session.execute(
        sa.text(
            "CREATE TRIGGER drop_two BEFORE INSERT ON pgqrs_messages"
            " FOR EACH ROW EXECUTE FUNCTION drop_two()"
        )
    )
    count = len(items)
    with pytest.raises(PgqrsError, match=f"took {count - 1} of {count} messages"):
        service.enqueue_many("mail", items)
    session.rollback()


def test_a_dequeue_that_finds_nothing_frees_the_key_of_what_is_exhausted(service, session):
    service.enqueue("mail", 1, key="daily", max_read_ct=1)
    service.dequeue("mail", lease=timedelta(seconds=60))
    session.execute(sa.update(Message).values(leased_until=sa.func.now() - timedelta(minutes=1)))
    assert service.enqueue("mail", 2, key="daily").duplicate
    assert service.dequeue("mail") == []
    assert not service.enqueue("mail", 2, key="daily").duplicate
    assert service.messages.metrics("mail").dead == 1


def test_a_bind_parameter_with_a_name_of_ours_is_refused(service):
    service.enqueue_many("mail", [Item(n, priority=n) for n in range(5)])
    with pytest.raises(InvalidArgument, match=r"bindparam\('limit'\)"):
        service.dequeue("mail", where=Message.priority > sa.bindparam("limit", 3))
    with pytest.raises(InvalidArgument, match=r"bindparam\('queue'\)"):
        service.enqueue_from("mail", sa.select(sa.bindparam("queue", "host").label("payload")))
    (delivery,) = service.dequeue("mail", where=Message.priority > sa.bindparam("least", 3))
    assert delivery.payload == 4


@pytest.fixture
def two_queues(service, session):
    """A service with three messages in each of two queues."""
    for name in ("mail", "reports"):
        service.queues.create(name)
        service.enqueue_many(name, [f"{name} {n}" for n in range(3)])
    session.flush()
    return service


def test_the_name_of_a_messages_queue_is_read_in_sql(two_queues, session):
    wanted = Message.queue_name == "mail"
    mail = {"mail 0", "mail 1", "mail 2"}
    assert {row.payload for row in session.scalars(sa.select(Message).where(wanted))} == mail
    by_name = session.scalars(sa.select(Message).filter_by(queue_name="mail"))
    assert {row.payload for row in by_name} == mail
    assert session.scalar(sa.select(sa.func.count()).where(wanted)) == 3
    assert set(session.scalars(sa.select(Message.queue_name))) == {"mail", "reports"}
    grouped = sa.select(Message.queue_name, sa.func.count()).group_by(Message.queue_name)
    assert [tuple(row) for row in session.execute(grouped.order_by(Message.queue_name))] == [
        ("mail", 3),
        ("reports", 3),
    ]
    ordered = sa.select(Message.queue_name).order_by(Message.queue_name.desc()).limit(1)
    assert session.scalar(ordered) == "reports"
    joined = sa.select(Queue).join(Message, Queue.id == Message.queue_id).where(wanted).distinct()
    assert [row.queue_name for row in session.scalars(joined)] == ["mail"]


def test_criteria_may_name_the_queue(two_queues):
    found = two_queues.messages.find(where=Message.queue_name == "mail")
    assert {row.queue for row in found} == {"mail"}
    assert two_queues.messages.count(where=Message.queue_name != "mail") == 3
    assert two_queues.messages.cancel_where("mail", Message.queue_name != "mail") == 0
    assert len(two_queues.dequeue("mail", 9, where=Message.queue_name.in_(["mail"]))) == 3


def test_a_delete_by_the_name_of_the_queue_leaves_the_other_queues_alone(two_queues, session):
    loaded = session.scalars(sa.select(Message)).all()
    result = session.execute(sa.delete(Message).where(Message.queue_name != "mail"))
    assert result.rowcount == 3
    assert {row.payload for row in session.scalars(sa.select(Message))} == {
        row.payload for row in loaded if row in session
    }
    assert two_queues.messages.count("mail") == 3


def test_an_alias_has_its_own_queues_name(two_queues, session):
    other = aliased(Message)
    pairs = sa.select(sa.func.count()).where(
        Message.queue_name == "mail", other.queue_name == "reports", other.id > Message.id
    )
    assert session.scalar(pairs) == 9
    assert set(session.scalars(sa.select(other.queue_name))) == {"mail", "reports"}


def test_the_name_of_the_queue_is_read_of_the_hosts_own_tables(session, models):
    service = QueueService(session, models=models)
    for name in ("mail", "reports"):
        service.queues.create(name)
        service.enqueue(name, name)
    own = models.message
    assert session.scalars(sa.select(own.payload).where(own.queue_name == "mail")).all() == ["mail"]
    statement = str(sa.select(own).where(own.queue_name == "mail"))
    assert "objects.pgqrs_queues" in statement


@pytest.mark.parametrize(
    "write",
    [
        lambda: sa.update(Message).values(queue_name="reports"),
        lambda: sa.update(Message).values({Message.queue_name: "reports"}),
        lambda: sa.update(Message).values(delay=5),
        lambda: sa.update(Message).values({Message.at: datetime.now(UTC)}),
    ],
)
def test_an_update_cannot_set_what_is_no_column(service, session, write):
    with pytest.raises(InvalidArgument, match=r"(set queue_id|use vt)$"):
        session.execute(write())


@pytest.mark.parametrize("name", ["delay", "at"])
def test_what_only_sets_a_time_is_refused_in_sql(name):
    attribute = getattr(Message, name)
    for use in (
        lambda: attribute == 5,
        lambda: attribute < 5,
        lambda: sa.select(attribute),
        lambda: sa.select(Message).order_by(attribute),
        lambda: sa.select(Message).filter_by(**{name: 5}),
        lambda: getattr(aliased(Message), name) == 5,
    ):
        with pytest.raises(InvalidArgument, match=rf"{name} only sets vt"):
            use()


def test_a_bulk_insert_refuses_what_is_no_column(session, service, subtests):
    """SQLAlchemy would leave it out: the message would be visible at once."""
    if sa.__version__ < "2.1":
        pytest.skip("SQLAlchemy 2.0 does not show us the keys of a bulk INSERT: documented")
    row = {"queue_id": service.queues.get("mail").id, "payload": {}}
    for name, value in {"delay": 60, "at": datetime.now(UTC), "queue_name": "mail"}.items():
        with (
            subtests.test(name=name),
            pytest.raises(InvalidArgument, match=f"bulk operations do not know {name}"),
        ):
            session.execute(sa.insert(Message), [row | {name: value}])
        with subtests.test(name=name, value=None):
            session.execute(sa.insert(Message), [row | {name: None}])

"""Handlers called in the transaction of a test, as the consumer would call them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    Consumer,
    DeadLetter,
    Delivery,
    Discard,
    Hooks,
    InvalidArgument,
    InvalidResult,
    LeaseLost,
    Message,
    PayloadError,
    QueueNotFound,
    QueueService,
    Retry,
    RetryIn,
    Snooze,
    TransactionRefused,
)
from pgqrs_sa.testing import Drained, advance, all_enqueued, assert_enqueued, drain, refute_enqueued


@dataclass
class Mail:
    to: str


class Broken(Exception):
    """What a handler of these tests fails with."""


def nothing(payload: object) -> None:
    """A handler."""


@pytest.fixture
def consumer(host_engine) -> Consumer:
    return Consumer(sessionmaker(host_engine), retry=Retry(base=60, jitter=0))


def outcomes(service: QueueService) -> dict[str, int]:
    books = service.messages.metrics("mail")
    names = ("ready", "scheduled", "leased", "archived", "dead", "discarded")
    return {name: count for name in names if (count := getattr(books, name))}


def test_a_handler_gets_the_session_of_the_test_and_its_commit_is_the_acknowledgement(
    session, service, consumer, order
):
    given = []

    @consumer.on("mail")
    def handle(session: Session, mail: Mail, delivery: Delivery, queue: QueueService) -> None:
        given.append((session, mail, delivery.read_ct))
        session.add(order(id=7, customer=mail.to, total_cents=1))
        queue.enqueue("receipts", {"order": 7})

    service.enqueue("mail", {"to": "ada"})

    assert drain(session, consumer) == Drained(archived=1)
    assert given == [(session, Mail("ada"), 1)]
    assert session.get_one(order, 7).customer == "ada"
    assert outcomes(service) == {"archived": 1}
    assert_enqueued(session, "receipts", payload={"order": 7})


def test_a_message_that_was_only_added_is_worked_on(session, consumer):
    consumer.on("mail")(nothing)
    session.add(Message(queue_name="mail", payload=1))

    assert drain(session, consumer).archived == 1


def test_messages_that_handlers_enqueue_are_worked_on_as_well(session, service, consumer):
    @consumer.on("receipts")
    def last(payload: int) -> None:
        pass

    @consumer.on("mail")
    def first(service: QueueService, payload: int) -> None:
        service.enqueue("receipts", payload)
        if payload:
            service.enqueue("mail", payload - 1)

    service.enqueue("mail", 2)

    assert drain(session, consumer) == Drained(archived=6)
    assert all_enqueued(session) == []


def test_a_handler_that_raises_loses_its_own_writes_only(session, service, consumer, order):
    @consumer.on("mail")
    def handle(session: Session, payload: int) -> None:
        session.add(order(id=payload, customer="x", total_cents=1))
        session.flush()
        if payload == 2:
            raise Broken("no")

    service.enqueue_many("mail", [1, 2, 3])
    drained = drain(session, consumer, raise_errors=False)

    assert (drained.archived, drained.retried) == (2, 1)
    ((delivery, error),) = drained.errors
    assert (delivery.payload, type(error)) == (2, Broken)
    assert session.scalars(sa.select(order.id).order_by(order.id)).all() == [1, 3]
    (again,) = assert_enqueued(session, "mail", payload=2, delay=60)
    assert again.read_ct == 1
    assert again.last_error.startswith(f"{Broken.__module__}.Broken: no")


def test_the_first_error_is_raised_once_its_message_is_settled(session, service, consumer, order):
    @consumer.on("mail")
    def handle(session: Session) -> None:
        session.add(order(id=1, customer="x", total_cents=1))
        session.flush()
        raise Broken("no")

    service.enqueue_many("mail", [1, 2])

    with pytest.raises(Broken, match="no"):
        drain(session, consumer)
    assert session.scalars(sa.select(order.id)).all() == []
    assert outcomes(service) == {"ready": 1, "scheduled": 1}


def test_the_writes_that_fail_only_when_they_are_flushed_fail_the_attempt(
    session, service, consumer, order
):
    @consumer.on("mail")
    def handle(session: Session) -> None:
        session.add(order(id=7, customer="x", total_cents=1))

    session.add(order(id=7, customer="y", total_cents=1))
    service.enqueue("mail", 1)
    session.flush()
    session.expunge_all()

    drained = drain(session, consumer, raise_errors=False)

    assert drained.retried == 1
    assert isinstance(drained.errors[0][1], sa.exc.IntegrityError)
    assert session.get_one(order, 7).customer == "y"


def test_decisions_are_carried_out_and_are_no_errors(session, service, consumer):
    decisions = {
        "retry": RetryIn(90),
        "snooze": Snooze(80),
        "discard": Discard("old"),
        "dead": DeadLetter("no such user"),
    }

    @consumer.on("mail")
    def handle(delivery: Delivery, payload: dict) -> RetryIn | None:
        decision = decisions[payload["what"]]
        if payload["raised"]:
            raise decision
        return decision

    service.enqueue_many(
        "mail", [{"what": what, "raised": raised} for what in decisions for raised in (True, False)]
    )

    assert drain(session, consumer) == Drained(retried=2, snoozed=2, discarded=2, dead=2)
    (retried, _) = assert_enqueued(session, "mail", delay=90, count=2)
    (snoozed, _) = assert_enqueued(session, "mail", delay=80, count=2)
    # A snooze costs no attempt.
    assert (retried.read_ct, retried.max_read_ct) == (1, 3)
    assert (snoozed.read_ct, snoozed.max_read_ct) == (1, 4)
    assert {message.reason for message in service.archived.find("mail", outcome="dead")} == {
        "no such user"
    }


def test_an_error_that_the_policy_expects_is_settled_as_it_says(session, service, host_engine):
    consumer = Consumer(sessionmaker(host_engine), retry=Retry(on={Broken: Discard("known")}))

    @consumer.on("mail")
    def handle() -> None:
        raise Broken

    service.enqueue("mail", 1)

    assert drain(session, consumer, raise_errors=False).discarded == 1


def test_scheduled_messages_are_left_alone_unless_asked_for(session, service, consumer):
    consumer.on("mail")(nothing)
    service.enqueue("mail", 1, delay=timedelta(days=3))

    assert drain(session, consumer) == Drained()
    assert drain(session, consumer, scheduled=True) == Drained(archived=1)


def test_scheduled_messages_come_in_the_order_of_their_times_and_others_keep_theirs(
    session, service, consumer
):
    seen = []

    @consumer.on("mail")
    def handle(service: QueueService, payload: str) -> None:
        seen.append(payload)
        if payload == "first":
            service.enqueue("mail", "between", delay=100)

    service.enqueue("mail", "last", delay=500)
    service.enqueue("mail", "first", delay=300)
    service.enqueue("receipts", "other", delay=3600)
    drain(session, consumer, scheduled=True)

    assert seen == ["first", "between", "last"]
    assert_enqueued(session, "receipts", delay=3600)


def test_a_message_that_always_fails_becomes_a_dead_letter_after_its_attempts(
    session, service, consumer
):
    @consumer.on("mail")
    def handle(delivery: Delivery) -> None:
        raise Broken(f"attempt {delivery.read_ct}")

    service.enqueue("mail", 1)
    drained = drain(session, consumer, scheduled=True, raise_errors=False)

    assert (drained.retried, drained.dead) == (2, 1)
    assert [str(error) for _, error in drained.errors] == [f"attempt {n}" for n in (1, 2, 3)]
    (dead,) = service.archived.find("mail", outcome="dead")
    assert dead.reason == "attempt 3 of 3 failed"
    refute_enqueued(session, "mail")


def test_the_limit_of_the_handler_counts(session, service, consumer):
    @consumer.on("mail", retry=Retry(max_attempts=2, base=0))
    def handle() -> None:
        raise Broken

    service.enqueue("mail", 1)

    drained = drain(session, consumer, raise_errors=False)
    assert (drained.retried, drained.dead) == (1, 1)


def test_what_was_out_of_attempts_already_is_buried(session, service, consumer):
    consumer.on("mail")(nothing)
    service.enqueue("mail", 1, max_read_ct=1)
    service.dequeue("mail", lease=60)

    assert drain(session, consumer) == Drained()
    advance(session, 61)
    assert drain(session, consumer) == Drained(dead=1)


def test_a_payload_that_does_not_fit_fails_the_attempt(session, service, consumer):
    @consumer.on("mail")
    def handle(mail: Mail) -> None:
        raise AssertionError("never called")

    service.enqueue("mail", {"from": "ada"})

    with pytest.raises(PayloadError, match="Mail"):
        drain(session, consumer)
    assert_enqueued(session, "mail", delay=60)


def test_a_message_that_the_handler_settled_itself_loses_everything(
    session, service, consumer, order
):
    @consumer.on("mail")
    def handle(session: Session, delivery: Delivery) -> None:
        session.add(order(id=1, customer="x", total_cents=1))
        QueueService(session).delete(delivery)

    service.enqueue("mail", 1)

    with pytest.raises(LeaseLost):
        drain(session, consumer)
    # As in the consumer: its writes are gone, and the attempt is charged, or it would be tried so
    # for ever.
    assert session.scalars(sa.select(order.id)).all() == []
    (back,) = assert_enqueued(session, "mail", delay=60)
    assert (back.read_ct, back.max_read_ct) == (1, 3)


def test_a_message_that_is_taken_in_between_is_not_settled(session, service, consumer):
    lost = []

    class Ears(Hooks):
        def on_lease_lost(self, event) -> None:
            lost.append(event.delivery.id)

    consumer = Consumer(consumer._sessionmaker, hooks=[Ears()])

    @consumer.on("mail")
    def handle(payload: int) -> None:  # no session of its own, so nothing of this is undone
        advance(session, 60)
        assert service.dequeue("mail")

    receipt = service.enqueue("mail", 1)

    assert drain(session, consumer) == Drained()
    assert lost == [receipt.id]
    assert outcomes(service) == {"leased": 1}


def test_a_batch_is_settled_one_by_one(session, service, consumer):
    sizes = []

    @consumer.on("mail", batch=3)
    def handle(session: Session, deliveries: list[Delivery], payloads: list[int]) -> dict:
        sizes.append(len(deliveries))
        return {delivery: Broken("even") for delivery in deliveries if delivery.payload % 2 == 0}

    service.enqueue_many("mail", [1, 2, 3, 4])
    drained = drain(session, consumer, raise_errors=False)

    assert sizes == [3, 1]
    assert (drained.archived, drained.retried) == (2, 2)
    assert [delivery.payload for delivery, _ in drained.errors] == [2, 4]


def test_a_message_that_is_acknowledged_first_is_not_tried_again(session, service, consumer):
    @consumer.on("mail", acknowledge="first")
    def handle(session: Session, delivery: Delivery) -> None:
        assert QueueService(session).archived.count("mail") == 1
        raise Broken

    service.enqueue("mail", 1)
    drained = drain(session, consumer, raise_errors=False)

    assert (drained.archived, len(drained.errors)) == (1, 1)
    assert outcomes(service) == {"archived": 1}


def test_a_handler_may_acknowledge_by_itself(session, service, consumer):
    @consumer.on("mail", acknowledge="manual")
    def handle(service: QueueService, delivery: Delivery) -> None:
        if delivery.payload == "now":
            service.archive(delivery)

    service.enqueue_many("mail", ["now", "later"])

    assert drain(session, consumer) == Drained(kept=2)
    assert outcomes(service) == {"archived": 1, "leased": 1}


def test_only_the_queues_that_are_named_are_worked_on(session, service, consumer):
    for queue in ("mail", "receipts"):
        consumer.on(queue)(nothing)
        service.enqueue(queue, 1)

    assert drain(session, consumer, queues=["receipts"]).archived == 1
    assert_enqueued(session, "mail")
    with pytest.raises(InvalidArgument, match="no handler is for the queue 'mial'"):
        drain(session, consumer, queues=["mial"])
    with pytest.raises(InvalidArgument, match="must be a list of names"):
        drain(session, consumer, queues="mail")


def test_a_paused_queue_is_left_alone(session, service, consumer):
    consumer.on("mail")(nothing)
    service.enqueue_many("mail", [1])
    service.enqueue("mail", 2, delay=60)
    service.queues.pause("mail")

    assert drain(session, consumer, scheduled=True) == Drained()
    assert_enqueued(session, "mail", payload=2, delay=60)


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_endless_loop_ends(session, service, consumer, scheduled):
    @consumer.on("mail")
    def handle(service: QueueService, payload: int) -> None:
        service.enqueue("mail", payload + 1, delay=9 if scheduled else 0)

    service.enqueue("mail", 0)

    with pytest.raises(AssertionError, match="has worked on 20 messages, and there are more"):
        drain(session, consumer, scheduled=scheduled, max_messages=20)


def test_the_hooks_of_the_consumer_hear_of_it(session, service, host_engine):
    heard = []

    class Ears(Hooks):
        def on_start(self, event) -> None:
            heard.append(("start", event.delivery.payload))

        def on_success(self, event) -> None:
            heard.append(("success", event.delivery.payload))

        def on_dead(self, event) -> None:
            heard.append(("dead", event.reason))

    consumer = Consumer(sessionmaker(host_engine), hooks=[Ears()])

    @consumer.on("mail")
    def handle(payload: int) -> None:
        if payload == 2:
            raise DeadLetter("why")

    service.enqueue_many("mail", [1, 2])
    drain(session, consumer)

    assert heard == [("start", 1), ("success", 1), ("start", 2), ("dead", "why")]


def test_what_ends_a_test_is_not_an_error_of_the_message(session, service, consumer):
    @consumer.on("mail")
    def handle(session: Session, payload: int) -> None:
        pytest.fail("in the handler")

    service.enqueue("mail", 1)

    with pytest.raises(pytest.fail.Exception, match="in the handler"):
        drain(session, consumer, raise_errors=False)


def test_objects_that_the_test_has_loaded_follow(session, service, consumer, order):
    @consumer.on("mail")
    def handle(session: Session, payload: int) -> None:
        session.get_one(order, payload).receipts_sent += 1

    bought = order(id=7, customer="ada", total_cents=1)
    message = Message(queue_name="mail", payload=7)
    session.add_all([bought, message])
    session.flush()
    drain(session, consumer)

    assert bought.receipts_sent == 1
    assert sa.inspect(message).expired


def test_the_object_of_a_message_that_was_put_back_is_up_to_date(session, service, consumer):
    @consumer.on("mail")
    def handle(payload: int) -> None:
        raise Broken("no")

    message = Message(queue_name="mail", payload=7)
    session.add(message)
    drain(session, consumer, raise_errors=False)

    assert message.last_error.startswith(f"{Broken.__module__}.Broken: no")
    assert message.dequeued_at is None


def test_what_is_kept_of_an_error_begins_with_the_handler(session, service, consumer):
    @consumer.on("mail")
    def handle(session: Session) -> None:
        raise Broken("no")

    service.enqueue("mail", 1)
    drained = drain(session, consumer, raise_errors=False)

    (again,) = assert_enqueued(session, "mail")
    first, second, third, *_ = again.last_error.splitlines()
    assert first == f"{Broken.__module__}.Broken: no"
    assert second.endswith("in handle")
    assert third.strip() == 'raise Broken("no")'
    assert drained.errors[0][1].__traceback__.tb_frame.f_code.co_name == "handle"


def test_a_scoped_session_gives_the_session_that_is_current(connection, consumer):
    scoped = scoped_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))
    given = []

    @consumer.on("mail")
    def handle(session: Session, payload: int) -> None:
        given.append(session)

    QueueService(scoped()).enqueue("mail", 1)

    assert drain(scoped, consumer).archived == 1
    assert given == [scoped()]
    scoped.remove()


def test_the_commit_of_the_application_before_it_changes_nothing(session, service, consumer):
    consumer.on("mail")(nothing)
    service.enqueue("mail", 1)
    session.commit()  # the release of a savepoint: the test's transaction is around it

    assert drain(session, consumer).archived == 1
    session.commit()


def test_a_consumer_without_handlers_or_with_an_unknown_queue_is_refused(session, consumer):
    with pytest.raises(InvalidArgument, match="no handler"):
        drain(session, consumer)
    consumer.on("mial")(nothing)
    with pytest.raises(QueueNotFound, match="did you mean 'mail'"):
        drain(session, consumer)


def test_the_consumer_and_the_session_are_of_one_kind(session):
    consumer = AsyncConsumer(async_sessionmaker())

    @consumer.on("mail")
    async def handle(payload: int) -> None: ...

    with pytest.raises(InvalidArgument, match="handle is a handler with async def, which needs"):
        drain(session, consumer)
    with pytest.raises(InvalidArgument, match="a Consumer or an AsyncConsumer is needed"):
        drain(session, handle)


# ---------------------------------------------------------------------------------- advance


def test_time_passes_for_messages_and_for_nothing_else(session, service):
    receipt = service.enqueue("mail", 1, delay=3600)
    service.enqueue("receipts", 1, delay=3600)
    before = service.messages.get(receipt.id)

    assert advance(session, timedelta(minutes=59), "mail") == 1

    after = service.messages.get(receipt.id)
    assert after.vt == before.vt - timedelta(minutes=59)
    assert after.enqueued_at == before.enqueued_at
    assert_enqueued(session, "receipts", delay=3600)
    assert advance(session, 60) == 2
    assert service.dequeue("mail")
    assert not service.dequeue("receipts")


def test_the_end_of_a_lease_comes_nearer_as_time_passes(session, service):
    for number in range(2):
        service.enqueue("mail", number)
    (held,) = service.dequeue("mail", lease=60)
    free = held.id + 1

    advance(session, 45)

    after = service.messages.get(held.id)
    assert (after.state, after.vt) == ("leased", held.vt - timedelta(seconds=45))
    assert after.leased_until == held.leased_until - timedelta(seconds=45)
    assert after.dequeued_at == held.leased_until - timedelta(seconds=60)
    assert service.messages.get(free).leased_until is None
    advance(session, 15)
    assert service.messages.get(held.id).state == "ready"
    assert service.messages.get(held.id).vt == held.vt - timedelta(seconds=60)


def test_leases_run_out_as_time_passes(session, service):
    service.enqueue("mail", 1)
    (first,) = service.dequeue("mail", lease=60)
    advance(session, 61)
    (second,) = service.dequeue("mail", lease=60)

    assert (first.read_ct, second.read_ct) == (1, 2)
    with pytest.raises(LeaseLost):
        service.archive(first)
    service.archive(second)


def test_what_comes_first_after_time_has_passed_is_leased_first(session, service):
    for number in range(4):
        service.enqueue("mail", number, delay=number)
    service.enqueue("mail", "scheduled", delay=20)
    advance(session, 10)
    assert [delivery.payload for delivery in service.dequeue("mail")] == [0]
    session.commit()
    advance(session, 15)

    assert [delivery.payload for delivery in service.dequeue("mail", 9)] == [1, 2, 3, "scheduled"]


def test_advancing_takes_pending_and_loaded_objects_along(session):
    message = Message(queue_name="mail", payload=1, delay=60)
    session.add(message)

    assert advance(session, 30) == 1
    before = message.vt
    advance(session, 30)
    assert message.vt == before - timedelta(seconds=30)


def test_advancing_stops_where_a_time_would_be_refused(session, service):
    service.enqueue("mail", 1)

    assert advance(session, timedelta(days=365 * 100)) == 1
    assert_enqueued(session, "mail", delay=0)


def test_the_past_cannot_be_brought_back(session):
    with pytest.raises(InvalidArgument, match="by must be 0 or more"):
        advance(session, -1)
    with pytest.raises(QueueNotFound, match="did you mean 'mail'"):
        advance(session, 1, "mial")


def test_a_result_that_has_not_run_is_a_failed_attempt(session, service, consumer, order):
    async def send(payload: int) -> None:
        raise AssertionError

    @consumer.on("mail")
    def handle(session: Session, payload: int) -> object:
        session.add(order(id=payload, customer="x", total_cents=1))
        return send(payload)

    service.enqueue("mail", 7)
    drained = drain(session, consumer, raise_errors=False)

    assert (drained.archived, drained.retried) == (0, 1)
    assert isinstance(drained.errors[0][1], InvalidResult)
    assert session.get(order, 7) is None


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_a_handler_does_not_end_the_transaction_of_the_test(
    session, service, consumer, order, method
):
    @consumer.on("mail")
    def handle(session: Session, payload: int) -> None:
        session.add(order(id=payload, customer="x", total_cents=1))
        getattr(session, method)()

    service.enqueue("mail", 7)
    drained = drain(session, consumer, raise_errors=False)

    assert (drained.archived, drained.retried) == (0, 1)
    assert isinstance(drained.errors[0][1], TransactionRefused)
    assert session.get(order, 7) is None
    session.commit()  # is the test's own again

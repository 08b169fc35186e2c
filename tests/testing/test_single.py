"""One handler, called with a message that is in no queue."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.orm import Session

from pgqrs_sa import (
    AsyncQueueService,
    Consumer,
    DeadLetter,
    Decision,
    Delivery,
    Discard,
    InvalidArgument,
    InvalidResult,
    PayloadError,
    QueueService,
    Retry,
    RetryIn,
    Snooze,
)
from pgqrs_sa.testing import work_one
from support.cases import each_case


@dataclass
class Mail:
    to: str


class Order(BaseModel):
    id: int


@pytest.fixture
def consumer() -> Consumer:
    return Consumer(lambda: None, retry=Retry(max_attempts=9))


def test_a_handler_without_a_session_needs_no_database():
    seen = []

    def handle(mail: Mail, delivery: Delivery) -> None:
        seen.append((mail, delivery.read_ct, delivery.headers, delivery.queue, delivery.payload))

    assert work_one(handle, {"to": "ada"}, headers={"trace": "t"}, attempt=3) is None
    assert seen == [(Mail("ada"), 3, {"trace": "t"}, "test", {"to": "ada"})]


def test_the_payload_goes_through_the_codec_and_to_its_annotation():
    seen = []

    def handle(order: Order) -> None:
        seen.append(order)

    work_one(handle, {"id": "7"})
    assert seen == [Order(id=7)]
    with pytest.raises(PayloadError, match="does not fit"):
        work_one(handle, {"id": "seven"})
    with pytest.raises(PayloadError, match=r"payload\.id is nan"):
        work_one(handle, {"id": float("nan")})


def test_tuples_arrive_as_lists():
    def handle(payload: list) -> None:
        assert payload == [1, [2]]

    work_one(handle, (1, (2,)))


def test_a_decision_that_is_returned_is_returned():
    def later(payload: int) -> RetryIn:
        return RetryIn(payload)

    decision = work_one(later, 5)

    assert isinstance(decision, RetryIn)
    assert decision.delay.total_seconds() == 5
    assert work_one(lambda payload: f"{payload}", 5) is None


@each_case("raised", [ValueError("no"), DeadLetter("why"), Snooze(1)])
def test_what_is_raised_is_raised(raised):
    def handle() -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        work_one(handle, None)
    assert caught.value is raised


def test_a_handler_of_a_consumer_has_its_settings(consumer):
    seen = []

    @consumer.on("mail", payload=Mail)
    def handle(payload, delivery) -> None:
        seen.append((payload, delivery.queue, delivery.max_read_ct))

    work_one(consumer, {"to": "ada"})
    assert seen == [(Mail("ada"), "mail", 9)]


def test_one_of_several_handlers_is_chosen_by_its_queue(consumer):
    consumer.on("mail")(lambda payload: Discard(f"{payload} mail"))
    consumer.on("receipts")(lambda payload: Discard(f"{payload} receipts"))

    assert work_one(consumer, 1, queue="receipts").reason == "1 receipts"
    with pytest.raises(InvalidArgument, match=r"Pass queue=\.\.\., one of: 'mail', 'receipts'"):
        work_one(consumer, 1)
    with pytest.raises(InvalidArgument, match="no handler is for the queue 'mial'"):
        work_one(consumer, 1, queue="mial")


@pytest.mark.parametrize("form", [list, lambda it: {1: it[0]}, lambda it: it[0]])
def test_a_batch_of_one_gives_the_decision_for_it(consumer, form):
    @consumer.on("mail", batch=10)
    def handle(payloads: list[int]) -> object:
        assert payloads == [5]
        return form([Discard("enough")])

    assert work_one(consumer, 5).reason == "enough"


def test_an_error_that_a_batch_returns_for_its_message_is_raised(consumer):
    @consumer.on("mail", batch=10)
    def handle(deliveries: list[Delivery]) -> object:
        return {delivery: ValueError("no") for delivery in deliveries}

    with pytest.raises(ValueError, match="no"):
        work_one(consumer, 5)


def test_a_session_is_given_in_a_savepoint(session, order):
    def handle(session: Session, payload: int) -> None:
        session.add(order(id=payload, customer="x", total_cents=1))
        QueueService(session).enqueue("mail", payload)
        if payload == 2:
            raise ValueError("no")

    work_one(handle, 1, session=session)
    with pytest.raises(ValueError, match="no"):
        work_one(handle, 2, session=session)

    assert session.scalars(sa.select(order.id)).all() == [1]
    assert [message.payload for message in QueueService(session).messages.find("mail")] == [1]


def test_what_cannot_be_returned_rolls_back(session, consumer, order):
    @consumer.on("mail", batch=2)
    def handle(session: Session, payloads: list[int]) -> object:
        session.add(order(id=1, customer="x", total_cents=1))
        return "done"

    with pytest.raises(InvalidArgument, match="handle returned a str"):
        work_one(consumer, 1, session=session)
    assert session.scalars(sa.select(order.id)).all() == []


def test_a_handler_that_takes_a_session_must_get_one_of_its_kind(session):
    def handle(session: Session) -> None: ...

    async def later(service: AsyncQueueService) -> None: ...

    with pytest.raises(
        InvalidArgument, match=r"handle takes a session: pass session=\.\.\., an Sess"
    ):
        work_one(handle, 1)
    with pytest.raises(InvalidArgument, match=r"later needs session=\.\.\. of the type AsyncSess"):
        work_one(later, 1, session=session)


def test_a_coroutine_is_awaited():
    async def handle(payload: int) -> Discard:
        await asyncio.sleep(0)
        return Discard(f"{payload}")

    async def main() -> None:
        assert (await work_one(handle, 1)).reason == "1"

    asyncio.run(main())


@each_case("attempt", [0, "1", True])
def test_an_attempt_is_a_number_from_1(attempt):
    def handle(payload: int) -> None: ...

    with pytest.raises(InvalidArgument, match="attempt must be"):
        work_one(handle, 1, attempt=attempt)


def test_a_result_that_has_not_run_is_refused():
    def handle(payload: int) -> object:
        return (case for case in [payload])

    with pytest.raises(InvalidResult, match="returned a generator"):
        work_one(handle, 5)


async def test_a_decorated_coroutine_function_is_awaited():
    async def handle(payload: int) -> Decision:
        return Snooze(payload)

    @functools.wraps(handle)
    def decorated(payload: int) -> object:
        return handle(payload)

    assert isinstance(await work_one(decorated, 5), Snooze)

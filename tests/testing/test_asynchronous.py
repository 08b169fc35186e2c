"""The same with an ``AsyncSession``: what differs, and that nothing else does."""

from __future__ import annotations

import asyncio
import functools

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    AsyncQueueService,
    Consumer,
    Delivery,
    InvalidArgument,
    InvalidResult,
    Message,
    Retry,
    Snooze,
)
from pgqrs_sa.testing import (
    AsyncInspector,
    Drained,
    advance,
    all_enqueued,
    assert_enqueued,
    drain,
    refute_enqueued,
    work_one,
)


class Broken(Exception):
    """What a handler of these tests fails with."""


@pytest.fixture
def consumer() -> AsyncConsumer:
    return AsyncConsumer(async_sessionmaker(), retry=Retry(base=60, jitter=0))


async def test_a_coroutine_gets_the_session_of_the_test(async_session, consumer, order):
    given = []

    @consumer.on("mail")
    async def handle(
        session: AsyncSession, service: AsyncQueueService, delivery: Delivery, payload: int
    ) -> None:
        await asyncio.sleep(0)
        given.append(session)
        session.add(order(id=payload, customer="ada", total_cents=1))
        await session.flush()
        await service.enqueue("receipts", payload, delay=5)

    await AsyncQueueService(async_session).enqueue("mail", 7)

    assert await drain(async_session, consumer) == Drained(archived=1)
    assert given == [async_session]
    assert (await async_session.get_one(order, 7)).customer == "ada"
    (found,) = await assert_enqueued(async_session, "receipts", payload=7, delay=5)
    assert await all_enqueued(async_session) == [found]
    await refute_enqueued(async_session, "mail")


async def test_a_coroutine_that_raises_loses_its_own_writes_only(async_session, consumer, order):
    @consumer.on("mail")
    async def handle(session: AsyncSession, payload: int) -> Snooze | None:
        session.add(order(id=payload, customer="x", total_cents=1))
        await session.flush()
        if payload == 2:
            raise Broken("no")
        return Snooze(30) if payload == 3 else None

    await AsyncQueueService(async_session).enqueue_many("mail", [1, 2, 3])
    drained = await drain(async_session, consumer, raise_errors=False)

    assert (drained.archived, drained.retried, drained.snoozed) == (1, 1, 1)
    ids = await async_session.scalars(sa.select(order.id).order_by(order.id))
    assert ids.all() == [1, 3]
    await assert_enqueued(async_session, "mail", payload=2, delay=60)


async def test_what_is_kept_of_an_error_begins_with_the_coroutine(async_session, consumer):
    @consumer.on("mail")
    async def handle(session: AsyncSession) -> None:
        raise Broken("no")

    await AsyncQueueService(async_session).enqueue("mail", 1)
    await drain(async_session, consumer, raise_errors=False)

    (again,) = await assert_enqueued(async_session, "mail")
    assert again.last_error.splitlines()[1].endswith("in handle")


async def test_an_error_of_the_database_costs_a_coroutine_its_savepoint_alone(
    async_session, consumer
):
    @consumer.on("mail")
    async def handle(session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1/0"))

    await AsyncQueueService(async_session).enqueue("mail", 1)

    with pytest.raises(sa.exc.DBAPIError, match="division by zero"):
        await drain(async_session, consumer)
    await assert_enqueued(async_session, "mail", delay=60)


async def test_attempts_end_with_a_dead_letter(async_session, consumer):
    @consumer.on("mail")
    async def handle(payload: int) -> None:
        raise Broken

    await AsyncQueueService(async_session).enqueue("mail", 1, delay=3600)
    drained = await drain(async_session, consumer, scheduled=True, raise_errors=False)

    assert (drained.retried, drained.dead) == (2, 1)


async def test_time_passes(async_session):
    service = AsyncQueueService(async_session)
    await service.enqueue("mail", 1, delay=60)

    assert await advance(async_session, 61) == 1
    assert await service.dequeue("mail")


async def test_a_drain_that_is_cancelled_takes_the_handler_along(async_session, consumer, order):
    begun = asyncio.Event()
    ended = []

    @consumer.on("mail")
    async def handle(session: AsyncSession) -> None:
        session.add(order(id=1, customer="x", total_cents=1))
        await session.flush()
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    await AsyncQueueService(async_session).enqueue("mail", 1)
    draining = asyncio.ensure_future(drain(async_session, consumer))
    await begun.wait()
    draining.cancel()

    with pytest.raises(asyncio.CancelledError):
        await draining
    assert ended
    assert (await async_session.scalars(sa.select(order.id))).all() == []


async def test_a_failed_assertion_comes_without_the_frames_of_sqlalchemy(async_session):
    with pytest.raises(AssertionError, match="the queue 'mail' is empty") as failed:
        await assert_enqueued(async_session, "mail")

    assert not [item for item in failed.traceback if "sqlalchemy" in str(item.path)]


async def test_an_async_registry_of_sessions_will_do(async_session, consumer):
    registry = async_scoped_session(lambda: async_session, asyncio.current_task)
    consumer.on("mail")(_nothing)
    registry.add(Message(queue_name="mail", payload=1))

    await assert_enqueued(registry, "mail")
    assert (await drain(registry, consumer)).archived == 1


async def _nothing(payload: int) -> None: ...


async def test_a_plain_consumer_needs_a_plain_session(async_session, host_engine):
    consumer = Consumer(lambda: None)

    @consumer.on("mail")
    def handle(payload: int) -> None: ...

    with pytest.raises(InvalidArgument, match="is a handler with def, which needs a test with S"):
        await drain(async_session, consumer)


async def test_one_coroutine_is_called_with_a_message_that_is_nowhere(async_session, order):
    async def handle(session: AsyncSession, service: AsyncQueueService, payload: int) -> Snooze:
        session.add(order(id=payload, customer="x", total_cents=1))
        await service.enqueue("mail", payload)
        if payload == 2:
            raise Broken
        return Snooze(5)

    decision = await work_one(handle, 1, session=async_session)
    with pytest.raises(Broken):
        await work_one(handle, 2, session=async_session)

    assert decision.delay.total_seconds() == 5
    assert (await async_session.scalars(sa.select(order.id))).all() == [1]
    await assert_enqueued(async_session, "mail", payload=1, count=1)


async def test_the_inspector_has_them_all(async_session, consumer):
    inspector = AsyncInspector(async_session)
    consumer.on("mail")(_nothing)
    async_session.add(Message(queue_name="mail", payload=1, delay=60))

    await inspector.assert_enqueued("mail", delay=60)
    assert await inspector.advance(61) == 1
    assert len(await inspector.all_enqueued("mail")) == 1
    assert (await inspector.drain(consumer)).archived == 1
    await inspector.refute_enqueued("mail")


async def test_a_result_that_has_not_run_is_a_failed_attempt(async_session, consumer):
    @consumer.on("mail")
    async def handle(payload: int) -> object:
        return asyncio.sleep(payload)

    await AsyncQueueService(async_session).enqueue("mail", 1)
    drained = await drain(async_session, consumer, raise_errors=False)

    assert (drained.archived, drained.retried) == (0, 1)
    assert isinstance(drained.errors[0][1], InvalidResult)


async def test_a_decorated_coroutine_function_is_awaited(async_session, consumer):
    seen = []

    async def work(payload: int) -> None:
        seen.append(payload)

    @consumer.on("mail")
    @functools.wraps(work)
    def decorated(**arguments: int) -> object:
        return work(**arguments)

    await AsyncQueueService(async_session).enqueue("mail", 7)

    assert (await drain(async_session, consumer)).archived == 1
    assert seen == [7]

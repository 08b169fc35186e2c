"""A loop that is closed, stopped or blocked costs nobody messages."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from pgqrs_sa import AsyncConsumer, Delivery, EventLoopLost
from support.consumers import QUICK, Kit, effect
from support.waiting import PATIENCE, until, until_awaited

LONG = 600
SHORT = 3.0


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Collect what a lost loop leaves here, where its warnings are expected, not in later tests."""
    yield
    gc.collect()


@pytest.fixture
def lonely(tasks: Any) -> Iterator[Any]:
    """An AsyncConsumer whose handler never ends, on an engine that no loop has used."""
    engine = create_async_engine(tasks._async_url)
    consumer = AsyncConsumer(async_sessionmaker(engine), **QUICK)
    consumer.begun = []
    yield consumer
    engine.sync_engine.dispose(close=False)


def waits_for_ever(consumer: Any, **options: Any) -> None:
    @consumer.on("mail", **options)
    async def handler(delivery: Delivery) -> None:
        consumer.begun.append(delivery.id)
        await asyncio.Event().wait()


async def started(consumer: Any) -> None:
    """Start it, and wait until it works on as much as it may."""
    await consumer.start()
    await until_awaited(lambda: len(consumer.begun) == QUICK["concurrency"], "all run")


def all_are_back(kit: Any) -> bool:
    return not kit.held() and kit.workers()[0].status == "stopped"


def nothing_was_charged(kit: Any) -> None:
    for row in kit.live().values():
        assert row.max_read_ct is None or row.max_read_ct - row.read_ct == 5


def errors(caplog: Any) -> list[str]:
    """What the consumer has logged as errors; asyncio complains of tasks whose loop is gone."""
    records = [record for record in caplog.records if record.name == "pgqrs_sa.consumer"]
    return [record.message for record in records if record.levelno == logging.ERROR]


def worked_off_by_another(kit: Any, ids: list[int]) -> None:
    """A second consumer does all of it, with each message's first charged attempt."""
    second = kit.consumer()
    second.on("mail", session=False)(lambda _session, _delivery: None)
    second.start()
    until(lambda: kit.outcomes() == dict.fromkeys(ids, "archived"), "it works all off")
    assert second.stop() == 0


def run_and_return(consumer: Any) -> asyncio.AbstractEventLoop:
    """As a web server does whose start fails after the consumer's."""
    loop = None

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        await started(consumer)

    asyncio.run(main())
    return loop


def closed_without_a_word(consumer: Any) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(started(consumer))
    loop.close()
    return loop


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lose", [run_and_return, closed_without_a_word])
def test_a_consumer_whose_loop_is_closed_gives_back_what_it_holds_and_ends(
    tasks, lonely, caplog, lose
):
    ids = tasks.send(*range(20))
    waits_for_ever(lonely, lease=LONG)
    lose(lonely)
    until(lambda: all_are_back(tasks), "everything is given back")
    nothing_was_charged(tasks)
    (error,) = errors(caplog)
    assert "the event loop that calls the handlers is closed" in error
    worked_off_by_another(tasks, ids)
    with pytest.raises(EventLoopLost):
        asyncio.run(lonely.stop())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_consumer_whose_loop_does_not_run_for_as_long_as_a_lease_ends(tasks, lonely, caplog):
    ids = tasks.send(*range(20))
    waits_for_ever(lonely, lease=SHORT)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(started(lonely))
        until(lambda: all_are_back(tasks), "everything is given back")
        worked_off_by_another(tasks, ids)
        assert "has not run for" in caplog.text
        # It runs again: what the handlers did is not theirs any more, and a new start is possible.
        loop.run_until_complete(lonely.start())
        assert loop.run_until_complete(lonely.stop()) == 0
    assert len(tasks.archive()) == 20


def sleeps(_kit: Any, engine: Any) -> AsyncConsumer:
    """A handler keeps a snapshot, and its message locked for that."""
    consumer = AsyncConsumer(async_sessionmaker(engine), **QUICK)
    consumer.begun = []

    @consumer.on("mail", lease=SHORT)
    async def handler(session: AsyncSession, delivery: Delivery) -> None:
        consumer.begun.append(delivery.id)
        await asyncio.Event().wait()

    return consumer


def commits(kit: Any, engine: Any) -> AsyncConsumer:
    """A handler has archived its message, and its COMMIT has not been sent."""

    class Hanging(Session):
        """Never commits."""

    maker = async_sessionmaker(engine, sync_session_class=Hanging)
    consumer = AsyncConsumer(maker, **QUICK)
    consumer.begun = []

    @sa.event.listens_for(Hanging, "before_commit")
    def hang(_session: Session) -> None:
        consumer.begun.append(None)
        await_only(asyncio.Event().wait())

    @consumer.on("mail", lease=SHORT)
    async def handler(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)

    return consumer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "stopped"])
@pytest.mark.parametrize(
    ("made", "level"),
    [
        (sleeps, "REPEATABLE READ"),
        (sleeps, "SERIALIZABLE"),
        (commits, "READ COMMITTED"),
        (commits, "REPEATABLE READ"),
    ],
)
def test_a_loop_that_is_lost_keeps_no_message_that_a_handler_has_locked(tasks, made, level, closed):
    ids = tasks.send(*range(6))
    engine = create_async_engine(tasks._async_url, isolation_level=level)
    consumer = made(tasks, engine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(started(consumer))
    if closed:
        loop.close()
    until(lambda: all_are_back(tasks), "everything is given back")
    nothing_was_charged(tasks)
    worked_off_by_another(tasks, ids)
    if not closed:
        with pytest.raises(EventLoopLost):
            loop.run_until_complete(consumer.stop())
        loop.run_until_complete(engine.dispose())
        loop.close()
    assert tasks.effects() == []
    engine.sync_engine.dispose(close=False)


def test_a_loop_that_runs_piece_by_piece_loses_no_message(tasks, lonely, caplog):
    ids = tasks.send(*range(20))

    @lonely.on("mail", lease=LONG)
    async def handler(delivery: Delivery) -> None:
        await asyncio.sleep(0.001)

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(lonely.start())

        def all_done() -> bool:
            loop.run_until_complete(asyncio.sleep(0.02))
            return tasks.outcomes() == dict.fromkeys(ids, "archived")

        until(all_done, "it does all, piece by piece")
        assert loop.run_until_complete(lonely.stop()) == 0
    assert errors(caplog) == []


def test_a_blocked_loop_keeps_only_what_its_handler_has_begun_with(tasks, caplog):
    ids = tasks.send(*range(12))
    consumer = tasks.consumer(concurrency=4)
    go, begun = threading.Event(), threading.Event()
    done = []

    @consumer.on("mail", lease=SHORT, session=False)
    def handler(_session, delivery):
        done.append(delivery.id)
        begun.set()
        assert go.wait(PATIENCE)  # in the loop's thread: nothing else runs there

    consumer.start()
    assert begun.wait(PATIENCE)
    (blocking,) = done
    others = [id_ for id_ in ids if id_ != blocking]
    second = _second(tasks)
    until(lambda: tasks.outcomes() == dict.fromkeys(others, "archived"), "a second does the rest")
    assert tasks.held() == [blocking]  # renewed, as it has begun
    assert "nothing is leased until it answers" in caplog.text
    until_ = tasks.live()[blocking].leased_until
    until(lambda: tasks.live()[blocking].leased_until > until_, "the lease is renewed")
    second.stop()
    go.set()
    until(lambda: len(tasks.archive()) == 12, "it is archived, by its first attempt")
    assert tasks.archive()[blocking].read_ct == 1
    (again,) = tasks.send("again")
    until(lambda: again in done, "it leases again")
    assert consumer.stop() == 0


def _second(tasks: Any) -> Any:
    """A consumer with a loop of its own."""
    other = Kit(tasks._url, "threads", None)
    driver = other.consumer()
    driver.on("mail", session=False)(lambda _session, _delivery: None)
    driver.start()

    class Second:
        def stop(self) -> None:
            assert driver.stop() == 0
            other.close()

    return Second()


def test_messages_that_wait_here_for_as_long_as_their_lease_are_given_back(threads):
    ids = threads.send(*range(4))
    consumer = threads.consumer()
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", concurrency=1, prefetch=3, lease=SHORT, session=False)
    def handler(_session, delivery):
        begun.set()
        assert go.wait(PATIENCE)

    consumer.start()
    assert begun.wait(PATIENCE)
    until(lambda: threads.held() == ids, "all four are leased")
    until(lambda: all(threads.live()[id_].max_read_ct > 5 for id_ in ids[1:]), "they go back")
    assert threads.live()[ids[0]].max_read_ct == 5
    go.set()
    until(lambda: len(threads.archive()) == 4, "all are archived")
    assert consumer.stop() == 0


def test_a_consumer_that_cannot_go_on_ends_by_itself_when_nobody_waits_for_it(kit):
    consumer = kit.consumer().consumer

    if kit.is_async:

        @consumer.on("mail")
        async def handle(delivery: Delivery) -> None:
            """Never called."""

    else:

        @consumer.on("mail")
        def handle(delivery: Delivery) -> None:
            """Never called."""

    kit.call(consumer.start)
    kit.sql("DELETE FROM pgqrs_queues")
    until(lambda: kit.workers()[0].status == "stopped", "its row says that it has ended")
    with pytest.raises(LookupError):
        kit.call(consumer.stop)


def test_a_consumer_works_on_when_the_thread_that_has_started_it_ends(threads):
    consumer = threads.consumer().consumer

    @consumer.on("mail")
    def handle(delivery: Delivery) -> None:
        """Do no work."""

    starter = threading.Thread(target=consumer.start)
    starter.start()
    starter.join(PATIENCE)
    ids = threads.send(1, 2, 3)
    until(lambda: threads.outcomes() == dict.fromkeys(ids, "archived"), "it works")
    assert consumer.stop() == 0

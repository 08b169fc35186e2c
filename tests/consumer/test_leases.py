"""Leases: renewed while a handler works, given up when it takes too long, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, Delivery, HandlerTimeout, QueueService, Retry
from support.cases import each_case
from support.consumers import Ear, effect
from support.waiting import PATIENCE, until, until_awaited

SHORT = 3.0
"""A lease that runs out within a test, unless it is renewed: when a third of it is over, so that a
busy machine has seconds for it."""

LIMIT = 1.5
"""A timeout that leaves a handler, on a busy machine, the time to come to where it waits."""

OVERDUE = "SELECT count(*) FROM pgqrs_messages WHERE leased_until < now()"


def outlive(kit, id_):
    """Wait until a lease is held for longer than it was taken for."""
    held = (
        "SELECT now() > dequeued_at + interval '1 s' * :lease AND leased_until > now()"
        " FROM pgqrs_messages WHERE id = :id"
    )
    until(lambda: kit.sql(held, lease=SHORT, id=id_) == [(True,)], "the lease outlives its length")


def test_a_lease_is_renewed_while_its_handler_runs_longer(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()
    go, begun = threading.Event(), threading.Event()
    lost = []

    @consumer.on("mail", lease=SHORT)
    def handler(session, delivery):
        begun.set()
        kit.wait(go)
        lost.append(delivery.lease_lost)
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    outlive(kit, id_)
    go.set()
    until(lambda: id_ in kit.archive(), "the message is archived")
    assert consumer.stop() == 0
    assert kit.effects() == [(id_, 1)]
    assert lost == [False]


def test_a_blocked_event_loop_loses_no_lease(tasks):
    (id_,) = tasks.send({})
    consumer = tasks.consumer()
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=SHORT)
    def handler(session, delivery):
        begun.set()
        assert go.wait(PATIENCE)  # in the loop's thread: nothing else runs there
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    outlive(tasks, id_)
    go.set()
    until(lambda: id_ in tasks.archive(), "the message is archived")
    assert consumer.stop() == 0
    assert tasks.effects() == [(id_, 1)]


def test_a_handler_that_holds_its_row_locked_holds_up_no_other_lease(kit):
    locked, other = kit.send("locked", "other")
    consumer = kit.consumer()
    go = threading.Event()
    begun = threading.Barrier(3, timeout=PATIENCE)
    tried = []

    @consumer.on("mail", lease=SHORT, acknowledge="manual")
    def handler(session, delivery):
        if not tried.count(delivery.id):
            tried.append(delivery.id)
        if delivery.payload == "locked":
            QueueService(session).archive(delivery)
        if not kit.is_async:
            begun.wait()
        kit.wait(go)
        effect(session, delivery)
        if delivery.payload != "locked":
            QueueService(session).archive(delivery)

    consumer.start()
    if kit.is_async:
        until(lambda: len(tried) == 2, "both have begun")
    else:
        begun.wait()
    outlive(kit, other)
    late = "SELECT leased_until < now() FROM pgqrs_messages WHERE id = :id"
    until(lambda: kit.sql(late, id=locked) == [(True,)], "the locked one's lease has run out")
    go.set()
    until(lambda: len(kit.archive()) == 2, "both are archived")
    assert consumer.stop() == 0
    assert sorted(kit.effects()) == [(locked, 1), (other, 1)]


def test_a_handler_that_takes_too_long_has_failed_and_cannot_commit(kit):
    (id_,) = kit.send({})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear], retry=Retry(base=1000))
    go, over = threading.Event(), threading.Event()
    late = []

    @consumer.on("mail", lease=30, timeout=LIMIT)
    def handler(session, delivery):
        try:
            effect(session, delivery)
            kit.wait(go)
            until(lambda: delivery.lease_lost, "the handler can know")
            late.append(delivery.id)
        finally:
            over.set()

    consumer.start()
    until(lambda: kit.live()[id_].last_error, "the attempt has failed")
    go.set()
    assert over.wait(PATIENCE)
    assert consumer.stop() == 0
    row = kit.live()[id_]
    assert (row.read_ct, row.dequeued_at) == (1, None)
    assert "took longer than its timeout of 1.5 s" in row.last_error
    assert kit.effects() == []
    assert late == ([] if kit.is_async else [id_])  # a task is cancelled, a thread goes on
    assert ear.names() == ["on_start", "on_retry"]
    assert isinstance(ear.heard[1][1].error, HandlerTimeout)


def deaf(kit, go):
    """Wait in a handler that neither its timeout nor the end of the consumer can stop."""
    end = time.monotonic() + PATIENCE
    while not go.is_set() and time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            kit.wait_a_moment()


def works_on_all_connections(kit, engine):
    """Say whether each connection of an engine's pool works, as it is after a consumer."""
    if not kit.is_async:
        return works(engine)
    return asyncio.run_coroutine_threadsafe(works_awaited(engine), kit._loop).result(PATIENCE)


def works(engine):
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(engine.connect()) for _ in range(engine.pool.checkedin())]
        return all(connection.scalar(sa.text("SELECT true")) for connection in taken)


async def works_awaited(engine):
    async with contextlib.AsyncExitStack() as stack:
        taken = [
            await stack.enter_async_context(engine.connect())
            for _ in range(engine.pool.checkedin())
        ]
        return all([await connection.scalar(sa.text("SELECT true")) for connection in taken])


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_handler_that_keeps_its_row_locked_gives_it_up_at_its_timeout(kit, level):
    (id_,) = kit.send({})
    engine = kit.app_engine(isolation_level=level)
    consumer = kit.consumer(engine=engine, retry=Retry(backoff="constant", base=0, jitter=0))
    go, begun = threading.Event(), []

    @consumer.on("mail", timeout=LIMIT)
    def handler(session, delivery):
        effect(session, delivery)
        begun.append(delivery.read_ct)
        if delivery.read_ct == 1:
            deaf(kit, go)

    consumer.start()
    until(lambda: id_ in kit.archive(), "another attempt is made while the first one goes on")
    until(lambda: consumer.runtime.busy == 1, "the other attempt has ended")
    go.set()
    until(lambda: not consumer.runtime.busy, "the first one has ended")
    assert consumer.stop() == 0
    assert kit.effects() == [(id_, begun[-1])]
    assert begun[-1] > 1
    assert "took longer than its timeout" in kit.archive()[id_].last_error
    assert works_on_all_connections(kit, engine)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_handler_that_keeps_its_row_locked_gives_it_up_at_the_end_of_the_drain(kit, level):
    (id_,) = kit.send({})
    engine = kit.app_engine(isolation_level=level)
    consumer = kit.consumer(engine=engine, drain_timeout=0.1)
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        begun.set()
        deaf(kit, go)

    consumer.start()
    assert begun.wait(PATIENCE)
    runtime = consumer.runtime
    assert consumer.stop() == 1
    row = kit.live()[id_]
    assert (row.read_ct, row.max_read_ct, row.dequeued_at) == (1, 6, None)
    go.set()
    until(lambda: not runtime.busy, "the handler has ended")
    assert kit.effects() == []
    assert list(kit.live()) == [id_]
    assert works_on_all_connections(kit, engine)


def test_the_connection_of_a_handler_that_does_not_lock_its_row_outlives_its_timeout(kit):
    """Though the row is locked, by somebody else."""
    (id_,) = kit.send({})
    engine = kit.app_engine()
    tries = settlements(getattr(engine, "sync_engine", engine))
    consumer = kit.consumer(engine=engine, retry=Retry(base=1000))
    go, begun = threading.Event(), threading.Event()
    worked = []

    @consumer.on("mail", timeout=LIMIT)
    def handler(session, delivery):
        effect(session, delivery)
        begun.set()
        deaf(kit, go)
        worked.append(session.scalar(sa.text("SELECT true")))

    consumer.start()
    assert begun.wait(PATIENCE)
    with kit.engine.begin() as blocker:
        blocker.execute(sa.text("SELECT 1 FROM pgqrs_messages FOR UPDATE"))
        until(lambda: len(tries) > 3, "to note the failure is tried, and tried again")
    until(lambda: kit.live()[id_].last_error, "the attempt has failed")
    go.set()
    until(lambda: not consumer.runtime.busy, "the handler has ended")
    assert consumer.stop() == 0
    assert (worked, kit.effects()) == ([True], [])


def test_the_stack_of_a_thread_that_takes_too_long_is_kept_and_is_the_handlers(threads):
    (id_,) = threads.send({})
    consumer = threads.consumer(retry=Retry(base=1000))
    go = threading.Event()

    @consumer.on("mail", timeout=LIMIT)
    def handler(_session, _delivery):
        assert go.wait(PATIENCE), "where it waits"

    consumer.start()
    error = until(lambda: threads.live()[id_].last_error, "the attempt has failed")
    go.set()
    consumer.stop()
    assert 'assert go.wait(PATIENCE), "where it waits"' in error
    assert "consumer/threads.py" not in error


@pytest.mark.parametrize("stubborn", [True, False])
def test_the_stack_of_a_task_that_takes_too_long_is_its_own(tasks, stubborn):
    """Not that of the task that keeps the event loop busy meanwhile."""
    tasks.queue("busy")
    tasks.send({}, queue="busy")
    (late,) = tasks.send({})
    consumer = tasks.consumer(retry=Retry(base=1000))
    go = threading.Event()

    @consumer.consumer.on("busy")
    async def keeps_the_loop(payload: dict) -> None:
        while not go.is_set():
            time.sleep(0.005)  # noqa: ASYNC251 - what is tested
            await asyncio.sleep(0)

    async def waits_here() -> None:
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if not stubborn:
                    raise

    @consumer.consumer.on("mail", timeout=LIMIT)
    async def handler(payload: dict) -> None:
        await waits_here()

    consumer.start()
    error = until(lambda: tasks.live()[late].last_error, "the attempt has failed")
    go.set()
    consumer.stop()
    assert "in waits_here" in error
    assert "keeps_the_loop" not in error
    assert "consumer/tasks.py" not in error


def test_a_task_that_will_not_be_cancelled_has_failed_all_the_same(tasks):
    (id_,) = tasks.send({})
    ear = Ear()
    consumer = tasks.consumer(hooks=[ear], retry=Retry(base=1000))
    go = threading.Event()

    async def stubborn(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    consumer.consumer.on("mail", timeout=LIMIT)(stubborn)
    consumer.start()
    until(lambda: tasks.live()[id_].last_error, "the attempt has failed")
    go.set()
    until(lambda: not consumer.runtime.busy, "the handler has ended")
    assert consumer.stop() == 0
    assert tasks.effects() == []
    assert list(tasks.live()) == [id_]
    assert ear.names() == ["on_start", "on_retry"]


def test_a_timeout_error_of_the_handlers_own_is_no_timeout(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=1000))

    @consumer.on("mail", timeout=10)
    def handler(_session, _delivery):
        raise TimeoutError("of a client")

    assert consumer.run() == 0
    assert kit.live()[id_].last_error.startswith("TimeoutError: of a client")


def test_the_handler_can_ask_whether_its_lease_was_lost(kit):
    (id_,) = kit.send({})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear])
    begun = threading.Event()
    knew = []

    @consumer.on("mail", lease=SHORT)
    def handler(session, delivery):
        effect(session, delivery)
        begun.set()
        end = time.monotonic() + PATIENCE
        while not delivery.lease_lost and time.monotonic() < end:
            kit.wait_a_moment()
        knew.append(delivery.lease_lost)

    consumer.start()
    assert begun.wait(PATIENCE)
    kit.steal(id_)
    until(lambda: "on_lease_lost" in ear.names(), "the loss is noticed")
    until(lambda: not consumer.runtime.busy, "the handler has ended")
    assert consumer.stop() == 0
    assert kit.effects() == []
    assert kit.archive() == {}
    assert ear.names() == ["on_start", "on_lease_lost"]
    assert knew == ([] if kit.is_async else [True])  # a task is cancelled


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_engine_that_keeps_snapshots_can_be_worked_on(kit, level):
    ids = kit.send(*range(12))
    ear = Ear()
    engine = kit.app_engine(isolation_level=level)
    consumer = kit.consumer(engine=engine, hooks=[ear], concurrency=6, retry=Retry(base=1000))
    go = threading.Event()
    begun = []

    @consumer.on("mail", lease=SHORT)
    def handler(session, delivery):
        if delivery.payload < 6:
            begun.append(delivery.id)
            kit.wait(go)
        effect(session, delivery)

    consumer.start()
    until(lambda: len(begun) == 6, "six have begun")
    until(lambda: kit.sql(OVERDUE) == [(6,)], "their leases have run out, under the lock")
    go.set()
    until(lambda: len(kit.archive()) == 12, "all are archived")
    assert consumer.stop() == 0
    assert sorted(id_ for id_, _ in kit.effects()) == ids
    # A renewal that comes between a handler's snapshot and its lock costs no attempt.
    assert {delivery.max_read_ct - delivery.read_ct for delivery in kit.archive().values()} == {4}
    assert kit.sql("SELECT DISTINCT last_error FROM pgqrs_archive") == [(None,)]


def test_a_handler_that_would_keep_a_snapshot_is_not_called_for_what_was_lost(kit):
    first, second = kit.send("first", "second")
    ear = Ear()
    engine = kit.app_engine(isolation_level="REPEATABLE READ")
    consumer = kit.consumer(engine=engine, hooks=[ear], concurrency=1)
    begun, go = threading.Event(), threading.Event()
    calls = []

    @consumer.on("mail", prefetch=1)
    def handler(session, delivery):
        calls.append(delivery.id)
        begun.set()
        kit.wait(go)

    consumer.start()
    assert begun.wait(PATIENCE)
    until(lambda: kit.held() == [first, second], "the second one waits here")
    kit.steal(second)
    go.set()
    until(lambda: "on_lease_lost" in ear.names(), "the loss is noticed")
    assert consumer.stop() == 0
    assert calls == [first]
    assert kit.outcomes() == {first: "archived"}


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_transactions_that_stand_in_each_others_way_are_tried_again_uncharged(kit, code):
    (id_,) = kit.send({})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear], retry=Retry(base=1000))
    calls = []

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        calls.append(delivery.read_ct)
        if len(calls) < 3:
            session.execute(
                sa.text(f"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '{code}'; END $$")
            )

    consumer.start()
    until(kit.archive, "it is done")
    assert consumer.stop() == 0
    assert calls == [1, 2, 3]
    assert kit.effects() == [(id_, 3)]
    assert ear.names() == ["on_start", "on_retry"] * 2 + ["on_start", "on_success"]
    (row,) = kit.archive().values()
    assert (row.max_read_ct - row.read_ct, row.last_error) == (4, None)


def test_a_message_that_meets_a_conflict_every_time_becomes_a_dead_letter(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=0))
    calls = []

    @consumer.on("mail")
    def handler(session, delivery):
        calls.append(delivery.read_ct)
        session.execute(
            sa.text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
        )

    consumer.start()
    until(kit.archive, "it is a dead letter")
    assert consumer.stop() == 0
    assert calls == list(range(1, 26))  # 20 that are forgiven, and the five of the queue
    (row,) = kit.archive().values()
    assert (row.id, row.outcome) == (id_, "dead")
    assert "again" in row.last_error


def test_a_server_whose_default_is_serializable_can_be_worked_on(kit):
    ids = kit.send(*range(8))
    user = kit.engine.url.username
    kit.sql(f"ALTER ROLE {user} SET default_transaction_isolation = 'serializable'")
    try:
        consumer = kit.consumer(engine=kit.app_engine(), retry=Retry(base=1000))
        go = threading.Event()
        begun = []

        @consumer.on("mail", lease=SHORT)
        def handler(session, delivery):
            level = session.connection().get_isolation_level()
            effect(session, delivery, str(level))
            if delivery.payload < 4:
                begun.append(delivery.id)
                kit.wait(go)

        consumer.start()
        until(lambda: len(begun) == 4, "four have begun")
        until(lambda: kit.sql(OVERDUE) == [(4,)], "their leases have run out, under the lock")
        go.set()
        until(lambda: len(kit.archive()) == 8, "all are archived")
        assert consumer.stop() == 0
    finally:
        kit.sql(f"ALTER ROLE {user} RESET default_transaction_isolation")
    assert sorted(id_ for id_, _ in kit.effects()) == ids
    assert {delivery.max_read_ct - delivery.read_ct for delivery in kit.archive().values()} == {4}
    assert kit.sql("SELECT DISTINCT note FROM effects") == [("SERIALIZABLE",)]


@each_case(
    ("error", "session"),
    [
        (KeyboardInterrupt, True),
        (KeyboardInterrupt, False),
        (SystemExit, True),
        (MemoryError, True),
        (GeneratorExit, True),
        (asyncio.CancelledError, True),
        (asyncio.CancelledError, False),
    ],
    before="cleared",
)
def test_whatever_a_handler_raises_leaves_no_lease_behind(kit, error, session):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=1000))

    @consumer.on("mail", session=session)
    def handler(session, delivery):
        if session is not None:
            effect(session, delivery)
        raise error("now")

    if error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            consumer.run()
    else:
        assert consumer.run() == 0
    row = kit.live()[id_]
    charged = error is not KeyboardInterrupt
    assert (row.read_ct, row.max_read_ct) == (1, 5 if charged else 6)
    assert row.dequeued_at is None
    assert (row.last_error or "").startswith(
        f"{'asyncio.exceptions.' if error is asyncio.CancelledError else ''}{error.__name__}: now"
        if charged
        else ""
    )
    assert kit.effects() == []
    assert [worker.status for worker in kit.workers()] == ["stopped"]


async def test_a_consumer_that_is_cancelled_at_any_moment_leaves_no_lease_behind(
    async_engine, threads
):
    ids = threads.send(*range(60))
    done = []

    async def handler(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)
        await asyncio.sleep(random.random() * 0.01)
        done.append(delivery.id)

    for _ in range(16):
        consumer = AsyncConsumer(
            async_sessionmaker(async_engine), concurrency=3, poll_interval=0.02, housekeeping=None
        )
        consumer.on("mail", lease=600)(handler)
        task = asyncio.create_task(consumer.run())
        await asyncio.sleep(random.random() * 0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert threads.held() == []
    await AsyncConsumerRest(async_engine, handler).run()
    assert sorted(id_ for id_, _ in threads.effects()) == ids
    assert set(threads.outcomes().values()) == {"archived"}
    assert threads.held() == []
    assert [item for item in threading.enumerate() if item.name.startswith("pgqrs-")] == []


class AsyncConsumerRest:
    """Does what is left."""

    def __init__(self, engine, handler):
        self._consumer = AsyncConsumer(async_sessionmaker(engine), poll_interval=0.02)
        self._consumer.on("mail")(handler)

    async def run(self):
        assert await self._consumer.run(until_empty=True) == 0


async def test_cancelled_while_it_drains_a_consumer_still_gives_back_what_it_has(
    async_engine, threads
):
    (id_,) = threads.send({})
    begun = asyncio.Event()

    async def handler(delivery: Delivery) -> None:
        begun.set()
        await asyncio.sleep(60)

    consumer = AsyncConsumer(async_sessionmaker(async_engine), drain_timeout=60)
    consumer.on("mail", lease=600)(handler)
    task = asyncio.create_task(consumer.run())
    await begun.wait()
    runtime = consumer._run.runtime
    stopping = asyncio.create_task(consumer.stop())
    await until_awaited(runtime.dispatcher.stopped_leasing.is_set, "it drains")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stopping == 1
    row = threads.live()[id_]
    assert (row.read_ct, row.max_read_ct, row.dequeued_at) == (1, 6, None)


def test_what_is_done_is_settled_although_nothing_is_leased_for_the_others_that_are_ahead(kit):
    """It waits for the next lease a little, to share its commit; but not until there is room."""
    first, second, *others = kit.send(*range(15))  # more than half of what may be held
    consumer = kit.consumer()
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", concurrency=1, prefetch=20, session=False)
    def handler(_session, delivery):
        if delivery.id == second:
            begun.set()
            kit.wait(go)

    consumer.start()
    assert begun.wait(PATIENCE)
    until(lambda: list(kit.archive()) == [first], "the first is settled while the second runs")
    assert kit.held() == [second, *others]
    go.set()
    until(lambda: len(kit.archive()) == 15, "all are settled")
    assert consumer.stop() == 0


def test_messages_that_waited_here_and_were_lost_are_not_started(threads):
    ids = threads.send(*range(4))
    ear = Ear()
    consumer = threads.consumer(hooks=[ear])
    go, begun = threading.Event(), threading.Event()
    calls = []

    @consumer.on("mail", concurrency=1, prefetch=3, lease=SHORT)
    def handler(_session, delivery):
        calls.append(delivery.id)
        begun.set()
        assert go.wait(PATIENCE)

    consumer.start()
    assert begun.wait(PATIENCE)
    until(lambda: threads.held() == ids, "all four are leased")
    for id_ in ids[1:3]:
        threads.steal(id_)
    until(lambda: ear.names().count("on_lease_lost") == 2, "the losses are noticed")
    go.set()
    until(lambda: len(threads.archive()) == 2, "the others are archived")
    assert consumer.stop() == 0
    assert calls == [ids[0], ids[3]]


def test_a_thread_that_is_given_up_cannot_commit_and_its_message_is_uncharged(threads):
    (id_,) = threads.send({})
    consumer = threads.consumer(drain_timeout=0.1)
    go, begun, ended = (threading.Event() for _ in range(3))
    errors = []

    def handler(session: Session, delivery: Delivery) -> None:
        begun.set()
        assert go.wait(PATIENCE)
        try:
            effect(session, delivery)
        finally:
            ended.set()

    consumer.consumer.on("mail", lease=600)(handler)
    consumer.start()
    assert begun.wait(PATIENCE)
    runtime = consumer.runtime
    assert consumer.stop() == 1
    row = threads.live()[id_]
    assert (row.read_ct, row.max_read_ct, row.dequeued_at) == (1, 6, None)
    go.set()
    assert ended.wait(PATIENCE)
    until(lambda: not runtime.busy, "the thread has ended its call")
    assert threads.effects() == errors == []
    assert list(threads.live()) == [id_]
    assert [worker.status for worker in threads.workers()] == ["stopped"]


def test_a_task_is_cancelled_when_there_is_no_more_time_and_its_message_is_uncharged(tasks):
    (id_,) = tasks.send({})
    consumer = tasks.consumer(drain_timeout=0.1)
    never, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        begun.set()
        tasks.wait(never)

    consumer.start()
    assert begun.wait(PATIENCE)
    assert consumer.stop() == 1
    row = tasks.live()[id_]
    assert (row.read_ct, row.max_read_ct, row.dequeued_at) == (1, 6, None)
    assert tasks.effects() == []


def test_a_message_taken_anew_is_not_mistaken_for_the_attempt_that_hangs(threads):
    """Both attempts end at the same time; the old one's disposition is dropped."""
    (id_,) = threads.send({})
    ear = Ear()
    consumer = threads.consumer(hooks=[ear])
    both = threading.Barrier(2, timeout=PATIENCE)
    begun = []

    def handler(delivery: Delivery) -> None:
        begun.append(delivery.read_ct)
        if delivery.read_ct == 1:
            until(lambda: 2 in begun, "the second attempt has begun")
        both.wait()

    consumer.consumer.on("mail", lease=SHORT)(handler)
    consumer.start()
    until(lambda: begun, "the first attempt has begun")
    assert begun == [1]
    threads.sql(
        "UPDATE pgqrs_messages SET leased_until = NULL, dequeued_at = NULL,"
        " consumer_worker_id = NULL"
    )
    until(lambda: id_ in threads.archive(), "the message is archived")
    assert consumer.stop() == 0
    assert threads.archive()[id_].read_ct == 2
    assert sorted(ear.names()) == ["on_lease_lost", "on_start", "on_start", "on_success"]


def test_many_failures_while_leases_are_renewed_kill_no_message(threads):
    """A row that is locked for a renewal, as its failure is noted, has attempts left."""
    ids = threads.send(*range(20), max_read_ct=100_000)
    consumer = threads.consumer(concurrency=20, retry=Retry(base=0))

    @consumer.on("mail", lease=0.6, session=False)
    def handler(_session, delivery):
        if delivery.read_ct < 8:
            time.sleep(0.2)  # a third of the lease: it is renewed now
            raise ValueError

    assert consumer.run() == 0
    assert threads.outcomes() == dict.fromkeys(ids, "archived")


def settlements(engine):
    """Note what an engine's connections execute from now on to settle, without its values."""
    tries = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, *_more):
        if "pq_held" in statement and "pq_leased" not in statement:
            tries.append(statement)

    return tries


def test_a_retry_of_a_row_that_is_locked_waits_for_it_and_does_not_bury_it(threads):
    (id_,) = threads.send({})
    ear = Ear()
    engine = threads.app_engine()
    tries = settlements(engine)
    consumer = threads.consumer(engine=engine, hooks=[ear], retry=Retry(base=1000))
    locked, raised = threading.Event(), threading.Event()

    @consumer.on("mail", session=False)
    def handler(_session, _delivery):
        assert locked.wait(PATIENCE)
        raised.set()
        raise ValueError("once")

    consumer.start()
    until(lambda: threads.held() == [id_], "it is leased")
    with threads.engine.begin() as blocker:
        blocker.execute(sa.text("SELECT 1 FROM pgqrs_messages FOR UPDATE"))
        locked.set()
        assert raised.wait(PATIENCE)
        until(lambda: len(tries) > 1, "it is tried, and tried again")
        assert ear.names() == ["on_start"]
    until(lambda: "on_retry" in ear.names(), "the failure is noted")
    assert consumer.stop() == 0
    assert threads.live()[id_].last_error.startswith("ValueError: once")


def test_a_handler_that_locked_its_row_itself_and_takes_too_long_commits_nothing(kit):
    """Its failure cannot be noted as long as it runs; what it returns then does not count."""
    (id_,) = kit.send({})
    ear = Ear()
    engine = kit.app_engine()
    tries = settlements(getattr(engine, "sync_engine", engine))
    consumer = kit.consumer(engine=engine, hooks=[ear], retry=Retry(base=1000))
    go = threading.Event()

    @consumer.on("mail", timeout=LIMIT)
    def handler(session, delivery):
        effect(session, delivery)
        session.execute(sa.text("SELECT 1 FROM pgqrs_messages FOR UPDATE"))
        deaf(kit, go)

    consumer.start()
    until(lambda: len(tries) > 1, "it is overdue: to note that is tried, and tried again")
    go.set()
    until(lambda: "on_retry" in ear.names(), "the failure is noted")
    assert consumer.stop() == 0
    assert ear.names() == ["on_start", "on_retry"]
    assert (kit.effects(), list(kit.live())) == ([], [id_])


def test_a_consumer_refuses_what_is_not_a_sessionmaker_of_its_kind(threads, async_engine):
    from pgqrs_sa import InvalidArgument

    with pytest.raises(InvalidArgument, match="is for AsyncConsumer"):
        Consumer(async_sessionmaker(async_engine))
    with threads.engine.connect() as connection:
        bound = Consumer(sessionmaker(connection))
        bound.on("mail")(lambda delivery: None)
        with pytest.raises(InvalidArgument, match="bound to one connection"):
            bound.run()

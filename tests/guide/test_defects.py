"""The defects of pgqrs 0.5 that its readers ran into, each with the behaviour they get here.

``d1`` to ``d14`` are those of the checklist of its surface (5.11), ``r1`` to ``r15`` those of the
study of its reliability (A.3). Where both have the same, one test is named after both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService, Worker, pgqrs
from pgqrs_sa.pgqrs import producer as producer_module
from support.waiting import until_awaited

from .conftest import Clock


@contextmanager
def statements() -> Iterator[list[str]]:
    """All statements that are sent meanwhile."""
    sent: list[str] = []

    def note(_connection, _cursor, statement, *_rest) -> None:
        sent.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def silence(clock: Clock, seconds: float) -> None:
    """Let all workers have been silent for so long."""
    with clock.engine.begin() as connection:
        past = sa.func.clock_timestamp() - sa.text(f"interval '{seconds} seconds'")
        connection.execute(sa.update(Worker).values(heartbeat_at=past))


@pytest.fixture
def producer(admin) -> pgqrs.Producer:
    return pgqrs.Producer(admin, "tasks", "producer", 3000)


@pytest.fixture
def consumer(admin) -> pgqrs.Consumer:
    return pgqrs.Consumer(admin, "tasks", "consumer", 3001)


async def test_d1_r1_an_expired_lease_comes_back_by_itself(admin, producer, consumer) -> None:
    id_ = await producer.enqueue({"n": 1})
    (first,) = await consumer.dequeue_delay(1)
    other = pgqrs.Consumer(admin, "tasks", "other", 3001)
    found: list[pgqrs.QueueMessage] = []
    async with asyncio.timeout(60):
        while not found:  # nobody reclaims anything
            found = await other.dequeue_delay(600)
    (again,) = found
    assert (again.id, again.read_ct) == (id_, 2)
    # Their vt is the end of the lease. By the server's clock, the second lease began after the
    # first had ended.
    assert again.vt - timedelta(seconds=600) >= first.vt


async def test_d2_a_scheduled_message_is_cancelled_by_its_id(producer, consumer, clock) -> None:
    id_ = await producer.enqueue_delayed({"n": 1}, 3600)
    assert await consumer.delete(id_) is True
    assert await consumer.delete(id_) is False
    (cancelled,) = clock.archived("tasks")
    assert (cancelled.original_msg_id, cancelled.outcome) == (id_, "cancelled")


async def test_d2_a_visible_message_that_nobody_holds_is_not_cancelled(producer, consumer) -> None:
    id_ = await producer.enqueue({"n": 1})
    assert await consumer.delete(id_) is False
    assert [delivery.id for delivery in await consumer.dequeue()] == [id_]
    assert await consumer.delete(id_) is True


async def test_d2_a_consumer_cancels_nothing_of_another_queue(admin, producer) -> None:
    await admin.create_queue("others")
    other = pgqrs.Consumer(admin, "others", "host", 1)
    id_ = await producer.enqueue_delayed({"n": 1}, 3600)
    assert await other.delete(id_) is False
    assert await (await admin.get_messages()).count() == 1


async def test_d2_what_another_consumer_works_on_is_not_cancelled(
    admin, producer, consumer
) -> None:
    id_ = await producer.enqueue({"n": 1})
    await consumer.dequeue()
    other = pgqrs.Consumer(admin, "tasks", "other", 3001)
    assert await other.delete(id_) is False
    assert await consumer.delete(id_) is True


async def test_d3_r15_metrics_tell_held_delayed_and_ready_apart(admin, producer, consumer) -> None:
    await producer.enqueue_batch([1, 2, 3])
    await producer.enqueue_delayed("later", 600)
    await consumer.dequeue()
    await consumer.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    metrics = await admin.queue_metrics("tasks")
    # One is held; one was, and is ready again; one waits for its time.
    assert (metrics.leased, metrics.ready, metrics.scheduled) == (1, 2, 1)


async def test_d4_r7_extending_counts_from_now(producer, consumer, clock) -> None:
    id_ = await producer.enqueue(1)
    await consumer.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    clock.pass_seconds(1000)  # the lease ran out long ago, and nobody has taken it
    with clock.puts_off(id_, 60):
        assert await consumer.extend_visibility(id_, 60) is True
    with clock.puts_off(id_, 10):
        assert await consumer.extend_visibility(id_, 10) is True  # shorter is possible too


async def test_d4_extending_fails_when_the_lease_was_lost(admin, producer, consumer) -> None:
    id_ = await producer.enqueue(1)
    await consumer.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    other = pgqrs.Consumer(admin, "tasks", "other", 1)
    await other.dequeue()
    assert await consumer.extend_visibility(id_, 60) is False
    assert await consumer.extend_visibility(id_ + 1, 60) is False


async def test_d5_r4_dlq_never_takes_a_live_lease(admin, producer, consumer, clock) -> None:
    with Session(clock.engine) as session, session.begin():
        QueueService(session).queues.update("tasks", max_read_ct=1)
    spent = await producer.enqueue("spent")
    await consumer.dequeue_delay(0.05)
    working = await producer.enqueue("on its last attempt")
    await consumer.dequeue_delay(60)
    await asyncio.sleep(0.1)
    assert await admin.dlq() == [spent]
    assert await admin.dlq() == []
    archive = await admin.get_archive()
    (letter,) = await archive.list_dlq_messages()
    assert (letter.original_msg_id, letter.outcome) == (spent, "dead")
    assert letter.reason == "no attempts left: the last lease ran out"
    assert await archive.dlq_count(1) == 1
    assert await archive.list_dlq_messages(1, 10, 0) == [letter]
    assert await archive.dlq_count(2) == 0
    assert await consumer.archive(working) is True


async def test_d6_r5_a_dead_letter_can_be_replayed(admin, producer, consumer, clock) -> None:
    with Session(clock.engine) as session, session.begin():
        QueueService(session).queues.update("tasks", max_read_ct=1)
    id_ = await producer.enqueue({"n": 1})
    await consumer.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    assert await admin.dlq() == [id_]
    (letter,) = await (await admin.get_archive()).list_dlq_messages()
    archived_id = letter.id
    message = await producer.replay_dlq(archived_id)
    assert (message.id, message.payload, message.read_ct) == (id_, {"n": 1}, 1)
    (again,) = await consumer.dequeue()
    assert (again.id, again.read_ct) == (id_, 2)
    assert await consumer.archive(id_) is True
    assert await producer.replay_dlq(archived_id) is None
    # What was done is not replayed, and neither is what is in another queue.
    (done,) = await (await admin.get_archive()).list()
    assert await admin.replay_dlq(done.id) is None


async def test_d7_r10_purge_keeps_the_archive_and_the_workers(
    admin, producer, consumer, clock
) -> None:
    await producer.enqueue_batch(list(range(5)))
    (done,) = await consumer.dequeue()
    await consumer.archive(done.id)
    await consumer.dequeue()
    assert await admin.purge_queue("tasks") == 4
    metrics = await admin.queue_metrics("tasks")
    assert (metrics.live, metrics.archived) == (0, 1)
    assert await (await admin.get_workers()).count() == 2
    await producer.enqueue("goes on")


async def test_d7_r10_workers_are_purged_whatever_the_archive_says_of_them(
    admin, producer, consumer
) -> None:
    await producer.enqueue(1)
    (message,) = await consumer.dequeue()
    await consumer.archive(message.id)
    await consumer.close()
    await producer.close()
    assert await admin.purge_old_workers(0) == 2
    archive = await admin.get_archive()
    assert await archive.count_by_worker(consumer.worker_id) == 1
    await admin.verify()


async def test_d8_a_batch_of_a_hundred_works_with_the_defaults(producer, consumer) -> None:
    made = await producer.enqueue_batch([{"n": n} for n in range(100)])
    assert [entry.payload["n"] for entry in made] == list(range(100))
    assert [entry.id for entry in made] == sorted(entry.id for entry in made)
    assert len(await consumer.dequeue_batch(100)) == 100
    assert await producer.enqueue_batch([]) == []


async def test_d8_with_a_limit_a_batch_beyond_the_burst_is_let_through_and_paid_off(
    database, admin, monkeypatch
) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.validation = pgqrs.Validation(max_enqueue_per_second=200, max_enqueue_burst=50)
    moment = [1000.0]
    monkeypatch.setattr(producer_module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    async with pgqrs.Producer(config, "tasks", "h", 1) as producer:
        await producer.enqueue_batch(list(range(100)))
        with pytest.raises(pgqrs.RateLimited) as limited:
            await producer.enqueue_batch(list(range(100)))
        with pytest.raises(ValueError, match=r"items\[0\].payload is nan"):
            await producer.enqueue(float("nan"))  # told so, rather than to wait
        assert 0 < limited.value.retry_after <= 0.5
        assert producer.rate_limit_status().available == 0
        moment[0] += limited.value.retry_after  # the true wait
        await producer.enqueue_batch(list(range(100)))


async def test_d9_a_live_consumer_is_never_reclaimed_while_it_works(
    database, admin, producer, clock
) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.heartbeat_interval_seconds = 0.1
    consumer = pgqrs.Consumer(config, "tasks", "worker", 1)
    await producer.enqueue("slow")
    (message,) = await consumer.dequeue_delay(60)
    silence(clock, 3600)
    workers = await admin.get_workers()
    # It works, and calls nothing; and yet its heart beats.
    await until_awaited(lambda: clock.silent(consumer.worker_id) < 60, "its heart beats")
    assert await admin.reclaim_messages("tasks") == 0
    assert await admin.reclaim_messages("tasks", 60) == 0  # even by a strict measure
    assert (await workers.get(consumer.worker_id)).status == pgqrs.WorkerStatus.Ready
    assert await consumer.archive(message.id) is True
    await consumer.close()


async def test_d9_the_default_threshold_is_a_minute_not_five_seconds(
    admin, producer, consumer, clock
) -> None:
    await producer.enqueue("slow")
    await consumer.dequeue_delay(600)
    silence(clock, 55)
    assert await admin.reclaim_messages("tasks") == 0
    silence(clock, 65)
    assert await admin.reclaim_messages("tasks") == 1
    assert clock.metrics("tasks").ready == 1
    assert await producer.status() is pgqrs.WorkerStatus.Ready  # it had nothing to say, or hold
    assert await consumer.status() is pgqrs.WorkerStatus.Stopped
    silence(clock, 65)
    assert await admin.reclaim_messages("tasks", 60) == 0
    assert await producer.status() is pgqrs.WorkerStatus.Stopped  # as was asked for
    await producer.enqueue("it can still send")
    with pytest.raises(pgqrs.QueueNotFound):
        await admin.reclaim_messages("task")


async def test_r8_a_reclaimed_consumer_settles_nothing_and_goes_on_as_a_new_worker(
    admin, producer, consumer, clock
) -> None:
    id_ = await producer.enqueue("slow")
    await consumer.dequeue_delay(600)
    old = consumer.worker_id
    silence(clock, 65)
    await admin.reclaim_messages("tasks")
    assert await consumer.archive(id_) is False
    (again,) = await consumer.dequeue()
    assert (again.id, again.read_ct) == (id_, 2)
    workers = await admin.get_workers()
    assert consumer.worker_id != old
    assert (await workers.get(old)).status == pgqrs.WorkerStatus.Stopped
    assert await consumer.status() is pgqrs.WorkerStatus.Ready
    assert await consumer.archive(id_) is True


async def test_r8_a_consumer_whose_row_was_purged_goes_on_as_a_new_worker(
    admin, consumer, clock
) -> None:
    assert await consumer.dequeue() == []
    with clock.engine.begin() as connection:
        connection.execute(sa.delete(Worker))
    assert await consumer.dequeue() == []
    assert await consumer.status() is pgqrs.WorkerStatus.Ready


async def test_r8_a_consumer_that_is_suspended_or_stopped_itself_stays_so(admin, consumer) -> None:
    assert await consumer.dequeue() == []
    await consumer.suspend()
    with pytest.raises(pgqrs.WorkerNotReady, match="suspended"):
        await consumer.dequeue()
    await consumer.shutdown()
    with pytest.raises(pgqrs.WorkerNotReady, match="stopped"):
        await consumer.dequeue()
    assert await (await admin.get_workers()).count() == 1


async def test_r8_a_heartbeat_that_is_just_coming_in_spares_the_worker(
    admin, producer, consumer, clock
) -> None:
    await producer.enqueue("slow")
    await consumer.dequeue_delay(600)
    silence(clock, 65)
    with Session(clock.engine) as session:
        QueueService(session).workers.heartbeat(consumer.worker_id)  # not committed yet
        assert await admin.reclaim_messages("tasks") == 0
        session.commit()
    assert await admin.reclaim_messages("tasks") == 0
    assert await consumer.status() is pgqrs.WorkerStatus.Ready


async def test_d10_r3_a_restarted_process_registers_under_the_same_host_and_port(
    admin, producer
) -> None:
    await producer.enqueue(1)
    crashed = pgqrs.Consumer(admin, "tasks", "host", 3000)
    assert await crashed.dequeue_delay(0.05)
    restarted = pgqrs.Consumer(admin, "tasks", "host", 3000)
    beside = pgqrs.Producer(admin, "tasks", "host", 3000)
    await asyncio.sleep(0.1)
    assert len(await restarted.dequeue()) == 1
    await beside.enqueue(2)
    assert len({crashed.worker_id, restarted.worker_id, beside.worker_id}) == 3


async def test_r2_an_old_process_cannot_settle_what_its_successor_holds(admin, producer) -> None:
    id_ = await producer.enqueue(1)
    old = pgqrs.Consumer(admin, "tasks", "host", 3000)
    await old.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    new = pgqrs.Consumer(admin, "tasks", "host", 3000)
    await new.dequeue()
    assert await old.archive(id_) is False
    assert await old.delete(id_) is False
    assert await new.archive(id_) is True


async def test_r2_a_consumer_cannot_settle_by_a_lease_that_it_lost_to_itself(
    producer, consumer, clock
) -> None:
    id_ = await producer.enqueue(1)
    await consumer.dequeue_delay(0.05)
    first = consumer._leases.get(id_)
    await asyncio.sleep(0.1)
    await consumer.dequeue()
    consumer._leases.add([first], 1)
    assert await consumer.archive(id_) is False


async def test_a_consumer_holds_nothing_whose_lease_was_not_committed(
    admin, producer, consumer
) -> None:
    id_ = await producer.enqueue(1)
    other = pgqrs.Consumer(admin, "tasks", "other", 3001)
    await consumer.dequeue()  # registers it
    await consumer.release_messages([id_])

    def refuse(_connection) -> None:
        raise sa.exc.OperationalError("COMMIT", None, Exception("the connection is lost"))

    sa.event.listen(sa.Engine, "commit", refuse)
    try:
        with pytest.raises(sa.exc.OperationalError):
            await consumer.dequeue()
    finally:
        sa.event.remove(sa.Engine, "commit", refuse)
    (theirs,) = await other.dequeue()
    assert theirs.id == id_
    assert await consumer.archive(id_) is False
    assert await consumer.delete(id_) is False
    assert await consumer.extend_visibility(id_, 60) is False
    assert await consumer.release_messages([id_]) == 0
    assert await other.archive(id_) is True


async def test_d11_every_option_is_read(database, admin, clock) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.default_lock_time_seconds = 42
    config.default_max_batch_size = 3
    config.max_read_ct = 2
    config.max_connections = 2
    config.connection_timeout_seconds = 2
    async with pgqrs.Admin(config) as mine:
        await mine.create_queue("own")
        producer = pgqrs.Producer(mine, "own", "h", 1)
        consumer = pgqrs.Consumer(mine, "own", "h", 2)
        await producer.enqueue_batch([1, 2, 3, 4])
        begun = clock.now()
        taken = await consumer.dequeue_batch()
        assert len(taken) == 3
        lease = timedelta(seconds=42)
        assert all(begun + lease <= delivery.vt <= clock.now() + lease for delivery in taken)
        with pytest.raises(ValueError, match="default_max_batch_size=3"):
            await consumer.dequeue_batch(4)
        with Session(clock.engine) as session:
            assert QueueService(session).queues.get("own").max_read_ct == 2
        with pytest.raises(sa.exc.TimeoutError):
            await use_three_connections(mine)


async def use_three_connections(admin: pgqrs.Admin) -> None:
    async with admin._service() as item, admin._service() as two:
        await item.queues.list()
        await two.queues.list()
        await admin.get_queue("own")


async def test_d11_an_exhausted_message_is_counted_and_shown(
    admin, producer, consumer, clock
) -> None:
    with Session(clock.engine) as session, session.begin():
        QueueService(session).queues.update("tasks", max_read_ct=1)
    await producer.enqueue(1)
    await consumer.dequeue_delay(0.05)
    await asyncio.sleep(0.1)
    assert (await admin.queue_metrics("tasks")).exhausted == 1
    assert await consumer.dequeue() == []  # and nobody has to call dlq() for it
    metrics = await admin.queue_metrics("tasks")
    assert (metrics.exhausted, metrics.dead) == (0, 1)


async def test_d12_r6_times_are_the_databases_and_an_enqueue_is_one_statement(
    producer, clock
) -> None:
    await producer.heartbeat()
    with statements() as sent:
        await producer.enqueue_delayed(1, 3600)
    assert len(sent) == 1
    assert "statement_timestamp()" in sent[0]
    assert clock.delays() == [3600]


async def test_d12_r12_verify_looks_at_its_own_schema_and_nothing_is_set_on_a_connection(
    database, admin, clock
) -> None:
    with statements() as sent:
        async with pgqrs.Admin(database.dsn, schema="jobs") as jobs:
            with pytest.raises(pgqrs.SchemaVersionError, match="'jobs'"):
                await jobs.verify()  # the tables of the default schema are not meant
            await jobs.install()
            await jobs.verify()
            await jobs.create_queue("only-here")
            await pgqrs.Producer(jobs, "only-here", "h", 1).enqueue(1)
            assert await (await jobs.get_messages()).count() == 1
        async with pgqrs.Admin(database.dsn, schema="more") as more:
            await more.install()  # shares nothing with the other, types included
            await jobs.uninstall()
            await more.verify()
            await jobs.close()
    assert not [item for item in sent if item.lstrip().upper().startswith("SET ")]
    assert await (await admin.get_messages()).count() == 0


async def test_d12_r9_delete_queue_looks_at_workers_in_its_own_transaction(
    database, producer, consumer
) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.max_connections = 1  # enough
    await consumer.dequeue()
    await producer.heartbeat()
    async with pgqrs.Admin(config) as admin:
        with pytest.raises(pgqrs.QueueInUse):
            await admin.delete_queue("tasks")
        await producer.enqueue(1)
        await consumer.close()
        await producer.close()
        with pytest.raises(pgqrs.QueueNotEmpty):
            await admin.delete_queue("tasks")
        await admin.purge_queue("tasks")
        await admin.delete_queue("tasks")
        assert not await (await admin.get_queues()).exists("tasks")


async def test_d12_worker_statistics_take_as_many_statements_for_many_workers(admin) -> None:
    async def measure() -> int:
        with statements() as sent:
            await admin.worker_stats("tasks")
            await admin.worker_health_stats(group_by_queue=True)
        return len(sent)

    for _ in range(2):
        await pgqrs.Consumer(admin, "tasks", "h", 1).heartbeat()
    few = await measure()
    for _ in range(20):
        await pgqrs.Consumer(admin, "tasks", "h", 1).heartbeat()
    assert await measure() == few
    assert (await admin.worker_stats("tasks")).total == 22


async def test_d13_releasing_charges_no_attempt(producer, consumer) -> None:
    id_ = await producer.enqueue(1)
    for attempt in range(1, 10):  # more than the five that it has
        (message,) = await consumer.dequeue()
        assert message.read_ct == attempt
        assert await consumer.release_messages([id_, id_ + 1]) == 1
    assert await consumer.release_messages([id_]) == 0


async def test_d13_a_graceful_end_gives_leases_back_uncharged(admin, producer, clock) -> None:
    ids = [item.id for item in await producer.enqueue_batch([1, 2])]
    async with pgqrs.Consumer(admin, "tasks", "h", 1) as consumer:
        await consumer.dequeue_batch_with_delay(2, 600)
        with clock.puts_off(ids[1], 300):
            await consumer.extend_visibility(ids[1], 300)  # it keeps its time
            vt = clock.vts()[ids[1]]
    assert clock.visible("tasks") == [ids[0]]
    assert clock.vts()[ids[1]] == vt
    with Session(clock.engine) as session:
        freed = session.get_one(Message, ids[0])
        assert (freed.dequeued_at, freed.max_read_ct) == (None, 6)
    assert await consumer.status() is pgqrs.WorkerStatus.Stopped


async def test_d13_a_failure_can_be_told_with_backoff_and_its_error(producer, clock) -> None:
    id_ = await producer.enqueue(1)
    with clock.puts_off(id_, 8, 12), Session(clock.engine) as session, session.begin():
        service = QueueService(session)
        (delivery,) = service.dequeue("tasks")
        service.fail(delivery, ValueError("no such address"))
    with Session(clock.engine) as session:
        assert session.get_one(Message, id_).last_error == "ValueError: no such address"


@pytest.mark.parametrize("payload", [["a", "list"], "a scalar", None, {"b": 1}])
async def test_d14_required_keys_are_required_of_every_payload(database, admin, payload) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.validation = pgqrs.Validation(required_keys=("a",))
    async with pgqrs.Producer(config, "tasks", "h", 1) as producer:
        with pytest.raises(pgqrs.PayloadError):
            await producer.enqueue(payload)
        with pytest.raises(pgqrs.PayloadError, match=r"items\[1\].payload"):
            await producer.enqueue_batch([{"a": 1}, payload])
        await producer.enqueue({"a": None})
    assert await (await admin.get_messages()).count() == 1


async def test_d14_big_integers_keep_their_value(producer, consumer) -> None:
    await producer.enqueue({"n": 2**80 + 1})
    (message,) = await consumer.dequeue()
    assert message.payload == {"n": 2**80 + 1}


async def test_d14_archive_says_whether_it_did(producer, consumer) -> None:
    ids = [item.id for item in await producer.enqueue_batch([1, 2, 3])]
    await consumer.dequeue_batch(2)
    assert await consumer.archive(ids[0]) is True
    assert await consumer.archive(ids[0]) is False
    assert await consumer.archive_batch([ids[2], ids[1], ids[0], ids[1]]) == [
        False,
        True,
        False,
        False,
    ]


async def test_r11_the_archive_has_a_retention(producer, consumer, clock) -> None:
    await producer.enqueue(1)
    (message,) = await consumer.dequeue()
    await consumer.archive(message.id)
    with Session(clock.engine) as session, session.begin():
        service = QueueService(session)
        assert service.archived.prune() == 0
        service.queues.update("tasks", retention=0)
        session.flush()
    with Session(clock.engine) as session, session.begin():
        assert QueueService(session).archived.prune() == 1


async def test_r13_failures_are_told_apart(database, admin, producer) -> None:
    with pytest.raises(pgqrs.QueueNotFound, match="did you mean 'tasks'") as missing:
        await admin.get_queue("task")
    assert isinstance(missing.value, ValueError)
    assert missing.value.suggestions == ("tasks",)
    with pytest.raises(pgqrs.QueueExists, match="already exists") as taken:
        await admin.create_queue("tasks")
    assert isinstance(taken.value, RuntimeError)
    with pytest.raises(pgqrs.WorkerNotFound) as unknown:
        await (await admin.get_workers()).get(999)
    assert isinstance(unknown.value, ValueError)
    with pytest.raises(pgqrs.MessageNotFound) as gone:
        await (await admin.get_archive()).get(999)
    assert isinstance(gone.value, RuntimeError)
    with pytest.raises(pgqrs.DelayError):
        await producer.enqueue_delayed(1, -1)
    with pytest.raises(sa.exc.OperationalError):
        await pgqrs.Admin("postgresql://localhost:1/none").verify()


async def test_r14_the_default_limits_surprise_nobody(producer) -> None:
    deep: list = []
    for _ in range(20):
        deep = [deep]
    await producer.enqueue({"text": "x" * 100_000, "deep": deep, "constructor": 1})
    await asyncio.gather(*(producer.enqueue(n) for n in range(120)))


async def test_a_consumer_forgets_what_is_long_over(producer, consumer, monkeypatch) -> None:
    from pgqrs_sa.pgqrs import consumer as module

    await producer.enqueue_batch([1, 2])
    await consumer.dequeue_delay(0.05)
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    consumer._leases._pruned_at -= 2
    await asyncio.sleep(0.1)
    (second,) = await consumer.dequeue()
    assert len(consumer._leases) == 1
    assert await consumer.archive(second.id)
    assert len(consumer._leases) == 0


async def test_archive_lists_begin_with_the_newest_a_page_at_a_time(admin, producer, consumer):
    ids = [message.id for message in await producer.enqueue_batch(list(range(5)))]
    taken = await consumer.dequeue_batch(5)
    assert await consumer.archive_batch([message.id for message in taken]) == [True] * 5
    archive = await admin.get_archive()
    first = [item.original_msg_id for item in await archive.list(2, 0)]
    second = [item.original_msg_id for item in await archive.list(2, 2)]
    assert sorted(first + second, reverse=True) == sorted(ids, reverse=True)[:4]
    assert max(second) < min(first)
    with pytest.raises(ValueError, match="offset"):
        await archive.list(1, -1)

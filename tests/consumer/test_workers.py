"""The consumer in the register of workers; what it refuses to begin with; and tidying up."""

from __future__ import annotations

import logging
import os
import socket
import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    Consumer,
    InvalidArgument,
    PoolTooSmall,
    QueueNotFound,
    QueueService,
    ReadOnlyDatabase,
    SchemaVersionError,
)
from support.consumers import Ear, effect
from support.waiting import PATIENCE, until


def manage(kit, work):
    """Do something with the register of workers."""
    with Session(kit.engine) as session, session.begin():
        return work(QueueService(session).workers)


def nothing(_session, _delivery):
    """Do no work."""


# -------------------------------------------------------------------------------- the register


def test_a_run_is_a_row_that_says_who_it_is_and_that_it_lives(kit):
    kit.queue("other")
    consumer = kit.consumer(name="shop", version="1.2.3")
    consumer.on("mail")(nothing)
    consumer.on("other")(nothing)
    consumer.start()
    (row,) = kit.workers()
    assert (row.name, row.version, row.status) == ("shop", "1.2.3", "ready")
    assert (row.hostname, row.pid) == (socket.gethostname(), os.getpid())
    assert row.queues == ["mail", "other"]
    until(lambda: kit.workers()[0].heartbeat_at > row.heartbeat_at, "its heart beats")
    assert consumer.stop() == 0
    (row,) = kit.workers()
    assert row.status == "stopped"
    assert row.shutdown_at is not None


def test_a_consumer_reports_what_it_holds_with_its_heartbeat(kit):
    def leases():
        return [item.leases for item in manage(kit, lambda workers: workers.health())]

    consumer = kit.consumer(heartbeat=0.05)
    go = threading.Event()

    @consumer.on("mail")
    def handler(_session, _delivery):
        kit.wait(go)

    consumer.start()
    assert leases() == [0]
    kit.send(1, 2, 3)
    until(lambda: leases() == [3], "it reports what its handlers work on")
    go.set()
    until(lambda: leases() == [0], "it reports that it holds nothing")
    assert consumer.stop() == 0


def test_each_run_is_a_row_of_its_own(threads):
    consumer = threads.consumer()
    consumer.on("mail")(nothing)
    assert consumer.run() == consumer.run() == 0
    assert [(worker.id, worker.status) for worker in threads.workers()] == [
        (1, "stopped"),
        (2, "stopped"),
    ]


def test_the_worker_is_the_holder_and_the_producer_of_what_it_does(threads):
    threads.queue("next")
    (id_,) = threads.send({})
    consumer = threads.consumer()

    def handler(service: QueueService) -> None:
        service.enqueue("next", {})

    consumer.consumer.on("mail")(handler)
    assert consumer.run() == 0
    assert threads.archive()[id_].consumer_worker_id == 1
    assert threads.sql("SELECT producer_worker_id FROM pgqrs_messages") == [(1,)]


def test_a_suspended_consumer_leases_nothing_until_it_is_resumed(kit):
    consumer = kit.consumer()
    done = []

    @consumer.on("mail")
    def handler(_session, delivery):
        done.append(delivery.id)

    consumer.start()
    (first,) = kit.send({})
    until(kit.archive, "the first is done")
    manage(kit, lambda workers: workers.suspend(1))
    (second,) = kit.send({})
    before = kit.workers()[0].heartbeat_at
    until(lambda: kit.workers()[0].heartbeat_at > before, "it lives on")
    assert kit.live()[second].read_ct == 0
    manage(kit, lambda workers: workers.resume(1))
    until(lambda: second in kit.archive(), "the second is done")
    assert consumer.stop() == 0
    assert done == [first, second]


def test_a_suspended_consumer_still_finishes_what_it_has(threads):
    (id_,) = threads.send({})
    consumer = threads.consumer()
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=5)
    def handler(session, delivery):
        begun.set()
        assert go.wait(PATIENCE)
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    manage(threads, lambda workers: workers.suspend(1))
    before = threads.live()[id_].leased_until
    until(lambda: threads.live()[id_].leased_until > before, "its lease is renewed")
    go.set()
    until(threads.archive, "it is archived")
    assert consumer.stop() == 0
    assert threads.effects() == [(id_, 1)]


@pytest.mark.parametrize("how", ["reclaimed", "deleted"])
def test_a_consumer_that_was_taken_for_dead_registers_anew_and_goes_on(kit, how):
    (id_,) = kit.send({})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear], heartbeat=0.2)
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        if delivery.read_ct == 1:
            begun.set()
            kit.wait(go)

    consumer.start()
    assert begun.wait(PATIENCE)
    if how == "reclaimed":
        with Session(kit.engine) as session, session.begin():  # no heartbeat comes in between
            silent = "UPDATE pgqrs_workers SET heartbeat_at = now() - interval '1 day'"
            session.execute(sa.text(silent))
            assert QueueService(session).workers.reclaim() == 1
    else:
        kit.sql(
            "WITH gone AS (DELETE FROM pgqrs_workers RETURNING id)"
            " UPDATE pgqrs_messages SET leased_until = now() WHERE id = :id",
            id=id_,
        )
    until(lambda: 2 in [worker.id for worker in kit.workers()], "it registers again")
    until(lambda: id_ in kit.archive(), "the message is done by the new one")
    go.set()
    until(lambda: not consumer.runtime.busy, "the first attempt has ended")
    assert consumer.stop() == 0
    assert kit.effects() == [(id_, 2)]
    assert kit.archive()[id_].consumer_worker_id == 2
    names = ["on_start", "on_lease_lost", "on_start", "on_success"]
    assert sorted(ear.names()) == sorted(names)
    assert kit.workers()[-1].status == "stopped"


# ------------------------------------------------------------------------------- refusals


def test_a_pool_that_is_too_small_is_refused_with_both_numbers(kit):
    engine = kit.app_engine(pool_size=2, max_overflow=1)
    consumer = kit.consumer(engine=engine, concurrency=5)
    consumer.on("mail")(nothing)
    with pytest.raises(PoolTooSmall) as refused:
        consumer.run()
    needed = 5 if kit.is_async else 7  # tasks: the consumer's own are outside the pool
    assert (refused.value.available, refused.value.needed) == (3, needed)
    assert "at most 3 connection(s)" in str(refused.value)
    assert f"needs {needed}" in str(refused.value)
    assert kit.workers() == []


def test_a_pool_of_the_needed_size_is_enough(kit):
    ids = kit.send(*range(20))
    size = 2 if kit.is_async else 4
    engine = kit.app_engine(pool_size=size, max_overflow=0, pool_timeout=PATIENCE)
    consumer = kit.consumer(engine=engine, concurrency=2)
    consumer.on("mail")(effect)
    assert consumer.run() == 0
    assert sorted(kit.effects()) == [(id_, 1) for id_ in ids]


def test_handlers_without_a_session_need_no_connection(threads):
    threads.send(1)
    consumer = threads.consumer(
        engine=threads.app_engine(pool_size=2, max_overflow=0), concurrency=9
    )
    consumer.on("mail", session=False)(nothing)
    assert consumer.run() == 0


@pytest.mark.parametrize("how", ["engine", "option", "driver"])
def test_an_engine_in_autocommit_is_refused_for_a_handler_with_a_session(kit, how):
    """Or its effects would be there once for each attempt."""
    (id_,) = kit.send({})

    def made():
        if how == "option":
            return kit.app_engine().execution_options(isolation_level="AUTOCOMMIT")
        if how == "engine":
            return kit.app_engine(isolation_level="AUTOCOMMIT")
        return kit.app_engine(connect_args={"autocommit": True})

    if how == "driver" and kit.driver == "asyncpg":
        pytest.skip("the driver has no such setting")
    for begin in (lambda item: item.run(), lambda item: kit.call(item.consumer.check)):
        consumer = kit.consumer(engine=made())
        consumer.on("mail")(effect)
        with pytest.raises(InvalidArgument, match=r"AUTOCOMMIT, and .* takes a session"):
            begin(consumer)
    assert (kit.effects(), list(kit.live()), kit.workers()) == ([], [id_], [])

    without = kit.consumer(engine=made())
    without.on("mail", session=False)(nothing)
    assert without.run() == 0
    assert kit.outcomes() == {id_: "archived"}


@pytest.mark.skipif(sa.__version__ < "2.1", reason="a sessionmaker takes no such options")
def test_a_sessionmaker_in_autocommit_is_refused_for_a_handler_with_a_session(kit):
    (id_,) = kit.send({})
    options = {"execution_options": {"isolation_level": "AUTOCOMMIT"}}
    for begin in (lambda item: item.run(), lambda item: kit.call(item.consumer.check)):
        consumer = kit.consumer(maker=kit.maker(kit.app_engine(), **options))
        consumer.on("mail")(effect)
        with pytest.raises(InvalidArgument, match=r"AUTOCOMMIT, and .* takes a session"):
            begin(consumer)
    assert (kit.effects(), list(kit.live()), kit.workers()) == ([], [id_], [])

    without = kit.consumer(maker=kit.maker(kit.app_engine(), **options))
    without.on("mail", session=False)(nothing)
    assert without.run() == 0
    assert kit.outcomes() == {id_: "archived"}


def test_a_session_that_turns_out_to_be_in_autocommit_ends_the_consumer(kit):
    """No handler is called with it, and no attempt is charged."""
    (id_,) = kit.send({})
    engine, made = kit.app_engine(), []
    good = kit.maker(engine)
    bad = kit.maker(engine.execution_options(isolation_level="AUTOCOMMIT"))

    def factory():
        made.append(None)  # two are asked for at the start, the third is for the handler
        return (good if len(made) < 3 else bad)()

    consumer = kit.consumer(maker=factory)
    consumer.on("mail")(effect)
    with pytest.raises(InvalidArgument, match=r"AUTOCOMMIT, and .* takes a session"):
        consumer.run(until_empty=False)
    assert kit.effects() == []
    row = kit.live()[id_]
    assert (row.max_read_ct - row.read_ct, row.dequeued_at, row.last_error) == (5, None, None)
    assert [worker.status for worker in kit.workers()] == ["stopped"]


def test_a_database_that_is_set_to_read_only_is_refused_at_the_start(kit):
    kit.sql("ALTER DATABASE " + kit.engine.url.database + " SET default_transaction_read_only = on")
    try:
        consumer = kit.consumer()
        consumer.on("mail")(nothing)
        with pytest.raises(ReadOnlyDatabase, match="is set to read only"):
            consumer.run()
        with pytest.raises(ReadOnlyDatabase):
            kit.call(consumer.consumer.check)
    finally:
        with kit.engine.connect() as connection:
            connection.execute(sa.text("SET default_transaction_read_only = off"))
            connection.commit()
            connection.execute(
                sa.text(
                    f"ALTER DATABASE {kit.engine.url.database} RESET default_transaction_read_only"
                )
            )
            connection.commit()
            connection.invalidate()


def test_a_database_without_the_tables_is_refused(kept_empty):
    engine = sa.create_engine(kept_empty.url)
    consumer = Consumer(sessionmaker(engine))
    consumer.on("mail")(lambda delivery: None)
    with pytest.raises(SchemaVersionError, match=r"alembic upgrade head|pgqrs_upgrade"):
        consumer.run()
    engine.dispose()


def test_a_queue_that_is_not_there_is_refused_with_the_names_that_come_close(kit):
    consumer = kit.consumer()
    consumer.on("mial")(nothing)
    with pytest.raises(QueueNotFound, match="did you mean 'mail'"):
        consumer.run()
    assert kit.workers() == []


def test_a_consumer_without_handlers_is_refused(kit):
    with pytest.raises(InvalidArgument, match="has no handler"):
        kit.consumer().run()


async def test_a_session_bound_to_one_connection_is_refused(async_engine, threads):
    with threads.engine.connect() as connection:
        consumer = Consumer(sessionmaker(connection))
        consumer.on("mail")(lambda delivery: None)
        with pytest.raises(InvalidArgument, match="bound to one connection"):
            consumer.run()
    async with async_engine.connect() as connection:
        awaiting = AsyncConsumer(async_sessionmaker(connection))

        async def handler(delivery):
            pass

        awaiting.on("mail")(handler)
        with pytest.raises(InvalidArgument, match="bound to one connection"):
            await awaiting.run()


def test_a_sessionmaker_of_the_other_kind_is_refused(async_engine, threads):
    with pytest.raises(InvalidArgument, match="for AsyncConsumer"):
        Consumer(async_sessionmaker(async_engine))
    with pytest.raises(InvalidArgument, match="for Consumer"):
        AsyncConsumer(sessionmaker(threads.engine))


def test_a_consumer_that_works_is_not_started_again(kit):
    consumer = kit.consumer()
    consumer.on("mail")(nothing)
    consumer.start()
    with pytest.raises(InvalidArgument, match="works already"):
        kit.call(consumer.consumer.start)
    assert consumer.stop() == 0


def test_a_check_says_how_long_leases_last_and_leaves_nothing_behind(kit):
    consumer = kit.consumer()
    consumer.on("mail")(nothing)
    (lease,) = kit.call(consumer.consumer.check).values()
    assert lease.total_seconds() == 30
    assert kit.workers() == []


# ------------------------------------------------------------------------------ deleted queues


def delete(kit, queue):
    with Session(kit.engine) as session, session.begin():
        QueueService(session).queues.delete(queue, force=True)


def test_a_queue_that_is_deleted_is_left_and_the_others_go_on(kit, caplog):
    kit.queue("other")
    consumer = kit.consumer()
    consumer.on("mail")(effect)
    consumer.on("other")(nothing)
    consumer.start()
    delete(kit, "other")
    until(lambda: "there is no queue 'other'" in caplog.text, "it is said")
    (id_,) = kit.send({})
    until(lambda: id_ in kit.archive(), "the other queue's message is done")
    assert consumer.stop() == 0


def test_when_the_last_queue_is_deleted_the_run_ends_with_an_error(kit):
    consumer = kit.consumer()
    consumer.on("mail")(nothing)
    consumer.start()
    delete(kit, "mail")
    with pytest.raises(QueueNotFound, match="mail"):
        consumer.result()
    assert kit.workers()[0].status == "stopped"


# -------------------------------------------------------------------------------- tidying up


def test_a_consumer_takes_back_what_the_dead_hold_and_buries_and_prunes(kit):
    kit.queue("kept", retention=3600)
    kit.queue("other")
    dead, exhausted = kit.send("dead", "exhausted", queue="other")
    kit.send(1, 2, queue="kept")
    kit.sql(
        "INSERT INTO pgqrs_workers (name, hostname, heartbeat_at) VALUES ('gone', 'x',"
        " now() - interval '1 day')"
    )
    kit.sql(
        "UPDATE pgqrs_messages SET read_ct = 1, max_read_ct = 5, dequeued_at = now(),"
        " consumer_worker_id = 1, leased_until = now() + interval '1 day' WHERE id = :id",
        id=dead,
    )
    kit.sql(
        "UPDATE pgqrs_messages SET read_ct = 1, max_read_ct = 1, dequeued_at = now(),"
        " leased_until = now() WHERE id = :id",
        id=exhausted,
    )
    with Session(kit.engine) as session, session.begin():
        service = QueueService(session)
        for delivery in service.dequeue("kept", 2):
            service.archive(delivery)
    kit.sql("UPDATE pgqrs_archive SET archived_at = now() - interval '2 hours'")
    consumer = kit.consumer(housekeeping=0.05)
    consumer.on("mail")(nothing)
    consumer.on("other")(nothing)
    manage(kit, lambda workers: None)
    consumer.start()
    until(lambda: kit.workers()[0].status == "stopped", "the dead worker is stopped")
    until(lambda: set(kit.outcomes()) == {dead, exhausted}, "all is tidied up")
    assert consumer.stop() == 0
    assert kit.outcomes() == {dead: "archived", exhausted: "dead"}
    assert kit.archive()[dead].read_ct == 2


def test_only_one_tidies_up_at_a_time(threads):
    threads.sql(
        "INSERT INTO pgqrs_workers (name, hostname, heartbeat_at) VALUES ('gone', 'x',"
        " now() - interval '1 day')"
    )
    lock = "SELECT pg_try_advisory_xact_lock(hashtext('pgqrs:housekeeping:pgqrs_messages'))"
    consumer = threads.consumer(housekeeping=0.02)
    consumer.on("mail")(nothing)
    with threads.engine.begin() as other:
        assert other.execute(sa.text(lock)).scalar_one()
        consumer.start()
        before = threads.workers()[1].heartbeat_at
        until(lambda: threads.workers()[1].heartbeat_at > before, "it lives")
        assert threads.workers()[0].status == "ready"
    until(lambda: threads.workers()[0].status == "stopped", "now it tidies up")
    assert consumer.stop() == 0


def test_tidying_up_that_is_denied_does_no_harm(threads, caplog):
    """A consumer's role may be allowed no more than its work."""
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    user = threads.engine.url.username
    (id_,) = threads.send({})
    threads.sql("CREATE ROLE tester NOLOGIN")
    try:
        threads.sql(f"GRANT tester TO {user}")
        threads.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO tester")
        threads.sql("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO tester")
        threads.sql("REVOKE DELETE ON pgqrs_workers, pgqrs_archive FROM tester")
        engine = threads.app_engine(connect_args={"options": "-c role=tester"})
        consumer = threads.consumer(engine=engine, housekeeping=0.02)
        consumer.on("mail")(effect)
        consumer.start()
        until(lambda: "tidying up was not possible" in caplog.text, "it is denied")
        until(lambda: id_ in threads.archive(), "its work goes on")
        assert consumer.stop() == 0
    finally:
        threads.sql("DROP OWNED BY tester")
        threads.sql("DROP ROLE tester")
    assert not [record for record in caplog.records if record.levelno > logging.INFO]

"""Consumers of the same process hear of what it has committed, and of nothing else."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncQueueService, Item, Message, QueueService
from pgqrs_sa._core import commits, wakeup
from support.cases import each_case


@pytest.fixture(autouse=True)
def _mail(engine):
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        for name in ("mail", "post"):
            service.queues.create(name)


@pytest.fixture
def emptied_again(engine):
    """Return what deletes all messages: see `each_case`."""

    def empty():
        with engine.begin() as connection:
            connection.execute(sa.delete(Message))

    return empty


def enqueue(session, queue="mail"):
    QueueService(session).enqueue(queue, 1)


def enqueue_many(session, queue="mail"):
    QueueService(session).enqueue_many(queue, [1, Item(2, key="k"), Item(3, delay=60)])


def enqueue_from(session, queue="mail"):
    QueueService(session).enqueue_from(queue, sa.select(sa.literal(1)))


def add(session, queue="mail"):
    session.add(Message(queue_name=queue, payload=1))


def add_by_id(session, queue="mail"):
    session.add(Message(queue_id=QueueService(session).queues.get(queue).id, payload=1))


WAYS = [enqueue, enqueue_many, enqueue_from, add, add_by_id]


@each_case("put", WAYS, before="emptied_again")
def test_subscribers_hear_of_it_after_the_commit(engine, woken, put):
    with Session(engine) as session:
        put(session)
        session.flush()
        assert woken.take() == []
        session.commit()
        assert woken.take() == ["mail"]
        put(session, "post")  # the same session, once more
        session.commit()
        assert woken.take() == ["post"]
        session.commit()
        assert woken.take() == []


@each_case("put", WAYS, before="emptied_again")
async def test_an_async_session_is_no_different(async_engine, woken, put):
    async with AsyncSession(async_engine) as session:
        await session.run_sync(put)
        await session.flush()
        assert woken.take() == []
        await session.commit()
        assert woken.take() == ["mail"]
        await session.run_sync(put, "post")
        await session.rollback()
        await session.commit()
        assert woken.take() == []


async def test_the_awaited_service_wakeups(async_engine, woken):
    async with AsyncSession(async_engine) as session, session.begin():
        await AsyncQueueService(session).enqueue("mail", 1)
    assert woken.take() == ["mail"]


def test_the_message_is_there_when_the_wake_comes(engine):
    seen = []

    def look(queue):
        with Session(engine) as other:
            seen.append(other.scalar(sa.select(sa.func.count()).select_from(Message)))

    unsubscribe = wakeup.subscribe(look)
    with Session(engine) as session, session.begin():
        enqueue(session)
    unsubscribe()

    assert seen == [1]


def test_each_queue_is_named_once_a_transaction(engine, woken):
    with Session(engine) as session, session.begin():
        for put in (*WAYS, enqueue, add):
            put(session)
            if put is not enqueue_many:
                put(session, "post")

    assert sorted(woken.take()) == ["mail", "post"]


def test_what_waits_for_its_time_and_what_was_there_already_is_not_named(engine, woken):
    with Session(engine) as session:
        service = QueueService(session)
        service.enqueue("mail", 1, delay=60, key="k")
        service.enqueue_many("mail", [Item(1, delay=60)])
        session.add(Message(queue_name="mail", payload=1, delay=60))
        session.commit()
        assert woken.take() == []
        assert service.enqueue("mail", 1, key="k").duplicate
        service.enqueue_many("mail", [Item(1, key="k")])
        assert service.enqueue_from("mail", sa.select(sa.literal(1)).where(sa.false())) == 0
        session.commit()
        assert woken.take() == []
        # Whether a time has come is for the database's clock: here it is named.
        service.enqueue("mail", 1, at=datetime.now(UTC) - timedelta(seconds=1))
        session.commit()
        assert woken.take() == ["mail"]


def test_what_is_made_visible_by_hand_is_named(engine, woken):
    with Session(engine) as session:
        service = QueueService(session)
        waiting = service.enqueue("mail", 1, delay=60)
        service.enqueue("post", 1)
        service.archive(service.dequeue("post")[0])
        session.commit()
        woken.take()
        service.messages.reschedule(waiting.id, delay=30)
        session.commit()
        assert woken.take() == []
        service.messages.reschedule(waiting.id, delay=0)
        session.commit()
        assert woken.take() == ["mail"]
        service.archived.requeue(service.archived.find("post")[0].id)
        session.commit()
        assert woken.take() == ["post"]


def release(service, delivery):
    service.release(delivery)


def fail_at_once(service, delivery):
    service.fail(delivery, "broken", delay=0)


def reclaim(service, delivery):
    service.workers.release_leases(delivery.worker_id)


@each_case("give_back", [release, fail_at_once, reclaim], before="emptied_again")
def test_what_is_given_back_at_once_is_named(engine, woken, give_back):
    with Session(engine) as session:
        service = QueueService(session)
        worker = service.workers.register("w")
        service.enqueue("mail", 1)
        (delivery,) = service.dequeue("mail", worker=worker)
        session.commit()
        woken.take()
        give_back(service, delivery)
        assert woken.take() == []
        session.commit()
        assert woken.take() == ["mail"]


def test_what_is_given_back_for_later_is_not_named(engine, woken):
    with Session(engine) as session:
        service = QueueService(session)
        service.enqueue_many("mail", [1, 2, 3])
        first, second, third = service.dequeue("mail", 3)
        session.commit()
        woken.take()
        service.release(first, delay=60)
        service.fail(second, "broken", delay=timedelta(minutes=1))
        service.fail(third, "broken")
        session.commit()
        assert woken.take() == []


def test_a_queue_that_is_resumed_is_named(engine, woken):
    with Session(engine) as session:
        QueueService(session).queues.pause("mail")
        session.commit()
        assert woken.take() == []
        QueueService(session).queues.resume("mail")
        session.commit()
        assert woken.take() == ["mail"]


def test_nobody_asks_the_database_for_a_name_when_nobody_has_subscribed(engine):
    executed = []
    with Session(engine) as session:
        service = QueueService(session)
        waiting = service.enqueue("mail", 1, delay=60)
        session.commit()
        sa.event.listen(engine, "before_cursor_execute", lambda *a: executed.append(a[2]))
        service.messages.reschedule(waiting.id, delay=0)
        session.commit()

    assert len(executed) == 1


@each_case("put", WAYS)
@each_case("end", [Session.rollback, Session.close, Session.reset], before="emptied_again")
def test_without_a_commit_it_is_forgotten(engine, woken, put, end):
    with Session(engine) as session:
        put(session)
        session.flush()
        end(session)
        session.execute(sa.text("SELECT 1"))
        session.commit()

    assert woken.take() == []


def test_a_session_that_was_left_behind_is_forgotten(engine, woken):
    session = Session(engine)
    enqueue(session)
    session.connection().invalidate()  # or its connection would be missed in the pool
    del session
    gc.collect()
    with Session(engine) as session, session.begin():
        session.execute(sa.text("SELECT 1"))

    assert woken.take() == []


def test_a_commit_that_fails_wakeups_nobody(engine, woken):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE IF NOT EXISTS picky (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
        )
    with Session(engine) as session:
        enqueue(session)
        session.execute(sa.text("INSERT INTO picky VALUES (1), (1)"))
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        session.commit()

    assert woken.take() == []


@each_case("put", [enqueue, add])
@each_case(
    ("steps", "committed"),
    [
        ("( put )", ["mail"]),
        ("put ( put !", ["mail"]),
        ("put ( post ) ", ["mail", "post"]),
        ("put ( post !", ["mail", "post"]),  # one too many is harmless, one too few is not
        ("( post ! put", ["mail", "post"]),
        ("( ( put ) )", ["mail"]),
        ("( ( put ! )", ["mail"]),
        ("( ( put ) ( ! ) ( )", ["mail"]),
    ],
    before="emptied_again",
)
def test_nothing_is_lost_to_savepoints_and_nothing_comes_before_the_commit(
    engine, woken, put, steps, committed
):
    with Session(engine) as session:
        open_ = []
        for step in steps.split():
            if step == "(":
                open_.append(session.begin_nested())
            elif step == ")":
                open_.pop().commit()
            elif step == "!":
                open_.pop().rollback()
            else:
                put(session, "post" if step == "post" else "mail")
                session.flush()
            assert woken.take() == []
        session.commit()
        got = woken.take()
        # What was undone may be missing or there; what is committed is named, and once.
        assert set(got) <= set(committed)
        assert len(got) == len(set(got))
        with engine.connect() as connection:
            for name in connection.execute(
                sa.text(
                    "SELECT DISTINCT queue_name FROM pgqrs_messages m "
                    "JOIN pgqrs_queues q ON q.id = queue_id"
                )
            ).scalars():
                assert name in got


def test_a_commit_that_releases_open_savepoints_names_all(engine, woken):
    with Session(engine) as session:
        enqueue(session)
        session.begin_nested()
        enqueue(session, "post")
        session.commit()
        assert sorted(woken.take()) == ["mail", "post"]
        session.begin_nested()
        enqueue(session)
        session.rollback()
        session.commit()
        assert woken.take() == []


def test_a_failed_flush_in_a_savepoint_loses_nothing(engine, woken):
    with Session(engine) as session, session.begin():
        enqueue(session)
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            session.execute(sa.text("INSERT INTO pgqrs_queues (queue_name) VALUES ('mail')"))
        add(session, "post")

    assert sorted(woken.take()) == ["mail", "post"]


# ------------------------------------------------------------ sessions on a given connection


@each_case("mode", ["conditional_savepoint", "rollback_only", "create_savepoint"])
@each_case("ending", ["commit", "close"], before="emptied_again")
def test_a_session_that_was_joined_to_a_transaction_waits_for_its_commit(
    engine, woken, mode, ending
):
    with engine.connect() as connection:
        with connection.begin():
            with Session(connection, join_transaction_mode=mode) as session:
                enqueue(session)
                if ending == "commit":
                    session.commit()
            assert woken.take() == []
        # A session that closes its own savepoint has undone it, and may be named all the same.
        kept = ending == "commit" or mode != "create_savepoint"
        assert woken.take() == ["mail"] or not kept
        with connection.begin():
            connection.execute(sa.text("SELECT 1"))
        assert woken.take() == []


@each_case(
    "mode", ["conditional_savepoint", "rollback_only", "create_savepoint"], before="emptied_again"
)
def test_a_joined_transaction_that_is_rolled_back_names_nothing(engine, woken, mode):
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            enqueue(session)
            session.commit()
        outer.rollback()
        with connection.begin():
            connection.execute(sa.text("SELECT 1"))

    assert woken.take() == []


def test_a_transaction_that_is_committed_beneath_a_session_names_all(engine, woken):
    with engine.connect() as connection, Session(connection) as session:
        for _ in range(2):
            outer = connection.begin() if not connection.in_transaction() else None
            enqueue(session)
            (outer or connection).commit()
            assert woken.take() == ["mail"]


@each_case("mode", ["conditional_savepoint", "control_fully"], before="emptied_again")
def test_a_session_whose_connection_is_given_but_idle_commits_by_itself(engine, woken, mode):
    with engine.connect() as connection:
        if mode == "control_fully":
            connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            enqueue(session)
            session.commit()
            assert "mail" in woken.take()
        assert not connection.in_transaction()


async def test_an_async_session_may_be_joined_as_well(async_engine, woken):
    async with async_engine.connect() as connection:
        async with connection.begin():
            async with AsyncSession(connection) as session:
                await AsyncQueueService(session).enqueue("mail", 1)
                await session.commit()
            assert woken.take() == []
        assert woken.take() == ["mail"]


def test_a_connection_is_not_kept_for_it(engine, woken):
    with engine.connect() as connection, connection.begin(), Session(connection) as session:
        enqueue(session)
    del connection, session
    gc.collect()

    assert len(commits._outer) == 0


# --------------------------------------------------------------------------- subscribers


def test_subscribers_come_and_go(engine):
    first, second = [], []
    end_first = wakeup.subscribe(first.append)
    end_again = wakeup.subscribe(first.append)  # the same function, a subscription of its own
    end_second = wakeup.subscribe(second.append)
    with Session(engine) as session:
        enqueue(session)
        session.commit()
        assert (first, second) == (["mail", "mail"], ["mail"])
        end_first()
        end_first()
        enqueue(session)
        session.commit()
        assert (first, second) == (["mail"] * 3, ["mail"] * 2)
        end_again()
        end_second()
        enqueue(session)
        session.commit()
        assert (first, second) == (["mail"] * 3, ["mail"] * 2)
    assert not wakeup.subscribed()


def test_what_was_enqueued_before_somebody_subscribed_is_named_at_the_commit(engine):
    names = []
    with Session(engine) as session:
        enqueue(session)
        unsubscribe = wakeup.subscribe(names.append)
        session.commit()
    unsubscribe()

    assert names == ["mail"]


def test_a_subscriber_that_fails_hurts_nobody(engine, woken, caplog):
    def fail(queue):
        raise RuntimeError(f"no {queue}")

    end = wakeup.subscribe(fail)
    later = []
    end_later = wakeup.subscribe(later.append)
    with caplog.at_level(logging.ERROR, "pgqrs_sa._core.wakeup"), Session(engine) as session:
        enqueue(session)
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(Message)) == 1
    end()
    end_later()

    assert woken.take() == later == ["mail"]
    assert "no mail" in caplog.text


def test_it_is_called_in_the_thread_that_commits(engine):
    threads = []
    end = wakeup.subscribe(lambda _: threads.append(threading.current_thread()))

    def work():
        with Session(engine) as session, session.begin():
            enqueue(session)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    end()

    assert threads == [thread]


def test_sessions_of_one_maker_share_nothing(engine, woken):
    maker = sessionmaker(engine, info={"app": 1})
    with maker() as session, maker() as other:
        enqueue(session)
        enqueue(other, "post")
        other.rollback()
        session.commit()
        other.commit()

    assert woken.take() == ["mail"]
    assert maker.kw["info"] == {"app": 1}


def test_a_session_remembers_nothing_after_its_transaction(engine):
    with Session(engine) as session:
        for end in (session.commit, session.rollback, session.close):
            enqueue(session)
            assert session.info
            end()
            assert session.info == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_the_consumers_of_a_parent_are_not_those_of_its_child():
    code = (
        "import os\n"
        "from pgqrs_sa._core import wakeup\n"
        "wakeup.subscribe(print)\n"
        "pid = os.fork()\n"
        "if pid: os.waitpid(pid, 0)\n"
        "print('parent' if pid else 'child', wakeup.subscribed(), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["child False", "parent True"]

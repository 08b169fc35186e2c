"""How a consumer runs: until it is empty or told to stop, fairly, and telling of what it does."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from contextvars import ContextVar

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    Consumer,
    Delivery,
    HandlerTimeout,
    Hooks,
    PayloadError,
    QueueService,
    Retry,
    Snooze,
)
from pgqrs_sa._core import wakeup
from pgqrs_sa.consumer.base import Startup
from pgqrs_sa.consumer.events import format_error
from pgqrs_sa.consumer.runtime import Runtime
from support.consumers import Ear, effect
from support.waiting import PATIENCE, until

# --------------------------------------------------------------------------- until it is empty


def executed(engine):
    """Note what an engine's connections execute from now on."""
    said: list[str] = []

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "before_cursor_execute")
    def note(_connection, _cursor, statement, _parameters, _context, _many):
        said.append(" ".join(statement.split()))

    return said


def renews(statement):
    """Whether a statement renews leases: it moves what is held, and gives none of it back."""
    return (
        "UPDATE pgqrs_messages SET leased_until=" in statement and "dequeued_at=" not in statement
    )


def test_it_runs_until_nothing_is_visible_also_of_what_handlers_enqueue(kit):
    kit.queue("next")
    kit.send(3)
    later = kit.send("later", delay=3600)
    consumer = kit.consumer()
    seen = []

    @consumer.on("mail")
    @consumer.on("next")
    def handler(session, delivery):
        seen.append((delivery.queue, delivery.payload))
        if delivery.payload:
            queue = "next" if delivery.queue == "mail" else "mail"
            QueueService(session).enqueue(queue, delivery.payload - 1)

    assert consumer.run() == 0
    assert seen == [("mail", 3), ("next", 2), ("mail", 1), ("next", 0)]
    assert list(kit.live()) == later


def test_what_another_consumer_has_locked_for_a_moment_is_waited_for(threads):
    (id_,) = threads.send({})
    engine = threads.app_engine()
    said = executed(engine)
    consumer = threads.consumer(engine=engine)
    consumer.on("mail")(effect)
    with threads.engine.begin() as other:
        other.execute(sa.text("SELECT 1 FROM pgqrs_messages FOR UPDATE"))
        result = []
        thread = threading.Thread(target=lambda: result.append(consumer.run()))
        thread.start()
        until(lambda: sum("pgqrs_asked" in line for line in said) > 5, "it looks again and again")
        assert thread.is_alive()
    thread.join(PATIENCE)
    assert result == [0]
    assert threads.effects() == [(id_, 1)]


def test_paused_queues_and_suspended_workers_do_not_keep_it(threads):
    threads.send({})
    with Session(threads.engine) as session, session.begin():
        QueueService(session).queues.pause("mail")
    consumer = threads.consumer()
    consumer.on("mail")(effect)
    assert consumer.run() == 0
    assert len(threads.live()) == 1


def test_many_messages_are_done_once_each(kit):
    ids = kit.send(*range(150))
    consumer = kit.consumer(concurrency=8)
    consumer.on("mail", prefetch=20)(effect)
    assert consumer.run() == 0
    assert sorted(kit.effects()) == [(id_, 1) for id_ in ids]


# --------------------------------------------------------------------- what runs side by side


def test_no_more_calls_run_at_a_time_than_a_handler_and_the_consumer_may(kit):
    kit.queue("wide")
    kit.send(*range(12))
    kit.send(*range(12), queue="wide")
    consumer = kit.consumer(concurrency=3)
    lock = threading.Lock()
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def handler(_session, delivery):
        with lock:
            running.update([delivery.queue, "all"])
            for name, count in running.items():
                most[name] = max(most[name], count)
        for _ in range(4):
            kit.wait_a_moment()
        with lock:
            running.subtract([delivery.queue, "all"])

    consumer.on("mail", concurrency=1, session=False)(handler)
    consumer.on("wide", prefetch=4, session=False)(handler)
    assert consumer.run() == 0
    assert most == {"mail": 1, "wide": most["wide"], "all": 3}
    assert most["wide"] >= 2
    assert len(kit.archive()) == 24


def test_full_queues_share_a_consumer_by_their_weights(kit):
    kit.queue("heavy")
    kit.send(*range(40))
    kit.send(*range(40), queue="heavy")
    consumer = kit.consumer(concurrency=1)
    order = []

    def handler(_session, delivery):
        order.append(delivery.queue)

    consumer.on("mail", session=False)(handler)
    consumer.on("heavy", weight=3, session=False)(handler)
    assert consumer.run() == 0
    first = Counter(order[:40])
    assert 27 <= first["heavy"] <= 33
    assert len(order) == 80


# -------------------------------------------------------------------------- starting, stopping


def test_it_works_in_the_background_between_start_and_stop(kit):
    consumer = kit.consumer()
    consumer.on("mail")(effect)
    kit.call(consumer.consumer.start)
    (id_,) = kit.send({})
    until(lambda: id_ in kit.archive(), "the message is done")
    assert kit.stop(consumer.consumer) == 0
    assert [item.name for item in threading.enumerate() if item.name.startswith("pgqrs-")] == []
    (left,) = kit.send({})
    assert list(kit.live()) == [left]
    assert kit.workers()[0].status == "stopped"
    assert kit.stop(consumer.consumer) == 0  # once more is no error


def test_a_start_that_takes_longer_than_anybody_waits_leaves_no_consumer_at_work(kit, monkeypatch):
    subscribe = wakeup.subscribe
    begins, go_on = threading.Event(), threading.Event()

    def slowly(callback):
        begins.set()
        assert go_on.wait(PATIENCE)
        return subscribe(callback)

    monkeypatch.setattr(wakeup, "subscribe", slowly)
    ids = kit.send(1, 2)
    consumer = kit.consumer()
    consumer.on("mail", lease=600)(effect)
    starter = threading.Thread(target=kit.call, args=(consumer.consumer.start,))
    starter.start()
    assert begins.wait(PATIENCE)
    assert kit.stop(consumer.consumer) == 0
    starter.join(PATIENCE)
    assert not starter.is_alive()
    go_on.set()
    until(lambda: kit.workers()[0].status == "stopped", "it has ended by itself")
    assert kit.held() == []
    assert sorted([*kit.live(), *kit.archive()]) == ids


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_that_is_interrupted_leaves_no_consumer_at_work(threads, monkeypatch, begun):
    subscribe, wait = wakeup.subscribe, Startup.wait
    begins, go_on = threading.Event(), threading.Event()

    def slowly(callback):
        begins.set()
        assert begun or go_on.wait(PATIENCE)
        return subscribe(callback)

    def interrupted(start, seconds):
        assert begins.wait(PATIENCE)
        if begun:
            assert wait(start, PATIENCE)
        raise KeyboardInterrupt

    monkeypatch.setattr(wakeup, "subscribe", slowly)
    monkeypatch.setattr(Startup, "wait", interrupted)
    ids = threads.send(1, 2)
    consumer = Consumer(sessionmaker(threads.engine))

    @consumer.on("mail", lease=600)
    def handler(session: Session, delivery: Delivery) -> None:
        effect(session, delivery)

    with pytest.raises(KeyboardInterrupt):
        consumer.start()
    go_on.set()
    until(lambda: threads.workers()[0].status == "stopped", "it has ended by itself")
    assert (threads.held(), list(threads.live())) == ([], ids)


def test_a_start_that_is_given_up_while_it_registers_leaves_no_worker_ready(kit, monkeypatch):
    give_up, given_up = Runtime.abort, threading.Event()

    def noted(runtime):
        give_up(runtime)
        given_up.set()

    monkeypatch.setattr(Runtime, "abort", noted)
    engine = kit.app_engine()
    consumer = kit.consumer(engine=engine)
    consumer.on("mail")(effect)
    stopped = threading.Thread(target=kit.stop, args=(consumer.consumer,))

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "after_cursor_execute")
    def stop_at_the_registration(_connection, _cursor, statement, _parameters, _context, _many):
        if "INSERT INTO pgqrs_workers" in statement:
            stopped.start()
            assert given_up.wait(PATIENCE)

    kit.call(consumer.consumer.start)
    stopped.join(PATIENCE)
    until(lambda: kit.workers()[0].status == "stopped", "its worker is stopped")
    assert len(kit.workers()) == 1


async def test_a_start_that_is_cancelled_at_any_moment_leaves_no_worker_ready(
    async_engine, threads
):
    def made():
        consumer = AsyncConsumer(async_sessionmaker(async_engine), housekeeping=None)
        consumer.on("mail")(handler)
        return consumer

    async def handler(payload: int) -> None:
        pass

    first = made()
    began = time.monotonic()
    await first.start()
    took = time.monotonic() - began
    await first.stop()
    for part in range(40):
        consumer = made()
        task = asyncio.create_task(consumer.start())
        await asyncio.sleep(took * part / 40)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await consumer.stop()
    until(lambda: {worker.status for worker in threads.workers()} == {"stopped"}, "all are stopped")


# ------------------------------------------------------------------------ the caller's context


def test_handlers_have_a_copy_of_the_context_that_the_consumer_was_started_in(kit):
    kit.send(*range(3))
    tenant = ContextVar("tenant", default="nobody")
    consumer = kit.consumer(concurrency=1)
    seen = []

    @consumer.on("mail")
    def handler(_session, delivery):
        seen.append(tenant.get())
        tenant.set(f"somebody else {delivery.id}")  # stays in this call

    def run():
        tenant.set("acme")
        return consumer.consumer.run(until_empty=True)

    async def run_it():
        tenant.set("acme")
        return await consumer.consumer.run(until_empty=True)

    assert kit.call(run_it if kit.is_async else run) == 0
    assert seen == ["acme"] * 3


def test_it_works_in_a_with_block(threads):
    consumer = Consumer(sessionmaker(threads.engine), poll_interval=0.02, concurrency=2)

    @consumer.on("mail")
    def handler(session: Session, delivery: Delivery) -> None:
        effect(session, delivery)

    with consumer:
        (id_,) = threads.send({})
        until(lambda: id_ in threads.archive(), "the message is done")
    assert threads.workers()[0].status == "stopped"


def test_it_waits_for_the_handlers_that_run_and_leases_no_more(kit):
    ids = kit.send(*range(4))
    consumer = kit.consumer(concurrency=2)
    go = threading.Event()
    begun = []

    @consumer.on("mail", prefetch=1)
    def handler(session, delivery):
        begun.append(delivery.id)
        kit.wait(go)
        effect(session, delivery)

    consumer.start()
    until(lambda: len(begun) == 2 and len(kit.held()) == 3, "two run, and one waits")
    stopper = threading.Thread(target=kit.stop, args=(consumer.consumer,))
    stopper.start()
    until(lambda: len(kit.held()) == 2, "what waited has been given back")
    go.set()
    stopper.join(PATIENCE)
    assert consumer.result() == 0
    assert sorted(begun) == ids[:2]
    assert sorted(kit.effects()) == [(id_, 1) for id_ in ids[:2]]
    waited = kit.live()[ids[2]]
    assert (waited.read_ct, waited.max_read_ct, waited.dequeued_at) == (1, 6, None)
    assert kit.live()[ids[3]].read_ct == 0


def test_what_was_acknowledged_first_and_waits_is_worked_on_before_it_stops(threads):
    ids = threads.send(*range(6))
    consumer = threads.consumer()
    go = threading.Event()
    calls = []

    @consumer.on("mail", acknowledge="first", concurrency=1, prefetch=5, session=False)
    def handler(_session, delivery):
        calls.append(delivery.id)
        assert go.wait(PATIENCE)

    consumer.start()
    until(lambda: len(threads.archive()) == 6, "all are acknowledged")
    stopper = threading.Thread(target=threads.stop, args=(consumer.consumer,))
    stopper.start()
    until(consumer.runtime.dispatcher.stopped_leasing.is_set, "it stops")
    go.set()
    stopper.join(PATIENCE)
    assert consumer.result() == 0
    assert calls == ids


def test_a_handler_may_stop_the_consumer(kit):
    ids = kit.send(*range(50))
    consumer = kit.consumer(concurrency=1)
    calls = []

    if kit.is_async:

        async def handler(delivery: Delivery) -> None:
            calls.append(delivery.id)
            assert await consumer.consumer.stop() == 0
    else:

        def handler(delivery: Delivery) -> None:
            calls.append(delivery.id)
            assert consumer.consumer.stop() == 0

    consumer.consumer.on("mail")(handler)
    assert consumer.run(until_empty=False) == 0
    assert calls == ids[:1]
    assert kit.held() == []


def test_a_run_and_a_stop_in_another_thread_end_together(threads):
    threads.send({})
    consumer = threads.consumer(drain_timeout=0.2)
    never, begun = threading.Event(), threading.Event()

    @consumer.on("mail", session=False)
    def handler(_session, _delivery):
        begun.set()
        never.wait(PATIENCE)

    consumer.start()
    assert begun.wait(PATIENCE)
    assert threads.stop(consumer.consumer) == 1
    assert consumer.result() == 1
    never.set()


# --------------------------------------------------------------------------- hooks and the log


class Loud(Hooks):
    """Raises in every hook."""

    def on_start(self, _event):
        raise SystemExit

    def on_success(self, _event):
        raise ValueError

    on_retry = on_dead = on_lease_lost = on_start
    on_heartbeat = on_success


def test_hooks_hear_of_each_event_once_and_what_they_raise_changes_nothing(kit):
    ok, bad, retried, snoozed = kit.send("ok", "bad", "retried", "snoozed")
    ear = Ear()
    consumer = kit.consumer(hooks=[Loud(), ear], retry=Retry(max_attempts=1, base=1000))

    @consumer.on("mail")
    def handler(session, delivery):
        if delivery.payload == "snoozed":
            raise Snooze(1000)
        if delivery.payload != "ok":
            raise ValueError(delivery.payload)

    kit.sql("UPDATE pgqrs_messages SET max_read_ct = 2 WHERE id = :id", id=retried)
    assert consumer.run() == 0
    heard = {
        id_: [(name, event) for name, event in ear.heard if event.delivery.id == id_]
        for id_ in (ok, bad, retried, snoozed)
    }
    names = {id_: [name for name, _ in events] for id_, events in heard.items()}
    assert names == {
        ok: ["on_start", "on_success"],
        bad: ["on_start", "on_dead"],
        retried: ["on_start", "on_retry"],
        snoozed: ["on_start", "on_retry"],
    }
    outcomes = {id_: events[1][1].outcome for id_, events in heard.items()}
    assert outcomes == {ok: "archived", bad: "dead", retried: "retry", snoozed: "released"}
    assert heard[ok][1][1].error is None
    assert heard[ok][1][1].duration.total_seconds() >= 0
    assert str(heard[bad][1][1].error) == "bad"
    assert heard[retried][1][1].delay.total_seconds() > 800
    assert heard[snoozed][1][1].delay.total_seconds() == 1000
    assert {event.worker for _, event in ear.heard} == {1}
    assert {event.handler.rpartition(".")[2] for _, event in ear.heard} <= {"one", "handler"}


def test_the_log_has_fields_and_no_payload(kit, caplog):
    caplog.set_level(logging.DEBUG, "pgqrs_sa.consumer")
    ok, bad = kit.send({"secret": "hunter2"}, {"secret": "swordfish"})
    consumer = kit.consumer(retry=Retry(base=1000))

    @consumer.on("mail")
    def handler(_session, delivery):
        if delivery.id == bad:
            raise ValueError(delivery.payload["secret"])

    assert consumer.run() == 0
    records = {record.msg_id: record for record in caplog.records if hasattr(record, "msg_id")}
    assert {id_: (record.outcome, record.levelname) for id_, record in records.items()} == {
        ok: ("archived", "DEBUG"),
        bad: ("retry", "WARNING"),
    }
    for record in records.values():
        assert (record.queue, record.attempt, record.worker) == ("mail", 1, 1)
        assert record.duration_ms >= 0
    assert "hunter2" not in caplog.text
    assert "swordfish" not in caplog.text
    assert logging.getLogger("pgqrs_sa").handlers == logging.getLogger("pgqrs_sa.consumer").handlers
    assert logging.getLogger("pgqrs_sa.consumer").handlers == []


def test_a_line_of_the_log_says_which_attempt_why_and_when_the_next_is(threads, caplog):
    failed, snoozed, dead = threads.send("failed", "snoozed", "dead", max_read_ct=5)
    threads.sql("UPDATE pgqrs_messages SET max_read_ct = 1 WHERE id = :id", id=dead)
    consumer = threads.consumer(retry=Retry(base=20, jitter=0))
    caplog.set_level(logging.DEBUG, "pgqrs_sa.consumer")

    @consumer.on("mail", session=False)
    def handler(_session, delivery):
        if delivery.payload == "snoozed":
            raise Snooze(60)
        raise OwnError(f"swordfish {delivery.payload}")

    assert consumer.run() == 0
    lines = {record.msg_id: record for record in caplog.records if hasattr(record, "msg_id")}
    assert re.fullmatch(
        rf"message {failed} of mail: attempt 1 of 5 failed: "
        rf"{__name__}\.OwnError in \S+ \(consumers\.py:\d+\); the next is in 20\.0 s",
        lines[failed].getMessage(),
    )
    assert (lines[failed].error, lines[failed].delay_ms) == ("OwnError", 20_000)
    assert re.fullmatch(
        rf"message {dead} of mail: attempt 1 of 1 failed, and was the last: "
        rf"{__name__}\.OwnError in \S+ \(consumers\.py:\d+\); the message is a dead letter",
        lines[dead].getMessage(),
    )
    assert lines[snoozed].getMessage() == (
        f"message {snoozed} of mail: attempt 1 of 5 was given back, and is not counted; "
        "it comes again in 60.0 s"
    )
    assert "swordfish" not in caplog.text


class OwnError(Exception):
    """Of an application."""


def test_the_log_describes_an_error_without_its_text():
    class Driver(Exception):
        sqlstate = "23505"

    refused = sa.exc.IntegrityError("INSERT", {"who": "swordfish"}, Driver("swordfish"))
    group = ExceptionGroup("swordfish", [ValueError("swordfish"), KeyError("swordfish")])
    timeout = HandlerTimeout("send", 3, "File x\n  swordfish")
    assert format_error(ValueError("swordfish")) == "ValueError"
    assert format_error(refused) == "sqlalchemy.exc.IntegrityError [23505]"
    assert format_error(group) == "ExceptionGroup of ValueError, KeyError"
    assert format_error(PayloadError("payload.a", "swordfish")) == "PayloadError"
    assert format_error(timeout).startswith("HandlerTimeout: handler send took longer than")
    assert "swordfish" not in format_error(timeout)


# ------------------------------------------------------------------------ waking, and sessions


def test_a_message_enqueued_in_this_process_is_picked_up_at_once(kit):
    """It is leased without another look at what there is, which would be the next poll."""
    engine = kit.app_engine()
    said = executed(engine)
    consumer = kit.consumer(engine=engine, poll_interval=3600)
    known = []

    @consumer.on("mail", session=False)
    def handler(_session, delivery):
        known.append(looks())

    def looks():
        return sum("pgqrs_asked" in line for line in said)

    consumer.start()
    at_once = 0
    for count in range(1, 6):
        before = looks()
        until(lambda before=before: looks() > before, "it is idle")
        kit.send({})
        sent = looks()
        until(lambda count=count: len(known) == count, "it is picked up")
        at_once += known[-1] == sent
    assert at_once >= 3  # a poll may have come in between, but not each time
    assert consumer.stop() == 0


def test_its_own_statements_leave_no_state_in_the_session(kit):
    """As PgBouncer in transaction mode needs it: no SET, no session-level lock, no LISTEN."""
    engine = kit.app_engine()
    said = executed(engine)
    ids = kit.send(*range(5))
    kit.send("bad", max_read_ct=1)
    consumer = kit.consumer(engine=engine, housekeeping=0.02, heartbeat=0.05)
    locks = []

    @consumer.on("mail", lease=3)
    def handler(session, delivery):
        if delivery.payload == "bad":
            raise ValueError
        locks.extend(
            kit.sql("SELECT * FROM pg_locks WHERE locktype = 'advisory' AND objsubid <> 1")
        )
        end = time.monotonic() + PATIENCE
        while not any(map(renews, said)) and time.monotonic() < end:
            kit.wait_a_moment()
        effect(session, delivery)

    assert consumer.run() == 0
    assert sorted(kit.effects()) == [(id_, 1) for id_ in ids]
    kinds = {line.split()[0].upper() for line in said}
    assert kinds <= {"SELECT", "WITH", "UPDATE", "INSERT", "DELETE", "SHOW"}
    assert not [line for line in said if "pg_advisory_lock" in line or "set_config" in line]
    assert [line for line in said if "pg_try_advisory_xact_lock" in line]
    assert any(map(renews, said))
    assert locks == []


def test_a_child_of_a_fork_works_and_leaves_its_parents_connections_alone(threads):
    """As under gunicorn with a preloaded application: made in the parent, run in the child."""
    engine = threads.app_engine(pool_size=8)
    with (
        engine.connect() as connection,
        engine.connect() as two,
    ):  # two connections wait in the pool
        connection.execute(sa.text("SELECT 1"))
        two.execute(sa.text("SELECT 1"))
    held = engine.connect()
    pid = held.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    consumer = Consumer(sessionmaker(engine), poll_interval=0.02, concurrency=2)

    @consumer.on("mail")
    def handler(session: Session, delivery: Delivery) -> None:
        effect(session, delivery)

    ids = threads.send(*range(10))
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = consumer.run(until_empty=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert sorted(threads.effects()) == [(id_, 1) for id_ in ids]
    assert threads.workers()[0].pid == child
    for _ in range(3):
        assert held.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() == pid
    held.close()
    with engine.connect() as connection, engine.connect() as two:
        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1
        assert two.execute(sa.text("SELECT 2")).scalar_one() == 2
    threads.send({})
    assert consumer.run(until_empty=True) == 0  # and the parent may still work as well
    assert threads.workers()[1].pid == os.getpid()


def test_a_child_of_a_process_whose_consumer_runs_can_run_its_own(threads):
    consumer = threads.consumer()
    consumer.on("mail")(effect)
    consumer.start()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = consumer.consumer.stop() + consumer.consumer.run(until_empty=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    (id_,) = threads.send({})
    until(lambda: id_ in threads.archive(), "the parent's consumer works on")
    assert consumer.stop() == 0
    assert [worker.status for worker in threads.workers()] == ["stopped"] * 2


@pytest.mark.parametrize("autoflush", [True, False])
def test_a_handler_may_use_the_service_in_its_session(threads, autoflush):
    threads.queue("next")
    (id_,) = threads.send({"n": 1})
    consumer = Consumer(sessionmaker(threads.engine, autoflush=autoflush), poll_interval=0.02)

    @consumer.on("mail")
    def handler(session: Session, service: QueueService, payload: dict) -> None:
        service.enqueue("next", payload)
        assert service.enqueue_many("next", [1, 2])

    assert consumer.run(until_empty=True) == 0
    assert threads.outcomes() == {id_: "archived"}
    assert len(threads.live()) == 3


@pytest.mark.parametrize("session", [True, False])
def test_a_hook_that_stops_the_consumer_does_not_wait_for_itself(threads, session):
    threads.send(*range(20))
    told = []

    class Enough(Hooks):
        def on_success(self, _event):
            told.append(driver.consumer.stop())

    driver = threads.consumer(concurrency=1, drain_timeout=900, hooks=[Enough()])
    driver.on("mail", session=session)(lambda *_: None)
    began = time.monotonic()
    assert driver.run(until_empty=False) == 0
    assert time.monotonic() - began < 300  # not the quarter of an hour that handlers would have
    assert told[0] == 0
    assert len(threads.live()) + len(told) == 20
    assert threads.held() == []

"""Connections that break, at any statement: the consumer recovers, and nothing is left behind.

A backend is ended by `pg_terminate_backend`. Before a statement is sent that loses the statement;
after it was executed, and committed, its reply.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import Delivery, Discard, QueueService, Retry
from pgqrs_sa.consumer import runtime
from support.consumers import Ear, effect
from support.waiting import PATIENCE, until


class Cutter:
    """Ends the backend of chosen statements of the consumer's own.

    Args:
        kit: Whose server.
        engine: The consumer's.
        wanted: Asked about each statement, with its number.
        when: ``before`` or ``after`` it is executed.
    """

    def __init__(
        self, kit: Any, engine: Any, when: str, wanted: Callable[[int, str], bool]
    ) -> None:
        self.count = 0
        self.cut: list[str] = []
        self._kit = kit
        self._wanted = wanted
        self._lock = threading.Lock()
        name = "before_cursor_execute" if when == "before" else "after_cursor_execute"
        sa.event.listen(getattr(engine, "sync_engine", engine), name, self._seen)

    def _seen(self, connection, _cursor, statement, *_more):
        if not is_own(connection):
            return
        with self._lock:
            self.count += 1
            wanted = self._wanted(self.count, statement)
            if wanted:
                self.cut.append(statement)
        if wanted:
            end_backend(self._kit, backend_of(connection))
            if self._kit.lose_replies:
                raise driver_error(connection)


def backend_of(connection):
    """The process of the server behind a connection."""
    driver = connection.connection.driver_connection
    return getattr(driver, "get_server_pid", lambda: driver.info.backend_pid)()


def is_own(connection):
    """Whether the consumer leases or settles on it: in its own threads, or a handler's between."""
    name = threading.current_thread().name
    alone = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    return name.startswith(("pgqrs-dispatcher", "pgqrs-renewer")) or (
        alone and name.startswith("pgqrs-handler")
    )


def driver_error(connection):
    """The error of a driver whose connection has just been lost, before it could tell the reply."""
    return connection.dialect.loaded_dbapi.OperationalError("the reply was lost")


def end_backend(kit, pid):
    """End a backend, and wait until it is gone."""
    kit.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
    gone = "SELECT 1 FROM pg_stat_activity WHERE pid = :pid"
    until(lambda: not kit.sql(gone, pid=pid), "the backend has ended")


def backends(kit, what):
    """The consumer's own connections: those whose last statement begins with something like it."""
    rows = kit.sql(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND query LIKE :what",
        what=f"%{what}%",
    )
    return [row.pid for row in rows]


def audit(kit, ids):
    """Every message has had exactly one effect, and nothing is held."""
    assert kit.outcomes() == dict.fromkeys(ids, "archived")
    assert sorted(id_ for id_, _ in kit.effects()) == sorted(ids)
    assert kit.live() == {}


@pytest.mark.parametrize(
    "what", ["pgqrs_asked", "UPDATE pgqrs_workers"], ids=["dispatcher", "renewer"]
)
def test_a_backend_that_is_ended_while_idle_is_replaced(kit, what):
    consumer = kit.consumer(poll_interval=0.05)
    consumer.on("mail", lease=600)(effect)
    consumer.start()
    ids = kit.send(1)
    until(kit.archive, "the first is done")
    for _ in range(2):
        (pid,) = until(lambda: backends(kit, what), "the connection exists")
        end_backend(kit, pid)
        if "workers" in what:
            until(lambda pid=pid: set(backends(kit, what)) - {pid}, "there is another one")
        (id_,) = kit.send(1)
        until(lambda id_=id_: id_ in kit.archive(), "the next is done")
        ids.append(id_)
    assert consumer.stop() == 0
    audit(kit, ids)
    assert [worker.status for worker in kit.workers()] == ["stopped"]


def test_the_row_of_a_worker_whose_backend_was_just_ended_is_still_noted_as_stopped(kit):
    consumer = kit.consumer(heartbeat=0.2)
    consumer.on("mail")(effect)
    consumer.start()
    (pid,) = until(lambda: backends(kit, "UPDATE pgqrs_workers"), "its heart beats")
    kit.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
    assert consumer.stop() == 0
    assert [worker.status for worker in kit.workers()] == ["stopped"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_backends_that_end_at_every_statement_lose_and_double_nothing(kit, when):
    """Every second of the first 24 statements, and then every tenth."""
    ids = kit.send(*range(12))
    engine = kit.app_engine()
    kit.lose_replies = when == "after"
    cutter = Cutter(
        kit, engine, when, lambda n, _: n % 2 == 1 if n < 25 else n % 10 == 0 and n < 60
    )
    ear = Ear()
    consumer = kit.consumer(
        engine=engine, concurrency=3, hooks=[ear], retry=Retry(base=0, jitter=0), housekeeping=0.3
    )

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        if delivery.payload % 4 == 0 and delivery.read_ct == 1:
            raise ValueError

    assert consumer.run() == 0
    assert len(cutter.cut) > 5
    audit(kit, ids)
    assert [worker.status for worker in kit.workers()][-1] == "stopped"
    assert ear.names().count("on_success") == 12


def test_messages_whose_lease_was_not_heard_of_come_back_at_once_and_uncharged(kit):
    ids = kit.send(*range(6))
    engine = kit.app_engine()
    kit.lose_replies = True
    cutter = Cutter(kit, engine, "after", lambda n, text: "pq_leased" in text and not heard)
    heard: list[int] = []
    consumer = kit.consumer(engine=engine, concurrency=3)

    @consumer.on("mail", lease=3600)
    def handler(session, delivery):
        heard.append(delivery.id)
        effect(session, delivery)

    # Leases are executed, and their replies lost, until one of them can be seen. That it
    # is held is seen, at times, before its reply is to be lost: so wait for that, first.
    def hear() -> None:
        until(lambda: cutter.cut and kit.held(), "leased, and its reply lost")
        heard.append(0)

    began = time.monotonic()
    taken = threading.Thread(target=hear)
    taken.start()
    assert consumer.run() == 0
    taken.join()
    assert time.monotonic() - began < 1800  # not the hour that the lease has
    audit(kit, ids)
    again = [delivery for delivery in kit.archive().values() if delivery.read_ct > 1]
    assert again
    assert {delivery.max_read_ct - delivery.read_ct for delivery in kit.archive().values()} == {4}


def test_leases_that_were_taken_or_extended_by_hand_outlive_a_broken_connection(kit):
    """By the consumer's worker, in its queue; only what the lost statement leased goes back."""
    (first,) = kit.send(1)
    engine = kit.app_engine()
    kit.lose_replies = True
    armed, begun, go = threading.Event(), threading.Event(), threading.Event()
    taken: list[Delivery] = []

    def wanted(_number, text):
        # Only the statement that has leased something: the reply of another one is no loss.
        return armed.is_set() and "cursor_table" in text and len(kit.held()) > 2

    cutter = Cutter(kit, engine, "after", wanted)
    consumer = kit.consumer(engine=engine, concurrency=2, poll_interval=0.05)

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        if delivery.id == first:
            with Session(kit.engine) as own, own.begin():
                service = QueueService(own)
                service.enqueue("mail", 2)
                taken.extend(service.dequeue("mail", lease=600, worker=delivery.worker_id))
                service.extend(delivery, 3000)
            begun.set()
            kit.wait(go)
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    before = kit.live()
    armed.set()
    (third,) = kit.send(3)
    until(lambda: cutter.cut, "a lease, whose reply is lost")
    armed.clear()
    until(lambda: third in kit.archive(), "it came back, and is done")
    after = kit.live()
    assert after.keys() == before.keys() == {first, taken[0].id}
    for id_, row in before.items():
        assert after[id_].leased_until == row.leased_until
        assert (after[id_].vt, after[id_].read_ct) == (row.vt, row.read_ct)
    go.set()
    until(lambda: first in kit.archive(), "its lease was not lost")
    with Session(kit.engine) as session, session.begin():
        QueueService(session).archive(taken[0])
    consumer.stop()
    assert kit.archive()[third].read_ct == 2


def test_a_lease_that_a_handler_takes_while_one_of_the_consumer_hangs_outlives_that(kit):
    """By the consumer's worker, in its queue, for as long, and at that time."""
    (first,) = kit.send(1)
    engine = kit.app_engine()
    kit.lose_replies = True
    begun, asked, took, go = (threading.Event() for _ in range(4))
    taken: list[Delivery] = []

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "before_cursor_execute")
    def hang(connection, _cursor, statement, *_more):
        if begun.is_set() and "pq_leased" in statement and is_own(connection):
            asked.set()
            assert took.wait(PATIENCE)

    def wanted(_number, text):
        hung = took.is_set() and "pq_leased" in text and not cutter.cut
        return hung and len(kit.held()) > 2

    cutter = Cutter(kit, engine, "after", wanted)
    consumer = kit.consumer(engine=engine, concurrency=2, poll_interval=0.05)

    @consumer.on("mail", lease=600)
    def handler(session, delivery):
        if delivery.id == first:
            begun.set()
            kit.wait(asked)
            with Session(kit.engine) as own, own.begin():
                service = QueueService(own)
                service.enqueue_many("mail", [2, 3])  # and the statement that hangs gets the other
                taken.extend(service.dequeue("mail", lease=600, worker=delivery.worker_id))
            took.set()
            kit.wait(go)
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    kit.send("so that it leases")
    assert took.wait(PATIENCE)
    before = kit.live()[taken[0].id]
    until(lambda: cutter.cut, "a lease, whose reply is lost")
    until(lambda: kit.live().keys() == {first, taken[0].id}, "what it leased is done")
    assert kit.live()[taken[0].id] == before
    go.set()
    until(lambda: first in kit.archive(), "the first is done")
    with Session(kit.engine) as session, session.begin():
        QueueService(session).archive(taken[0])
    assert consumer.stop() == 0


def test_an_archive_whose_reply_was_lost_is_success_and_told_once(kit):
    """Without a session the dispatcher archives; it looks the message up by its id and attempt."""
    ids = kit.send(*range(4))
    engine = kit.app_engine()
    kit.lose_replies = True
    lost: list[int] = []
    ear = Ear()
    calls = []

    def wanted(_number, text):
        if calls and len(lost) < 2 and "pq_gone" in text and "pq_leased" in text:
            lost.append(1)
            return True
        return False

    Cutter(kit, engine, "after", wanted)
    consumer = kit.consumer(engine=engine, concurrency=2, hooks=[ear])

    @consumer.on("mail", session=False, lease=3600)
    def handler(_session, delivery):
        calls.append(delivery.id)

    assert consumer.run() == 0
    assert lost
    assert kit.outcomes() == dict.fromkeys(ids, "archived")
    assert sorted(set(calls)) == ids
    assert ear.names().count("on_success") == 4
    assert "on_lease_lost" not in ear.names()


@pytest.mark.parametrize("lost", ["INSERT", "COMMIT"])
def test_a_registration_whose_reply_was_lost_leaves_one_row_and_stops_no_namesake(kit, lost):
    """A namesake with the same process id may be another container's, and just have started."""
    namesake = kit.consumer(name="shop")
    namesake.on("mail")(effect)
    namesake.start()
    engine = kit.app_engine()
    cut: list[str] = []
    inserted: list[sa.Connection] = []

    def executed(connection, _cursor, statement, *_more):
        if "INSERT INTO pgqrs_workers" in statement and not cut:
            inserted.append(connection)
            if lost == "INSERT":
                cut.append(lost)
                end_backend(kit, backend_of(connection))
                raise driver_error(connection)

    def committing(connection):
        if lost == "COMMIT" and connection in inserted and not cut:
            cut.append(lost)
            connection.connection.dbapi_connection.commit()
            end_backend(kit, backend_of(connection))
            raise sa.exc.DBAPIError(
                "COMMIT", {}, driver_error(connection), connection_invalidated=True
            )

    listened = getattr(engine, "sync_engine", engine)
    sa.event.listen(listened, "after_cursor_execute", executed)
    sa.event.listen(listened, "commit", committing)
    consumer = kit.consumer(engine=engine, name="shop")
    consumer.on("mail")(effect)
    consumer.start()
    assert cut
    assert [worker.status for worker in kit.workers()] == ["ready", "ready"]
    assert consumer.stop() == 0
    assert [worker.status for worker in kit.workers()] == ["ready", "stopped"]
    assert namesake.stop() == 0


def test_a_decision_whose_reply_was_lost_is_told_as_what_it_was(kit):
    (id_,) = kit.send({})
    engine = kit.app_engine()
    kit.lose_replies = True
    lost: list[int] = []
    ear = Ear()

    def wanted(_number, text):
        # Its binds tell, not its text: the first statement into the archive by itself.
        if not lost and "INSERT INTO pgqrs_archive" in text and "pq_leased" not in text:
            lost.append(1)
            return True
        return False

    Cutter(kit, engine, "after", wanted)
    consumer = kit.consumer(engine=engine, hooks=[ear])

    @consumer.on("mail", session=False)
    def handler(_session, _delivery):
        return Discard("not wanted")

    assert consumer.run() == 0
    assert lost
    assert kit.outcomes() == {id_: "discarded"}
    assert ear.names() == ["on_start", "on_success"]
    assert ear.heard[1][1].outcome == "discarded"


def test_a_message_acknowledged_first_is_worked_on_though_the_reply_was_lost(kit):
    (id_,) = kit.send({})
    engine = kit.app_engine()
    kit.lose_replies = True
    lost: list[int] = []

    def wanted(_number, text):
        if not lost and "INSERT INTO pgqrs_archive" in text and "pq_leased" not in text:
            lost.append(1)
            return True
        return False

    Cutter(kit, engine, "after", wanted)
    consumer = kit.consumer(engine=engine)
    calls = []

    @consumer.on("mail", session=False, acknowledge="first")
    def handler(_session, delivery):
        calls.append(delivery.id)

    assert consumer.run() == 0
    assert lost
    assert calls == [id_]


def test_a_handlers_commit_whose_reply_was_lost_is_success_and_not_repeated(kit):
    (id_,) = kit.send({})
    engine = kit.app_engine()
    ear = Ear()
    consumer = kit.consumer(engine=engine, hooks=[ear], retry=Retry(base=0))
    calls = []

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "commit")
    def lose(connection):
        """Commit, and then fail as if that had not been heard."""
        if len(calls) == 1 and not is_own(connection):
            calls.append(0)
            connection.connection.dbapi_connection.commit()
            raise driver_error(connection)

    @consumer.on("mail", lease=3600)
    def handler(session, delivery):
        calls.append(delivery.id)
        effect(session, delivery)

    assert consumer.run() == 0
    assert calls == [id_, 0]
    audit(kit, [id_])
    assert ear.names() == ["on_start", "on_success"]


def test_renewals_go_on_after_the_renewers_backend_was_ended_again_and_again(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()
    go, begun = threading.Event(), threading.Event()

    @consumer.on("mail", lease=5)
    def handler(session, delivery):
        begun.set()
        kit.wait(go)
        effect(session, delivery)

    consumer.start()
    assert begun.wait(PATIENCE)
    leased = kit.live()[id_].leased_until
    # Until it is renewed, each of its connections is ended.
    while kit.live()[id_].leased_until == leased:
        (pid,) = until(lambda: backends(kit, "UPDATE pgqrs_workers"), "the renewer is connected")
        end_backend(kit, pid)
    outlived = "SELECT now() > :leased FROM pgqrs_messages"
    until(lambda: kit.sql(outlived, leased=leased) == [(True,)], "it would have run out")
    go.set()
    until(lambda: id_ in kit.archive(), "it is archived")
    assert consumer.stop() == 0
    assert kit.effects() == [(id_, 1)]


def test_calls_that_hang_are_cut_and_repeated(kit):
    """Both backends are stopped: their sockets are open, and no answer comes."""
    ids = kit.send(1)
    consumer = kit.consumer()
    consumer.on("mail", lease=3)(effect)
    consumer.start()
    until(lambda: len(kit.archive()) == 1, "the first is done")
    frozen = []
    for what in ("pgqrs_asked", "UPDATE pgqrs_workers"):
        frozen += until(lambda what=what: backends(kit, what), "the connection exists")
    beat = kit.workers()[0].heartbeat_at
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        ids += kit.send(2)
        until(lambda: len(kit.archive()) == 2, "another connection does it")
        until(lambda: kit.workers()[0].heartbeat_at > beat, "it beats again")
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert consumer.stop() == 0
    audit(kit, ids)


def test_a_handlers_own_connection_that_breaks_is_a_failed_attempt(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=0))

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        if delivery.read_ct == 1:
            pid = session.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            end_backend(kit, pid)

    assert consumer.run() == 0
    assert kit.effects() == [(id_, 2)]
    audit(kit, [id_])


def test_a_database_that_is_gone_does_not_keep_a_consumer_from_stopping(kit, monkeypatch):
    """It cannot be asked any more: the leases run out by themselves, and the exit code says so."""
    monkeypatch.setattr(runtime, "SETTLE_TIMEOUT", 0.5)
    (id_,) = kit.send({})
    consumer = kit.consumer(drain_timeout=0.2)
    begun, never = threading.Event(), threading.Event()

    async def awaits(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)
        begun.set()
        await session.run_sync(lambda _session: kit.wait(never))

    if kit.is_async:
        consumer.consumer.on("mail", lease=600)(awaits)
    else:

        @consumer.on("mail", lease=600)
        def handler(session, delivery):
            effect(session, delivery)
            begun.set()
            never.wait(PATIENCE)

    consumer.start()
    assert begun.wait(PATIENCE)
    name = kit.engine.url.database
    admin = sa.create_engine(kit.engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'))
        try:
            connection.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                ),
                {"name": name},
            )
            began = time.monotonic()
            assert consumer.stop() == 1
            assert time.monotonic() - began < 60  # a tenth of the lease
        finally:
            connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))
    admin.dispose()
    never.set()
    kit.engine.dispose()
    assert kit.effects() == []
    assert kit.held() == [id_]

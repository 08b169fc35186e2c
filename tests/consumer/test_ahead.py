"""A consumer leases the next messages while its handlers work on these."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa.consumer import leader, scheduler
from pgqrs_sa.consumer.connection import ConsumerConnection
from support.consumers import effect
from support.waiting import PATIENCE, until

STORE = 5
"""Messages: a handler's call, and four ahead."""

QUICK, ALL = 6 * STORE, 12 * STORE
"""Messages that are handled at once, and all."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, handlers are quick enough as well."""
    monkeypatch.setattr(scheduler, "_QUICK", PATIENCE)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but a handler's thread reads a reply, which then comes late."""
    monkeypatch.setattr(leader, "REPLY_LINGER", PATIENCE)


class Stuck:
    """A handler that is quick until a statement is in flight, and then waits."""

    def __init__(self, kit: Any) -> None:
        self.handled: Counter[int] = Counter()
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.consumer: Any = None
        self._kit = kit

    def __call__(self, _session: Any, delivery: Any) -> None:
        self.handled[delivery.id] += 1
        if len(self.handled) > QUICK and not self.entered.is_set() and self._in_flight():
            self.entered.set()
            self._kit.wait(self.go_on)

    def _in_flight(self) -> bool:
        return self.consumer.runtime.dispatcher.in_flight_since is not None


@pytest.fixture
def stuck(threads: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """Stuck while a statement is in flight, which the dispatcher's own thread does not read."""
    run, handler = leader.LeaderFollower.run, Stuck(threads)

    def run_later(rounds: Any) -> None:
        until(
            lambda: handler.go_on.is_set() or rounds._work._mode != "leasing",
            "the handler goes on, or the consumer stops",
        )
        run(rounds)

    monkeypatch.setattr(leader.LeaderFollower, "run", run_later)
    yield handler
    handler.go_on.set()


def started(kit: Any, handler: Any, **options: Any) -> Any:
    consumer = kit.consumer(concurrency=1, poll_interval=PATIENCE)
    on = {"prefetch": STORE - 1, "lease": 600, "session": False} | options
    consumer.on("mail", **on)(handler)
    if isinstance(handler, Stuck):
        handler.consumer = consumer
    return consumer.start()


LEASING = (
    "SELECT pid, state, xact_start, backend_xmin FROM pg_stat_activity"
    " WHERE datname = current_database() AND query LIKE '%pq_held%' AND query NOT LIKE '%activity%'"
)
"""The connection that leases. Of a statement, the view shows the first thousand characters."""


def test_a_lease_is_committed_and_the_backend_idle_while_a_slow_handler_runs(threads, stuck):
    ids = threads.send(*range(ALL))
    consumer = started(threads, stuck)
    assert stuck.entered.wait(PATIENCE)
    until(lambda: len(threads.held()) == 2 * STORE, "more is leased than this process knows of")
    until(lambda: [row.state for row in threads.sql(LEASING)] == ["idle"], "its backend is idle")
    (row,) = threads.sql(LEASING)
    assert (row.xact_start, row.backend_xmin) == (None, None)
    known = {lease.delivery.id for lease in consumer.runtime.state.lease_table.all()}
    assert len(set(threads.held()) - known) == STORE  # nobody has read the reply
    stuck.go_on.set()
    until(lambda: len(threads.archive()) == len(ids), "everything is done")
    assert set(stuck.handled.values()) == {1}
    consumer.stop()


def test_the_reply_is_read_and_its_leases_are_renewed_while_a_slow_handler_runs(threads):
    handler = Stuck(threads)
    ids = threads.send(*range(ALL))
    consumer = started(threads, handler, lease=2)
    try:
        assert handler.entered.wait(PATIENCE)
        until(lambda: len(consumer.runtime.state.lease_table) > STORE, "the reply is read")
        before = {id_: row.leased_until for id_, row in threads.live().items() if row.leased_until}
        until(
            lambda: any(
                row.leased_until and row.leased_until > before.get(id_, row.leased_until)
                for id_, row in threads.live().items()
            ),
            "a lease is renewed",
        )
    finally:
        handler.go_on.set()
    until(lambda: len(threads.archive()) == len(ids), "everything is done")


def test_each_store_takes_one_statement(threads, monkeypatch, unread):
    calls: Counter[str] = Counter()
    for name in ("send", "receive", "run_once"):
        monkeypatch.setattr(ConsumerConnection, name, counted(name, calls))
    threads.send(*range(40 * STORE))
    consumer = threads.consumer(concurrency=1, poll_interval=PATIENCE)
    handled: list[int] = []
    consumer.on("mail", prefetch=STORE - 1, lease=600, session=False)(
        lambda _session, delivery: handled.append(delivery.id)
    )
    consumer.run()
    assert len(handled) == 40 * STORE
    assert 40 <= calls["send"] <= 50
    assert calls["receive"] == calls["send"]


def counted(name: str, calls: Counter[str]) -> Any:
    method = getattr(ConsumerConnection, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return method(*args, **kwargs)

    return call


def end_leasing_backends(kit: Any) -> None:
    (row,) = kit.sql(LEASING)
    kit.sql("SELECT pg_terminate_backend(:pid)", pid=row.pid)
    until(lambda: not kit.sql(LEASING), "the backend has ended")


def test_what_a_lost_reply_has_leased_is_given_back_uncharged(threads, stuck):
    ids = threads.send(*range(ALL), max_read_ct=2)
    started(threads, stuck)
    assert stuck.entered.wait(PATIENCE)
    lost = until(lambda: set(threads.held()) - set(stuck.handled) or None, "more is leased")
    end_leasing_backends(threads)
    stuck.go_on.set()
    until(lambda: threads.outcomes() == dict.fromkeys(ids, "archived"), "everything is done")
    assert set(stuck.handled.values()) == {1}  # also those whose archiving was not answered
    assert set(stuck.handled) == set(ids)
    left = {row.max_read_ct - row.read_ct for id_, row in threads.archive().items() if id_ in lost}
    assert left == {1}


def test_a_stop_reads_what_is_in_flight_and_gives_it_back_uncharged(threads, stuck):
    ids = threads.send(*range(ALL))
    consumer = started(threads, stuck)
    assert stuck.entered.wait(PATIENCE)
    until(lambda: len(threads.held()) > STORE, "more is leased")
    ending = threading.Thread(target=consumer.stop)
    ending.start()
    until(lambda: len(threads.held()) == 1, "only the message of the running handler is held")
    stuck.go_on.set()
    ending.join(PATIENCE)
    assert consumer.result() == 0
    assert threads.held() == []
    assert sorted(threads.archive()) == sorted(stuck.handled)
    for row in threads.live().values():
        assert row.read_ct == 0 or row.max_read_ct - row.read_ct == 5
    assert len(threads.live()) == len(ids) - len(stuck.handled)


def test_messages_are_settled_at_once_when_nothing_is_left_to_lease(threads):
    handled: list[int] = []
    consumer = started(threads, lambda _session, delivery: handled.append(delivery.id))
    for number in range(3):
        ids = threads.send(*range(STORE + number))
        until(lambda ids=ids: set(ids) <= set(threads.archive()), "they are settled")
    consumer.stop()
    assert threads.live() == {}


def test_an_application_that_watches_statements_gets_the_loop_that_waits(
    threads, monkeypatch, unread
):
    calls: Counter[str] = Counter()
    monkeypatch.setattr(ConsumerConnection, "send", counted("send", calls))
    engine, seen = threads.app_engine(), []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    ids = threads.send(*range(10 * STORE))
    consumer = threads.consumer(engine=engine, concurrency=1)
    consumer.on("mail", prefetch=STORE - 1)(effect)
    consumer.run()
    assert threads.outcomes() == dict.fromkeys(ids, "archived")
    assert calls == {}
    assert sum("pq_leased" in statement for statement in seen) >= 10


def test_without_messages_ahead_nothing_is_in_flight_while_a_handler_runs(threads, unread):
    threads.send(*range(20))
    found: list[object] = []
    consumer = threads.consumer(concurrency=1)
    consumer.on("mail", session=False)(
        lambda *_: found.append(consumer.runtime.dispatcher.in_flight_since)
    )
    consumer.start()
    until(lambda: len(threads.archive()) == 20, "everything is done")
    consumer.stop()
    assert set(found) == {None}

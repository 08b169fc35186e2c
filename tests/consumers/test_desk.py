"""The desk's seat: who settles and leases when several threads could, and who is woken for it.

With a line that has no database behind it, so that each can be held up where it matters.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from waiting import PATIENCE, until

from pgqrs_sa import Delivery, Retry
from pgqrs_sa.consumers.book import Book
from pgqrs_sa.consumers.desk import Desk
from pgqrs_sa.consumers.handlers import Handlers, Unit
from pgqrs_sa.consumers.hooks import Reporter
from pgqrs_sa.consumers.policy import Schedule
from pgqrs_sa.consumers.seat import LINGER, Seat
from pgqrs_sa.consumers.settings import Settings
from pgqrs_sa.consumers.verdicts import Verdict
from pgqrs_sa.operations.consume import Findings, Turn

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def delivery(id_: int) -> Delivery:
    return Delivery(id_, "mail", "{}", {}, None, 0, NOW, NOW, 1, 5, None, None, id_, None)


class FakeLine:
    """Settles whatever it is told to, and leases what it has been given."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.hurried = False
        self.settled: list[int] = []
        self.supply: list[Delivery] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.leasing = threading.Event()
        self.closed = threading.Event()
        self.error: Exception | None = None
        self.noted: list[dt.timedelta | None] = []

    def call(self, what, context, operation, *args, **kwargs):
        return self.call_until(self.stopping, what, context, operation, *args, **kwargs)

    def call_until(self, until, what, context, operation, *args, **kwargs):
        del until, context, operation, kwargs
        if self.error is not None:
            raise self.error
        if what == "a settlement":
            self.settled += [one.delivery.id for one in args[0]]
            return {one.delivery.id: "archived" for one in args[0]}
        if what == "a lease":
            done, _, limit = args[:3]
            self.settled += [one.id for one in done]
            self.leasing.set()
            assert self.go_on.wait(PATIENCE)
            taken, self.supply = self.supply[:limit], self.supply[limit:]
            return Turn(frozenset(one.id for one in done), taken)
        if what == "a note":
            self.noted.append(args[1])
        if what == "a look":
            ready = frozenset(args[0] if self.supply else ())
            return Findings(ready, frozenset(), frozenset())
        return None

    def lament(self, error, worker) -> None:
        pass

    def close(self) -> None:
        self.closed.set()


class Office:
    """A desk, its thread, and what was leased and not started."""

    def __init__(self, *, concurrency: int, prefetch: int, listening: bool) -> None:
        handlers = Handlers(concurrency, Retry(), asynchronous=False)

        def work(delivery: Delivery) -> None:
            """Never called."""

        handlers.add(
            "mail", work, lease=None, concurrency=None, prefetch=prefetch, timeout=None,
            retry=None, batch=None, weight=1, acknowledge="commit", payload=None,
        )  # fmt: skip
        (self.handler,) = handlers
        settings = Settings.checked(
            name="w", concurrency=concurrency, poll_interval=60, drain_timeout=1, heartbeat=10,
            housekeeping=None, version=None, models=None, codec=None, notify=False,
            listen_dsn=None, hooks=(),
        )  # fmt: skip
        self.line = FakeLine()
        self.ready: list[Unit] = []
        self.idle = False  # whether a thread of a handler has nothing to do
        context = replace(settings.context(), worker=1)
        schedule = Schedule(concurrency, 60, jitter=lambda: 0.5)
        schedule.work_on([self.handler])
        self.book = Book()
        self.desk = Desk(
            self.line, lambda: context, self.book, schedule, {"mail": dt.timedelta(hours=1)},
            Reporter(()), self.ready.extend, lambda _held: None, lambda: self.idle,
            until_empty=False, listening=listening,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.desk.run, daemon=True)

    def look(self) -> Unit | None:
        return self.ready.pop(0) if self.ready else None

    def finish(self, unit: Unit) -> None:
        verdicts = [Verdict(one, "archive") for one in unit.deliveries]
        self.desk.finished(unit, verdicts, quietly=True)


@contextmanager
def office(
    *, concurrency: int = 1, prefetch: int = 0, working: bool = True, listening: bool = False
):
    made = Office(concurrency=concurrency, prefetch=prefetch, listening=listening)
    if working:
        made.thread.start()
    yield made
    made.line.go_on.set()
    made.desk.close()
    if working:
        made.thread.join(PATIENCE)
        assert not made.thread.is_alive()


def test_a_thread_that_has_nothing_to_do_settles_and_leases_by_itself():
    with office(working=False) as one:
        one.line.supply = [delivery(1), delivery(2)]
        first = one.desk.help(one.look)
        assert [d.id for d in first.deliveries] == [1]
        one.finish(first)
        second = one.desk.help(one.look)
        assert [d.id for d in second.deliveries] == [2]
        assert one.line.settled == [1]


@pytest.mark.parametrize("idle", [True, False])
def test_a_call_is_left_to_a_thread_of_a_handlers_that_has_nothing_to_do_if_there_is_one(idle):
    rounds: list[str] = []

    def work() -> float:
        seat.read()
        rounds.append(threading.current_thread().name)
        return 60.0

    seat = Seat(work, lambda: 60.0, pytest.fail, lambda: idle, threading.Event())
    news = seat._news = LateEvent()
    news.may_go.set()
    own = threading.Thread(target=seat.occupy, name="own", daemon=True)
    own.start()
    assert news.waits.wait(PATIENCE)  # it has done a round, and sleeps
    assert rounds == ["own"]
    called: list[str] = []
    seat.call(lambda: called.append("called"))
    if idle:
        time.sleep(10 * LINGER)
        assert called == []
        assert seat.help(lambda: None) is None
    until(lambda: called == ["called"])
    assert rounds == ["own", threading.current_thread().name if idle else "own"]
    seat.end()
    seat.alarm()
    own.join(PATIENCE)
    assert not own.is_alive()


def test_a_handler_begins_before_producers_are_told_to_send_no_more_notifications():
    with office(working=False, listening=True) as one:
        news = one.desk._seat._news = LateEvent()
        news.may_go.set()
        one.thread.start()
        until(lambda: one.line.noted and news.waiting)  # it has looked once more, and sleeps
        assert one.line.noted[0] is not None
        one.idle = True
        one.line.leasing.clear()
        one.line.supply = [delivery(1)]
        one.desk.nudge("mail")
        one.line.noted.clear()
        noted_before = []

        def look() -> Unit | None:
            unit = one.look()
            if unit is not None:
                noted_before.extend(one.line.noted)
            return unit

        assert one.desk.help(look) is not None
        assert noted_before == []
        until(lambda: one.line.noted == [None])  # by the desk's own thread
        one.desk.close()
        one.thread.join(PATIENCE)
        assert not one.thread.is_alive()


def test_a_thread_that_has_more_to_start_leaves_the_rest_to_the_desks_own():
    with office(prefetch=1) as one:
        one.line.supply = [delivery(1), delivery(2)]
        one.desk.nudge("mail")
        until(lambda: len(one.ready) == 2)
        first = one.desk.help(one.look)
        one.finish(first)
        assert one.desk.help(one.look) is not None  # and its handler takes an hour
        until(lambda: one.line.settled == [1])


def test_what_was_done_while_another_leased_is_settled_although_there_is_more_to_start():
    with office(concurrency=2, prefetch=3) as one:
        one.line.supply = [delivery(n) for n in range(1, 6)]  # as many as it may have in hand
        one.desk.nudge("mail")
        until(lambda: len(one.ready) == 5)
        *units, last = [one.look() for _ in range(5)]
        one.line.leasing.clear()
        one.line.go_on.clear()
        one.line.supply = [delivery(n) for n in range(6, 10)]
        for unit in units:
            one.finish(unit)
        first = threading.Thread(target=one.desk.help, args=(one.look,))
        first.start()
        assert one.line.leasing.wait(PATIENCE)  # it has the seat, and the notes that were there
        one.finish(last)
        found = []
        second = threading.Thread(target=lambda: found.append(one.desk.help(one.look)))
        second.start()
        one.line.go_on.set()
        second.join(PATIENCE)
        first.join(PATIENCE)
        assert found != [None]  # its handler takes an hour
        until(lambda: 5 in one.line.settled)


class LateEvent(threading.Event):
    """One whose waiter is only scheduled again when it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()
        self.waiting = False
        self.may_go = threading.Event()

    def wait(self, timeout=None):
        self.waiting = True
        self.waits.set()
        found = super().wait(timeout)
        self.may_go.wait(PATIENCE)
        self.waiting = False
        return found


def test_the_end_is_not_missed_when_a_handlers_thread_comes_to_the_seat_first():
    with office(working=False) as one:
        late = one.desk._seat._news = LateEvent()
        late.may_go.set()
        one.line.supply = [delivery(1)]
        one.thread.start()
        until(lambda: one.ready)
        one.finish(one.look())
        late.may_go.clear()
        late.waits.clear()
        one.desk.stop_leasing()  # its thread is woken, and does not come to the processor
        one.desk.close()
        assert one.desk.help(one.look) is None
        assert one.line.settled == [1]
        late.may_go.set()
        assert one.desk.ended.wait(PATIENCE)
        one.thread.join(PATIENCE)
    assert one.line.closed.is_set()


def test_a_seat_that_is_taken_for_long_keeps_no_thread_from_what_is_there():
    with office(concurrency=2) as one:
        one.line.go_on.clear()
        one.desk.nudge("mail")
        assert one.line.leasing.wait(PATIENCE)
        found = []
        waiting = threading.Thread(target=lambda: found.append(one.desk.help(one.look)))
        waiting.start()
        one.ready.append(Unit(one.handler, (delivery(9),)))
        waiting.join(PATIENCE)
        assert found[0].deliveries[0].id == 9
        stopping = threading.Thread(target=one.desk.help, args=(one.look,))
        stopping.start()
        one.desk.stop_leasing()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()


@pytest.mark.parametrize("working", [True, False])
def test_an_error_in_a_handlers_thread_is_kept_as_one_of_the_desks_own(working):
    with office(working=False) as one:
        one.line.error = ValueError("not one that passes")
        assert one.desk.help(one.look) is None
        assert one.desk.fatal is one.line.error
        if working:
            one.thread.start()
            one.thread.join(PATIENCE)
            assert one.desk.ended.is_set()
        assert one.desk.help(one.look) is None

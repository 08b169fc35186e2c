"""The dispatcher's leader: who settles and leases, and who is woken for it.

With a line that has no database behind it, so that each can be held up where it matters.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Self

import pytest

from pgqrs_sa import Delivery, QueueNotFound, Retry
from pgqrs_sa._core.lease import explain_nothing
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.dispatcher import Dispatcher, _LeaseRequest
from pgqrs_sa.consumer.disposition import Disposition
from pgqrs_sa.consumer.handlers import Handlers, Invocation
from pgqrs_sa.consumer.leader import LINGER, REPLY_LINGER, LeaderFollower
from pgqrs_sa.consumer.options import ConsumerConfig
from pgqrs_sa.consumer.scheduler import Fetch, Scheduler
from pgqrs_sa.consumer.state import ConsumerState
from pgqrs_sa.consumer.store import QueueCheck, SettledAndLeased, UnansweredLease
from pgqrs_sa.types import Outcome
from support.cases import each_case
from support.waiting import PATIENCE, until

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def delivery(id_: int) -> Delivery:
    return Delivery(id_, "mail", "{}", {}, None, 0, NOW, NOW, 1, 5, None, None, NOW, id_, None)


class FakeLine:
    """Settles what it is told to, and leases what it was given."""

    can_send = False

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.stop_requested = False
        self.settled: list[int] = []
        self.supply: list[Delivery] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.leasing = threading.Event()
        self.closed = threading.Event()
        self.error: Exception | None = None
        self.noted: list[dt.timedelta | None] = []
        self.trouble: Callable[[], None] | None = None  # instead of the answer to a lease
        self.strays: list[tuple[list[UnansweredLease], list[int]]] = []
        self.lookup_status: dict[int, str] = {}  # of what cannot be settled
        self.explained: list[str] = []
        self.more_exhausted = False
        self.asked: list[tuple[str, threading.Event, dict[str, object]]] = []
        self.logged: list[tuple[BaseException, int | None]] = []
        self.findings: QueueCheck | None = None  # of the next look
        self.gone: Exception | None = None

    def run(self, what, context, operation, *args, **kwargs):
        return self.run_until(self.stopping, what, context, operation, *args, **kwargs)

    def exchange_until(self, until, what, context, begin, *args):
        return self.run_until(until, what, context, begin, *args)

    def run_until(self, until, what, context, operation, *args, **kwargs):
        del context
        self.asked.append((what, until, kwargs))
        if self.error is not None:
            raise self.error
        by_operation = {store.lookup_status: self._fates, explain_nothing: self._explained}
        by_name = {
            "a settlement": self._settles,
            "a lease": self._leases,
            "a look": self._looks,
            "a look for strays": lambda *asked: self.strays.append(asked),
            "a note": lambda _worker, span: self.noted.append(span),
        }
        return (by_operation.get(operation) or by_name[what])(*args)

    def _fates(self, deliveries):
        return {delivery.id: self.lookup_status[delivery.id] for delivery in deliveries}

    def _explained(self, queue, _worker, _look):
        self.explained.append(queue)
        if self.gone is not None:
            raise self.gone
        return self.more_exhausted

    def _settles(self, dispositions):
        done = [
            disposition.delivery.id
            for disposition in dispositions
            if disposition.delivery.id not in self.lookup_status
        ]
        self.settled += done
        return dict.fromkeys(done, "archived")

    def _leases(self, done, _queue, limit, *_):
        self.settled += [delivery.id for delivery in done]
        self.leasing.set()
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            self.on_failure()
            trouble()
            raise OSError
        assert self.go_on.wait(PATIENCE)
        taken, self.supply = self.supply[:limit], self.supply[limit:]
        return SettledAndLeased(frozenset(delivery.id for delivery in done), taken)

    def _looks(self, queues):
        found = QueueCheck(frozenset(queues if self.supply else ()), frozenset(), frozenset())
        findings, self.findings = self.findings or found, None
        return findings

    def log_failure(self, error, worker) -> None:
        self.logged.append((error, worker))

    def close(self) -> None:
        self.closed.set()


class Office:
    """A dispatcher, its thread, and what was leased and not started."""

    def __init__(self, *, concurrency: int, prefetch: int, listening: bool) -> None:
        handlers = Handlers(concurrency, Retry(), asynchronous=False)

        def work(delivery: Delivery) -> None:
            """Never called."""

        handlers.add("mail", work, prefetch=prefetch)
        (self.handler,) = handlers.by_queue.values()
        config = ConsumerConfig.validated(
            name="w",
            concurrency=concurrency,
            poll_interval=60,
            housekeeping=None,
            notify=listening,
        )
        self.line = FakeLine()
        self.ready: list[Invocation] = []
        self.ended_calls: list[Delivery] = []
        self.idle = False  # whether a thread of a handler has nothing to do
        schedule = Scheduler(concurrency, 60, jitter=lambda: 0.5)
        schedule.add_handlers([self.handler])
        executor: Any = SimpleNamespace(
            wake=lambda: self.idle, abandon=lambda _leases: None, leads=True
        )
        self.state = ConsumerState(config, [self.handler], executor, until_empty=False, grace=0.0)
        self.state.registered(SimpleNamespace(id=1))  # type: ignore[arg-type]
        self.state.lease_lengths = {"mail": dt.timedelta(hours=1)}
        self.book = self.state.lease_table
        calls: Any = SimpleNamespace(end=self.ended_calls.append)
        self.state.call_transactions = calls
        runtime: Any = SimpleNamespace(accept=self.ready.extend, waiting=False)
        self.dispatcher = Dispatcher(self.line, self.state, schedule, runtime)
        self.thread = threading.Thread(target=self.dispatcher.run, daemon=True)

    def look(self) -> Invocation | None:
        return self.ready.pop(0) if self.ready else None

    def finish(self, unit: Invocation) -> None:
        dispositions = [Disposition(delivery, "archive") for delivery in unit.deliveries]
        self.dispatcher.finished(unit, dispositions, quiet=True)


@contextmanager
def office(
    *, concurrency: int = 1, prefetch: int = 0, working: bool = True, listening: bool = False
):
    made = Office(concurrency=concurrency, prefetch=prefetch, listening=listening)
    if working:
        made.thread.start()
    yield made
    made.line.go_on.set()
    made.dispatcher.close()
    if working:
        made.thread.join(PATIENCE)
        assert not made.thread.is_alive()


def test_a_thread_that_has_nothing_to_do_settles_and_leases_by_itself():
    with office(working=False) as item:
        item.line.supply = [delivery(1), delivery(2)]
        first = item.dispatcher.lead_or_claim(item.look)
        assert [d.id for d in first.deliveries] == [1]
        item.finish(first)
        second = item.dispatcher.lead_or_claim(item.look)
        assert [d.id for d in second.deliveries] == [2]
        assert item.line.settled == [1]


@pytest.mark.parametrize("idle", [True, False])
def test_a_call_is_left_to_a_thread_of_a_handlers_that_has_nothing_to_do_if_there_is_one(idle):
    rounds: list[str] = []

    def work() -> float:
        run_tasks(leader)
        rounds.append(threading.current_thread().name)
        return 60.0

    leader = led(work, idle_time=60.0, idle=idle)
    news = leader._has_tasks = LateEvent()
    news.may_go.set()
    own = threading.Thread(target=leader.run, name="own", daemon=True)
    own.start()
    assert news.waits.wait(PATIENCE)  # it has done a round, and sleeps
    assert rounds == ["own"]
    called: list[str] = []
    leader.submit_now(lambda: called.append("called"))
    if idle:
        time.sleep(10 * LINGER)
        assert called == []
        assert leader.try_lead(lambda: None) is None
    until(lambda: called == ["called"])
    assert rounds == ["own", threading.current_thread().name if idle else "own"]
    leader.stop()
    leader.wake()
    own.join(PATIENCE)
    assert not own.is_alive()


def led(run_round: Callable[[], float], *, idle_time: float, idle: bool) -> LeaderFollower:
    """Return a leader of these rounds; ``idle``: whether a thread of a handler is."""

    def run(*, by_handler: bool) -> float:
        del by_handler
        return run_round()

    work: Any = SimpleNamespace(
        run_round=run,
        idle_time=lambda: idle_time,
        in_flight_since=None,
        fail=pytest.fail,
    )
    executor: Any = SimpleNamespace(wake=lambda: idle)
    return LeaderFollower(work, executor, threading.Event())


def run_tasks(leader: LeaderFollower) -> None:
    """Do what each round does first."""
    while leader.tasks:
        leader.tasks.popleft()()


class Rounds:
    """A leader whose rounds do what the notes say, and note who has done them."""

    def __init__(self, *rests: float, wake: bool = False) -> None:
        self.by: list[str] = []
        self.rests = list(rests)  # of each round; then an hour
        self.leader = led(self.round, idle_time=3600.0, idle=wake)
        self.own = threading.Thread(target=self.leader.run, name="own", daemon=True)

    def round(self) -> float:
        run_tasks(self.leader)
        self.by.append(threading.current_thread().name)
        return self.rests.pop(0) if self.rests else 3600.0

    def __enter__(self) -> Self:
        self.own.start()
        until(lambda: self.by and self.leader._asleep_until and not self.leader._leading.locked())
        return self

    def __exit__(self, *_: object) -> None:
        self.leader.stop()
        self.leader.wake()
        self.own.join(PATIENCE)
        assert not self.own.is_alive()


def test_what_is_left_for_the_leader_is_done_by_its_own_thread_if_nobody_comes():
    with Rounds() as rounds:
        called: list[str] = []
        rounds.leader.submit(lambda: called.append("done"))
        until(lambda: called)
        assert rounds.by == ["own", "own"]


def test_what_is_left_quietly_waits_for_whoever_comes_from_the_first_note_on():
    rounds = Rounds()
    called: list[str] = []
    before = time.monotonic()
    rounds.leader.submit(lambda: called.append("first"), quiet=True)
    since = rounds.leader._oldest_task_at
    assert before <= since <= time.monotonic()
    rounds.leader.submit(lambda: called.append("second"), quiet=True)
    assert (rounds.leader._oldest_task_at, len(rounds.leader.tasks), called) == (since, 2, [])
    assert not rounds.leader._woken.is_set()
    assert rounds.leader.try_lead(lambda: None) is None
    assert (called, len(rounds.leader.tasks)) == (["first", "second"], 0)
    rounds.leader.submit(lambda: None, quiet=True)
    assert rounds.leader._oldest_task_at >= since


def test_who_finds_something_needs_no_leader_and_leaves_word_of_what_is_to_be_done():
    with office(working=False) as item:
        unit = Invocation(item.handler, (delivery(1),))
        leader = Rounds().leader
        leader._leading = SimpleNamespace(acquire=lambda **_: pytest.fail("it waits"))
        assert leader.try_lead(lambda: unit) is unit
        assert not leader._has_tasks.is_set()
        leader.submit(lambda: None, quiet=True)
        assert leader.try_lead(lambda: unit) is unit
        assert leader._has_tasks.is_set()


def test_who_must_not_wait_does_not_wait_for_the_leader():
    rounds = Rounds()
    looks: list[None] = []
    with rounds.leader._leading:
        assert (
            rounds.leader.try_lead(lambda: rounds.leader._stop_waiting.set() or looks.append(None))
            is None
        )
    assert (len(looks), rounds.by) == (2, [])


def test_its_own_thread_comes_when_a_round_of_another_says_so():
    with Rounds(3600.0, 0.05) as rounds:
        assert rounds.leader.try_lead(lambda: None) is None
        until(lambda: rounds.by == ["own", threading.current_thread().name, "own"])


def test_its_own_thread_is_not_woken_for_what_it_comes_for_anyway():
    rounds = Rounds(0.0)
    rounds.leader._asleep_until = time.monotonic() + 1800.0
    assert rounds.leader.try_lead(lambda: None) is None
    assert not rounds.leader._woken.is_set()


def test_its_own_thread_ends_after_the_last_round_of_another():
    with Rounds() as rounds:
        rounds.leader.submit(rounds.leader.stop, quiet=True)
        assert rounds.leader.try_lead(lambda: None) is None
        rounds.own.join(PATIENCE)
        assert not rounds.own.is_alive()
        assert rounds.by == ["own", threading.current_thread().name]


def test_its_own_thread_does_not_sleep_after_the_last_round():
    with Rounds() as rounds:
        rounds.leader.submit(rounds.leader.stop)
        rounds.own.join(PATIENCE)
        assert not rounds.own.is_alive()


def test_a_round_that_has_more_to_do_is_followed_by_another():
    with Rounds(0.0, 0.0, 3600.0) as rounds:
        until(lambda: rounds.by == ["own"] * 3)


def test_after_the_end_nobody_does_a_round():
    rounds = Rounds()
    rounds.leader.stop()
    assert rounds.leader.try_lead(lambda: None) is None
    rounds.leader.run()
    assert rounds.by == []


def test_a_handler_begins_before_producers_are_told_to_send_no_more_notifications():
    with office(working=False, listening=True) as item:
        news = item.dispatcher._leader._has_tasks = LateEvent()
        news.may_go.set()
        item.thread.start()
        until(lambda: item.line.noted and news.waiting)  # it has looked once more, and sleeps
        assert item.line.noted[0] is not None
        item.idle = True
        item.line.leasing.clear()
        item.line.supply = [delivery(1)]
        item.dispatcher.wake("mail")
        item.line.noted.clear()
        noted_before = []

        def look() -> Invocation | None:
            unit = item.look()
            if unit is not None:
                noted_before.extend(item.line.noted)
            return unit

        assert item.dispatcher.lead_or_claim(look) is not None
        assert noted_before == []
        until(lambda: item.line.noted == [None])  # by the dispatcher's own thread
        item.dispatcher.close()
        item.thread.join(PATIENCE)
        assert not item.thread.is_alive()


def test_a_thread_that_has_more_to_start_leaves_the_rest_to_the_dispatchers_own():
    with office(prefetch=1) as item:
        item.line.supply = [delivery(1), delivery(2)]
        item.dispatcher.wake("mail")
        until(lambda: len(item.ready) == 2)
        first = item.dispatcher.lead_or_claim(item.look)
        item.finish(first)
        assert item.dispatcher.lead_or_claim(item.look) is not None  # and its handler takes an hour
        until(lambda: item.line.settled == [1])


def test_what_was_done_while_another_leased_is_settled_although_there_is_more_to_start():
    with office(concurrency=2, prefetch=3) as item:
        item.line.supply = [delivery(n) for n in range(1, 6)]  # as many as it may have in hand
        item.dispatcher.wake("mail")
        until(lambda: len(item.ready) == 5)
        *units, last = [item.look() for _ in range(5)]
        item.line.leasing.clear()
        item.line.go_on.clear()
        item.line.supply = [delivery(n) for n in range(6, 10)]
        for unit in units:
            item.finish(unit)
        first = threading.Thread(target=item.dispatcher.lead_or_claim, args=(item.look,))
        first.start()
        assert item.line.leasing.wait(PATIENCE)  # it has the leader, and the notes that were there
        item.finish(last)
        found = []
        second = threading.Thread(
            target=lambda: found.append(item.dispatcher.lead_or_claim(item.look))
        )
        second.start()
        item.line.go_on.set()
        second.join(PATIENCE)
        first.join(PATIENCE)
        assert found != [None]  # its handler takes an hour
        until(lambda: 5 in item.line.settled)


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


def test_the_end_is_not_missed_when_a_handlers_thread_comes_to_the_leader_first():
    with office(working=False) as item:
        late = item.dispatcher._leader._has_tasks = LateEvent()
        late.may_go.set()
        item.line.supply = [delivery(1)]
        item.thread.start()
        until(lambda: item.ready)
        item.finish(item.look())
        late.may_go.clear()
        late.waits.clear()
        item.dispatcher.stop_leasing()  # its thread is woken, and does not come to the processor
        item.dispatcher.close()
        assert item.dispatcher.lead_or_claim(item.look) is None
        assert item.line.settled == [1]
        late.may_go.set()
        assert item.dispatcher.ended.wait(PATIENCE)
        item.thread.join(PATIENCE)
    assert item.line.closed.is_set()


def test_a_leader_that_is_taken_for_long_keeps_no_thread_from_what_is_there():
    with office(concurrency=2) as item:
        item.line.go_on.clear()
        item.dispatcher.wake("mail")
        assert item.line.leasing.wait(PATIENCE)
        found = []
        waiting = threading.Thread(
            target=lambda: found.append(item.dispatcher.lead_or_claim(item.look))
        )
        waiting.start()
        item.ready.append(Invocation(item.handler, (delivery(9),)))
        waiting.join(PATIENCE)
        assert found[0].deliveries[0].id == 9
        stopping = threading.Thread(target=item.dispatcher.lead_or_claim, args=(item.look,))
        stopping.start()
        item.dispatcher.stop_leasing()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()


@pytest.mark.parametrize("working", [True, False])
def test_an_error_in_a_handlers_thread_is_kept_as_one_of_the_dispatchers_own(working):
    with office(working=False) as item:
        item.line.error = ValueError("not one that passes")
        assert item.dispatcher.lead_or_claim(item.look) is None
        assert item.dispatcher.fatal is item.line.error
        if working:
            item.thread.start()
            item.thread.join(PATIENCE)
            assert item.dispatcher.ended.is_set()
            assert item.dispatcher.stopped_leasing.is_set()
        assert item.line.logged == [(item.line.error, 1)]
        assert item.dispatcher.lead_or_claim(item.look) is None


def test_a_lease_without_an_answer_is_asked_about_before_the_end():
    with office(working=False) as item:
        item.line.supply = [delivery(1)]
        item.line.trouble = item.dispatcher.stop_leasing
        before = time.monotonic()
        assert item.dispatcher.lead_or_claim(item.look) is None
        assert item.line.strays == []
        assert item.dispatcher.lead_or_claim(item.look) is None
        (([unanswered], known),) = item.line.strays
        assert (unanswered.worker, unanswered.queue) == (1, "mail")
        assert unanswered.lease == dt.timedelta(hours=1)
        assert before <= unanswered.since <= unanswered.until <= time.monotonic()
        assert known == []
        assert item.dispatcher.lead_or_claim(item.look) is None
        assert len(item.line.strays) == 1
        assert item.dispatcher.fatal is None


# ----------------------------------------------------------------- what the dispatcher decides


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.settlements: list[tuple[int, str]] = []
        self.losses: list[int] = []
        dispatcher._events = self

    def is_told(self, _outcome) -> bool:
        return True

    def settled(self, _handler, disposition, word, _started_at) -> None:
        self.settlements.append((disposition.delivery.id, word))

    def ended(self, _outcome, _handler, lost, _started_at, **_) -> None:
        self.losses.append(lost.id)


def leased(office: Office, *ids: int) -> list[Delivery]:
    """Let the dispatcher hold messages, with nothing to lease."""
    office.dispatcher.wake("mail")
    office.line.supply = [delivery(id_) for id_ in ids]
    while (unit := office.dispatcher.lead_or_claim(office.look)) is not None:
        office.ready.append(unit)
        if len(office.ready) == len(ids):
            break
    found = [unit.deliveries[0] for unit in office.ready]
    office.ready.clear()
    assert sorted(found_.id for found_ in found) == sorted(ids)
    return found


def quiet(office: Office) -> None:
    """Lease no more, so that rounds only settle."""
    office.dispatcher.pause(paused=True)


@each_case(
    ("fate", "left", "settlements", "losses"),
    [
        ("busy", 1, [], []),
        (Outcome.LOST, 0, [], [1]),
        ("dead", 0, [(1, "dead")], []),
        ("archived", 0, [(1, "archived")], []),
    ],
)
def test_what_could_not_be_settled_is_looked_up(fate, left, settlements, losses):
    with office(working=False) as item:
        told = Told(item.dispatcher)
        (mine,) = leased(item, 1)
        quiet(item)
        item.line.lookup_status = {1: fate}
        item.dispatcher.settle(item.handler, [Disposition(mine, "archive")])
        before = time.monotonic()
        rest = item.dispatcher.run_round()
        assert (item.dispatcher.unsettled, told.settlements, told.losses) == (
            left,
            settlements,
            losses,
        )
        assert mine.lease_lost is (fate != "busy")
        assert item.line.settled == []
        if fate == "busy":
            assert rest == 0.0
            (waiting,) = item.dispatcher._pending.values()
            assert 0.2 <= waiting.not_before - before <= 0.2 + time.monotonic() - before
            assert 0.0 < item.dispatcher.idle_time() <= 0.2
            assert item.dispatcher.run_round() > 0.0  # it is not its time yet
            waiting.not_before = 0.0
            item.line.lookup_status = {}
            item.dispatcher.run_round()
            assert (item.dispatcher.unsettled, told.settlements) == (0, [(1, "archived")])
        item.dispatcher.close()
        item.dispatcher.run_round()
        assert item.dispatcher._leader._stopped


def test_what_others_have_told_of_is_told_once():
    with office(working=False) as item:
        told = Told(item.dispatcher)
        (mine,) = leased(item, 1)
        quiet(item)
        item.book.remove([mine])
        for fate in (Outcome.LOST, Outcome.ARCHIVED):
            item.line.lookup_status = {1: fate}
            item.dispatcher.settle(item.handler, [Disposition(mine, "archive")])
            item.dispatcher.run_round()
        assert (told.settlements, told.losses, item.dispatcher.unsettled) == ([], [], 0)


def test_the_first_disposition_of_the_newest_attempt_counts():
    with office(working=False) as item:
        quiet(item)
        old, new = delivery(1), replace(delivery(1), fencing_token=9)
        dispositions = [
            Disposition(old, "retry"),
            Disposition(new, "archive"),
            Disposition(new, "dead"),
            Disposition(old, "dead"),
        ]
        for disposition in dispositions:
            item.dispatcher._add_pending(item.handler, [disposition], 0.0)
        (waiting,) = item.dispatcher._pending.values()
        assert waiting.disposition == dispositions[1]


@each_case(
    ("kind", "lost", "joins"),
    [
        ("archive", False, True),
        ("archive", True, False),
        ("retry", False, False),
    ],
)
def test_what_is_archived_and_still_held_joins_the_next_lease(kind, lost, joins):
    with office(working=False) as item:
        (mine,) = leased(item, 1)
        if lost:
            item.book.get(mine).lost = True
        assert item.dispatcher._can_settle_with_lease(Disposition(mine, kind)) is joins
        item.book.remove([mine])
        assert item.dispatcher._can_settle_with_lease(Disposition(mine, kind)) is False


def test_with_a_store_ahead_what_is_done_waits_a_moment_for_a_lease_to_join():
    with office(working=False, prefetch=3) as item:
        told = Told(item.dispatcher)
        first, *_ = leased(item, 1, 2)
        item.line.supply = []
        item.dispatcher._scheduler.record_fetch(
            "mail", 3, 0, time.monotonic() + 1000
        )  # nothing to lease
        now = time.monotonic()
        item.dispatcher._add_pending(item.handler, [Disposition(first, "archive")], now)
        (waiting,) = item.dispatcher._pending.values()
        assert waiting.settle_by == now + LINGER
        waiting.settle_by = now + 1000
        assert not item.dispatcher._is_due([waiting], now)
        assert item.dispatcher._is_due([waiting], now + 1000)
        quiet(item)
        assert item.dispatcher._is_due([waiting], now)
        assert not item.dispatcher._is_due([], now)
        item.dispatcher.run_round()
        assert told.settlements == [(first.id, "archived")]


def test_without_a_store_what_is_done_waits_for_nothing():
    with office(working=False) as item:
        (mine,) = leased(item, 1)
        item.dispatcher._add_pending(item.handler, [Disposition(mine, "archive")], time.monotonic())
        assert item.dispatcher._pending[1].settle_by == 0.0


@pytest.mark.parametrize("locked", [True, False])
def test_it_has_ended_when_all_is_empty_and_nothing_was_locked(locked):
    with office(working=False) as item:
        item.dispatcher._until_empty = True
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, time.monotonic())
        ready = frozenset(["mail"] if locked else [])
        item.line.findings = QueueCheck(ready, frozenset(), frozenset())
        assert item.dispatcher.run_round() == 0.0
        assert item.dispatcher.ended.is_set() is (not locked)
        assert item.dispatcher.empty is (not locked)
        assert item.dispatcher._scheduler.drained is (not locked)
        assert item.dispatcher._leases_now is locked


def test_it_has_not_ended_while_something_is_to_be_settled_or_it_is_to_go_on():
    for until_empty, settling in ((True, True), (False, False)):
        with office(working=False) as item:
            item.dispatcher._until_empty = until_empty
            if settling:
                item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "retry")], 0.0)
                item.dispatcher._pending[1].not_before = time.monotonic() + 1000
            item.dispatcher._scheduler.record_fetch("mail", 1, 0, time.monotonic())
            item.dispatcher.run_round()
            assert not item.dispatcher.ended.is_set()


def test_exhausted_messages_are_looked_at_once_in_a_second_and_a_queue_that_is_gone_is_left():
    with office(working=False) as item:
        now = time.monotonic()
        item.dispatcher._explain_empty("mail", now)
        item.dispatcher._explain_empty("mail", now + 0.9)
        assert item.line.explained == ["mail"]
        item.dispatcher._explain_empty("mail", now + 1.0)
        assert item.line.explained == ["mail", "mail"]
        item.line.gone = QueueNotFound("mail", ())
        with pytest.raises(QueueNotFound):  # it was the last
            item.dispatcher._explain_empty("mail", now + 2.0)
        assert item.dispatcher._scheduler.queues == []


def test_exhausted_messages_are_looked_at_again_at_once_while_there_may_be_more():
    with office(working=False) as item:
        now = time.monotonic()
        item.line.more_exhausted = True
        item.dispatcher._explain_empty("mail", now)
        item.line.more_exhausted = False
        item.dispatcher._explain_empty("mail", now)
        item.dispatcher._explain_empty("mail", now)
        assert item.line.explained == ["mail", "mail"]


def test_what_a_look_has_found_of_queues_is_explained():
    with office(working=False) as item:
        item.line.findings = QueueCheck(frozenset(), frozenset(["mail"]), frozenset())
        item.dispatcher._check_queues(["mail"])
        item.line.findings = QueueCheck(frozenset(), frozenset(), frozenset(["other"]))
        item.dispatcher._check_queues(["other"])
        assert item.line.explained == ["mail", "other"]


def test_producers_are_asked_for_notifications_when_it_has_been_idle_and_only_then():
    with office(working=False, listening=True) as item:
        now = time.monotonic()
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, now)
        assert not item.dispatcher._ask_for_notifications(now + 0.04)
        item.dispatcher.pause(paused=True)
        assert not item.dispatcher._ask_for_notifications(now + 1.0)
        item.dispatcher.pause(paused=False)
        assert item.dispatcher._ask_for_notifications(now + 1.0)
        span = dt.timedelta(seconds=240)  # of four looks
        assert item.line.noted == [span]
        assert item.dispatcher._scheduler.idle_time(now) == 0.0  # there may be something by now
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, now + 1.0)
        assert not item.dispatcher._ask_for_notifications(now + 120.9)
        assert item.dispatcher._ask_for_notifications(now + 121.0)
        assert not item.dispatcher._needs_no_notifications(now + 121.0)
        item.dispatcher._scheduler.record_fetch("mail", 1, 1, now + 122.0)
        assert item.dispatcher._needs_no_notifications(now + 122.0)
        assert item.dispatcher.idle_time() == 0.0
        item.dispatcher.run_round()
        assert item.line.noted == [span, span, None]
        assert not item.dispatcher._needs_no_notifications(now + 122.0)


def test_who_does_not_listen_asks_for_no_notifications():
    with office(working=False) as item:
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, time.monotonic())
        assert not item.dispatcher._ask_for_notifications(time.monotonic() + 1000)


def test_it_rests_until_something_can_be_leased_or_settled():
    with office(working=False) as item:
        now = time.monotonic()
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, now + 1000)
        assert 900 < item.dispatcher.idle_time() < 1300
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], now)
        waiting = item.dispatcher._pending[1]
        waiting.not_before, waiting.settle_by = now + 50, now + 70
        assert 60 < item.dispatcher.idle_time() <= 70
        quiet(item)
        assert item.dispatcher.idle_time() == 1.0
        waiting.settle_by = 0.0
        waiting.not_before = now + 0.9
        assert 0.0 < item.dispatcher.idle_time() <= 0.9
        item.dispatcher._pending.clear()
        assert item.dispatcher.idle_time() == 60.0


@pytest.mark.parametrize("hurried", [True, False])
def test_what_cannot_be_settled_keeps_it_from_the_end_until_there_is_no_time_left(hurried):
    with office(working=False) as item:
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], 0.0)
        item.line.lookup_status = {1: "busy"}
        item.dispatcher.stop_leasing()
        item.dispatcher.close()
        item.line.stop_requested = hurried
        item.dispatcher.run_round()
        assert item.dispatcher.stopped_leasing.is_set()
        assert item.dispatcher._leader._stopped is hurried
        assert item.dispatcher.unsettled == 1


@each_case(
    ("leaving", "hurried", "error", "passes"),
    [
        (True, False, OSError(), True),
        (True, True, OSError(), False),
        (True, False, ValueError(), False),
        (False, False, OSError(), False),
    ],
)
def test_an_error_is_passed_over_only_when_it_passes_and_it_stops(leaving, hurried, error, passes):
    with office(working=False) as item:
        if leaving:
            item.dispatcher.stop_leasing()
            item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], 0.0)
        item.line.stop_requested, item.line.error = hurried, error
        if passes:
            assert item.dispatcher._try_step(by_handler=False) == 0.0
        else:
            with pytest.raises(type(error)):
                item.dispatcher._try_step(by_handler=False)
        item.line.stop_requested, item.line.error = False, None


def test_dead_letters_that_were_leased_are_told_and_others_leased_at_once():
    with office(working=False) as item:
        told = Told(item.dispatcher)
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, time.monotonic() + 1000)
        item.dispatcher._report_undecodable(item.handler, [delivery(1)])
        assert told.settlements == [(1, "dead")]
        assert isinstance(item.dispatcher._scheduler.next(time.monotonic()), Fetch)


def test_its_own_thread_is_woken_for_whatever_changes():
    with office(working=False) as item:
        for change in (
            lambda: item.dispatcher.pause(paused=True),
            lambda: item.dispatcher.settle(item.handler, []),
            item.dispatcher.stop_leasing,
            item.dispatcher.close,
        ):
            item.dispatcher._leader._woken.clear()
            change()
            assert item.dispatcher._leader._woken.is_set()


def test_leases_without_an_answer_are_noted_for_the_worker_from_one_try_to_the_next():
    with office(working=False) as item:
        item.dispatcher._on_failure()  # it was no lease
        assert item.dispatcher._unanswered == []
        item.dispatcher._request = _LeaseRequest(
            item.handler, 1, dt.timedelta(hours=1), [], asked_at=5.0, since=5.0
        )
        item.dispatcher._on_failure()
        item.dispatcher._on_failure()
        first, second = item.dispatcher._unanswered
        assert (first.since, second.since) == (5.0, first.until)
        item.state.context = replace(item.state.context, worker=None)
        item.dispatcher._on_failure()
        assert len(item.dispatcher._unanswered) == 2


def test_leases_without_an_answer_keep_it_from_the_end_until_they_were_looked_for():
    with office(working=False) as item:
        item.dispatcher._unanswered = [UnansweredLease(1, "mail", dt.timedelta(hours=1), 0.0, 1.0)]
        item.dispatcher.stop_leasing()
        item.dispatcher.close()
        assert item.dispatcher.run_round() == 0.0
        assert not item.dispatcher._leader._stopped
        assert len(item.line.strays) == 1
        item.dispatcher.run_round()
        assert item.dispatcher._leader._stopped
        assert len(item.line.strays) == 1


def test_who_only_drains_does_not_end_although_there_is_no_time_left():
    with office(working=False) as item:
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], 0.0)
        item.line.lookup_status = {1: "busy"}
        item.dispatcher.stop_leasing()
        item.line.stop_requested = True
        item.dispatcher.run_round()
        assert not item.dispatcher._leader._stopped
        item.dispatcher.settle(item.handler, [])
        assert item.dispatcher.unsettled == 2


def test_what_is_leased_goes_to_whoever_has_the_leader_and_the_limit_is_the_schedules():
    with office(working=False, concurrency=2) as item:
        item.line.supply = [delivery(n) for n in range(1, 5)]
        item.dispatcher.wake("mail")
        item.dispatcher.run_round()
        assert [unit.deliveries[0].id for unit in item.ready] == [1, 2]
        assert item.dispatcher._scheduler.in_hand == 2
        item.dispatcher.finished(item.ready[0], [Disposition(delivery(1), "retry")], quiet=True)
        run_tasks(item.dispatcher._leader)
        assert item.dispatcher._scheduler.in_hand == 1
        assert item.dispatcher._pending[1].disposition.action == "retry"


class Counting(threading.Event):
    """One that counts how often it was waited for."""

    waits = 0

    def wait(self, timeout=None):
        self.waits += 1
        return super().wait(timeout)


def test_the_leader_sleeps_when_it_has_seen_the_news():
    rounds = Rounds()
    news = rounds.leader._has_tasks = Counting()
    news.set()
    rounds.leader._asleep_until = time.monotonic() + 0.05
    rounds.leader._sleep()
    assert news.waits <= 2
    assert time.monotonic() >= rounds.leader._asleep_until


def test_the_leader_lets_a_handlers_thread_come_first_for_what_is_left_quietly():
    rounds = Rounds()
    alarm = rounds.leader._woken = Counting()
    rounds.leader._asleep_until = time.monotonic() + 3600
    rounds.leader.submit(lambda: None, quiet=True)
    rounds.leader._oldest_task_at = time.monotonic()
    rounds.leader._sleep()
    assert alarm.waits >= 1
    assert time.monotonic() >= rounds.leader._oldest_task_at + LINGER


def test_it_has_not_ended_while_a_handler_runs():
    with office(working=False, concurrency=2) as item:
        leased(item, 1)
        item.dispatcher._until_empty = True
        item.dispatcher._scheduler.record_fetch("mail", 1, 0, time.monotonic())
        item.dispatcher.run_round()
        assert not item.dispatcher.ended.is_set()


def test_what_is_done_is_settled_at_once_if_no_handler_runs_that_could_join():
    with office(working=False) as item:
        now = time.monotonic()
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], now)
        (waiting,) = item.dispatcher._pending.values()
        waiting.settle_by = now + 1000
        assert item.dispatcher._is_due([waiting], now)


def test_a_turn_settles_what_cannot_join_it_and_archives_the_rest():
    with office(working=False, concurrency=5) as item:
        told = Told(item.dispatcher)
        mine, other = leased(item, 1, 2)
        item.dispatcher._add_pending(
            item.handler, [Disposition(mine, "archive"), Disposition(other, "retry")], 0.0
        )
        item.line.supply = [delivery(3)]
        item.dispatcher.wake("mail")
        item.dispatcher.run_round()
        assert item.line.settled == [other.id, mine.id]
        assert [id_ for id_, _ in told.settlements] == [other.id, mine.id]
        assert [unit.deliveries[0].id for unit in item.ready] == [3]
        item.dispatcher._on_failure()
        assert item.dispatcher._unanswered == []  # the lease was answered
        assert item.line.strays == []
        item.dispatcher._unanswered = [UnansweredLease(1, "mail", dt.timedelta(hours=1), 0.0, 1.0)]
        item.line.supply = [delivery(4)]
        item.dispatcher.wake("mail")
        item.dispatcher.run_round()
        ((_, known),) = item.line.strays
        assert sorted(known) == [delivery(3).fencing_token, delivery(4).fencing_token]
        assert item.dispatcher._unanswered == []


def test_a_lease_of_what_was_held_here_ends_the_earlier_one():
    with office(working=False, concurrency=3) as item:
        lost: list[list[int]] = []
        item.state.mark_lost = lambda gone: lost.append(
            [held.delivery.fencing_token for held in gone]
        )
        leased(item, 1)
        assert lost == []
        item.line.supply = [replace(delivery(1), fencing_token=77)]
        item.dispatcher.wake("mail")
        item.dispatcher.run_round()
        assert lost == [[delivery(1).fencing_token]]


def test_acknowledged_first_what_was_archived_is_begun_and_the_rest_is_forgotten():
    with office(working=False, concurrency=3) as item:
        item.handler = replace(item.handler, acknowledge="first")
        held = item.book.add(
            item.handler, [delivery(n) for n in (1, 2, 3)], dt.timedelta(hours=1), time.monotonic()
        )
        item.dispatcher._scheduler.record_fetch("mail", 3, 3, time.monotonic())
        # The reply for the second was lost.
        item.line.lookup_status = {2: Outcome.ARCHIVED, 3: Outcome.LOST}
        item.dispatcher._start(item.handler, held)
        assert [unit.deliveries[0].id for unit in item.ready] == [1, 2]
        assert item.line.settled == [1]
        assert item.book.all() == []
        assert item.dispatcher._scheduler.in_hand == 2


@pytest.mark.parametrize("resting", [True, False])
def test_who_settles_waits_for_a_database_until_it_stops_or_is_to_rest(resting):
    with office(working=False) as item:
        quiet(item)
        if resting:
            item.dispatcher.stopped_leasing.set()
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "archive")], 0.0)
        item.dispatcher.run_round()
        until_ = item.line.stopping if resting else item.dispatcher._stop_waiting
        assert item.line.asked == [("a settlement", until_, {"strict": False})]


def test_a_row_that_is_locked_holds_up_no_other():
    with office(working=False) as item:
        quiet(item)
        dispositions = [Disposition(delivery(n), "archive") for n in (1, 2)]
        item.line.lookup_status = {1: "busy"}
        item.dispatcher._add_pending(item.handler, dispositions, 0.0)
        item.dispatcher.run_round()
        assert [*item.dispatcher._pending] == [1]
        assert item.line.settled == [2]


def test_a_call_that_keeps_its_message_locked_is_ended_when_that_is_found_again():
    """Not at once: its COMMIT may be on its way."""
    with office(working=False) as item:
        item.line.lookup_status = {1: "busy"}
        item.dispatcher._add_pending(item.handler, [Disposition(delivery(1), "release")], 0.0)
        for ended in ([], [1], [1, 1]):
            item.dispatcher._pending[1].not_before = 0.0
            item.dispatcher.run_round()
            assert [call.id for call in item.ended_calls] == ended
        item.line.lookup_status = {}
        item.dispatcher._pending[1].not_before = 0.0
        item.dispatcher.run_round()
        assert item.line.settled == [1]


def test_its_own_thread_reads_a_reply_that_no_handlers_thread_comes_for_and_no_sooner():
    leader = led(lambda: 0.0, idle_time=0.0, idle=False)
    assert leader._asleep_until < time.monotonic()
    sent_at = time.monotonic()
    leader._work.in_flight_since = sent_at  # type: ignore[misc]
    leader._sleep()
    assert time.monotonic() >= sent_at + REPLY_LINGER
    leader.wake()  # as when the consumer stops
    leader._work.in_flight_since = time.monotonic() + PATIENCE  # type: ignore[misc]
    leader._sleep()
    assert time.monotonic() < sent_at + PATIENCE


def test_a_handlers_thread_with_nothing_to_start_waits_for_the_reply_in_flight():
    rounds: list[str] = []

    def run_round() -> float:
        rounds.append("round")
        leader._work.in_flight_since = None if len(rounds) > 1 else 1.0  # type: ignore[misc]
        return 60.0

    leader = led(run_round, idle_time=60.0, idle=False)
    assert leader.try_lead(lambda: None) is None
    assert rounds == ["round", "round"]

"""What a run does with what is leased, and how it ends: without a database and without threads."""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from pgqrs_sa import EventLoopLost
from pgqrs_sa.consumer.disposition import Disposition
from pgqrs_sa.consumer.handlers import Invocation
from pgqrs_sa.consumer.options import ConsumerConfig
from pgqrs_sa.consumer.runtime import Runtime
from pgqrs_sa.consumer.state import ConsumerState
from pgqrs_sa.types import Outcome
from support.handlers import delivery, handlers

HOUR = dt.timedelta(hours=1)


class Executor:
    """Who would call the handlers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.abandoned: list[list[int]] = []
        self.silent = 0.0
        self.is_dead = False

    def submit(self, count: int) -> None:
        self.begun.append(count)

    def silent_for(self) -> float:
        return self.silent

    def abandon(self, held: Any) -> None:
        self.abandoned.append([lease.delivery.id for lease in held])


class Dispatcher:
    """Where it would be settled."""

    def __init__(self) -> None:
        self.settled: list[tuple[int, str]] = []
        self.quiet: list[bool] = []
        self.said: list[Any] = []
        self.stopped_leasing, self.ended = threading.Event(), threading.Event()
        self.fatal: BaseException | None = None
        self.unsettled = 0

    def finished(self, _unit: Invocation, dispositions: Any, *, quiet: bool) -> None:
        self.settled += [
            (disposition.delivery.id, disposition.action) for disposition in dispositions
        ]
        self.quiet.append(quiet)

    def settle(self, _handler: Any, dispositions: Any) -> None:
        self.settled += [
            (disposition.delivery.id, disposition.action) for disposition in dispositions
        ]

    def lead_or_claim(self, look: Any) -> Any:
        return look()

    def pause(self, *, paused: bool) -> None:
        self.said.append(("pause", paused))

    def stop_leasing(self) -> None:
        self.said.append("stop leasing")

    def close(self) -> None:
        self.said.append("close")


class Thread:
    """One that ends after some joins, or when its connection is aborted."""

    name = "pgqrs-dispatcher"

    def __init__(self, joins: float = 0) -> None:
        self.left = joins

    def join(self, _seconds: float | None = None) -> None:
        self.left -= 1

    def is_alive(self) -> bool:
        return self.left > 0


class Scene:
    """A run that has started, as far as the rest of it can tell."""

    def __init__(self, *, concurrency: int = 2, **options: Any) -> None:
        config = ConsumerConfig.validated(
            name="w", concurrency=concurrency, poll_interval=60, housekeeping=None
        )
        (self.handler,) = handlers(options)
        self.executor: Any = Executor()
        state = ConsumerState(config, [self.handler], self.executor, until_empty=False, grace=1.0)
        self.runtime = Runtime(state)
        self.dispatcher: Any = Dispatcher()
        self.runtime.dispatcher = self.dispatcher
        self.renewer: Any = SimpleNamespace(
            fatal=None, close=lambda: self.dispatcher.said.append("end")
        )
        self.runtime.renewer = self.renewer
        self.lines: list[Any] = [
            SimpleNamespace(
                abort=lambda: self.dispatcher.said.append("cut"), abort_if_stuck=lambda: None
            )
            for _ in range(2)
        ]
        self.runtime._dispatcher_connection, self.runtime._renewer_connection = self.lines
        self.runtime._threads = [Thread(), Thread(), Thread()]  # type: ignore[list-item]
        self.started: list[Invocation] = []
        self.told: list[tuple[int, str, float | None]] = []
        reporter: Any = SimpleNamespace(
            worker=7,
            started=self.started.append,
            settled=lambda _handler, disposition, word, at: self.told.append(
                (disposition.delivery.id, word, at)
            ),
        )
        self.runtime.state.events = reporter

    def units(self, *ids: int, held: bool = True) -> list[Invocation]:
        leased = [delivery(id_) for id_ in ids]
        if held:
            self.runtime.state.lease_table.add(
                self.handler, leased, HOUR, self.runtime.state.lease_table._clock()
            )
        return [Invocation(self.handler, (delivery,)) for delivery in leased]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_what_is_leased_is_begun_as_often_as_it_may_run(scene):
    first, second, third = scene.units(1, 2, 3)
    scene.runtime.accept([first, second, third])
    assert scene.executor.begun == [3]
    assert scene.runtime.waiting
    assert scene.runtime.next_invocation() is first
    assert scene.runtime.next_ready_invocation() is second
    assert scene.runtime.next_ready_invocation() is scene.runtime.next_invocation() is None
    assert scene.started == [first, second]
    assert scene.runtime.busy == 2
    assert scene.dispatcher.settled == []
    scene.runtime.finished(first, [Disposition(first.deliveries[0], "archive")], quiet=True)
    assert (scene.dispatcher.settled, scene.dispatcher.quiet) == ([(1, "archive")], [True])
    assert scene.runtime.state.lease_table.get(first.deliveries[0]).settling
    assert scene.runtime.next_ready_invocation() is third
    assert not scene.runtime.waiting


@pytest.mark.parametrize("state", ["draining", "paused"])
@pytest.mark.parametrize("acknowledge", ["commit", "first"])
def test_what_comes_too_late_goes_back_unless_it_is_acknowledged(state, acknowledge):
    scene = Scene(acknowledge=acknowledge)
    setattr(scene.runtime, f"_{state}", True)
    scene.runtime.accept(scene.units(1, 2))
    if acknowledge == "commit":
        assert (scene.dispatcher.settled, scene.executor.begun) == (
            [(1, "release"), (2, "release")],
            [],
        )
        assert scene.dispatcher.quiet == [False, False]
        assert not scene.runtime.waiting
    else:
        assert (scene.dispatcher.settled, scene.executor.begun) == ([], [2])


@pytest.mark.parametrize(("ids", "back"), [(None, [1, 2, 3]), ({2}, [2]), (set(), [])])
def test_what_waits_is_given_back(scene, ids, back):
    scene.runtime.accept(scene.units(1, 2, 3))
    scene.runtime._release_unstarted(ids)
    assert scene.dispatcher.settled == [(item, "release") for item in back]
    assert scene.runtime._run_queue.waiting == 3 - len(back)


def test_what_waits_and_is_acknowledged_stays():
    scene = Scene(acknowledge="first")
    scene.runtime.accept(scene.units(1))
    scene.runtime._release_unstarted()
    assert scene.dispatcher.settled == []
    assert scene.runtime.waiting


@pytest.mark.parametrize("way", ["next_invocation", "next_ready_invocation"])
def test_what_was_lost_while_it_waited_is_not_begun(scene, way):
    lost, held = scene.units(1, 2)
    scene.runtime.state.lease_table.mark_lost(lost.deliveries)
    scene.runtime.accept([lost, held])
    assert getattr(scene.runtime, way)() is held
    assert scene.started == [held]
    assert scene.dispatcher.settled == [(1, "release")]
    assert scene.runtime.busy == 1
    assert scene.runtime.state.lease_table.get(held.deliveries[0]).thread == threading.get_ident()


def test_what_is_acknowledged_needs_no_lease_to_begin():
    scene = Scene(acknowledge="first")
    (unit,) = scene.units(1, held=False)
    scene.runtime.accept([unit])
    assert scene.runtime.next_ready_invocation() is unit


def test_what_its_own_transaction_has_settled_is_told_and_not_settled_again(scene):
    (unit,) = scene.units(1)
    scene.runtime.accept([unit])
    scene.runtime.next_ready_invocation()
    started = scene.runtime.state.lease_table.get(unit.deliveries[0]).started_at
    disposition = Disposition(unit.deliveries[0], "retry", outcome=Outcome.RETRIED)
    for _ in range(2):
        scene.runtime.finished(unit, [disposition])
    assert scene.told == [(1, "retry", started)]
    assert scene.dispatcher.settled == []
    assert scene.dispatcher.quiet == [False, False]


def test_what_is_acknowledged_by_hand_is_left_to_that():
    scene = Scene(acknowledge="manual")
    (unit,) = scene.units(1)
    scene.runtime.finished(unit, [Disposition(unit.deliveries[0], "keep")])
    assert scene.runtime.state.lease_table.all() == []
    assert scene.runtime.state.lease_table.tokens() == [unit.deliveries[0].fencing_token]
    assert scene.told == scene.dispatcher.settled == []


@pytest.mark.parametrize("error", [None, ValueError("x")])
def test_what_was_acknowledged_first_is_told_and_its_error_logged(caplog, error):
    scene = Scene(acknowledge="first")
    (unit,) = scene.units(1, held=False)
    scene.runtime.finished(unit, [Disposition(unit.deliveries[0], "keep", error=error)])
    assert scene.told == ([(1, "archived", None)] if error is None else [])
    told = ["message 1 of q0 failed after its acknowledgement: ValueError"] if error else []
    assert caplog.messages == told


def test_it_is_idle_when_it_rests_and_nothing_runs_or_waits(scene):
    first, second = scene.units(1, 2)
    assert not scene.runtime.idle
    scene.dispatcher.stopped_leasing.set()
    assert scene.runtime.idle
    scene.runtime.accept([first, second])
    assert not scene.runtime.idle
    scene.runtime.next_ready_invocation()
    scene.runtime._release_unstarted()
    assert not scene.runtime.idle
    assert not scene.runtime.wait_idle(0.0)
    scene.runtime._draining = True
    end = threading.Timer(0.02, scene.runtime.finished, (first, []))
    began = time.monotonic()
    end.start()
    assert scene.runtime.wait_idle(60.0)
    assert time.monotonic() - began < 50.0  # it was told, and has not waited for all of that
    end.join()


def test_whoever_waits_for_the_end_is_told_when_nothing_more_is_leased(scene):
    rests = threading.Timer(0.02, scene.dispatcher.stopped_leasing.set)
    began = time.monotonic()
    rests.start()
    assert scene.runtime.wait_idle(60.0)
    assert time.monotonic() - began < 50.0
    rests.join()


def test_it_drains_once(scene):
    scene.runtime.accept(scene.units(1))
    for _ in range(2):
        scene.runtime.drain()
        assert scene.runtime.stopping
    assert scene.dispatcher.said == ["stop leasing"]
    assert scene.dispatcher.settled == [(1, "release")]


PASSES, BUG = OSError("away"), ValueError("a bug")


@pytest.mark.parametrize(
    ("dispatcher", "renewer", "hurried", "fatal"),
    [
        (None, None, True, None),
        (BUG, None, False, BUG),
        (None, BUG, False, BUG),
        (PASSES, None, False, PASSES),
        (PASSES, None, True, None),
        (PASSES, PASSES, True, None),
        (PASSES, BUG, True, PASSES),
        (BUG, None, True, BUG),
    ],
)
def test_an_error_ends_the_run_unless_the_database_is_away_at_the_end(
    scene, dispatcher, renewer, hurried, fatal
):
    scene.dispatcher.fatal, scene.renewer.fatal = dispatcher, renewer
    if hurried:
        scene.runtime.abort()
    assert scene.runtime.aborted is hurried
    assert scene.runtime.fatal is fatal
    lost = scene.runtime._loop_lost = EventLoopLost("gone")
    assert scene.runtime.fatal is lost


def test_it_is_over_when_it_is_drained_or_broken(scene):
    assert not scene.runtime.over
    scene.runtime._loop_lost = EventLoopLost("gone")
    assert scene.runtime.over
    scene.runtime._loop_lost, scene.renewer.fatal = None, BUG
    assert scene.runtime.over
    scene.renewer.fatal = None
    scene.dispatcher.ended.set()
    assert scene.runtime.over


@pytest.mark.parametrize(("silent", "paused"), [(2.0, False), (2.1, True), (29.0, True)])
def test_nothing_is_leased_while_no_handler_can_be_called(scene, caplog, silent, paused):
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    scene.runtime.accept(scene.units(1))
    scene.executor.silent = silent
    for _ in range(2):
        scene.runtime._check_executor()
    assert scene.dispatcher.said == ([("pause", True)] if paused else [])
    assert scene.dispatcher.settled == ([(1, "release")] if paused else [])
    assert len(caplog.messages) == paused
    scene.executor.silent = 0.0
    scene.runtime.accept(scene.units(2) if not paused else [])
    scene.runtime._check_executor()
    assert scene.dispatcher.said == ([("pause", True), ("pause", False)] if paused else [])
    assert scene.dispatcher.settled == ([(1, "release")] if paused else [])
    assert not scene.runtime._paused
    assert scene.runtime._loop_lost is None


def test_a_run_that_drains_is_not_paused_as_well(scene):
    scene.runtime._draining = True
    scene.executor.silent = 29.0
    scene.runtime._check_executor()
    assert scene.dispatcher.said == []


def test_short_leases_are_given_back_sooner(scene):
    scene.runtime.state.shortest_lease = 2.0
    scene.executor.silent = 1.1
    scene.runtime._check_executor()
    assert scene.dispatcher.said == [("pause", True)]


@pytest.mark.parametrize(
    ("silent", "gone", "told"),
    [
        (31.5, True, "has not run for 31.5 s"),
        (math.inf, True, "is closed"),
        (30.0, True, None),
        (31.0, False, None),
    ],
)
def test_an_event_loop_that_is_gone_ends_the_run(scene, silent, gone, told):
    scene.executor.silent, scene.executor.is_dead = silent, gone
    scene.runtime._check_executor()
    lost = scene.runtime._loop_lost
    assert (lost is not None) is (told is not None)
    if told:
        assert told in str(lost)
        scene.runtime._check_executor()
        assert scene.runtime._loop_lost is lost


def test_a_run_that_cannot_go_on_ends_by_itself(scene):
    scene.units(1)
    scene.runtime._loop_lost = EventLoopLost("gone")
    with scene.runtime._closing:
        scene.runtime._shut_down()  # somebody does that
    assert scene.dispatcher.said == scene.executor.abandoned == []
    scene.runtime._shut_down()
    assert scene.executor.abandoned == [[1]]
    assert scene.dispatcher.said == ["stop leasing", "close", "end"]
    assert scene.runtime.closed


def test_a_run_that_is_broken_abandons_no_handler(scene):
    scene.units(1)
    scene.runtime._shut_down()
    assert scene.executor.abandoned == []
    assert scene.runtime.closed


@pytest.mark.parametrize(("lease", "seconds"), [(1.2, 0.2), (3.0, 0.5), (30.0, 0.5)])
def test_it_is_watched_more_often_the_shorter_its_leases_are(scene, lease, seconds):
    waits: list[float] = []
    watched: list[str] = []
    for line, name in zip(scene.lines, ("dispatcher", "renewer"), strict=True):
        line.abort_if_stuck = partial(watched.append, name)

    def wait(asked: float) -> bool:
        waits.append(asked)
        return len(waits) > 2

    scene.runtime._closed = SimpleNamespace(wait=wait, set=lambda: None)
    scene.runtime.state.shortest_lease = lease
    fresh, late = scene.units(1, 2)
    scene.runtime.accept([fresh, late])
    scene.runtime.state.lease_table.get(late.deliveries[0]).start_by = 0.0
    scene.executor.silent = 29.0 if lease == 30.0 else 0.0
    scene.runtime._watch()
    assert waits == [pytest.approx(seconds)] * 3
    assert watched == ["dispatcher", "renewer"] * 2
    assert scene.runtime._paused is (lease == 30.0)
    assert scene.dispatcher.settled[:1] == [(1 if lease == 30.0 else 2, "release")]
    assert len(scene.dispatcher.settled) == (2 if lease == 30.0 else 1)
    assert not scene.runtime.closed


def test_whoever_watches_ends_a_run_that_is_broken(scene):
    waits = iter([False, True])
    scene.runtime._closed = SimpleNamespace(wait=lambda _: next(waits), set=lambda: None)
    scene.renewer.fatal = BUG
    scene.runtime._watch()
    assert scene.runtime.closed


def test_at_the_end_what_runs_is_given_back_and_all_that_was_subscribed_ends(scene):
    (unit,) = scene.units(1)
    scene.runtime.accept([unit])
    scene.runtime.next_ready_invocation()
    ended: list[str] = []
    scene.runtime._cleanup = [lambda: ended.append("wakeups"), lambda: ended.append("listener")]
    assert scene.runtime.close(lambda: False) is False
    assert unit.deliveries[0].lease_lost
    assert scene.dispatcher.settled == [(1, "release")]
    assert ended == ["wakeups", "listener"]
    assert scene.dispatcher.said == ["close", "end"]
    assert scene.runtime._closed.is_set()
    assert scene.runtime.close(lambda: False) is False
    assert scene.dispatcher.said == ["close", "end"]


@pytest.mark.parametrize("left", [0, 1])
def test_it_has_ended_well_if_nothing_is_left_to_be_settled(scene, left):
    scene.dispatcher.unsettled = left
    assert scene.runtime.close(lambda: False) is (not left)


def test_whoever_closes_it_waits_for_its_watch(scene):
    watch: Any = Thread(1)
    scene.runtime._threads[2] = watch
    assert scene.runtime.close(lambda: False)
    assert not watch.is_alive()


@pytest.mark.parametrize(
    ("left", "hurried", "patient"),
    [(0, False, False), (1, False, True), (2, False, True), (1, True, False), (0, True, False)],
)
def test_what_is_left_to_be_settled_has_more_time(scene, left, hurried, patient):
    joined: list[tuple[Any, bool]] = []
    scene.runtime._join = lambda thread, waits: joined.append((thread, waits()))
    scene.dispatcher.unsettled = left
    scene.runtime.close(lambda: hurried)
    dispatcher, renewer, _watch = scene.runtime._threads
    assert joined == [(dispatcher, patient), (renewer, False)]


def test_its_watch_does_not_wait_for_itself(scene):
    own: Any = threading.current_thread()
    scene.runtime._threads[2] = own
    assert scene.runtime.close(lambda: False)


@pytest.mark.parametrize(
    ("joins", "patient", "hurried", "cut", "hangs"),
    [
        (0, False, False, False, False),
        (17, False, False, False, False),  # within its second
        (18, False, True, False, False),
        (19, False, True, True, False),
        (81, True, False, False, False),
        (82, True, True, False, False),
        (200, False, True, True, True),
    ],
)
def test_a_thread_has_its_time_then_no_database_to_wait_for_and_then_no_connection(
    scene, monkeypatch, caplog, joins, patient, hurried, cut, hangs
):
    now = [1000.0]
    thread: Any = Thread(joins)

    def join(seconds: float) -> None:
        now[0] += 0.0625 if seconds < 1 else seconds  # whose sums are exact
        thread.left -= 1

    thread.join = join
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pgqrs_sa.consumer.runtime.time", clock)
    scene.runtime._join(thread, lambda: patient)
    assert scene.runtime.aborted is hurried
    assert scene.dispatcher.said == (["cut", "cut"] if cut else [])
    assert caplog.messages == (["pgqrs-dispatcher hangs: its leases run out by themselves"] * hangs)

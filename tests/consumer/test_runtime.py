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
from test_scheduler import delivery, handlers

from pgqrs_sa import EventLoopLost
from pgqrs_sa.consumer.disposition import Verdict
from pgqrs_sa.consumer.handlers import Unit
from pgqrs_sa.consumer.options import Settings
from pgqrs_sa.consumer.runtime import Runtime

HOUR = dt.timedelta(hours=1)


class Crew:
    """Who would call the handlers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.abandoned: list[list[int]] = []
        self.silent = 0.0
        self.gone = False

    def begin(self, count: int) -> None:
        self.begun.append(count)

    def silent_for(self) -> float:
        return self.silent

    def abandon(self, held: Any) -> None:
        self.abandoned.append([one.delivery.id for one in held])


class Desk:
    """Where it would be settled."""

    def __init__(self) -> None:
        self.settled: list[tuple[int, str]] = []
        self.quietly: list[bool] = []
        self.said: list[Any] = []
        self.resting, self.ended = threading.Event(), threading.Event()
        self.fatal: BaseException | None = None
        self.left = 0

    def finished(self, _unit: Unit, verdicts: Any, *, quietly: bool) -> None:
        self.settled += [(one.delivery.id, one.kind) for one in verdicts]
        self.quietly.append(quietly)

    def settle(self, _handler: Any, verdicts: Any) -> None:
        self.settled += [(one.delivery.id, one.kind) for one in verdicts]

    def help(self, look: Any) -> Any:
        return look()

    def pause(self, *, paused: bool) -> None:
        self.said.append(("pause", paused))

    def stop_leasing(self) -> None:
        self.said.append("stop leasing")

    def close(self) -> None:
        self.said.append("close")


class Thread:
    """One that ends after so many joins, or when its line is cut."""

    name = "pgqrs-desk"

    def __init__(self, joins: float = 0) -> None:
        self.left = joins

    def join(self, _seconds: float | None = None) -> None:
        self.left -= 1

    def is_alive(self) -> bool:
        return self.left > 0


class Scene:
    """A run that has started, as far as the rest of it can tell."""

    def __init__(self, *, concurrency: int = 2, **options: Any) -> None:
        settings = Settings.checked(
            name="w", concurrency=concurrency, poll_interval=60, drain_timeout=1, heartbeat=10,
            housekeeping=None, version=None, models=None, codec=None, notify=False,
            listen_dsn=None, hooks=(),
        )  # fmt: skip
        (self.handler,) = handlers(options)
        self.crew: Any = Crew()
        plug: Any = None
        self.runtime = Runtime(
            settings, [self.handler], self.crew, plug, listener=None, until_empty=False, grace=1.0
        )
        self.desk: Any = Desk()
        self.runtime.desk = self.desk
        self.keeper: Any = SimpleNamespace(fatal=None, close=lambda: self.desk.said.append("end"))
        self.runtime.keeper = self.keeper
        self.lines: list[Any] = [
            SimpleNamespace(cut=lambda: self.desk.said.append("cut"), watch=lambda: None)
            for _ in range(2)
        ]
        self.runtime._desk_line, self.runtime._keeper_line = self.lines
        self.runtime._threads = [Thread(), Thread(), Thread()]  # type: ignore[list-item]
        self.started: list[Unit] = []
        self.told: list[tuple[int, str, float | None]] = []
        reporter: Any = SimpleNamespace(
            worker=7,
            started=self.started.append,
            settled=lambda _handler, verdict, word, at: self.told.append(
                (verdict.delivery.id, word, at)
            ),
        )
        self.runtime.reporter = reporter

    def units(self, *ids: int, held: bool = True) -> list[Unit]:
        leased = [delivery(id_) for id_ in ids]
        if held:
            self.runtime.book.enter(self.handler, leased, HOUR, self.runtime.book._clock())
        return [Unit(self.handler, (one,)) for one in leased]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_what_is_leased_is_begun_as_often_as_it_may_run(scene):
    first, second, third = scene.units(1, 2, 3)
    scene.runtime._begin([first, second, third])
    assert scene.crew.begun == [3]
    assert scene.runtime.waiting
    assert scene.runtime.next_unit() is first
    assert scene.runtime.next_ready() is second
    assert scene.runtime.next_ready() is scene.runtime.next_unit() is None
    assert scene.started == [first, second]
    assert scene.runtime.busy == 2
    assert scene.desk.settled == []
    scene.runtime.finished(first, [Verdict(first.deliveries[0], "archive")], quietly=True)
    assert (scene.desk.settled, scene.desk.quietly) == ([(1, "archive")], [True])
    assert scene.runtime.book.get(first.deliveries[0]).settling
    assert scene.runtime.next_ready() is third
    assert not scene.runtime.waiting


@pytest.mark.parametrize("state", ["draining", "paused"])
@pytest.mark.parametrize("acknowledge", ["commit", "first"])
def test_what_comes_too_late_goes_back_unless_it_is_acknowledged(state, acknowledge):
    scene = Scene(acknowledge=acknowledge)
    setattr(scene.runtime, f"_{state}", True)
    scene.runtime._begin(scene.units(1, 2))
    if acknowledge == "commit":
        assert (scene.desk.settled, scene.crew.begun) == ([(1, "release"), (2, "release")], [])
        assert scene.desk.quietly == [False, False]
        assert not scene.runtime.waiting
    else:
        assert (scene.desk.settled, scene.crew.begun) == ([], [2])


@pytest.mark.parametrize(("ids", "back"), [(None, [1, 2, 3]), ({2}, [2]), (set(), [])])
def test_what_waits_is_given_back(scene, ids, back):
    scene.runtime._begin(scene.units(1, 2, 3))
    scene.runtime._return_waiting(ids)
    assert scene.desk.settled == [(one, "release") for one in back]
    assert scene.runtime._ready.waiting == 3 - len(back)


def test_what_waits_and_is_acknowledged_stays():
    scene = Scene(acknowledge="first")
    scene.runtime._begin(scene.units(1))
    scene.runtime._return_waiting()
    assert scene.desk.settled == []
    assert scene.runtime.waiting


@pytest.mark.parametrize("way", ["next_unit", "next_ready"])
def test_what_was_lost_while_it_waited_is_not_begun(scene, way):
    lost, held = scene.units(1, 2)
    scene.runtime.book.lose(lost.deliveries)
    scene.runtime._begin([lost, held])
    assert getattr(scene.runtime, way)() is held
    assert scene.started == [held]
    assert scene.desk.settled == [(1, "release")]
    assert scene.runtime.busy == 1
    assert scene.runtime.book.get(held.deliveries[0]).thread == threading.get_ident()


def test_what_is_acknowledged_needs_no_lease_to_begin():
    scene = Scene(acknowledge="first")
    (unit,) = scene.units(1, held=False)
    scene.runtime._begin([unit])
    assert scene.runtime.next_ready() is unit


def test_what_its_own_transaction_has_settled_is_told_and_not_settled_again(scene):
    (unit,) = scene.units(1)
    scene.runtime._begin([unit])
    scene.runtime.next_ready()
    started = scene.runtime.book.get(unit.deliveries[0]).started_at
    verdict = Verdict(unit.deliveries[0], "retry", word="retry")
    for _ in range(2):
        scene.runtime.finished(unit, [verdict])
    assert scene.told == [(1, "retry", started)]
    assert scene.desk.settled == []
    assert scene.desk.quietly == [False, False]


def test_what_is_acknowledged_by_hand_is_left_to_that():
    scene = Scene(acknowledge="manual")
    (unit,) = scene.units(1)
    scene.runtime.finished(unit, [Verdict(unit.deliveries[0], "keep")])
    assert scene.runtime.book.all() == []
    assert scene.runtime.book.tokens() == [unit.deliveries[0].fencing_token]
    assert scene.told == scene.desk.settled == []


@pytest.mark.parametrize("error", [None, ValueError("x")])
def test_what_was_acknowledged_first_is_told_and_its_error_logged(caplog, error):
    scene = Scene(acknowledge="first")
    (unit,) = scene.units(1, held=False)
    scene.runtime.finished(unit, [Verdict(unit.deliveries[0], "keep", error=error)])
    assert scene.told == ([(1, "archived", None)] if error is None else [])
    told = ["message 1 of q0 failed after its acknowledgement: ValueError"] if error else []
    assert caplog.messages == told


def test_it_is_idle_when_it_rests_and_nothing_runs_or_waits(scene):
    first, second = scene.units(1, 2)
    assert not scene.runtime.idle
    scene.desk.resting.set()
    assert scene.runtime.idle
    scene.runtime._begin([first, second])
    assert not scene.runtime.idle
    scene.runtime.next_ready()
    scene.runtime._return_waiting()
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
    rests = threading.Timer(0.02, scene.desk.resting.set)
    began = time.monotonic()
    rests.start()
    assert scene.runtime.wait_idle(60.0)
    assert time.monotonic() - began < 50.0
    rests.join()


def test_it_drains_once(scene):
    scene.runtime._begin(scene.units(1))
    for _ in range(2):
        scene.runtime.drain()
        assert scene.runtime.stopping
    assert scene.desk.said == ["stop leasing"]
    assert scene.desk.settled == [(1, "release")]


PASSES, BUG = OSError("away"), ValueError("a bug")


@pytest.mark.parametrize(
    ("desk", "keeper", "hurried", "fatal"),
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
    scene, desk, keeper, hurried, fatal
):
    scene.desk.fatal, scene.keeper.fatal = desk, keeper
    if hurried:
        scene.runtime.give_up()
    assert scene.runtime.given_up is hurried
    assert scene.runtime.fatal is fatal
    lost = scene.runtime._lost = EventLoopLost("gone")
    assert scene.runtime.fatal is lost


def test_it_is_over_when_it_is_drained_or_broken(scene):
    assert not scene.runtime.over
    scene.runtime._lost = EventLoopLost("gone")
    assert scene.runtime.over
    scene.runtime._lost, scene.keeper.fatal = None, BUG
    assert scene.runtime.over
    scene.keeper.fatal = None
    scene.desk.ended.set()
    assert scene.runtime.over


@pytest.mark.parametrize(("silent", "paused"), [(2.0, False), (2.1, True), (29.0, True)])
def test_nothing_is_leased_while_no_handler_can_be_called(scene, caplog, silent, paused):
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    scene.runtime._begin(scene.units(1))
    scene.crew.silent = silent
    for _ in range(2):
        scene.runtime._watch_crew()
    assert scene.desk.said == ([("pause", True)] if paused else [])
    assert scene.desk.settled == ([(1, "release")] if paused else [])
    assert len(caplog.messages) == paused
    scene.crew.silent = 0.0
    scene.runtime._begin(scene.units(2) if not paused else [])
    scene.runtime._watch_crew()
    assert scene.desk.said == ([("pause", True), ("pause", False)] if paused else [])
    assert scene.desk.settled == ([(1, "release")] if paused else [])
    assert not scene.runtime._paused
    assert scene.runtime._lost is None


def test_a_run_that_drains_is_not_paused_as_well(scene):
    scene.runtime._draining = True
    scene.crew.silent = 29.0
    scene.runtime._watch_crew()
    assert scene.desk.said == []


def test_short_leases_are_given_back_sooner(scene):
    scene.runtime._shortest = 2.0
    scene.crew.silent = 1.1
    scene.runtime._watch_crew()
    assert scene.desk.said == [("pause", True)]


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
    scene.crew.silent, scene.crew.gone = silent, gone
    scene.runtime._watch_crew()
    lost = scene.runtime._lost
    assert (lost is not None) is (told is not None)
    if told:
        assert told in str(lost)
        scene.runtime._watch_crew()
        assert scene.runtime._lost is lost


def test_a_run_that_cannot_go_on_ends_by_itself(scene):
    scene.units(1)
    scene.runtime._lost = EventLoopLost("gone")
    with scene.runtime._closing:
        scene.runtime._end_by_itself()  # somebody does that
    assert scene.desk.said == scene.crew.abandoned == []
    scene.runtime._end_by_itself()
    assert scene.crew.abandoned == [[1]]
    assert scene.desk.said == ["stop leasing", "close", "end"]
    assert scene.runtime.closed


def test_a_run_that_is_broken_abandons_no_handler(scene):
    scene.units(1)
    scene.runtime._end_by_itself()
    assert scene.crew.abandoned == []
    assert scene.runtime.closed


@pytest.mark.parametrize(("lease", "seconds"), [(1.2, 0.2), (3.0, 0.5), (30.0, 0.5)])
def test_it_is_watched_more_often_the_shorter_its_leases_are(scene, lease, seconds):
    waits: list[float] = []
    watched: list[str] = []
    for line, name in zip(scene.lines, ("desk", "keeper"), strict=True):
        line.watch = partial(watched.append, name)

    def wait(asked: float) -> bool:
        waits.append(asked)
        return len(waits) > 2

    scene.runtime._closed = SimpleNamespace(wait=wait, set=lambda: None)
    scene.runtime._shortest = lease
    fresh, late = scene.units(1, 2)
    scene.runtime._begin([fresh, late])
    scene.runtime.book.get(late.deliveries[0]).begin_by = 0.0
    scene.crew.silent = 29.0 if lease == 30.0 else 0.0
    scene.runtime._keep_watch()
    assert waits == [pytest.approx(seconds)] * 3
    assert watched == ["desk", "keeper"] * 2
    assert scene.runtime._paused is (lease == 30.0)
    assert scene.desk.settled[:1] == [(1 if lease == 30.0 else 2, "release")]
    assert len(scene.desk.settled) == (2 if lease == 30.0 else 1)
    assert not scene.runtime.closed


def test_whoever_watches_ends_a_run_that_is_broken(scene):
    waits = iter([False, True])
    scene.runtime._closed = SimpleNamespace(wait=lambda _: next(waits), set=lambda: None)
    scene.keeper.fatal = BUG
    scene.runtime._keep_watch()
    assert scene.runtime.closed


def test_at_the_end_what_runs_is_given_back_and_all_that_was_subscribed_ends(scene):
    (unit,) = scene.units(1)
    scene.runtime._begin([unit])
    scene.runtime.next_ready()
    ended: list[str] = []
    scene.runtime._cleanup = [lambda: ended.append("nudges"), lambda: ended.append("listener")]
    assert scene.runtime.close(lambda: False) is False
    assert unit.deliveries[0].lease_lost
    assert scene.desk.settled == [(1, "release")]
    assert ended == ["nudges", "listener"]
    assert scene.desk.said == ["close", "end"]
    assert scene.runtime._closed.is_set()
    assert scene.runtime.close(lambda: False) is False
    assert scene.desk.said == ["close", "end"]


@pytest.mark.parametrize("left", [0, 1])
def test_it_has_ended_well_if_nothing_is_left_to_be_settled(scene, left):
    scene.desk.left = left
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
    scene.desk.left = left
    scene.runtime.close(lambda: hurried)
    desk, keeper, _watch = scene.runtime._threads
    assert joined == [(desk, patient), (keeper, False)]


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
    assert scene.runtime.given_up is hurried
    assert scene.desk.said == (["cut", "cut"] if cut else [])
    assert caplog.messages == (["pgqrs-desk hangs: its leases run out by themselves"] * hangs)

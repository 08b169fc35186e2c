"""What keeps leases: when it renews them, what it takes for lost, and when it tells of itself.

With a line that has no database behind it and a clock that is moved by hand.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from test_scheduler import delivery, handlers

from pgqrs_sa import HandlerTimeout, WorkerInfo, WorkerNotFound
from pgqrs_sa._core import archive, workers
from pgqrs_sa._core.context import Context
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.leases import Book
from pgqrs_sa.consumer.renewer import Keeper

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTEXT = Context.of(None, None, 7, allow_autocommit=True)
LEASE = 30.0


class FakeLine:
    """Answers operations by their names: with a value, what a function returns, or an error."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}
        self.lamented: list[BaseException] = []
        self.closed = 0

    def once(self, _context: Any, operation: Any, *args: Any) -> Any:
        self.calls.append((operation.__name__, *args))
        answer = self.answers.get(operation.__name__)
        if isinstance(answer, BaseException):
            raise answer
        return answer(*args) if callable(answer) else answer

    def call(self, _what: str, context: Any, operation: Any, *args: Any) -> Any:
        return self.once(context, operation, *args)

    transaction = once

    def lament(self, error: BaseException, _worker: int | None) -> None:
        self.lamented.append(error)

    def close(self) -> None:
        self.closed += 1

    def taken(self) -> list[tuple[Any, ...]]:
        """Return the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


class Scene:
    """A keeper, and all that it is told and tells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("pgqrs_sa.consumer.renewer.time", clock)
        self.line = FakeLine()
        self.book = Book(clock.monotonic)
        self.context = CONTEXT
        self.told: list[Any] = []
        self.abandoned: list[list[int]] = []
        self.timed_out: list[Any] = []
        self.registered = 0
        self.lives: list[WorkerInfo] = []

    def keeper(self, **options: Any) -> Keeper:
        reporter: Any = SimpleNamespace(
            ended=lambda *what: self.told.append(what), lives=self.lives.append
        )
        line: Any = self.line
        settings: dict[str, Any] = {
            "queues": ["q0"],
            "heartbeat": 10.0,
            "grace": 2.0,
            "housekeeping": None,
            "silent_for": 60.0,
        }
        return Keeper(
            line,
            lambda: self.context,
            self.book,
            reporter,
            self.register,
            lambda held, verdict: self.timed_out.append((held, verdict)),
            lambda held: self.abandoned.append([one.delivery.id for one in held]),
            lambda _held: "where it is",
            **settings | options,
        )

    def register(self) -> WorkerInfo:
        self.registered += 1
        return worker("ready")

    def hold(self, *ids: int, lease: float = LEASE, **options: Any) -> list[Any]:
        (handler,) = handlers(options)
        leased = [delivery(id_) for id_ in ids]
        self.book.enter(handler, leased, timedelta(seconds=lease), self.now)
        return [self.book.get(one) for one in leased]


def worker(status: Any) -> WorkerInfo:
    return WorkerInfo(
        id=7, name="w", status=status, queues=("q0",), hostname="h", pid=None, port=None,
        version=None, started_at=NOW, heartbeat_at=NOW, shutdown_at=None,
    )  # fmt: skip


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_it_rests_until_the_next_lease_or_heartbeat_is_due_and_no_longer_than_it_may(scene):
    keeper = scene.keeper(heartbeat=10.0, longest_rest=1.0)
    assert keeper._rest() == 1.0
    scene.hold(1, lease=0.9)
    assert keeper._rest() == pytest.approx(0.3)
    scene.now += 0.3
    assert keeper._rest() == 0.02
    scene.book.remove([one.delivery for one in scene.book.all()])
    scene.now = 1009.5
    assert keeper._rest() == pytest.approx(0.5)


def test_leases_are_renewed_together_if_they_are_as_long(scene):
    keeper = scene.keeper()
    first, second = scene.hold(1, 2, lease=30)
    (other,) = scene.hold(3, lease=24)
    scene.line.answers["renew"] = lambda held, _span: frozenset(one.id for one in held)
    scene.now += 7.9
    keeper._renew()
    assert scene.line.taken() == []
    scene.now = 1010.0
    keeper._renew()
    assert scene.line.taken() == [
        ("renew", [first.delivery, second.delivery], timedelta(seconds=30)),
        ("renew", [other.delivery], timedelta(seconds=24)),
    ]
    assert (first.renew_at, first.good_until) == (1020.0, 1040.0)
    assert (other.renew_at, other.good_until) == (1018.0, 1034.0)


@pytest.mark.parametrize("lease", [30.0, 1.5])
@pytest.mark.parametrize("fate", ["busy", "lost", "dead", "archived"])
@pytest.mark.parametrize("state", ["", "settling", "timed_out"])
def test_what_cannot_be_renewed_is_lost_unless_it_is_locked_or_being_settled(
    scene, lease, fate, state
):
    keeper = scene.keeper()
    kept, held = scene.hold(1, 2, lease=lease)
    end = 1000.0 + lease
    scene.line.answers |= {"renew": frozenset([1]), "fates": {2: fate}}
    scene.now += lease / 3
    if state:
        setattr(held, state, True)
    keeper._renew_group(lease, [kept, held])
    assert scene.line.taken()[1:] == [("fates", [held.delivery])]
    assert kept.good_until == scene.now + lease
    assert held.renew_at == pytest.approx(scene.now + min(0.5, lease / 6))
    assert held.good_until == (max(end, scene.now + 1.0) if fate == "busy" else end)
    lost = fate in ("lost", "dead") and not state
    assert held.lost is lost
    assert scene.book.all() == ([kept] if lost else [kept, held])
    assert scene.abandoned == ([[2]] if lost else [])
    assert [one[:2] for one in scene.told] == ([("on_lease_lost", "lease lost")] if lost else [])


def test_a_locked_lease_that_would_run_out_is_good_for_another_second(scene):
    keeper = scene.keeper()
    (held,) = scene.hold(1, lease=0.9)
    scene.line.answers |= {"renew": frozenset(), "fates": {1: "busy"}}
    scene.now += 0.6
    keeper._renew()
    assert held.good_until == pytest.approx(scene.now + 1.0)


def test_what_is_forgotten_already_is_told_to_nobody(scene):
    keeper = scene.keeper()
    held = scene.hold(1)
    scene.book.remove([one.delivery for one in held])
    keeper.lose(held)
    assert scene.abandoned == scene.told == []


def test_a_handler_has_its_time_and_some_grace(scene):
    keeper = scene.keeper(grace=2.0)
    (held,) = scene.hold(1, timeout=20)
    scene.book.start([held.delivery], None)
    scene.now += 21.9
    keeper._end_overdue()
    assert scene.timed_out == scene.abandoned == []
    scene.now += 0.2
    keeper._end_overdue()
    ((which, verdict),) = scene.timed_out
    assert which is held
    assert (verdict.kind, verdict.delivery) == ("retry", held.delivery)
    assert isinstance(verdict.error, HandlerTimeout)
    assert "20" in str(verdict.error)
    assert scene.abandoned == [[1]]


def test_a_heartbeat_says_how_much_is_held_when_it_is_due(scene, caplog):
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    keeper = scene.keeper(heartbeat=10.0)
    scene.hold(1, 2)
    scene.line.answers["heartbeat"] = worker("ready")
    scene.now += 9.9
    keeper._beat()
    assert scene.line.taken() == []
    scene.now = 1010.0
    keeper._beat()
    keeper._beat()
    assert scene.line.taken() == [("heartbeat", 7, 2)]
    assert scene.lives == [worker("ready")]
    assert caplog.messages == []
    scene.line.answers["heartbeat"] = worker("suspended")
    for scene.now in (1020.0, 1030.0):
        keeper._beat()
    assert caplog.messages == ["worker 7 is suspended"]


def test_who_is_not_registered_sends_no_heartbeat(scene):
    keeper = scene.keeper()
    scene.context = replace(CONTEXT, worker=None)
    scene.now += 100
    keeper._beat()
    assert scene.line.taken() == []


def test_who_was_taken_for_dead_has_lost_everything_and_registers_again(scene):
    keeper = scene.keeper()
    scene.hold(1, 2)
    scene.line.answers["heartbeat"] = WorkerNotFound(7)
    scene.now += 10
    keeper._beat()
    assert scene.registered == 1
    assert scene.abandoned == [[1, 2]]
    assert len(scene.told) == 2
    assert scene.book.all() == []
    assert scene.lives == [worker("ready")]


def test_it_tidies_up_when_that_is_due_each_job_by_itself(scene, caplog):
    keeper = scene.keeper(housekeeping=50.0)
    keeper._tidies_at = 1050.0
    scene.now = 1049.9
    keeper._tidy()
    assert scene.line.taken() == []
    scene.now = 1050.0
    keeper._tidy()
    jobs = [("_reclaim",), ("_bury",), ("_prune",), ("_forget",)]
    assert scene.line.taken() == jobs
    keeper._tidy()
    scene.now = 1099.9
    keeper._tidy()
    assert scene.line.taken() == []
    scene.now = 1100.0
    scene.line.answers["_bury"] = ValueError("of a host's own")
    keeper._tidy()
    assert scene.line.taken() == jobs
    assert caplog.messages == ["tidying up failed: ValueError"]


@pytest.mark.parametrize("ours", [True, False])
def test_only_who_tidies_up_now_does_the_jobs(scene, monkeypatch, ours):
    done: list[Any] = []
    monkeypatch.setattr(store, "tidying", lambda *_: ours)

    def noted(name: str) -> Any:
        return lambda _session, _context, *args, **options: done.append((name, *args, options))

    for module, name in (
        *((workers, name) for name in ("reclaim", "purge")),
        *((archive, name) for name in ("bury", "prune")),
    ):
        monkeypatch.setattr(module, name, noted(name))
    keeper = scene.keeper(queues=["q0", "q1"])
    for job in (keeper._reclaim, keeper._bury, keeper._prune, keeper._forget):
        job(None, CONTEXT)
    jobs = [
        ("reclaim", 60.0, None, {"holding": False}),
        ("bury", "q0", 1_000, {}),
        ("bury", "q1", 1_000, {}),
        ("prune", None, None, 1_000, {}),
        ("purge", timedelta(days=7), {}),
    ]
    assert done == (jobs if ours else [])


@pytest.mark.parametrize("code", ["42501", "57P01"])
def test_tidying_up_that_is_denied_or_comes_later_is_no_warning(scene, caplog, code):
    class Driver(Exception):
        sqlstate = code

    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    keeper = scene.keeper(housekeeping=50.0)
    scene.now += 50
    scene.line.answers["_prune"] = sa.exc.DBAPIError("DELETE", {}, Driver())
    keeper._tidy()
    assert caplog.messages == ["tidying up was not possible: DBAPIError"]
    assert caplog.records[0].levelname == "INFO"


def test_who_does_no_housekeeping_never_tidies_up(scene):
    keeper = scene.keeper(housekeeping=None)
    scene.now += 1e9
    keeper._tidy()
    assert scene.line.taken() == []


def test_the_first_rounds_of_many_are_spread_over_an_interval(scene):
    keepers = [scene.keeper(housekeeping=97.0) for _ in range(200)]
    after = [one._tidies_at - scene.now for one in keepers]
    assert min(after) >= 0
    assert 48 < max(after) < 97


@pytest.mark.parametrize(("broken", "tries"), [(False, 1), (True, 2)])
def test_at_the_end_its_row_says_so_and_the_line_is_closed(scene, broken, tries):
    keeper = scene.keeper()
    scene.line.answers["set_status"] = OSError() if broken else None
    keeper.close()
    keeper.run()
    assert scene.line.taken() == [("set_status", 7, "stopped")] * tries
    assert (scene.line.closed, keeper.fatal) == (1, None)


def test_who_is_not_registered_has_no_row_that_could_say_so(scene):
    keeper = scene.keeper()
    scene.context = replace(CONTEXT, worker=None)
    keeper.close()
    keeper.run()
    assert (scene.line.taken(), scene.line.closed) == ([], 1)


def test_an_error_that_does_not_pass_ends_it_and_is_kept(scene):
    keeper = scene.keeper()
    scene.hold(1)
    error = scene.line.answers["renew"] = ValueError("a bug")
    scene.now += 20
    keeper.run()
    assert keeper.fatal is error
    assert scene.line.lamented == [error]
    assert [name for name, *_ in scene.line.taken()] == ["renew", "set_status"]


def test_each_round_renews_ends_what_takes_too_long_sends_a_heartbeat_and_tidies_up(scene):
    keeper = scene.keeper(housekeeping=50.0)
    (held,) = scene.hold(1)
    (slow,) = scene.hold(2, timeout=5)
    scene.book.start([held.delivery, slow.delivery], None)
    scene.now += 100
    scene.line.answers |= {"renew": frozenset([1]), "heartbeat": worker("ready")}

    def ended(*_: Any) -> None:
        keeper.close()

    scene.line.answers["_forget"] = ended
    keeper.run()
    names = [name for name, *_ in scene.line.taken()]
    jobs = ["_reclaim", "_bury", "_prune", "_forget"]
    assert names == ["renew", "heartbeat", *jobs, "set_status"]
    assert [one for one, _ in scene.timed_out] == [slow]

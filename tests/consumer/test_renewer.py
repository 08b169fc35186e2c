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

from pgqrs_sa import HandlerTimeout, WorkerInfo, WorkerNotFound
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa.consumer import renewer as renewing
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.leases import LeaseTable
from pgqrs_sa.consumer.options import ConsumerConfig
from pgqrs_sa.consumer.renewer import LeaseRenewer, Maintenance
from pgqrs_sa.consumer.state import ConsumerState
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.resources import Archived, Workers
from pgqrs_sa.types import Outcome
from support.handlers import delivery, handlers

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTEXT = Context.of(READY_MADE, None, 7, allow_autocommit=True)
LEASE = 30.0


class FakeLine:
    """Answers operations by their names: with a value, what a function returns, or an error."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}
        self.logged: list[BaseException] = []
        self.closed = 0

    def run_once(self, _context: Any, operation: Any, *args: Any) -> Any:
        self.calls.append((operation.__name__, *args))
        answer = self.answers.get(operation.__name__)
        if isinstance(answer, BaseException):
            raise answer
        return answer(*args) if callable(answer) else answer

    def run(self, _what: str, context: Any, operation: Any, *args: Any) -> Any:
        return self.run_once(context, operation, *args)

    run_transaction = run
    transaction = run_once

    def log_failure(self, error: BaseException, _worker: int | None) -> None:
        self.logged.append(error)

    def close(self) -> None:
        self.closed += 1

    def taken(self) -> list[tuple[Any, ...]]:
        """Return the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


class Scene:
    """A renewer, and all that it is told and tells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("pgqrs_sa.consumer.renewer.time", clock)
        self.line = FakeLine()
        self.clock = clock.monotonic
        self.told: list[Any] = []
        self.abandoned: list[list[int]] = []
        self.timed_out: list[Any] = []
        self.heartbeat: list[WorkerInfo] = []
        self.state = self.shared(ConsumerConfig.validated(housekeeping=None))

    @property
    def book(self) -> LeaseTable:
        return self.state.lease_table

    def shared(self, config: ConsumerConfig, grace: float = 2.0) -> ConsumerState:
        """Return the state of a run, in which this notes what others are told."""
        executor: Any = SimpleNamespace(
            abandon=lambda leases: self.abandoned.append([lease.delivery.id for lease in leases]),
            stack=lambda _lease: "where it is",
        )
        state = ConsumerState(config, handlers({}), executor, until_empty=False, grace=grace)
        state.context = CONTEXT
        state.lease_table = LeaseTable(self.clock)
        state.lease_lengths = {"q0": timedelta(seconds=30)}
        events: Any = SimpleNamespace(
            ended=lambda *what: self.told.append(what), heartbeat=self.heartbeat.append
        )
        state.events = events
        return state

    def renewer(
        self, *, heartbeat: float = 10.0, grace: float = 2.0, housekeeping: float | None = None
    ) -> LeaseRenewer:
        config = ConsumerConfig.validated(heartbeat=heartbeat, housekeeping=housekeeping)
        self.state = self.shared(config, grace)
        line: Any = self.line
        dispatcher: Any = SimpleNamespace(
            settle=lambda handler, dispositions: self.timed_out.append((handler, *dispositions))
        )
        return LeaseRenewer(line, self.state, dispatcher)

    def maintenance(self, **options: Any) -> Maintenance:
        return self.renewer(**options)._maintenance

    def hold(self, *ids: int, lease: float = LEASE, **options: Any) -> list[Any]:
        (handler,) = handlers(options)
        leased = [delivery(id_) for id_ in ids]
        self.book.add(handler, leased, timedelta(seconds=lease), self.now)
        return [self.book.get(delivery) for delivery in leased]


def worker(status: Any) -> WorkerInfo:
    return WorkerInfo(
        id=7, name="w", status=status, queues=("q0",), hostname="h", pid=None, port=None,
        version=None, started_at=NOW, heartbeat_at=NOW, shutdown_at=None,
    )  # fmt: skip


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_it_rests_until_the_next_lease_or_heartbeat_is_due_and_no_longer_than_it_may(scene):
    renewer = scene.renewer(heartbeat=10.0)
    assert renewer._idle_time() == 1.0
    scene.hold(1, lease=0.9)
    assert renewer._idle_time() == pytest.approx(0.3)
    scene.now += 0.3
    assert renewer._idle_time() == 0.02
    scene.book.remove([item.delivery for item in scene.book.all()])
    scene.now = 1009.5
    assert renewer._idle_time() == pytest.approx(0.5)


def test_leases_are_renewed_together_if_they_are_as_long(scene):
    renewer = scene.renewer()
    first, second = scene.hold(1, 2, lease=30)
    (other,) = scene.hold(3, lease=24)
    scene.line.answers["renew"] = lambda held, _span: frozenset(lease.id for lease in held)
    scene.now += 7.9
    renewer._renew()
    assert scene.line.taken() == []
    scene.now = 1010.0
    renewer._renew()
    assert scene.line.taken() == [
        ("renew", [first.delivery, second.delivery], timedelta(seconds=30)),
        ("renew", [other.delivery], timedelta(seconds=24)),
    ]
    assert (first.renew_at, first.expires_at) == (1020.0, 1040.0)
    assert (other.renew_at, other.expires_at) == (1018.0, 1034.0)


@pytest.mark.parametrize("lease", [30.0, 1.5])
@pytest.mark.parametrize("fate", ["busy", Outcome.LOST, Outcome.DEAD, Outcome.ARCHIVED])
@pytest.mark.parametrize("state", ["", "settling", "timed_out"])
def test_what_cannot_be_renewed_is_lost_unless_it_is_locked_or_being_settled(
    scene, lease, fate, state
):
    renewer = scene.renewer()
    kept, held = scene.hold(1, 2, lease=lease)
    end = 1000.0 + lease
    scene.line.answers |= {"renew": frozenset([1]), "lookup_status": {2: fate}}
    scene.now += lease / 3
    if state:
        setattr(held, state, True)
    renewer._renew_group(lease, [kept, held])
    assert scene.line.taken()[1:] == [("lookup_status", [held.delivery])]
    assert kept.expires_at == scene.now + lease
    assert held.renew_at == pytest.approx(scene.now + min(0.5, lease / 6))
    assert held.expires_at == (max(end, scene.now + 1.0) if fate == "busy" else end)
    lost = fate in (Outcome.LOST, Outcome.DEAD) and not state
    assert held.lost is lost
    assert scene.book.all() == ([kept] if lost else [kept, held])
    assert scene.abandoned == ([[2]] if lost else [])
    assert [item[0] for item in scene.told] == ([Outcome.LOST] if lost else [])


def test_a_locked_lease_that_would_run_out_is_good_for_another_second(scene):
    renewer = scene.renewer()
    (held,) = scene.hold(1, lease=0.9)
    scene.line.answers |= {"renew": frozenset(), "lookup_status": {1: "busy"}}
    scene.now += 0.6
    renewer._renew()
    assert held.expires_at == pytest.approx(scene.now + 1.0)


def test_what_is_forgotten_already_is_told_to_nobody(scene):
    held = scene.hold(1)
    scene.book.remove([lease.delivery for lease in held])
    scene.state.mark_lost(held)
    assert scene.abandoned == scene.told == []


def test_a_handler_has_its_time_and_some_grace(scene):
    renewer = scene.renewer(grace=2.0)
    (held,) = scene.hold(1, timeout=20)
    scene.book.mark_started([held.delivery], None)
    scene.now += 21.9
    renewer._end_overdue()
    assert scene.timed_out == scene.abandoned == []
    scene.now += 0.2
    renewer._end_overdue()
    ((handler, disposition),) = scene.timed_out
    assert handler is held.handler
    assert (disposition.action, disposition.delivery) == ("retry", held.delivery)
    assert isinstance(disposition.error, HandlerTimeout)
    assert "20" in str(disposition.error)
    assert scene.abandoned == [[1]]


def test_a_heartbeat_says_how_much_is_held_when_it_is_due(scene, caplog):
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    maintenance = scene.maintenance(heartbeat=10.0)
    scene.hold(1, 2)
    scene.line.answers["heartbeat"] = worker("ready")
    scene.now += 9.9
    maintenance.send_heartbeat()
    assert scene.line.taken() == []
    scene.now = 1010.0
    maintenance.send_heartbeat()
    maintenance.send_heartbeat()
    assert scene.line.taken() == [("heartbeat", 7, 2)]
    assert scene.heartbeat == [worker("ready")]
    assert caplog.messages == []
    scene.line.answers["heartbeat"] = worker("suspended")
    for scene.now in (1020.0, 1030.0):
        maintenance.send_heartbeat()
    assert caplog.messages == ["worker 7 is suspended"]


def test_who_is_not_registered_sends_no_heartbeat(scene):
    maintenance = scene.maintenance()
    scene.state.context = replace(CONTEXT, worker=None)
    scene.now += 100
    maintenance.send_heartbeat()
    assert scene.line.taken() == []


def test_who_was_taken_for_dead_has_lost_everything_and_registers_again(scene):
    maintenance = scene.maintenance()
    scene.hold(1, 2)
    scene.line.answers |= {"heartbeat": WorkerNotFound(7), "once": worker("ready")}
    scene.state.context = replace(CONTEXT, worker=6)
    scene.now += 10
    maintenance.send_heartbeat()
    assert scene.line.taken() == [("heartbeat", 6, 2), ("once",)]
    assert (scene.state.context.worker, scene.state.events.worker) == (7, 7)
    assert scene.state.worker == worker("ready")
    assert scene.abandoned == [[1, 2]]
    assert len(scene.told) == 2
    assert scene.book.all() == []
    assert scene.heartbeat == [worker("ready")]


def test_it_tidies_up_when_that_is_due_each_job_by_itself(scene, caplog):
    maintenance = scene.maintenance(housekeeping=50.0)
    maintenance._maintenance_at = 1050.0
    scene.now = 1049.9
    maintenance.run_jobs()
    assert scene.line.taken() == []
    scene.now = 1050.0
    maintenance.run_jobs()
    jobs = [("_reclaim",), ("_dead_letter_exhausted",), ("_prune",), ("_purge_workers",)]
    assert scene.line.taken() == jobs
    maintenance.run_jobs()
    scene.now = 1099.9
    maintenance.run_jobs()
    assert scene.line.taken() == []
    scene.now = 1100.0
    scene.line.answers["_dead_letter_exhausted"] = ValueError("of a host's own")
    maintenance.run_jobs()
    assert scene.line.taken() == jobs
    assert caplog.messages == ["tidying up failed: ValueError"]


@pytest.mark.parametrize("ours", [True, False])
def test_only_who_tidies_up_now_does_the_jobs(scene, monkeypatch, ours):
    done: list[Any] = []
    monkeypatch.setattr(store, "try_housekeeping_lock", lambda *_: ours)

    def noted(name: str) -> Any:
        return lambda _scope, *args, **options: done.append((name, *args, options))

    for module, name in (
        *((Workers, name) for name in ("reclaim", "purge")),
        (renewing, "dead_letter_exhausted"),
        (Archived, "prune"),
    ):
        monkeypatch.setattr(module, name, noted(name))
    maintenance = scene.maintenance()
    scene.state.lease_lengths["q1"] = timedelta(seconds=30)
    for job in (
        maintenance._reclaim,
        maintenance._dead_letter_exhausted,
        maintenance._prune,
        maintenance._purge_workers,
    ):
        job(Scope(None, CONTEXT))
    jobs = [
        ("reclaim", {"silent_for": 60.0}),
        ("dead_letter_exhausted", "q0", 1_000, 10_000, {}),
        ("dead_letter_exhausted", "q1", 1_000, 10_000, {}),
        ("prune", {"limit": 1_000}),
        ("purge", {"older_than": timedelta(days=7)}),
    ]
    assert done == (jobs if ours else [])


def test_a_job_that_has_more_to_do_goes_on_until_its_time_is_over(scene):
    maintenance = scene.maintenance(housekeeping=50.0)
    scene.now += 50
    answers = iter([True, True, True, False])

    def prune() -> bool:
        scene.now += 0.15
        return next(answers)

    scene.line.answers["_prune"] = prune
    maintenance.run_jobs()
    assert [name for (name,) in scene.line.taken()].count("_prune") == 2
    maintenance.run_jobs()
    assert [name for (name,) in scene.line.taken()].count("_prune") == 2
    maintenance.run_jobs()
    assert scene.line.taken() == []


@pytest.mark.parametrize("code", ["42501", "57P01"])
def test_tidying_up_that_is_denied_or_comes_later_is_no_warning(scene, caplog, code):
    class Driver(Exception):
        sqlstate = code

    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    maintenance = scene.maintenance(housekeeping=50.0)
    scene.now += 50
    scene.line.answers["_prune"] = sa.exc.DBAPIError("DELETE", {}, Driver())
    maintenance.run_jobs()
    assert caplog.messages == ["tidying up was not possible: DBAPIError"]
    assert caplog.records[0].levelname == "INFO"


def test_who_does_no_housekeeping_never_tidies_up(scene):
    maintenance = scene.maintenance(housekeeping=None)
    scene.now += 1e9
    maintenance.run_jobs()
    assert scene.line.taken() == []


def test_the_first_rounds_of_many_are_spread_over_an_interval(scene):
    many = [scene.maintenance(housekeeping=97.0) for _ in range(200)]
    after = [maintenance._maintenance_at - scene.now for maintenance in many]
    assert min(after) >= 0
    assert 48 < max(after) < 97


@pytest.mark.parametrize(("broken", "tries"), [(False, 1), (True, 2)])
def test_at_the_end_its_row_says_so_and_the_line_is_closed(scene, broken, tries):
    renewer = scene.renewer()
    scene.line.answers["set_status"] = OSError() if broken else None
    renewer.close()
    renewer.run()
    assert scene.line.taken() == [("set_status", 7, "stopped")] * tries
    assert (scene.line.closed, renewer.fatal) == (1, None)


def test_who_is_not_registered_has_no_row_that_could_say_so(scene):
    renewer = scene.renewer()
    scene.state.context = replace(CONTEXT, worker=None)
    renewer.close()
    renewer.run()
    assert (scene.line.taken(), scene.line.closed) == ([], 1)


def test_an_error_that_does_not_pass_ends_it_and_is_kept(scene):
    renewer = scene.renewer()
    scene.hold(1)
    error = scene.line.answers["renew"] = ValueError("a bug")
    scene.now += 20
    renewer.run()
    assert renewer.fatal is error
    assert scene.line.logged == [error]
    assert [name for name, *_ in scene.line.taken()] == ["renew", "set_status"]


def test_each_round_renews_ends_what_takes_too_long_sends_a_heartbeat_and_tidies_up(scene):
    renewer = scene.renewer(housekeeping=50.0)
    (held,) = scene.hold(1)
    (slow,) = scene.hold(2, timeout=5)
    scene.book.mark_started([held.delivery, slow.delivery], None)
    scene.now += 100
    scene.line.answers |= {"renew": frozenset([1]), "heartbeat": worker("ready")}

    def ended(*_: Any) -> None:
        renewer.close()

    scene.line.answers["_purge_workers"] = ended
    renewer.run()
    names = [name for name, *_ in scene.line.taken()]
    jobs = ["_reclaim", "_dead_letter_exhausted", "_prune", "_purge_workers"]
    assert names == ["renew", "heartbeat", *jobs, "set_status"]
    assert [lease.delivery for _, lease in scene.timed_out] == [slow.delivery]

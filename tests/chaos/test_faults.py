"""The fault matrix: each operation, through each driver, under each fault, at each point of it.

The points of an operation are ``begin`` (a transaction is open, nothing is done), ``executed``
(everything but COMMIT) and ``committed``; those of ``lose a reply`` are the statement and COMMIT,
with the reply lost or the request; those of ``terminate`` are all boundaries of its statements.

Each case ends with the same questions. Is the operation there whole or not at all, and which of
the two follows from the point? Was anything acknowledged that is not there (lost)? Did anything
happen twice (doubled)? Does the same engine go on? The rows are written down as JSON lines; the
whole matrix::

    pytest tests/chaos/test_faults.py -m "long or not long" -n 0
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService
from support import bouncer
from support.actors import DRIVERS, PROCESS, Actor, Outcome
from support.loops import outliving
from support.operations import OPERATIONS, Operation
from support.proxy import Fault, Proxy
from support.results import Results, load
from support.scripts import Script
from support.servers import Address, OwnServer, run_sql, terminate_backends
from support.waiting import until

FAULTS = (
    *("SIGKILL", "SIGTERM", "SIGSTOP, SIGCONT", "terminate", "server crash", "lost reply"),
    *("half-open", "pgbouncer restart"),
)
POINTS = ("begin", "executed", "committed")
_PSYCOPG = {"tcp_user_timeout": 500, "options": "-c idle_in_transaction_session_timeout=1s"}
_ASYNCPG = {
    "command_timeout": 0.5,
    "server_settings": {"idle_in_transaction_session_timeout": "1s"},
}
DEADLINES = {
    "psycopg": {"connect_args": _PSYCOPG},
    "psycopg_async": {"connect_args": _PSYCOPG},
    "asyncpg": {"connect_args": _ASYNCPG},
}
"""How a client notices a server that is silent, and the server a client that left its locks."""

BUSY = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
"""

_queues = itertools.count(1)


@pytest.fixture(scope="module")
def ground(own: OwnServer) -> Iterator[Address]:
    """One database for the matrix: each case has a queue of its own."""
    address = own.database("matrix")
    yield address
    observer(address).dispose()


@pytest.fixture(scope="module")
def results(ground: Address, chaos_results: Callable[..., Results]) -> Results:
    ((version,),) = run_sql(ground, "SHOW server_version")
    return chaos_results("faults", postgresql=version)


@pytest.fixture
def proxy(ground: Address) -> Iterator[Proxy]:
    with Proxy(ground.target) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def pooler(ground: Address) -> Iterator[bouncer.PgBouncer]:
    with bouncer.PgBouncer(ground) as pooler:
        yield pooler


@cache
def observer(ground: Address) -> sa.Engine:
    """For looking on directly; one for all cases, since opening connections is what takes time."""
    return sa.create_engine(ground.url(), pool_pre_ping=True)


class Case:
    """One operation on one queue, from its beginning to its judgement."""

    def __init__(self, ground: Address, operation: str, lease: float | None = None) -> None:
        self.engine = observer(ground)
        self.ground = ground
        name = f"q{next(_queues)}"
        kind = OPERATIONS[operation]
        self.operation: Operation = kind(name) if lease is None else kind(name, lease)
        self.began = time.monotonic()
        self.applied: bool | None = None
        with Session(self.engine) as session, session.begin():
            self.operation.prepare(session)

    def look(self) -> bool:
        """Whether it is committed, seen from outside; what others then do at once, they do."""
        with Session(self.engine) as session, session.begin():
            self.applied = self.operation.applied(session)
            if self.applied:
                self.operation.between(session)
        return self.applied

    def next_one(self) -> list[Any]:
        """What somebody else can do, once the lease has run out."""
        with Session(self.engine) as session, session.begin():
            if self.operation.takes and self.operation.applied(session):
                return []
            self.operation.expire(session)
        outcome = Actor(self.ground, "psycopg", self.operation).run()
        assert outcome.acknowledged
        assert outcome.result != [], "the message cannot be had any more"
        return [outcome.result]

    def judge(
        self, results: Results, outcome: Outcome, expected: bool, *, over: bool = False, **row: Any
    ) -> None:
        """Let the next consumer do what is left, then count.

        ``over`` says that its process is gone: others do it again, as they cannot know.
        """
        assert self.applied is expected, f"applied is {self.applied} after {row}"
        given = [outcome.result] if outcome.result is not None else []
        if over or not outcome.acknowledged or self.operation.name == "dequeue" or given == [0]:
            # Maintenance skips what others hold, and the one that it outlived may hold it still.
            until(lambda: not run_sql(self.ground, BUSY), "what was left behind is gone")
            given += self.next_one()
        with Session(self.engine) as session:
            assert self.operation.applied(session), "it is not there in the end"
            lost = self.operation.lost(session, given)
            doubled = self.operation.doubled(session, given)
        results.write(
            operation=self.operation.name,
            applied=expected,
            acknowledged=int(outcome.acknowledged),
            lost=int(lost),
            doubled=int(doubled),
            tries=outcome.tries,
            errors=outcome.errors,
            seconds=round(time.monotonic() - self.began, 3),
            **row,
        )
        assert (lost, doubled) == (0, 0)


@dataclass
class Strike:
    """A gate that strikes once, at a point, and looks at the database before the next try."""

    case: Case
    point: str
    strike: Callable[[], Any]
    struck: bool = False

    def __call__(self, point: str) -> None:
        if self.struck and point == "begin" and self.case.applied is None:
            self.case.look()
        if not self.struck and point == self.point:
            self.struck = True
            self.strike()
            if point == "committed":
                self.case.look()


def happen(
    case: Case,
    address: Address,
    driver: str,
    point: str,
    strike: Callable[[], Any],
    options: dict[str, Any] | None = None,
) -> Outcome:
    gate = Strike(case, point, strike)
    outcome = Actor(address, driver, case.operation, gate, options=options).run()
    assert gate.struck
    return outcome


def quick(*chosen: tuple[str, str]) -> pytest.MarkDecorator:
    """All operations through all drivers; those that are not among the chosen are long."""
    return pytest.mark.parametrize(
        ("operation", "driver"),
        [
            pytest.param(*case, marks=() if case in chosen else pytest.mark.long)
            for case in itertools.product(OPERATIONS, DRIVERS)
        ],
    )


# --- the connection ------------------------------------------------------------------------------


@quick(*itertools.product(OPERATIONS, ("psycopg", "asyncpg")), ("archive", "psycopg_async"))
def test_a_reply_is_lost(ground, proxy, results, operation, driver):
    """F17, F18: the client cannot know; it asks, or it repeats what may be repeated."""
    table = "(?i)^(WITH|INSERT|UPDATE|DELETE)"
    faults: dict[str, tuple[Callable[[str], Fault], str, bool]] = {
        "statement, reply": (proxy.lose_reply, table, False),
        "commit, request": (proxy.cut_before, "^COMMIT", False),
        "commit, reply": (proxy.lose_reply, "^COMMIT", True),
    }
    for point, (arm, pattern, expected) in faults.items():
        case, armed = Case(ground, operation), []
        outcome = happen(
            case,
            ground.via(*proxy.address),
            driver,
            "begin",
            lambda arm=arm, pattern=pattern, armed=armed: armed.append(arm(pattern)),
        )
        armed[0].wait()
        assert outcome.tries >= 2
        case.judge(results, outcome, expected, fault="lost reply", driver=driver, point=point)


def test_without_a_key_a_repeated_enqueue_doubles(ground, proxy):
    """What the key is for: this is not a defect, but the reason for the recipe."""
    case = Case(ground, "enqueue")
    engine = sa.create_engine(ground.via(*proxy.address).url())

    def enqueue() -> None:
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue(case.operation.queue, {})

    proxy.lose_reply("^COMMIT")
    troubles: list[BaseException] = []
    outliving(enqueue, troubles.append)
    engine.dispose()
    assert len(troubles) == 1
    with Session(case.engine) as session:
        assert case.operation.count(session, Message, case.operation.of(Message)) == 2


@quick(*itertools.product(OPERATIONS, ["psycopg"]), ("archive", "asyncpg"))
def test_a_backend_is_terminated_at_a_boundary_of_a_statement(ground, results, operation, driver):
    """F15: nothing partial, wherever it is."""
    for number in itertools.count():
        case = Case(ground, operation)
        boundaries = Boundaries(case, number)
        outcome = Actor(
            ground, driver, case.operation, boundaries.look, watch=boundaries.watch
        ).run()
        if boundaries.struck is None:
            assert number >= 3  # before and after one statement, and before COMMIT
            return
        point = f"{number}: {boundaries.struck}"
        expected = boundaries.struck == "committed"
        case.judge(results, outcome, expected, fault="terminate", driver=driver, point=point)


class Boundaries:
    """Terminates the backend at the n-th boundary, as the events of the engine count them."""

    def __init__(self, case: Case, number: int) -> None:
        self.case, self.number = case, number
        self.seen = -1
        self.struck: str | None = None
        self.over = False

    def watch(self, engine: sa.Engine) -> None:
        event.listen(engine, "before_cursor_execute", lambda *_: self.at("before"))
        event.listen(engine, "after_cursor_execute", lambda *_: self.at("after"))
        event.listen(engine, "commit", lambda _: self.at("before commit"))

    def at(self, what: str) -> bool:
        """Count a boundary; return whether this was the one."""
        if self.struck or self.over:
            return False
        self.seen += 1
        if self.seen == self.number:
            self.struck = what
            assert terminate_backends(self.case.ground) >= 1
        return self.struck is not None

    def look(self, point: str) -> None:
        """The gate: ``committed`` is the last boundary; and it looks before the next try."""
        if (point == "begin" and self.struck and self.case.applied is None) or (
            point == "committed" and self.at(point)
        ):
            self.case.look()
        self.over = self.over or point == "committed"


@pytest.mark.parametrize("point", POINTS)
@quick(("archive", "psycopg"), ("archive", "asyncpg"))
def test_a_connection_is_half_open(ground, proxy, results, operation, driver, point):
    """F19: silence, both ways; each end has a deadline of its own."""
    case = Case(ground, operation)
    address = ground.via(*proxy.address)
    outcome = happen(case, address, driver, point, proxy.freeze, DEADLINES[driver])
    assert outcome.errors, "it did not notice"
    expected = point == "committed"
    case.judge(results, outcome, expected, fault="half-open", driver=driver, point=point)


# --- the server, and what is between -------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
@quick(("archive", "psycopg"), ("archive", "asyncpg"))
def test_the_server_crashes_and_comes_back(own, ground, results, operation, driver, point):
    """F16: immediate stop and start."""
    case = Case(ground, operation)
    outcome = happen(case, ground, driver, point, own.crash)
    assert outcome.errors, "it did not notice"
    expected = point == "committed"
    case.judge(results, outcome, expected, fault="server crash", driver=driver, point=point)


@pytest.mark.pgbouncer
@pytest.mark.parametrize("point", POINTS)
@quick(("enqueue", "psycopg"), ("archive", "asyncpg"))
def test_pgbouncer_restarts(ground, pooler, results, operation, driver, point):
    """F29: in transaction mode, with the settings of docs/how-to/pgbouncer.md."""
    case = Case(ground, operation)
    outcome = happen(case, pooler.address, driver, point, pooler.restart, bouncer.SETTINGS[driver])
    # With NullPool, which asyncpg needs here, no connection is left to be found dead.
    assert outcome.errors or (driver, point) == ("asyncpg", "committed")
    expected = point == "committed"
    case.judge(results, outcome, expected, fault="pgbouncer restart", driver=driver, point=point)


# --- the process ---------------------------------------------------------------------------------


def started(case: Case, driver: str) -> Script:
    return Script(
        PROCESS,
        operation=case.operation.name,
        queue=case.operation.queue,
        lease=case.operation.lease,
        address=astuple(case.ground),
        driver=driver,
    )


def run_to(process: Script, point: str) -> Outcome:
    """Let it reach this point; what it reported there is what it believes."""
    for passed in POINTS:
        said = process.expect(passed)
        if passed == point:
            break
        process.tell("go")
    return Outcome(acknowledged=point == "committed", tries=1, **said)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
@quick(("archive", "psycopg"))
def test_a_process_ends(ground, results, operation, driver, signal, point):
    """F1, F7: the next consumer finds all of it or nothing."""
    case = Case(ground, operation)
    with started(case, driver) as process:
        outcome = run_to(process, point)
        if signal == "SIGKILL":
            assert process.kill() == -9
        else:
            process.terminate()
            assert process.wait() == 143, process.errors
    until(lambda: not run_sql(ground, BUSY), "the server has noticed")
    case.look()
    expected = point == "committed"
    case.judge(results, outcome, expected, over=True, fault=signal, driver=driver, point=point)


@pytest.mark.parametrize("point", POINTS)
@quick(("archive", "asyncpg"))
def test_a_process_is_stopped_until_its_lease_has_run_out(
    ground, results, operation, driver, point
):
    """F2: the honest test of the fence. Its late settlement fails, and its effect vanishes."""
    case = Case(ground, operation, lease=0.3)
    with started(case, driver) as process:
        run_to(process, point)
        process.freeze()
        if point != "committed" or operation == "dequeue":
            until(lambda: not leased(case), "the lease has run out")
        # While its transaction is open, the rows are locked: nobody else gets them. Once it is
        # committed, a message that was settled is not there to be taken.
        rival = Outcome()
        if point == "begin" or (point == "committed" and not case.operation.takes):
            rival = Actor(ground, "psycopg", type(case.operation)(case.operation.queue)).run()
            assert rival.acknowledged
        assert case.look() is (point != "executed")
        process.thaw()
        for _ in POINTS:
            process.tell("go")
        outcome = Outcome(**process.expect("outcome"))
        assert process.wait() == 0, process.errors
    too_late = point == "begin" and case.operation.takes
    assert (outcome.acknowledged, outcome.lease_lost) == (not too_late, too_late)
    given = [case.result for case in (outcome, rival) if case.result is not None]
    with Session(case.engine) as session:
        assert case.operation.applied(session)
        lost = int(case.operation.lost(session, given))
        doubled = case.operation.doubled(session, given)
    results.write(
        fault="SIGSTOP, SIGCONT",
        operation=operation,
        driver=driver,
        point=point,
        acknowledged=len(given),
        lost=lost,
        doubled=doubled,
        tries=outcome.tries,
        errors=["LeaseLost"] * too_late,
        seconds=round(time.monotonic() - case.began, 3),
    )
    assert (lost, doubled) == (0, 0)


def leased(case: Case) -> int:
    """Messages of the case under a lease that runs."""
    mine = case.operation.of(Message)
    with Session(case.engine) as session:
        return case.operation.count(
            session, Message, mine, Message.leased, Message.consumer_worker_id.is_(None)
        )


# --- all of it -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.pgbouncer
def test_the_matrix_has_every_cell_and_something_was_acknowledged_in_each(request, results):
    """The last one of this file: a cell that is empty would show nothing."""
    chosen = {
        (item.originalname, item.callspec.params["operation"], item.callspec.params["driver"])
        for item in request.session.items
        if item.path == request.path and "driver" in getattr(item, "fixturenames", ())
    }
    cells = {*itertools.product(FAULTS, OPERATIONS, DRIVERS)}
    if len(chosen) < len(cells) - len(OPERATIONS) * len(DRIVERS):  # one test has two of the faults
        pytest.skip("only a part of the matrix was asked for")
    acknowledged: Counter[tuple[str, ...]] = Counter()
    for case in load(results.path)[1]:
        acknowledged[case["fault"], case["operation"], case["driver"]] += case["acknowledged"]
    assert acknowledged.keys() == cells
    assert not [cell for cell in cells if not acknowledged[cell]]

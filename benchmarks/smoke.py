"""Every scenario once, on sizes that say nothing about speed: whether the benchmark itself works.

`python -m benchmarks smoke` runs the checks below on a server of its own and names those that fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import psycopg

from . import measure
from .contenders import Contender, by_name
from .contenders.base import QUEUE
from .executor import Assignment, ContenderFailed, Executor
from .machine import header
from .place import Place
from .records import Run
from .scenarios import SCENARIOS, Bench, Scenario, Sizes
from .scenarios import by_name as scenario
from .server import Server
from .work import Payload, Tally, payload_of

__all__ = ["CHECKS", "SIZES", "problems"]

SIZES = Sizes(
    singles=6,
    batches=2,
    batch_size=5,
    producers=(2,),
    waking=2,
    backlog=40,
    consumers=(2,),
    takes=(5,),
    longest=20.0,
    payloads=(300,),
    cost=10,
    cost_backlog=20,
    effects=10,
    latencies=3,
    pause=0.01,
    rows=50,
    dequeues=2,
    hold=1.0,
    window=0.2,
    held_backlog=400,
    memory=40,
)


class Broken(Contender):
    """Can be installed, and then fails."""

    name = "broken"
    title = "broken"

    def install(self) -> None:
        """See `Contender`."""
        by_name("service")(self.place).install()

    def open(self) -> None:
        """Connect to nothing."""

    def singles(self, count: int, payload: Payload) -> Tally:
        """Fail."""
        raise RuntimeError(f"cannot enqueue {count} of {len(payload)}")


class Crashing(Broken):
    """Ends the process that it runs in."""

    name = "crashing"
    title = "crashing"

    def singles(self, count: int, payload: Payload) -> Tally:
        """End the process."""
        del count, payload
        os._exit(3)


class _Silent:
    def begin(self, turn: measure.Turn) -> None:
        pass

    def end(self, turn: measure.Turn) -> None:
        pass


def _run(
    server: Server,
    executor: Executor,
    scenarios: tuple[Scenario, ...],
    contenders: tuple[type[Contender], ...],
) -> Run:
    plan = measure.Plan(scenarios, contenders, 1, 1, named=True)
    head = header(contenders, server.versions(), SIZES, 1, 1)
    return Run.of([head, *measure.run(plan, Bench(executor, SIZES), server, _Silent())])


def _count(place: Place, table: str) -> int:
    with psycopg.connect(place.conninfo) as connection:
        row = connection.execute(
            f"SELECT count(*) FROM {table} WHERE queue_id ="  # noqa: S608 - a name of ours
            " (SELECT id FROM pgqrs_queues WHERE queue_name = %s)",
            [QUEUE],
        ).fetchone()
    return int(row[0]) if row else 0


def _present(server: Server, *names: str) -> Iterator[type[Contender]]:
    """Yield the contenders that can take part here; pgbench is not everywhere."""
    for name in names:
        contender = by_name(name)
        if contender.missing(server.place) is None:
            yield contender


def every_scenario_leaves_numbers(server: Server, executor: Executor) -> Iterator[str]:
    """Each scenario works for `QueueService`, and leaves what the report shows of it."""
    run = _run(server, executor, SCENARIOS, (by_name("service"),))
    for failure in run.failures:
        yield f"{failure.scenario} ({failure.point}): {failure.reason}"
    for name in {made.name for made in SCENARIOS} - {sample.scenario for sample in run.samples}:
        yield f"{name} has no sample"
    for sample in run.samples:
        if sample.unit == "msgs/s" and not sample.value > 0:
            yield f"{sample.scenario} ({sample.point}): {sample.value} {sample.unit}"
    for name in {"latency_ms", "rates"} - {
        name for sample in run.samples for name in sample.series
    }:
        yield f"no sample has the series {name}"


def drained_messages_are_archived(server: Server, executor: Executor) -> Iterator[str]:
    """A drain by any contender leaves no message, and archives each."""
    drain = scenario("drain")
    (point,) = drain.points(SIZES)
    names = ("service-async-psycopg", "service-asyncpg", "bare", "pgbench")
    for contender in _present(server, *names):
        with server.fresh(contender, drain.preparation(point, SIZES)) as place:
            drain.measure(Bench(executor, SIZES), contender, place, point)
            counts = _count(place, "pgqrs_messages"), _count(place, "pgqrs_archive")
        if counts != (0, SIZES.backlog):
            yield f"{contender.name} left {counts[0]} messages and archived {counts[1]}"


def warm_ups_are_not_counted(server: Server, executor: Executor) -> Iterator[str]:
    """A warm-up is executed, and is no part of the outcome."""
    measured, warm_up = ({"count": count, "payload": payload_of(200)} for count in (3, 5))
    for contender in (by_name("service"), by_name("bare")):
        with server.fresh(contender) as place:
            done = contender.run(executor, place, "singles", [measured], warm_up=warm_up)
            sent = _count(place, "pgqrs_messages")
        if (done.count, sent) != (3, 8):
            yield f"{contender.name} counted {done.count} of 3 and sent {sent} of 8"


def pgbench_prepares_before_it_is_measured(server: Server, executor: Executor) -> Iterator[str]:
    """What pgbench executes first, to prepare its statements, is not counted."""
    works = (
        ("singles", {"count": 4}, 4),
        ("in_transaction", {"count": 4}, 4),
        ("batches", {"count": 2, "size": 5}, 10),
    )
    for contender in _present(server, "pgbench"):
        with server.fresh(contender) as place:
            for work, arguments, expected in works:
                given = {**arguments, "payload": payload_of(200)}
                counted = contender.run(executor, place, work, [given]).count
                if counted != expected:
                    yield f"pgbench counted {counted} of {expected} in {work}"
            # Six of each are not counted; in the open transaction four are not.
            sent = (4 + 6) + (4 + 4) + (2 + 6) * 5
            if (found := _count(place, "pgqrs_messages")) != sent:
                yield f"pgbench sent {found} of {sent}"


def a_cost_is_that_of_what_was_done(server: Server, executor: Executor) -> Iterator[str]:
    """Requests and commits are exact, and what has no place to be written to is not counted."""
    run = _run(server, executor, (scenario("cost"),), (by_name("service"),))
    sizes = {"enqueue 1": 1, "enqueue 5 in one call": 5, "lease and archive 5": 5}
    found = {sample.point: sample.more for sample in run.samples}
    for point, size in sizes.items():
        more = found.get(point, {})
        transactions = 2 if point.startswith("lease") else 1
        for name, each in (("requests", 3), ("commits", 1)):
            expected = transactions * each / size
            if abs(more.get(name, 0) - expected) > 1e-9:  # noqa: PLR2004 - a rounding error
                yield f"{point} has {more.get(name)} {name} a message instead of {expected}"
        for name in ("client", "server", "wal"):
            if not more.get(name, 0) > 0:
                yield f"{point} has {more.get(name)} of {name}"


def effects_are_written_once(server: Server, executor: Executor) -> Iterator[str]:
    """Each message that was archived has its business row."""
    work = scenario("work")
    for contender in (by_name("service"), by_name("runtime"), by_name("runtime-batches")):
        for point in work.points(SIZES):
            if not work.takes_part(contender, point):
                continue
            with server.fresh(contender, work.preparation(point, SIZES)) as place:
                work.measure(Bench(executor, SIZES), contender, place, point)
                archived = _count(place, "pgqrs_archive")
                with psycopg.connect(place.conninfo) as connection:
                    row = connection.execute("SELECT count(*) FROM bench_orders").fetchone()
            if row != (archived,) or archived < SIZES.effects:
                yield f"{contender.name} wrote {row} and archived {archived}"


def work_beside_is_not_counted(server: Server, executor: Executor) -> Iterator[str]:
    """Processes that only make noise are no part of the outcome."""
    contender = by_name("service")
    measured, beside = ({"count": count, "payload": payload_of(200)} for count in (3, 30))
    with server.fresh(contender) as place:
        noise = Assignment(contender, place, "singles", beside, counted=False)
        done = contender.run(executor, place, "singles", [measured], beside=[noise])
    if done.count != 3:  # noqa: PLR2004
        yield f"counted {done.count} of 3"


def a_failure_is_a_line(server: Server, executor: Executor) -> Iterator[str]:
    """A contender that fails, or whose process dies, does not end the run."""
    expected = {"broken": "cannot enqueue 6 of", "crashing": "the process died"}
    for contender in (Broken, Crashing):
        run = _run(server, executor, (scenario("enqueue-single"),), (contender, by_name("service")))
        reasons = {failure.contender: failure.reason for failure in run.failures}
        if expected[contender.name] not in reasons.get(contender.name, ""):
            yield f"{contender.name} failed with {reasons}"
        if [sample.contender for sample in run.samples] != ["service"]:
            yield f"after {contender.name} nobody else was measured"


def what_never_ends_is_given_up(server: Server, executor: Executor) -> Iterator[str]:
    """A measurement that takes longer than its limit fails."""
    del executor
    with Executor(limit=0.0) as impatient:
        try:
            impatient.run([Assignment(Broken, server.place, "singles")])
        except ContenderFailed as error:
            if "--limit" not in str(error):
                yield str(error)
        else:
            yield "a limit of no time was kept"


CHECKS: tuple[Callable[[Server, Executor], Iterator[str]], ...] = (
    every_scenario_leaves_numbers,
    drained_messages_are_archived,
    warm_ups_are_not_counted,
    pgbench_prepares_before_it_is_measured,
    a_cost_is_that_of_what_was_done,
    effects_are_written_once,
    work_beside_is_not_counted,
    a_failure_is_a_line,
    what_never_ends_is_given_up,
)


def problems(server: Server, executor: Executor) -> Iterator[tuple[str, list[str]]]:
    """Run the checks; yield the name of each with what is wrong."""
    for check in CHECKS:
        try:
            found = list(check(server, executor))
        except Exception as error:  # noqa: BLE001 - the other checks go on
            found = [f"{type(error).__name__}: {error}"]
        yield check.__name__.replace("_", " "), found

"""Processes that die, or are stopped, in the middle of their work: somebody else does it.

A process takes a second to start, so all of a test's start together, and those whose turn has not
come are stopped (SIGSTOP) until then.
"""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from support.processes import KINDS
from support.servers import run_sql
from support.waiting import until

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_what_killed_processes_held_is_done_by_another(fleet, kind):
    settings = {"on": {"lease": 3}, "consumer": {"concurrency": 3}}
    doomed = [fleet.start(kind, **settings) for _ in range(3)]
    last = fleet.start(kind, **settings)
    fleet.registered(4)
    last.freeze()
    fleet.send(*[{"ms": 2}] * 20, *[{"do": "wait"}] * 12)
    for worker in doomed:
        worker.expect("begun")
        assert worker.kill() == -9
    last.tell("go")
    last.thaw()
    fleet.emptied()
    fleet.shutdown([last])
    found = fleet.audit()
    assert found.archived == 32
    assert found.attempts >= 32 + 3


@kinds
def test_a_process_that_slept_past_its_lease_changes_nothing(fleet, kind):
    """SIGSTOP, the lease runs out, another takes it, SIGCONT: no effect, and it goes on working."""
    sleeper = fleet.start(kind, on={"lease": 5}, tell=["on_lease_lost", "on_success"])
    other = fleet.start("sync", consumer={"concurrency": 1})
    fleet.registered(2)
    other.freeze()
    fleet.send({"do": "wait"})
    attempt = sleeper.expect("begun")["attempt"]
    sleeper.freeze()
    other.thaw()
    assert other.expect("begun")["attempt"] > attempt
    sleeper.tell("go")
    sleeper.thaw()
    assert sleeper.expect("on_lease_lost")["attempt"] == attempt
    if kind == "sync":  # a task is cancelled, and may not get so far
        sleeper.heard("written")
    # The other one still waits, so the sleeper does the work.
    assert run_sql(fleet.address, "SELECT count(*) FROM book_effects") == [(0,)]
    fleet.send({})
    sleeper.expect("on_success")
    other.tell("go")
    fleet.emptied()
    fleet.shutdown()
    assert fleet.audit().effects == 2


@kinds
def test_a_process_that_was_taken_for_dead_registers_anew(fleet, kind, engine):
    fleet.send({"do": "wait"})
    sleeper = fleet.start(kind, tell=["on_lease_lost", "on_success"])
    sleeper.expect("begun")
    sleeper.freeze()
    silent = "SELECT 1 FROM pgqrs_workers WHERE now() - heartbeat_at > interval '0.7 seconds'"
    until(lambda: run_sql(fleet.address, silent), "it has been silent")
    with Session(engine) as session, session.begin():
        assert QueueService(session).workers.reclaim(silent_for=0.7) == 1
    sleeper.tell("go")
    sleeper.thaw()
    assert sleeper.expect("on_lease_lost")["attempt"] == 1
    # The same process takes the message once more, under its new name.
    assert sleeper.expect("on_success")["attempt"] == 2
    fleet.registered(1)
    fleet.shutdown()
    rows = run_sql(fleet.address, "SELECT pid, status FROM pgqrs_workers")
    assert rows == [(sleeper.pid, "stopped")] * 2
    assert fleet.audit().effects == 1


@pytest.mark.parametrize(("kind", "how", "code"), [("sync", "crash", 7), ("asyncpg", "oom", -9)])
def test_a_message_that_kills_its_process_is_dead_after_its_attempts(fleet, kind, how, code):
    settings = {"on": {"lease": 3}, "consumer": {"concurrency": 1}, "retry": {"max_attempts": 3}}
    workers = [fleet.start(kind, **settings) for _ in range(4)]
    fleet.registered(4)
    (poison,) = fleet.send({"do": how})
    until(lambda: sum(worker.process.poll() == code for worker in workers) == 3, "three have died")
    fleet.send({})
    fleet.emptied()
    fleet.shutdown()
    found = fleet.audit()
    assert (found.archived, found.dead, found.started) == (1, 1, 4)
    dead = "SELECT id FROM pgqrs_archive WHERE outcome = 'dead'"
    assert run_sql(fleet.address, dead) == [(poison,)]


@kinds
def test_a_message_whose_handler_runs_out_of_memory_is_dead_after_its_attempts(fleet, kind):
    worker = fleet.start(kind, retry={"max_attempts": 3}, tell=["on_retry", "on_dead"])
    fleet.send({"do": "memory"}, {})
    assert worker.expect("on_dead")["error"] == "MemoryError"
    fleet.emptied()
    fleet.shutdown()
    found = fleet.audit()
    assert (found.archived, found.dead, found.started) == (1, 1, 4)

"""Connections that break or lose a reply; servers that crash. No consumer is started again."""

from __future__ import annotations

import threading

import pytest

from support.bouncer import PgBouncer
from support.loops import produce
from support.processes import KINDS
from support.servers import terminate_backends

kinds = pytest.mark.parametrize("kind", KINDS)


def producing(fleet, units):
    """Enqueue with keys in a thread, as an application does whose connection may break."""
    thread = threading.Thread(target=produce, args=(fleet.engine, "mail", units), daemon=True)
    thread.start()
    return thread


def test_consumers_outlive_two_crashes_of_the_server(fleet, own):
    """One of each kind, and two producers: nothing is lost, and nothing is done twice."""
    for kind in KINDS:
        fleet.start(kind)
    fleet.registered(3)
    producers = [producing(fleet, range(at, 300, 2)) for at in range(2)]
    for settled in (60, 160):
        fleet.settled(settled)
        own.crash()
    for producer in producers:
        producer.join(90)
    fleet.settled(300)
    fleet.emptied()
    fleet.shutdown()
    found = fleet.audit()
    assert (found.committed, found.archived, found.dead) == (300, 300, 0)


@kinds
def test_consumers_outlive_the_end_of_their_backends(fleet, kind):
    worker = fleet.start(kind)
    fleet.registered()
    fleet.send(*[{"ms": 1}] * 300)
    ended = 0
    for part in range(1, 9):
        fleet.settled(30 * part)
        ended += terminate_backends(fleet.address)
    fleet.emptied()
    fleet.shutdown([worker])
    found = fleet.audit()
    assert ended > 15
    assert (found.archived, found.dead) == (300, 0)


@pytest.mark.pgbouncer
@kinds
def test_consumers_outlive_the_end_of_pgbouncer(fleet, kind):
    """By SIGKILL: all connections through it end at once, in the midst of anything."""
    with PgBouncer(fleet.address) as pooler:
        # A lease that was on its way may have to run out before its message is done.
        worker = fleet.start(
            kind,
            through=pooler.address,
            pooled=True,
            consumer={"listen_dsn": fleet.address.url()},
            on={"lease": 5},
        )
        fleet.registered()
        fleet.send(*[{"ms": 1}] * 300)
        for settled in (40, 120, 200):
            fleet.settled(settled)
            pooler.crash()
        fleet.emptied()
        fleet.shutdown([worker])
    found = fleet.audit()
    assert (found.archived, found.dead) == (300, 0)
    assert worker.errors.count("tried again") >= 1


@kinds
@pytest.mark.parametrize(
    ("sent", "attempts"), [(True, 1), (False, 2)], ids=["reply is lost", "commit is lost"]
)
def test_a_handler_whose_commit_was_not_answered_is_looked_up(fleet, proxy, kind, sent, attempts):
    worker = fleet.start(
        kind,
        through=fleet.address.via(*proxy.address),
        consumer={"housekeeping": None},  # which commits as well
        tell=["on_success", "on_retry", "on_lease_lost"],
    )
    fleet.registered()
    fault = (proxy.lose_reply if sent else proxy.cut_before)("^COMMIT")
    fleet.send({})
    fault.wait()
    told = worker.expect("on_success")
    assert (told["attempt"], told["error"]) == (attempts, None)
    fleet.shutdown([worker])
    assert "on_lease_lost" not in [word for word, _ in worker.said]
    assert fleet.audit().attempts == attempts


@kinds
@pytest.mark.parametrize(
    "statement", ["pq_leased", "INSERT INTO pgqrs_workers"], ids=["a lease", "a registration"]
)
def test_a_lost_reply_of_the_consumers_own_leaves_nothing_behind(fleet, proxy, kind, statement):
    """Leases whose reply it never got are released, uncharged, long before they expire."""
    fleet.send(*[{}] * 10)
    fault = proxy.lose_reply(statement)
    through = fleet.address.via(*proxy.address)
    worker = fleet.start(kind, through=through, on={"lease": 60}, retry={"max_attempts": 1})
    fault.wait()
    fleet.emptied()
    fleet.shutdown([worker])
    found = fleet.audit()
    assert (found.archived, found.dead) == (10, 0)

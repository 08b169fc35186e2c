"""SIGTERM and SIGINT: drained or given back, and never for long."""

from __future__ import annotations

import signal
import socket

import pytest

from support.processes import KINDS
from support.servers import Address, run_sql
from support.waiting import until

kinds = pytest.mark.parametrize("kind", KINDS)

LEASES = (
    "SELECT leased_until IS NULL AND dequeued_at IS NULL, vt <= now(), read_ct, max_read_ct"
    " FROM pgqrs_messages"
)
GIVEN_BACK = [(True, True, 1, 51)]
"""Not held, visible, and the attempt that was counted is one more that it may have."""


@pytest.mark.parametrize(
    ("kind", "number"),
    [*((kind, signal.SIGTERM) for kind in KINDS), *((k, signal.SIGINT) for k in KINDS[:2])],
)
def test_a_process_that_is_told_to_end_finishes_its_handlers_first(fleet, kind, number):
    worker = fleet.start(kind, consumer={"concurrency": 2})
    fleet.send({"do": "wait"}, {"do": "wait"})
    worker.expect("begun")
    worker.expect("begun")
    fleet.send({})
    worker.process.send_signal(number)
    worker.tell("go")
    assert worker.wait() == 0, worker.errors
    left = run_sql(fleet.address, "SELECT count(*) FROM pgqrs_messages")[0][0]
    found = fleet.audit(live=left)  # one, unless it was quicker than the signal
    # One that was leased as the signal came is given back, uncharged, but was counted.
    assert found.archived == 3 - left


@kinds
def test_a_handler_that_does_not_end_in_time_gives_its_message_back(fleet, kind):
    # A lease that is long enough to show that it does not simply run out.
    worker = fleet.start(kind, consumer={"drain_timeout": 0.3}, on={"lease": 900})
    fleet.send({"do": "wait"})
    worker.expect("begun")
    worker.terminate()
    assert worker.wait() == 1, worker.errors
    assert run_sql(fleet.address, LEASES) == GIVEN_BACK
    fleet.audit(live=1)


@kinds
def test_the_second_signal_does_not_wait(fleet, kind):
    worker = fleet.start(kind, consumer={"drain_timeout": 600}, on={"lease": 900})
    fleet.send({"do": "wait"})
    worker.expect("begun")
    worker.terminate()
    worker.process.send_signal(signal.SIGINT)  # another one: two of a kind may arrive as one
    assert worker.wait() == 1, worker.errors  # of ten minutes to drain
    assert run_sql(fleet.address, LEASES) == GIVEN_BACK
    fleet.audit(live=1)


@kinds
def test_an_idle_process_ends_at_once(fleet, kind):
    worker = fleet.start(kind, consumer={"poll_interval": 600})
    fleet.registered()
    worker.terminate()
    assert worker.wait() == 0, worker.errors
    fleet.audit()


@pytest.mark.parametrize("kind", ["sync", "asyncpg"])
def test_a_process_under_load_leaves_no_lease_behind(fleet, kind):
    """The signal comes while leases are on their way: often enough to meet each moment."""
    fleet.send(*[{}] * 1500)
    for _ in range(4):
        worker = fleet.start(kind, consumer={"concurrency": 4}, on={"lease": 900, "prefetch": 8})
        before = _done(fleet)
        until(lambda before=before: _done(fleet) > before + 20, "it works")
        worker.terminate()
        assert worker.wait() == 0, worker.errors
        held = "SELECT count(*) FROM pgqrs_messages WHERE leased_until IS NOT NULL"
        assert run_sql(fleet.address, held) == [(0,)]
    left = run_sql(fleet.address, "SELECT count(*) FROM pgqrs_messages")[0][0]
    fleet.audit(live=left)


def _done(fleet):
    return run_sql(fleet.address, "SELECT count(*) FROM pgqrs_archive")[0][0]


@kinds
def test_a_signal_is_heeded_while_the_database_does_not_answer_at_the_start(fleet, kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        host, port = silent.getsockname()
        worker = fleet.start(kind, through=Address(host, port))
        connection, _ = silent.accept()
        with connection:
            worker.terminate()
            assert worker.wait() == 0, worker.errors


@pytest.mark.parametrize(
    ("kind", "busy"), [("sync", True), ("asyncpg", True), *((kind, False) for kind in KINDS)]
)
def test_a_signal_is_heeded_while_the_database_is_down(fleet, proxy, kind, busy):
    through = fleet.address.via(*proxy.address)
    worker = fleet.start(kind, through=through, consumer={"drain_timeout": 600}, on={"lease": 60})
    fleet.registered()
    if busy:
        fleet.send({"do": "wait"})
        worker.expect("begun")
    proxy.close()  # every connection ends, and no other is to be had
    worker.tell("go")
    worker.terminate()
    assert worker.wait() == (1 if busy else 0), worker.errors  # of ten minutes to drain
    assert "cannot go on" not in worker.errors


@kinds
def test_a_settlement_that_the_database_does_not_take_does_not_keep_the_process(fleet, proxy, kind):
    """The handler has ended before the signal comes: only its last words are left to say."""
    # With one message it leases no other: it is the settlement that it waits with.
    drain = {"drain_timeout": 600, "concurrency": 1}
    through = fleet.address.via(*proxy.address)
    worker = fleet.start(kind, through=through, consumer=drain, on={"lease": 60})
    fleet.send({"do": "wait"})
    worker.expect("begun")
    proxy.close()
    worker.tell("go")
    until(lambda: "a settlement failed" in worker.errors, "it is asked again and again")
    worker.terminate()
    assert worker.wait() == 1, worker.errors
    assert "cannot go on" not in worker.errors

"""Connections that break, fall silent or lose a reply; servers that crash. Nobody is restarted."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from hands.team import KINDS
from kit.servers import run_sql, terminate_backends, until
from kit.working import produce

kinds = pytest.mark.parametrize("kind", KINDS)

LIVE = "SELECT count(*) FROM pgqrs_messages"
DONE = "SELECT count(*) FROM pgqrs_archive"


def producing(team, units):
    """Enqueue with keys in a thread, as an application does whose connection may break."""
    thread = threading.Thread(target=produce, args=(team.engine, "mail", units), daemon=True)
    thread.start()
    return thread


def test_consumers_outlive_two_crashes_of_the_server(team, own):
    """One of each kind, and two producers: nothing is lost, and nothing is done twice."""
    for kind in KINDS:
        team.hire(kind)
    team.registered(3)
    producers = [producing(team, range(at, 300, 2)) for at in range(2)]
    for settled in (60, 160):
        team.settled(settled)
        own.crash()
    for one in producers:
        one.join(30)
    team.settled(300)
    team.emptied()
    team.dismiss()
    found = team.audit()
    assert (found.committed, found.archived, found.dead) == (300, 300, 0)


@kinds
def test_consumers_outlive_the_end_of_their_backends(team, kind):
    worker = team.hire(kind)
    team.registered()
    team.send(*[{"ms": 1}] * 300)
    ended = 0
    for part in range(1, 11):
        team.settled(25 * part)
        ended += terminate_backends(team.address)
    team.emptied()
    team.dismiss([worker])
    found = team.audit()
    assert ended > 20
    assert (found.archived, found.dead) == (300, 0)


@kinds
@pytest.mark.parametrize(
    ("sent", "attempts"), [(True, 1), (False, 2)], ids=["reply is lost", "commit is lost"]
)
def test_a_handler_whose_commit_was_not_answered_is_looked_up(team, proxy, kind, sent, attempts):
    worker = team.hire(
        kind,
        through=team.address.via(*proxy.address),
        tell=["on_success", "on_retry", "on_lease_lost"],
    )
    team.registered()
    fault = (proxy.lose_reply if sent else proxy.cut_before)("^COMMIT")
    team.send({})
    fault.wait()
    told = worker.expect("on_success")
    assert (told["attempt"], told["error"]) == (attempts, None)
    team.dismiss([worker])
    assert "on_lease_lost" not in [word for word, _ in worker.said]
    assert team.audit().attempts == attempts


@kinds
@pytest.mark.parametrize(
    "statement", ["pgqrs_leased", "INSERT INTO pgqrs_workers"], ids=["a lease", "a registration"]
)
def test_a_lost_reply_of_the_consumers_own_leaves_nothing_behind(team, proxy, kind, statement):
    """Leases that it never heard of are given back, uncharged, long before they run out."""
    team.send(*[{}] * 10)
    fault = proxy.lose_reply(statement)
    through = team.address.via(*proxy.address)
    worker = team.hire(kind, through=through, on={"lease": 60}, retry={"max_attempts": 1})
    fault.wait()
    team.emptied()
    team.dismiss([worker])
    found = team.audit()
    assert (found.archived, found.dead) == (10, 0)


@kinds
def test_silent_connections_are_cut_and_running_handlers_keep_their_leases(team, proxy, kind):
    """The cable is cut: neither FIN nor RST. Its own connections go; new ones are to be had."""
    worker = team.hire(
        kind,
        through=team.address.via(*proxy.address),
        on={"lease": 6},
        tell=["on_lease_lost", "on_success"],
    )
    team.send({"do": "wait"})
    worker.expect("begun")
    proxy.freeze()
    renewed = "SELECT vt FROM pgqrs_messages WHERE dequeued_at IS NOT NULL"
    ((before,),) = run_sql(team.address, renewed)
    until(lambda: run_sql(team.address, renewed)[0][0] > before, "the lease is renewed", 12)
    (other,) = team.send({})
    while worker.expect("on_success")["id"] != other:
        pass
    # Two renewals later it is held still, and its handler has not been told otherwise.
    for _ in range(2):
        ((before,),) = run_sql(team.address, renewed)
        until(lambda before=before: run_sql(team.address, renewed)[0][0] > before, "again")
    assert run_sql(team.address, "SELECT read_ct FROM pgqrs_messages") == [(1,)]
    assert "on_lease_lost" not in [word for word, _ in worker.said]
    # The handler's own connection is silent too; to cut that one is the application's affair
    # (tcp_user_timeout), and here the test's.
    proxy.cut_all()
    worker.tell("go")
    team.emptied()
    team.dismiss([worker])
    team.audit()


@pytest.mark.parametrize("kind", ["sync", "asyncpg"])
def test_a_read_only_spell_is_waited_for(team, kind):
    """A failover, or a full disk: the consumer waits, and works on by itself."""
    worker = team.hire(kind)
    team.registered()
    name = team.address.dbname
    run_sql(team.address, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    terminate_backends(team.address)
    with team.engine.connect() as connection:
        connection.execute(sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"))
        connection.commit()
        connection.execute(
            sa.text("INSERT INTO pgqrs_messages (queue_id, payload) VALUES (1, '{}')")
        )
        connection.commit()
    until(lambda: "tried again" in worker.errors, "it says so")
    assert worker.process.poll() is None
    run_sql(
        team.address,
        f'BEGIN READ WRITE; ALTER DATABASE "{name}" RESET default_transaction_read_only; COMMIT',
    )
    terminate_backends(team.address)
    team.emptied()
    team.dismiss([worker])
    team.audit()

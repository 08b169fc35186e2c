"""Connections that fall silent, and a database that writes nothing for a while: both pass."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from support.processes import KINDS
from support.servers import run_sql, terminate_backends
from support.waiting import until

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_silent_connections_are_cut_and_running_handlers_keep_their_leases(fleet, proxy, kind):
    """The cable is cut: neither FIN nor RST. Its own connections go; new ones are to be had."""
    worker = fleet.start(
        kind,
        through=fleet.address.via(*proxy.address),
        on={"lease": 12},
        tell=["on_lease_lost", "on_success"],
    )
    fleet.send({"do": "wait"})
    worker.expect("begun")
    proxy.freeze()
    renewed = "SELECT leased_until FROM pgqrs_messages WHERE leased_until IS NOT NULL"
    ((before,),) = run_sql(fleet.address, renewed)
    until(lambda: run_sql(fleet.address, renewed)[0][0] > before, "the lease is renewed")
    (other,) = fleet.send({})
    while worker.expect("on_success")["id"] != other:
        pass
    # At the next renewal it is held still, and its handler has not been told otherwise.
    ((again,),) = run_sql(fleet.address, renewed)
    until(lambda: run_sql(fleet.address, renewed)[0][0] > again, "it is renewed again")
    assert run_sql(fleet.address, "SELECT read_ct FROM pgqrs_messages") == [(1,)]
    assert "on_lease_lost" not in [word for word, _ in worker.said]
    # The handler's own connection is silent too; to cut that one is the application's affair
    # (tcp_user_timeout), and here the test's.
    proxy.cut_all()
    worker.tell("go")
    fleet.emptied()
    fleet.shutdown([worker])
    fleet.audit()


@pytest.mark.parametrize("kind", ["sync", "asyncpg"])
def test_a_read_only_spell_is_waited_for(fleet, kind):
    """A failover, or a full disk: the consumer waits, and works on by itself."""
    worker = fleet.start(kind)
    fleet.registered()
    name = fleet.address.dbname
    run_sql(fleet.address, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    terminate_backends(fleet.address)
    with fleet.engine.connect() as connection:
        connection.execute(sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"))
        connection.commit()
        connection.execute(
            sa.text("INSERT INTO pgqrs_messages (queue_id, payload) VALUES (1, '{}')")
        )
        connection.commit()
    until(lambda: "tried again" in worker.errors, "it says so")
    assert worker.process.poll() is None
    run_sql(
        fleet.address,
        f'BEGIN READ WRITE; ALTER DATABASE "{name}" RESET default_transaction_read_only; COMMIT',
    )
    terminate_backends(fleet.address)
    fleet.emptied()
    fleet.shutdown([worker])
    fleet.audit()

"""Through PgBouncer in transaction mode, with fewer connections than clients.

The blocks of docs/how-to/pgbouncer.md are run unchanged. What the page says goes wrong without its
settings is shown to go wrong. The whole suite through PgBouncer::

    PGQRS_TEST_PGBOUNCER=1 pytest tests/db tests/guide tests/migrations tests/doctor tests/cli
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncQueueService, Consumer, Delivery, QueueService
from pgqrs_sa.consumer import scheduler
from support import bouncer
from support.actors import DRIVERS, Actor
from support.bouncer import PgBouncer
from support.ledger import audit
from support.loops import produce, work
from support.operations import OPERATIONS
from support.proxy import Proxy
from support.scripts import Script
from support.servers import WAIT, Address, OwnServer, run_sql

pytestmark = pytest.mark.pgbouncer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/pgbouncer.md").read_text()
BLOCKS = dict(re.findall(r'^```python title="(.+?)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
(INI,) = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SETTINGS = dict(re.findall(r"^(\w+) = (.+)$", INI, re.MULTILINE))


@pytest.fixture(scope="module")
def pooler(own: OwnServer) -> Iterator[PgBouncer]:
    """Two connections for each database, and the settings of the page."""
    with PgBouncer(own.address, pool_size=2, **SETTINGS) as pooler:
        yield pooler


@pytest.fixture
def pooled(pooler: PgBouncer, address: Address) -> Address:
    return address.via(pooler.address.host, pooler.address.port)


# --- the page ------------------------------------------------------------------------------------


def run_block(title: str, url: str) -> dict[str, Any]:
    names: dict[str, Any] = {"url": url}
    exec(compile(BLOCKS[title], f"docs/how-to/pgbouncer.md, {title}", "exec"), names)  # noqa: S102
    return names


def test_the_page_has_the_blocks_that_are_run_here():
    assert set(BLOCKS) == {"psycopg", "psycopg asyncio", "asyncpg"}
    assert SETTINGS["pool_mode"] == "transaction"


def test_the_block_for_psycopg_runs(pooled, engine):
    created = run_block("psycopg", pooled.url())["engine"]
    for unit in range(12):  # more often than psycopg needs to prepare a statement
        produce(created, "mail", [unit])
    work(created, "mail")
    created.dispose()
    assert audit(engine).assert_clean().archived == 12


@pytest.mark.parametrize(
    ("title", "driver"), [("psycopg asyncio", "psycopg"), ("asyncpg", "asyncpg")]
)
async def test_the_blocks_for_asyncio_run(pooled, engine, title, driver):
    created = run_block(title, pooled.url(driver))["async_engine"]
    for _ in range(12):
        async with AsyncSession(created) as session, session.begin():
            await AsyncQueueService(session).enqueue("mail", {"n": 1})
        async with AsyncSession(created) as session, session.begin():
            (delivery,) = await AsyncQueueService(session).dequeue("mail")
        async with AsyncSession(created) as session, session.begin():
            await AsyncQueueService(session).archive(delivery)
    await created.dispose()
    assert (audit(engine).archived, audit(engine).live) == (12, 0)


def test_the_tests_use_the_settings_of_the_page():
    for title, driver in (("psycopg", "psycopg"), ("asyncpg", "asyncpg")):
        found = run_block(title, f"postgresql+{driver}://nowhere/none")
        created = found.get("engine") or found["async_engine"].sync_engine
        _, given = created.dialect.create_connect_args(created.url)
        used: dict[str, Any] = {}

        def see(dialect, record, arguments, parameters, used=used):
            used.update(parameters)
            raise ConnectionError

        sa.event.listen(created, "do_connect", see)
        with pytest.raises(ConnectionError):
            created.raw_connection()
        settings = {name: value for name, value in used.items() if name not in given}
        assert set(settings) == set(bouncer.SETTINGS[driver]["connect_args"])
        assert isinstance(created.pool, sa.NullPool) == ("poolclass" in bouncer.SETTINGS[driver])


# --- everything through it -----------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_done(pooled, engine, operation, driver):
    for number in range(8):  # often enough for a driver to begin to prepare
        item = OPERATIONS[operation](f"q{number}")
        with Session(engine) as session, session.begin():
            item.prepare(session)
        outcome = Actor(pooled, driver, item, options=bouncer.SETTINGS[driver]).run()
        assert (outcome.acknowledged, outcome.tries, outcome.errors) == (True, 1, [])
        with Session(engine) as session:
            assert item.applied(session)
            assert item.doubled(session, [outcome.result]) == 0


def test_many_clients_share_two_connections(pooled, engine):
    clients = sa.create_engine(pooled.url(), pool_size=8, **bouncer.PSYCOPG)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(produce, clients, "mail", range(n, 120, 3)) for n in range(3)]
        for entry in made:
            entry.result()
        done = [pool.submit(work, clients, "mail", limit=3, by=str(n)) for n in range(8)]
        assert sum(delivery.result() for delivery in done) == 120
    clients.dispose()
    assert audit(engine).assert_clean().archived == 120


def test_a_consumer_sends_its_next_statement_before_it_calls_handlers(
    pooled, address, engine, monkeypatch
):
    """PgBouncer takes the connection back while the reply waits for the handler's thread."""
    monkeypatch.setattr(scheduler, "_QUICK", WAIT)
    produce(engine, "mail", range(60))
    clients, ahead = sa.create_engine(pooled.url(), **bouncer.PSYCOPG), []
    consumer = Consumer(sessionmaker(clients), concurrency=1, housekeeping=None)

    @consumer.on("mail", prefetch=4)
    def handler(delivery: Delivery) -> None:
        dispatcher = consumer._run.runtime.dispatcher
        ahead.append(dispatcher.in_flight_since is not None)

    assert consumer.run(until_empty=True) == 0
    clients.dispose()
    assert len(ahead) == 60
    assert any(ahead)
    assert run_sql(address, "SELECT count(*) FROM pgqrs_archive") == [(60,)]
    assert run_sql(address, "SELECT count(*) FROM pgqrs_messages") == [(0,)]


def test_four_processes_migrate_at_once(own, pooler):
    """F52: the lock belongs to the transaction, so it works here."""
    run_sql(own.address, "CREATE DATABASE migrating")
    url = Address(pooler.address.host, pooler.address.port, dbname="migrating").url()
    code = """
    from alembic import command
    from alembic.config import Config

    config = Config(toml_file=args["root"] + "/pyproject.toml")
    engine = sa.create_engine(
        args["url"], poolclass=sa.NullPool, connect_args={"prepare_threshold": None}
    )
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        say("ready")
        hear("go")
        command.upgrade(config, "head")
    say("done")
    """
    processes = [Script(code, url=url, root=str(ROOT)) for _ in range(4)]
    try:
        for process in processes:
            process.expect("ready")
        for process in processes:
            process.tell("go")
        for process in processes:
            process.expect("done")
            assert process.wait() == 0
    finally:
        for process in processes:
            process.close()
    engine = sa.create_engine(
        Address(own.address.host, own.address.port, dbname="migrating").url(),
        poolclass=sa.NullPool,
    )
    with Session(engine) as session:
        QueueService(session).check_schema()


# --- why the settings ----------------------------------------------------------------------------


def seven_times(connection: sa.Connection) -> None:
    for _ in range(7):
        connection.execute(sa.text("SELECT 1"))
        connection.commit()


def test_psycopg_without_its_setting_collides(own, address):
    with PgBouncer(address, pool_size=1) as pooler:
        engine = sa.create_engine(pooler.address.url())
        with engine.connect() as connection, engine.connect() as other:
            seven_times(connection)
            with pytest.raises(DBAPIError) as caught:
                seven_times(other)
        engine.dispose()
    assert isinstance(caught.value.orig, psycopg.errors.DuplicatePreparedStatement)


async def test_asyncpg_without_its_settings_misses_its_statements(pooled):
    engine = create_async_engine(pooled.url("asyncpg"))
    query = sa.text("SELECT 1")

    async def several_times(connection: AsyncConnection) -> None:
        for _ in range(4):
            await connection.execute(query)
            await connection.rollback()

    async with engine.connect() as item, engine.connect() as other:
        await item.execute(query)
        await other.execute(query)  # at the same time: on the other connection of the two
        await item.rollback()
        await other.rollback()
        with pytest.raises(DBAPIError, match=r"prepared statement .* does not exist"):
            await several_times(item)
    await engine.dispose()


def test_listen_succeeds_and_delivers_nothing(pooled):
    connect = {"prepare_threshold": None, "autocommit": True}
    url = sa.make_url(pooled.url()).set(drivername="postgresql").render_as_string()
    with psycopg.connect(url, **connect) as listener, psycopg.connect(url, **connect) as other:
        listener.execute("LISTEN pgqrs_test")
        other.execute("NOTIFY pgqrs_test")
        listener.execute("SELECT 1")
        assert list(listener.notifies(timeout=0.2)) == []


def test_a_lost_reply_is_survived_through_it(pooler, address, engine):
    """A proxy before PgBouncer: the server committed, PgBouncer knows, the client does not."""
    host, port = pooler.address.host, pooler.address.port
    with Proxy(address.via(host, port).target) as proxy:
        clients = sa.create_engine(address.via(*proxy.address).url(), **bouncer.PSYCOPG)
        fault = proxy.lose_reply("^COMMIT")
        troubles: list[BaseException] = []
        produce(clients, "mail", range(3), trouble=troubles.append)
        fault.wait()
        fault = proxy.lose_reply("^COMMIT")
        work(
            clients, "mail", lease=1, trouble=troubles.append, until=lambda: not audit(engine).live
        )
        clients.dispose()
    assert len(troubles) >= 2
    assert audit(engine).assert_clean().archived == 3

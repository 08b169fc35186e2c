"""Revisions that leave the transaction, interruptions half-way, and several processes at once."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService, migrations
from pgqrs_sa.errors import InvalidArgument, SchemaVersionError
from pgqrs_sa.migrations import install as steps
from support import programs

UP = "op.pgqrs_upgrade(from_version=0, to_version=1)"
DOWN = "op.pgqrs_downgrade(from_version=1, to_version=0)"
BLOCK = "with op.get_context().autocommit_block(): "
REFUSED = r"has to run in a transaction.* outside of autocommit_block\(\)"
WAITING = """
SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
FAILING = """
import sys
from alembic.config import main
from pgqrs_sa.migrations import v0001

if FAIL:
    def fail(*_):
        raise RuntimeError("half-way")
    v0001._create_archive = fail

    class Halfway:
        @staticmethod
        def upgrade(op, schema):
            v0001.upgrade(op, schema)
        @staticmethod
        def downgrade(op, schema):
            op.drop_table("pgqrs_workers", schema=schema)
            fail()
    from pgqrs_sa import migrations
    migrations.STEPS = {1: Halfway}
main(argv=["-c", INI, *sys.argv[1:]])
"""


@pytest.fixture
def processes(host: Any) -> Callable[..., list[tuple[int, str]]]:
    """Return a function that runs an Alembic command in three processes at once."""
    ini = host.folder / "alembic.ini"
    text = f"[alembic]\nscript_location = {host.folder}\nurl = {host.url}\n"
    ini.write_text(text.replace("%", "%%"))

    def run(*arguments: str, failing: int = 0) -> list[tuple[int, str]]:
        with ExitStack() as stack:
            started = []
            for number in range(3):
                code = f"INI = {str(ini)!r}; FAIL = {number < failing}\n{FAILING}"
                started.append(stack.enter_context(programs.start("-c", code, *arguments)))
            outputs = ["".join(process.communicate(timeout=180)) for process in started]
            codes = [process.wait() for process in started]
        return list(zip(codes, outputs, strict=True))

    return run


def tables(host: Any) -> set[str]:
    with host.connect() as connection:
        found = sa.inspect(connection).get_table_names()
    return {name for name in found if name.startswith("pgqrs_")}


ALL = {"pgqrs_archive", "pgqrs_messages", "pgqrs_queues", "pgqrs_workers"}


ROUNDS = pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.long)])


@ROUNDS
def test_three_upgrades_at_once_in_an_autocommit_block_change_nothing(host, processes, rounds):
    host.write(BLOCK + UP, BLOCK + DOWN)
    for number in range(rounds):
        for code, output in processes("upgrade", "head", failing=number % 2):
            assert code != 0
            assert "outside of autocommit_block()" in output
        assert tables(host) == set()


@ROUNDS
def test_three_downgrades_at_once_in_an_autocommit_block_change_nothing(host, processes, rounds):
    host.write(UP, BLOCK + DOWN)
    host.upgrade()
    with host.connect() as connection, Session(connection) as session:
        QueueService(session).queues.create("mail")
        QueueService(session).enqueue("mail", 1)
        session.commit()
    for _ in range(rounds):
        for code, output in processes("downgrade", "base"):
            assert code != 0
            assert "outside of autocommit_block()" in output
        assert tables(host) == ALL
    with host.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqrs_messages")) == 1


@ROUNDS
@pytest.mark.parametrize("block", ["", BLOCK + "op.execute('SELECT 1')\n    "])
def test_processes_of_which_one_fails_half_way_leave_a_complete_schema(
    host, processes, block, rounds
):
    """The operation stands before or after what leaves the transaction."""
    host.write(block + UP, DOWN)
    for _ in range(rounds):
        done = processes("upgrade", "head", failing=3)
        assert all(code != 0 for code, _ in done)
        assert tables(host) == set()
        done = processes("upgrade", "head", failing=1)
        assert tables(host) == ALL
        if not block:  # the lock of env.py covers the whole run
            assert sorted(code for code, _ in done)[:2] == [0, 0]
        host.check()
        done = processes("downgrade", "base", failing=3)
        assert all(code != 0 for code, _ in done)
        assert tables(host) == ALL
        done = processes("downgrade", "base", failing=1)
        assert sorted(code for code, _ in done)[:2] == [0, 0]
        assert tables(host) == set()


def test_autocommit_block_after_the_operation_that_fails_can_be_continued(host):
    number = host.write(
        f"{UP}\n    {BLOCK}op.execute('CREATE INDEX CONCURRENTLY mine ON pgqrs_messages (nothing)')"
    )
    with pytest.raises(sa.exc.ProgrammingError):
        host.upgrade()
    assert tables(host) == ALL
    # To stamp the revision would leave its index out, and the error says what to do instead.
    with pytest.raises(SchemaVersionError, match="leave the call out for one run"):
        host.upgrade()
    script = host.folder / f"versions/{number}_step.py"
    script.write_text(script.read_text().replace(UP, "pass").replace("(nothing)", "(vt)"))
    host.upgrade()
    with host.connect() as connection:
        indexes = sa.inspect(connection).get_indexes("pgqrs_messages")
        assert "mine" in {index["name"] for index in indexes}
        connection.execute(sa.text("DROP INDEX mine"))
    host.check()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_install_and_uninstall_are_refused_in_autocommit(database, driver, engine_of):
    with (
        engine_of(driver, isolation_level="AUTOCOMMIT") as run,
        pytest.raises(InvalidArgument, match=REFUSED),
    ):
        run(steps.install)
    with engine_of(driver) as run:
        assert run(steps.install) == 0
    with engine_of(driver, isolation_level="AUTOCOMMIT") as run:
        assert run(steps.install) == 1
        with pytest.raises(InvalidArgument, match=REFUSED):
            run(steps.uninstall)
    with engine_of(driver) as run:
        assert run(steps.uninstall) == 1


@pytest.fixture
def engine_of(database: Any) -> Callable[..., Any]:
    """Return a function that opens a connection of a driver, to run functions of it."""
    import asyncio
    from contextlib import contextmanager

    from sqlalchemy.ext.asyncio import create_async_engine

    @contextmanager
    def opened(driver: str, **options: Any):
        if driver == "psycopg":
            engine = sa.create_engine(database.url, poolclass=sa.NullPool, **options)
            with engine.begin() as connection:
                yield lambda function: function(connection)
            return

        async def on_connection(function: Any) -> Any:
            engine = create_async_engine(
                database.async_url(driver), poolclass=sa.NullPool, **options
            )
            async with engine.begin() as connection:
                return await connection.run_sync(function)

        yield lambda function: asyncio.run(on_connection(function))

    return opened


def test_an_offline_script_outside_of_a_transaction_stops_before_it_changes_anything(
    host, database, pg_bin
):
    host.write(BLOCK + UP)
    script = host.sql(command.upgrade, "head")
    done = subprocess.run(
        [pg_bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", database.dsn],
        input=script, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "SAVEPOINT can only be used in transaction blocks" in done.stderr
    assert tables(host) == set()


def test_an_offline_script_that_goes_on_after_errors_drops_nothing_of_another_schema(
    host, database, pg_bin
):
    host.write(UP, BLOCK + DOWN)
    host.upgrade()
    script = host.sql(command.downgrade, "0001:base")
    done = subprocess.run(
        [pg_bin / "psql", "-qX", database.dsn],
        input=f"CREATE SCHEMA a; SET search_path = a, public;\n{script}",
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert "SAVEPOINT can only be used in transaction blocks" in done.stderr
    assert 'table "pgqrs_messages" does not exist' in done.stderr
    assert tables(host) == ALL


@pytest.mark.parametrize("through", ["connection", "alembic"])
def test_who_waits_for_the_lock_says_so(host, caplog, through):
    host.write(UP)
    caplog.set_level(logging.WARNING, "pgqrs_sa.migrations")
    with host.connect() as holder:
        migrations.lock(holder)
        pid = holder.scalar(sa.text("SELECT pg_backend_pid()"))

        def wait() -> None:
            if through == "alembic":
                host.upgrade()
            else:
                with host.connect() as connection:
                    migrations.lock(connection)

        thread = threading.Thread(target=wait)
        thread.start()
        with sa.create_engine(host.url, poolclass=sa.NullPool).connect() as other:
            while not other.scalar(sa.text(WAITING)):
                other.rollback()
                assert thread.is_alive()
    thread.join(180)
    assert caplog.messages == [f"waiting for another migration to end: pid {pid}"]


def test_who_does_not_wait_says_nothing(host, caplog):
    host.write(UP)
    host.upgrade()
    assert not [record for record in caplog.records if record.name == "pgqrs_sa.migrations"]

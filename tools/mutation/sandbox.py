"""A copy of the checkout on a server of its own, in which mutants are tried one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from pgqrs_sa import embedded

from . import forks
from .groups import MODULES, TESTS
from .mutants import Mutant
from .reasons import REASONS

__all__ = ["ROOT", "SETTINGS", "Sandbox", "Trial"]

ROOT = Path(__file__).parents[2]
SETTINGS: Mapping[str, str] = {"lock_timeout": "20s"}
"""Of the servers: a mutant that waits for a lock without end is to be found out sooner."""

_SHORTEST = 20.0  # seconds that each test may take
_TIMES = 10.0
"""How many times as long as usual a test may take before its mutant is found out by that."""

_LEFT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
)


@dataclass(frozen=True)
class Trial:
    """A mutant, and what became of it.

    Attributes:
        group: What its module is about: one of `tools.mutation.groups.GROUPS`.
        module: Its module below ``pgqrs_sa``, such as ``statements/lease``.
        mutant: The change.
        found_by: The test that found it out, or None if it survived.
        seconds: How long that took.
        how: The end of what that test has said.
    """

    group: str
    module: str
    mutant: Mutant
    found_by: str | None
    seconds: float
    how: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        mutant = self.mutant
        return self.module, mutant.function, mutant.kind, mutant.what

    @property
    def reason(self) -> str | None:
        """Why no test can find it out, if somebody has said so."""
        return REASONS.get(self.key)

    def __str__(self) -> str:
        mutant = self.mutant
        fate = f"found by {self.found_by}" if self.found_by else "SURVIVED"
        where = f"{self.module}.py:{mutant.line} {mutant.function}()"
        return f"{fate}: {where}: {mutant.kind}: {mutant.what} ({self.seconds:.0f} s)"

    def row(self) -> dict[str, Any]:
        mutant = self.mutant
        told = {
            "line": mutant.line,
            "function": mutant.function,
            "kind": mutant.kind,
            "what": mutant.what,
        }
        fate = {"found_by": self.found_by, "seconds": round(self.seconds, 1), "how": self.how}
        where = {"group": self.group, "module": self.module}
        return {**where, **told, **fate, "reason": self.reason}


class Sandbox:
    """The copy, and a pytest in it that forks for each mutant: see `tools.mutation.forks`."""

    def __init__(self, folder: Path, server: embedded.EmbeddedServer) -> None:
        self._dsn = dsn = (
            f"postgresql://{server.user}@/postgres?host={server.socket_dir}&port={server.port}"
        )
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "node_modules")
        shutil.copytree(ROOT, folder, ignore=ignored)
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),  # also for the processes that tests start
            "PGQRS_TEST_DSN": dsn,
            "PGQRS_TEST_PG_BIN": str(server.bin_dir),
            "PGQRS_TEST_SHRINK": "no",
            "PYTHONHASHSEED": "0",  # the names of tests are the same in each run
            forks.FDS: f"{requests},{answers}",
            forks.TARGETS: ",".join(MODULES),
        }
        options = ("-q", "-n0", "-s", "-p", "no:cacheprovider", "-p", "tools.mutation.forks")
        self._said = folder / "said.txt"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *TESTS],
                cwd=folder,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, answers),
                start_new_session=True,
            )
        os.close(requests)
        os.close(answers)
        self._sound: set[str] = set()
        self._reader = os.fdopen(self._answers)
        self.tests: list[str] = self._answer()

    def _answer(self) -> Any:
        if not (line := self._reader.readline()):
            raise RuntimeError(f"pytest has ended: {self._said.read_text()[-2000:]}")
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        os.write(self._requests, f"{json.dumps(request)}\n".encode())
        try:
            return self._answer()
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        """End what is left of sessions: who was killed may wait for a lock, and keep a template."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(f"{_LEFT} AND pid <> pg_backend_pid()")

    def notes(self, file: str) -> dict[str, Any]:
        """Return which lines each test of a file runs."""
        tests = [test for test in self.tests if test.partition("::")[0] == file]
        answer = self._ask(notes=True, tests=tests, limits={})
        if not isinstance(answer, dict):
            raise RuntimeError(f"{file}: {answer}")  # noqa: TRY004 - it is no argument
        return answer

    def trial(self, group: str, module: str, mutant: Mutant, tests: Mapping[str, float]) -> Trial:
        """Try a mutant by tests, of which it is known how many seconds they take.

        A test that finds something out must pass with nothing changed: that is tried once.
        """
        began = time.monotonic()
        failed = self._failed([*tests], tests, module, mutant.source) if tests else None
        if failed and failed[0] not in self._sound:
            if again := self._failed([failed[0]], tests, module, None):
                raise RuntimeError(f"{failed[0]} fails with nothing changed: {again[1]}")
            self._sound.add(failed[0])
        found_by, how = failed or (None, "")
        return Trial(group, module, mutant, found_by, time.monotonic() - began, how)

    def _failed(
        self, tests: Sequence[str], seconds: Mapping[str, float], module: str, source: str | None
    ) -> tuple[str, str] | None:
        limits = {test: max(_SHORTEST, _TIMES * seconds[test]) for test in tests}
        answer = self._ask(tests=tests, limits=limits, module=module, source=source)
        if answer is None:
            return None
        test, how = answer
        if test == "broken":
            raise RuntimeError(how)
        return test, how

    def close(self) -> None:
        """End pytest."""
        os.close(self._requests)
        self._process.wait()
        self._reader.close()

"""A copy of the checkout on a server of its own, in which mutants are tried one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgqrs_sa import embedded

from . import witness
from .mutants import Mutant
from .quick import FILE, Quick
from .reasons import REASONS

ROOT = Path(__file__).parents[2]
SETTINGS: Mapping[str, str] = {"lock_timeout": "20s"}
"""Of the servers: a mutant that waits for a lock without end is to be found out sooner."""

_ERROR = re.compile(r"^E   .*$", re.MULTILINE)
_LONGEST = 300.0  # seconds for all tests of a mutant; one that takes longer is found out, too
_LEFT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - |$)", re.MULTILINE)


@dataclass(frozen=True)
class Trial:
    """A mutant, and what became of it.

    Attributes:
        module: Its module below ``pgqrs_sa``, such as ``statements/lease``.
        mutant: The change.
        found_by: The test that found it out, or None if it survived.
        seconds: How long that took.
        how: The end of what that test has said.
    """

    module: str
    mutant: Mutant
    found_by: str | None
    seconds: float
    how: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        one = self.mutant
        return self.module, one.function, one.kind, one.what

    @property
    def reason(self) -> str | None:
        """Why no test can find it out, if somebody has said so."""
        return REASONS.get(self.key)

    def __str__(self) -> str:
        one = self.mutant
        fate = f"found by {self.found_by}" if self.found_by else "SURVIVED"
        where = f"{self.module}.py:{one.line} {one.function}()"
        return f"{fate}: {where}: {one.kind}: {one.what} ({self.seconds:.0f} s)"

    def row(self) -> dict[str, Any]:
        one = self.mutant
        told = {"line": one.line, "function": one.function, "kind": one.kind, "what": one.what}
        fate = {"found_by": self.found_by, "seconds": round(self.seconds, 1), "how": self.how}
        return {"module": self.module, **told, **fate, "reason": self.reason}


class Bench:
    """The copy. The tests of a module run in one process, in their order, until one fails."""

    def __init__(self, folder: Path, server: embedded.EmbeddedServer) -> None:
        self.folder = folder
        self.said = ""  # by the last run that failed
        self._dsn = dsn = (
            f"postgresql://{server.user}@/postgres?host={server.socket_dir}&port={server.port}"
        )
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),  # also for the processes that tests start
            "PGQRS_TEST_DSN": dsn,
            "PGQRS_TEST_PG_BIN": str(server.bin_dir),
            "PGQRS_TEST_SHRINK": "no",
            "PYTHONHASHSEED": "0",  # the names of tests are the same in each run
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "node_modules")
        shutil.copytree(ROOT, folder, ignore=ignored)
        self.quick = Quick(folder, self.environment)

    def failure(self, tests: Sequence[str], *options: str) -> str | None:
        """Return the first test that fails, or None."""
        listed = self.folder / "tests.txt"
        listed.write_text("\n".join(tests))
        command = ["pytest", f"@{listed}", *options, "-x", "-q", "-n0", "-rfE"]
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "-p", "no:cacheprovider"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            said = "\nFAILED the-time-that-it-may-take"
        finally:
            with contextlib.suppress(ProcessLookupError):  # with whatever the tests have started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._disconnect()
        if process.returncode == 0:
            return None
        self.said = said
        if process.returncode == pytest.ExitCode.USAGE_ERROR:
            raise RuntimeError(said)
        found = _FAILED.search(said)
        return found[1] if found else f"pytest itself: {said[-300:]}"

    def _disconnect(self) -> None:
        """End what is left of sessions: who was killed may wait for a lock, and keep a template."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(f"{_LEFT} AND pid <> pg_backend_pid()")

    def notes(self, tests: Sequence[str], path: Path) -> str | None:
        """Note which of these tests call what; return the first that fails, or None."""
        self.environment[witness.NOTES] = str(path)
        return self.failure(tests, "-p", "tests.mutation.witness")

    def _found_by(self, tests: Sequence[str]) -> str | None:
        quick = [one for one in tests if one.startswith(FILE)]
        if quick and (found := self.quick.failure(quick)):
            test, how = found
            self.said = f"E   {how}"
            return test
        others = [one for one in tests if one not in quick]
        return self.failure(others) if others else None  # without any, pytest runs all

    def trial(self, module: str, mutant: Mutant, tests: Sequence[str]) -> Trial:
        """Put a mutant in the place of its module for as long as the tests take.

        The test that has found it out must pass with nothing changed.
        """
        path = self.folder / "pgqrs_sa" / f"{module}.py"
        whole, began = path.read_text(), time.monotonic()
        path.write_text(mutant.source)
        try:
            found_by = self._found_by(tests)
        finally:
            path.write_text(whole)
        seconds, said = time.monotonic() - began, self.said
        if found_by and "::" in found_by and self._found_by([found_by]):
            raise RuntimeError(f"{found_by} fails with nothing changed: {self.said}")
        how = "\n".join(_ERROR.findall(said)[-6:]) if found_by else ""
        return Trial(module, mutant, found_by, seconds, how)

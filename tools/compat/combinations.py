"""What is run with what: each server with the newest clients, and old clients with two servers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.proof.counts import counted

from .servers import MAJORS, NoServer, Server, found

ROOT = Path(__file__).parents[2]
SELECTION = tuple(
    f"tests/{name}"
    for name in ("consumer", "db", "doctor", "guide", "migrations", "security", "unit", "wakeup")
)
"""What is run with each; the whole suite runs with the newest of all, in CI."""

PACKAGES = ("sqlalchemy", "psycopg", "asyncpg", "alembic")
# psycopg[binary] 3.2.0 asks for a psycopg-binary that was never released: nobody can have it.
_OLD_DRIVERS = ("psycopg[binary]==3.2.1", "asyncpg==0.30.0")
_OLDEST = ("sqlalchemy[asyncio]==2.0.53", *_OLD_DRIVERS, "alembic==1.19.2")


@dataclass(frozen=True)
class Combination:
    """A server, a Python, and the packages that are not the newest (None: this environment).

    ``core`` are packages as old as only the core can do with, which replace those of the extras;
    what is left out then are tests whose names match ``without``, as pytest's ``-k`` takes them.
    """

    name: str
    major: int
    pins: tuple[str, ...] | None = None
    python: str | None = None
    core: tuple[str, ...] = ()
    without: str = ""


COMBINATIONS = [
    *(Combination(f"pg{major}", major) for major in MAJORS),
    Combination("oldest", 14, _OLDEST),
    Combination("oldest-core", 14, _OLDEST, core=("sqlalchemy==2.0.40",), without="async"),
    Combination("sqlalchemy2.0", 18, ("sqlalchemy[asyncio]==2.0.*",)),
    Combination("old-drivers", 18, ("sqlalchemy[asyncio]==2.1.*", *_OLD_DRIVERS)),
    Combination("python3.13", 18, (), "python3.13"),
]


class NoClient(RuntimeError):
    """These packages, or this Python, cannot be had here."""


@contextmanager
def _environment(combination: Combination) -> Iterator[Path]:
    """The interpreter to run with: this one, or that of a fresh virtual environment."""
    if combination.pins is None:
        yield Path(sys.executable)
        return
    program = shutil.which(combination.python) if combination.python else sys.executable
    if program is None:
        raise NoClient(f"there is no {combination.python} on the PATH")
    with tempfile.TemporaryDirectory(prefix="compat-") as folder:
        _call([program, "-m", "venv", folder])
        python = Path(folder) / "bin" / "python"
        _call([python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[dev]", *combination.pins])
        if combination.core:
            _call([python, "-m", "pip", "install", "--quiet", *combination.core])
        yield python


def _call(command: Sequence[Any]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise NoClient(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json, platform, sys; from importlib.metadata import version as v\n"
        "print(json.dumps({'python': platform.python_version()} | {n: v(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, check=True)
    return json.loads(done.stdout)


def row(combination: Combination, tests: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run these tests with a combination; return what became of it, and keep its output.

    Args:
        combination: The versions to run with.
        tests: Files and folders for pytest, from the root of the checkout.
        folder: Where the junit file and what pytest printed are kept.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    common = {"combination": combination.name, "started": started, "tests": list(tests)}
    try:
        server = found(combination.major)
        with _environment(combination) as python:
            told = _versions(python)
            code = _pytest(python, server, tests, folder, combination)
    except (NoServer, NoClient) as error:
        return {**common, "postgresql": str(combination.major), "not_run": str(error)}
    counts = counted(path for path in [folder / f"{combination.name}.xml"] if path.exists())
    return {
        **common,
        "postgresql": server.version,
        "source": server.source,
        **told,
        "passed": counts.passed,
        "failed": counts.failed,
        "skipped": counts.skipped,
        "seconds": round(time.monotonic() - began, 1),
        "exit_code": code,
        "failures": counts.failures,
    }


def _pytest(
    python: Path, server: Server, tests: Sequence[str], folder: Path, combination: Combination
) -> int:
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PGQRS_TEST_PG_BIN": str(server.bin_dir),
    }
    command = [python, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider"]
    if combination.without:
        command += ["-k", f"not ({combination.without})"]
    with (folder / f"{combination.name}.txt").open("w") as output:
        return subprocess.run(
            [*command, f"--junitxml={folder.absolute() / combination.name}.xml"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode

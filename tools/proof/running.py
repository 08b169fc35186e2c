"""Running a part, and writing down what it was run on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pgqrs_sa import embedded

from . import history
from .history import ROOT
from .parts import OUT, Part

PACKAGES = ("sqlalchemy", "psycopg", "asyncpg", "alembic")


def ran(part: Part, folder: Path) -> int:
    """Run a part, and leave ``part.json``, ``output.txt`` and what it keeps in a folder.

    Args:
        part: Which.
        folder: Is made; what an earlier run of the part has left in it is removed.

    Returns:
        Its exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in {".json", ".jsonl", ".xml", ".txt"}:
            path.unlink()
    here = str(folder.absolute())
    command = [word.replace(OUT, here) for word in (*part.command, *part.keeps)]
    command[0] = sys.executable  # not another python of the PATH
    given = {name: value.replace(OUT, here) for name, value in part.environment.items()}
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    code = _shown(command, {**os.environ, **given}, folder / "output.txt")
    record = {
        "part": part.name,
        "command": part.typed,
        "started": started,
        "seconds": round(time.monotonic() - began, 1),
        "exit_code": code,
        "machine": machine(),
    }
    (folder / "part.json").write_text(json.dumps(record, indent=1) + "\n")
    return code


def _shown(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run it, and let its output be seen and kept."""
    with (
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
        log.open("w", encoding="utf-8") as file,
    ):
        for line in process.stdout or ():
            file.write(line)
            file.flush()
            print(line, end="", flush=True)
    return process.returncode


def machine() -> dict[str, Any]:
    """Return what a run depends on: versions, platform, cores."""
    return {
        "commit": history.head(),
        "python": platform.python_version(),
        "postgresql": _postgresql(),
        **{name: _version(name) for name in PACKAGES},
        "pgbouncer": _pgbouncer(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first(command: list[str]) -> str | None:
    """The first line that a program prints, or None if there is no such program."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _number(line: str | None) -> str | None:
    match = re.search(r"\d+(\.\d+)+", line or "")
    return match[0] if match else None


def _postgresql() -> str | None:
    if dsn := os.environ.get("PGQRS_TEST_DSN"):
        return _number(_first(["psql", "-XAtc", "SHOW server_version", dsn]))
    try:
        return _number(_first([str(embedded._default_bin_dir() / "postgres"), "--version"]))
    except embedded.EmbeddedServerError:
        return None


def _pgbouncer() -> str | None:
    named = os.environ.get("PGQRS_TEST_PGBOUNCER_BIN")
    return _number(_first([named or "pgbouncer", "--version"])) or _number(
        _first(["/usr/sbin/pgbouncer", "--version"])
    )

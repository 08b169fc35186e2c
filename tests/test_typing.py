"""The public API for type checkers: `tests/typing` is checked by mypy and by pyright."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/typing").glob("*.py"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_there_is_something_to_check():
    assert len(FILES) >= 3
    assert (ROOT / "pgqrs_sa/py.typed").exists()


def test_mypy_strict_agrees_with_the_public_api():
    pytest.importorskip("mypy")
    done = run(sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", *FILES)

    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_agrees_with_the_public_api():
    pytest.importorskip("pyright")
    done = run(
        *(sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable), *FILES
    )
    found = [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in json.loads(done.stdout)["generalDiagnostics"]
    ]

    assert found == []
    assert done.returncode == 0


def test_the_files_that_are_checked_run():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for file in FILES:
        done = subprocess.run(
            [sys.executable, "-W", "error", file],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

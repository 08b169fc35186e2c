"""`tests/typing` states the types of the public API.

mypy and pyright check these files, wrong calls included: a call that is wrongly accepted is an
unused ``type: ignore``, which mypy reports. CI and ``nox -s types`` run both. This file makes sure
that they do, and that the files run.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from support import programs

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests/typing").glob("*.py"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_there_is_something_to_check():
    assert len(FILES) >= 3
    assert any("# type: ignore[" in file.read_text() for file in FILES)
    assert (ROOT / "pgqrs_sa/py.typed").exists()


def test_the_settings_of_both_type_checkers_include_these_files():
    assert {"pgqrs_sa", "tests/typing"} <= set(SETTINGS["mypy"]["files"])
    assert SETTINGS["mypy"]["strict"]  # so it reports an unused `type: ignore`
    assert "overrides" not in SETTINGS["mypy"]
    assert {"pgqrs_sa", "tests/typing"} <= set(SETTINGS["pyright"]["include"])


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_ci_and_nox_run_the_type_checkers(checker):
    commands = (ROOT / ".ci/run").read_text().splitlines()
    assert checker in commands
    assert f'session.run("{checker}")' in (ROOT / "noxfile.py").read_text()


def test_the_files_that_are_checked_run():
    for file in FILES:
        done = programs.run(file, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, ""), file

"""The source distribution has everything that the tests in it use."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_sdist_has_the_folders_that_its_tests_import_or_read():
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    named = {
        name
        for source in sources
        for name in re.findall(r"^\s*(?:from|import) (\w+)|ROOT / f?\"(\w+)", source, re.MULTILINE)
    }
    used = {"".join(pair) for pair in named}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name in used}
    assert "benchmarks" in folders
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert folders <= set(included)

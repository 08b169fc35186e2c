"""Each documented set of extras does what it is for, and names what is missing for the rest.

In an environment of its own each, on SQLAlchemy 2.0 and 2.1. It takes minutes, and packages are
installed: ``pytest -m long -n 0 tests/install``. `probe` is what runs there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")

SETS = [
    (),
    ("asyncio",),
    ("cli",),
    ("embedded",),
    ("psycopg",),
    ("psycopg", "alembic"),
    ("psycopg", "alembic", "cli"),
    ("psycopg", "alembic", "cli", "consumer"),
    ("psycopg", "alembic", "consumer"),
    ("psycopg", "asyncio", "alembic"),
    ("psycopg", "asyncio", "alembic", "cli", "consumer"),
    ("psycopg", "asyncio", "alembic", "consumer"),
    ("psycopg", "consumer"),
    ("asyncpg", "asyncio", "alembic"),
    ("asyncpg", "asyncio", "alembic", "cli", "consumer"),
]
VERSIONS = ["2.0", "2.1"]
INCLUDED = {"embedded": {"psycopg", "alembic", "cli"}}
"""What an extra brings of the others."""

NOT_TRIED = {"dev"}
"""For a checkout."""


def documented() -> set[frozenset[str]]:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    sources = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "pgqrs_sa").rglob("*.py")]
    found = set()
    for path in [*pages, *sources]:
        for names in re.findall(r"pgqrs-sa\[([a-z,]+)\]|# or \[([a-z,]+)\]", path.read_text()):
            found.add(frozenset("".join(names).split(",")))
    return found


def test_every_set_that_the_documentation_names_is_tried():
    found = {item for item in documented() if not item & NOT_TRIED}
    assert len(found) > 8
    assert found - set(map(frozenset, SETS)) == set()


def name_of(extras: Sequence[str]) -> str:
    return "-".join(extras) or "core"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


def _pip(*arguments: str, python: Path | None = None) -> None:
    there = [] if python is None else ["--python", str(python)]
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *there, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: f"sqlalchemy{version}")
@pytest.mark.parametrize("extras", SETS, ids=name_of)
def test_a_set_of_extras_works(wheel, database, tmp_path, extras, version):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    _pip("install", wanted, f"sqlalchemy=={version}.*", python=python)
    there = set(extras).union(*(INCLUDED.get(extra, set()) for extra in extras))
    if "asyncio" not in there:
        _pip("uninstall", "--yes", "greenlet", python=python)  # SQLAlchemy 2.0 brings it

    done = subprocess.run(
        [python, PROBE, database.direct.dsn, *sorted(there)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]

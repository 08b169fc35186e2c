"""Documentation is code: every Python block of the README runs, in its order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^```python(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(title: str | None) -> list[tuple[int, str]]:
    """The blocks of the README that have this title, with the line on which each begins."""
    text = (ROOT / "README.md").read_text()
    found = [
        (text.count("\n", 0, m.start("code")), m["code"])
        for m in FENCE.finditer(text)
        if m["title"] == title
    ]
    assert found, f"the README has no block titled {title!r}"
    return found


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import shop_models

    return shop_models


def execute(code: str, line: int, names: dict) -> None:
    # Padded, so that a traceback names the line of the README.
    readme = str(ROOT / "README.md")
    exec(compile("\n" * line + code, readme, "exec", dont_inherit=True), names)  # noqa: S102


def test_the_blocks_of_the_readme_run_one_after_the_other(engine: sa.Engine, shop) -> None:
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("receipts")
    with Session(engine) as session:
        names = {"engine": engine, "Order": shop.Order, "session": session}
        for line, code in blocks(None):
            execute(code, line, names)
    with Session(engine) as session:
        books = {one.queue: one for one in QueueService(session).messages.all_metrics()}
        assert session.get_one(shop.Order, 7).receipts_sent == 1
        assert (books["receipts"].archived, books["receipts"].live) == (1, 0)
        assert (books["mail"].archived, books["mail"].cancelled) == (1, 2)


async def test_the_asyncio_block_runs(migrated, shop) -> None:
    engine = create_async_engine(migrated.async_url("asyncpg"))
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("INSERT INTO pgqrs_queues (queue_name) VALUES ('receipts')")
        )
    ((line, code),) = blocks("asyncio")
    names = {"async_engine": engine, "Order": shop.Order}
    execute(f"async def main():\n{textwrap.indent(code, '    ')}", line - 1, names)
    await names["main"]()
    async with engine.connect() as connection:
        assert (await connection.execute(sa.select(Message.payload))).scalar_one() == {"order": 8}
    await engine.dispose()


def test_the_environment_of_the_readme_autogenerates_migrates_and_is_clean(
    database, tmp_path: Path
) -> None:
    ((_, env),) = blocks("env.py")
    scripts = tmp_path / "migrations"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(env)
    (scripts / "script.py.mako").write_text((ROOT / "alembic" / "script.py.mako").read_text())
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "models.py").write_text((ROOT / "examples" / "shop_models.py").read_text())
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\nscript_location = %(here)s/migrations\nprepend_sys_path = %(here)s\n"
        f"path_separator = os\nsqlalchemy.url = {database.url.replace('%', '%%')}\n"
    )

    def alembic(*arguments: str) -> None:
        command = [sys.executable, "-m", "alembic", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr

    alembic("revision", "--autogenerate", "-m", "add the queue")
    (revision,) = (scripts / "versions").glob("*.py")
    assert "op.pgqrs_upgrade(from_version=0, to_version=1)" in revision.read_text()
    alembic("upgrade", "head")
    alembic("check")
    alembic("downgrade", "base")


def test_the_readme_names_only_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links
    assert not missing

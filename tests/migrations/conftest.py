"""Hosts: applications with an Alembic environment of their own, made for one test."""

from __future__ import annotations

import io
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

ROOT = Path(__file__).parents[2]

ENV = """
import sqlalchemy as sa
from alembic import context
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgqrs_sa import migrations, models
from pgqrs_sa.models import Message, metadata as pgqrs_metadata

PLUGINS = ["alembic.autogenerate.*", "pgqrs_sa"]


class Base(DeclarativeBase): ...


{models}


def migrate(connection):
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        migrations.lock(context)
        context.run_migrations()


if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql", dialect_opts={{"paramstyle": "named"}}, literal_binds=True,
        **OPTIONS,
    )
    with context.begin_transaction():
        migrations.lock(context)
        context.run_migrations()
else:
    url = context.config.get_main_option("url")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        migrate(connection)
"""

READY_MADE = """
OPTIONS = {
    "target_metadata": [Base.metadata, pgqrs_metadata],
    "autogenerate_plugins": PLUGINS,
}
"""


class Host:
    """An application's Alembic environment; `models` is the part of env.py that declares."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        (folder / "versions").mkdir(parents=True)
        (folder / "script.py.mako").write_bytes((ROOT / "alembic/script.py.mako").read_bytes())
        self.declare(READY_MADE)

    def declare(self, models: str) -> None:
        (self.folder / "env.py").write_text(ENV.format(models=textwrap.dedent(models)))

    def config(self, **options: Any) -> Config:
        config = Config(stdout=io.StringIO(), **options)
        config.set_main_option("script_location", str(self.folder).replace("%", "%%"))
        config.set_main_option("url", self.url.replace("%", "%%"))
        return config

    def revision(self) -> str:
        """Autogenerate, and return the text of the revision."""
        number = f"{len(self.versions()) + 1:04}"
        command.revision(self.config(), message="step", rev_id=number, autogenerate=True)
        return (self.folder / f"versions/{number}_step.py").read_text()

    def write(self, upgrade: str, downgrade: str = "pass") -> str:
        """Write a revision by hand, and return its number."""
        number = f"{len(self.versions()) + 1:04}"
        before = repr(f"{len(self.versions()):04}") if self.versions() else None
        (self.folder / f"versions/{number}_step.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\nimport pgqrs_sa.migrations\n"
            f"revision = {number!r}\ndown_revision = {before}\n"
            f"def upgrade():\n    {upgrade}\ndef downgrade():\n    {downgrade}\n"
        )
        return number

    def versions(self) -> list[Path]:
        return sorted((self.folder / "versions").glob("*.py"))

    def upgrade(self, revision: str = "head") -> None:
        command.upgrade(self.config(), revision)

    def downgrade(self, revision: str = "base") -> None:
        command.downgrade(self.config(), revision)

    def stamp(self, revision: str) -> None:
        command.stamp(self.config(), revision)

    def check(self) -> None:
        command.check(self.config())

    def sql(self, direction: Callable[..., None], revision: str) -> str:
        out = io.StringIO()
        direction(self.config(output_buffer=out), revision, sql=True)
        return out.getvalue()

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        with sa.create_engine(self.url, poolclass=sa.NullPool).begin() as connection:
            yield connection


@pytest.fixture
def host(tmp_path, database) -> Host:
    return Host(tmp_path / "host", database.url)


@pytest.fixture
def body() -> Callable[[str, str], list[str]]:
    """Return the lines of a revision's upgrade() or downgrade(), each call on one line."""

    def lines(text: str, function: str) -> list[str]:
        found = re.search(rf"def {function}\(\).*?\n(    #.*?)(?=\n\n\n|\Z)", text, re.DOTALL)
        assert found is not None
        code = re.sub(r"\n(?!    op\.|    #|    pass)", " ", found[1])
        return [re.sub(r"\s+", " ", line.strip()) for line in code.splitlines() if "#" not in line]

    return lines


@pytest.fixture
def dump(pg_bin) -> Callable[..., str]:
    """Return a function that dumps a database's schema, without what differs by dump."""

    def run(dsn: str, *options: str) -> str:
        done = subprocess.run(
            [pg_bin / "pg_dump", "--schema-only", "--no-owner", "--exclude-table=alembic_version",
             *options, dsn],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        return "\n".join(
            line for line in lines if line and not line.startswith(("--", "\\restrict", "\\unrest"))
        )

    return run


@pytest.fixture
def relations() -> Callable[[sa.Connection], set[str]]:
    """Return a function that names all that a user made in the database."""

    def names(connection: sa.Connection) -> set[str]:
        return set(
            connection.scalars(
                sa.text(
                    "WITH mine AS (SELECT oid, nspname FROM pg_namespace"
                    " WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema')"
                    " SELECT nspname || '.' || relname FROM pg_class"
                    "  JOIN mine ON mine.oid = relnamespace"
                    " UNION ALL SELECT nspname || '.' || typname FROM pg_type"
                    "  JOIN mine ON mine.oid = typnamespace"
                    " UNION ALL SELECT nspname || '.' || proname FROM pg_proc"
                    "  JOIN mine ON mine.oid = pronamespace"
                )
            )
        )

    return names

"""One database a file, emptied before each test, and the kit on it for either kind of consumer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa import metadata

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

from bench import Kit, kit_for  # noqa: E402


@pytest.fixture
def migrated(kept: Any) -> Any:
    """The file's database, emptied: ids begin with 1."""
    engine = sa.create_engine(kept.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(
            sa.text(
                "CREATE TABLE IF NOT EXISTS effects (id bigserial PRIMARY KEY, msg_id bigint,"
                " read_ct int, note text)"
            )
        )
        connection.execute(sa.text("DELETE FROM effects"))
        for table in metadata.sorted_tables:
            ids = sa.func.pg_get_serial_sequence(table.name, "id")
            connection.execute(table.delete())
            connection.execute(sa.select(sa.func.setval(ids, 1, False)))
    return kept


@pytest.fixture(params=["threads", "psycopg", "asyncpg"])
def kit(request: pytest.FixtureRequest, migrated: Any) -> Iterator[Kit]:
    """With a queue ``mail``: threads, and tasks with both drivers."""
    kit = kit_for(migrated, request.param)
    kit.queue("mail", lease=30)
    yield kit
    kit.close()


@pytest.fixture
def threads(migrated: Any) -> Iterator[Kit]:
    """Threads alone, where nothing depends on the kind."""
    kit = kit_for(migrated, "threads")
    kit.queue("mail", lease=30)
    yield kit
    kit.close()


@pytest.fixture(params=["psycopg", "asyncpg"])
def tasks(request: pytest.FixtureRequest, migrated: Any) -> Iterator[Kit]:
    """Tasks alone."""
    kit = kit_for(migrated, request.param)
    kit.queue("mail", lease=30)
    yield kit
    kit.close()

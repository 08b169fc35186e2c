"""One database a file, emptied before each test, and the kit on it for either kind of consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from pgqrs_sa import ArchivedMessage, Message, Worker
from support.consumers import Kit, kit_for


@pytest.fixture
def migrated(emptied: Any) -> Any:
    """The file's database, emptied, with a table for what handlers do."""
    with psycopg.connect(emptied.dsn) as connection:
        connection.execute(
            "CREATE TABLE effects (id bigserial PRIMARY KEY, msg_id bigint, read_ct int, note text)"
        )
    return emptied


@pytest.fixture(params=["threads", "psycopg", "asyncpg"])
def kit(request: pytest.FixtureRequest, migrated: Any) -> Iterator[Kit]:
    """With a queue ``mail``: threads, and tasks with both drivers."""
    kit = kit_for(migrated, request.param)
    kit.queue("mail", lease=30)
    yield kit
    kit.close()


@pytest.fixture
def cleared(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Return what leaves only the queues of the test's kit: see `each_case`."""
    name = next(name for name in ("kit", "threads", "tasks") if name in request.fixturenames)
    kit: Kit = request.getfixturevalue(name)

    def clear() -> None:
        kit.sql("DELETE FROM effects")
        for table in (Message, ArchivedMessage, Worker):
            with kit.engine.begin() as connection:
                connection.execute(sa.delete(table))

    return clear


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

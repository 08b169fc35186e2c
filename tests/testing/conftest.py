"""What a host has in its conftest: a session in a transaction that is rolled back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, QueueService, metadata
from support.engines import new_async_engine, new_engine

ROOT = Path(__file__).parents[2]
QUEUES = ("mail", "receipts")


@pytest.fixture(scope="module")
def host_engine(kept: Any) -> Iterator[sa.Engine]:
    engine = new_engine(kept.url)
    with Session(engine) as session, session.begin():
        for queue in QUEUES:
            QueueService(session).queues.create(queue, max_read_ct=3)
    yield engine
    engine.dispose()


def contents(engine: sa.Engine) -> dict[str, int]:
    """How many rows each table has, as everybody else sees it."""
    tables = [*metadata.sorted_tables, sa.table("shop_orders")]
    with engine.connect() as connection:
        return {
            table.name: connection.scalar(sa.select(sa.func.count()).select_from(table))
            for table in tables
        }


@pytest.fixture(autouse=True)
def nothing_is_left(host_engine: sa.Engine) -> Iterator[None]:
    before = contents(host_engine)
    yield
    assert contents(host_engine) == before
    assert before["pgqrs_queues"] == len(QUEUES)
    assert sum(before.values()) == len(QUEUES)


@pytest.fixture
def connection(host_engine: sa.Engine) -> Iterator[sa.Connection]:
    with host_engine.connect() as connection:
        transaction = connection.begin()
        yield connection
        transaction.rollback()


@pytest.fixture
def session(connection: sa.Connection) -> Iterator[Session]:
    with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
        yield session


@pytest.fixture
def service(session: Session) -> QueueService:
    return QueueService(session)


@pytest.fixture(params=["psycopg", "asyncpg"])
async def async_session(
    request: pytest.FixtureRequest, kept: Any, host_engine: sa.Engine
) -> AsyncIterator[AsyncSession]:
    engine = new_async_engine(kept.async_url(request.param))
    async with engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(
            bind=connection, join_transaction_mode="create_savepoint"
        ) as session:
            yield session
        await transaction.rollback()
    await engine.dispose()


@pytest.fixture
def async_service(async_session: AsyncSession) -> AsyncQueueService:
    return AsyncQueueService(async_session)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The business class of the sample host."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import shop_models

    return shop_models.Order

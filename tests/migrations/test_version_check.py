"""``current_version`` and ``check``: does this release fit this database?"""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session

from pgqrs_sa import migrations, models
from pgqrs_sa.errors import SchemaVersionError


@pytest.fixture
def connection(database):
    with sa.create_engine(database.url, poolclass=sa.NullPool).connect() as connection:
        yield connection


def stamp(connection: sa.Connection, comment: str | None) -> None:
    models.metadata.create_all(connection)
    table = sa.Table("pgqrs_queues", sa.MetaData(), comment=comment)
    connection.execute(sa.schema.SetTableComment(table))


def test_the_steps_end_at_the_version_of_the_models():
    assert models.SCHEMA_VERSION == migrations.LATEST
    assert list(migrations.STEPS) == list(range(1, migrations.LATEST + 1))
    assert 1 <= migrations.OLDEST <= migrations.LATEST


def test_an_empty_database_has_no_version(connection):
    assert migrations.current_version(connection) is None
    assert migrations.current_version(connection, "nowhere") is None
    with pytest.raises(SchemaVersionError, match="run `alembic upgrade head`") as caught:
        migrations.check(connection)
    assert caught.value.installed is None
    assert caught.value.needed == migrations.LATEST


def test_the_version_is_in_the_comment(connection):
    stamp(connection, "pgqrs_sa:schema=1")
    assert migrations.current_version(connection) == 1
    migrations.check(connection)


def test_a_newer_database_asks_for_a_newer_package(connection):
    stamp(connection, "pgqrs_sa:schema=99")
    with pytest.raises(SchemaVersionError, match="pip install --upgrade pgqrs-sa"):
        migrations.check(connection)


def test_an_older_database_asks_for_a_migration(connection, monkeypatch):
    stamp(connection, "pgqrs_sa:schema=1")
    monkeypatch.setattr(migrations, "LATEST", 3)
    migrations.check(connection)
    monkeypatch.setattr(migrations, "OLDEST", 2)
    with pytest.raises(SchemaVersionError, match="alembic upgrade head"):
        migrations.check(connection)


@pytest.mark.parametrize("comment", [None, "mine", "pgqrs_sa:schema=", "pgqrs_sa:schema=x"])
def test_a_lost_stamp_is_told_from_an_empty_database(connection, comment):
    stamp(connection, comment)
    assert migrations.current_version(connection) is None
    with pytest.raises(SchemaVersionError, match=r"COMMENT ON TABLE public\.pgqrs_queues"):
        migrations.check(connection)


def test_no_schema_means_the_search_path(connection):
    connection.execute(sa.text("CREATE SCHEMA tenant_a; SET LOCAL search_path = tenant_a"))
    stamp(connection, "pgqrs_sa:schema=1")
    assert migrations.current_version(connection) == 1
    assert migrations.current_version(connection, "tenant_a") == 1
    assert migrations.current_version(connection, "public") is None


def test_a_schema_name_is_data(connection):
    name = "x'); DROP TABLE pgqrs_queues; --"
    stamp(connection, "pgqrs_sa:schema=1")
    assert migrations.current_version(connection, name) is None
    assert migrations.current_version(connection) == 1


def test_a_session_and_the_schema_of_the_models(database):
    class Base(DeclarativeBase):
        __pgqrs_schema__ = 'Jo"bs'

    class Queue(models.QueueMixin, Base): ...

    class Message(models.MessageMixin, Base): ...

    class Archived(models.ArchivedMessageMixin, Base): ...

    class Worker(models.WorkerMixin, Base): ...

    own = models.Models(Queue, Message, Archived, Worker)
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with Session(binds={Base: engine}) as session:
        with pytest.raises(SchemaVersionError):
            migrations.check(session, models=own)
        connection = session.connection(bind_arguments={"mapper": Queue})
        connection.execute(sa.schema.CreateSchema('Jo"bs'))
        Base.metadata.create_all(connection)
        migrations.check(session, models=own)
        assert migrations.current_version(connection, 'Jo"bs') == 1


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
async def test_an_asyncio_session(database, driver):
    engine = create_async_engine(database.async_url(driver), poolclass=sa.NullPool)
    async with AsyncSession(engine) as session:
        with pytest.raises(SchemaVersionError):
            await session.run_sync(migrations.check)
        connection = await session.connection()
        await connection.run_sync(models.metadata.create_all)
        await session.run_sync(migrations.check)
        assert await connection.run_sync(migrations.current_version, "public") == 1

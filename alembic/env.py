"""The environment of the sample host: the shop of ``examples/shop_models.py`` with its queue.

It is also what the library's developers and its demo migrate with::

    PGQRS_DSN=postgresql://localhost/shop alembic upgrade head
    alembic -x dsn=postgresql+asyncpg://localhost/shop check
    alembic upgrade head --sql

The address is ``-x dsn=``, or ``PGQRS_DSN``, or ``sqlalchemy.url``. A URL that names no driver
gets psycopg; one that names an asyncio driver (asyncpg, psycopg_async) is migrated through it. A
program that already has a connection passes it as ``config.attributes["connection"]``.
"""

from __future__ import annotations

import asyncio
import os

from alembic import context
from alembic.util import CommandError
from shop_models import Base
from sqlalchemy import URL, Connection, NullPool, create_engine

from pgqrs_sa import metadata as pgqrs_metadata
from pgqrs_sa import migrations, settings

OPTIONS = {
    "target_metadata": [pgqrs_metadata, Base.metadata],
    "autogenerate_plugins": ["alembic.autogenerate.*", "pgqrs_sa"],
}


def database_url() -> URL:
    """Return where to migrate, with a driver."""
    dsn = (
        context.get_x_argument(as_dictionary=True).get("dsn")
        or os.environ.get("PGQRS_DSN")
        or context.config.get_alembic_option("sqlalchemy.url")
    )
    if not dsn:
        raise CommandError(
            "no database given: set PGQRS_DSN=postgresql://user@host/database, "
            "or pass -x dsn=... before the command"
        )
    return settings.database_url(dsn)


def migrate() -> None:
    """Run what the command asks for, while no other process does."""
    with context.begin_transaction():
        migrations.lock(context)
        context.run_migrations()


def migrate_on(connection: Connection) -> None:
    """Migrate through a connection."""
    context.configure(connection=connection, **OPTIONS)
    migrate()


async def migrate_async(url: URL) -> None:
    """Migrate through an asyncio driver."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - needs greenlet

    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate_on)
    await engine.dispose()


def migrate_online() -> None:
    """Migrate through the connection given, or one of our own."""
    given = context.config.attributes.get("connection")
    if given is not None:
        migrate_on(given)
        return
    url = database_url()
    if url.get_dialect().is_async:
        asyncio.run(migrate_async(url))
        return
    with create_engine(url, poolclass=NullPool).connect() as connection:
        migrate_on(connection)


if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        # Drivers' styles double the percent signs of names, which no script wants.
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        **OPTIONS,
    )
    migrate()
else:
    migrate_online()

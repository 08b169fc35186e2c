"""A server of one's own, to crash: addresses, databases, backends.

::

    with own_server() as server:                    # a module or session fixture
        address = server.database("one")            # with the queue's tables
        engine = sa.create_engine(address.url("psycopg"))
        server.crash()                              # immediate stop and start, same data and port
        terminate_backends(address, "state = 'idle in transaction'")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService, embedded, metadata

from .ledger import books
from .waiting import until

WAIT = 90.0
"""The timeout of a wait, in seconds."""


@dataclass(frozen=True)
class Address:
    """Where a database is reached: directly, through a proxy, through PgBouncer."""

    host: str  # a folder for a Unix socket
    port: int
    user: str = "postgres"
    dbname: str = "postgres"

    def url(self, driver: str = "psycopg") -> str:
        """The address for `sqlalchemy.create_engine` (or ``create_async_engine``)."""
        url = sa.URL.create(f"postgresql+{driver}", self.user, database=self.dbname)
        if self.host.startswith("/"):
            url = url.update_query_dict({"host": self.host, "port": str(self.port)})
        else:
            url = url.set(host=self.host, port=self.port)
        return url.render_as_string(hide_password=False)

    def via(self, host: str, port: int) -> Address:
        """The same database, through what listens there."""
        return replace(self, host=host, port=port)

    @property
    def target(self) -> str | tuple[str, int]:
        """What a socket connects to."""
        if self.host.startswith("/"):
            return f"{self.host}/.s.PGSQL.{self.port}"
        return self.host, self.port


@dataclass(frozen=True)
class OwnServer:
    """A server that a test may crash."""

    server: embedded.EmbeddedServer

    @property
    def address(self) -> Address:
        return Address(str(self.server.socket_dir), self.server.port, self.server.user)

    def database(self, name: str) -> Address:
        """Make a database with the queue's tables, a queue ``mail`` and the books."""
        if not run_sql(self.address, "SELECT 1 FROM pg_database WHERE datname = 'template'"):
            self._make_template()
        run_sql(self.address, f'CREATE DATABASE "{name}" TEMPLATE template')
        return replace(self.address, dbname=name)

    def _make_template(self) -> None:
        run_sql(self.address, "CREATE DATABASE template")
        engine = sa.create_engine(
            replace(self.address, dbname="template").url(), poolclass=sa.NullPool
        )
        metadata.create_all(engine)
        books.create_all(engine)
        with Session(engine) as session, session.begin():
            QueueService(session).queues.create("mail")

    def crash(self) -> None:
        """Stop at once, as in a crash, and start again: same data, same port."""
        self.server.restart("immediate")


@contextmanager
def own_server(**settings: str) -> Iterator[OwnServer]:
    """Run a server for the length of the block; ``settings`` go into its postgresql.conf."""
    with embedded.start(settings={"max_connections": "200", **settings}) as server:
        yield OwnServer(server)


def run_sql(address: Address, sql: str, **values: object) -> list[tuple[object, ...]]:
    """Run one statement in autocommit, on a connection of its own, and return its rows."""
    with connected(address) as connection:
        result = connection.execute(sa.text(sql), values)
        return [tuple(row) for row in result] if result.returns_rows else []


def until_found(
    address: Address,
    sql: str,
    wanted: Callable[[Sequence[Any]], object],
    what: str,
    seconds: float = WAIT,
) -> None:
    """Wait until a statement finds what is wanted.

    One connection looks again and again: to open one takes ten times as long as a look.
    """
    with connected(address) as connection:
        looks = sa.text(sql)
        until(lambda: wanted(connection.execute(looks).all()), what, seconds)


def connected(address: Address) -> sa.Connection:
    """Return a connection of its own, in autocommit; a context manager."""
    return _engine(address).connect()


@cache
def _engine(address: Address) -> sa.Engine:
    """Return an engine that pools nothing; a new one asks the server five questions first."""
    return sa.create_engine(address.url(), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")


# Materialized: PostgreSQL is free to call the function before it looks at the rest.
_TERMINATE = """
WITH chosen AS MATERIALIZED (
    SELECT pid FROM pg_stat_activity WHERE datname = current_database()
    AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND ({where})
)
SELECT pid FROM chosen WHERE pg_terminate_backend(pid)
"""


def terminate_backends(address: Address, where: str = "true", **values: object) -> int:
    """Terminate the other sessions of a database, and wait until they are gone.

    Args:
        address: A direct one.
        where: A condition on ``pg_stat_activity``, with binds of ``values``.

    Returns:
        How many there were.
    """
    with connected(address) as connection:
        pids = connection.scalars(sa.text(_TERMINATE.format(where=where)), values).all()
        still = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids)")
        until(lambda: not connection.scalar(still, {"pids": pids}), "the backends are gone")
    return len(pids)

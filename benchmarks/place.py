"""Where a contender works: one database of one server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

__all__ = ["Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """A database, as it travels to the processes that work on it.

    Attributes:
        host: The folder of the server's Unix socket.
        port: Part of the socket's name.
        user: A superuser.
        database: The database's name.
        bin_dir: The server's binaries.
        pgmq_sql: The file with pgmq's SQL, if there is one.
    """

    host: str
    port: int
    user: str
    database: str
    bin_dir: str
    pgmq_sql: str | None = None

    def named(self, database: str) -> Place:
        """Return another database of the same server."""
        return replace(self, database=database)

    @property
    def dsn(self) -> str:
        """The URI that libpq and sqlx understand."""
        return (
            f"postgresql://{self.user}@localhost/{quote(self.database)}"
            f"?host={quote(self.host, safe='')}&port={self.port}"
        )

    @property
    def conninfo(self) -> str:
        """The same for psycopg, as keywords."""
        return f"host={self.host} port={self.port} user={self.user} dbname={self.database}"

    @property
    def keywords(self) -> dict[str, Any]:
        """The same for asyncpg."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "database": self.database,
        }

    def url(self, driver: str = "psycopg") -> str:
        """Return the same for SQLAlchemy, with a driver."""
        return (
            f"postgresql+{driver}://{self.user}@/{quote(self.database)}"
            f"?host={quote(self.host, safe='')}&port={self.port}"
        )

"""One server for a whole run, and a fresh database for each measurement.

fsync, full_page_writes and synchronous_commit are on: what is measured is what a production
server does. Databases are copied from templates, so that all rounds start from the same files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pgqrs_sa import embedded

from .contenders.base import Contender
from .executor import Assignment, Executor
from .place import Place

__all__ = ["SETTINGS", "Preparation", "Server", "running"]

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
}
"""What the server is started with; everything else is PostgreSQL's default."""

_COPIES_FILES = 150000  # before version 15 copying files was the only way, and had no name


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is in a database before a measurement begins.

    Attributes:
        key: Names the template that has it, and is kept for the next round.
        work: The contender's method that puts it there.
        arguments: The method's arguments.
    """

    key: str
    work: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


_PAUSE = 0.02  # seconds until it is looked again whether the server has read its settings


class Server:
    """Hands out databases.

    Args:
        place: Its maintenance database.
        executor: The processes that install and fill.
        thrifty: Keep the databases until the server ends, and make no checkpoints: for a short
            run, most of whose time these would take.
    """

    def __init__(self, place: Place, executor: Executor, *, thrifty: bool = False) -> None:
        self.place = place
        self._executor = executor
        self._thrifty = thrifty
        self._numbers = itertools.count(1)
        self._templates: dict[tuple[str, str], str] = {}
        self._kept: list[str] = []
        self._settings: dict[str, str] = {}

    @contextmanager
    def fresh(
        self, contender: type[Contender], preparation: Preparation | None = None
    ) -> Iterator[Place]:
        """Copy a database that has the contender's tables, and what was prepared; drop it after.

        Raises:
            ContenderFailed: it could not be installed or filled.
        """
        template = self._template(contender, preparation)
        name = f"bench_run_{next(self._numbers)}"
        self._copy(template, name)
        try:
            yield self.place.named(name)
        finally:
            if self._thrifty:
                self._kept.append(name)
            else:
                self._drop(name)

    def configure(self, settings: Mapping[str, str]) -> None:
        """Let these settings be in force, and no others that were given before."""
        if settings == self._settings:
            return
        with self._connect(self.place) as connection:
            for name in self._settings:
                connection.execute(sql.SQL("ALTER SYSTEM RESET {}").format(sql.Identifier(name)))
            for name, value in settings.items():
                change = sql.SQL("ALTER SYSTEM SET {} = {}")
                connection.execute(change.format(sql.Identifier(name), sql.Literal(value)))
            loaded = "SELECT pg_conf_load_time()"
            before = connection.execute(loaded).fetchone()
            connection.execute("SELECT pg_reload_conf()")
        self._settings = dict(settings)
        while True:
            # A new connection knows what the server's first process knows.
            with self._connect(self.place) as connection:
                if connection.execute(loaded).fetchone() != before:
                    # Whether pages are written as a whole is the checkpointer's to change.
                    connection.execute("CHECKPOINT")
                    return
            time.sleep(_PAUSE)

    def forget(self, preparation: Preparation) -> None:
        """Drop the templates of a preparation: they may be large."""
        for who, key in list(self._templates):
            if key == preparation.key:
                self._drop(self._templates.pop((who, key)))

    def clear(self) -> None:
        """Drop everything: for a server that goes on."""
        for name in [*self._kept, *self._templates.values()]:
            self._drop(name)
        self._kept.clear()
        self._templates.clear()

    def versions(self) -> Mapping[str, str]:
        """Return the server's version and the settings that matter."""
        with self._connect(self.place) as connection:
            names = ["server_version", *SETTINGS, "max_connections", "autovacuum"]
            rows = connection.execute(
                "SELECT name, current_setting(name) FROM unnest(%s::text[]) AS name", [names]
            )
            return dict(rows.fetchall())

    def _template(self, contender: type[Contender], preparation: Preparation | None) -> str:
        where = (contender.name, preparation.key if preparation else "")
        if where in self._templates:
            return self._templates[where]
        name = f"bench_template_{next(self._numbers)}"
        if preparation is None:
            self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            self._let(contender, self.place.named(name), "install", {}, opened=False)
        else:
            self._copy(self._template(contender, None), name)
            self._let(contender, self.place.named(name), preparation.work, preparation.arguments)
            # All begin with hint bits set and statistics known; the plans that ours must keep
            # in every other state are the tests' affair.
            with self._connect(self.place.named(name)) as connection:
                connection.execute("VACUUM (ANALYZE)")
        self._templates[where] = name
        return name

    def _let(
        self,
        contender: type[Contender],
        place: Place,
        work: str,
        arguments: Mapping[str, Any],
        *,
        opened: bool = True,
    ) -> None:
        self._executor.run([Assignment(contender, place, work, arguments, opened)])

    def _copy(self, template: str, name: str) -> None:
        with self._connect(self.place) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
                [template],
            )
            names = sql.Identifier(name), sql.Identifier(template)
            copy = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names)
            if self._thrifty:
                connection.execute(copy)
                return
            if connection.info.server_version >= _COPIES_FILES:
                copy += sql.SQL(" STRATEGY file_copy")
            connection.execute(copy)
            # What one contender has written is not flushed at the expense of the next.
            connection.execute("CHECKPOINT")

    def _drop(self, name: str) -> None:
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with self._connect(self.place) as connection:
            connection.execute(statement)

    @staticmethod
    def _connect(place: Place) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(place.conninfo, autocommit=True)


@contextmanager
def running(
    executor: Executor,
    *,
    bin_dir: Path | None = None,
    settings: Mapping[str, str] | None = None,
    pgmq_sql: Path | None = None,
    thrifty: bool = False,
) -> Iterator[Server]:
    """Run an embedded server for the length of the block.

    Args:
        executor: The processes that install and fill.
        bin_dir: Binaries other than the wheel's.
        settings: Win over `SETTINGS`.
        pgmq_sql: The file with pgmq's SQL.
        thrifty: See `Server`.
    """
    values = SETTINGS | dict(settings or {})
    with embedded.start(durable=True, bin_dir=bin_dir, settings=values) as server:
        place = Place(
            str(server.socket_dir),
            server.port,
            server.user,
            "postgres",
            str(server.bin_dir),
            None if pgmq_sql is None else str(pgmq_sql),
        )
        yield Server(place, executor, thrifty=thrifty)

"""What a command needs of the outside: the options given, settings, connection, output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from . import output, unreachable
from .failures import CANNOT_CONNECT, Failed, scrub
from .logs import Log

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from ..service import QueueService
    from ..settings import Settings

__all__ = ["App", "Options", "Work"]


@dataclass(frozen=True, slots=True)
class Options:
    """The global options, as given; None where one was not."""

    dsn: str | None = None
    schema: str | None = None
    config: str | None = None
    format: str | None = None
    out: str | None = None
    log_dest: str | None = None
    log_level: str | None = None
    verbose: int = 0

    def merged(self, later: Mapping[str, Any]) -> Options:
        """Return these options with those that were given further right on the line."""
        given = {name: value for name, value in later.items() if value is not None}
        given["verbose"] = self.verbose + (given.get("verbose") or 0)
        return replace(self, **given)


class Work(NamedTuple):
    """A transaction, and the service that works in it."""

    session: Session
    service: QueueService


class App:
    """What a command needs of the outside: settings, connection, output."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.output = output.Output(self.options.format or "table", self.options.out)
        self.secrets: set[str] = set()
        self.log = Log(self.options, self.secrets)
        self._checked = False

    @cached_property
    def settings(self) -> Settings:
        """The settings, from the options, the environment, a file and the defaults."""
        from ..settings import Settings  # noqa: PLC0415 - SQLAlchemy takes a while
        from .connecting import secrets_of  # noqa: PLC0415

        options = self.options
        if options.dsn:
            self.secrets |= secrets_of(options.dsn)
        settings = Settings.load(dsn=options.dsn, schema=options.schema, config=options.config)
        self.secrets |= secrets_of(settings.dsn)
        return settings

    @cached_property
    def engine(self) -> sa.Engine:
        """The engine, on which the tables are those of ``--schema``."""
        from .connecting import engine  # noqa: PLC0415

        return engine(self.settings)

    @property
    def target(self) -> str:
        """Where this works, for people."""
        from .connecting import target  # noqa: PLC0415

        return target(self.settings)

    @contextmanager
    def begin(self) -> Iterator[Work]:
        """Yield a session and its service; commit at the end, or roll back on any error."""
        from sqlalchemy.orm import Session  # noqa: PLC0415

        from ..service import QueueService  # noqa: PLC0415

        with Session(self.engine) as session, session.begin():
            connection = self._connected(session.connection)
            if not self._checked:
                self._check(connection)
                self._checked = True
            yield Work(session, QueueService(session))

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """Yield a connection as it is, in a transaction; commit at the end."""
        with self._connected(self.engine.connect) as connection, connection.begin():
            yield connection.execution_options(schema_translate_map=None)

    def _check(self, connection: sa.Connection) -> None:
        from .. import migrations  # noqa: PLC0415
        from ..errors import SchemaVersionError  # noqa: PLC0415
        from ..migrations import advice  # noqa: PLC0415

        schema = self.settings.schema
        try:
            migrations.check(connection, schema)
        except SchemaVersionError as error:
            where, _, hint = str(error).partition(": ")
            if hint.startswith("run `alembic"):  # what an application does; here more is known
                hint = advice.command(connection, schema)
                if places := advice.elsewhere(connection):
                    hint = f"--schema {' or '.join(places)} has tables; to make these: {hint}"
            raise Failed(where, hint=hint) from error

    def _connected(self, connect: Callable[[], sa.Connection]) -> sa.Connection:
        from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

        try:
            return connect()
        except DBAPIError as error:
            raise Failed(
                f"cannot connect to {self.target}: {error.orig}",
                hint=unreachable.hint(str(error.orig)),
                code=CANNOT_CONNECT,
            ) from error

    def emit(
        self,
        rows: Sequence[output.Row],
        columns: output.Columns = None,
        keys: Sequence[str] = (),
    ) -> None:
        """Write a list to stdout, or to ``--out``; ``keys`` are those that its rows have."""
        self.output.emit(rows, columns, keys)

    def emit_one(self, row: output.Row, columns: output.Columns = None) -> None:
        """Write one thing to stdout, or to ``--out``."""
        self.output.emit_one(row, columns)

    def show(
        self,
        produce: Callable[[], Sequence[output.Row]],
        columns: output.Columns = None,
        every: timedelta | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        """Write a list, and again every so often if that is asked for, until interrupted."""
        if every is None:
            self.emit(produce(), columns, keys)
        else:
            self.output.watch(produce, columns, every, keys)

    def say(self, text: str) -> None:
        """Say something to the person at the terminal."""
        click.echo(scrub(text, self.secrets), err=True)

    def close(self) -> None:
        """Close the connection and the file."""
        if "engine" in self.__dict__:
            self.engine.dispose()
        with suppress(OSError):  # of a command that has failed already; any other has closed it
            self.output.close()

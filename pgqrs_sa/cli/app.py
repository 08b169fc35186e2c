"""The base classes of commands and groups, and the `App` that a command is called with.

A command is written like this, in a module that imports nothing heavy at its top::

    from .app import App, Command, Group, pass_app

    @click.group(cls=Group)                     # its commands become `Command`s
    def queue() -> None:
        '''Queues.'''

    @queue.command("get")                       # on its own: @click.command(cls=Command)
    @click.argument("name")
    @pass_app
    def get(app: App, name: str) -> None:
        '''Show a queue.'''
        with app.begin() as work:               # one transaction, committed at the end
            info = work.service.queues.get(name)
        app.emit_one(views.queue(info))

Every `Command` takes the global options too (``--format`` and so on), so that they work before the
command and after it; they are not arguments of its function. An error that it raises becomes one
line and an exit code (see `failures`). To end with another exit code::

    raise Failed("two indexes are missing", hint="pgqrs schema sql", code=PROBLEMS)
    click.get_current_context().exit(1)         # when all has been said

`App`, as handed to commands:

====================================  =========================================================
``app.settings``                      `pgqrs_sa.settings.Settings`, read when first asked for
``app.engine``                        maps the tables to ``--schema`` (schema_translate_map)
``app.begin()``                       ``work.session`` and ``work.service`` in one transaction;
                                      the version of the schema is checked first
``app.connect()``                     a plain connection in one transaction, unmapped, unchecked
``app.target``                        host, database and schema for people; never the password
``app.emit(rows, columns)``           a list, in the format asked for (see `output`)
``app.emit_one(row, columns)``        a single thing
``app.show(produce, columns, every)`` a list, repeated with ``--watch``
``app.say(text)``                     talk, to stderr
``app.log``                           the `Log`: what is logged while a command runs
``app.options``                       the global options: ``format``, ``verbose`` …
====================================  =========================================================
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import click

from . import output
from .failures import CANNOT_CONNECT, Failed, failure, scrub
from .params import Options, global_options

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from ..service import QueueService
    from ..settings import Settings

__all__ = [
    "App",
    "Command",
    "Group",
    "Work",
    "add_call",
    "pass_app",
    "run",
]

TRACE = 2  # how many -v show tracebacks
_LOGGERS = ("pgqrs_sa", "alembic", "sqlalchemy.engine", "sqlalchemy.pool")


class Work(NamedTuple):
    """A transaction, and the service that works in it."""

    session: Session
    service: QueueService


class App:
    """The settings, the connection and the output of a command."""

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
        from .connection import secrets_of  # noqa: PLC0415

        options = self.options
        if options.dsn:
            self.secrets |= secrets_of(options.dsn)
        settings = Settings.load(dsn=options.dsn, schema=options.schema, config=options.config)
        self.secrets |= secrets_of(settings.dsn)
        return settings

    @cached_property
    def engine(self) -> sa.Engine:
        """The engine, on which the tables are those of ``--schema``."""
        from .connection import engine  # noqa: PLC0415

        return engine(self.settings)

    @property
    def target(self) -> str:
        """The hosts, the database and the schema, for people."""
        from .connection import target  # noqa: PLC0415

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
        from ..migrations import schemas  # noqa: PLC0415

        schema = self.settings.schema
        try:
            migrations.check(connection, schema)
        except SchemaVersionError as error:
            where, _, hint = str(error).partition(": ")
            if hint.startswith("run `alembic"):  # here the database is known
                hint = schemas.upgrade_command(connection, schema)
                if places := schemas.with_tables(connection):
                    hint = f"--schema {' or '.join(places)} has tables; to make these: {hint}"
            raise Failed(where, hint=hint) from error

    def _connected(self, connect: Callable[[], sa.Connection]) -> sa.Connection:
        from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

        from .connection import hint  # noqa: PLC0415

        try:
            return connect()
        except DBAPIError as error:
            raise Failed(
                f"cannot connect to {self.target}: {error.orig}",
                hint=hint(str(error.orig)),
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
        """Write a list; with ``every``, again after each interval until interrupted."""
        if every is None:
            self.emit(produce(), columns, keys)
        else:
            self.output.watch(produce, columns, every, keys)

    def show_page(
        self,
        produce: Callable[[], Sequence[output.Row]],
        columns: output.Columns,
        every: timedelta | None,
        keys: Sequence[str],
        limit: int,
    ) -> None:
        """Write a page of a list as `show` does, and say how to see the next page."""

        def page() -> Sequence[output.Row]:
            rows = produce()
            if every is None and len(rows) == limit:
                self.say(f"the page is full: the next one is --after {rows[-1]['id']}")
            return rows

        self.show(page, columns, every, keys)

    def say(self, text: str) -> None:
        """Print a text to stderr, for the person at the terminal."""
        click.echo(scrub(text, self.secrets), err=True)

    def close(self) -> None:
        """Close the connection and the file."""
        if "engine" in self.__dict__:
            self.engine.dispose()
        with suppress(OSError):  # only of a failed command: any other has closed it
            self.output.close()


class Log:
    """Sends the log to where the options say, while a command runs.

    Args:
        options: The global ones.
        secrets: Passwords that must not be in it.
    """

    def __init__(self, options: Options, secrets: set[str]) -> None:
        self._dest = options.log_dest
        self._chosen = options.log_level is not None or options.verbose > 0
        level = options.log_level or {0: "warning", 1: "info"}.get(options.verbose, "debug")
        self._level = level.upper()
        # Not the root logger: where the group is mounted, that one is the host's.
        self._loggers = [logging.getLogger(name) for name in _LOGGERS]
        self._handler: logging.Handler = logging.StreamHandler()
        if self._dest not in (None, "stderr"):
            self._handler = logging.FileHandler(self._dest, encoding="utf-8", delay=True)
        self._handler.setFormatter(_Scrubbing(secrets))
        self._before: dict[logging.Logger, int] = {}

    def __enter__(self) -> Self:
        self._attach(self._loggers)
        return self

    def __exit__(self, *_error: object) -> None:
        self._detach()
        self._handler.close()

    def join_application(self) -> None:
        """Log together with an application that has just been imported.

        An application that has configured logging gets our records too, and its own configuration
        applies, except for a level given with an option. Otherwise its records go where ours do.
        """
        root = logging.getLogger()
        if not root.handlers:
            self._detach()
            self._attach([root])
        elif self._dest is None:
            self._detach()
            if self._chosen:
                self._set_levels(self._loggers)

    def _attach(self, loggers: list[logging.Logger]) -> None:
        for logger in loggers:
            logger.addHandler(self._handler)
        self._set_levels(loggers)

    def _set_levels(self, loggers: list[logging.Logger]) -> None:
        for logger in loggers:
            self._before[logger] = logger.level
            logger.setLevel(self._level)

    def _detach(self) -> None:
        for logger, level in self._before.items():
            logger.removeHandler(self._handler)
            logger.setLevel(level)
        self._before.clear()


class _Scrubbing(logging.Formatter):
    def __init__(self, secrets: set[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record), self._secrets)


def pass_app(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hand the `App` to a command, as its first argument."""
    decorate: Callable[..., Callable[..., Any]] = click.make_pass_decorator(App)
    return decorate(function)


def add_call(
    group: click.Group,
    parameter: Callable[[Callable[..., Any]], Callable[..., Any]],
    path: str,
    help: str,
    view: Callable[[Any], output.Row],
    columns: output.Columns = None,
) -> None:
    """Add a command that calls a method of the service, and shows what it returns.

    Args:
        group: The group; the command is called as the method.
        parameter: The decorator of the command's only parameter, the method's argument.
        path: The method, as ``queues.pause``.
        help: The command's help.
        view: Turns the returned value into a row.
        columns: Those of the table.
    """
    resource, _, method = path.partition(".")

    @group.command(method, help=help)
    @parameter
    @pass_app
    def command(app: App, **given: Any) -> None:
        with app.begin() as work:
            found = getattr(getattr(work.service, resource), method)(*given.values())
        app.emit_one(view(found), columns)


class Command(click.Command):
    """A command that also takes the global options, and ends with our exit codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        taken = {flag for option in self.params for flag in option.opts}
        for option in global_options():
            option.opts = [flag for flag in option.opts if flag not in taken]
            # Hidden in the help of each command: `pgqrs --help` has them.
            option.hidden = True
            self.params.append(option)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error about the arguments repeats no password."""
        with _scrubbed():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with an `App` of its own."""
        names = [field.name for field in fields(Options)]
        later = {name: ctx.params.pop(name, None) for name in names}
        base = ctx.find_object(Options) or Options()
        app = ctx.obj = App(base.merged(later))
        ctx.call_on_close(app.close)
        try:
            app.output.check()
            with app.log:
                result = super().invoke(ctx)
            app.output.close()
        except (click.exceptions.Exit, click.UsageError):
            raise
        except BrokenPipeError:
            # The reader of the pipe has closed it.
            output.abandon_stdout()
            ctx.exit(0)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported here
            trace = app.options.verbose >= TRACE
            output.abandon_full_stdout()
            raise failure(error, app.secrets, trace=trace) from None
        return result


class Group(click.Group):
    """A group of commands, which are imported when they are first used.

    Args:
        lazy: ``module:attribute`` and one line of help for each such command, by its name.
    """

    command_class = Command
    group_class = type

    def __init__(
        self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})
        self.aliases: dict[str, str] = {}

    def alias(self, spelling: str, name: str) -> None:
        """Add another name for a command; the help shows only its own."""
        self.aliases[spelling] = name

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names, in the order of their definition."""
        return [*self.lazy, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing it if need be."""
        name = self.aliases.get(cmd_name, cmd_name)
        if name not in self.lazy:
            return super().get_command(ctx, name)
        from importlib import import_module  # noqa: PLC0415

        module, _, attribute = self.lazy[name][0].partition(":")
        found: click.Command = getattr(import_module(module, __package__), attribute)
        return found

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """List the commands without importing them."""
        rows = [(name, text) for name, (_, text) in self.lazy.items()]
        rows += [(name, command.get_short_help_str(70)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with similar names."""
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            from difflib import get_close_matches  # noqa: PLC0415

            known = [*self.list_commands(ctx), *self.aliases]
            close = get_close_matches(args[0], known, n=2)
            meant = f": did you mean {' or '.join(close)}?" if close else ""
            ctx.fail(scrub(f"there is no command {args[0]!r}{meant}"))
        return super().resolve_command(ctx, args)


@contextmanager
def _scrubbed() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        said = error.format_message()
        if scrub(said) == said:
            raise
        raise click.UsageError(scrub(said), ctx=error.ctx) from None


def _show_usage(error: click.UsageError) -> None:
    """Print a usage error like all errors, with the command's help as the hint."""
    if error.ctx is None or type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    said = error.format_message().removesuffix(".")
    Failed(said, hint=f"{error.ctx.command_path} --help").show()


def run(group: click.Group, arguments: Sequence[str]) -> int:
    """Run a group as a program; return the exit code."""
    try:
        code = group.main(list(arguments), prog_name="pgqrs", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.UsageError as error:
        _show_usage(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        # Outside of any command: during an import, say.
        failed = failure(error)
        failed.show()
        return failed.exit_code
    except SystemExit as end:  # shell completion
        return end.code if isinstance(end.code, int) else 1
    except OSError as error:  # help that could not be written
        output.abandon_full_stdout()
        failed = failure(error)
        failed.show()
        return failed.exit_code
    return code if isinstance(code, int) else 0

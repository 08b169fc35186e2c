"""Types of parameters, the global and the shared options, and what these options decide.

``--yes`` and ``--dry-run`` decide about what is destroyed, ``--chunk`` about the steps::

    if not confirmed(app, "delete", count, "live messages of queue 'mail'", yes=yes,
                     dry_run=dry_run):
        return                                          # --dry-run: it has been said
    done = in_slices("purging", count, step, chunk)
    app.emit_one(views.done("purged", done, queue="mail"))

What was counted is remembered by its ids, and nothing else is touched: see `queries`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from .failures import INTERRUPTED, REFUSED, Failed
from .output import FORMATS

if TYPE_CHECKING:
    from .app import App

__all__ = [
    "CHUNK",
    "DURATION",
    "JSON",
    "MOMENT",
    "Options",
    "ask_options",
    "attempts_option",
    "bulk_options",
    "chunk_option",
    "confirmed",
    "content_page_options",
    "dry_run_option",
    "exact_option",
    "exclusive",
    "given",
    "global_options",
    "in_chunks",
    "in_slices",
    "page_options",
    "together",
    "watch_option",
]

CHUNK = 1000
"""Rows that a transaction of a long job deletes or moves."""

_DURATION = re.compile(r"(\d+(\.\d+)?(ms|s|m|h|d|w))+")
_SECONDS = re.compile(r"\d+(\.\d+)?")


class _Duration(click.ParamType):  # type: ignore[type-arg] # since click 8.4
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> timedelta:
        """Return ``1h30m``, ``7d`` or ``30`` (seconds) as a timedelta."""
        if isinstance(value, timedelta):
            return value
        # durationpy ignores text between two units: it is only given text without any.
        if not (_SECONDS.fullmatch(value) or _DURATION.fullmatch(value)):
            self.fail(f"{value!r} is no duration: write 30, 1.5s, 1h30m or 7d", param, ctx)
        try:
            if _SECONDS.fullmatch(value):
                return timedelta(seconds=float(value))
            import durationpy  # noqa: PLC0415 - of the extra `cli`

            span: timedelta = durationpy.from_str(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is too long", param, ctx)
        else:
            return span


class _Moment(click.ParamType):  # type: ignore[type-arg]
    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> datetime:
        """Return an ISO time with its offset from UTC."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no ISO time: write 2030-01-31T09:00:00+01:00", param, ctx)
        if moment.utcoffset() is None:
            self.fail(f"{value!r} has no time zone: add Z or +01:00", param, ctx)
        return moment


class _Json(click.ParamType):  # type: ignore[type-arg]
    name = "json"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return JSON text, or that of stdin for ``-``, as a value in a tuple of one.

        The tuple is for ``null``, which is a payload like any other.
        """
        if isinstance(value, tuple):
            return value
        text = sys.stdin.read() if value == "-" else value
        try:
            return (json.loads(text),)
        except (ValueError, RecursionError) as error:
            self.fail(f"no JSON: {error}", param, ctx)


DURATION = _Duration()
_SHORTEST_WATCH = timedelta(seconds=0.1)
MOMENT = _Moment()
JSON = _Json()


_VARIABLES = {
    "--format": "PGQRS_FORMAT",
    "--out": "PGQRS_OUT",
    "--log-dest": "PGQRS_LOG_DEST",
    "--log-level": "PGQRS_LOG_LEVEL",
}
"""The environment variables of the global options that are not `Settings`."""


@dataclass(frozen=True, slots=True)
class Options:
    """The global options; None for an option that was not given."""

    dsn: str | None = None
    schema: str | None = None
    config: str | None = None
    format: str | None = None
    out: str | None = None
    log_dest: str | None = None
    log_level: str | None = None
    verbose: int = 0

    def merged(self, later: Mapping[str, Any]) -> Options:
        """Return these options, overridden by those that stand further right on the line."""
        given = {name: value for name, value in later.items() if value is not None}
        given["verbose"] = self.verbose + (given.get("verbose") or 0)
        return replace(self, **given)


class _Level(click.Choice[str]):
    """A level of logging; pgqrs' own words for two of them are understood."""

    _ALIASES: Mapping[str, str] = {"warn": "warning", "trace": "debug"}

    def __init__(self) -> None:
        super().__init__(["debug", "info", "warning", "error"], case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).lower()
        return super().convert(self._ALIASES.get(text, text), param, ctx)


def global_options(*, environment: bool = False) -> list[click.Option]:
    """Return the options that the program and every command of it take.

    Args:
        environment: Read those that are no `Settings` from ``PGQRS_…`` variables as well. Only the
            program does: a variable must not override an option that stands before a command.
    """
    formats = click.Choice(FORMATS)
    levels = _Level()

    def option(flags: Sequence[str], **more: Any) -> click.Option:
        variable = _VARIABLES.get(flags[-1]) if environment else None
        return click.Option(flags, envvar=variable, show_envvar=variable is not None, **more)

    return [
        option(["-d", "--dsn"], metavar="URL", help="The database (else PGQRS_DSN)."),
        option(["-s", "--schema"], metavar="NAME", help="Where the tables are."),
        option(["-c", "--config"], metavar="FILE", help="A YAML or TOML file of settings."),
        option(["--format"], type=formats, help="How to print data."),
        option(["--out"], metavar="FILE", help="Write data there, not to stdout."),
        option(["--log-dest"], metavar="FILE", help="Write the log there, not to stderr."),
        option(["--log-level"], type=levels, help="How much to log."),
        option(["-v", "--verbose"], count=True, help="Log more; -vv adds tracebacks."),
    ]


def exclusive(**given: object) -> None:
    """Refuse options that exclude each other, by the names that they have on the command line.

    Args:
        given: The values of the options; None for an option that was not given.

    Raises:
        click.UsageError: more than one of them was given.
    """
    flags = [f"--{name}" for name, value in given.items() if value is not None]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)} exclude each other: give one of them")


limit_option = click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="The length of a page."
)
after_option = click.option(
    "--after",
    type=click.IntRange(0),
    default=0,
    metavar="ID",
    help="The last id of the page before.",
)


def together(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Combine decorators of options, in the order of the help, into a single decorator."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _not_too_often(
    ctx: click.Context, param: click.Parameter, value: timedelta | None
) -> timedelta | None:
    if value is not None and value < _SHORTEST_WATCH:
        raise click.BadParameter(f"must be {_SHORTEST_WATCH.total_seconds()}s or more", ctx, param)
    return value


watch_option = click.option(
    "--watch",
    "every",
    type=DURATION,
    callback=_not_too_often,
    metavar="DURATION",
    help="Again every so often, as 2s.",
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
exact_option = click.option(
    "--exact", is_flag=True, help="Count the archive to the end, for as long as it takes."
)
timeout_option = click.option(
    "--timeout",
    type=DURATION,
    callback=lambda _ctx, _param, value: value or None,
    default="30s",
    show_default=True,
    help="Give up after so long; 0 for never.",
)
content_option = click.option(
    "--content/--no-content",
    default=True,
    help="With payload, headers, key and error, which a role may not be allowed to read.",
)
attempts_option = click.option(
    "--attempts",
    "--max-read-ct",
    "max_read_ct",
    type=click.IntRange(1),
    help="How many attempts a message gets before it is a dead letter.",
)
chunk_option = click.option(
    "--chunk",
    type=click.IntRange(1),
    default=CHUNK,
    show_default=True,
    help="Rows in a transaction.",
)


page_options = together(limit_option, after_option, watch_option)
content_page_options = together(
    content_option, limit_option, after_option, timeout_option, watch_option
)
ask_options = together(yes_option, dry_run_option)
bulk_options = together(chunk_option, ask_options)


def given(
    name: str,
    *flags: str,
    type: Any = str,
    required: bool = True,
    what: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take a value as an argument or as an option: the old command line had both spellings.

    Args:
        name: Of the function's parameter, and of the argument.
        flags: Of the option.
        type: Of the value.
        required: Refuse to go without.
        what: One line about it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def merged(*args: Any, **kwargs: Any) -> Any:
            first, second = kwargs.pop(f"{name}_argument"), kwargs.pop(f"{name}_option")
            if first is not None and second is not None and first != second:
                raise click.UsageError(f"{name} is given twice: {first} and {second}")
            kwargs[name] = second if first is None else first
            if required and kwargs[name] is None:
                raise click.UsageError(f"Missing {name}: {metavar} or {flags[0]}")
            return function(*args, **kwargs)

        # click.argument and click.option note themselves on the function that they decorate.
        option = click.option(
            *flags, f"{name}_option", type=type, metavar=metavar, help=what or f"The {name}."
        )
        argument = click.argument(
            f"{name}_argument", type=type, required=False, metavar=f"[{metavar}]"
        )
        return argument(option(merged))

    metavar = name.upper()
    return decorate


def confirmed(
    app: App,
    verb: str,
    count: int,
    what: str,
    *,
    yes: bool,
    dry_run: bool = False,
    if_none: bool = False,
) -> bool:
    """Show what is about to happen, and ask; return False if nothing is to be done.

    That is so in a dry run, and when ``count`` is 0, which is no failure: a nightly job may have
    nothing to do. With ``if_none``, a count of 0 is confirmed too.

    Raises:
        Failed: the answer was no, or there is no terminal to ask at and no ``--yes``.
    """
    app.say(f"{'would ' if dry_run else ''}{verb} {count:,} {what}")
    app.say(f"in {app.target}")
    if not count and not if_none:
        app.say("nothing to do")
        return False
    if dry_run:
        return False
    if yes:
        return True
    if not _is_interactive():
        raise Failed(
            "refused: confirmation needs a terminal",
            hint="--yes does it without asking, --dry-run only says what it would do",
            code=REFUSED,
        )
    if not click.confirm("go on?", err=True):
        raise Failed("refused: nothing was changed", code=REFUSED)
    return True


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def in_chunks(verb: str, total: int, step: Callable[[int], int], chunk: int) -> int:
    """Do a long job in steps that commit, with a progress bar; return how much was done.

    Args:
        verb: What is done, for the bar.
        total: The number of rows; rows that are added meanwhile are left alone.
        step: Does at most the given number in a transaction; returns how many, 0 at the end.
        chunk: The size of a step.

    Raises:
        Failed: interrupted; the message says how much had been done, and stays.
    """
    with _long_job(verb, total) as job:
        while job.done < total and (count := step(min(chunk, total - job.done))):
            job.done += count
            job.advance(count)
    return job.done


def in_slices(verb: str, total: int, step: Callable[[slice], int], chunk: int) -> int:
    """Work through a list in steps that commit, with a progress bar; return how much was done.

    Args:
        verb: What is done, for the bar.
        total: The length of the list.
        step: Works on a slice of it in a transaction of its own; returns on how many.
        chunk: The size of a slice.

    Raises:
        Failed: interrupted; the message says how much had been done, and stays.
    """
    with _long_job(verb, total) as job:
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            job.done += step(slice(start, stop))
            job.advance(stop - start)
    return job.done


@dataclass
class _Job:
    advance: Callable[[int], None]
    done: int = 0


@contextmanager
def _long_job(verb: str, total: int) -> Iterator[_Job]:
    with _bar(verb, total) as advance:
        job = _Job(advance)
        try:
            yield job
        except KeyboardInterrupt:
            raise Failed(
                f"interrupted after {job.done:,} of {total:,}: these are committed",
                hint="run it again for the rest",
                code=INTERRUPTED,
            ) from None


@contextmanager
def _bar(verb: str, total: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console  # noqa: PLC0415 - of the extra `cli`, and slow
    from rich.progress import MofNCompleteColumn, Progress  # noqa: PLC0415

    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)

"""Types of parameters, and options that several commands share."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import click

__all__ = [
    "CHUNK",
    "DURATION",
    "JSON",
    "MOMENT",
    "ask_options",
    "attempts_option",
    "bulk_options",
    "chunk_option",
    "content_page_options",
    "dry_run_option",
    "exact_option",
    "exclusive",
    "given",
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

"""Errors as an exit code, one line, and a hint.

====  ============================================================
0     done
1     problems were found, or the state of things forbids it
2     usage: an option, a value, the configuration
3     there is no such queue, message or worker
4     the database cannot be reached
5     refused: it needs ``--yes``, or the answer was no
130   interrupted
====  ============================================================
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable
from typing import IO, Any

import click

from ..errors import (
    InvalidArgument,
    LeaseLost,
    MessageLeased,
    MessageNotFound,
    PgqrsError,
    QueueNotEmpty,
    QueueNotFound,
    SchemaVersionError,
    WorkerInUse,
    WorkerNotFound,
)
from ..extras import missing_extra

__all__ = [
    "CANNOT_CONNECT",
    "INTERRUPTED",
    "NOT_FOUND",
    "PROBLEMS",
    "REFUSED",
    "USAGE",
    "Failed",
    "failure",
    "scrub",
    "styled",
]

PROBLEMS = 1
USAGE = 2
NOT_FOUND = 3
CANNOT_CONNECT = 4
REFUSED = 5
INTERRUPTED = 130

_DRIVERS = {"psycopg2": "psycopg2-binary", "pg8000": "pg8000", "psycopg2cffi": "psycopg2cffi"}
"""Drivers that no extra of this package installs, and their packages."""

_HINTS = {
    "2BP01": "what depends on the tables has to go first: a host's foreign keys, its views",
    "42501": "pgqrs schema grants prints the rights that are needed",
    "42P01": "pgqrs verify says what is missing",
    "55P03": "somebody holds a lock for long: pgqrs doctor",
}
"""Hints for errors of the server, by SQLSTATE."""

_USERINFO = re.compile(r"(?P<start>[\w+]+://[^\s:/@]*):[^\s]*@")
_KEYWORD = re.compile(
    # With as many backslashes as it has been quoted with.
    r"(?P<start>\b(?:ssl)?password\s*=\s*)('(?:[^'\\]|\\+.)*'?|(?:[^\s&'\"\\]|\\+.)+)",
    re.IGNORECASE,
)


class Failed(click.ClickException):
    """A command ends with this exit code, after this line.

    Attributes:
        hint: The next step, or None.
        exit_code: See the module.
    """

    def __init__(self, message: str, *, hint: str | None = None, code: int = PROBLEMS) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line and its hint, to stderr unless a file is given."""
        target = file or sys.stderr
        click.echo(f"{styled('error:', fg='red')} {self.message}", file=target)
        if self.hint:
            click.echo(f"{styled('hint:', fg='cyan')} {self.hint}", file=target)


def styled(text: str, **style: Any) -> str:
    """Return text in a style, unless ``NO_COLOR`` is set; click drops it where no terminal is."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Return text without passwords: the ones given, and what stands where a DSN has its own."""
    for secret in secrets:
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    text = _USERINFO.sub(r"\g<start>:***@", text)
    return _KEYWORD.sub(r"\g<start>***", text)


def failure(error: BaseException, secrets: Iterable[str] = (), *, trace: bool = False) -> Failed:
    """Return an exception as what a command ends with.

    Args:
        error: Anything that a command raised.
        secrets: Passwords that must not be shown.
        trace: Print the traceback to stderr.
    """
    if trace:
        lines = "".join(traceback.format_exception(error))
        click.echo(scrub(lines, secrets), err=True, nl=False)
    failed = _failed(error)
    message = _one_line(scrub(failed.message, secrets))
    return Failed(message, hint=failed.hint, code=failed.exit_code)


def _failed(error: BaseException) -> Failed:
    if isinstance(error, Failed):
        return error
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Failed("interrupted", code=INTERRUPTED)
    if isinstance(error, PgqrsError):
        return _of_ours(error)
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, OSError):
        return Failed(str(error))
    return _of_the_database(error)


def _of_ours(error: PgqrsError) -> Failed:
    if isinstance(error, QueueNotFound):
        hint = f"pgqrs queue create {error.queue}"
        if error.suggestions:
            hint = f"did you mean {' or '.join(error.suggestions)}?"
        return Failed(f"there is no queue {error.queue!r}", hint=hint, code=NOT_FOUND)
    if isinstance(error, WorkerNotFound):
        return Failed(f"there is no worker {error.id}", hint="pgqrs worker list", code=NOT_FOUND)
    if isinstance(error, MessageNotFound):
        hint = "pgqrs message list, or pgqrs archive list --message ID for settled ones"
        return Failed(str(error), hint=hint, code=NOT_FOUND)
    if isinstance(error, SchemaVersionError):
        where, _, hint = str(error).partition(": ")
        if error.installed is None and hint.startswith("run `alembic"):
            hint = "pgqrs install, or `alembic upgrade head` where Alembic makes the tables"
        return Failed(where, hint=hint)
    if isinstance(error, InvalidArgument):
        return Failed(str(error), hint="see --help", code=USAGE)
    return _refused_by_state(error)


def _refused_by_state(error: PgqrsError) -> Failed:
    if isinstance(error, QueueNotEmpty):
        held = f"{error.messages} live and {error.archived} archived message(s)"
        hint = "--force deletes them with it"
        return Failed(f"queue {error.queue!r} still holds {held}", hint=hint)
    if isinstance(error, LeaseLost):
        known = "; ".join(map(str, error.whereabouts.values()))
        return Failed(f"lease lost, nothing was changed: {known}")
    if isinstance(error, WorkerInUse):
        hint = f"pgqrs worker stop {error.id}; pgqrs worker release {error.id}"
        return Failed(str(error).partition(": ")[0], hint=hint)
    message, _, hint = str(error).partition(": ")
    if isinstance(error, MessageLeased):
        hint += "; who holds it settles it with --token"
    return Failed(message, hint=hint or None)


def _missing(error: ImportError) -> Failed:
    hint = missing_extra(error)
    if hint is None and error.name in _DRIVERS:
        hint = f"pip install {_DRIVERS[error.name]}, or name +psycopg in the DSN, or no driver"
    hint = hint or "pip install 'pgqrs-sa[cli,psycopg,alembic]'"
    return Failed(str(error), hint=hint, code=USAGE)


def _of_the_database(error: BaseException) -> Failed:
    from sqlalchemy import exc  # noqa: PLC0415 - only now; what raised it has imported it

    if isinstance(error, exc.NoSuchModuleError):
        return Failed(str(error), hint="name +psycopg in the DSN, or no driver", code=USAGE)
    if isinstance(error, exc.DBAPIError):
        # Not str(error), which adds the statement, its parameters and a link.
        said = getattr(error.orig, "diag", None)
        message = getattr(said, "message_primary", None) or str(error.orig)
        if detail := getattr(said, "message_detail", None):
            message += f" ({_one_line(detail)})"
        hint = _HINTS.get(getattr(error.orig, "sqlstate", None) or "")
        code = CANNOT_CONNECT if error.connection_invalidated else PROBLEMS
        return Failed(message, hint=hint, code=code)
    hint = "this should not happen: run it again with -vv, and report what it prints"
    return Failed(f"{type(error).__name__}: {error}", hint=hint)


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return "; ".join(line for line in lines if line)

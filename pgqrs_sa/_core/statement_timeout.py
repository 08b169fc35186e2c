"""Reading for no longer than a given time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from .. import validation
from ..errors import InvalidArgument, ReadTimeout
from . import sessions
from .scope import Scope

__all__ = ["within"]

_CANCELED = "57014"

_LIMIT = sa.text(
    "SELECT set_config('statement_timeout',"
    " CAST(least(nullif(CAST(setting AS bigint), 0), :milliseconds) AS text), true)"
    " FROM pg_catalog.pg_settings WHERE name = 'statement_timeout'"
).bindparams(sa.bindparam("milliseconds", type_=sa.BigInteger))


_LONGEST = timedelta(milliseconds=2**31 - 1)
"""The largest ``statement_timeout`` of PostgreSQL, which is an integer of milliseconds."""


@contextmanager
def within(scope: Scope, timeout: float | timedelta | None) -> Iterator[None]:
    """Let the server end a read that takes too long, without loss to the caller's transaction.

    The limit is set in a savepoint, whose rollback takes it back: nothing may be written inside.

    Args:
        scope: The session, and the settings of the service.
        timeout: Seconds, or a timedelta, at most 2,147,483.647 s (24 days); None for no limit but
            the session's own.

    Raises:
        ReadTimeout: it took longer.
        InvalidArgument: the timeout is too long for PostgreSQL, or the connection is in AUTOCOMMIT,
            where a limit cannot be taken back.
    """
    if timeout is None:
        yield
        return
    span = validation.validate_duration(timeout, "timeout", positive=True)
    if span > _LONGEST:
        raise InvalidArgument(
            f"timeout is {span.total_seconds():.0f} seconds, and PostgreSQL's statement_timeout "
            f"at most {_LONGEST.total_seconds():.0f} (24 days): use a shorter one, or none"
        )
    longest = span.total_seconds()
    scope.session._autoflush()  # noqa: SLF001 - what is pending must not be rolled back with the limit
    connection = scope.session.connection(bind_arguments={"mapper": scope.context.mapper})
    if sessions.is_autocommit(connection):
        raise InvalidArgument("timeout needs a transaction, and this connection is in AUTOCOMMIT")
    savepoint = connection.begin_nested()
    begun = time.monotonic()
    try:
        connection.execute(_LIMIT, {"milliseconds": max(1, round(longest * 1000))})
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "sqlstate", None)
        if code == _CANCELED and time.monotonic() - begun >= longest:
            raise ReadTimeout(longest) from None
        raise
    finally:
        savepoint.rollback()

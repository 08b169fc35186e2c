"""Which errors of the database pass by themselves, and how a consumer waits for that.

By SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html), where the driver
gives one; a lost connection often has none.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import tenacity
from sqlalchemy import exc

from ..errors import ReadOnlyDatabase

__all__ = ["is_transient", "retrying", "sqlstate", "without_parameters"]

log = logging.getLogger("pgqrs_sa.consumer")

_CLASSES = (
    "08",  # connection exceptions
    "53",  # insufficient resources: disk, memory, connections
    "57P",  # the server is shutting down, starting, or somebody ended the backend
    "58",  # errors outside of PostgreSQL
    "40",  # serialization failure, deadlock
)
_CODES = (
    "25006",  # read only: a failover is under way, or the disk is full
    "25P03",  # idle in transaction for too long
    "55000",  # the database takes no connections just now
    "55P03",  # a lock was not to be had in time
    "57014",  # statement_timeout
)


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error, of psycopg or asyncpg or wrapped by SQLAlchemy."""
    seen = 0
    while error is not None and seen < 5:  # noqa: PLR2004 - asyncpg's is wrapped twice
        for name in ("sqlstate", "pgcode"):
            if isinstance(code := getattr(error, name, None), str):
                return code
        error = getattr(error, "orig", None) or error.__cause__
        seen += 1
    return None


def without_parameters(error: BaseException) -> BaseException:
    """Return an error that prints no parameters any more, so that it may be logged.

    Those of a statement that settles have the text of what handlers raised, and that may repeat
    a payload.
    """
    seen: BaseException | None = error
    for _ in range(5):  # as in `sqlstate`
        if isinstance(seen, exc.StatementError):
            seen.hide_parameters = True
        seen = None if seen is None else seen.__cause__ or seen.__context__
    return error


def is_transient(error: BaseException) -> bool:
    """Return whether retrying may succeed."""
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    if (code := sqlstate(error)) is not None:
        return code.startswith(_CLASSES) or code in _CODES
    # What asyncpg 0.30 says when a connection was ended while nobody was reading from it; and
    # SQLAlchemy does not translate it.
    if any(base.__name__ == "InternalClientError" for base in type(error).__mro__):
        return True
    # Errors without a code: no connection, none free in the pool, or a new one to a database that
    # has become read only (on a read-only database a consumer does not even start).
    return isinstance(
        error,
        (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, OSError, ReadOnlyDatabase),
    )


def retrying(stopping: threading.Event, what: str, worker: int | None) -> tenacity.Retrying:
    """Return a retry that waits longer and longer, at random, until it works or all stops.

    Args:
        stopping: Ends the waiting at once; the last error is then raised.
        what: For the log.
        worker: The worker's id, for the log.
    """

    def say(state: Any) -> None:
        error = state.outcome.exception()
        log.warning(
            "%s failed, and is tried again in %.1f s: %s",
            what,
            state.next_action.sleep,
            type(error).__name__,
            extra={"worker": worker, "sqlstate": sqlstate(error), "attempt": state.attempt_number},
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
        stop=tenacity.stop_when_event_set(stopping),
        sleep=tenacity.sleep_using_event(stopping),
        before_sleep=say,
        reraise=True,
    )

"""Callbacks for the moment when the work of a session is committed.

A callback is called after the session's outermost transaction commits, and dropped when that is
rolled back or closed.

A session that joined a connection on which the application has begun a transaction does not commit
that transaction. Its callbacks are called when the connection commits: just before the server
does, since SQLAlchemy has no later event.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session, SessionTransaction

__all__ = [
    "Waiting",
    "now",
    "waiting",
    "when_committed",
    "when_connection_commits",
]

_WAITING = "_pgqrs_when_committed"
_log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """A callback registered with a session: see `when_committed`."""

    call: partial[None]
    joined: sa.Connection | None
    strict: bool


_outer: WeakKeyDictionary[sa.Connection, dict[Hashable, Waiting]] = WeakKeyDictionary()
"""The callbacks that wait for the commit of the application's connections."""


def waiting(session: Session, key: Hashable) -> Waiting | None:
    """Return the callback registered under this key, or None."""
    noted: dict[Hashable, Waiting] = session.info.get(_WAITING, {})
    return noted.get(key)


def when_committed(
    session: Session,
    mapper: Mapper[Any],
    key: Hashable,
    call: partial[None],
    *,
    strict: bool = False,
) -> sa.Connection | None:
    """Call a function after the work of a session is committed; replace that of the same key.

    Args:
        session: The session.
        mapper: The mapper that selects the bind, as a session may have several.
        key: Identifies the callback, which is called once.
        call: The callback. It must not raise.
        strict: Drop it when any savepoint is rolled back.

    Returns:
        The application's connection that the session joined, or None.
    """
    joined = _joined(session, mapper)
    session.info.setdefault(_WAITING, {})[key] = Waiting(call, joined, strict)
    return joined


def when_connection_commits(
    connection: sa.Connection, key: Hashable, call: partial[None], *, strict: bool = False
) -> None:
    """Call a function when a connection commits; replace that of the same key.

    Args:
        connection: The application's connection.
        key: Identifies the callback, which is called once.
        call: The callback. It must not raise.
        strict: Drop it when any savepoint is rolled back.
    """
    if connection not in _outer:
        _outer[connection] = {}
        event.listen(connection, "commit", _outer_commit)
        event.listen(connection, "rollback", _outer_rollback)
        event.listen(connection, "rollback_savepoint", _outer_rollback_savepoint)
    _outer[connection][key] = Waiting(call, None, strict)


def now(session: Session) -> None:
    """Call the callbacks immediately: in AUTOCOMMIT each statement is committed already."""
    noted: dict[Hashable, Waiting] = session.info.pop(_WAITING, {})
    for waiting in noted.values():
        waiting.call()


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    """Call the callbacks after the outermost commit."""
    if session.in_nested_transaction():
        return
    noted: dict[Hashable, Waiting] = session.info.pop(_WAITING, {})
    for key, waiting in noted.items():
        if waiting.joined is not None and waiting.joined.in_transaction():
            when_connection_commits(waiting.joined, key, waiting.call, strict=waiting.strict)
        else:
            waiting.call()


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    """Drop the strict callbacks: a transaction or a savepoint was rolled back."""
    noted: dict[Hashable, Waiting] = session.info.get(_WAITING, {})
    _forget_strict(noted)


def _forget_strict(noted: dict[Hashable, Waiting]) -> None:
    for key in [key for key, waiting in noted.items() if waiting.strict]:
        del noted[key]


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Drop all callbacks when the outermost transaction is over."""
    if transaction.parent is None:
        session.info.pop(_WAITING, None)


def _joined(session: Session, mapper: Mapper[Any]) -> sa.Connection | None:
    """Return the application's connection that a session joined, or None."""
    try:
        bind = session.get_bind(mapper)
    except Exception:  # noqa: BLE001 - of any kind
        # A host's get_bind() may need more arguments. The statement itself has succeeded.
        _log.debug("cannot tell the bind of queue messages", exc_info=True)
        return None
    return bind if isinstance(bind, sa.Connection) else None


def _outer_commit(connection: sa.Connection) -> None:
    noted = list(_outer.get(connection, {}).values())
    _outer_rollback(connection)
    for waiting in noted:
        waiting.call()


def _outer_rollback(connection: sa.Connection) -> None:
    # Emptied, not removed: the listeners stay, and must not be added twice.
    if noted := _outer.get(connection):
        noted.clear()


def _outer_rollback_savepoint(connection: sa.Connection, _name: str, _context: object) -> None:
    _forget_strict(_outer.get(connection, {}))

"""Telling consumers of this process about messages that it has just committed itself.

Whatever enqueues notes the queue's name in its session. When the session's transaction has been
committed, everybody who has subscribed gets the names; when it is rolled back or closed, they are
forgotten. Savepoints change nothing: a name whose savepoint was rolled back costs a look at an
empty queue, one that was lost would cost a wait.

A session that was joined to a connection on which the application has begun a transaction of its
own commits nothing, and its end means nothing. Its names are given when that connection commits:
at the moment before the server does it, since SQLAlchemy has no later event. A consumer that finds
the queue empty then looks again soon.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session

__all__ = ["NOTIFY", "committed", "ended", "note", "subscribe", "subscribed"]

NOTIFY = "pgqrs_notify"
"""Set this in ``session.info`` to let everything that the session enqueues send a NOTIFY too."""

_NOTED = "_pgqrs_noted"
_log = logging.getLogger(__name__)

_Callback: TypeAlias = Callable[[str], None]


class _Subscribers:
    """Who wants to know. The tuple is replaced, never changed, so that reading needs no lock."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.callbacks: tuple[_Callback, ...] = ()

    def add(self, callback: _Callback) -> None:
        with self.lock:
            self.callbacks = (*self.callbacks, callback)

    def remove(self, callback: _Callback) -> None:
        with self.lock:
            left = list(self.callbacks)
            if callback in left:
                left.remove(callback)
            self.callbacks = tuple(left)


_subscribers = _Subscribers()
if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    # The consumers of the parent do not run in the child, and share their sockets with it.
    os.register_at_fork(after_in_child=_subscribers.reset)

_outer: WeakKeyDictionary[sa.Connection, set[str]] = WeakKeyDictionary()
"""The names that wait for the commit of a connection of the application's."""


def subscribe(callback: Callable[[str], None]) -> Callable[[], None]:
    """Have a function called with the name of each queue that this process enqueues into.

    Args:
        callback: Gets the name after the commit, in the thread that has committed: it must be
            quick. What it raises is logged, and goes no further.

    Returns:
        A function that ends the subscription; calling it again does nothing.
    """

    # An object of its own for each subscription, even of the same function.
    def one(queue: str) -> None:
        callback(queue)

    _subscribers.add(one)
    return lambda: _subscribers.remove(one)


def subscribed() -> bool:
    """Whether anybody in this process wants to know."""
    return bool(_subscribers.callbacks)


def note(session: Session, queue: str, mapper: Mapper[Any]) -> None:
    """Remember that a session has put something into a queue, until its transaction ends."""
    noted: dict[str, sa.Connection | None] | None = session.info.get(_NOTED)
    if noted is None:
        noted = session.info[_NOTED] = {}
    elif noted.get(queue, noted) is None:
        return
    noted[queue] = joined = _joined(session, mapper)
    if joined is not None and _subscribers.callbacks:
        _note_outer(joined, queue)


def committed(session: Session) -> None:
    """Give away what was noted, if it is the outermost transaction that was committed."""
    if not _subscribers.callbacks or session.in_nested_transaction():
        return
    noted: dict[str, sa.Connection | None] = session.info.pop(_NOTED, {})
    for queue, joined in noted.items():
        if joined is not None and joined.in_transaction():
            _note_outer(joined, queue)
        else:
            _publish(queue)


def ended(session: Session) -> None:
    """Forget what was noted: the outermost transaction is over."""
    session.info.pop(_NOTED, None)


def _publish(queue: str) -> None:
    for callback in _subscribers.callbacks:
        try:
            callback(queue)
        except Exception:  # noqa: BLE001 - whatever it is
            # Whoever has committed is not to blame for it.
            _log.exception("a subscriber failed over a message in queue %r", queue)


def _joined(session: Session, mapper: Mapper[Any]) -> sa.Connection | None:
    """Return the connection of the application's that a session works on, if it does."""
    try:
        bind = session.get_bind(mapper)
    except Exception:  # noqa: BLE001 - whatever it is
        # A host's own get_bind() may want more than we know; the enqueue itself has gone well.
        _log.debug("cannot tell the bind of queue messages", exc_info=True)
        return None
    return bind if isinstance(bind, sa.Connection) else None


def _note_outer(connection: sa.Connection, queue: str) -> None:
    if connection not in _outer:
        _outer[connection] = set()
        event.listen(connection, "commit", _outer_commit)
        event.listen(connection, "rollback", _outer_rollback)
    _outer[connection].add(queue)


def _outer_commit(connection: sa.Connection) -> None:
    names = sorted(_outer.get(connection, ()))
    _outer_rollback(connection)
    for queue in names:
        _publish(queue)


def _outer_rollback(connection: sa.Connection) -> None:
    # Emptied and not removed: the listeners stay, and are not to be added again.
    if names := _outer.get(connection):
        names.clear()

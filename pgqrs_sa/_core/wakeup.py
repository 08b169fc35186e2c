"""Waking consumers: those of this process when a commit is done, and others by NOTIFY.

A session collects the names of the queues that it enqueues into. When its transaction has been
committed, every subscriber in this process gets the names; when it is rolled back or closed, they
are dropped. Savepoints change nothing: a name whose savepoint was rolled back costs a look at an
empty queue, a name that was lost would cost a wait.

Where a session was joined to a connection's own transaction, that is the moment before the server
commits (see `commits`). A consumer that finds the queue empty then looks again soon.

Consumers of other processes are woken by a NOTIFY, which is part of the statement that enqueues
(see `sql.wakeup`) or, where messages become visible in another way, a statement of its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, Session

from . import commits, sessions
from .scope import Scope
from .sql import wakeup as statements

__all__ = [
    "NOTIFY",
    "announce",
    "channel",
    "channel_on",
    "mark_enqueued",
    "set_waiting",
    "subscribe",
    "subscribed",
]

NOTIFY = "pgqrs_notify"
"""Set this in ``session.info`` to let everything that the session enqueues send a NOTIFY too."""

_log = logging.getLogger(__name__)

_Callback: TypeAlias = Callable[[str], None]


class _Subscribers:
    """The subscribers. The tuple is replaced, never changed, so that reading needs no lock."""

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


def subscribe(callback: Callable[[str], None]) -> Callable[[], None]:
    """Call a function with the name of each queue that this process enqueues into.

    Args:
        callback: Gets the name after the commit, in the thread that has committed: it must be
            quick. What it raises is logged, and goes no further.

    Returns:
        A function that ends the subscription; calling it again does nothing.
    """

    # An object of its own for each subscription, even of the same function.
    def subscription(queue: str) -> None:
        callback(queue)

    _subscribers.add(subscription)
    return lambda: _subscribers.remove(subscription)


def subscribed() -> bool:
    """Whether this process has a subscriber."""
    return bool(_subscribers.callbacks)


def mark_enqueued(session: Session, queue: str, mapper: Mapper[Any]) -> None:
    """Mark a queue as enqueued into, and publish that when the session's transaction commits."""
    key = (mark_enqueued, queue)
    known = commits.waiting(session, key)
    if known is not None and known.joined is None:
        return
    publish = partial(_publish, queue)
    joined = commits.when_committed(session, mapper, key, publish)
    if joined is not None and _subscribers.callbacks:
        # At once: a session that is closed has undone nothing of what it did there.
        commits.when_connection_commits(joined, key, publish)


def _publish(queue: str) -> None:
    for callback in _subscribers.callbacks:
        try:
            callback(queue)
        except Exception:  # noqa: BLE001 - of any kind
            # The caller has committed: an error of a subscriber must not reach it.
            _log.exception("a subscriber failed over a message in queue %r", queue)


def set_waiting(scope: Scope, worker_id: int, span: timedelta | None) -> None:
    """Store that a worker waits to be woken for ``span`` from now; None: it no longer waits.

    Commit, and look into the queues once more before waiting: what was enqueued before that
    commit has sent no notification.
    """
    values = {"worker_id": worker_id, "span": span}
    scope.execute(statements.waiting(scope.tables), values)


def channel(scope: Scope) -> dict[str, str]:
    """Return the further parameters of a statement that notifies; empty if none is to be sent."""
    if not (scope.context.notify or scope.session.info.get(NOTIFY)):
        return {}
    connection = sessions.connect(scope.session, {"mapper": scope.context.mapper})
    return channel_on(connection, scope.tables.message)


def channel_on(connection: sa.Connection, messages: sa.Table) -> dict[str, str]:
    """Return the same for a connection on which notifications are wanted."""
    # PostgreSQL prepares no transaction that has notified. Its consumers find out by polling.
    if isinstance(connection.get_transaction(), sa.TwoPhaseTransaction):
        return {}
    return {"channel": statements.channel(connection.schema_for_object(messages))}


def announce(scope: Scope, ids: Sequence[int]) -> None:
    """Wake the consumers of messages that were made visible, in a statement of its own.

    Nothing is executed if nobody can be waiting.
    """
    to = channel(scope)
    if not ids or not (to or subscribed()):
        return
    queue, message, _, worker = scope.tables
    statement = statements.visible(queue, message, worker, notify=bool(to))
    for name in scope.execute(statement, {"ids": list(ids), **to}).scalars():
        mark_enqueued(scope.session, name, scope.context.mapper)

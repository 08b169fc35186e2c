"""Telling consumers of this process about messages that it has just committed itself.

Whatever enqueues notes the queue's name in its session. When the session's transaction has been
committed, everybody who has subscribed gets the names; when it is rolled back or closed, they are
forgotten. Savepoints change nothing: a name whose savepoint was rolled back costs a look at an
empty queue, one that was lost would cost a wait.

Where a session was joined to a connection's own transaction, that is the moment before the server
commits (see `commits`). A consumer that finds the queue empty then looks again soon.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy.orm import Mapper, Session

from .._core import commits

__all__ = ["NOTIFY", "mark_enqueued", "subscribe", "subscribed"]

NOTIFY = "pgqrs_notify"
"""Set this in ``session.info`` to let everything that the session enqueues send a NOTIFY too."""

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


def mark_enqueued(session: Session, queue: str, mapper: Mapper[Any]) -> None:
    """Remember that a session has put something into a queue, until its transaction ends."""
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
        except Exception:  # noqa: BLE001 - whatever it is
            # Whoever has committed is not to blame for it.
            _log.exception("a subscriber failed over a message in queue %r", queue)

"""The transactions of handlers' calls: a handler may not end its own, and another thread may.

A handler's transaction locks its message while it settles it, and under REPEATABLE READ and
SERIALIZABLE from its beginning. When the attempt has failed, or is given up, it cannot commit any
more; but nobody else gets the message before the server rolls back. A thread cannot be stopped,
nor a task whose event loop does not run: only the end of the connection reaches the server.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NoReturn

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from ..errors import TransactionRefused
from ..types import Delivery
from .handlers import Handler, Invocation

__all__ = ["CallTransaction", "CallTransactions", "forbid_commit", "shut_down"]

_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE")


class CallTransaction:
    """The transaction of one call: its connection as long as the call has it, and no longer."""

    def __init__(self) -> None:
        # The collector of garbage may return a connection whose event loop is gone, in any thread.
        self._lock = threading.RLock()
        self._driver: Any = None
        self._entry: Any = None  # of the pool
        self._ended = False
        self._locks_messages = False

    def use(self, connection: Connection) -> None:
        """Note the connection, until it goes back to the pool."""
        fairy: Any = connection.connection
        entry = fairy._connection_record  # noqa: SLF001 - None when it is detached from the pool
        if entry is None:
            return
        # As the dialects do that reset an isolation level. Not for a connection that breaks: it
        # is closed, and has no socket any more.
        entry.finalize_callback.append(self._returned)
        self._driver, self._entry = fairy.driver_connection, entry

    def _returned(self, _connection: Any) -> None:
        with self._lock:
            self._driver = None
            if self._ended:  # after its COMMIT: the pool must not give a dead connection away
                self._entry.invalidate(soft=True)

    def locks_messages(self) -> None:
        """Note that the messages are locked from now on, until the transaction ends."""
        self._locks_messages = True

    def end(self) -> None:
        """End the connection if it keeps messages locked. From another thread; never waits."""
        with self._lock:
            if self._locks_messages and self._driver is not None:
                self._ended = True
                shut_down(self._driver)


class CallTransactions:
    """The transactions of the calls that run, by the fencing tokens of their messages."""

    def __init__(self) -> None:
        self._by_token: dict[int, CallTransaction] = {}
        self._keep_snapshots: bool | None = None

    def keep_snapshots(self, connection: Connection) -> bool:
        """Return whether their transactions cannot archive what was renewed since they began.

        The first connection says it for all: that takes a round trip.
        """
        if self._keep_snapshots is None:
            level = str(connection.get_isolation_level()).upper()
            self._keep_snapshots = level in _SNAPSHOTS
        return self._keep_snapshots

    @contextmanager
    def transaction(self, invocation: Invocation) -> Iterator[CallTransaction]:
        """Give a call its entry, until its session is closed."""
        transaction = CallTransaction()
        tokens = [delivery.fencing_token for delivery in invocation.deliveries]
        self._by_token.update(dict.fromkeys(tokens, transaction))
        try:
            yield transaction
        finally:
            for token in tokens:
                self._by_token.pop(token, None)

    def end(self, delivery: Delivery) -> None:
        """End the connection of a message's call, if that runs and keeps the message locked."""
        if (transaction := self._by_token.get(delivery.fencing_token)) is not None:
            transaction.end()


def shut_down(driver: Any) -> None:
    """Shut down the socket of a driver's connection, even during a call; from any thread."""
    with contextlib.suppress(Exception):  # it is closed already
        descriptor = os.dup(_descriptor(driver))
        with socket.socket(fileno=descriptor) as wire:
            # Still open: so it was not closed before the copy, and its number not used again.
            _descriptor(driver)
            wire.shutdown(socket.SHUT_RDWR)


def _descriptor(driver: Any) -> int:
    """Return the file descriptor of a connection's socket, or raise if it is closed."""
    if hasattr(driver, "fileno"):  # psycopg's, both kinds
        return int(driver.fileno())
    descriptor = int(driver._transport.get_extra_info("socket").fileno())  # noqa: SLF001 - asyncpg
    if descriptor < 0:
        raise OSError("the connection is closed")
    return descriptor


@contextmanager
def forbid_commit(session: Session, handler: Handler) -> Iterator[None]:
    """Refuse the commit, rollback and close of a session while its handler is called.

    A commit would keep what the handler wrote although the message is not settled, and the next
    attempt would write it again. It is refused before it happens. A handler with
    ``acknowledge="first"`` or ``"manual"`` may do so: no end of a message commits with its writes.

    Args:
        session: The handler's; of an ``AsyncSession`` its ``sync_session``.
        handler: Which.
    """
    if handler.acknowledge != "commit":
        yield
        return
    # In place of the methods of this object: listeners of events cost several times as much for
    # each message, and there is none before a rollback.
    refusals = _refusals(handler.name)
    vars(session).update(refusals)
    try:
        yield
    finally:
        for name in refusals:
            vars(session).pop(name, None)


@cache
def _refusals(handler: str) -> dict[str, Callable[[], NoReturn]]:
    return {name: partial(_refuse, name, handler) for name in ("commit", "rollback", "close")}


def _refuse(method: str, handler: str) -> NoReturn:
    raise TransactionRefused(method, handler)

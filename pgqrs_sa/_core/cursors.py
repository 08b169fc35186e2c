"""The dequeue cursors of this process, by pool, tables, queue and `cursor_key`.

A cursor moves only when the outermost transaction of a lease commits: an uncommitted lease may be
rolled back, which would leave its message before the cursor.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.sql import Executable

from . import commits, sessions
from .cursor import CursorSnapshot, DequeueCursor
from .scope import Scope

__all__ = ["CursorUse", "reset"]

_MOST = 1_000
"""The number of cursors kept for a pool, the most recently used."""


class _CursorRegistry:
    """The cursors of each pool. It holds only weak references to the pools."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._by_pool: WeakKeyDictionary[sa.Pool, OrderedDict[Hashable, DequeueCursor]] = (
            WeakKeyDictionary()
        )

    clear = reset

    def get(self, pool: sa.Pool, key: Hashable) -> DequeueCursor | None:
        with self._lock:
            cursors = self._by_pool.get(pool)
            if cursors is None or key not in cursors:
                return None
            cursors.move_to_end(key)
            return cursors[key]

    def made(self, pool: sa.Pool, key: Hashable) -> DequeueCursor:
        """Return the cursor for a key; create it if it does not exist."""
        with self._lock:
            cursors = self._by_pool.setdefault(pool, OrderedDict())
            cursor = cursors.setdefault(key, DequeueCursor())
            if len(cursors) > _MOST:
                cursors.popitem(last=False)
            return cursor


_cursors = _CursorRegistry()
if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_cursors.reset)


def reset() -> None:
    """Make every dequeue begin at the beginning, for example after messages were moved back."""
    _cursors.reset()


class CursorUse:
    """The use of a cursor by one dequeue: where it begins, and what it found.

    The connection is taken from the pool first, so that the measured time excludes that wait.

    Args:
        scope: The session, and the settings of the service.
        statement: The statement to execute.
        values: Its parameters, except `binds`.
    """

    def __init__(self, scope: Scope, statement: Executable, values: Mapping[str, Any]) -> None:
        settings = scope.context
        tables = settings.tables
        connection, _ = sessions.flush_and_connect(
            scope.session, settings.mapper, statement, values
        )
        schemas = [connection.schema_for_object(table) for table in tables[:2]]
        self._scope = scope
        self._limit = values["limit"]
        self._pool = connection.engine.pool
        self._key = (tables, values["queue"], settings.cursor_key, *schemas)
        self._cursor = _cursors.get(self._pool, self._key)
        self._start: CursorSnapshot | None = (
            None if self._cursor is None else self._cursor.snapshot()
        )
        self._began_at = 0.0

    def binds(self) -> dict[str, Any]:
        """Return the parameters that say where to begin, and start the clock."""
        self._began_at = time.monotonic()
        start = self._start
        return {"cursor": None if start is None else start.as_json()}

    def record(self, rows: Sequence[Any]) -> bool:
        """Record what was leased; it applies when the transaction commits.

        Args:
            rows: The leased rows, in the order of the queue.

        Returns:
            False when messages may exist before the start: lease again, from the beginning.
        """
        seconds = time.monotonic() - self._began_at
        start, self._start = self._start, None
        if not rows:
            if start is None and self._cursor is not None:
                self._cursor.reset()
            return start is None
        table = rows[0].cursor_table
        if self._may_remember(table):
            cursor = self._cursor or _cursors.made(self._pool, self._key)
            full = len(rows) == self._limit
            moves = cursor.record(table, rows, start, full=full, seconds=seconds)
            earlier = commits.waiting(self._scope.session, cursor)
            if earlier is not None:
                moves = moves.after(earlier.call.args[0])
            call = partial(cursor.apply, moves)
            commits.when_committed(
                self._scope.session, self._scope.context.mapper, cursor, call, strict=True
            )
        return True

    def _may_remember(self, table: str) -> bool:
        """Return whether sessions with the same key see the same rows: see `sql.lease`.

        ``table`` is ``f`` or, with row-level security, ``t``, followed by the table's number. It is
        something else in a transaction that keeps one snapshot.
        """
        keyed = self._scope.context.cursor_key is not None
        return len(table) > 1 and (table[0] == "f" or (table[0] == "t" and keyed))

"""The dequeue cursor, a low-water mark: where a dequeue begins to read. Pure: no I/O.

A leased or settled message leaves a dead index entry before the live ones, and vacuum cannot
remove it while any transaction in the database stays open. A dequeue from the beginning reads
through all dead entries, which slows down every queue of the table. So each process remembers, for
each level of priority, the position of the last message that it leased, and continues there. A
level without a remembered position is read from its beginning, so that a more urgent level is seen
immediately.

A message before its level's position is not seen: one whose transaction committed late, or whose
lease was rolled back. So each level is read from its beginning regularly (a full scan): one second
after the last full scan, or 20 times its duration if that is longer, but at most 5 seconds after it
began. When a dequeue finds nothing, all levels are scanned. A full scan of more than 4 seconds is
followed by one second without any.

A full scan sets the time of the next one, and may move the position back, immediately. A position
moves forward only when a lease is committed.

The cursor is a hint within one process: it is never stored, and never decides who gets a message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

__all__ = ["CursorSnapshot", "CursorUpdate", "DequeueCursor", "Key", "Position", "interval"]

_SHORTEST, _LONGEST = 1.0, 5.0  # seconds between two full scans of a level
_SHARE = 20.0
"""The pause before the next full scan, as a multiple of the last one's duration."""

_MOST_LEVELS = 32
"""The number of levels remembered, the most recently leased."""


class Key(Protocol):
    """The position of a message in the queue."""

    @property
    def priority(self) -> int:
        """Lower goes first."""
        ...

    @property
    def vt(self) -> datetime:
        """When it became visible."""
        ...

    @property
    def id(self) -> int:
        """Its id."""
        ...


class Position(NamedTuple):
    """The last message of a level that was leased.

    Attributes:
        vt: Its ``vt`` before the lease.
        id: Its id.
        reading: The number of the full scan that it is based on.
        due_at: When the next full scan is due, by the cursor's clock.
    """

    vt: datetime
    id: int
    reading: int
    due_at: float


class CursorSnapshot(NamedTuple):
    """Where a dequeue begins: after these positions, and in other levels at the beginning.

    Attributes:
        table: The ``cursor_table`` that the server returned.
        places: By priority.
    """

    table: str
    positions: Mapping[int, Position]

    def as_json(self) -> str:
        """Return it as JSON, the form of the statement's parameter."""
        rows = (
            f'{{"level":{level},"vt":"{place.vt}","id":{place.id}}}'
            for level, place in self.positions.items()
        )
        return f'{{"{self.table}":[{",".join(rows)}]}}'


class CursorUpdate(NamedTuple):
    """The positions that apply once a lease is committed."""

    table: str
    positions: Mapping[int, Position]

    def after(self, earlier: CursorUpdate | None) -> CursorUpdate:
        """Return these positions merged with those of an earlier dequeue of the transaction."""
        if earlier is None or earlier.table != self.table:
            return self
        return CursorUpdate(self.table, {**earlier.positions, **self.positions})


def interval(took: float) -> float:
    """Return after how many seconds the next full scan is due.

    Args:
        took: The seconds that the last one took.
    """
    return min(max(_SHORTEST, _SHARE * took), max(_SHORTEST, _LONGEST - took))


class DequeueCursor:
    """The positions of a queue in this process. Safe for threads.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._table = ""
        self._positions: dict[int, Position] = {}
        self._readings = 0

    def snapshot(self) -> CursorSnapshot | None:
        """Return where to begin, or None to begin every level at its beginning."""
        now = self._clock()
        with self._lock:
            known = {
                level: position
                for level, position in self._positions.items()
                if now < position.due_at
            }
            return CursorSnapshot(self._table, known) if known else None

    def record(
        self,
        table: str,
        rows: Sequence[Key],
        start: CursorSnapshot | None,
        *,
        full: bool,
        seconds: float,
    ) -> CursorUpdate:
        """Record what a dequeue has leased; return the update to apply once it is committed.

        Args:
            table: The ``cursor_table`` of the rows.
            rows: The leased rows, in the order of the queue; not empty.
            start: Where it was asked to begin. In another table it began at the beginning.
            full: Whether it reached its limit, and so read no further.
            seconds: The duration of the statement.
        """
        known = start.positions if start is not None and start.table == table else {}
        first = {row.priority: row for row in reversed(rows)}
        last = {row.priority: row for row in rows}
        due_at = self._clock() + interval(seconds)
        with self._lock:
            if table != self._table:
                self._table, self._positions = table, {}
            self._readings += 1
            for level, place in self._positions.items():
                if level not in known and not (full and level > rows[-1].priority):
                    self._positions[level] = self._read(place, first.get(level), due_at)
            readings = {level: known[level].reading for level in last if level in known}
            dues = {level: known[level].due_at for level in readings}
            places = {
                level: Position(
                    row.vt,
                    row.id,
                    readings.get(level, self._readings),
                    dues.get(level, due_at),
                )
                for level, row in last.items()
            }
        return CursorUpdate(table, places)

    def _read(self, place: Position, first: Key | None, due_at: float) -> Position:
        """Return the position after a full scan of its level, whether or not the lease commits."""
        vt, id_ = place[:2]
        if first is not None:
            # More messages may follow the one found before the position.
            vt, id_ = min((vt, id_), (first.vt, first.id - 1))
        return Position(vt, id_, self._readings, due_at)

    def apply(self, moves: CursorUpdate) -> None:
        """Apply the update of a committed lease."""
        with self._lock:
            if moves.table != self._table:
                return
            for level, place in moves.positions.items():
                present = self._positions.get(level)
                if present is not None:
                    if present.reading > place.reading:
                        continue  # a newer full scan may have moved the position back
                    if present.reading == place.reading:
                        place = max(present, place)  # noqa: PLW2901
                    del self._positions[level]  # the most recent comes last
                self._positions[level] = place
            for level in list(self._positions)[:-_MOST_LEVELS]:
                del self._positions[level]

    def reset(self) -> None:
        """Forget all positions: a dequeue from the beginning has found nothing."""
        with self._lock:
            self._positions = {}

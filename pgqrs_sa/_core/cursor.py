"""The dequeue cursor, a low-water mark: where a dequeue begins to read. Pure: no I/O.

A message that was leased or settled leaves a dead entry in front of the live ones, in the order
of the index, and a transaction that stays open anywhere in the database keeps vacuum from taking
it away. A dequeue from the beginning reads through all of them: every queue in a table slows down
with that. So each process remembers, at each level of priority, the place of the last message that
it leased, and goes on from there. A level of which it remembers nothing is read from its
beginning, so that a more urgent one is seen at once.

A message that comes to lie before its level's place is not seen from there: one whose transaction
committed late, or whose lease was rolled back. So each level is read from its beginning now and
then: a second after the last time, or 20 times as long as that took, but 5 seconds after it began
at the latest; and all of them at once when a dequeue has found nothing. A reading that takes more
than 4 seconds is followed by one second without.

When the next one is due is known as soon as one has been read, and so is a place that lies before
the one that is remembered. A place moves forward when a lease is committed.

It is a hint in one process: what it says is never stored, and never decides who gets a message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

__all__ = ["CursorSnapshot", "CursorUpdate", "DequeueCursor", "Key", "Position", "interval"]

_SHORTEST, _LONGEST = 1.0, 5.0  # seconds between two readings of a level from its beginning
_SHARE = 20.0
"""How many times as long as a reading took passes before the next, within these bounds."""

_MOST_LEVELS = 32
"""Levels remembered, those of the latest leases; the others are read from their beginning."""


class Key(Protocol):
    """The position of a message in the queue before it was leased."""

    @property
    def priority(self) -> int:
        """Lower goes first."""
        ...

    @property
    def was_visible_at(self) -> datetime:
        """Its ``vt``."""
        ...

    @property
    def id(self) -> int:
        """Its id."""
        ...


class Position(NamedTuple):
    """The last message of a level that was leased.

    Attributes:
        vt: Its time.
        id: Its id.
        reading: The number of the reading from the beginning that it goes back to.
        due_at: When the next one is due.
    """

    vt: datetime
    id: int
    reading: int
    due_at: float


class CursorSnapshot(NamedTuple):
    """Where a dequeue begins: after these positions, and in other levels at the beginning.

    Attributes:
        table: What the server calls ``cursor_table``.
        places: By priority.
    """

    table: str
    positions: Mapping[int, Position]

    def as_json(self) -> str:
        """Return it as the statement takes it."""
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
    """Return how many seconds after a reading from the beginning the next one is due.

    Args:
        took: How many seconds it took.
    """
    return min(max(_SHORTEST, _SHARE * took), max(_SHORTEST, _LONGEST - took))


class DequeueCursor:
    """The positions of a queue in this process. Safe for threads.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._table = ""
        self._positions: dict[int, Position] = {}
        self._readings = 0

    def snapshot(self) -> CursorSnapshot | None:
        """Return where to begin, or None for the beginning of every level."""
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
            table: Where it found it: ``cursor_table``.
            rows: What it leased, in the order of the queue; not empty.
            start: Where it was to begin. In another table it began at the beginning.
            full: Whether it took as many as it was allowed to, and so read no further.
            seconds: How long the statement took.
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
                    row.was_visible_at,
                    row.id,
                    readings.get(level, self._readings),
                    dues.get(level, due_at),
                )
                for level, row in last.items()
            }
        return CursorUpdate(table, places)

    def _read(self, place: Position, first: Key | None, due_at: float) -> Position:
        """Return a position after a full scan of its level, whether or not that is committed."""
        vt, id_ = place[:2]
        if first is not None:
            # There may be more behind what was found before the place.
            vt, id_ = min((vt, id_), (first.was_visible_at, first.id - 1))
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
                        continue  # the level was read again meanwhile, and may have come down
                    if present.reading == place.reading:
                        place = max(present, place)  # noqa: PLW2901
                    del self._positions[level]  # the latest comes last
                self._positions[level] = place
            for level in list(self._positions)[:-_MOST_LEVELS]:
                del self._positions[level]

    def reset(self) -> None:
        """Forget all positions: a dequeue from the beginning has found nothing."""
        with self._lock:
            self._positions = {}

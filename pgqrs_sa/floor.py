"""Where a dequeue begins, so that it does not read again what is done. Pure: no I/O.

A message that was leased or settled leaves a dead entry in front of the live ones, in the order
of the index, and a transaction that stays open anywhere in the database keeps vacuum from taking
it away. A dequeue from the beginning reads through all of them: every queue in a table slows down
with that. So each process remembers where it was (the key of the last message that it leased, at
each level of priority), and goes on from there.

A message that comes to lie before that is not seen from there: one whose transaction began early
and committed late, one whose lease was rolled back, or one of a new priority. For these a dequeue
sweeps from the beginning now and then: at once when there was nothing behind the floor, and else
after `Floor.interval` (more, when the sweep itself took long: at most a twentieth of the time goes
to sweeps). That bounds how long such a message can be passed over while others flow; released
messages, expired leases and scheduled ones all become visible behind the floor.

It is a hint in one process: what it says is never stored, and never decides who gets a message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple, Protocol

__all__ = ["Floor", "Key", "Start"]

_MOST_LEVELS = 16
"""Levels remembered, the most urgent first; messages of others are found by the sweep."""


class Key(Protocol):
    """The place in the queue that a message had before it was leased."""

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


class Start(NamedTuple):
    """Where to begin, at each level: three lists of the same length."""

    levels: list[int]
    vts: list[datetime]
    ids: list[int]


class Floor:
    """The floor of one queue, in one process. Safe for threads: values are replaced as a whole.

    Args:
        interval: Seconds between two sweeps, at the least.
        share: How many times as long as the last sweep took must pass before the next.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        interval: float = 1.0,
        share: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = interval
        self._share = share
        self._clock = clock
        self._keys: dict[int, tuple[datetime, int]] = {}
        self._sweep_at = 0.0

    def start(self) -> Start | None:
        """Return where to begin, or None when it is time to sweep from the beginning."""
        keys = self._keys
        if not keys or self._clock() >= self._sweep_at:
            return None
        levels = sorted(keys)
        return Start(levels, [keys[one][0] for one in levels], [keys[one][1] for one in levels])

    def leased(self, rows: Iterable[Key]) -> None:
        """Note what a dequeue took that began at the floor, in the order of the queue."""
        self._keys = self._kept(self._last(rows))

    def swept(self, rows: Iterable[Key], began_at: float, *, full: bool) -> None:
        """Note what a dequeue took that began at the beginning.

        A level's floor may come down with it: there may be more behind what was found. The levels
        that a full sweep has not come to are forgotten, since a new one may lie before them: as
        soon as there is nothing in those that it has come to, the next sweep goes on to them.

        Args:
            rows: What was leased, in the order of the queue.
            began_at: The clock before the statement was sent.
            full: Whether it took as many as it was allowed to.
        """
        last = self._last(rows)
        if full:
            self._keys = {one: key for one, key in self._keys.items() if one <= max(last)}
        self._keys = self._kept(last)
        now = self._clock()
        # An empty queue is always asked from the beginning: there is nothing to go on from.
        wait = max(self._interval, self._share * (now - began_at)) if last else 0.0
        self._sweep_at = now + wait

    @staticmethod
    def _last(rows: Iterable[Key]) -> dict[int, tuple[datetime, int]]:
        last = {row.priority: row for row in rows}
        return {one: (row.was_visible_at, row.id) for one, row in last.items()}

    def _kept(self, last: dict[int, tuple[datetime, int]]) -> dict[int, tuple[datetime, int]]:
        keys = {**self._keys, **last}
        return {one: keys[one] for one in sorted(keys)[:_MOST_LEVELS]}

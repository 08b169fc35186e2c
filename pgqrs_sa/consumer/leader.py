"""Who works at the desk: one thread at a time, and no other is woken without need.

The desk has a thread of its own, but a handler's thread that has nothing to do takes the seat
itself, and goes on with what it has leased there: to wake another one, and be woken by it, takes
as long as the statement does. (Leaders and followers: Schmidt and others, Pattern-Oriented
Software Architecture 2, 2000.) The desk's own thread does what is left: what comes while all
handlers are busy, and the waiting when there is nothing to do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from .handlers import Unit

__all__ = ["LINGER", "Seat"]

LINGER = 0.005
"""Seconds for which what is done waits for the next lease, to share its commit."""

_PATIENCE = 0.1  # seconds after which a thread that waits for the seat looks around again


class Seat:
    """One thread at a time does rounds; the others leave notes for the next.

    Args:
        round: Does one thing, if there is one, beginning with `read`; returns for how many seconds
            there is nothing to do then, or 0.0 to be called again.
        rest: Returns for how many seconds there is nothing to do, and does nothing.
        broken: Hears of an error of a round, which is the last one.
        wake: Has a thread of a handler that has nothing to do come for `help`; False if none can.
        leaving: Set when no thread of a handler is to wait for the seat any more.
    """

    def __init__(
        self,
        round: Callable[[], float],
        rest: Callable[[], float],
        broken: Callable[[BaseException], None],
        wake: Callable[[], bool],
        leaving: threading.Event,
    ) -> None:
        self._round = round
        self._rest = rest
        self._broken = broken
        self._wake = wake
        self._leaving = leaving
        self._taken = threading.Lock()
        self._notes: deque[Callable[[], None]] = deque()
        self._since = 0.0  # when the first of the notes was left
        self._news = threading.Event()  # there is a note
        self._alarm = threading.Event()  # and nobody comes for it but the desk's own thread
        self._asleep_until = 0.0
        self._over = False

    def __len__(self) -> int:
        return len(self._notes)

    # ------------------------------------------------------------------- from any thread

    def leave(self, note: Callable[[], None], *, quietly: bool = False) -> None:
        """Have something done by whoever does the next round.

        Args:
            note: What; it must be quick.
            quietly: Wake nobody, since the caller goes on to `help`.
        """
        if not self._notes:
            self._since = time.monotonic()
        self._notes.append(note)
        if not quietly:
            self.alarm()

    def call(self, note: Callable[[], None]) -> None:
        """Have something done at once, by a thread that can then go on with what it has leased."""
        self.leave(note, quietly=True)
        if not self._wake():
            self.alarm()

    def alarm(self) -> None:
        """Have the desk's own thread do a round at once."""
        if not self._alarm.is_set():  # else it has yet to be cleared, before the notes are read
            self._alarm.set()
            self._news.set()

    def help(self, look: Callable[[], Unit | None]) -> Unit | None:
        """Return what a handler's thread may start, after a round of its own if need be.

        Args:
            look: Returns what may be started, if there is something; without delay.
        """
        unit = look() or self._sit_down(look)
        # What is left here comes next when the thread is back: see to it if that takes long.
        if self._notes and not self._news.is_set():
            self._news.set()
        return unit

    def _sit_down(self, look: Callable[[], Unit | None]) -> Unit | None:
        while not self._taken.acquire(timeout=_PATIENCE):
            # Whoever has the seat may wait for a database, and may have leased before it does.
            if (unit := look()) is not None or self._leaving.is_set():
                return unit
        try:
            if self._over:
                return None
            if (unit := look()) is not None:
                return unit
            rest = self._tried() or self._rest()
            if self._over or time.monotonic() + rest < self._asleep_until:
                self.alarm()
        finally:
            self._taken.release()
        return look()

    # ------------------------------------------------------------ from the desk's own thread

    def occupy(self) -> None:
        """Do rounds until it is over: those that no thread of a handler comes for."""
        while True:
            with self._taken:
                if self._over:
                    return
                # Here alone: an alarm is for this thread, whoever comes before it to the seat.
                self._alarm.clear()
                rest = self._tried()
                self._asleep_until = time.monotonic() + rest
            if not self._over:
                self._sleep()

    def _sleep(self) -> None:
        """Wait until there is something to do that no handler's thread comes for.

        Those that are quick come back soon, and lease then as well: to be in their way, for the
        interpreter or the seat, would cost more than it helps (measured: up to half of the rate).
        """
        while True:
            self._news.clear()  # before the looks: what comes after them sets it again
            now = time.monotonic()
            if self._alarm.is_set() or now >= self._asleep_until:
                return
            if not self._notes:
                self._news.wait(self._asleep_until - now)
            elif (spare := self._since + LINGER - now) > 0:
                self._alarm.wait(spare)
            else:
                return

    # ------------------------------------------------------------------------ in a round

    def read(self) -> None:
        """Do what the notes say."""
        while self._notes:
            self._notes.popleft()()

    def end(self) -> None:
        """Let this round be the last."""
        self._over = True

    def _tried(self) -> float:
        try:
            return self._round()
        except BaseException as error:  # noqa: BLE001 - it is kept
            self._over = True
            self._broken(error)
            return 0.0

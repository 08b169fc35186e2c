"""What to lease, and when. Pure: time comes in, decisions go out.

`Scheduler` says from which queue how many messages may be leased now, which queues that had nothing
are to be looked at, or how long to rest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .handlers import Handler

__all__ = ["CheckQueues", "Fetch", "Scheduler", "Wait"]

_SOON = 0.02
"""Seconds after which an empty queue is asked again first; it doubles up to the poll interval."""


_QUICK = 0.1
"""Seconds: handlers are quick if they have worked off what was leased last in less than this."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Lease up to ``limit`` messages of this handler's queue now."""

    handler: Handler
    limit: int


@dataclass(frozen=True, slots=True)
class CheckQueues:
    """Find out which of these queues have something now: they had nothing the last time."""

    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Lease nothing for ``seconds``, unless something happens."""

    seconds: float


@dataclass(slots=True)
class _QueueState:
    handler: Handler
    in_hand: int = 0
    due: float = 0.0
    wait: float = _SOON
    credit: float = 0.0
    empty: bool = False
    idle: bool = True
    idle_since: float | None = None
    full_at: float = -math.inf  # when a lease last brought all that was asked for
    quick: bool = False

    def found_nothing(self, now: float, move: float, longest: float) -> None:
        """Note that it had nothing, and ask it again later than the last time."""
        self.idle = self.empty = True
        if self.idle_since is None:
            self.idle_since = now
        self.due = now + min(self.wait, longest) * move
        self.wait = min(self.wait * 2, longest)

    @property
    def calls(self) -> int:
        """How many calls its messages make, at most as many as may run."""
        return min(math.ceil(self.in_hand / self.handler.batch), self.handler.concurrency)

    def store(self, slots: int) -> int:
        """How many messages it may have in hand."""
        return min(self.handler.concurrency, slots) * self.handler.batch + self.handler.prefetch

    @property
    def least(self) -> int:
        """How many messages are worth a lease: with a store ahead, half of that."""
        return max(1, (self.handler.prefetch + 1) // 2)

    def room_ahead(self, slots: int, now: float) -> int:
        """How many more messages to lease while its handlers work: up to a second store."""
        if not (self.quick and self.handler.prefetch and self.due <= now and self.in_hand):
            return 0
        if self.handler.acknowledge == "first":  # a crash loses all that was leased
            return 0
        store = self.store(slots)
        room = min(store, 2 * store - self.in_hand)
        return room if room >= self.least else 0

    def room(self, slots: int) -> int:
        """Return how many more messages it may lease, if the others leave it this many calls."""
        calls = min(self.handler.concurrency, slots)
        return max(0, calls * self.handler.batch + self.handler.prefetch - self.in_hand)


@dataclass(slots=True)
class Scheduler:
    """Which queue is asked next: weighted, polled with jitter, never beyond what may run.

    A queue that had nothing is idle, and is looked at together with all others that are: one
    statement for any number of them. Those that have something are then leased from in their turn.

    Attributes:
        slots: How many calls may run at the same time, over all queues.
        poll_interval: The longest wait between two looks at an idle queue, in seconds.
        jitter: Draws from 0 to 1; each wait is moved by up to a fifth of itself, so that many
            consumers do not ask at the same moment.
    """

    slots: int
    poll_interval: float
    jitter: Callable[[], float] = random.random
    _queues: dict[str, _QueueState] = field(default_factory=dict)

    def add_handlers(self, handlers: Iterable[Handler]) -> None:
        """Ask for the messages of these handlers."""
        self._queues = {handler.queue: _QueueState(handler) for handler in handlers}

    def next(self, now: float) -> Fetch | CheckQueues | Wait:
        """Return what to do now."""
        rooms = self._open()
        due = [state for state, _ in rooms if state.due <= now]
        if any(state.idle for state in due):
            return CheckQueues(tuple(state.handler.queue for state, _ in rooms if state.idle))
        if not due:
            return Wait(self._idle_time(rooms, now))
        chosen = self._fairest(due)
        return Fetch(chosen.handler, next(room for state, room in rooms if state is chosen))

    def idle_time(self, now: float) -> float:
        """Return for how many seconds there is nothing to lease, unless something happens."""
        return self._idle_time(self._open(), now)

    def _idle_time(self, rooms: Sequence[tuple[_QueueState, int]], now: float) -> float:
        return max(0.0, min((state.due - now for state, _ in rooms), default=self.poll_interval))

    def _open(self) -> list[tuple[_QueueState, int]]:
        """Return the sources that may have more messages, and how many."""
        calls = sum(state.calls for state in self._queues.values())
        stores = sum(state.handler.prefetch > 0 for state in self._queues.values())
        found = []
        for state in self._queues.values():
            # One that has a store ahead always has enough for all calls: the others may then have
            # one that waits for its turn, or they would never get any.
            least = 1 if stores > (state.handler.prefetch > 0) else 0
            room = state.room(max(least, self.slots - (calls - state.calls)))
            if room >= state.least:
                found.append((state, room))
        return found

    def ahead(self, now: float) -> Fetch | None:
        """Return what to lease while the handlers work on what they have, if anything.

        That is a store more than `next` allows, from a queue that always has messages, and only
        while its handlers are quick. Others keep no message from other consumers for longer.
        """
        able = [state for state in self._queues.values() if state.room_ahead(self.slots, now)]
        if not able:
            return None
        chosen = self._fairest(able)
        return Fetch(chosen.handler, chosen.room_ahead(self.slots, now))

    def finishes_until_lease(self) -> int:
        """Return how many messages are to be finished before more may be leased, at least 1."""
        counts = []
        for state in self._queues.values():
            store = state.store(self.slots)
            counts.append(state.in_hand + state.least - (2 * store if state.quick else store))
        return max(1, min(counts, default=1))

    @staticmethod
    def _fairest(due: list[_QueueState]) -> _QueueState:
        """Smooth weighted round robin: each gets its share, and none waits for long."""
        for state in due:
            state.credit += state.handler.weight
        chosen = max(due, key=lambda state: state.credit)
        chosen.credit -= sum(state.handler.weight for state in due)
        return chosen

    def record_fetch(self, queue: str, asked: int, got: int, now: float) -> None:
        """Note what a lease brought."""
        source = self._queues[queue]
        source.in_hand += got
        source.quick = got == asked and now - source.full_at < _QUICK
        source.full_at = now if got == asked else -math.inf
        if not got:
            source.found_nothing(now, self._move(), self.poll_interval)
            return
        for state in self._queues.values():
            state.empty = False  # a handler may enqueue for any of them
        source.idle = False
        source.idle_since = None
        source.wait = _SOON
        source.due = now if got == asked else now + self._soon()

    def record_check(self, queues: Iterable[str], ready: Collection[str], now: float) -> None:
        """Note which of the queues that were looked at have something.

        The others are due again together, so that the next look is one as well.
        """
        move = self._move()
        for source in filter(None, map(self._queues.get, queues)):
            if source.handler.queue in ready:
                source.idle = source.empty = False
                source.due = 0.0
            else:
                source.found_nothing(now, move, self.poll_interval)

    def finished(self, queue: str, count: int) -> None:
        """Record that a call with ``count`` messages has ended."""
        if (source := self._queues.get(queue)) is not None:
            source.in_hand -= count

    def wake(self, queue: str | None) -> None:
        """Ask a queue (or all of them) again at once: there may be something.

        A queue that is named is leased from without a look.
        """
        for state in self._queues.values():
            if queue in (None, state.handler.queue):
                state.due = 0.0
                state.wait = _SOON
                state.empty = False
                state.idle = state.idle and queue is None

    def check_again(self, now: float) -> None:
        """Ask all queues again soon: there is something that could not be taken."""
        due = now + self._soon()
        for state in self._queues.values():
            state.due = due
            state.empty = False

    def remove(self, queue: str) -> None:
        """Ask a queue no more."""
        self._queues.pop(queue, None)

    def idle_for(self, now: float) -> float:
        """For how many seconds no queue has had anything."""
        since = [state.idle_since for state in self._queues.values()]
        known = [moment for moment in since if moment is not None]
        return now - max(known) if known and len(known) == len(since) else 0.0

    @property
    def queues(self) -> list[str]:
        """The queues that are asked."""
        return list(self._queues)

    @property
    def drained(self) -> bool:
        """True when every queue was empty the last time, and nothing is in hand."""
        return all(state.empty and state.in_hand == 0 for state in self._queues.values())

    @property
    def in_hand(self) -> int:
        """How many messages are leased and not worked off."""
        return sum(state.in_hand for state in self._queues.values())

    def _soon(self) -> float:
        return min(_SOON, self.poll_interval) * self._move()

    def _move(self) -> float:
        return 0.8 + 0.4 * self.jitter()

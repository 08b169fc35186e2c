"""The leases that a consumer holds: when each is to be renewed, and which are lost.

Times are of this machine's monotonic clock, and only say when to ask the database; whether a
lease is held, the database decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from ..types import Delivery
from .handlers import Handler

__all__ = ["Lease", "LeaseTable"]

_RENEW_AT = 3  # a lease is renewed when a third of it is over: two renewals may fail


@dataclass(slots=True, eq=False)
class Lease:
    """A lease, as this process knows it."""

    delivery: Delivery
    handler: Handler
    length: float
    renew_at: float
    expires_at: float
    start_by: float
    started_at: float | None = None
    thread: int | None = None
    lost: bool = False
    settling: bool = False
    timed_out: bool = False
    clock: Callable[[], float] = time.monotonic

    @property
    def abandoned(self) -> bool:
        """True when its attempt has failed, or its lease was given back or lost, in its call."""
        return self.lost or self.timed_out

    def is_lost(self) -> bool:
        """True when it is known to be gone, or must have run out unrenewed."""
        return self.lost or self.clock() > self.expires_at

    def is_unstarted(self, now: float) -> bool:
        """True when no handler has begun with it within its length: it is kept no longer."""
        return self.started_at is None and not self.settling and now >= self.start_by

    def overdue(self, now: float) -> bool:
        """True when its handler has taken longer than it may."""
        limit = self.handler.timeout
        if limit is None or self.started_at is None or self.settling:
            return False
        return now - self.started_at > limit.total_seconds()


class LeaseTable:
    """All leases of a consumer, by message. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._handed_over: dict[int, float] = {}
        self._lock = threading.Lock()

    def add(
        self, handler: Handler, leased: Iterable[Delivery], lease: timedelta, asked_at: float
    ) -> list[Delivery]:
        """Note new leases; return the deliveries, which ask this table whether they are lost.

        Args:
            handler: Whose they are.
            leased: What the lease returned.
            lease: How long it lasts.
            asked_at: The clock before the statement was sent: no lease began earlier.
        """
        span = lease.total_seconds()
        watched = []
        with self._lock:
            for delivery in leased:
                end = asked_at + span
                held = Lease(delivery, handler, span, asked_at + span / _RENEW_AT, end, end)
                held.clock = self._clock
                # Nobody else has it yet; a copy would take as long as all the rest of this.
                object.__setattr__(delivery, "watch", held.is_lost)
                self._leases[delivery.id] = held
                watched.append(delivery)
        return watched

    def replaced(self, leased: Iterable[Delivery]) -> list[Lease]:
        """Return the leases that cannot be held any more, since these were taken after them."""
        before = [self._leases.get(delivery.id) for delivery in leased]
        return [lease for lease in before if lease is not None]

    def get(self, delivery: Delivery) -> Lease | None:
        """Return the lease of a delivery, unless it is settled, or is another attempt's."""
        held = self._leases.get(delivery.id)
        if held is None or held.delivery.fencing_token != delivery.fencing_token:
            return None
        return held

    def mark_started(self, deliveries: Iterable[Delivery], thread: int | None) -> bool:
        """Note that a handler begins; False when a lease is lost, and it must not."""
        begun: list[Lease] = []
        for delivery in deliveries:
            if (held := self.get(delivery)) is None or held.is_lost():
                return False
            begun.append(held)
        now = self._clock()
        for held in begun:
            held.started_at, held.thread = now, thread
        return True

    def mark_settling(self, deliveries: Iterable[Delivery]) -> None:
        """Note that the handler has returned: its timeout does not count any more."""
        for delivery in deliveries:
            if (held := self.get(delivery)) is not None:
                held.settling = True

    def begin_commit(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Note, as `settling` does, that a handler's transaction is about to commit.

        Returns:
            Those that were given up before: if there are any, it must not, and nothing is noted.
        """
        with self._lock:  # so that an attempt either has failed by its timeout, or may commit
            held = [self.get(delivery) for delivery in deliveries]
            pairs = zip(deliveries, held, strict=True)
            gone = [delivery for delivery, known in pairs if known is None or known.abandoned]
            if not gone:
                for known in held:
                    known.settling = True  # type: ignore[union-attr]
            return gone

    def abandon(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Note that the calls of these go on, but may not commit; return those that are held."""
        with self._lock:
            held = [known for delivery in deliveries if (known := self.get(delivery)) is not None]
            for known in held:
                known.lost = True
        return [known.delivery for known in held]

    def remove(self, deliveries: Iterable[Delivery]) -> list[Lease]:
        """Forget leases that are settled or lost; return those that were not forgotten before.

        Whoever gets one here is the one to tell what became of it: it is told once.
        """
        with self._lock:
            gone = [held for delivery in deliveries if (held := self.get(delivery)) is not None]
            for held in gone:
                del self._leases[held.delivery.id]
        return gone

    def mark_lost(self, deliveries: Iterable[Delivery]) -> list[Lease]:
        """Note that leases are gone, so that their handlers may know; return as `remove`."""
        gone = self.remove(deliveries)
        for held in gone:
            held.lost = True
        return gone

    def hand_over(self, deliveries: Iterable[Delivery]) -> None:
        """Forget leases that somebody else settles by hand, before they run out."""
        for held in self.remove(deliveries):
            with self._lock:
                self._handed_over[held.delivery.fencing_token] = held.expires_at

    def due(self, now: float) -> list[Lease]:
        """Return the leases to be renewed now.

        Those of an overdue handler run out, and those that no handler has begun with in time.
        """
        return [
            lease
            for lease in self.all()
            if lease.renew_at <= now
            and not (lease.timed_out or lease.overdue(now) or lease.is_unstarted(now))
        ]

    def unstarted(self, now: float) -> set[int]:
        """Return the messages that no handler has begun with within the length of their lease."""
        return {lease.delivery.id for lease in self.all() if lease.is_unstarted(now)}

    def overdue(self, now: float) -> list[Lease]:
        """Return the leases whose handler has taken too long, each of them once."""
        with self._lock:
            found = [
                lease
                for lease in self._leases.values()
                if lease.overdue(now) and not lease.timed_out
            ]
            for lease in found:
                lease.timed_out = True
        return found

    def mark_renewed(self, held: Iterable[Lease], asked_at: float) -> None:
        """Note that the leases were renewed by a statement that was sent then."""
        for lease in held:
            lease.renew_at = asked_at + lease.length / _RENEW_AT
            lease.expires_at = asked_at + lease.length

    def next_renewal(self) -> float:
        """Return when the first lease has to be renewed or its handler is overdue."""
        now = self._clock()
        moments = [
            lease.renew_at
            for lease in self.all()
            if not (lease.timed_out or lease.is_unstarted(now))
        ]
        moments += [
            lease.started_at + lease.handler.timeout.total_seconds()
            for lease in self.all()
            if lease.started_at is not None
            and lease.handler.timeout is not None
            and not (lease.timed_out or lease.settling)
        ]
        return min(moments, default=float("inf"))

    def all(self) -> list[Lease]:
        """Return all leases."""
        with self._lock:
            return list(self._leases.values())

    def tokens(self) -> list[int]:
        """Return the fencing tokens of all leases, also of those left to be settled by hand."""
        now = self._clock()
        with self._lock:
            self._handed_over = {
                token: until for token, until in self._handed_over.items() if until > now
            }
            return [
                *(held.delivery.fencing_token for held in self._leases.values()),
                *self._handed_over,
            ]

    def __len__(self) -> int:
        return len(self._leases)

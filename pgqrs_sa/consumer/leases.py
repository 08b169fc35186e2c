"""The leases that a consumer holds: when to renew each of them, and which are lost.

Times are of this machine's monotonic clock, and only say when to ask the database. The database
decides whether a lease is held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from ..types import Delivery
from .handlers import Handler

__all__ = ["Lease", "LeaseTable"]

_RENEW_AT = 3  # a lease is renewed after a third of its length: two renewals may fail


@dataclass(slots=True, eq=False)
class Lease:
    """A lease as this process knows it."""

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
        """True if the attempt has failed, or the lease was released or lost, during its call."""
        return self.lost or self.timed_out

    def is_lost(self) -> bool:
        """Return whether the lease is known to be lost, or has expired without a renewal."""
        return self.lost or self.clock() > self.expires_at

    def is_unstarted(self, now: float) -> bool:
        """Return whether no handler has started within the lease's length: it is not renewed."""
        return self.started_at is None and not self.settling and now >= self.start_by

    def overdue(self, now: float) -> bool:
        """Return whether its handler has exceeded its timeout."""
        limit = self.handler.timeout
        if limit is None or self.started_at is None or self.settling:
            return False
        return now - self.started_at > limit.total_seconds()


def _unlink(lease: Lease, watch: Callable[[], bool]) -> None:
    """Let the delivery of a lease no longer refer to the lease.

    As they refer to each other, only the garbage collector could free them. It did so after each
    few hundred messages, and looked at all that the application has in memory.
    """
    object.__setattr__(lease.delivery, "watch", watch)


def _is_known() -> bool:
    """Return that a lease is lost."""
    return True


def _is_past(clock: Callable[[], float], expires_at: float) -> bool:
    """Return whether a lease that is no longer tracked has expired."""
    return clock() > expires_at


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
        """Add new leases; return the deliveries, which ask this table whether they are lost.

        Args:
            handler: The handler that they are for.
            leased: The deliveries of the lease.
            lease: The length of the lease.
            asked_at: The clock before the statement was sent: no lease began earlier.
        """
        watched, clock, span = list(leased), self._clock, lease.total_seconds()
        renew_at, end = asked_at + span / _RENEW_AT, asked_at + span
        with self._lock:
            for delivery in watched:
                held = Lease(delivery, handler, span, renew_at, end, end)
                if clock is not time.monotonic:
                    held.clock = clock
                # Nothing else refers to it yet, and a copy would double the cost of this loop.
                object.__setattr__(delivery, "watch", held.is_lost)
                self._leases[delivery.id] = held
        return watched

    def replaced(self, leased: Iterable[Delivery]) -> list[Lease]:
        """Return the earlier leases of these messages, which are lost now."""
        before = [self._leases.get(delivery.id) for delivery in leased]
        return [lease for lease in before if lease is not None]

    def get(self, delivery: Delivery) -> Lease | None:
        """Return the lease of a delivery, or None if it is settled or of another attempt."""
        held = self._leases.get(delivery.id)
        if held is None or held.delivery.fencing_token != delivery.fencing_token:
            return None
        return held

    def mark_started(self, deliveries: Iterable[Delivery], thread: int | None) -> bool:
        """Record that a handler starts; return False if a lease is lost, and it must not."""
        now, begun = self._clock(), []
        for delivery in deliveries:
            held = self.get(delivery)
            if held is None or held.lost or now > held.expires_at:  # as in `Lease.is_lost`
                return False
            begun.append(held)
        for held in begun:
            held.started_at, held.thread = now, thread
        return True

    def mark_settling(self, deliveries: Iterable[Delivery]) -> None:
        """Record that the handler has returned: its timeout no longer applies."""
        for delivery in deliveries:
            if (held := self.get(delivery)) is not None:
                held.settling = True

    def begin_commit(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Do as `mark_settling` before a handler's transaction commits, unless it must not.

        Returns:
            The deliveries that were abandoned before. If there are any, the transaction must not
            commit, and nothing is recorded.
        """
        with self._lock:  # an attempt either fails by its timeout, or may commit
            held = [self.get(delivery) for delivery in deliveries]
            pairs = zip(deliveries, held, strict=True)
            gone = [delivery for delivery, known in pairs if known is None or known.abandoned]
            if not gone:
                for known in held:
                    known.settling = True  # type: ignore[union-attr]
            return gone

    def abandon(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Forbid the calls of these deliveries to commit; return the deliveries still held."""
        with self._lock:
            held = [known for delivery in deliveries if (known := self.get(delivery)) is not None]
            for known in held:
                known.lost = True
        return [known.delivery for known in held]

    def remove(self, deliveries: Iterable[Delivery]) -> list[Lease]:
        """Remove leases that are settled or lost; return those that were still in the table.

        The caller that receives a lease reports its outcome, so that it is reported once.
        """
        gone = self._take(deliveries)
        for held in gone:
            _unlink(held, partial(_is_past, held.clock, held.expires_at))
        return gone

    def _take(self, deliveries: Iterable[Delivery]) -> list[Lease]:
        with self._lock:
            gone = [held for delivery in deliveries if (held := self.get(delivery)) is not None]
            for held in gone:
                del self._leases[held.delivery.id]
        return gone

    def mark_lost(self, deliveries: Iterable[Delivery]) -> list[Lease]:
        """Mark leases as lost for their handlers, and remove them; return the same as `remove`."""
        gone = self._take(deliveries)
        for held in gone:
            held.lost = True
            _unlink(held, _is_known)
        return gone

    def hand_over(self, deliveries: Iterable[Delivery]) -> None:
        """Stop tracking leases that the handler settles itself, before they expire."""
        for held in self.remove(deliveries):
            with self._lock:
                self._handed_over[held.delivery.fencing_token] = held.expires_at

    def due(self, now: float) -> list[Lease]:
        """Return the leases to renew now.

        Those of an overdue handler, and those that were not started in time, are left to expire.
        """
        return [
            lease
            for lease in self.all()
            if lease.renew_at <= now
            and not (lease.timed_out or lease.overdue(now) or lease.is_unstarted(now))
        ]

    def unstarted(self, now: float) -> set[int]:
        """Return the messages for which no handler has started within the length of the lease."""
        return {lease.delivery.id for lease in self.all() if lease.is_unstarted(now)}

    def overdue(self, now: float) -> list[Lease]:
        """Return the leases whose handler has exceeded its timeout, each of them once."""
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
        """Record that the leases were renewed by a statement sent at ``asked_at``."""
        for lease in held:
            lease.renew_at = asked_at + lease.length / _RENEW_AT
            lease.expires_at = asked_at + lease.length

    def next_renewal(self) -> float:
        """Return when the next lease must be renewed, or the next handler is overdue."""
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
        """Return the fencing tokens of all leases, including those that handlers settle."""
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

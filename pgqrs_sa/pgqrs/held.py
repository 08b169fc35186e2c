"""What a consumer holds: the deliveries behind the message ids that pgqrs settles by."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..types import Delivery

__all__ = ["Held"]

KEPT_SECONDS = 3600.0
"""How long a delivery is remembered after its lease: until somebody else takes the message, it
can still be settled."""


@dataclass(slots=True)
class _Lease:
    delivery: Delivery
    ends_at: float  # by time.monotonic(): roughly, for tidying up
    extended: bool = False


class Held:
    """Deliveries by message id, from the dequeue until they are settled or long over."""

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}
        self._tidied_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, deliveries: Iterable[Delivery], lease: float) -> None:
        """Remember what was dequeued under a lease of so many seconds."""
        self._tidy()
        for one in deliveries:
            self._leases[one.id] = _Lease(one, time.monotonic() + lease)

    def get(self, id: int) -> Delivery | None:
        """Return the delivery of a message, or None."""
        lease = self._leases.get(id)
        return None if lease is None else lease.delivery

    def among(self, ids: Iterable[int]) -> list[Delivery]:
        """Return the deliveries of those messages that are held, each once."""
        return [self._leases[id_].delivery for id_ in dict.fromkeys(ids) if id_ in self._leases]

    def extended(self, id: int, lease: float) -> None:
        """Note that a message was kept, or put off, for so many seconds from now."""
        if (held := self._leases.get(id)) is not None:
            held.ends_at, held.extended = time.monotonic() + lease, True

    def drop(self, ids: Iterable[int]) -> None:
        """Forget what was settled, or lost."""
        for id_ in ids:
            self._leases.pop(id_, None)

    def running(self) -> bool:
        """Return whether any lease has not run out."""
        moment = time.monotonic()
        return any(lease.ends_at > moment for lease in self._leases.values())

    def at_work(self) -> list[Delivery]:
        """Return what was never extended: what was, is meant to come back at that time."""
        return [lease.delivery for lease in self._leases.values() if not lease.extended]

    def _tidy(self) -> None:
        moment = time.monotonic()
        if moment - self._tidied_at < 1:  # each look goes through all of them
            return
        self._tidied_at = moment
        over = [id_ for id_, one in self._leases.items() if one.ends_at + KEPT_SECONDS < moment]
        self.drop(over)

"""Counts of what a running consumer does with its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..consumer.events import Event, Hooks
from ..types import Outcome, WorkerInfo

__all__ = ["Counter"]

_COUNTED = (
    Outcome.ARCHIVED,
    Outcome.DISCARDED,
    Outcome.RETRIED,
    Outcome.RELEASED,
    Outcome.DEAD,
    Outcome.LOST,
)


class Counter(Hooks):
    """Counts messages by outcome.

    Args:
        begun: Called once, when the consumer has registered and begins to lease.
    """

    def __init__(self, begun: Callable[[WorkerInfo], None]) -> None:
        self._begun = begun
        self._counts: dict[Outcome, int] = dict.fromkeys(_COUNTED, 0)
        self._lock = threading.Lock()
        self.worker: WorkerInfo | None = None

    def on_heartbeat(self, worker: WorkerInfo) -> None:
        """See `Hooks`."""
        first, self.worker = self.worker is None, worker
        if first:
            self._begun(worker)

    def _count(self, event: Event) -> None:
        with self._lock:
            self._counts[Outcome(event.outcome)] += 1

    on_success = on_retry = on_dead = on_lease_lost = _count

    def row(self) -> dict[str, Any]:
        """Return the counts and the worker."""
        worker = self.worker
        return {
            "worker": worker.id if worker else None,
            "queues": list(worker.queues) if worker else [],
            **self._named(),
        }

    def sentence(self) -> str:
        """Return the counts as a sentence."""
        counted = [f"{count} {name}" for name, count in self._named().items() if count]
        return ", ".join(counted) or "no message came"

    def _named(self) -> dict[str, int]:
        return {outcome.name.lower(): count for outcome, count in self._counts.items()}

"""Adding up what the service says: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..types import QueueMetrics, WorkerHealth, WorkerInfo
from .types import SystemStats, WorkerHealthStats, WorkerStats

__all__ = ["health", "of_queue", "system"]

_STATES = (
    "ready",
    "scheduled",
    "leased",
    "exhausted",
    "archived",
    "dead",
    "cancelled",
    "discarded",
)


def system(
    metrics: Sequence[QueueMetrics], workers: Sequence[WorkerInfo], schema_version: int | None
) -> SystemStats:
    """Return the counts of all queues and workers."""
    by_status = _by_status(workers)
    return SystemStats(
        queues=len(metrics),
        **{state: sum(getattr(one, state) for one in metrics) for state in _STATES},
        workers=len(workers),
        ready_workers=by_status["ready"],
        suspended_workers=by_status["suspended"],
        stopped_workers=by_status["stopped"],
        schema_version=schema_version,
    )


def health(
    workers: Sequence[WorkerInfo], known: Sequence[WorkerHealth], *, by_queue: bool
) -> list[WorkerHealthStats]:
    """Return the counts of all workers, or those of each queue by its name."""
    silent = {one.worker.id for one in known if not one.healthy}
    if not by_queue:
        return [_health(None, workers, silent)]
    names = sorted({name for worker in workers for name in worker.queues})
    found = [
        _health(name, [one for one in workers if name in one.queues], silent) for name in names
    ]
    idle = [one for one in workers if not one.queues]
    return [*found, _health(None, idle, silent)] if idle else found


def _health(
    queue: str | None, workers: Sequence[WorkerInfo], silent: set[int]
) -> WorkerHealthStats:
    return WorkerHealthStats(
        queue, len(workers), **_by_status(workers), stale=sum(one.id in silent for one in workers)
    )


def of_queue(
    counted: QueueMetrics, workers: Sequence[WorkerInfo], known: Sequence[WorkerHealth]
) -> WorkerStats:
    """Return the counts of one queue's workers."""
    alive = [one for one in known if counted.queue in one.worker.queues]
    return WorkerStats(
        counted.queue,
        len(workers),
        **_by_status(workers),
        leases=counted.leased,
        shortest_silence=min((one.silent_for for one in alive), default=None),
        # Silence ends now by the database's clock: so does the age.
        oldest_worker_age=max(
            (one.worker.heartbeat_at + one.silent_for - one.worker.started_at for one in alive),
            default=None,
        ),
    )


def _by_status(workers: Sequence[WorkerInfo]) -> dict[str, int]:
    counted = Counter(worker.status for worker in workers)
    return {
        "ready": counted["ready"],
        "suspended": counted["suspended"],
        "stopped": counted["stopped"],
    }

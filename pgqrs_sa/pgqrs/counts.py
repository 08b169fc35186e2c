"""What an `Admin` counts: queues, workers, everything."""

from __future__ import annotations

import sqlalchemy as sa

from .. import migrations, states
from ..types import Seconds
from . import stats
from .connected import Connected
from .types import QueueMetrics, SystemStats, WorkerHealthStats, WorkerStats

__all__ = ["Counts"]


class Counts(Connected):
    """Metrics and statistics; none of them locks or changes anything."""

    async def queue_metrics(self, name: str) -> QueueMetrics:
        """Count the messages of a queue by state; `pgqrs_sa.QueueMetrics` says what they mean."""
        unheld = [sa.not_(states.leased(self._database.models.message))]
        async with self._service() as service:
            counts = await service.messages.metrics(name)
            find = service.messages.find
            oldest = await find(name, where=unheld, limit=1, content=False)
            newest = await find(name, limit=1, newest_first=True, content=False)
        return QueueMetrics.of(
            counts,
            oldest_pending_message=oldest[0].enqueued_at if oldest else None,
            newest_message=newest[0].enqueued_at if newest else None,
        )

    async def all_queues_metrics(self) -> list[QueueMetrics]:
        """Count the messages of each queue by state, by name of the queue."""
        async with self._service() as service:
            return [QueueMetrics.of(counts) for counts in await service.messages.all_metrics()]

    async def system_stats(self) -> SystemStats:
        """Count everything; the archive as `QueueMetrics` has it, each outcome up to a cap."""
        async with self._service() as service:
            metrics = await service.messages.all_metrics()
            workers = await service.workers.list()
        async with self._database.connection() as connection:
            stamp = await connection.run_sync(migrations.read_stamp, self.settings.schema)
        return stats.system(metrics, workers, stamp.version)

    async def worker_health_stats(
        self,
        timeout: Seconds = 60,  # noqa: ASYNC109 - pgqrs' name for a silence
        group_by_queue: bool = False,  # noqa: FBT002 - pgqrs takes it by position
    ) -> list[WorkerHealthStats]:
        """Count the workers by state, and those that have been silent for ``timeout`` seconds."""
        async with self._service() as service:
            workers = await service.workers.list()
            health = await service.workers.health(silent_for=timeout)
        return stats.health(workers, health, by_queue=group_by_queue)

    async def worker_stats(self, queue: str) -> WorkerStats:
        """Count the workers of a queue by state, and what they hold."""
        async with self._service() as service:
            metrics = await service.messages.metrics(queue)
            workers = await service.workers.list(queue=queue)
            health = await service.workers.health()
        return stats.of_queue(metrics, workers, health)

"""The activity of queues for a live view: their state, and how fast messages come and go."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from .scope import Scope
from .sql import health

__all__ = ["QueueActivity", "activity"]


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """The state and the rates of a queue at one moment.

    Attributes:
        queue: Its name.
        paused: Whether nothing is leased from it.
        ready: Visible, attempts left.
        leased: Held by a consumer.
        scheduled: Waiting for their time.
        exhausted: Out of attempts, not dead letters yet.
        dead: Dead letters; at least as many, if ``dead_capped``.
        dead_capped: Whether there are more dead letters than were counted: up to 10,000, and
            where there are more than 20 queues, up to 200,000 divided by their number.
        oldest_ready_age: How long the longest-waiting ready message has been visible.
        incoming: Messages enqueued each second.
        outgoing: Messages archived each second in each of the last spans, the latest last.
    """

    queue: str
    paused: bool
    ready: int
    leased: int
    scheduled: int
    exhausted: int
    dead: int
    dead_capped: bool
    oldest_ready_age: timedelta | None
    incoming: float
    outgoing: tuple[float, ...]


def activity(scope: Scope, step: timedelta) -> list[QueueActivity]:
    """Return each queue by name; nothing is remembered from one call to the next.

    Args:
        scope: The session, and the settings of the service.
        step: The span of time over which the rates are taken.
    """
    seconds = step.total_seconds()
    rows = scope.execute(health.overview(scope.tables), {"since": step}).all()
    values = {"step": step, "step_seconds": seconds}
    settled: dict[int, list[float]] = {row.id: [0.0] * health.BUCKETS for row in rows}
    arrived: dict[int, int] = {}
    for flow in scope.execute(health.outflow(scope.tables), values):
        if flow.bucket < health.BUCKETS and flow.queue_id in settled:
            settled[flow.queue_id][-1 - flow.bucket] = flow.settled / seconds
        arrived[flow.queue_id] = arrived.get(flow.queue_id, 0) + flow.arrived
    return [
        QueueActivity(
            queue=row.queue,
            paused=row.paused,
            ready=row.ready,
            leased=row.leased,
            scheduled=row.scheduled,
            exhausted=row.exhausted,
            dead=min(row.dead, row.most),
            dead_capped=row.dead > row.most,
            oldest_ready_age=row.oldest,
            incoming=(row.arrived + arrived.get(row.id, 0)) / seconds,
            outgoing=tuple(settled[row.id]),
        )
        for row in rows
    ]

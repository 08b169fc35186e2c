"""Taking a message: the UPDATE that leases, counts the attempt, and skips what others hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import Executable

from .. import states
from ..models import Models
from ..states import now
from .parts import among, chosen, content, seconds, span, tables


@cache
def dequeue(models: Models, *, by_worker: bool) -> Executable:
    """Lease the first visible messages of a queue: `dequeue_where` without criteria."""
    return dequeue_where(models, (), by_worker=by_worker)


def dequeue_where(
    models: Models, where: Sequence[sa.ColumnExpressionArgument[bool]], *, by_worker: bool
) -> Executable:
    """Lease the first visible messages of a queue that is not paused.

    The picked rows come from a CTE, which ``FOR UPDATE`` keeps from being inlined, so that the
    update can never touch more than it (an ``IN (subselect)`` can be run once for each row). It
    also returns the place in the queue that a row had before the lease moved it.

    Binds: queue, limit, lease and attempts (None for the queue's own), worker.
    """
    queue, message, _, worker = tables(models)
    holder = sa.bindparam("worker", type_=sa.BigInteger)
    source = sa.select(queue.c.id, queue.c.lease_seconds, queue.c.max_read_ct).where(
        queue.c.queue_name == sa.bindparam("queue"), queue.c.paused_at.is_(None)
    )
    if by_worker:
        source = source.where(
            sa.exists().where(worker.c.id == holder, worker.c.status == sa.literal("ready"))
        )
    origin = source.cte("pgqrs_queue")
    # A limit that the planner cannot see it takes for a tenth of the rows, and walks the index in
    # its order. Seeing 50, where it believes in fewer rows than that, it sorts the whole backlog:
    # a queue table is often analysed while it is empty.
    limit = sa.select(sa.bindparam("limit", type_=sa.Integer)).scalar_subquery()
    visible = (
        sa.select(message.c.id, message.c.priority, message.c.vt)
        .where(
            message.c.queue_id == sa.select(origin.c.id).scalar_subquery(),
            message.c.vt <= now(),
            states.has_attempts(message.c),
            *where,
        )
        .order_by(message.c.priority, message.c.vt, message.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=message)
    )
    picked = chosen(visible, "pgqrs_picked")
    lease = func.coalesce(
        span("lease"), seconds(sa.select(origin.c.lease_seconds).scalar_subquery())
    )
    limit_of_queue = sa.select(origin.c.max_read_ct).scalar_subquery()
    return (
        sa.update(message)
        .where(among(message, picked))
        .values(
            vt=now() + lease,
            read_ct=message.c.read_ct + 1,
            max_read_ct=func.coalesce(
                message.c.max_read_ct, sa.bindparam("attempts", type_=sa.Integer), limit_of_queue
            ),
            dequeued_at=now(),
            consumer_worker_id=holder,
        )
        .returning(
            *content(message),
            picked.c.vt.label("was_visible_at"),
        )
    )

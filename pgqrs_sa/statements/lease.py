"""Taking a message: the UPDATE that leases, counts the attempt, and skips what others hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..models import Models
from ..states import now
from .parts import (
    among,
    chosen,
    content,
    next_token,
    seconds,
    short,
    span,
    tables,
    timestamp,
    unseen,
    written_bind,
)

DELIVERED = (
    "id",
    "payload",
    "headers",
    "priority",
    "vt",
    "enqueued_at",
    "read_ct",
    "max_read_ct",
    "dedup_key",
    "last_error",
    "fencing_token",
)
"""The columns of a message that a consumer is given: what a lease returns begins with these."""


@cache
def dequeue(models: Models, *, by_worker: bool, floored: bool = False) -> Executable:
    """Lease the first visible messages of a queue: `dequeue_where` without criteria.

    ``floored`` begins behind the last message leased, at each of some levels of priority: see
    `pgqrs_sa.floor`. More binds: floor_levels, floor_vts, floor_ids.
    """
    message = short(tables(models).message)
    origin = _origin(models, by_worker=by_worker)
    levels = _given_levels() if floored else _all_levels(message, origin)
    return _lease(message, origin, levels, ())


def dequeue_where(
    models: Models, where: Sequence[sa.ColumnExpressionArgument[bool]], *, by_worker: bool
) -> Executable:
    """Lease the first visible messages of a queue that is not paused.

    The picked rows come from a CTE, which ``FOR UPDATE`` keeps from being inlined, so that the
    update can never touch more than it (an ``IN (subselect)`` can be run once for each row). It
    also returns the place in the queue that a row had before the lease moved it.

    Binds: queue, limit, lease and attempts (None for the queue's own), worker.
    """
    message = tables(models).message  # by its own name, which the criteria use
    origin = _origin(models, by_worker=by_worker)
    return _lease(message, origin, _all_levels(message, origin), where)


def _origin(models: Models, *, by_worker: bool) -> sa.CTE:
    """The queue, unless it is paused, or the worker may not lease."""
    queue, worker = tables(models).queue.alias("q"), tables(models).worker.alias("w")
    source = sa.select(queue.c.id, queue.c.lease_seconds, queue.c.max_read_ct).where(
        queue.c.queue_name == sa.bindparam("queue"), queue.c.paused_at.is_(None)
    )
    if by_worker:
        ready = worker.c.status == sa.literal("ready")
        source = source.where(sa.exists().where(worker.c.id == _holder(), ready))
    return source.cte("pq_queue")


def _holder() -> ColumnElement[Any]:
    return sa.bindparam("worker", type_=sa.BigInteger)


def _all_levels(message: Any, origin: sa.CTE) -> sa.FromClause:
    """The priorities in use, one look into the index for each (a loose index scan).

    Asked level by level, a dequeue does not read through the scheduled messages of a level to
    come to the next one (https://wiki.postgresql.org/wiki/Loose_indexscan).
    """

    def first(*more: ColumnElement[bool]) -> ColumnElement[Any]:
        return (
            sa.select(message.c.priority)
            .where(
                message.c.queue_id == sa.select(origin.c.id).scalar_subquery(),
                states.has_attempts(message.c),
                *more,
            )
            .order_by(message.c.priority)
            .limit(sa.literal_column("1"))  # no bind, which a plan for any values would not see
            .scalar_subquery()
        )

    begin = sa.select(first().label("level")).cte("pgqrs_levels", recursive=True)
    further = sa.select(first(message.c.priority > begin.c.level)).where(begin.c.level.is_not(None))
    return begin.union_all(further)


def _given_levels() -> sa.FromClause:
    """The priorities that the caller has leased from, each with where it was."""
    return (
        func.unnest(
            unseen(written_bind("floor_levels", sa.SmallInteger)),
            unseen(written_bind("floor_vts", timestamp)),
            unseen(written_bind("floor_ids", sa.BigInteger)),
        )
        .table_valued("level", "vt", "id")
        .render_derived("pq_floor")
    )


def _lease(
    message: Any,
    origin: sa.CTE,
    levels: sa.FromClause,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
) -> Executable:
    # A limit that the planner cannot see it takes for a tenth of the rows, and walks the index in
    # its order. Seeing 50, where it believes in fewer rows than that, it sorts the whole backlog:
    # a queue table is often analysed while it is empty.
    limit = unseen(sa.bindparam("limit", type_=sa.Integer))
    behind = []
    if "vt" in levels.c:
        # By row: a bulk insert gives many messages the same vt.
        behind.append(sa.tuple_(message.c.vt, message.c.id) > sa.tuple_(levels.c.vt, levels.c.id))
    visible = (
        sa.select(message.c.id, message.c.priority, message.c.vt)
        .where(
            message.c.queue_id == sa.select(origin.c.id).scalar_subquery(),
            message.c.priority == levels.c.level,
            *behind,
            message.c.vt <= now(),
            states.has_attempts(message.c),
            *where,
        )
        .correlate(levels, origin)
        .order_by(message.c.vt, message.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=message)
        .lateral("visible")
    )
    # The levels come in their order, and what is not needed of the last one is not locked. The
    # token is drawn here, for the rows that the limit lets through and that are locked by now: of
    # two leases of a message the later one has the greater token.
    first = (
        sa.select(*visible.c, next_token(message).label("token"))
        .select_from(sa.join(levels, visible, sa.true()))
        .limit(limit)
    )
    picked = chosen(first, "pq_picked")
    lease = func.coalesce(
        span("lease"), seconds(sa.select(origin.c.lease_seconds).scalar_subquery())
    )
    limit_of_queue = sa.select(origin.c.max_read_ct).scalar_subquery()
    columns = {column.name: column for column in (*content(message), message.c.fencing_token)}
    return (
        sa.update(message)
        .where(among(message, picked))
        .values(
            vt=now() + lease,
            read_ct=message.c.read_ct + sa.literal_column("1"),
            max_read_ct=func.coalesce(
                message.c.max_read_ct, sa.bindparam("attempts", type_=sa.Integer), limit_of_queue
            ),
            dequeued_at=now(),
            consumer_worker_id=_holder(),
            fencing_token=picked.c.token,
        )
        .returning(
            *(columns[name] for name in DELIVERED),
            picked.c.vt.label("was_visible_at"),
            *(columns[name] for name in ("consumer_worker_id", "dequeued_at")),
        )
    )

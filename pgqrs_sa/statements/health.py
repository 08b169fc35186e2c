"""SELECT: what the doctor and the live view ask about queues, messages and workers."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..models import Models
from ..states import now
from .parts import array_bind, seconds, span, tables

BUCKETS = 8
"""How many spans of time `outflow` tells apart."""


@cache
def backlog(models: Models) -> Executable:
    """Each queue, how many messages are ready and exhausted, and since when the oldest are."""
    queue, message, _, _ = tables(models)

    def oldest(state: ColumnElement[bool]) -> ColumnElement[Any]:
        return now() - func.min(message.c.vt).filter(state)

    ready, exhausted = states.ready(message.c), states.exhausted(message.c)
    counts = (
        sa.select(
            func.count().filter(ready).label("ready"),
            oldest(ready).label("ready_age"),
            func.count().filter(exhausted).label("exhausted"),
            oldest(exhausted).label("exhausted_age"),
        )
        .where(message.c.queue_id == queue.c.id)
        .lateral("counts")
    )
    return (
        sa.select(
            queue.c.queue_name.label("queue"),
            (now() - queue.c.paused_at).label("paused_age"),
            *counts.c,
        )
        .select_from(queue)
        .join(counts, sa.true())
        .order_by(queue.c.queue_name)
    )


@cache
def stuck_leases(models: Models) -> Executable:
    """What is leased for long to workers that are stopped or gone. Binds: ahead."""
    _, message, _, worker = tables(models)
    alive = sa.exists().where(
        worker.c.id == message.c.consumer_worker_id, worker.c.status != sa.literal("stopped")
    )
    return (
        sa.select(
            message.c.consumer_worker_id.label("worker_id"),
            func.count().label("leases"),
            func.max(message.c.vt).label("until"),
        )
        .where(
            states.leased(message.c),
            message.c.vt > now() + span("ahead"),
            message.c.consumer_worker_id.is_not(None),
            sa.not_(alive),
        )
        .group_by(message.c.consumer_worker_id)
        .order_by(message.c.consumer_worker_id)
    )


@cache
def give_back(models: Models) -> Executable:
    """Make visible what a worker holds, whether or not it is registered. Binds: worker_id."""
    message = tables(models).message
    return (
        sa.update(message)
        .where(
            states.leased(message.c),
            message.c.consumer_worker_id == sa.bindparam("worker_id", type_=sa.BigInteger),
        )
        .values(vt=now(), dequeued_at=sa.null(), consumer_worker_id=sa.null())
    )


@cache
def silent_workers(models: Models) -> Executable:
    """Workers that are not stopped and were not heard of for so long. Binds: silence."""
    worker = tables(models).worker
    silence = now() - worker.c.heartbeat_at
    return (
        sa.select(worker.c.id, worker.c.name, worker.c.hostname, silence.label("silence"))
        .where(worker.c.status != sa.literal("stopped"), silence > span("silence"))
        .order_by(worker.c.id)
    )


@cache
def highest_ids(models: Models) -> Executable:
    """The highest id of each of the four tables, by the table's name."""
    return sa.select(*(sa.select(func.max(t.c.id)).scalar_subquery().label(t.name)
                       for t in tables(models)))  # fmt: skip


_NEWEST = 1000


@cache
def newest_token(models: Models) -> Executable:
    """The greatest fencing token of the newest rows: a look at all would take too long."""
    _, message, archived, _ = tables(models)

    def greatest(table: sa.Table) -> ColumnElement[Any]:
        newest = sa.select(table.c.fencing_token).order_by(table.c.id.desc()).limit(_NEWEST)
        return sa.select(func.max(newest.subquery().c.fencing_token)).scalar_subquery()

    return sa.select(func.greatest(greatest(message), greatest(archived)).label("token"))


@cache
def overview(models: Models) -> Executable:
    """Each queue with its live messages by state and its dead letters.

    The rest of the archive is not counted: it may be large, and this runs every two seconds.

    Binds: since (a timedelta: what counts as having come in just now).
    """
    queue, message, archived, _ = tables(models)

    def live(state: ColumnElement[bool]) -> ColumnElement[int]:
        return func.count().filter(state)

    counts = (
        sa.select(
            live(states.ready(message.c)).label("ready"),
            live(states.leased(message.c)).label("leased"),
            live(states.scheduled(message.c)).label("scheduled"),
            live(states.exhausted(message.c)).label("exhausted"),
            (now() - func.min(message.c.vt).filter(states.ready(message.c))).label("oldest"),
            live(message.c.enqueued_at > now() - span("since")).label("arrived"),
        )
        .where(message.c.queue_id == queue.c.id)
        .lateral("counts")
    )
    # Both criteria, so that the partial index of what was not simply done answers this.
    dead = (
        sa.select(func.count())
        .where(
            archived.c.queue_id == queue.c.id,
            archived.c.outcome != sa.literal("archived", literal_execute=True),
            archived.c.outcome == sa.literal("dead"),
        )
        .scalar_subquery()
    )
    return (
        sa.select(
            queue.c.id,
            queue.c.queue_name.label("queue"),
            queue.c.paused_at.is_not(None).label("paused"),
            *counts.c,
            dead.label("dead"),
        )
        .select_from(queue)
        .join(counts, sa.true())
        .order_by(queue.c.queue_name)
    )


@cache
def outflow(models: Models) -> Executable:
    """What was settled in each of the last `BUCKETS` spans of time, 0 being the latest.

    ``arrived`` are those that were enqueued in the latest span as well. What was deleted rather
    than archived left no trace, and is not counted.

    Binds: queue_ids, step (a timedelta), step_seconds (the same).
    """
    archived = tables(models).archived
    age = func.extract("epoch", now() - archived.c.archived_at)
    step = sa.bindparam("step_seconds", type_=sa.Double)
    bucket = sa.cast(func.floor(age / step), sa.Integer).label("bucket")
    return (
        sa.select(
            archived.c.queue_id,
            bucket,
            func.count().label("settled"),
            func.count().filter(archived.c.enqueued_at > now() - span("step")).label("arrived"),
        )
        .where(
            archived.c.queue_id == func.any(array_bind("queue_ids", sa.BigInteger)),
            archived.c.archived_at > now() - seconds(step * sa.literal_column(str(BUCKETS))),
            archived.c.archived_at <= now(),
        )
        .group_by(archived.c.queue_id, sa.literal_column("bucket"))
    )

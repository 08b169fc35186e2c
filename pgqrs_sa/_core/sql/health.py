"""SELECT: the state of queues, messages and workers, for the doctor and the live view.

There are no foreign keys: `orphans` and `missing_queues` find rows that refer to missing ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..states import now
from ..tables import Tables
from . import counts
from .fragments import elapsed, interval_bind, seconds

BUCKETS = 8
"""How many spans of time `outflow` tells apart."""


@cache
def backlog(tables: Tables) -> Executable:
    """Each queue, how many messages are ready and exhausted, and since when the oldest are."""
    queue, message, _, _ = tables
    live = counts.live_by_queue(
        tables,
        counts.of_state(message.c, "ready"),
        counts.age(message.c, "ready", "ready_age"),
        counts.of_state(message.c, "exhausted"),
        counts.age(message.c, "exhausted", "exhausted_age"),
    )
    return (
        sa.select(
            queue.c.queue_name.label("queue"),
            elapsed(now() - queue.c.paused_at).label("paused_age"),
            func.coalesce(live.c.ready, 0).label("ready"),
            live.c.ready_age,
            func.coalesce(live.c.exhausted, 0).label("exhausted"),
            live.c.exhausted_age,
        )
        .select_from(queue.outerjoin(live, live.c.queue_id == queue.c.id))
        .order_by(queue.c.queue_name)
    )


@cache
def stuck_leases(tables: Tables) -> Executable:
    """Leases of workers that are stopped or gone which end far in the future. Binds: ahead."""
    _, message, _, worker = tables
    alive = sa.exists().where(
        worker.c.id == message.c.consumer_worker_id, worker.c.status != sa.literal("stopped")
    )
    return (
        sa.select(
            message.c.consumer_worker_id.label("worker_id"),
            func.count().label("leases"),
            func.max(message.c.leased_until).label("until"),
        )
        .where(
            message.c.leased_until > now() + interval_bind("ahead"),
            message.c.consumer_worker_id.is_not(None),
            sa.not_(alive),
        )
        .group_by(message.c.consumer_worker_id)
        .order_by(message.c.consumer_worker_id)
    )


@cache
def silent_workers(tables: Tables) -> Executable:
    """Workers that are not stopped whose last heartbeat is older than this. Binds: silence."""
    worker = tables.worker
    silence = now() - worker.c.heartbeat_at
    return (
        sa.select(worker.c.id, worker.c.name, worker.c.hostname, elapsed(silence).label("silence"))
        .where(worker.c.status != sa.literal("stopped"), silence > interval_bind("silence"))
        .order_by(worker.c.id)
    )


@cache
def highest_ids(tables: Tables) -> Executable:
    """The highest id of each table, by the table's name."""
    return sa.select(
        *(sa.select(func.max(table.c.id)).scalar_subquery().label(table.name) for table in tables)
    )


@cache
def ids_in_archive(tables: Tables) -> Executable:
    """How many live messages have the id of an archived one: none of them can be archived."""
    _, message, archived, _ = tables
    taken = sa.exists().where(archived.c.id == message.c.id)
    return sa.select(func.count().label("messages")).select_from(message).where(taken)


@cache
def kept_for_ever(tables: Tables) -> Executable:
    """The queues that add to the archive without a retention: one look into the index each."""
    queue, _, archived, _ = tables
    settled = sa.exists().where(archived.c.queue_id == queue.c.id)
    adds = sa.or_(
        queue.c.keep == sa.literal("all"),
        sa.and_(queue.c.keep == sa.literal("failed"), queue.c.failed_retention_seconds.is_(None)),
    )
    return (
        sa.select(queue.c.id, queue.c.queue_name.label("queue"))
        .where(queue.c.retention_seconds.is_(None), adds, settled)
        .order_by(queue.c.queue_name)
    )


_NEWEST = 1000


@cache
def newest_token(tables: Tables) -> Executable:
    """The greatest fencing token of the newest rows: a look at all would take too long."""
    _, message, archived, _ = tables

    def greatest(table: sa.Table) -> ColumnElement[Any]:
        newest = sa.select(table.c.fencing_token).order_by(table.c.id.desc()).limit(_NEWEST)
        return sa.select(func.max(newest.subquery().c.fencing_token)).scalar_subquery()

    return sa.select(func.greatest(greatest(message), greatest(archived)).label("token"))


@cache
def overview(tables: Tables) -> Executable:
    """Each queue with its live messages by state, and its dead letters.

    Of these there are up to one more than ``most``. The rest of the archive is not counted: it
    may be large, and this runs every two seconds.

    Binds: since (a timedelta: what counts as having come in just now).
    """
    queue, message, _, _ = tables
    arrived = func.count().filter(message.c.enqueued_at > now() - interval_bind("since"))
    live = counts.live_by_queue(
        tables,
        *(counts.of_state(message.c, state) for state in counts.STATES),
        counts.age(message.c, "ready", "oldest"),
        arrived.label("arrived"),
    )
    most = counts.cap(tables)
    dead = counts.not_done(tables, "dead", most)
    return (
        sa.select(
            queue.c.id,
            queue.c.queue_name.label("queue"),
            queue.c.paused_at.is_not(None).label("paused"),
            *(func.coalesce(live.c[name], 0).label(name) for name in (*counts.STATES, "arrived")),
            live.c.oldest,
            dead.c.found.label("dead"),
            most.label("most"),
        )
        .select_from(queue.outerjoin(live, live.c.queue_id == queue.c.id).join(dead, sa.true()))
        .order_by(queue.c.queue_name)
    )


@cache
def outflow(tables: Tables) -> Executable:
    """What was settled in each of the last `BUCKETS` spans of time, 0 being the latest.

    ``arrived`` are those that were enqueued in the latest span as well. What was deleted rather
    than archived left no trace, and is not counted.

    Binds: step (a timedelta), step_seconds (the same).
    """
    queue, _, archived, _ = tables
    age = sa.extract("epoch", now() - archived.c.archived_at)
    step = sa.bindparam("step_seconds", type_=sa.Double)
    bucket = sa.cast(func.floor(age / step), sa.Integer).label("bucket")
    # Lateral, so that each queue is a look into the index, however many queues there are.
    flow = (
        sa.select(
            bucket,
            func.count().label("settled"),
            func.count()
            .filter(archived.c.enqueued_at > now() - interval_bind("step"))
            .label("arrived"),
        )
        .where(
            archived.c.queue_id == queue.c.id,
            archived.c.archived_at > now() - seconds(step * sa.literal_column(str(BUCKETS))),
            archived.c.archived_at <= now(),
        )
        .group_by(sa.literal_column("bucket"))
        .lateral("flow")
    )
    return sa.select(queue.c.id.label("queue_id"), *flow.c).join_from(queue, flow, sa.true())


@cache
def missing_queues(tables: Tables) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """Queue ids referenced by live and by archived messages for which no queue exists."""
    _, message, archived, _ = tables
    return (
        _without_queue(tables, _ids(message, "a")),
        _without_queue(tables, _ids(archived, "b")),
    )


def _ids(table: sa.Table, name: str) -> sa.Select[Any]:
    """The different ids of queues in a table: one look-up in an index each, not a scan."""
    rows = table.c
    first = sa.select(func.min(rows.queue_id).label("id"))
    found = first.cte(f"pgqrs_ids_{name}", recursive=True)
    following = (
        sa.select(func.min(rows.queue_id)).where(rows.queue_id > found.c.id).scalar_subquery()
    )
    found = found.union_all(sa.select(following).where(found.c.id.is_not(None)))
    return sa.select(found.c.id).where(found.c.id.is_not(None))


def _without_queue(tables: Tables, ids: Any) -> sa.Select[Any]:
    queue = tables.queue
    found = ids.subquery("found")
    there = sa.exists().where(queue.c.id == found.c.id)
    return sa.select(found.c.id).where(sa.not_(there)).order_by(found.c.id)


@cache
def orphans(tables: Tables) -> Executable:
    """One row: messages and archived ones without their queue, live leases without their worker.

    A producer that is gone, or the worker in a lease that is over, is no orphan: the rows of
    workers are purged while what they did is kept.
    """
    _, message, archived, worker = tables
    live, settled = missing_queues(tables)

    def count(table: sa.Table, *criteria: ColumnElement[bool]) -> ColumnElement[int]:
        return sa.select(func.count()).select_from(table).where(*criteria).scalar_subquery()

    no_worker = sa.not_(sa.exists().where(worker.c.id == message.c.consumer_worker_id))
    return sa.select(
        count(message, message.c.queue_id.in_(live)).label("messages_without_queue"),
        count(archived, archived.c.queue_id.in_(settled)).label("archived_without_queue"),
        count(
            message,
            states.leased(message.c),
            message.c.consumer_worker_id.is_not(None),
            no_worker,
        ).label("leases_without_worker"),
    )

"""The archive: dead-letter, requeue, prune."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..states import now
from ..tables import Tables
from .fragments import (
    alias_short,
    array_bind,
    clamp_attempts,
    copied_columns,
    first_visible,
    hide_from_planner,
    ids_of,
    in_list,
    interval_bind,
    materialized,
    move_to_archive,
    queue_id,
    queue_levels,
    seconds,
)

EXHAUSTED_REASON = "no attempts left: the last lease ran out"


@cache
def dead_letter_exhausted(tables: Tables) -> Executable:
    """Archive exhausted messages as dead letters.

    Their last holder cannot say so: it died, or it never came back. They have kept their places,
    in front of what is leased later, so that a look at the first messages finds them.

    Binds: queue, limit, look (at how many visible messages of each level; None for all).
    """
    message = tables.message
    levels = queue_levels(message, sa.select(queue_id(tables).label("id")))
    look = hide_from_planner(sa.bindparam("look", type_=sa.BigInteger))
    visible = first_visible(message, levels, look)
    limit = hide_from_planner(sa.bindparam("limit", type_=sa.BigInteger))
    found = (
        sa.select(visible.c.id)
        .select_from(sa.join(levels, visible, levels.c.level.is_not(None)))
        .where(sa.not_(visible.c.more))
        .limit(limit)
    )
    ids = ids_of(materialized(found, "pgqrs_found"))
    rows = (
        sa.select(message.c.id)
        .where(message.c.id == func.any(ids), states.exhausted(message.c))
        .order_by(message.c.id)
        .with_for_update(skip_locked=True)
    )
    return move_to_archive(
        tables,
        in_list(alias_short(message), materialized(rows, "pgqrs_rows")),
        outcome=sa.literal("dead", sa.Text),
        reason=sa.literal(EXHAUSTED_REASON, sa.Text),
    )


@cache
def requeue(tables: Tables) -> Executable:
    """Move archived messages back, under the ids that they had, with further attempts.

    ``read_ct`` stays and the limit is raised. The fencing token is a new number, greater than that
    of any lease before. If the key of one is live again, or used twice among them, none is moved.
    They are inserted in the order of their keys, like those of `enqueue.many`: no two deadlock.

    Binds: ids, attempts (None for the queue's limit), delay, required (how many ids).
    """
    queue, message, archived, _ = tables
    live = sa.exists().where(
        message.c.queue_id == archived.c.queue_id, message.c.dedup_key == archived.c.dedup_key
    )
    ids = array_bind("ids", sa.BigInteger)
    other: Any = aliased(archived)
    first = sa.not_(
        sa.exists().where(
            other.c.id == func.any(ids),
            other.c.id < archived.c.id,
            other.c.queue_id == archived.c.queue_id,
            other.c.dedup_key == archived.c.dedup_key,
        )
    )
    chosen_rows = (
        sa.select(archived.c.id, queue.c.max_read_ct)
        .join(queue, queue.c.id == archived.c.queue_id)
        .where(archived.c.id == func.any(ids), sa.not_(live), first)
        .order_by(archived.c.id)
        .with_for_update(of=archived)
    )
    rows = materialized(chosen_rows, "pgqrs_rows")
    changed = ("vt", "max_read_ct", "dequeued_at", "consumer_worker_id", "fencing_token")
    unchanged = tuple(name for name in copied_columns(tables) if name not in changed)
    gone = (
        sa.delete(archived)
        .where(
            archived.c.id == rows.c.id,
            sa.select(func.count()).select_from(rows).scalar_subquery()
            == sa.bindparam("required", type_=sa.BigInteger),
        )
        .returning(
            archived.c.id,
            *(archived.c[name] for name in unchanged),
            rows.c.max_read_ct.label("attempts"),
        )
        .cte("pq_gone")
    )
    attempts = func.coalesce(sa.bindparam("attempts", type_=sa.Integer), gone.c.attempts)
    source = sa.select(
        gone.c.id,
        *(gone.c[name] for name in unchanged),
        now() + interval_bind("delay"),
        clamp_attempts(sa.cast(gone.c.read_ct, sa.BigInteger) + attempts),
    ).order_by(sa.collate(gone.c.dedup_key, "C"), gone.c.queue_id)
    return (
        insert(message)
        .from_select(("id", *unchanged, "vt", "max_read_ct"), source)
        .returning(message.c.id.label("id"), message.c.vt.label("vt"))
    )


@cache
def requeue_candidates(tables: Tables) -> Executable:
    """Which of these ids are archived, and which live message has the key of one, or NULL.

    Binds: ids.
    """
    _, message, archived, _ = tables
    return (
        sa.select(
            archived.c.id,
            archived.c.dedup_key,
            message.c.id.label("live_id"),
        )
        .outerjoin(
            message,
            sa.and_(
                message.c.queue_id == archived.c.queue_id,
                message.c.dedup_key == archived.c.dedup_key,
            ),
        )
        .where(archived.c.id == func.any(array_bind("ids", sa.BigInteger)))
    )


@cache
def prune(tables: Tables, *, one_queue: bool) -> Executable:
    """Delete messages that were archived long enough ago, a chunk at a time, the oldest first.

    Binds: limit, older_than (a timedelta); queue when ``one_queue``.
    """
    order = _by_time(tables)
    return _prune(tables, interval_bind("older_than"), one_queue=one_queue, order=order)


@cache
def prune_by_retention(tables: Tables, *, failed: bool, one_queue: bool) -> Executable:
    """As `prune`, by the retentions of the queues.

    Those that failed are found through their own index, as a queue may keep them for much longer
    than the others: in the order of settling all of them would be read again each time.

    Binds: limit; queue when ``one_queue``.
    """
    queue, _, archived, _ = tables
    retention = queue.c.failed_retention_seconds if failed else queue.c.retention_seconds
    archived_outcome = sa.literal_column("'archived'", sa.Text)
    which = archived.c.outcome != archived_outcome
    if not failed:
        which = sa.or_(queue.c.failed_retention_seconds.is_(None), sa.not_(which))
    # A retention beyond a thousand years would leave the range of timestamps. NULL keeps the
    # rows: the comparison is then NULL as well.
    lasts = seconds(func.least(retention, 365_000 * 86_400.0, type_=sa.Double))
    # The order that the partial index has, and no other: so no other is chosen.
    order = (archived.c.outcome, archived.c.id) if failed else _by_time(tables)
    return _prune(tables, lasts, which, one_queue=one_queue, order=order)


def _by_time(tables: Tables) -> tuple[ColumnElement[Any], ...]:
    return (tables.archived.c.archived_at, tables.archived.c.id)


def _prune(
    tables: Tables,
    lasts: ColumnElement[Any],
    *which: ColumnElement[bool],
    one_queue: bool,
    order: Sequence[ColumnElement[Any]],
) -> Executable:
    queue, _, archived, _ = tables
    limit = sa.bindparam("limit", type_=sa.BigInteger)
    # Lateral, so that nothing is read of a queue but what goes.
    oldest = (
        sa.select(archived.c.id)
        .where(archived.c.queue_id == queue.c.id, archived.c.archived_at < now() - lasts, *which)
        .order_by(*order)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .lateral("oldest")
    )
    rows = sa.select(oldest.c.id).select_from(queue.join(oldest, sa.true())).limit(limit)
    if one_queue:
        rows = rows.where(queue.c.queue_name == sa.bindparam("queue"))
    chunk = materialized(rows, "pgqrs_rows")
    return sa.delete(archived).where(archived.c.id == func.any(ids_of(chunk)))


@cache
def delete(tables: Tables) -> Executable:
    """Delete archived messages. Binds: ids."""
    archived: Any = tables.archived
    return (
        sa.delete(archived)
        .where(archived.c.id == func.any(array_bind("ids", sa.BigInteger)))
        .returning(archived.c.id)
    )

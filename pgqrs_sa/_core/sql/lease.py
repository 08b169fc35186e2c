"""The UPDATE that leases messages, counts the attempt, and skips what others hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..states import now
from ..tables import Tables
from .fragments import (
    ATTEMPT,
    TableName,
    alias_short,
    content,
    hide_from_planner,
    in_rows,
    interval_bind,
    materialized,
    next_token,
    seconds,
    timestamp,
)

DELIVERED = ("id", *ATTEMPT, "dedup_key", "last_error", "leased_until", "fencing_token")
"""The columns of a message that a consumer is given: what a lease returns begins with these."""


@cache
def dequeue(tables: Tables, *, by_worker: bool, tracked: bool = True) -> Executable:
    """Lease the first visible messages of a queue: `dequeue_where` without criteria.

    It goes on from the places that the caller remembers: see `_core.cursor`. Levels without one
    are read from their beginning, and without any place it is a full scan.

    ``tracked`` returns more, to bring loaded objects up to date.

    One more bind, which may be left out: cursor, the places as JSON:
    ``{table: [{"level": …, "vt": …, "id": …}]}``. They are used only where the table, which each
    row has in ``cursor_table``, is still the same.
    """
    message = alias_short(tables.message)
    return _lease(message, _origin(tables, by_worker=by_worker), (), tracked=tracked)


def dequeue_where(
    tables: Tables, where: Sequence[sa.ColumnExpressionArgument[bool]], *, by_worker: bool
) -> Executable:
    """Lease the first visible messages of a queue that is not paused.

    The picked rows come from a CTE, which ``FOR UPDATE`` keeps from being inlined, so that the
    update can never touch more than it (an ``IN (subselect)`` can be run once for each row).

    The update changes no column that an index names: PostgreSQL then writes no index entry, and
    the row keeps its place in the queue (a "heap-only tuple",
    https://www.postgresql.org/docs/current/storage-hot.html).

    Binds: queue, limit, lease and attempts (None for the queue's own), worker.
    """
    message = tables.message  # by its own name, which the criteria use
    return _lease(message, _origin(tables, by_worker=by_worker), where, tracked=True)


def _origin(tables: Tables, *, by_worker: bool) -> sa.CTE:
    """The queue, unless it is paused, or the worker may not lease."""
    queue, worker = tables.queue.alias("q"), tables.worker.alias("w")
    columns = (queue.c.id, queue.c.lease_seconds, queue.c.max_read_ct, _cursor_table(tables))
    source = sa.select(*columns).where(
        queue.c.queue_name == sa.bindparam("queue"), queue.c.paused_at.is_(None)
    )
    if by_worker:
        ready = worker.c.status == sa.literal("ready")
        source = source.where(sa.exists().where(worker.c.id == _holder(), ready))
    return source.cte("pq_q")


def _holder() -> ColumnElement[Any]:
    return sa.bindparam("worker", type_=sa.BigInteger)


def _cursor_table(tables: Tables) -> ColumnElement[Any]:
    """Which table of messages this session sees: its number, after ``t`` if it hides some rows.

    Two sessions of one engine may have different tables under one name (``search_path``), and see
    different rows of one table (row-level security): ``t`` where that is active, ``f`` where not.
    A transaction that keeps one snapshot does not see what was committed since: it has the first
    letters of its isolation level before that.
    """
    name = TableName(tables.message)
    table = func.to_regclass(name).column_valued("t", joins_implicitly=True)
    isolation = _literal("nullif(left(current_setting('transaction_isolation'),4),'read')")
    number = sa.cast(table, postgresql.OID)
    return func.concat(isolation, func.row_security_active(table), number).label("cursor_table")


def _literal(text: str) -> ColumnElement[Any]:
    """A text, where SQLAlchemy would write a longer one: see `alias_short`."""
    return sa.literal_column(text)


_BEFORE_ALL, _AFTER_ALL = _literal("-32769"), _literal("32768")
"""Beyond any priority, which is a smallint."""

_BEGINNING = (_literal("timestamptz '-infinity'").label("vt"), _literal("bigint '0'").label("id"))
_THE_SAME = (_literal("'-infinity'").label("vt"), _literal("0").label("id"))  # in a UNION


def _known(origin: sa.CTE) -> sa.CTE:
    """The caller's cursor positions for the table that it sees now."""
    cursor = sa.cast(sa.bindparam("cursor", None, sa.Text), postgresql.JSONB)
    level, vt, id_ = (
        sa.column("level", sa.SmallInteger),
        sa.column("vt", timestamp),
        sa.column("id", sa.BigInteger),
    )
    rows = (
        func.jsonb_to_recordset(func.jsonb_extract_path(cursor, origin.c.cursor_table))
        .table_valued(level, vt, id_)
        .render_derived("k", with_types=True)
    )
    return sa.select(_literal("k.*")).select_from(sa.join(origin, rows, sa.true())).cte("pq_k")


def _levels(message: Any, origin: sa.CTE) -> sa.CTE:
    """The priorities in use, the most urgent first, each with where to begin.

    After one level comes the next one in the index that is not known, up to the next that is: a
    look into the index for each (https://wiki.postgresql.org/wiki/Loose_indexscan), which never
    touches the entries of a level that is known. Asked level by level, a dequeue does not read
    through the scheduled messages of a level to come to the next one either.
    """
    known = _known(origin)
    level = _literal("pq_k.level")
    found = sa.select(_BEFORE_ALL.label("level"), *_BEGINNING).cte("pq_l", recursive=True)
    first = _literal("1")  # no bind, which a plan for any values would not see
    further = level > found.c.level
    bound = sa.select(func.min(level).label("x")).select_from(known).where(further).correlate(found)
    unknown = (
        sa.select(message.c.priority.label("level"), *_THE_SAME)
        .where(
            message.c.queue_id == sa.select(origin.c.id).scalar_subquery(),
            message.c.priority > found.c.level,
            message.c.priority < func.coalesce(bound.scalar_subquery(), _AFTER_ALL),
        )
        .correlate(found)
        .order_by(message.c.priority)
        .limit(first)
    )
    later = sa.select(level, _literal("pq_k.vt"), _literal("pq_k.id")).select_from(known)
    later = later.where(further).correlate(found)
    either = sa.union_all(unknown, later).order_by("level").limit(first).lateral("n")
    step = sa.select(_literal("n.level"), _literal("n.vt"), _literal("n.id"))
    return found.union_all(step.select_from(sa.join(found, either, sa.true())))


def _lease(
    message: Any,
    origin: sa.CTE,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
    *,
    tracked: bool,
) -> Executable:
    # A limit that the planner cannot see it takes for a tenth of the rows, and walks the index in
    # its order. Seeing 50, where it believes in fewer rows than that, it sorts the whole backlog:
    # a queue table is often analysed while it is empty.
    limit = hide_from_planner(sa.bindparam("limit", type_=sa.BigInteger))
    levels = _levels(message, origin)
    visible = (
        sa.select(message.c.id)
        .where(
            message.c.queue_id == sa.select(origin.c.id).scalar_subquery(),
            message.c.priority == levels.c.level,
            # By row: a bulk insert gives many messages the same vt.
            sa.tuple_(message.c.vt, message.c.id) > sa.tuple_(levels.c.vt, levels.c.id),
            states.ready(message.c),
            *where,
        )
        .correlate(levels, origin)
        .order_by(message.c.vt, message.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=message)
        .lateral("v")
    )
    # The levels come in their order, and what is not needed of the last one is not locked. The
    # token is drawn here, for the rows that the limit lets through and that are locked by now: of
    # two leases of a message the later one has the greater token.
    any_level = levels.c.level > _BEFORE_ALL
    first = (
        sa.select(*visible.c, next_token(message).label("token"))
        .select_from(sa.join(levels, visible, any_level))
        .limit(limit)
    )
    picked = materialized(first, "pq_p")
    lease = func.coalesce(
        interval_bind("lease"), seconds(sa.select(origin.c.lease_seconds).scalar_subquery())
    )
    limit_of_queue = sa.select(origin.c.max_read_ct).scalar_subquery()
    texts = {column.name: column for column in content(message)}
    as_text = {"payload", "headers"}
    return (
        sa.update(message)
        .where(in_rows(message, picked))
        .values(
            leased_until=now() + lease,
            read_ct=message.c.read_ct + sa.literal_column("1"),
            max_read_ct=func.coalesce(
                message.c.max_read_ct, sa.bindparam("attempts", type_=sa.Integer), limit_of_queue
            ),
            dequeued_at=now(),
            consumer_worker_id=_holder(),
            fencing_token=picked.c.token,
        )
        .returning(
            *(texts[name] if name in as_text else message.c[name] for name in DELIVERED),
            sa.select(origin.c.cursor_table).scalar_subquery().label("cursor_table"),
            *(message.c[name] for name in ("consumer_worker_id", "dequeued_at") if tracked),
        )
    )

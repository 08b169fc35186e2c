"""Statements of a consumer's own connection: one settles and leases."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import Executable

from .. import states
from ..states import now
from ..tables import Tables
from . import lease, settle
from .fragments import (
    MOVED,
    array_bind,
    clamp_attempts,
    interval_bind,
    queue_id,
    timestamp,
    update_free,
)


@cache
def settle_and_lease(tables: Tables) -> Executable:
    """Archive messages that are done, and lease the next: one round trip, one commit.

    The two are about different rows, so that it does not matter in which order the server does
    them. One row tells in ``settled`` what was archived (or NULL), and is NULL otherwise; the
    others begin like those that `lease.dequeue` returns, up to ``cursor_table``.

    Binds: those of `lease.dequeue` and of `settle.archive_plainly`.
    """
    leased = lease.dequeue(tables, by_worker=True, tracked=False).cte("pq_leased")  # type: ignore[attr-defined]
    settled = settle.archive_done(tables).cte("pq_settled")  # type: ignore[attr-defined]
    # In a row of its own: beside each message, 50 of them would be sent 50 times.
    ids = sa.select(sa.func.array_agg(settled.c.id).label("x")).scalar_subquery()
    told = sa.select(ids.label("settled")).subquery("told")
    # Not named one by one, as in `move_to_archive`.
    wanted: sa.ColumnElement[Any] = sa.literal_column("pq_leased.*")
    both = sa.outerjoin(told, leased, sa.false(), full=True)
    return sa.select(wanted, told.c.settled).select_from(both)


@cache
def check_queues(tables: Tables) -> Executable:
    """A row (queue, found) for each of these queues that has something to do.

    ``found`` is ``ready`` (visible, in a queue that is not paused, and the worker may lease),
    ``exhausted`` (messages without attempts, which are to become dead letters), or ``missing`` (no
    queue has this name). A queue that has nothing costs one look into each of two indexes.

    Binds: queues, worker.
    """
    queue, message, _, worker = tables
    names = array_bind("queues", sa.Text)
    asked = (
        sa.select(queue.c.id, queue.c.queue_name, queue.c.paused_at)
        .where(queue.c.queue_name == sa.func.any(names))
        .cte("pgqrs_asked")
    )
    leasing = sa.exists().where(
        worker.c.id == sa.bindparam("worker", type_=sa.BigInteger),
        worker.c.status == sa.literal("ready"),
    )
    levels = _levels(message, sa.select(asked.c.id).where(asked.c.paused_at.is_(None), leasing))
    visible = _first(
        message.c.vt,
        message.c.queue_id == levels.c.id,
        message.c.priority == levels.c.level,
        states.ready(message.c),
    )
    ready = sa.select(levels.c.id).where(levels.c.level.is_not(None), visible.is_not(None))
    spent = _first(message.c.vt, message.c.queue_id == asked.c.id, states.exhausted(message.c))
    name = sa.func.unnest(names).column_valued("pgqrs_name")
    return sa.union_all(
        _found("ready", asked.c.queue_name).where(asked.c.id.in_(ready)),
        _found("exhausted", asked.c.queue_name).where(spent.is_not(None)),
        _found("missing", name).where(name.not_in(sa.select(asked.c.queue_name))),
    )


def _levels(message: sa.Table, queues: sa.Select[Any]) -> sa.CTE:
    """The levels of priority of each of these queues, then NULL.

    One look into the index for each level, as in `lease.dequeue`: a queue of scheduled messages
    would be read to its end otherwise.
    """
    priority, attempts = message.c.priority, states.has_attempts(message.c)
    queue = queues.subquery("pgqrs_open")
    level = _first(priority, message.c.queue_id == queue.c.id, attempts).label("level")
    found = sa.select(queue.c.id, level).cte("pgqrs_levels", recursive=True)
    further = _first(priority, message.c.queue_id == found.c.id, attempts, priority > found.c.level)
    return found.union_all(sa.select(found.c.id, further).where(found.c.level.is_not(None)))


def _first(column: sa.Column[Any], *where: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    """The least value of a column, by an index: EXISTS may become a join that reads the table."""
    # No bind as the limit, which a plan for any values would not see.
    least = sa.select(column).where(*where).order_by(column).limit(sa.literal_column("1"))
    return least.scalar_subquery()


def _found(what: str, name: sa.ColumnElement[str]) -> Any:
    return sa.select(name.label("queue"), sa.literal_column(f"'{what}'", sa.Text).label("found"))


@cache
def release_unanswered(tables: Tables) -> Executable:
    """Release, uncharged, the leases of a statement whose reply the worker did not get.

    Such a lease began while the worker waited for the reply, and nobody has extended it since. Its
    length is that of no other lease: each run of a consumer adds some microseconds of its own.

    Binds: worker_id, queue, lease, since, until (between which moments it began), known (the
    fencing tokens of leases that are left alone).
    """
    message = tables.message
    unknown = update_free(
        message,
        "pgqrs_unknown",
        message.c.consumer_worker_id == sa.bindparam("worker_id", type_=sa.BigInteger),
        message.c.queue_id == queue_id(tables),
        message.c.dequeued_at.between(
            sa.bindparam("since", type_=timestamp), sa.bindparam("until", type_=timestamp)
        ),
        message.c.vt == message.c.dequeued_at + interval_bind("lease"),
        # Not NOT (token = ANY(...)): SQLAlchemy 2.0 makes token != ANY(...) of that.
        message.c.fencing_token != sa.func.all(array_bind("known", sa.BigInteger)),
    )
    return unknown.values(
        vt=now(),
        max_read_ct=clamp_attempts(sa.cast(message.c.max_read_ct, sa.BigInteger) + 1),
        dequeued_at=None,
        consumer_worker_id=None,
    ).returning(message.c.id, *(message.c[name] for name in MOVED))


@cache
def clock() -> Executable:
    """The database's clock."""
    return sa.select(now())


@cache
def lock_messages(tables: Tables) -> Executable:
    """Lock messages that are held, so that nobody changes them until the transaction ends.

    Binds: ids, tokens.
    """
    rows = settle.held(tables)
    return sa.select(rows.c.id)


@cache
def try_housekeeping_lock(tables: Tables) -> Executable:
    """Try to take the housekeeping lock: one consumer at a time, until the transaction ends."""
    name = tables.message.fullname
    return sa.select(
        sa.func.pg_try_advisory_xact_lock(sa.func.hashtext(f"pgqrs:housekeeping:{name}"))
    )


@cache
def server_info() -> Executable:
    """The properties of the server that a consumer checks before it starts."""
    setting = sa.func.current_setting
    return sa.select(
        sa.func.pg_is_in_recovery().label("standby"),
        (setting("transaction_read_only") == "on").label("read_only"),
        setting("default_transaction_isolation").label("isolation"),
    )

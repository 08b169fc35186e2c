"""Statements of a consumer's own connection: one settles and leases."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import Executable

from ..states import now
from ..tables import Tables
from . import lease, settle
from .fragments import (
    MOVED,
    NO_LEASE,
    array_bind,
    clamp_attempts,
    first_visible,
    interval_bind,
    queue_id,
    queue_levels,
    timestamp,
    update_free,
)

_LOOK = 20
"""At how many visible messages of each level `check_queues` looks."""


@cache
def settle_and_lease(tables: Tables) -> Executable:
    """Archive messages that are done, and lease the next: one round trip, one commit.

    The two are about different rows, so that it does not matter in which order the server does
    them. One row tells in ``settled`` what was archived (or NULL), and is NULL otherwise; the
    others begin like those that `lease.dequeue` returns, up to ``cursor_table``.

    Binds: those of `lease.dequeue` and of `settle.archive_done`.
    """
    leased = lease.dequeue(tables, by_worker=True, tracked=False).cte("pq_leased")  # type: ignore[attr-defined]
    settled = settle.archive_done(tables).subquery("s")
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
    queue has this name). Where all that was looked at is exhausted, there may be more behind it,
    and the queue is ready too. A queue that has nothing costs one look into the index.

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
    levels = queue_levels(message, sa.select(asked.c.id))
    visible = first_visible(message, levels, sa.literal_column(str(_LOOK)))
    seen = (
        sa.select(
            levels.c.id,
            sa.or_(sa.func.bool_or(visible.c.more), sa.func.count() >= _LOOK).label("ready"),
            sa.func.bool_or(sa.not_(visible.c.more)).label("exhausted"),
        )
        .select_from(sa.join(levels, visible, levels.c.level.is_not(None)))
        .group_by(levels.c.id, levels.c.level)
        .cte("pgqrs_seen")
    )
    ready = sa.select(seen.c.id).where(seen.c.ready)
    exhausted = sa.select(seen.c.id).where(seen.c.exhausted)
    name = sa.func.unnest(names).column_valued("pgqrs_name")
    return sa.union_all(
        _found("ready", asked.c.queue_name).where(
            asked.c.id.in_(ready), asked.c.paused_at.is_(None), leasing
        ),
        _found("exhausted", asked.c.queue_name).where(asked.c.id.in_(exhausted)),
        _found("missing", name).where(name.not_in(sa.select(asked.c.queue_name))),
    )


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
        message.c.leased_until == message.c.dequeued_at + interval_bind("lease"),
        # Not NOT (token = ANY(...)): SQLAlchemy 2.0 makes token != ANY(...) of that.
        message.c.fencing_token != sa.func.all(array_bind("known", sa.BigInteger)),
    )
    return unknown.values(
        max_read_ct=clamp_attempts(sa.cast(message.c.max_read_ct, sa.BigInteger) + 1),
        **NO_LEASE,
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

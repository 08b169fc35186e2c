"""What a consumer's own connection executes: one statement acknowledges and leases."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import Executable

from .. import states
from ..models import Models
from ..states import now
from . import lease, settle
from .parts import MOVED, array_bind, capped, chosen, queue_id, span, tables, timestamp


@cache
def turn(models: Models) -> Executable:
    """Archive what is done, and lease what comes next: one round trip, one commit.

    The two are about different rows, so that it does not matter in which order the server does
    them. One row tells in ``settled`` what was archived (or NULL), and is NULL otherwise; the
    others begin like those that `lease.dequeue` returns, up to ``cursor_table``.

    Binds: those of `lease.dequeue` and of `settle.archive_plainly`.
    """
    leased = lease.dequeue(models, by_worker=True, tracked=False).cte("pq_leased")  # type: ignore[attr-defined]
    settled = settle.archive_plainly(models).cte("pq_settled")  # type: ignore[attr-defined]
    # In a row of its own: beside each message, 50 of them would be sent 50 times.
    ids = sa.select(sa.func.array_agg(settled.c.id)).scalar_subquery()
    told = sa.select(ids.label("settled")).subquery("told")
    # Not named one by one, as in `move_to_archive`.
    wanted: sa.ColumnElement[Any] = sa.literal_column("pq_leased.*")
    both = sa.outerjoin(told, leased, sa.false(), full=True)
    return sa.select(wanted, told.c.settled).select_from(both)


@cache
def anything_ready(models: Models) -> Executable:
    """Whether something is visible in queues, and not paused. Binds: queues, worker."""
    queue, message, _, worker = tables(models)
    ready = (
        sa.select(message.c.id)
        .where(message.c.queue_id == queue.c.id, states.ready(message.c))
        .correlate(queue)
    )
    mine = sa.exists().where(
        worker.c.id == sa.bindparam("worker", type_=sa.BigInteger),
        worker.c.status == sa.literal("ready"),
    )
    there = sa.exists().where(
        queue.c.queue_name == sa.func.any(array_bind("queues", sa.Text)),
        queue.c.paused_at.is_(None),
        sa.exists(ready),
    )
    return sa.select(sa.and_(mine, there))


@cache
def hand_back(models: Models) -> Executable:
    """Give back, uncharged, what a worker has leased by a statement whose reply it did not get.

    Such a lease began while the worker waited for the reply, and nobody has extended it since.

    Binds: worker_id, queue, lease, since, until (between which moments it began), known (the
    fencing tokens of leases that are left alone).
    """
    message = tables(models).message
    unknown = (
        sa.select(message.c.id)
        .where(
            message.c.consumer_worker_id == sa.bindparam("worker_id", type_=sa.BigInteger),
            message.c.queue_id == queue_id(models),
            message.c.dequeued_at.between(
                sa.bindparam("since", type_=timestamp), sa.bindparam("until", type_=timestamp)
            ),
            message.c.vt == message.c.dequeued_at + span("lease"),
            # Not NOT (token = ANY(...)): SQLAlchemy 2.0 makes token != ANY(...) of that.
            message.c.fencing_token != sa.func.all(array_bind("known", sa.BigInteger)),
        )
        .order_by(message.c.id)
        .with_for_update(skip_locked=True)
    )
    rows = chosen(unknown, "pgqrs_unknown")
    return (
        sa.update(message)
        .where(message.c.id == rows.c.id)
        .values(
            vt=now(),
            max_read_ct=capped(sa.cast(message.c.max_read_ct, sa.BigInteger) + 1),
            dequeued_at=None,
            consumer_worker_id=None,
        )
        .returning(message.c.id, *(message.c[name] for name in MOVED))
    )


@cache
def clock() -> Executable:
    """The database's clock."""
    return sa.select(now())


@cache
def hold(models: Models) -> Executable:
    """Lock messages that are held, so that nobody changes them until the transaction ends.

    Binds: ids, tokens.
    """
    rows = settle.held(models)
    return sa.select(rows.c.id)


@cache
def house_free(models: Models) -> Executable:
    """Try for the right to tidy up: one consumer at a time, for the length of a transaction."""
    name = tables(models).message.fullname
    return sa.select(
        sa.func.pg_try_advisory_xact_lock(sa.func.hashtext(f"pgqrs:housekeeping:{name}"))
    )


@cache
def surroundings() -> Executable:
    """What a consumer asks of the server before it starts."""
    setting = sa.func.current_setting
    return sa.select(
        sa.func.pg_is_in_recovery().label("standby"),
        (setting("transaction_read_only") == "on").label("read_only"),
        setting("default_transaction_isolation").label("isolation"),
    )

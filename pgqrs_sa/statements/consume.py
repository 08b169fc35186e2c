"""What a consumer's own connection executes: one statement acknowledges and leases."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from sqlalchemy.sql import Executable

from ..models import Models
from ..states import now
from . import lease, settle
from .parts import MOVED, array_bind, capped, chosen, tables


@cache
def turn(models: Models, *, floored: bool) -> Executable:
    """Archive what is done, and lease what comes next: one round trip, one commit.

    The two are about different rows, so that it does not matter in which order the server does
    them. A row with a ``settled_id`` tells of the one, the others are what `lease.dequeue` returns.

    Binds: those of `lease.dequeue` and of `settle.archive`.
    """
    leased = lease.dequeue(models, by_worker=True, floored=floored).cte("pgqrs_leased")  # type: ignore[attr-defined]
    settled = settle.archive(models, skip_locked=True).cte("pgqrs_settled")  # type: ignore[attr-defined]
    nothing = [sa.cast(sa.null(), column.type).label(column.name) for column in leased.c]
    none = sa.cast(sa.null(), sa.BigInteger).label("settled_id")
    return sa.union_all(
        sa.select(none, *leased.c), sa.select(settled.c.id.label("settled_id"), *nothing)
    )


@cache
def hand_back(models: Models) -> Executable:
    """Give back, uncharged, what a worker holds besides the messages that it knows of.

    Binds: worker_id, known.
    """
    message = tables(models).message
    unknown = (
        sa.select(message.c.id)
        .where(
            message.c.consumer_worker_id == sa.bindparam("worker_id", type_=sa.BigInteger),
            message.c.dequeued_at.is_not(None),
            sa.not_(message.c.id == sa.func.any(array_bind("known", sa.BigInteger))),
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
def hold(models: Models) -> Executable:
    """Lock messages that are held, so that nobody changes them until the transaction ends.

    Binds: ids, read_cts, workers.
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

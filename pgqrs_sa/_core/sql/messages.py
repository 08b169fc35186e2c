"""Messages that nobody holds: cancel, reschedule, and the reason why one could not be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import Executable, Select

from .. import states
from ..states import now
from ..tables import Tables
from .fragments import (
    MOVED,
    NO_LEASE,
    alias_short,
    array_bind,
    in_list,
    interval_bind,
    json_bind,
    materialized,
    move_to_archive,
    queue_id,
    timestamp,
)


def _cancelled(tables: Tables, unheld: Select[Any]) -> Executable:
    """Move the rows of ``unheld`` (ids, locked in their order) to the archive.

    Binds: reason, and those of ``unheld``.
    """
    return move_to_archive(
        tables,
        in_list(alias_short(tables.message), materialized(unheld, "pgqrs_unheld")),
        outcome=sa.literal("cancelled", sa.Text),
        reason=sa.bindparam("reason", type_=sa.Text),
    )


@cache
def cancel(tables: Tables) -> Executable:
    """Archive messages as cancelled, unless they are leased.

    Binds: ids, reason.
    """
    message = tables.message
    unheld = (
        sa.select(message.c.id)
        .where(
            message.c.id == func.any(array_bind("ids", sa.BigInteger)), states.unleased(message.c)
        )
        .order_by(message.c.id)
        .with_for_update()
    )
    return _cancelled(tables, unheld)


def cancel_where(
    tables: Tables, criteria: Sequence[sa.ColumnExpressionArgument[bool]], *, by_payload: bool
) -> Executable:
    """Archive the messages of a queue that match and that nobody holds, as cancelled.

    Binds: queue, reason, and contains (JSON text) when ``by_payload``.
    """
    message = tables.message
    unheld = (
        sa.select(message.c.id)
        .where(message.c.queue_id == queue_id(tables), states.unleased(message.c), *criteria)
        .order_by(message.c.id)
        .with_for_update(of=message)
    )
    if by_payload:
        unheld = unheld.where(message.c.payload.contains(json_bind("contains")))
    return _cancelled(tables, unheld)


@cache
def reschedule(tables: Tables) -> Executable:
    """Move a message that nobody holds to another time; one out of attempts gets another.

    Binds: message_id, delay, at.
    """
    message = tables.message
    return (
        sa.update(message)
        .where(
            message.c.id == sa.bindparam("message_id", type_=sa.BigInteger),
            states.unleased(message.c),
        )
        .values(
            # As `visible_at`, without COALESCE, where Citus refuses what is not IMMUTABLE.
            vt=func.greatest(
                sa.bindparam("at", type_=timestamp), now() + interval_bind("delay"), now()
            ),
            max_read_ct=sa.case(
                (message.c.max_read_ct <= message.c.read_ct, message.c.read_ct + 1),
                else_=message.c.max_read_ct,
            ),
            **NO_LEASE,
        )
        .returning(message.c.id, *(message.c[name] for name in MOVED))
    )


@cache
def leased_until(tables: Tables) -> Executable:
    """Which of these messages are live, and until when each is leased (NULL: it is not).

    Binds: ids.
    """
    message = tables.message
    until = sa.case((states.leased(message.c), message.c.leased_until)).label("until")
    return sa.select(message.c.id, until).where(
        message.c.id == func.any(array_bind("ids", sa.BigInteger))
    )

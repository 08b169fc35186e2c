"""What a flush asks before it inserts messages that were added to the session.

These are functions of tables, not of `Models`: a flush knows only the message's own class.
"""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql import Executable

from .fragments import array_bind


@cache
def accepts(queues: sa.Table, messages: sa.Table) -> Executable:
    """What the queues that messages name accept.

    An INSERT of nothing takes the lock of one that inserts, so that a queue which is found here
    is not deleted before the messages are in it: see `queues.keep_writers_out`.

    Binds: names, ids.
    """
    queue = queues.c
    nothing = sa.select(sa.literal(0), sa.cast("null", JSONB)).where(sa.false())
    writing = (
        sa.insert(messages)
        .from_select(["queue_id", "payload"], nothing)
        .returning(messages.c.id)
        .cte("pgqrs_writing")
    )
    return (
        sa.select(queue.id, queue.queue_name, queue.max_payload_bytes)
        .where(
            sa.or_(
                queue.queue_name == func.any(array_bind("names", sa.Text)),
                queue.id == func.any(array_bind("ids", sa.BigInteger)),
            )
        )
        .add_cte(writing)
    )


@cache
def keyed(messages: sa.Table) -> Executable:
    """The live messages of some queues that have one of these keys. Binds: ids, keys."""
    message = messages.c
    return sa.select(message.id, message.queue_id, message.dedup_key).where(
        message.queue_id == func.any(array_bind("ids", sa.BigInteger)),
        message.dedup_key == func.any(array_bind("keys", sa.Text)),
    )


@cache
def names(queues: sa.Table) -> Executable:
    """The names of all queues."""
    return sa.select(queues.c.queue_name).order_by(queues.c.queue_name)

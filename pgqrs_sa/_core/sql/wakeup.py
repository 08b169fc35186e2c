"""Waking consumers: who waits, on which channel, and the NOTIFY that is part of an enqueue.

A consumer that has been idle for a while says until when it will be waiting, and only then is
anybody notified: a NOTIFY in every enqueue makes all commits queue up on one lock of the server
(measured with 8 producers: 0.35 of the rate; 0.95 when it depends on a consumer that waits).

A notification is a hint. An enqueue whose statement began before the consumer said that it waits,
and whose transaction commits after the consumer looked once more, sends none.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..states import now
from ..tables import Tables
from .fragments import array_bind, interval_bind


@cache
def channel(schema: str | None) -> str:
    """The channel of the tables in a schema; None is the default one, and taken for ``public``.

    Channels belong to a database. A hash keeps the name short enough for every schema's.
    """
    return f"pgqrs_{sha256((schema or 'public').encode()).hexdigest()[:16]}"


@cache
def waiting(tables: Tables) -> Executable:
    """Store for how long from now a worker waits to be woken. Binds: worker_id, span (or None)."""
    worker = tables.worker
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("worker_id", type_=sa.BigInteger))
        .values(waiting_until=now() + interval_bind("span"))
    )


@cache
def notice(tables: Tables) -> ColumnElement[Any]:
    """The column of an INSERT's RETURNING that notifies of a visible message, if anybody waits.

    Binds: channel, queue.
    """
    _, message, _, worker = tables
    wanted = sa.and_(message.c.vt <= now(), awaited(worker))
    return sa.case((wanted, notify())).label("notified")


@cache
def awaited(worker: sa.Table) -> ColumnElement[bool]:
    """Whether some consumer waits for a queue. Binds: queue."""
    return _awaited(worker, sa.bindparam("queue", type_=sa.Text))


@cache
def notify() -> ColumnElement[Any]:
    """Notify of a queue, where it is awaited and something is visible. Binds: channel, queue."""
    return _notify(sa.bindparam("queue", type_=sa.Text))


@cache
def visible(
    queues: sa.Table,
    messages: sa.Table,
    workers: sa.Table,
    *,
    notify: bool,
    inserted: bool = False,
) -> Executable:
    """The names of the queues in which some of these messages are visible.

    With ``notify`` those for which a consumer waits are notified. With ``inserted`` the messages
    are new, and nobody has leased one: a producer has no right to see leases. It takes the tables
    that it needs, as a flush knows only the class of the message.

    Binds: ids; channel with ``notify``.
    """
    ids = array_bind("ids", sa.BigInteger)
    there = sa.select(messages.c.queue_id).where(
        messages.c.id == func.any(ids), messages.c.vt <= now()
    )
    if not inserted:
        there = there.where(states.unleased(messages.c))
    name = queues.c.queue_name
    statement = sa.select(name).where(queues.c.id.in_(there))
    if not notify:
        return statement
    told = sa.case((_awaited(workers, name), _notify(name)))
    return statement.add_columns(told.label("notified"))


def _awaited(worker: sa.Table, queue: ColumnElement[str]) -> ColumnElement[bool]:
    waits = sa.select(worker.c.waiting_until).where(  # not *, for which no producer has the right
        worker.c.status == sa.literal("ready"),
        worker.c.waiting_until > now(),
        queue == func.any(worker.c.queues),
    )
    return sa.exists(waits)


def _notify(queue: ColumnElement[str]) -> ColumnElement[Any]:
    # It returns void, a type that not every driver reads: the question is one that it does.
    return func.pg_notify(sa.bindparam("channel", type_=sa.Text), queue).is_(None)

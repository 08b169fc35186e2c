"""Counts of the live messages of queues by state, and of their archive by outcome.

All queues are counted by one grouped read of the live messages. One queue is counted from its
own entries in the two partial indexes, which together have every live message.

The archive may be large, and is counted up to a cap. A count that has reached its cap is a lower
bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.selectable import LateralFromClause

from .. import states
from ..tables import Tables
from .fragments import QUEUE_ID, elapsed

MOST = 10_000
"""Up to how many settled messages of a queue are counted, for each outcome."""

MOST_OF_ALL = 200_000
"""Up to how many are counted for each outcome in all queues together, in equal shares."""

_NAMES = {
    "dead": sa.literal_column("'dead'", sa.Text),
    "cancelled": sa.literal_column("'cancelled'", sa.Text),
    "discarded": sa.literal_column("'discarded'", sa.Text),
}

NOT_DONE = tuple(_NAMES)
"""The outcomes that have a partial index."""

STATES = ("ready", "scheduled", "leased", "exhausted")


def of_state(message: Any, state: str) -> ColumnElement[int]:
    """How many of the rows that are grouped are in a state."""
    return func.count().filter(getattr(states, state)(message)).label(state)


def age(message: Any, state: str, name: str) -> ColumnElement[Any]:
    """For how long the oldest of the rows that are grouped has been visible in a state."""
    oldest = func.min(message.vt).filter(getattr(states, state)(message))
    return elapsed(states.now() - oldest).label(name)


def live_by_queue(tables: Tables, *columns: ColumnElement[Any]) -> sa.Subquery:
    """Aggregates over the live messages of each queue that has any: one read of the table."""
    message = tables.message
    grouped = sa.select(message.c.queue_id, *columns).group_by(message.c.queue_id)
    return grouped.subquery("live")


def live_of_queue(tables: Tables) -> sa.Subquery:
    """The counts of one queue, from its own index entries. Binds: queue_id.

    What is visible is counted in the indexes alone where vacuum has been; only of what is not
    are the rows looked at, to tell a lease from a schedule.
    """
    message = tables.message

    def own(*criteria: ColumnElement[bool]) -> sa.Select[Any]:
        return sa.select().where(message.c.queue_id == QUEUE_ID, *criteria)

    def visible(state: str) -> sa.Subquery:
        columns = (func.count().label("found"), func.min(message.c.vt).label("oldest"))
        found = own(getattr(states, state)(message.c)).add_columns(*columns)
        return found.select_from(message).subquery(state)

    waiting = sa.union_all(
        *(
            own(attempts, states.invisible(message.c)).add_columns(message.c.dequeued_at)
            for attempts in (states.has_attempts(message.c), spent(message.c))
        )
    ).subquery("waiting")
    scheduled = waiting.c.dequeued_at.is_(None)
    hidden = sa.select(
        func.count().filter(scheduled).label("scheduled"),
        func.count().filter(sa.not_(scheduled)).label("leased"),
    ).subquery("hidden")
    ready, exhausted = visible("ready"), visible("exhausted")
    return (
        sa.select(
            ready.c.found.label("ready"),
            hidden.c.scheduled,
            hidden.c.leased,
            exhausted.c.found.label("exhausted"),
            elapsed(states.now() - ready.c.oldest).label("oldest_ready_age"),
        )
        .select_from(ready.join(exhausted, sa.true()).join(hidden, sa.true()))
        .subquery("live")
    )


def in_queue(message: Any) -> ColumnElement[bool]:
    """It is of one queue. Binds: queue_id.

    Every message either has attempts or is spent. Said in so many words, it lets PostgreSQL
    read a queue from the two partial indexes, which together have all of it.
    """
    return sa.and_(
        message.queue_id == QUEUE_ID, sa.or_(states.has_attempts(message), spent(message))
    )


def spent(message: Any) -> ColumnElement[bool]:
    """No further attempt is allowed: word for word the predicate of the index of these."""
    return message.read_ct >= message.max_read_ct  # type: ignore[no-any-return]


def cap(tables: Tables) -> ColumnElement[int]:
    """Up to how many settled messages of each queue are counted, for each outcome."""
    queues = sa.select(func.count()).select_from(tables.queue).scalar_subquery()
    share = sa.literal(MOST_OF_ALL, sa.BigInteger) // queues
    most = sa.cast(func.greatest(1, func.least(MOST, share)), sa.Integer).label("most")
    return sa.select(sa.select(most).cte("pgqrs_cap").c.most).scalar_subquery()


def not_done(tables: Tables, outcome: str, most: ColumnElement[int]) -> LateralFromClause:
    """``found``: how many of a queue had this outcome, up to one more than ``most``."""
    archived = tables.archived
    rows = (
        sa.select(archived.c.id)
        .where(
            archived.c.queue_id == tables.queue.c.id,
            # The predicate of the partial index, and a range where one value is meant: then the
            # order is one that this index has and no other, and none else can be chosen, be the
            # outcome common or missing.
            archived.c.outcome != sa.literal_column("'archived'", sa.Text),
            archived.c.outcome.between(_NAMES[outcome], _NAMES[outcome]),
        )
        .order_by(archived.c.outcome, archived.c.id)
    )
    return _number(archived, rows.limit(most + 1), outcome)


def settled(
    tables: Tables, most: ColumnElement[int], others: Sequence[LateralFromClause]
) -> LateralFromClause:
    """``found``: how many of a queue were settled, up to one more than ``most`` and ``others``.

    So that what is left without the others is what was done, up to one more than ``most``.
    """
    archived = tables.archived
    rows = (
        sa.select(archived.c.id)
        .where(archived.c.queue_id == tables.queue.c.id)
        .order_by(archived.c.archived_at.desc(), archived.c.id.desc())
    )
    limit = most + 1
    for other in others:
        limit += other.c.found
    return _number(archived, rows.limit(limit), "settled")


def outcomes(tables: Tables, *, one_queue: bool) -> sa.Subquery:
    """All settled messages of each queue that has any, or of one, by outcome.

    Binds: queue_id when ``one_queue``.
    """
    archived = tables.archived
    found = sa.select(
        archived.c.queue_id,
        func.count().label("settled"),
        *(
            func.count().filter(archived.c.outcome == sa.literal(outcome)).label(outcome)
            for outcome in NOT_DONE
        ),
    ).group_by(archived.c.queue_id)
    if one_queue:
        found = found.where(archived.c.queue_id == QUEUE_ID)
    return found.subquery("history")


def _number(archived: sa.Table, rows: sa.Select[Any], name: str) -> LateralFromClause:
    found = rows.correlate_except(archived).subquery()
    return sa.select(func.count().label("found")).select_from(found).lateral(name)

"""Counts of the live messages of queues by state, and of their archive by outcome.

The live messages of all queues are counted by one grouped read of the table, those of one queue by
a read of its own. No index tells what is leased: a lease changes no column that an index names.

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
    oldest = func.min(states.visible_since(message)).filter(getattr(states, state)(message))
    return elapsed(states.now() - oldest).label(name)


def live_by_queue(
    tables: Tables, *columns: ColumnElement[Any], one_queue: bool = False
) -> sa.Subquery:
    """Aggregates over the live messages of each queue that has any, or of one.

    Binds: queue_id when ``one_queue``.
    """
    message = tables.message
    grouped = sa.select(message.c.queue_id, *columns).group_by(message.c.queue_id)
    if one_queue:
        grouped = grouped.where(message.c.queue_id == QUEUE_ID)
    return grouped.subquery("live")


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

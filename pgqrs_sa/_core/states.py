"""The states of a message as SQL: the one definition for the models and for the statements.

Each function takes an object with the columns: a mapped class, an alias, or ``table.c``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement

__all__ = [
    "exhausted",
    "has_attempts",
    "leased",
    "never_past",
    "now",
    "ready",
    "scheduled",
    "state",
    "unleased",
    "visible_since",
]


def now() -> ColumnElement[Any]:
    """The database's clock, as of the start of the statement.

    ``now()`` would stand still for the length of a transaction, and ``clock_timestamp()`` cannot
    be compared with through an index.
    """
    return func.statement_timestamp(type_=sa.DateTime(timezone=True))


def never_past(moment: datetime) -> ColumnElement[Any]:
    """A time as a value of ``vt``: one that has passed means now."""
    return func.greatest(sa.literal(moment, sa.DateTime(timezone=True)), func.statement_timestamp())


def has_attempts(message: Any) -> ColumnElement[bool]:
    """Another attempt is allowed."""
    return sa.or_(message.max_read_ct.is_(None), message.read_ct < message.max_read_ct)


def leased(message: Any) -> ColumnElement[bool]:
    """A consumer holds it, and the lease has not expired."""
    # Said of NULL, too, so that the opposite of this finds the messages without a lease.
    return sa.and_(message.leased_until.is_not(None), message.leased_until > now())


def unleased(message: Any) -> ColumnElement[bool]:
    """No consumer holds it, or the lease has expired."""
    return sa.or_(message.leased_until.is_(None), message.leased_until <= now())


def ready(message: Any) -> ColumnElement[bool]:
    """Visible, with attempts left."""
    return sa.and_(message.vt <= now(), unleased(message), has_attempts(message))


def exhausted(message: Any) -> ColumnElement[bool]:
    """Visible, but with no attempts left."""
    # Said of NULL, too, so that the opposite of this finds the messages without a limit.
    spent = sa.and_(message.max_read_ct.is_not(None), message.read_ct >= message.max_read_ct)
    return sa.and_(message.vt <= now(), unleased(message), spent)


def scheduled(message: Any) -> ColumnElement[bool]:
    """Waiting for its time, without a lease."""
    return sa.and_(message.vt > now(), unleased(message))


def state(message: Any) -> ColumnElement[str]:
    """The name of its state."""
    return sa.case(
        (leased(message), _name("leased")),
        (message.vt > now(), _name("scheduled")),
        (has_attempts(message), _name("ready")),
        else_=_name("exhausted"),
    )


def visible_since(message: Any) -> ColumnElement[Any]:
    """Since when a visible message can be leased: its own time, or the end of its last lease."""
    return func.greatest(message.vt, message.leased_until, type_=sa.DateTime(timezone=True))


def _name(name: str) -> ColumnElement[str]:
    # In the SQL itself: PostgreSQL would not know two uses with bind parameters for the same
    # expression, and refuse to group by it.
    return sa.literal_column(f"'{name}'", sa.Text)

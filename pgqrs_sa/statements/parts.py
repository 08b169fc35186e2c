"""Fragments that several statements share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.sql import ColumnElement, Executable
from sqlalchemy.sql.expression import HasCTE

from ..models import ArchivedMessageMixin, MessageMixin, Models

CONTENT = (
    "queue_id",
    "payload",
    "headers",
    "priority",
    "vt",
    "enqueued_at",
    "read_ct",
    "max_read_ct",
    "dequeued_at",
    "producer_worker_id",
    "consumer_worker_id",
    "dedup_key",
    "last_error",
)
"""The columns that a message takes along when it is archived or requeued."""

timestamp = sa.DateTime(timezone=True)


def now() -> ColumnElement[Any]:
    """The database's clock, as of the start of the statement."""
    return func.statement_timestamp(type_=timestamp)


def span(name: str) -> ColumnElement[Any]:
    """A bind parameter that holds a timedelta or None."""
    return sa.bindparam(name, type_=sa.Interval)


def when(delay: ColumnElement[Any], at: ColumnElement[Any]) -> ColumnElement[Any]:
    """The moment that a delay or a time means; a time that has passed means now.

    A message is never placed before those that are visible already, which is what lets a
    dequeue remember how far it has read.
    """
    return func.greatest(func.coalesce(at, now() + delay), now(), type_=timestamp)


def json_bind(name: str) -> ColumnElement[Any]:
    """A bind parameter that holds JSON text or None: the host's serializer is not involved."""
    return sa.cast(sa.bindparam(name, type_=sa.Text), JSONB)


def array_bind(name: str, item: Any) -> ColumnElement[Any]:
    """A bind parameter that holds a list: one prepared statement for every length."""
    return sa.bindparam(name, type_=sa.ARRAY(item))


def queue_id(models: Models) -> ColumnElement[Any]:
    """The id of the queue that the bind parameter ``queue`` names, or NULL."""
    queue = models.queue
    return sa.select(queue.id).where(queue.queue_name == sa.bindparam("queue")).scalar_subquery()


def in_no_hands(message: type[MessageMixin]) -> ColumnElement[bool]:
    """Nobody holds a live lease on it."""
    return sa.or_(message.dequeued_at.is_(None), message.vt <= now())


def chosen(rows: HasCTE, name: str) -> sa.CTE:
    """Rows that a statement locks first and changes then: never more of them than these."""
    return rows.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")


def move_to_archive(
    models: Models,
    rows: sa.CTE,
    *conditions: sa.ColumnExpressionArgument[bool],
    outcome: ColumnElement[str],
    reason: ColumnElement[Any],
    last_error: ColumnElement[Any] | None = None,
) -> Executable:
    """Delete the messages of ``rows`` and insert them into the archive, in one statement."""
    message, archived = models.message, models.archived
    error = message.last_error if last_error is None else last_error
    gone = (
        sa.delete(message)
        .where(message.id == rows.c.id, *conditions)
        .returning(
            message.id,
            *(getattr(message, name) for name in CONTENT if name != "last_error"),
            error.label("last_error"),
            reason.label("reason"),
        )
        .cte("pgqrs_gone")
    )
    source = sa.select(gone.c.id, *(gone.c[name] for name in CONTENT), outcome, gone.c.reason)
    return (
        insert(archived)
        .from_select(("original_msg_id", *CONTENT, "outcome", "reason"), source)
        .returning(archived.original_msg_id.label("id"))
        .execution_options(dml_strategy="raw")
    )


def seconds(value: sa.ColumnExpressionArgument[Any]) -> ColumnElement[Any]:
    """A number of seconds as an interval."""
    return sa.type_coerce(value, sa.Double) * sa.literal(timedelta(seconds=1), sa.Interval)


def content(model: type[MessageMixin | ArchivedMessageMixin]) -> list[ColumnElement[Any]]:
    """What every view of a message shows, JSON as text so that one bad row stays one bad row."""
    return [
        model.id.label("id"),
        sa.cast(model.payload, sa.Text).label("payload"),
        sa.cast(model.headers, sa.Text).label("headers"),
        model.priority.label("priority"),
        model.vt.label("vt"),
        model.enqueued_at.label("enqueued_at"),
        model.read_ct.label("read_ct"),
        model.max_read_ct.label("max_read_ct"),
        model.dedup_key.label("dedup_key"),
        model.last_error.label("last_error"),
        model.consumer_worker_id.label("worker_id"),
        model.producer_worker_id.label("producer_id"),
        model.dequeued_at.label("dequeued_at"),
    ]

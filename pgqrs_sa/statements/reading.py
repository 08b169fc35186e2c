"""SELECT: views of live and archived messages, and counts. Nothing here locks or writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable, Select

from ..models import ArchivedMessageMixin, MessageMixin, Models
from ..types import MessageState, Outcome
from .parts import content, json_bind, now, queue_id

_AFTER = sa.bindparam("after", type_=sa.BigInteger)
_LIMIT = sa.bindparam("limit", type_=sa.Integer)


def _live(models: Models) -> Select[Any]:
    queue, message = models.queue, models.message
    return sa.select(
        *content(message), message.state.label("state"), queue.queue_name.label("queue")
    ).join(queue, queue.id == message.queue_id)


@cache
def peek(models: Models) -> Executable:
    """What the next dequeue of a queue would see, without taking it.

    Binds: queue, limit.
    """
    message = models.message
    return (
        _live(models)
        .where(message.queue_id == queue_id(models), message.ready)
        .order_by(message.priority, message.vt, message.id)
        .limit(_LIMIT)
    )


def find(
    models: Models,
    *,
    in_queue: bool,
    state: MessageState | None,
    by_payload: bool,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
) -> Executable:
    """Live messages by id, a page at a time.

    Binds: after, limit; queue when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    message = models.message
    statement = _live(models).where(*where)
    if state is not None:
        statement = statement.where(getattr(message, state))
    return _page(models, statement, message, in_queue=in_queue, by_payload=by_payload)


def find_archived(
    models: Models,
    *,
    in_queue: bool,
    outcome: Outcome | None,
    by_payload: bool,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
) -> Executable:
    """Archived messages by id, a page at a time.

    Binds: after, limit; queue when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    archived = models.archived
    statement = _settled(models).where(*where)
    if outcome is not None:
        statement = statement.where(archived.outcome == outcome)
    return _page(models, statement, archived, in_queue=in_queue, by_payload=by_payload)


def _page(
    models: Models,
    statement: Select[Any],
    model: type[MessageMixin | ArchivedMessageMixin],
    *,
    in_queue: bool,
    by_payload: bool,
) -> Select[Any]:
    if in_queue:
        statement = statement.where(model.queue_id == queue_id(models))
    if by_payload:
        statement = statement.where(model.payload.contains(json_bind("contains")))
    return statement.where(model.id > _AFTER).order_by(model.id).limit(_LIMIT)


def _settled(models: Models) -> Select[Any]:
    queue, archived = models.queue, models.archived
    return sa.select(
        *content(archived),
        archived.original_msg_id.label("original_msg_id"),
        archived.outcome.label("outcome"),
        archived.reason.label("reason"),
        archived.archived_at.label("archived_at"),
        queue.queue_name.label("queue"),
    ).join(queue, queue.id == archived.queue_id)


@cache
def message_by_id(models: Models) -> Executable:
    """One live message. Binds: id."""
    return _live(models).where(models.message.id == sa.bindparam("id", type_=sa.BigInteger))


@cache
def archived_by_id(models: Models) -> Executable:
    """One archived message. Binds: id."""
    return _settled(models).where(models.archived.id == sa.bindparam("id", type_=sa.BigInteger))


@cache
def metrics(models: Models, *, one_queue: bool) -> Executable:
    """Counts by state and outcome for each queue, or for one.

    Binds: queue when ``one_queue``.
    """
    queue, message, archived = models.queue, models.message, models.archived

    def live(state: sa.ColumnExpressionArgument[bool]) -> ColumnElement[int]:
        return func.count().filter(state)

    def settled(outcome: str) -> ColumnElement[int]:
        return func.count().filter(archived.outcome == sa.literal(outcome))

    # Lateral, so that the counts of one queue read the index entries of that queue alone.
    messages = (
        sa.select(
            live(message.ready).label("ready"),
            live(message.scheduled).label("scheduled"),
            live(message.leased).label("leased"),
            live(message.exhausted).label("exhausted"),
            (now() - func.min(message.vt).filter(message.ready)).label("oldest_ready_age"),
        )
        .where(message.queue_id == queue.id)
        .lateral("live")
    )
    history = (
        sa.select(
            *(
                settled(outcome).label(outcome)
                for outcome in ("archived", "dead", "cancelled", "discarded")
            )
        )
        .where(archived.queue_id == queue.id)
        .lateral("history")
    )
    statement = (
        sa.select(
            queue.queue_name.label("queue"),
            queue.paused_at.is_not(None).label("paused"),
            *messages.c,
            *history.c,
        )
        .select_from(queue)
        .join(messages, sa.true())
        .join(history, sa.true())
        .order_by(queue.queue_name)
    )
    return statement.where(queue.queue_name == sa.bindparam("queue")) if one_queue else statement

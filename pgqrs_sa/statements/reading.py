"""SELECT: views of live and archived messages, and counts. Nothing here locks or writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable, Select

from .. import states
from ..models import Models
from ..types import MessageState, Outcome
from .parts import content, json_bind, queue_id, tables

_AFTER = sa.bindparam("after", type_=sa.BigInteger)
_LIMIT = sa.bindparam("limit", type_=sa.Integer)


def _live(models: Models) -> Select[Any]:
    queue, message, _, _ = tables(models)
    return sa.select(
        *content(message), states.state(message.c).label("state"), queue.c.queue_name.label("queue")
    ).join(queue, queue.c.id == message.c.queue_id)


@cache
def peek(models: Models) -> Executable:
    """What the next dequeue of a queue would see, without taking it.

    Binds: queue, limit.
    """
    message = tables(models).message
    return (
        _live(models)
        .where(message.c.queue_id == queue_id(models), states.ready(message.c))
        .order_by(message.c.priority, message.c.vt, message.c.id)
        .limit(_LIMIT)
    )


def find(
    models: Models,
    *,
    in_queue: bool,
    state: MessageState | None,
    by_payload: bool,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
    newest_first: bool = False,
) -> Select[Any]:
    """Live messages by id, a page at a time.

    Binds: after, limit; queue when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    message = tables(models).message
    statement = _live(models).where(*where)
    if state is not None:
        statement = statement.where(getattr(states, state)(message.c))
    statement = _within(models, statement, message, in_queue=in_queue, by_payload=by_payload)
    return _page(statement, message, newest_first=newest_first)


def find_archived(
    models: Models,
    *,
    in_queue: bool,
    outcome: Outcome | None,
    by_payload: bool,
    where: Sequence[sa.ColumnExpressionArgument[bool]],
    newest_first: bool = False,
) -> Select[Any]:
    """Archived messages by id, a page at a time.

    Binds: after, limit; queue when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    archived = tables(models).archived
    statement = _settled(models).where(*where)
    if outcome is not None:
        statement = statement.where(archived.c.outcome == outcome)
    statement = _within(models, statement, archived, in_queue=in_queue, by_payload=by_payload)
    return _page(statement, archived, newest_first=newest_first)


def _page(statement: Select[Any], table: sa.Table, *, newest_first: bool) -> Select[Any]:
    if newest_first:
        before = sa.or_(_AFTER == 0, table.c.id < _AFTER)
        return statement.where(before).order_by(table.c.id.desc()).limit(_LIMIT)
    return statement.where(table.c.id > _AFTER).order_by(table.c.id).limit(_LIMIT)


def count(found: Select[Any]) -> Executable:
    """How many rows the pages of a `find` have, without reading their content."""
    return found.with_only_columns(func.count(), maintain_column_froms=True).order_by(None)


def _within(
    models: Models, statement: Select[Any], table: sa.Table, *, in_queue: bool, by_payload: bool
) -> Select[Any]:
    if in_queue:
        statement = statement.where(table.c.queue_id == queue_id(models))
    if by_payload:
        statement = statement.where(table.c.payload.contains(json_bind("contains")))
    return statement


def _settled(models: Models) -> Select[Any]:
    queue, _, archived, _ = tables(models)
    return sa.select(
        *content(archived),
        archived.c.original_msg_id.label("original_msg_id"),
        archived.c.outcome.label("outcome"),
        archived.c.reason.label("reason"),
        archived.c.archived_at.label("archived_at"),
        queue.c.queue_name.label("queue"),
    ).join(queue, queue.c.id == archived.c.queue_id)


@cache
def message_by_id(models: Models) -> Executable:
    """One live message. Binds: id."""
    return _live(models).where(
        tables(models).message.c.id == sa.bindparam("id", type_=sa.BigInteger)
    )


@cache
def archived_by_id(models: Models) -> Executable:
    """One archived message. Binds: id."""
    return _settled(models).where(
        tables(models).archived.c.id == sa.bindparam("id", type_=sa.BigInteger)
    )


@cache
def metrics(models: Models, *, one_queue: bool) -> Executable:
    """Counts by state and outcome for each queue, or for one.

    Binds: queue when ``one_queue``.
    """
    queue, message, archived, _ = tables(models)

    def live(state: sa.ColumnExpressionArgument[bool]) -> ColumnElement[int]:
        return func.count().filter(state)

    def settled(outcome: str) -> ColumnElement[int]:
        return func.count().filter(archived.c.outcome == sa.literal(outcome))

    # Lateral, so that the counts of one queue read the index entries of that queue alone.
    messages = (
        sa.select(
            live(states.ready(message.c)).label("ready"),
            live(states.scheduled(message.c)).label("scheduled"),
            live(states.leased(message.c)).label("leased"),
            live(states.exhausted(message.c)).label("exhausted"),
            (states.now() - func.min(message.c.vt).filter(states.ready(message.c))).label(
                "oldest_ready_age"
            ),
        )
        .where(message.c.queue_id == queue.c.id)
        .lateral("live")
    )
    history = (
        sa.select(
            *(
                settled(outcome).label(outcome)
                for outcome in ("archived", "dead", "cancelled", "discarded")
            )
        )
        .where(archived.c.queue_id == queue.c.id)
        .lateral("history")
    )
    statement = (
        sa.select(
            queue.c.queue_name.label("queue"),
            queue.c.paused_at.is_not(None).label("paused"),
            *messages.c,
            *history.c,
        )
        .select_from(queue)
        .join(messages, sa.true())
        .join(history, sa.true())
        .order_by(queue.c.queue_name)
    )
    return statement.where(queue.c.queue_name == sa.bindparam("queue")) if one_queue else statement

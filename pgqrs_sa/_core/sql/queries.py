"""SELECT: views of live and archived messages, and counts. Nothing here locks or writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NotRequired, TypeAlias, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable, Select

from ...types import ArchiveOutcome, MessageState
from .. import states
from ..tables import Tables
from . import counts
from .fragments import QUEUE_ID, content, ids_of, json_bind, materialized, outline, queue_id

_Shown: TypeAlias = Callable[[sa.Table], Sequence[ColumnElement[Any]]]


class Page(TypedDict):
    """The variants of a statement that reads a page.

    Attributes:
        in_queue: Only the messages of a queue.
        by_payload: Only those whose payload contains a value.
        newest_first: In descending order of the ids.
        whole: Read the content too; default: True.
    """

    in_queue: bool
    by_payload: bool
    newest_first: NotRequired[bool]
    whole: NotRequired[bool]


_AFTER = sa.bindparam("after", type_=sa.BigInteger)
_LIMIT = sa.bindparam("limit", type_=sa.Integer)


def _live(tables: Tables, shown: _Shown = content) -> Select[Any]:
    queue, message, _, _ = tables
    return sa.select(
        *shown(message),
        message.c.leased_until,
        states.state(message.c).label("state"),
        queue.c.queue_name.label("queue"),
    ).join(queue, queue.c.id == message.c.queue_id)


@cache
def peek(tables: Tables) -> Executable:
    """The messages that the next dequeue of a queue would lease.

    Binds: queue, limit.
    """
    message = tables.message
    return (
        _live(tables)
        .where(message.c.queue_id == queue_id(tables), states.ready(message.c))
        .order_by(message.c.priority, message.c.vt, message.c.id)
        .limit(_LIMIT)
    )


def find_where(
    tables: Tables,
    where: Sequence[sa.ColumnExpressionArgument[bool]] = (),
    *,
    state: MessageState | None,
    **page: Unpack[Page],
) -> Select[Any]:
    """Live messages by id that meet criteria of the caller's, a page at a time.

    Binds: after, limit; queue_id when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    message = tables.message
    statement = _live(tables, content if page.get("whole", True) else outline).where(*where)
    if state == "exhausted":
        statement = statement.where(_among_exhausted(tables, in_queue=page["in_queue"]))
    elif state is not None:
        statement = statement.where(getattr(states, state)(message.c))
    return _page(statement, message, message.c.queue_id == QUEUE_ID, page)


find = cache(find_where)
"""As `find_where`, without criteria."""


def _among_exhausted(tables: Tables, *, in_queue: bool) -> ColumnElement[bool]:
    """It is one of the exhausted, which are found first.

    There are few, and the planner thinks that every third message is one: left to itself it
    looks for them at all live messages, in the order of the page.
    """
    message = tables.message
    ids = sa.select(message.c.id).where(states.exhausted(message.c))
    if in_queue:
        ids = ids.where(message.c.queue_id == QUEUE_ID)
    found = materialized(ids, "pgqrs_exhausted")
    return message.c.id == func.any(ids_of(found))


def find_archived_where(
    tables: Tables,
    where: Sequence[sa.ColumnExpressionArgument[bool]] = (),
    *,
    outcome: ArchiveOutcome | None,
    **page: Unpack[Page],
) -> Select[Any]:
    """Archived messages by id that meet criteria of the caller's, a page at a time.

    Binds: after, limit; queue_id when ``in_queue``; contains (JSON text) when ``by_payload``.
    """
    archived = tables.archived
    whole = page.get("whole", True)
    statement = _settled(tables, content if whole else outline).where(*where)
    if whole:
        statement = statement.add_columns(archived.c.reason)
    if outcome is not None:
        statement = statement.where(archived.c.outcome == outcome)
    return _page(statement, archived, archived.c.queue_id == QUEUE_ID, page)


find_archived = cache(find_archived_where)
"""As `find_archived_where`, without criteria."""


def _page(
    statement: Select[Any], table: sa.Table, in_queue: ColumnElement[bool], page: Page
) -> Select[Any]:
    if page["in_queue"]:
        statement = statement.where(in_queue)
    if page["by_payload"]:
        statement = statement.where(table.c.payload.contains(json_bind("contains")))
    if page.get("newest_first"):
        before = sa.or_(_AFTER == 0, table.c.id < _AFTER)
        return statement.where(before).order_by(table.c.id.desc()).limit(_LIMIT)
    return statement.where(table.c.id > _AFTER).order_by(table.c.id).limit(_LIMIT)


def count(found: Select[Any]) -> Executable:
    """How many rows the pages of a `find` have, without reading their content."""
    return found.with_only_columns(func.count(), maintain_column_froms=True).order_by(None)


def _settled(tables: Tables, shown: _Shown = content) -> Select[Any]:
    queue, _, archived, _ = tables
    return sa.select(
        *shown(archived),
        archived.c.outcome.label("outcome"),
        archived.c.archived_at.label("archived_at"),
        queue.c.queue_name.label("queue"),
    ).join(queue, queue.c.id == archived.c.queue_id)


@cache
def message_by_id(tables: Tables) -> Executable:
    """One live message. Binds: id."""
    return _live(tables).where(tables.message.c.id == sa.bindparam("id", type_=sa.BigInteger))


@cache
def archived_by_id(tables: Tables) -> Executable:
    """One archived message. Binds: id."""
    archived = tables.archived
    found = _settled(tables).add_columns(archived.c.reason)
    return found.where(archived.c.id == sa.bindparam("id", type_=sa.BigInteger))


@cache
def metrics(tables: Tables, *, one_queue: bool, exact: bool = False) -> Executable:
    """Counts by state and outcome for each queue, or for one.

    ``settled`` and each outcome are counted up to one more than ``most``; with ``exact`` they are
    counted whole, and ``most`` is NULL.

    Binds: queue_id when ``one_queue``.
    """
    queue = tables.queue
    columns: list[ColumnElement[Any]] = [
        queue.c.queue_name.label("queue"),
        queue.c.paused_at.is_not(None).label("paused"),
    ]
    message = tables.message
    live = counts.live_by_queue(
        tables,
        *(counts.of_state(message.c, state) for state in counts.STATES),
        counts.age(message.c, "ready", "oldest_ready_age"),
        one_queue=one_queue,
    )
    source = queue.outerjoin(live, live.c.queue_id == queue.c.id)
    columns += [func.coalesce(live.c[state], 0).label(state) for state in counts.STATES]
    columns.append(live.c.oldest_ready_age)
    if exact:
        history = counts.outcomes(tables, one_queue=one_queue)
        source = source.outerjoin(history, history.c.queue_id == queue.c.id)
        names = ("settled", *counts.NOT_DONE)
        columns += [func.coalesce(history.c[name], 0).label(name) for name in names]
        columns.append(sa.null().label("most"))
    else:
        most = sa.literal(counts.MOST, sa.Integer) if one_queue else counts.cap(tables)
        others = [counts.not_done(tables, name, most) for name in counts.NOT_DONE]
        for found in (*others, counts.settled(tables, most, others)):
            source = source.join(found, sa.true())
            columns.append(found.c.found.label(found.name))
        columns.append(most.label("most"))
    statement = sa.select(*columns).select_from(source).order_by(queue.c.queue_name)
    return statement.where(queue.c.id == QUEUE_ID) if one_queue else statement

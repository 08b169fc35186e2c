"""INSERT: one message, many from one JSON parameter, or as many as a query returns.

With ``notify`` each also notifies, if something is visible and somebody waits: see `wakeup`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.sql import ColumnElement, Executable, Select
from sqlalchemy.sql.expression import SelectBase

from ..states import now
from ..tables import Tables
from . import wakeup
from .fragments import (
    array_bind,
    interval_bind,
    json_bind,
    queue_id,
    seconds,
    timestamp,
    visible_at,
)

_COLUMNS = (
    "queue_id",
    "payload",
    "vt",
    "priority",
    "headers",
    "max_read_ct",
    "dedup_key",
    "producer_worker_id",
)


def _producer() -> ColumnElement[Any]:
    return sa.bindparam("producer", type_=sa.BigInteger)


def _into(tables: Tables, source: SelectBase, *, keyed: bool) -> Insert:
    """INSERT the rows of ``source``, skipping those whose key is live already.

    DO NOTHING rather than DO UPDATE: an update would lock the message that exists, and hide
    it from consumers until the caller commits.
    """
    message = tables.message
    statement = insert(message).from_select(_COLUMNS, source)
    if not keyed:
        return statement
    return statement.on_conflict_do_nothing(
        index_elements=[message.c.queue_id, message.c.dedup_key],
        index_where=message.c.dedup_key.is_not(None),
    )


def _notices(tables: Tables, *, notify: bool) -> tuple[ColumnElement[Any], ...]:
    return (wakeup.notice(tables),) if notify else ()


@cache
def one(tables: Tables, *, keyed: bool, notify: bool) -> Executable:
    """Insert a message into the queue of this name, if it exists and accepts the size.

    Binds: queue, payload, size, delay, at, priority, headers, max_read_ct, key, producer; channel
    with ``notify``.
    """
    queue, message, _, _ = tables
    source = sa.select(
        queue.c.id,
        json_bind("payload"),
        visible_at(interval_bind("delay"), sa.bindparam("at", type_=timestamp)),
        sa.bindparam("priority", type_=sa.SmallInteger),
        json_bind("headers"),
        sa.bindparam("max_read_ct", type_=sa.Integer),
        sa.bindparam("key", type_=sa.Text),
        _producer(),
    ).where(
        queue.c.queue_name == sa.bindparam("queue"),
        queue.c.max_payload_bytes >= sa.bindparam("size", type_=sa.BigInteger),
    )
    inserted = _into(tables, source, keyed=keyed)
    return inserted.returning(message.c.id, message.c.vt, *_notices(tables, notify=notify))


@cache
def many(tables: Tables, *, keyed: bool, notify: bool, gathered: bool = False) -> Executable:
    """Insert the items of one JSON array, in their order, so that ids rise with it.

    An item is ``[payload, delay, at, priority, headers, max_read_ct, key]``: delay in seconds,
    at in ISO 8601, both, like the rest, null when not given.

    With ``keyed`` it also returns the live messages whose keys kept items out: see `_with_live`.
    With ``gathered``, only without ``keyed``, it returns one row: see `_gather`.

    Binds: queue, items, size (the largest payload's), producer; keys (those of all items) with
    ``keyed``; channel with ``notify``.
    """
    items = _items()
    item = items.c.item

    def text(place: int) -> ColumnElement[Any]:
        value: ColumnElement[Any] = item[place].astext
        return value

    columns = (
        item[0],
        visible_at(
            seconds(sa.cast(func.coalesce(text(1), "0"), sa.Double)),
            sa.cast(text(2), timestamp),
        ),
        sa.cast(text(3), sa.SmallInteger),
        sa.cast(text(4), JSONB),
        sa.cast(text(5), sa.Integer),
        text(6),
    )
    inserted = _of_items(tables, items, columns, keyed=keyed, notify=notify)
    return _gather(inserted) if gathered else inserted


@cache
def plain(tables: Tables, *, notify: bool, gathered: bool = False) -> Executable:
    """Insert the payloads of one JSON array: `many` without any option, a fifth cheaper.

    Binds: those of `many`.
    """
    items = _items()
    nothing: ColumnElement[Any] = sa.null()
    zero: ColumnElement[Any] = sa.literal_column("0")
    columns = (items.c.item, now(), zero, nothing, nothing, nothing)
    inserted = _of_items(tables, items, columns, keyed=False, notify=notify)
    return _gather(inserted) if gathered else inserted


def _items() -> sa.TableValuedAlias:
    """The members of the JSON array ``items``, numbered in their order."""
    return (
        func.jsonb_array_elements(json_bind("items"))
        .table_valued(sa.column("item", JSONB), with_ordinality="n")
        .render_derived("items")
    )


def _of_items(
    tables: Tables,
    items: sa.TableValuedAlias,
    columns: Sequence[ColumnElement[Any]],
    *,
    keyed: bool,
    notify: bool,
) -> Any:
    """INSERT a row with these columns for each item, if the queue exists and accepts all."""
    queue, message, _, _ = tables
    source = (
        sa.select(queue.c.id, *columns, _producer())
        .select_from(sa.join(queue, items, sa.true()))
        .where(
            queue.c.queue_name == sa.bindparam("queue"),
            queue.c.max_payload_bytes >= sa.bindparam("size", type_=sa.BigInteger),
        )
        .order_by(items.c.n)
    )
    inserted = _into(tables, source, keyed=keyed)
    columns = (message.c.id, message.c.vt)
    notices = _notices(tables, notify=notify)
    if not keyed:
        return inserted.returning(*columns, *notices)
    return _with_live(tables, inserted.returning(*columns, message.c.dedup_key, *notices))


def _gather(inserted: Any) -> Executable:
    """Return what an INSERT has inserted as one row: ids, vt, and vts where they differ.

    A row for each message costs the client four times as much as a list, and the server the same.
    """
    new = inserted.cte("pq_new")
    first, last = func.min(new.c.vt), func.max(new.c.vt)
    return sa.select(
        func.array_agg(new.c.id).label("ids"),
        first.label("vt"),
        sa.case((first < last, func.array_agg(new.c.vt))).label("vts"),
    )


def _with_live(tables: Tables, inserted: Any) -> Executable:
    """Return what an INSERT has inserted, and the live messages that have the other ``keys``.

    Both see one snapshot, that of the statement: whatever a key was taken by at its start is found,
    even if it is settled meanwhile. Only a key that was committed after that is not. The look-up
    reads the keys that are left, and nothing when there are none: reading all of them would make
    SERIALIZABLE transactions with different keys conflict.
    """
    message = tables.message
    new = inserted.cte("pq_new")
    keys = func.unnest(array_bind("keys", sa.Text)).column_valued("key")
    left = sa.select(keys).except_(sa.select(new.c.dedup_key)).scalar_subquery()
    false: ColumnElement[bool] = sa.literal_column("false")
    true: ColumnElement[bool] = sa.literal_column("true")
    nothing = [sa.null()] if "notified" in new.c else []
    live = sa.select(message.c.id, message.c.vt, message.c.dedup_key, true, *nothing).where(
        message.c.queue_id == queue_id(tables),
        message.c.dedup_key == func.any(func.array(left, type_=sa.ARRAY(sa.Text))),
    )
    notified = [new.c.notified] if "notified" in new.c else []
    fresh = sa.select(new.c.id, new.c.vt, new.c.dedup_key, false.label("duplicate"), *notified)
    return fresh.union_all(live)


SELECTABLE = ("payload", "delay", "at", "priority", "headers", "max_read_ct", "key")
"""What the columns of a query given to `from_select` may be called."""


def from_select(tables: Tables, query: SelectBase, *, notify: bool) -> Executable:
    """Insert what a query returns: all of it, or nothing if one payload is too large.

    How many there were is the number of rows, or with ``notify`` the value ``inserted``.

    Binds: queue, producer; channel with ``notify``.
    """
    queue = tables.queue
    rows = query.cte("pgqrs_rows")
    source = (
        sa.select(queue.c.id, *_selected(rows), _producer())
        .select_from(sa.join(queue, rows, sa.true()))
        .where(
            queue.c.queue_name == sa.bindparam("queue"),
            queue.c.max_payload_bytes >= _largest(rows).scalar_subquery(),
        )
    )
    inserted = _into(tables, source, keyed="key" in _options(rows))
    if not notify:
        return inserted.execution_options(preserve_rowcount=True)
    # One row for all of them: RETURNING would bring each to the client.
    _, message, _, worker = tables
    new = inserted.returning(message.c.vt).cte("pgqrs_new")
    wanted = sa.and_(func.bool_or(new.c.vt <= now()), wakeup.awaited(worker))
    told = sa.case((wanted, wakeup.notify())).label("notified")
    return sa.select(func.count().label("inserted"), told).select_from(new)


def largest(query: SelectBase) -> Executable:
    """The size of the largest payload that a query returns, in bytes."""
    return _largest(query.cte("pgqrs_rows"))


def _options(rows: sa.CTE) -> Collection[str]:
    # Of a single column, whatever it is called, the payload is made.
    return rows.c.keys() if "payload" in rows.c else ()


def _payload(rows: sa.CTE) -> ColumnElement[Any]:
    column = rows.c.payload if "payload" in rows.c else next(iter(rows.c))
    # A NULL of the query is a value of the payload, like None in Python.
    return func.coalesce(func.to_jsonb(column), _json_null())


def _json_null() -> ColumnElement[Any]:
    return sa.cast(sa.literal("null", sa.Text), JSONB)


def _largest(rows: sa.CTE) -> Select[Any]:
    size = func.octet_length(sa.cast(_payload(rows), sa.Text))
    return sa.select(func.coalesce(func.max(size), 0))


def _selected(rows: sa.CTE) -> list[ColumnElement[Any]]:
    options = _options(rows)

    def given(name: str, type_: Any, default: Any = None) -> ColumnElement[Any]:
        if name not in options:
            return sa.cast(sa.literal(default, type_), type_)
        return sa.cast(func.coalesce(rows.c[name], default), type_)

    delay: ColumnElement[Any] = sa.literal(timedelta(0), sa.Interval)
    if "delay" in options:
        is_span = isinstance(rows.c.delay.type, sa.Interval)
        delay = rows.c.delay if is_span else seconds(sa.cast(rows.c.delay, sa.Double))
        delay = func.coalesce(delay, sa.literal(timedelta(0), sa.Interval))
    headers = given("headers", JSONB(none_as_null=True))
    if "headers" in options:
        # No headers may come as NULL of SQL or of JSON: SQLAlchemy's None in a JSON column is both.
        headers = func.nullif(func.to_jsonb(rows.c.headers), _json_null())
    return [
        _payload(rows),
        visible_at(delay, given("at", timestamp)),
        given("priority", sa.SmallInteger, 0),
        headers,
        given("max_read_ct", sa.Integer),
        given("key", sa.Text),
    ]


@cache
def live_keys(tables: Tables) -> Executable:
    """The live messages that have one of these keys.

    Binds: queue, keys.
    """
    message = tables.message
    return sa.select(message.c.id, message.c.vt, message.c.dedup_key).where(
        message.c.queue_id == queue_id(tables),
        message.c.dedup_key == func.any(array_bind("keys", sa.Text)),
    )


@cache
def accepts(queue: sa.Table, message: sa.Table) -> Executable:
    """Select the queues that a flush is about to insert into, and how large a payload may be.

    An INSERT of no rows takes the lock that an INSERT takes, so that a queue which is found here
    is not deleted before the messages are in it: see `queues.lock_messages`. It takes the tables
    that it needs, as a flush knows only the class of the message.

    Binds: names, ids.
    """
    nothing = sa.select(sa.literal(0), sa.cast("null", JSONB)).where(sa.false())
    writing = (
        sa.insert(message)
        .from_select(["queue_id", "payload"], nothing)
        .returning(message.c.id)
        .cte("pgqrs_writing")
    )
    return (
        sa.select(queue.c.id, queue.c.queue_name, queue.c.max_payload_bytes)
        .where(
            sa.or_(
                queue.c.queue_name == func.any(array_bind("names", sa.Text)),
                queue.c.id == func.any(array_bind("ids", sa.BigInteger)),
            )
        )
        .add_cte(writing)
    )


@cache
def live_keys_by_queue_id(message: sa.Table) -> Executable:
    """Select the live messages of some queues that have one of these keys.

    It takes the table, as a flush does not know the other classes.

    Binds: ids, keys.
    """
    return sa.select(message.c.id, message.c.queue_id, message.c.dedup_key).where(
        message.c.queue_id == func.any(array_bind("ids", sa.BigInteger)),
        message.c.dedup_key == func.any(array_bind("keys", sa.Text)),
    )

"""Queues: create, change, pause, purge and delete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ClauseElement, ColumnElement, Executable
from sqlalchemy.sql.compiler import SQLCompiler

from ...declared import DeclaredQueue
from ..states import now
from ..tables import Tables
from .fragments import array_bind, materialized, queue_id

SETTINGS = (
    "lease_seconds",
    "max_read_ct",
    "keep",
    "retention_seconds",
    "failed_retention_seconds",
    "max_payload_bytes",
)
"""The defaults of a queue that can be given at creation and changed later."""

_HIGHEST_ID = sa.literal_column("9223372036854775807", sa.BigInteger)


def _row(queue: sa.Table) -> list[ColumnElement[Any]]:
    names = ("id", "queue_name", "created_at", *SETTINGS, "paused_at")
    return [queue.c[name] for name in names]


def _new_values(queue: sa.Table, settings: Collection[str]) -> dict[str, Any]:
    # Named unlike the columns: SQLAlchemy keeps those names for the values of an UPDATE.
    return {n: sa.bindparam(f"new_{n}", type_=queue.c[n].type) for n in settings}


@cache
def create(tables: Tables, settings: tuple[str, ...]) -> Executable:
    """Insert a queue unless its name is taken. Binds: queue, and each of ``settings``."""
    queue = tables.queue
    values = _new_values(queue, settings)
    return (
        insert(queue)
        .values(queue_name=sa.bindparam("queue"), **values)
        .on_conflict_do_nothing(index_elements=[queue.c.queue_name])
        .returning(*_row(queue))
    )


@cache
def create_missing(queue: sa.Table) -> Executable:
    """Insert the queues whose names are free, in the order given, and return their names.

    It takes a table, as a flush knows no `Models`. Binds: what `columns_of` returns.
    """
    types = {"queue_name": queue.c.queue_name.type} | {n: queue.c[n].type for n in SETTINGS}
    given = (
        func.unnest(*(array_bind(f"new_{n}", type_) for n, type_ in types.items()))
        .table_valued(
            *(sa.column(n, type_) for n, type_ in types.items()),
            with_ordinality="place",
            name="given",
        )
        .render_derived()
    )
    values = [_or_default(given.c[n], queue.c[n]) for n in types]
    return (
        insert(queue)
        .from_select(list(types), sa.select(*values).order_by(given.c.place))
        .on_conflict_do_nothing(index_elements=[queue.c.queue_name])
        .returning(queue.c.queue_name)
    )


def columns_of(declared: Sequence[DeclaredQueue]) -> dict[str, list[Any]]:
    """Return what `create_missing` binds: an array for each column, None for its default."""
    settings = [queue.settings() for queue in declared]
    return {"new_queue_name": [queue.name for queue in declared]} | {
        f"new_{name}": [given.get(name) for given in settings] for name in SETTINGS
    }


def _or_default(given: ColumnElement[Any], column: sa.Column[Any]) -> ColumnElement[Any]:
    # INSERT ... SELECT cannot say DEFAULT.
    if not isinstance(column.server_default, sa.DefaultClause):
        return given
    return func.coalesce(given, column.server_default.arg)


@cache
def named(tables: Tables) -> Executable:
    """The queues that have one of these names. Binds: names."""
    queue = tables.queue
    names = array_bind("names", sa.Text)
    return sa.select(*_row(queue)).where(queue.c.queue_name == func.any(names))


@cache
def get(tables: Tables) -> Executable:
    """One queue. Binds: queue."""
    queue = tables.queue
    return sa.select(*_row(queue)).where(queue.c.queue_name == sa.bindparam("queue"))


@cache
def everything(tables: Tables) -> Executable:
    """All queues by name."""
    return sa.select(*_row(tables.queue)).order_by(tables.queue.c.queue_name)


@cache
def names(queue: sa.Table) -> Executable:
    """The names of all queues."""
    return sa.select(queue.c.queue_name).order_by(queue.c.queue_name)


@cache
def update(tables: Tables, settings: tuple[str, ...]) -> Executable:
    """Change defaults of a queue. Binds: queue, and each of ``settings``."""
    queue = tables.queue
    values = _new_values(queue, settings)
    return _update(tables, **values)


@cache
def pause(tables: Tables) -> Executable:
    """Stop leasing from a queue; one that is paused keeps its time. Binds: queue."""
    # As a sub-select: Citus refuses a function that is not IMMUTABLE in COALESCE.
    since = sa.select(now()).scalar_subquery()
    return _update(tables, paused_at=func.coalesce(tables.queue.c.paused_at, since))


@cache
def resume(tables: Tables) -> Executable:
    """Lease from a queue again. Binds: queue."""
    return _update(tables, paused_at=None)


def _update(tables: Tables, **values: Any) -> Executable:
    queue = tables.queue
    return (
        sa.update(queue)
        .where(queue.c.queue_name == sa.bindparam("queue"))
        .values(**values)
        .returning(*_row(queue))
    )


@cache
def purge(tables: Tables) -> Executable:
    """Delete live messages of a queue, the lowest ids first.

    Binds: queue, limit and up_to (None for all).
    """
    message = tables.message
    # No id lies beyond the largest bigint, so that one plan serves with and without a bound.
    highest = func.coalesce(sa.bindparam("up_to", type_=sa.BigInteger), _HIGHEST_ID)
    lowest = (
        sa.select(message.c.id)
        .where(message.c.queue_id == queue_id(tables), message.c.id <= highest)
        .order_by(message.c.id)
        .limit(sa.bindparam("limit", type_=sa.BigInteger))
        .with_for_update()
    )
    rows = materialized(lowest, "pgqrs_rows")
    return sa.delete(message).where(message.c.id == rows.c.id)


@cache
def purge_unchanged(tables: Tables) -> Executable:
    """Delete messages of a queue that have not been leased or requeued since they were read.

    Each lease and each INSERT, that of a requeue too, draws a new fencing token. No two messages,
    and no two leases of one, have the same.

    Binds: queue; ids and tokens, in the same order.
    """
    message = tables.message
    ids = array_bind("ids", sa.BigInteger)
    read = (
        func.unnest(ids, array_bind("tokens", sa.BigInteger))
        .table_valued(sa.column("id", sa.BigInteger), sa.column("token", sa.BigInteger))
        .render_derived("pgqrs_read")
    )
    unchanged = (
        sa.select(message.c.id)
        .join(read, sa.and_(message.c.id == read.c.id, message.c.fencing_token == read.c.token))
        .where(message.c.queue_id == queue_id(tables), message.c.id == func.any(ids))
        .order_by(message.c.id)
        .with_for_update(of=message)
    )
    rows = materialized(unchanged, "pgqrs_rows")
    return sa.delete(message).where(message.c.id == rows.c.id)


@cache
def contents(tables: Tables) -> Executable:
    """How many live and archived messages a queue has. Binds: queue."""
    _, message, archived, _ = tables

    def count(model: Any) -> ColumnElement[int]:
        return (
            sa.select(func.count())
            .select_from(model)
            .where(model.c.queue_id == queue_id(tables))
            .scalar_subquery()
        )

    return sa.select(count(message).label("messages"), count(archived).label("archived"))


@cache
def is_empty(tables: Tables) -> Executable:
    """Whether a queue has neither live nor archived messages.

    It looks into the indexes that begin with the queue, and reads no other queue's rows: it runs
    while `keep_writers_out` holds everybody up. Binds: queue.
    """
    _, message, archived, _ = tables
    return sa.select(holds_nothing(queue_id(tables), message, archived))


def holds_nothing(id_: Any, message: sa.Table, archived: sa.Table) -> ColumnElement[bool]:
    """Whether a queue is empty, by what the indexes know. It takes tables, as a migration does.

    Args:
        id_: Of the queue, as an expression.
        message: The table of live messages.
        archived: The archive.
    """
    found = [
        sa.exists().where(message.c.queue_id == id_),
        sa.exists().where(archived.c.queue_id == id_),
    ]
    return sa.not_(sa.or_(*found))


@cache
def delete_history(tables: Tables) -> Executable:
    """Delete everything archived of a queue. Binds: queue."""
    archived = tables.archived
    return sa.delete(archived).where(archived.c.queue_id == queue_id(tables))


@cache
def delete(tables: Tables) -> Executable:
    """Delete a queue. Binds: queue."""
    queue = tables.queue
    return sa.delete(queue).where(queue.c.queue_name == sa.bindparam("queue")).returning(queue.c.id)


class LockTable(Executable, ClauseElement):
    """``LOCK TABLE … IN SHARE MODE``: waits for writers, then keeps them out until commit."""

    inherit_cache = False

    def __init__(self, table: sa.FromClause) -> None:
        self.table = table


@compiles(LockTable, "postgresql")
def _lock_table(element: LockTable, compiler: SQLCompiler, **_options: Any) -> str:
    return f"LOCK TABLE {compiler.preparer.format_table(element.table)} IN SHARE MODE"


def lock_messages(tables: Tables) -> Executable:
    """Keep everybody from enqueueing while a queue is being deleted.

    There is no foreign key that would refuse a message to a queue that is gone, and a lock on
    the queue's row would need a right that producers are better without.
    """
    return LockTable(tables.message)

"""Fragments that several statements share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.expression import HasCTE
from sqlalchemy.sql.functions import next_value
from sqlalchemy.sql.visitors import InternalTraversal

from .. import states
from ..states import now
from ..tables import Tables, fencing_sequence

ATTEMPT = ("payload", "headers", "priority", "vt", "enqueued_at", "read_ct", "max_read_ct")
"""The columns of a message that a consumer is given, without its key, error and token."""

CONTENT = (
    "queue_id",
    *ATTEMPT,
    "dequeued_at",
    "producer_worker_id",
    "consumer_worker_id",
    "dedup_key",
    "last_error",
    "fencing_token",
)
"""The columns of a message, all but its id, that the archive has too."""

timestamp = sa.DateTime(timezone=True)


LEASED = (
    "leased_until",
    "read_ct",
    "max_read_ct",
    "dequeued_at",
    "consumer_worker_id",
    "fencing_token",
)
"""The columns of a live message that a lease writes: no index may name one. See `lease`."""

MOVED = ("vt", "last_error", *LEASED)
"""The columns of a live message that leasing and settling change."""

NO_LEASE: dict[str, None] = {"leased_until": None, "dequeued_at": None, "consumer_worker_id": None}
"""What an UPDATE sets when a lease is given up."""


@cache
def copied_columns(tables: Tables) -> tuple[str, ...]:
    """Return the columns that a message takes along into the archive, and back.

    They are ours, and those that a host has added to both of its classes.
    """
    added = set(tables.message.c.keys()) & set(tables.archived.c.keys())
    return CONTENT + tuple(sorted(added - set(CONTENT) - {"id"}))


def interval_bind(name: str) -> ColumnElement[Any]:
    """A bind parameter that holds a timedelta or None."""
    return sa.bindparam(name, type_=sa.Interval)


class Elapsed(sa.types.TypeDecorator[timedelta]):
    """A number of seconds that arrives as a timedelta.

    A duration never leaves the server as an interval: how that is written depends on the
    connection's IntervalStyle, and psycopg reads the style of PostgreSQL only.
    """

    impl = sa.Double
    cache_ok = True

    def process_result_value(self, value: float | None, dialect: Any) -> timedelta | None:  # noqa: ARG002
        """Return what arrived as a timedelta."""
        return None if value is None else timedelta(seconds=value)


def elapsed(duration: ColumnElement[Any]) -> ColumnElement[timedelta]:
    """An interval as a column of a result; see `Elapsed`."""
    return sa.type_coerce(sa.cast(sa.extract("epoch", duration), sa.Double), Elapsed())


def visible_at(delay: ColumnElement[Any], at: ColumnElement[Any]) -> ColumnElement[Any]:
    """The time at which a message with this delay or time is visible; not before now.

    A message is never placed before those that are visible already.
    """
    return func.greatest(func.coalesce(at, now() + delay), now(), type_=timestamp)


def json_bind(name: str) -> ColumnElement[Any]:
    """A bind parameter that holds JSON text or None: the host's serializer is not involved."""
    return sa.cast(sa.bindparam(name, type_=sa.Text), JSONB)


def array_bind(name: str, item: Any) -> ColumnElement[Any]:
    """A bind parameter that holds a list: one prepared statement for every length."""
    return sa.bindparam(name, type_=sa.ARRAY(item))


class _Written(sa.types.TypeDecorator[Sequence[Any]]):
    """A list of numbers or moments, sent as PostgreSQL writes it: ``{1,2,3}``."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Any) -> str | None:  # noqa: ARG002
        return None if value is None else f"{{{','.join(map(str, value))}}}"


def array_text_bind(name: str, item: Any) -> ColumnElement[Any]:
    """As `array_bind`, of what needs no quotes, for the statements of every second.

    A driver turns the members into text one by one, in Python: for three lists of 50 that took a
    sixth of the time that a consumer spends on leasing and settling.
    """
    return sa.cast(sa.bindparam(name, None, _Written()), sa.ARRAY(item))


def hide_from_planner(bind: ColumnElement[Any]) -> ColumnElement[Any]:
    """A bind parameter whose value the planner does not look at.

    Seeing a list of one, it finds the plan for that cheaper than the one for any list, and plans
    it again each time (measured: 0.5 ms of the 1.2 that archiving and leasing one message took).
    """
    return sa.select(bind.label("x")).scalar_subquery()  # shorter than anon_1: see `alias_short`


class _NextToken(next_value):
    """`sqlalchemy.Sequence.next_value`, for schemas whose names have an apostrophe, too."""

    package = "pgqrs_sa"
    inherit_cache = True


@compiles(_NextToken)
def _next_token(element: _NextToken, compiler: Any, **_: Any) -> str:
    return f"nextval($n${compiler.preparer.format_sequence(element.sequence)}$n$)"


def next_token(message: Any) -> ColumnElement[int]:
    """The next fencing token of the messages, drawn once for each row of a SELECT.

    Put it into a CTE. In the SET of an UPDATE, ``DEFAULT`` would draw the same number, but Citus
    refuses functions that are VOLATILE there.
    """
    table: Any = message.element if isinstance(message, sa.Alias) else message
    return _NextToken(fencing_sequence(table))


class TableName(ColumnElement[str]):
    """The name of a table as a text of SQL, with the schema that the statement is translated to.

    Args:
        table: Which.
    """

    inherit_cache = True
    _traverse_internals = [("table", InternalTraversal.dp_clauseelement)]  # noqa: RUF012
    type = sa.Text()

    def __init__(self, table: sa.Table) -> None:
        self.table = table


@compiles(TableName)
def _table_name(element: TableName, compiler: Any, **_: Any) -> str:
    return f"$n${compiler.preparer.format_table(element.table)}$n$"


def queue_id(tables: Tables) -> ColumnElement[Any]:
    """The id of the queue that the bind parameter ``queue`` names, or NULL."""
    queue = tables.queue
    return (
        sa.select(queue.c.id).where(queue.c.queue_name == sa.bindparam("queue")).scalar_subquery()
    )


QUEUE_ID = sa.bindparam("queue_id", type_=sa.BigInteger)
"""A queue by its id: the planner then knows how many rows of a table are that queue's. By the
name it can only guess at the average queue, and reads a table of two queues whole for the smaller.
"""


@cache
def alias_short(message: sa.Table) -> Any:
    """The messages under a short name, for the statements of every second.

    psycopg keeps what it has made of a statement only if that has at most 4,096 characters; the
    one that archives and leases would have more.
    """
    return message.alias("m")


def queue_levels(message: sa.Table, queues: sa.Select[Any]) -> sa.CTE:
    """The levels of priority of each of these queues, then NULL.

    A look into the index for each level (https://wiki.postgresql.org/wiki/Loose_indexscan): a
    queue of scheduled messages would be read to its end otherwise.

    Args:
        message: The table of live messages.
        queues: Selects the ids.
    """
    queue = queues.subquery("pgqrs_open")

    def least(*where: ColumnElement[bool]) -> ColumnElement[int]:
        # No bind as the limit, which a plan for any values would not see. EXISTS and min() may
        # become joins that read the table.
        first = sa.select(message.c.priority).where(*where).order_by(message.c.priority)
        return first.limit(sa.literal_column("1")).scalar_subquery()

    level = least(message.c.queue_id == queue.c.id).label("level")
    found = sa.select(queue.c.id, level).cte("pgqrs_levels", recursive=True)
    further = least(message.c.queue_id == found.c.id, message.c.priority > found.c.level)
    return found.union_all(sa.select(found.c.id, further).where(found.c.level.is_not(None)))


def first_visible(message: sa.Table, levels: sa.CTE, look: Any) -> Any:
    """The first visible, unleased messages of each of these levels, to be joined to them.

    Args:
        message: The table of live messages.
        levels: `queue_levels`.
        look: How many of each level; NULL for all.
    """
    return (
        sa.select(message.c.id, states.has_attempts(message.c).label("more"))
        .where(
            message.c.queue_id == levels.c.id,
            message.c.priority == levels.c.level,
            message.c.vt <= now(),
            states.unleased(message.c),
        )
        .order_by(message.c.vt, message.c.id)
        .limit(look)
        .lateral("visible")
    )


def materialized(rows: HasCTE, name: str) -> sa.CTE:
    """Rows that a statement first locks and then changes: never more than these."""
    return rows.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")


def update_free(table: sa.Table, name: str, *where: ColumnElement[bool]) -> sa.Update:
    """Update the rows that meet criteria, locked in the order of their ids.

    Rows that another transaction has locked are left as they are; the criteria are judged again
    under the lock.
    """
    free = sa.select(table.c.id).where(*where).order_by(table.c.id)
    rows = materialized(free.with_for_update(skip_locked=True), name)
    return sa.update(table).where(table.c.id == rows.c.id)


def clamp_attempts(attempts: ColumnElement[Any]) -> ColumnElement[Any]:
    """A number of attempts that its column can hold."""
    return sa.cast(func.least(sa.cast(attempts, sa.BigInteger), 2_147_483_647), sa.Integer)


def in_rows(message: Any, rows: sa.CTE) -> ColumnElement[bool]:
    """It is one of a few chosen rows, to be found again by the primary key.

    The join is what is meant; the list says it once more in a form that the planner turns into
    as many look-ups whatever the statistics of a busy table claim. By the join alone it has read
    the whole index at times (measured with 50 of 20,000 rows, never analysed).
    """
    return sa.and_(message.c.id == rows.c.id, in_list(message, rows))


def in_list(message: Any, rows: sa.CTE) -> ColumnElement[bool]:
    """As `in_rows`, where nothing else of the rows is wanted: a join costs time for each."""
    return message.c.id == func.any(ids_of(rows))  # type: ignore[no-any-return]


def ids_of(rows: sa.CTE) -> ColumnElement[Any]:
    """The ids of a few chosen rows as a list."""
    return func.array(sa.select(rows.c.id).scalar_subquery(), type_=sa.ARRAY(sa.BigInteger))


def move_to_archive(
    tables: Tables,
    *found: ColumnElement[bool],
    outcome: ColumnElement[str],
    reason: ColumnElement[Any] | None = None,
    last_error: ColumnElement[Any] | None = None,
) -> sa.Select[Any]:
    """Delete messages, and insert those that their queues keep into the archive.

    Args:
        tables: The tables.
        found: Which: criteria on `alias_short` of the messages.
        outcome: What the archive says of them.
        reason: Why; NULL by default.
        last_error: Kept of those for which it is not NULL; of the others, what they have.

    Returns:
        One statement, with the ids of all that were deleted.
    """
    archived = tables.archived
    message = alias_short(tables.message)
    columns = [name for name in copied_columns(tables) if name != "last_error"]
    error: ColumnElement[Any] = message.c.last_error
    values = {name: message.c[name] for name in ("id", *columns)} | {"last_error": error}
    if reason is not None:
        values["reason"] = reason.label("reason")
    if last_error is not None:
        values["last_error"] = func.coalesce(last_error, error).label("last_error")
    gone = sa.delete(message).where(*found).returning(*values.values()).cte("pq_gone")
    # All that DELETE returns, in its order. Named one by one, its columns are a tenth of the text
    # of the statement that archives and leases: see `alias_short`.
    everything: ColumnElement[Any] = sa.literal_column("pq_gone.*")
    source = sa.select(everything, outcome).select_from(gone)
    source = source.where(gone.c.queue_id != func.all(_keeping_less(tables.queue, outcome)))
    kept = insert(archived).from_select([*values, "outcome"], source).cte("pq_kept")
    return sa.select(gone.c.id).add_cte(kept)


def _keeping_less(queues: sa.Table, outcome: ColumnElement[str]) -> ColumnElement[Any]:
    """The ids of the queues that do not keep messages with this outcome.

    Most queues keep all. A partial index has the others, and is read once a statement.
    """
    queue: Any = queues.alias("q")
    less = queue.c.keep != sa.literal_column("'all'")
    nothing = queue.c.keep == sa.literal_column("'nothing'")
    known = outcome.value if isinstance(outcome, sa.BindParameter) else None
    if known is None:
        less &= sa.or_(nothing, outcome == sa.literal_column("'archived'"))
    elif known != "archived":
        less &= nothing
    ids = sa.select(queue.c.id).where(less).scalar_subquery()
    return func.array(ids, type_=sa.ARRAY(sa.BigInteger))


def seconds(value: sa.ColumnExpressionArgument[Any]) -> ColumnElement[Any]:
    """A number of seconds as an interval."""
    return sa.type_coerce(value, sa.Double) * sa.literal(timedelta(seconds=1), sa.Interval)


def content(model: Any) -> list[ColumnElement[Any]]:
    """The columns of a view of a message, JSON as text so that a bad row fails by itself."""
    return [
        *outline(model),
        sa.cast(model.c.payload, sa.Text).label("payload"),
        sa.cast(model.c.headers, sa.Text).label("headers"),
        model.c.dedup_key.label("dedup_key"),
        model.c.last_error.label("last_error"),
    ]


def outline(model: Any) -> list[ColumnElement[Any]]:
    """The columns of a view of a message, without its content, which may be private."""
    names = (
        *("id", "priority", "vt", "enqueued_at", "read_ct", "max_read_ct"),
        *("consumer_worker_id", "producer_worker_id", "dequeued_at"),
    )
    return [model.c[name].label(name) for name in names]

"""Settling a delivery: every statement here carries the fence, and changes nothing without it.

The fence is ``(id, fencing_token)`` of a message that is still held. Each lease has a token of its
own from a sequence, which no rollback takes back: neither a lease that was lost nor one that was
never committed can be mistaken for the present one. ``leased_until`` is emptied when a lease is
given up, so a delivery cannot be settled twice either. A lease that ran out, but that nobody took,
still counts as held.

``required`` makes a batch all or nothing: with fewer rows held than that, none is touched. Pass
the number of deliveries, or 0 to settle what can be settled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..states import now
from ..tables import Tables
from .fragments import (
    MOVED,
    NO_LEASE,
    alias_short,
    array_bind,
    array_text_bind,
    clamp_attempts,
    hide_from_planner,
    in_list,
    in_rows,
    interval_bind,
    materialized,
    move_to_archive,
)


def held(tables: Tables, *extra: ColumnElement[Any], skip_locked: bool = False) -> sa.CTE:
    """The rows that the deliveries still hold, locked in the order of their ids.

    With ``skip_locked`` those that another transaction is just changing are left out: a consumer
    renews many leases at once, and must not wait for the one that is being settled.

    Binds: ids, tokens, and those of ``extra``.
    """
    message = alias_short(tables.message)
    names = [f"extra_{n}" for n in range(len(extra))]
    given = (
        func.unnest(
            hide_from_planner(array_text_bind("ids", sa.BigInteger)),
            hide_from_planner(array_text_bind("tokens", sa.BigInteger)),
            *map(hide_from_planner, extra),
        )
        .table_valued("id", "token", *names)
        .render_derived("given")
    )
    # Who waits for locks takes them in one order; who skips what is locked cannot be in a deadlock.
    lease: Any = given if skip_locked else sa.select(given).order_by(given.c.id).subquery("lease")
    # A look-up for each, whatever the statistics say: as a join it has compared every row with
    # every lease (measured with 1000 of them and a generic plan: 148 ms, and 4 ms like this).
    mine = (
        sa.select(message.c.id)
        .where(
            message.c.id == lease.c.id,
            message.c.fencing_token == lease.c.token,
            message.c.leased_until.is_not(None),
        )
        .with_for_update(of=message, skip_locked=skip_locked)
        .lateral("mine")
    )
    columns = (lease.c[name] for name in names)
    rows = sa.select(mine.c.id, *columns).join_from(lease, mine, sa.true())
    return materialized(rows, "pq_held")


def _enough(rows: sa.CTE) -> ColumnElement[bool]:
    count = sa.select(func.count()).select_from(rows).scalar_subquery()
    return count >= sa.bindparam("required", type_=sa.BigInteger)


@cache
def archive(tables: Tables, *, with_reason: bool = True, skip_locked: bool = False) -> Executable:
    """Move messages to the archive: one statement deletes and inserts.

    Binds: ids, tokens, outcome, required; reasons and errors when ``with_reason``.
    """
    extra = (array_bind("reasons", sa.Text), array_bind("errors", sa.Text)) if with_reason else ()
    rows = held(tables, *extra, skip_locked=skip_locked)
    message = alias_short(tables.message)
    outcome = sa.bindparam("outcome", type_=sa.Text)
    if not with_reason:
        return move_to_archive(tables, in_list(message, rows), _enough(rows), outcome=outcome)
    return move_to_archive(
        tables,
        in_rows(message, rows),
        _enough(rows),
        outcome=outcome,
        reason=rows.c.extra_0,
        last_error=rows.c.extra_1,
    )


def _held_one(tables: Tables) -> ColumnElement[bool]:
    """The one row that a delivery still holds, without a lock of its own before it is changed.

    A batch has to lock its rows in one order first, so that no two are in a deadlock, and a
    consumer to leave out those that are locked. One row that may be waited for needs neither:
    that saves a seventh of the time of the server, and 54 bytes of WAL.

    Binds: id, token.
    """
    message = alias_short(tables.message)
    return sa.and_(
        message.c.id == sa.bindparam("id", type_=sa.BigInteger),
        message.c.fencing_token == sa.bindparam("token", type_=sa.BigInteger),
        message.c.leased_until.is_not(None),
    )


@cache
def archive_one(tables: Tables, *, with_reason: bool = True) -> Executable:
    """As `archive`, of one message.

    Binds: id, token, outcome; reasons and errors, of the one, when ``with_reason``.
    """
    why: dict[str, ColumnElement[Any]] = {}
    if with_reason:
        why["reason"] = sa.bindparam("reasons", type_=sa.Text)
        why["last_error"] = sa.bindparam("errors", type_=sa.Text)
    outcome = sa.bindparam("outcome", type_=sa.Text)
    return move_to_archive(tables, _held_one(tables), outcome=outcome, **why)


@cache
def archive_done(tables: Tables) -> sa.Select[Any]:
    """Archive the messages that are held and not locked.

    Binds: ids, tokens.
    """
    rows = held(tables, skip_locked=True)
    found = in_list(alias_short(tables.message), rows)
    return move_to_archive(tables, found, outcome=sa.literal("archived"))


@cache
def delete(tables: Tables, *, skip_locked: bool = False) -> Executable:
    """Delete messages, keeping nothing.

    Binds: ids, tokens, required.
    """
    message = tables.message
    rows = held(tables, skip_locked=skip_locked)
    return (
        sa.delete(message)
        .where(in_list(message, rows), _enough(rows))
        .returning(message.c.id.label("id"))
    )


@cache
def delete_one(tables: Tables) -> Executable:
    """As `delete`, of one message. Binds: id, token."""
    message = alias_short(tables.message)
    return sa.delete(message).where(_held_one(tables)).returning(message.c.id)


@cache
def extend(tables: Tables, *, skip_locked: bool = False) -> Executable:
    """Let the leases expire this long from now.

    Binds: ids, tokens, lease, required.
    """
    rows = held(tables, skip_locked=skip_locked)
    return _update(tables, rows, leased_until=now() + interval_bind("lease"))


@cache
def release(tables: Tables, *, delayed: bool = False, skip_locked: bool = False) -> Executable:
    """Release leases without charging the attempt; without a delay a message keeps its place.

    ``read_ct`` only ever grows, so the limit is raised instead.

    Binds: ids, tokens, required; delay when ``delayed``.
    """
    message = tables.message
    times = {"vt": now() + interval_bind("delay")} if delayed else {}
    return _update(
        tables,
        held(tables, skip_locked=skip_locked),
        max_read_ct=clamp_attempts(sa.cast(message.c.max_read_ct, sa.BigInteger) + 1),
        **times,
        **NO_LEASE,
    )


@cache
def reschedule_failed(tables: Tables, *, skip_locked: bool = False) -> Executable:
    """Reschedule failed messages that have an attempt left.

    Binds: ids, tokens, errors, delays, required.
    """
    rows = held(
        tables,
        array_bind("errors", sa.Text),
        array_bind("delays", sa.Interval),
        skip_locked=skip_locked,
    )
    # Citus refuses a function that is STABLE and reads a column in SET, but not in a sub-select.
    again = sa.select(now() + rows.c.extra_1).correlate(rows).scalar_subquery()
    return _update(
        tables,
        rows,
        states.has_attempts(tables.message.c),
        vt=again,
        last_error=rows.c.extra_0,
        **NO_LEASE,
    )


def _update(
    tables: Tables, rows: sa.CTE, *conditions: sa.ColumnExpressionArgument[bool], **values: Any
) -> Executable:
    message = tables.message
    return (
        sa.update(message)
        .where(in_rows(message, rows), _enough(rows), *conditions)
        .values(**values)
        .returning(message.c.id, *(message.c[name] for name in MOVED))
    )


@cache
def whereabouts(tables: Tables) -> Executable:
    """Where messages are now, live or archived.

    Binds: ids.
    """
    _, message, archived, _ = tables
    ids = array_bind("ids", sa.BigInteger)
    live = sa.select(
        message.c.id.label("id"),
        states.state(message.c).label("state"),
        message.c.read_ct.label("read_ct"),
        message.c.consumer_worker_id.label("worker_id"),
        message.c.fencing_token.label("fencing_token"),
        sa.case(
            (states.leased(message.c), message.c.leased_until), (message.c.vt > now(), message.c.vt)
        ).label("until"),
        message.c.leased_until.is_not(None).label("held"),
        sa.false().label("settled"),
    ).where(message.c.id == func.any(ids))
    settled = sa.select(
        archived.c.id,
        archived.c.outcome,
        archived.c.read_ct,
        archived.c.consumer_worker_id,
        archived.c.fencing_token,
        sa.null(),
        sa.false(),
        sa.true(),
    ).where(archived.c.id == func.any(ids))
    return live.union_all(settled)

"""Settling a delivery: every statement here carries the fence, and changes nothing without it.

The fence is ``(id, read_ct, consumer_worker_id)`` of a message that is still held. ``read_ct``
only grows, so a lease that was lost can never be mistaken for the present one; ``dequeued_at`` is
emptied when a lease is given up, so a delivery cannot be settled twice either. A lease that ran
out, but that nobody took, still counts as held.

``required`` makes a batch all or nothing: with fewer rows held than that, none is touched. Pass
the number of deliveries, or 0 to settle what can be settled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from ..models import Models
from .parts import array_bind, chosen, move_to_archive, now, span


def _held(models: Models, *extra: ColumnElement[Any]) -> sa.CTE:
    """The rows that the deliveries still hold, locked in the order of their ids.

    Binds: ids, read_cts, workers (0 for none), and those of ``extra``.
    """
    message = models.message
    token = (
        func.unnest(
            array_bind("ids", sa.BigInteger),
            array_bind("read_cts", sa.Integer),
            array_bind("workers", sa.BigInteger),
            *extra,
        )
        .table_valued("id", "read_ct", "worker", *(f"extra_{n}" for n in range(len(extra))))
        .render_derived("token")
    )
    rows = (
        sa.select(message.id, *(token.c[f"extra_{n}"] for n in range(len(extra))))
        .join(token, message.id == token.c.id)
        .where(
            # The list again, although the join says it: an index scan on the primary key is
            # then the plan whatever the statistics of a busy table claim.
            message.id == func.any(array_bind("ids", sa.BigInteger)),
            message.read_ct == token.c.read_ct,
            func.coalesce(message.consumer_worker_id, 0) == token.c.worker,
            message.dequeued_at.is_not(None),
        )
        .order_by(message.id)
        .with_for_update(of=message)
    )
    return chosen(rows, "pgqrs_held")


def _enough(held: sa.CTE) -> ColumnElement[bool]:
    count = sa.select(func.count()).select_from(held).scalar_subquery()
    return count >= sa.bindparam("required", type_=sa.BigInteger)


@cache
def archive(models: Models) -> Executable:
    """Move messages to the archive: one statement deletes and inserts.

    Binds: ids, read_cts, workers, reasons, errors, outcome, required.
    """
    held = _held(models, array_bind("reasons", sa.Text), array_bind("errors", sa.Text))
    return move_to_archive(
        models,
        held,
        _enough(held),
        outcome=sa.bindparam("outcome", type_=sa.Text),
        reason=held.c.extra_0,
        last_error=func.coalesce(held.c.extra_1, models.message.last_error),
    )


@cache
def delete(models: Models) -> Executable:
    """Delete messages, keeping nothing.

    Binds: ids, read_cts, workers, required.
    """
    message = models.message
    held = _held(models)
    return (
        sa.delete(message)
        .where(message.id == held.c.id, _enough(held))
        .returning(message.id.label("id"))
        .execution_options(synchronize_session="fetch", is_delete_using=True)
    )


@cache
def extend(models: Models) -> Executable:
    """Let the leases run out this much later than now.

    Binds: ids, read_cts, workers, lease, required.
    """
    return _update(models, _held(models), vt=now() + span("lease"))


@cache
def release(models: Models) -> Executable:
    """Give leases back, without charging the attempt.

    ``read_ct`` is the fence and cannot be lowered, so the limit is raised instead.

    Binds: ids, read_cts, workers, delay, required.
    """
    message = models.message
    return _update(
        models,
        _held(models),
        vt=now() + span("delay"),
        max_read_ct=message.max_read_ct + 1,
        dequeued_at=None,
        consumer_worker_id=None,
    )


@cache
def reschedule_failed(models: Models) -> Executable:
    """Put failed messages back for another attempt, those that have one left.

    Binds: ids, read_cts, workers, errors, delays, required.
    """
    message = models.message
    held = _held(models, array_bind("errors", sa.Text), array_bind("delays", sa.Interval))
    return _update(
        models,
        held,
        message.has_attempts,
        vt=now() + held.c.extra_1,
        last_error=held.c.extra_0,
        dequeued_at=None,
        consumer_worker_id=None,
    )


def _update(
    models: Models, held: sa.CTE, *conditions: sa.ColumnExpressionArgument[bool], **values: Any
) -> Executable:
    message = models.message
    return (
        sa.update(message)
        .where(message.id == held.c.id, _enough(held), *conditions)
        .values(**values)
        .returning(message.id.label("id"), message.vt.label("vt"))
        .execution_options(synchronize_session="fetch")
    )


@cache
def whereabouts(models: Models) -> Executable:
    """Where messages are now, live or archived.

    Binds: ids.
    """
    message, archived = models.message, models.archived
    ids = array_bind("ids", sa.BigInteger)
    live = sa.select(
        message.id.label("id"),
        message.state.label("state"),
        message.read_ct.label("read_ct"),
        message.consumer_worker_id.label("worker_id"),
        sa.case((message.vt > now(), message.vt)).label("until"),
        message.dequeued_at.is_not(None).label("held"),
    ).where(message.id == func.any(ids))
    settled = sa.select(
        archived.original_msg_id,
        archived.outcome,
        archived.read_ct,
        archived.consumer_worker_id,
        sa.null(),
        sa.false(),
    ).where(archived.original_msg_id == func.any(ids))
    return live.union_all(settled)

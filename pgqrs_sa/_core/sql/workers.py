"""The register of processes, and taking leases back from those that fell silent."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql import ColumnElement, Executable

from ...models import Models
from ...types import WorkerStatus
from .. import states
from ..states import now
from .fragments import MOVED, array_bind, elapsed, interval_bind, materialized, tables

_ID = sa.bindparam("worker_id", type_=sa.BigInteger)


def _row(worker: sa.Table) -> list[ColumnElement[Any]]:
    names = ("id", "name", "hostname", "pid", "port", "version", "queues", "status", "leased")
    times = ("started_at", "heartbeat_at", "shutdown_at")
    return [worker.c[name] for name in (*names, *times)]


@cache
def register(models: Models) -> Executable:
    """Insert a worker. Binds: name, hostname, pid, port, version, queues, leased."""
    worker = tables(models).worker
    names = ("name", "hostname", "pid", "port", "version", "queues", "leased")
    values = {name: sa.bindparam(name, type_=worker.c[name].type) for name in names}
    return insert(worker).values(**values).returning(*_row(worker))


@cache
def get(models: Models) -> Executable:
    """One worker. Binds: worker_id."""
    return sa.select(*_row(tables(models).worker)).where(tables(models).worker.c.id == _ID)


@cache
def everything(models: Models, *, status: WorkerStatus | None, in_queue: bool) -> Executable:
    """Workers by id. Binds: queue when ``in_queue``."""
    worker = tables(models).worker
    statement = sa.select(*_row(worker)).order_by(worker.c.id)
    if status is not None:
        statement = statement.where(worker.c.status == status)
    if in_queue:
        name = sa.bindparam("queue", type_=sa.Text)
        statement = statement.where(name == func.any(worker.c.queues))
    return statement


@cache
def heartbeat(models: Models) -> Executable:
    """Note that a worker lives, unless it was stopped, and what it says that it holds.

    Binds: worker_id, leased (None: it does not say).
    """
    worker = tables(models).worker
    leased = sa.bindparam("leased", type_=sa.Integer)
    living = worker.c.status != sa.literal("stopped")
    return _update(models, living, heartbeat_at=now(), leased=leased)


@cache
def set_status(models: Models, status: WorkerStatus) -> Executable:
    """Suspend, resume or stop a worker that is not stopped yet. Binds: worker_id."""
    worker = tables(models).worker
    values: dict[str, Any] = {"status": status}
    if status == "stopped":
        values["shutdown_at"] = now()
    return _update(models, worker.c.status != sa.literal("stopped"), **values)


def _update(
    models: Models, *conditions: sa.ColumnExpressionArgument[bool], **values: Any
) -> Executable:
    worker = tables(models).worker
    return (
        sa.update(worker)
        .where(worker.c.id == _ID, *conditions)
        .values(**values)
        .returning(*_row(worker))
    )


@cache
def health(models: Models) -> Executable:
    """Each worker that is not stopped, and how long it has been silent.

    It reads the workers alone: no index finds what a worker holds, so that counting it here would
    read all messages.
    """
    worker = tables(models).worker
    return (
        sa.select(*_row(worker), elapsed(now() - worker.c.heartbeat_at).label("silent_for"))
        .where(worker.c.status != sa.literal("stopped"))
        .order_by(worker.c.id)
    )


def _holding(models: Models) -> ColumnElement[bool]:
    _, message, _, worker = tables(models)
    return sa.exists().where(message.c.consumer_worker_id == worker.c.id, states.leased(message.c))


@cache
def stop_silent(models: Models, *, in_queue: bool, holding: bool) -> Executable:
    """Stop the workers that have been silent for too long, and say which.

    The silence is judged again under the lock, so one that has come back meanwhile is spared;
    one that somebody else is judging is left to them.

    Binds: silent_for; queue when ``in_queue``.
    """
    worker = tables(models).worker
    more: list[ColumnElement[bool]] = []
    if in_queue:
        more.append(sa.bindparam("queue", type_=sa.Text) == func.any(worker.c.queues))
    if holding:
        more.append(_holding(models))
    overdue = (
        sa.select(worker.c.id)
        .where(
            worker.c.status != sa.literal("stopped"),
            worker.c.heartbeat_at < now() - interval_bind("silent_for"),
            *more,
        )
        .order_by(worker.c.id)
        .with_for_update(skip_locked=True)
    )
    silent = materialized(overdue, "pgqrs_silent")
    return (
        sa.update(worker)
        .where(worker.c.id == silent.c.id)
        .values(status="stopped", shutdown_at=now())
        .returning(worker.c.id, worker.c.status, worker.c.shutdown_at)
    )


@cache
def release_leases(models: Models) -> Executable:
    """Make visible at once what these workers hold. The attempts stay counted.

    Binds: ids.
    """
    message = tables(models).message
    leases = (
        sa.select(message.c.id)
        .where(
            states.leased(message.c),
            message.c.consumer_worker_id == func.any(array_bind("ids", sa.BigInteger)),
        )
        .order_by(message.c.id)
        .with_for_update(skip_locked=True)
    )
    held = materialized(leases, "pq_held")
    return (
        sa.update(message)
        .where(message.c.id == held.c.id)
        .values(vt=now(), dequeued_at=None, consumer_worker_id=None)
        .returning(message.c.id, *(message.c[name] for name in MOVED))
    )


@cache
def purge(models: Models) -> Executable:
    """Delete workers that stopped long enough ago and hold nothing. Binds: older_than."""
    worker = tables(models).worker
    return sa.delete(worker).where(
        worker.c.status == sa.literal("stopped"),
        worker.c.shutdown_at < now() - interval_bind("older_than"),
        sa.not_(_holding(models)),
    )


@cache
def delete(models: Models) -> Executable:
    """Delete a worker that is stopped and holds nothing. Binds: worker_id."""
    worker = tables(models).worker
    return (
        sa.delete(worker)
        .where(
            worker.c.id == _ID,
            worker.c.status == sa.literal("stopped"),
            sa.not_(_holding(models)),
        )
        .returning(worker.c.id)
    )

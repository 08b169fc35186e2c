"""The register of processes, and taking leases back from those that fell silent."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql import ColumnElement, Executable

from ..models import Models, WorkerMixin
from ..types import WorkerStatus
from .parts import array_bind, chosen, now, span

_ID = sa.bindparam("worker_id", type_=sa.BigInteger)


def _row(worker: type[WorkerMixin]) -> list[ColumnElement[Any]]:
    names = ("id", "name", "hostname", "pid", "port", "version", "queues", "status")
    times = ("started_at", "heartbeat_at", "shutdown_at")
    return [getattr(worker, name) for name in (*names, *times)]


@cache
def register(models: Models) -> Executable:
    """Insert a worker. Binds: name, hostname, pid, port, version, queues."""
    worker = models.worker
    names = ("name", "hostname", "pid", "port", "version", "queues")
    values = {name: sa.bindparam(name, type_=getattr(worker, name).type) for name in names}
    return (
        insert(worker)
        .values(**values)
        .returning(*_row(worker))
        .execution_options(dml_strategy="raw")
    )


@cache
def get(models: Models) -> Executable:
    """One worker. Binds: worker_id."""
    return sa.select(*_row(models.worker)).where(models.worker.id == _ID)


@cache
def everything(models: Models, *, status: WorkerStatus | None, in_queue: bool) -> Executable:
    """Workers by id. Binds: queue when ``in_queue``."""
    worker = models.worker
    statement = sa.select(*_row(worker)).order_by(worker.id)
    if status is not None:
        statement = statement.where(worker.status == status)
    if in_queue:
        name = sa.bindparam("queue", type_=sa.Text)
        statement = statement.where(name == func.any(worker.queues))
    return statement


@cache
def heartbeat(models: Models) -> Executable:
    """Note that a worker lives, unless it was stopped. Binds: worker_id."""
    worker = models.worker
    return _update(models, worker.status != sa.literal("stopped"), heartbeat_at=now())


@cache
def set_status(models: Models, status: WorkerStatus) -> Executable:
    """Suspend, resume or stop a worker that is not stopped yet. Binds: worker_id."""
    worker = models.worker
    values: dict[str, Any] = {"status": status}
    if status == "stopped":
        values["shutdown_at"] = now()
    return _update(models, worker.status != sa.literal("stopped"), **values)


def _update(
    models: Models, *conditions: sa.ColumnExpressionArgument[bool], **values: Any
) -> Executable:
    worker = models.worker
    return (
        sa.update(worker)
        .where(worker.id == _ID, *conditions)
        .values(**values)
        .returning(*_row(worker))
        .execution_options(synchronize_session="fetch")
    )


@cache
def health(models: Models) -> Executable:
    """Each worker that is not stopped, how long it has been silent, and what it holds."""
    worker, message = models.worker, models.message
    held = (
        sa.select(message.consumer_worker_id.label("worker_id"), func.count().label("leases"))
        .where(message.leased)
        .group_by(message.consumer_worker_id)
        .subquery("held")
    )
    return (
        sa.select(
            *_row(worker),
            (now() - worker.heartbeat_at).label("silent_for"),
            func.coalesce(held.c.leases, 0).label("leases"),
        )
        .outerjoin(held, held.c.worker_id == worker.id)
        .where(worker.status != sa.literal("stopped"))
        .order_by(worker.id)
    )


@cache
def stop_silent(models: Models) -> Executable:
    """Stop the workers that have been silent for too long, and say which.

    The silence is judged again under the lock, so one that has come back meanwhile is spared;
    one that somebody else is judging is left to them.

    Binds: silent_for.
    """
    worker = models.worker
    overdue = (
        sa.select(worker.id)
        .where(
            worker.status != sa.literal("stopped"), worker.heartbeat_at < now() - span("silent_for")
        )
        .order_by(worker.id)
        .with_for_update(skip_locked=True)
    )
    silent = chosen(overdue, "pgqrs_silent")
    return (
        sa.update(worker)
        .where(worker.id == silent.c.id)
        .values(status="stopped", shutdown_at=now())
        .returning(worker.id.label("id"))
        .execution_options(synchronize_session="fetch")
    )


@cache
def release_leases(models: Models) -> Executable:
    """Make visible at once what these workers hold. The attempts stay counted.

    Binds: ids.
    """
    message = models.message
    leases = (
        sa.select(message.id)
        .where(
            message.leased,
            message.consumer_worker_id == func.any(array_bind("ids", sa.BigInteger)),
        )
        .order_by(message.id)
        .with_for_update(skip_locked=True)
    )
    held = chosen(leases, "pgqrs_held")
    return (
        sa.update(message)
        .where(message.id == held.c.id)
        .values(vt=now(), dequeued_at=None, consumer_worker_id=None)
        .returning(message.id.label("id"))
        .execution_options(synchronize_session="fetch")
    )


@cache
def purge(models: Models) -> Executable:
    """Delete workers that stopped long enough ago and hold nothing. Binds: older_than."""
    worker, message = models.worker, models.message
    holds = sa.exists().where(message.consumer_worker_id == worker.id, message.leased)
    return (
        sa.delete(worker)
        .where(
            worker.status == sa.literal("stopped"),
            worker.shutdown_at < now() - span("older_than"),
            sa.not_(holds),
        )
        .execution_options(synchronize_session=False)
    )

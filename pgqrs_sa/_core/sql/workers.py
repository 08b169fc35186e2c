"""Workers: register, heartbeat, status, and releasing the leases of silent ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql import ColumnElement, Executable

from ...types import WorkerStatus
from .. import states
from ..states import now
from ..tables import Tables
from .fragments import MOVED, NO_LEASE, array_bind, elapsed, interval_bind, update_free

_ID = sa.bindparam("worker_id", type_=sa.BigInteger)


def _row(worker: sa.Table) -> list[ColumnElement[Any]]:
    names = ("id", "name", "hostname", "pid", "port", "version", "queues", "status", "leased")
    times = ("started_at", "heartbeat_at", "shutdown_at")
    return [worker.c[name] for name in (*names, *times)]


@cache
def register(tables: Tables) -> Executable:
    """Insert a worker. Binds: name, hostname, pid, port, version, queues, leased."""
    worker = tables.worker
    names = ("name", "hostname", "pid", "port", "version", "queues", "leased")
    values = {name: sa.bindparam(name, type_=worker.c[name].type) for name in names}
    return insert(worker).values(**values).returning(*_row(worker))


@cache
def get(tables: Tables) -> Executable:
    """One worker. Binds: worker_id."""
    return sa.select(*_row(tables.worker)).where(tables.worker.c.id == _ID)


@cache
def everything(tables: Tables, *, status: WorkerStatus | None, in_queue: bool) -> Executable:
    """Workers by id. Binds: queue when ``in_queue``."""
    worker = tables.worker
    statement = sa.select(*_row(worker)).order_by(worker.c.id)
    if status is not None:
        statement = statement.where(worker.c.status == status)
    if in_queue:
        name = sa.bindparam("queue", type_=sa.Text)
        statement = statement.where(name == func.any(worker.c.queues))
    return statement


@cache
def heartbeat(tables: Tables) -> Executable:
    """Store the heartbeat of a worker that is not stopped, and how much it holds.

    Binds: worker_id, leased (None: unknown).
    """
    worker = tables.worker
    leased = sa.bindparam("leased", type_=sa.Integer)
    living = worker.c.status != sa.literal("stopped")
    return _update(tables, living, heartbeat_at=now(), leased=leased)


@cache
def set_status(tables: Tables, status: WorkerStatus) -> Executable:
    """Suspend, resume or stop a worker that is not stopped yet. Binds: worker_id."""
    worker = tables.worker
    values: dict[str, Any] = {"status": status}
    if status == "stopped":
        values["shutdown_at"] = now()
    return _update(tables, worker.c.status != sa.literal("stopped"), **values)


def _update(
    tables: Tables, *conditions: sa.ColumnExpressionArgument[bool], **values: Any
) -> Executable:
    worker = tables.worker
    return (
        sa.update(worker)
        .where(worker.c.id == _ID, *conditions)
        .values(**values)
        .returning(*_row(worker))
    )


@cache
def health(tables: Tables) -> Executable:
    """Each worker that is not stopped, and how long it has been silent.

    It reads the workers alone: no index finds what a worker holds, so that counting it here would
    read all messages.
    """
    worker = tables.worker
    return (
        sa.select(*_row(worker), elapsed(now() - worker.c.heartbeat_at).label("silent_for"))
        .where(worker.c.status != sa.literal("stopped"))
        .order_by(worker.c.id)
    )


def _holding(tables: Tables) -> ColumnElement[bool]:
    _, message, _, worker = tables
    return sa.exists().where(message.c.consumer_worker_id == worker.c.id, states.leased(message.c))


@cache
def stop_silent(tables: Tables, *, in_queue: bool, holding: bool) -> Executable:
    """Stop the workers that have been silent for too long, and say which.

    The silence is judged again under the lock, so one that has come back meanwhile is spared;
    one that somebody else is judging is left to them.

    Binds: silent_for; queue when ``in_queue``.
    """
    worker = tables.worker
    overdue: list[ColumnElement[bool]] = [
        worker.c.status != sa.literal("stopped"),
        worker.c.heartbeat_at < now() - interval_bind("silent_for"),
    ]
    if in_queue:
        overdue.append(sa.bindparam("queue", type_=sa.Text) == func.any(worker.c.queues))
    if holding:
        overdue.append(_holding(tables))
    return (
        update_free(worker, "pgqrs_silent", *overdue)
        .values(status="stopped", shutdown_at=now())
        .returning(worker.c.id, worker.c.status, worker.c.shutdown_at)
    )


def _leased_to(message: sa.Table, workers: ColumnElement[Any]) -> ColumnElement[bool]:
    """The leases of workers, registered or not, that have not expired: what a release ends."""
    return sa.and_(states.leased(message.c), message.c.consumer_worker_id == workers)


@cache
def release_leases(tables: Tables) -> Executable:
    """Make the messages that these workers hold visible at once. The attempts stay counted.

    Messages that another transaction has locked are left as they are. Binds: ids.
    """
    message = tables.message
    held = _leased_to(message, func.any(array_bind("ids", sa.BigInteger)))
    return (
        update_free(message, "pq_held", held)
        .values(NO_LEASE)
        .returning(message.c.id, *(message.c[name] for name in MOVED))
    )


@cache
def release_worker(tables: Tables) -> Executable:
    """As `release_leases` of one worker, in a form that the doctor can print. Binds: worker_id."""
    message = tables.message
    return (
        sa.update(message)
        .where(_leased_to(message, _ID))
        .values(dict.fromkeys(NO_LEASE, sa.null()))
    )


@cache
def purge(tables: Tables) -> Executable:
    """Delete workers that stopped long enough ago and hold nothing. Binds: older_than."""
    worker = tables.worker
    return sa.delete(worker).where(
        worker.c.status == sa.literal("stopped"),
        worker.c.shutdown_at < now() - interval_bind("older_than"),
        sa.not_(_holding(tables)),
    )


@cache
def delete(tables: Tables) -> Executable:
    """Delete a worker that is stopped and holds nothing. Binds: worker_id."""
    worker = tables.worker
    return (
        sa.delete(worker)
        .where(
            worker.c.id == _ID,
            worker.c.status == sa.literal("stopped"),
            sa.not_(_holding(tables)),
        )
        .returning(worker.c.id)
    )

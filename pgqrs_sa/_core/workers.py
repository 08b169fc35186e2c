"""Registering workers, and releasing what silent ones hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, get_args

from sqlalchemy.orm import Session

from .. import validation
from ..errors import InvalidArgument, WorkerInUse, WorkerNotFound, WorkerNotReady, safe_repr
from ..types import WorkerHealth, WorkerInfo, WorkerStatus
from .context import Context, execute, expire_all_deleted, expire_deleted, sync_loaded
from .sql import workers as statements
from .sql.fragments import MOVED
from .wakeup import announce

__all__ = [
    "delete",
    "everything",
    "get",
    "health",
    "heartbeat",
    "purge",
    "reclaim",
    "register",
    "release_leases",
    "set_status",
]

_FIELDS = tuple(WorkerInfo.__dataclass_fields__)


def register(
    session: Session,
    context: Context,
    name: str,
    queues: Iterable[str],
    hostname: str | None,
    pid: int | None,
    port: int | None,
    version: str | None,
    *,
    leased: int | None = None,
) -> WorkerInfo:
    """Insert a row for this start of a process."""
    if hostname is None:
        hostname, pid = socket.gethostname(), os.getpid() if pid is None else pid
    if isinstance(queues, str) or not isinstance(queues, Iterable):
        raise InvalidArgument(f"queues must be a list of names, not {safe_repr(queues)}")
    values = {
        "name": validation.validate_text(name, "name"),
        "hostname": validation.validate_text(hostname, "hostname"),
        "pid": None if pid is None else validation.validate_number(pid, "pid"),
        "port": None if port is None else validation.validate_number(port, "port"),
        "version": None if version is None else validation.validate_text(version, "version"),
        "queues": [validation.validate_queue_name(queue) for queue in queues],
        "leased": leased,
    }
    return _info(execute(session, context, statements.register(context.tables), values).one())


def get(session: Session, context: Context, id: int) -> WorkerInfo:
    """Return one worker."""
    values = {"worker_id": validation.validate_id(id, "worker")}
    row = execute(session, context, statements.get(context.tables), values).one_or_none()
    if row is None:
        raise WorkerNotFound(id)
    return _info(row)


def everything(
    session: Session, context: Context, status: WorkerStatus | None, queue: str | None
) -> list[WorkerInfo]:
    """Return workers by id."""
    if status is not None and status not in get_args(WorkerStatus):
        raise InvalidArgument(
            f"status must be one of {', '.join(get_args(WorkerStatus))}, not {status!r}"
        )
    statement = statements.everything(context.tables, status=status, in_queue=queue is not None)
    values = {} if queue is None else {"queue": validation.validate_queue_name(queue)}
    return [_info(row) for row in execute(session, context, statement, values)]


def heartbeat(session: Session, context: Context, id: int, leased: int | None = None) -> WorkerInfo:
    """Store the heartbeat of a worker and how much it holds; raise if it was stopped."""
    count = None if leased is None else validation.validate_number(leased, "leased")
    return _changed(session, context, statements.heartbeat(context.tables), id, leased=count)


def set_status(
    session: Session,
    context: Context,
    id: int,
    status: WorkerStatus,
) -> WorkerInfo:
    """Suspend, resume or stop a worker; stopping a stopped one does nothing."""
    statement = statements.set_status(context.tables, status)
    if status == "stopped" and (info := get(session, context, id)).status == "stopped":
        return info
    return _changed(session, context, statement, id)


def health(session: Session, context: Context, silent_for: float | timedelta) -> list[WorkerHealth]:
    """Return the workers that are not stopped, and whether the last heartbeat of each is recent."""
    longest = validation.validate_duration(silent_for, "silent_for")
    return [
        WorkerHealth(_info(row), row.silent_for, row.silent_for <= longest, row.leased)
        for row in execute(session, context, statements.health(context.tables))
    ]


def reclaim(
    session: Session,
    context: Context,
    silent_for: float | timedelta,
    queue: str | None,
    holding: bool,
) -> int:
    """Stop silent workers and release what they hold; return how many messages."""
    span = validation.validate_age(silent_for, "silent_for", positive=True)
    values: dict[str, Any] = {"silent_for": span}
    if queue is not None:
        values["queue"] = validation.validate_queue_name(queue)
    statement = statements.stop_silent(context.tables, in_queue=queue is not None, holding=holding)
    rows = execute(session, context, statement, values).all()
    ids = [row.id for row in rows]
    sync_loaded(session, context.models.worker, rows, ("status", "shutdown_at"))
    return _release(session, context, ids)


def release_leases(session: Session, context: Context, id: int) -> int:
    """Release what a worker holds; return how many messages."""
    return _release(session, context, [get(session, context, id).id])


def purge(session: Session, context: Context, older_than: float | timedelta) -> int:
    """Delete workers that stopped long enough ago; return how many."""
    values = {"older_than": validation.validate_age(older_than, "older_than")}
    result: Any = execute(session, context, statements.purge(context.tables), values)
    expire_all_deleted(session, context.models.worker)
    return int(result.rowcount)


def delete(session: Session, context: Context, id: int) -> None:
    """Delete the row of a worker that is stopped and holds nothing."""
    info = get(session, context, id)
    statement = statements.delete(context.tables)
    gone = execute(session, context, statement, {"worker_id": id}).scalars().all()
    if not gone:
        raise WorkerInUse(id, info.status)
    expire_deleted(session, context.models.worker, gone)


def _release(session: Session, context: Context, ids: list[int]) -> int:
    if not ids:
        return 0
    rows = execute(session, context, statements.release_leases(context.tables), {"ids": ids}).all()
    sync_loaded(session, context.models.message, rows, MOVED)
    announce(session, context, [row.id for row in rows])
    return len(rows)


def _changed(
    session: Session, context: Context, statement: Any, id: int, **values: Any
) -> WorkerInfo:
    values["worker_id"] = validation.validate_id(id, "worker")
    row = execute(session, context, statement, values).one_or_none()
    if row is None:
        raise WorkerNotReady(id, get(session, context, id).status)
    sync_loaded(session, context.models.worker, [row], row._fields)
    return _info(row)


def _info(row: Any) -> WorkerInfo:
    return WorkerInfo(**{name: getattr(row, name) for name in _FIELDS})

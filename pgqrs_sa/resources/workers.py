"""`service.workers`."""

from __future__ import annotations

import builtins
import os
import socket
from collections.abc import Iterable
from typing import Any, get_args

from sqlalchemy.sql import Executable

from .. import validation
from .._core.scope import Resource, Scope
from .._core.sessions import expire_all_deleted, expire_deleted, sync_loaded
from .._core.sql import workers as statements
from .._core.sql.fragments import MOVED
from .._core.wakeup import announce
from ..errors import InvalidArgument, WorkerInUse, WorkerNotFound, WorkerNotReady, safe_repr
from ..types import Seconds, WorkerHealth, WorkerInfo, WorkerStatus

__all__ = ["Workers", "heartbeat", "register", "set_status"]

_FIELDS = tuple(WorkerInfo.__dataclass_fields__)


class Workers(Resource):
    """The register of processes. Nothing here is needed for a lease to run out by itself."""

    def register(
        self,
        name: str,
        *,
        queues: Iterable[str] = (),
        hostname: str | None = None,
        pid: int | None = None,
        port: int | None = None,
        version: str | None = None,
    ) -> WorkerInfo:
        """Register this process as a worker. A restart registers again, under another id.

        Args:
            name: For people; several processes may share it.
            queues: The queues that it works on, for people and `list`.
            hostname: Where it runs. Default: this computer's name.
            pid: Its process id. Default: this process's, if no hostname is given.
            port: A port to tell it by.
            version: Of the application.
        """
        return register(self._scope, name, queues, hostname, pid, port, version)

    def get(self, id: int) -> WorkerInfo:
        """Return a worker, or raise `WorkerNotFound`."""
        values = {"worker_id": validation.validate_id(id, "worker")}
        row = self._scope.execute(statements.get(self._scope.tables), values).one_or_none()
        if row is None:
            raise WorkerNotFound(id)
        return _info(row)

    def list(
        self, *, status: WorkerStatus | None = None, queue: str | None = None
    ) -> builtins.list[WorkerInfo]:
        """Return workers by id, all of them or those of a status or a queue."""
        if status is not None and status not in get_args(WorkerStatus):
            raise InvalidArgument(
                f"status must be one of {', '.join(get_args(WorkerStatus))}, not {status!r}"
            )
        tables, in_queue = self._scope.tables, queue is not None
        statement = statements.everything(tables, status=status, in_queue=in_queue)
        values = {} if queue is None else {"queue": validation.validate_queue_name(queue)}
        return [_info(row) for row in self._scope.execute(statement, values)]

    def heartbeat(self, id: int, *, leased: int | None = None) -> WorkerInfo:
        """Note that a worker lives.

        Args:
            id: The worker's id.
            leased: How many messages it holds, for `health`; None when it does not report that.

        Returns:
            The worker, whose ``status`` says whether it was suspended meanwhile.

        Raises:
            WorkerNotReady: it was stopped, by itself or for its silence: register again.
        """
        return heartbeat(self._scope, id, leased)

    def suspend(self, id: int) -> WorkerInfo:
        """Let a worker lease nothing until `resume`."""
        return set_status(self._scope, id, "suspended")

    def resume(self, id: int) -> WorkerInfo:
        """Let a suspended worker lease again."""
        return set_status(self._scope, id, "ready")

    def stop(self, id: int) -> WorkerInfo:
        """Note that a worker has ended. What it still holds comes back when its leases run out."""
        return set_status(self._scope, id, "stopped")

    def health(self, *, silent_for: Seconds = 60) -> builtins.list[WorkerHealth]:
        """Return the workers that are not stopped, with how long each has been silent.

        Args:
            silent_for: Seconds, or a timedelta, of silence up to which one counts as healthy.
        """
        longest = validation.validate_duration(silent_for, "silent_for")
        return [
            WorkerHealth(_info(row), row.silent_for, row.silent_for <= longest, row.leased)
            for row in self._scope.execute(statements.health(self._scope.tables))
        ]

    def reclaim(
        self, *, silent_for: Seconds = 60, queue: str | None = None, holding: bool = False
    ) -> int:
        """Stop workers that have been silent, and make what they hold visible at once.

        Their attempts stay counted, and a late settle of theirs raises `LeaseLost`.

        Args:
            silent_for: Seconds, or a timedelta, of silence beyond which one counts as dead.
            queue: Only workers that registered for this queue.
            holding: Only workers that hold messages.

        Returns:
            How many messages came back.
        """
        scope = self._scope
        span = validation.validate_age(silent_for, "silent_for", positive=True)
        values: dict[str, Any] = {"silent_for": span}
        if queue is not None:
            values["queue"] = validation.validate_queue_name(queue)
        statement = statements.stop_silent(
            scope.tables, in_queue=queue is not None, holding=holding
        )
        rows = scope.execute(statement, values).all()
        sync_loaded(scope.session, scope.context.models.worker, rows, ("status", "shutdown_at"))
        return self._release([row.id for row in rows])

    def release_leases(self, id: int) -> int:
        """Make visible at once what one worker holds, and return how many messages."""
        return self._release([self.get(id).id])

    def delete(self, id: int) -> None:
        """Delete the row of a worker that is stopped and holds nothing.

        Raises:
            WorkerInUse: it is not, and its row stays.
        """
        scope, info = self._scope, self.get(id)
        gone = scope.execute(statements.delete(scope.tables), {"worker_id": id}).scalars().all()
        if not gone:
            raise WorkerInUse(id, info.status)
        expire_deleted(scope.session, scope.context.models.worker, gone)

    def purge(self, *, older_than: Seconds) -> int:
        """Delete the rows of workers that stopped long ago and hold nothing.

        Args:
            older_than: Seconds, or a timedelta, since they stopped.

        Returns:
            How many were deleted.
        """
        scope = self._scope
        values = {"older_than": validation.validate_age(older_than, "older_than")}
        result: Any = scope.execute(statements.purge(scope.tables), values)
        expire_all_deleted(scope.session, scope.context.models.worker)
        return int(result.rowcount)

    def _release(self, ids: builtins.list[int]) -> int:
        if not ids:
            return 0
        scope = self._scope
        rows = scope.execute(statements.release_leases(scope.tables), {"ids": ids}).all()
        sync_loaded(scope.session, scope.context.models.message, rows, MOVED)
        announce(scope, [row.id for row in rows])
        return len(rows)


def register(
    scope: Scope,
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
    return _info(scope.execute(statements.register(scope.tables), values).one())


def heartbeat(scope: Scope, id: int, leased: int | None) -> WorkerInfo:
    """Store the heartbeat of a worker and how much it holds; raise if it was stopped."""
    count = None if leased is None else validation.validate_number(leased, "leased")
    return _changed(scope, statements.heartbeat(scope.tables), id, leased=count)


def set_status(scope: Scope, id: int, status: WorkerStatus) -> WorkerInfo:
    """Suspend, resume or stop a worker; stopping a stopped one does nothing."""
    if status == "stopped" and (info := Workers(scope).get(id)).status == "stopped":
        return info
    return _changed(scope, statements.set_status(scope.tables, status), id)


def _changed(scope: Scope, statement: Executable, id: int, **values: Any) -> WorkerInfo:
    values["worker_id"] = validation.validate_id(id, "worker")
    row = scope.execute(statement, values).one_or_none()
    if row is None:
        raise WorkerNotReady(id, Workers(scope).get(id).status)
    sync_loaded(scope.session, scope.context.models.worker, [row], row._fields)
    return _info(row)


def _info(row: Any) -> WorkerInfo:
    return WorkerInfo(**{name: getattr(row, name) for name in _FIELDS})

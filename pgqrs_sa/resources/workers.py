"""`service.workers`."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from .._core import workers
from ..types import Seconds, WorkerHealth, WorkerInfo, WorkerStatus
from .base import Resource

__all__ = ["Workers"]


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
        """Register this start of a process. A restart registers anew, under another id.

        Args:
            name: For people; several processes may share it.
            queues: What it works on, for people and `list`.
            hostname: Where it runs; this computer's name unless given.
            pid: Its process id; this process's unless a hostname is given.
            port: A port to tell it by.
            version: Of the application.
        """
        return workers.register(
            self._session, self._context, name, queues, hostname, pid, port, version
        )

    def get(self, id: int) -> WorkerInfo:
        """Return a worker, or raise `WorkerNotFound`."""
        return workers.get(self._session, self._context, id)

    def list(
        self, *, status: WorkerStatus | None = None, queue: str | None = None
    ) -> builtins.list[WorkerInfo]:
        """Return workers by id, all of them or those of a status or a queue."""
        return workers.everything(self._session, self._context, status, queue)

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
        return workers.heartbeat(self._session, self._context, id, leased)

    def suspend(self, id: int) -> WorkerInfo:
        """Let a worker lease nothing until `resume`."""
        return workers.set_status(self._session, self._context, id, "suspended")

    def resume(self, id: int) -> WorkerInfo:
        """Let a suspended worker lease again."""
        return workers.set_status(self._session, self._context, id, "ready")

    def stop(self, id: int) -> WorkerInfo:
        """Note that a worker has ended. What it still holds comes back when its leases run out."""
        return workers.set_status(self._session, self._context, id, "stopped")

    def health(self, *, silent_for: Seconds = 60) -> builtins.list[WorkerHealth]:
        """Return the workers that are not stopped, with how long each has been silent.

        Args:
            silent_for: Seconds, or a timedelta, of silence up to which one counts as healthy.
        """
        return workers.health(self._session, self._context, silent_for)

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
        return workers.reclaim(self._session, self._context, silent_for, queue, holding)

    def release_leases(self, id: int) -> int:
        """Make visible at once what one worker holds, and return how many messages."""
        return workers.release_leases(self._session, self._context, id)

    def delete(self, id: int) -> None:
        """Delete the row of a worker that is stopped and holds nothing.

        Raises:
            WorkerInUse: it is not, and its row stays.
        """
        workers.delete(self._session, self._context, id)

    def purge(self, *, older_than: Seconds) -> int:
        """Delete the rows of workers that stopped long ago and hold nothing.

        Args:
            older_than: Seconds, or a timedelta, since they stopped.

        Returns:
            How many were deleted.
        """
        return workers.purge(self._session, self._context, older_than)

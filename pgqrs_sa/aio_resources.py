"""`pgqrs_sa.resources`, awaited: the parameters, results and errors are documented there."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ._core import archive, queries, queues, scheduled, workers
from ._core.context import Context
from ._core.queues import UNCHANGED
from .declared import QueueSource
from .types import (
    ArchivedInfo,
    Criteria,
    MessageInfo,
    MessageState,
    Outcome,
    QueueInfo,
    QueueMetrics,
    Receipt,
    Seconds,
    SyncedQueue,
    WorkerHealth,
    WorkerInfo,
    WorkerStatus,
)

__all__ = ["Archived", "Messages", "Queues", "Workers"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class AsyncResource:
    """Operations awaited in one session: what `AsyncQueueService` and its resources are."""

    def __init__(self, session: AsyncSession, context: Context) -> None:
        self._session = session
        self._context = context

    async def _run(
        self,
        operation: Callable[Concatenate[Session, Context, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        return await self._session.run_sync(operation, self._context, *args, **kwargs)


class Queues(AsyncResource):
    """`pgqrs_sa.resources.Queues`, awaited."""

    async def create(
        self,
        name: str,
        *,
        lease: Seconds = UNCHANGED,
        max_read_ct: int = UNCHANGED,
        retention: Seconds | None = UNCHANGED,
        max_payload_bytes: int = UNCHANGED,
    ) -> QueueInfo:
        """See `Queues.create`."""
        return await self._run(
            queues.create, name, lease, max_read_ct, retention, max_payload_bytes
        )

    async def sync(
        self, declared: QueueSource, *, update: bool = False, dry_run: bool = False
    ) -> builtins.list[SyncedQueue]:
        """See `Queues.sync`."""
        return await self._run(queues.sync, declared, update=update, dry_run=dry_run)

    async def get(self, name: str) -> QueueInfo:
        """See `Queues.get`."""
        return await self._run(queues.get, name)

    async def list(self) -> builtins.list[QueueInfo]:
        """See `Queues.list`."""
        return await self._run(queues.everything)

    async def update(
        self,
        name: str,
        *,
        lease: Seconds = UNCHANGED,
        max_read_ct: int = UNCHANGED,
        retention: Seconds | None = UNCHANGED,
        max_payload_bytes: int = UNCHANGED,
    ) -> QueueInfo:
        """See `Queues.update`."""
        return await self._run(
            queues.update, name, lease, max_read_ct, retention, max_payload_bytes
        )

    async def pause(self, name: str) -> QueueInfo:
        """See `Queues.pause`."""
        return await self._run(queues.pause, name)

    async def resume(self, name: str) -> QueueInfo:
        """See `Queues.resume`."""
        return await self._run(queues.resume, name)

    async def purge(
        self,
        name: str,
        *,
        limit: int | None = None,
        up_to: int | None = None,
        tokens: Mapping[int, int] | None = None,
    ) -> int:
        """See `Queues.purge`."""
        return await self._run(queues.purge, name, limit, up_to, tokens)

    async def delete(self, name: str, *, force: bool = False) -> None:
        """See `Queues.delete`."""
        await self._run(queues.delete, name, force)


class Messages(AsyncResource):
    """`pgqrs_sa.resources.Messages`, awaited."""

    async def get(self, id: int) -> MessageInfo:
        """See `Messages.get`."""
        return await self._run(queries.get, id)

    async def peek(self, queue: str, limit: int = 1) -> builtins.list[MessageInfo]:
        """See `Messages.peek`."""
        return await self._run(queries.peek, queue, limit)

    async def find(
        self,
        queue: str | None = None,
        *,
        state: MessageState | None = None,
        payload: Any = None,
        where: Criteria = None,
        after: int = 0,
        limit: int = 100,
        newest_first: bool = False,
        content: bool = True,
        timeout: Seconds | None = None,  # noqa: ASYNC109 - the server's
    ) -> builtins.list[MessageInfo]:
        """See `Messages.find`."""
        return await self._run(
            queries.find,
            queue,
            state,
            payload,
            where,
            after,
            limit,
            newest_first,
            content=content,
            timeout=timeout,
        )

    async def count(
        self,
        queue: str | None = None,
        *,
        state: MessageState | None = None,
        payload: Any = None,
        where: Criteria = None,
        timeout: Seconds | None = None,  # noqa: ASYNC109 - the server's
    ) -> int:
        """See `Messages.count`."""
        return await self._run(queries.count, queue, state, payload, where, timeout=timeout)

    async def metrics(self, queue: str, *, exact: bool = False) -> QueueMetrics:
        """See `Messages.metrics`."""
        return await self._run(queries.metrics, queue, exact=exact)

    async def all_metrics(self, *, exact: bool = False) -> builtins.list[QueueMetrics]:
        """See `Messages.all_metrics`."""
        return await self._run(queries.all_metrics, exact=exact)

    async def cancel(self, id: int, *, reason: str | None = None) -> None:
        """See `Messages.cancel`."""
        await self._run(scheduled.cancel, id, reason, strict=True)

    async def try_cancel(self, id: int, *, reason: str | None = None) -> bool:
        """See `Messages.try_cancel`."""
        return await self._run(scheduled.cancel, id, reason, strict=False)

    async def cancel_where(
        self,
        queue: str,
        where: Criteria = None,
        *,
        payload: Any = None,
        reason: str | None = None,
    ) -> int:
        """See `Messages.cancel_where`."""
        return await self._run(scheduled.cancel_where, queue, where, payload, reason)

    async def reschedule(
        self,
        id: int,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
    ) -> Receipt:
        """See `Messages.reschedule`."""
        return await self._run(scheduled.reschedule, id, delay, at)


class Archived(AsyncResource):
    """`pgqrs_sa.resources.Archived`, awaited."""

    async def get(self, id: int) -> ArchivedInfo:
        """See `Archived.get`."""
        return await self._run(queries.get_archived, id)

    async def find(
        self,
        queue: str | None = None,
        *,
        outcome: Outcome | None = None,
        payload: Any = None,
        where: Criteria = None,
        after: int = 0,
        limit: int = 100,
        newest_first: bool = False,
        content: bool = True,
        timeout: Seconds | None = None,  # noqa: ASYNC109 - the server's
    ) -> builtins.list[ArchivedInfo]:
        """See `Archived.find`."""
        return await self._run(
            queries.find_archived,
            queue,
            outcome,
            payload,
            where,
            after,
            limit,
            newest_first,
            content=content,
            timeout=timeout,
        )

    async def count(
        self,
        queue: str | None = None,
        *,
        outcome: Outcome | None = None,
        payload: Any = None,
        where: Criteria = None,
        timeout: Seconds | None = None,  # noqa: ASYNC109 - the server's
    ) -> int:
        """See `Archived.count`."""
        return await self._run(
            queries.count_archived, queue, outcome, payload, where, timeout=timeout
        )

    async def bury(self, queue: str, *, limit: int = 1000) -> int:
        """See `Archived.bury`."""
        return await self._run(archive.dead_letter_exhausted, queue, limit)

    async def requeue(
        self,
        id: int,
        *,
        delay: Seconds = 0,
        attempts: int | None = None,
    ) -> Receipt:
        """See `Archived.requeue`."""
        return (await self.requeue_many([id], delay=delay, attempts=attempts))[0]

    async def requeue_many(
        self, ids: Iterable[int], *, delay: Seconds = 0, attempts: int | None = None
    ) -> builtins.list[Receipt]:
        """See `Archived.requeue_many`."""
        return await self._run(archive.requeue, ids, delay, attempts)

    async def delete(self, ids: Iterable[int]) -> int:
        """See `Archived.delete`."""
        return await self._run(archive.delete, ids)

    async def prune(
        self,
        older_than: Seconds | None = None,
        *,
        queue: str | None = None,
        limit: int = 1000,
    ) -> int:
        """See `Archived.prune`."""
        return await self._run(archive.prune, older_than, queue, limit)


class Workers(AsyncResource):
    """`pgqrs_sa.resources.Workers`, awaited."""

    async def register(
        self,
        name: str,
        *,
        queues: Iterable[str] = (),
        hostname: str | None = None,
        pid: int | None = None,
        port: int | None = None,
        version: str | None = None,
    ) -> WorkerInfo:
        """See `Workers.register`."""
        return await self._run(workers.register, name, queues, hostname, pid, port, version)

    async def get(self, id: int) -> WorkerInfo:
        """See `Workers.get`."""
        return await self._run(workers.get, id)

    async def list(
        self, *, status: WorkerStatus | None = None, queue: str | None = None
    ) -> builtins.list[WorkerInfo]:
        """See `Workers.list`."""
        return await self._run(workers.everything, status, queue)

    async def heartbeat(self, id: int, *, leased: int | None = None) -> WorkerInfo:
        """See `Workers.heartbeat`."""
        return await self._run(workers.heartbeat, id, leased)

    async def suspend(self, id: int) -> WorkerInfo:
        """See `Workers.suspend`."""
        return await self._run(workers.set_status, id, "suspended")

    async def resume(self, id: int) -> WorkerInfo:
        """See `Workers.resume`."""
        return await self._run(workers.set_status, id, "ready")

    async def stop(self, id: int) -> WorkerInfo:
        """See `Workers.stop`."""
        return await self._run(workers.set_status, id, "stopped")

    async def health(self, *, silent_for: Seconds = 60) -> builtins.list[WorkerHealth]:
        """See `Workers.health`."""
        return await self._run(workers.health, silent_for)

    async def reclaim(
        self, *, silent_for: Seconds = 60, queue: str | None = None, holding: bool = False
    ) -> int:
        """See `Workers.reclaim`."""
        return await self._run(workers.reclaim, silent_for, queue, holding)

    async def release_leases(self, id: int) -> int:
        """See `Workers.release_leases`."""
        return await self._run(workers.release_leases, id)

    async def delete(self, id: int) -> None:
        """See `Workers.delete`."""
        await self._run(workers.delete, id)

    async def purge(self, *, older_than: Seconds) -> int:
        """See `Workers.purge`."""
        return await self._run(workers.purge, older_than)

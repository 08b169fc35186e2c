"""What a service offers besides enqueue, dequeue and settle, grouped by what it is about.

Reach these through a `QueueService`: ``service.queues``, ``service.messages``,
``service.archived``, ``service.workers``. Like the service, they work in the caller's transaction.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from .operations import archive, queues, reading, scheduled, workers
from .operations.context import Context
from .operations.queues import UNCHANGED
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
    WorkerHealth,
    WorkerInfo,
    WorkerStatus,
)

__all__ = ["Archived", "Messages", "Queues", "Workers"]


class _Facet:
    def __init__(self, session: Session, context: Context) -> None:
        self._session = session
        self._context = context


class Queues(_Facet):
    """The queues themselves."""

    def create(
        self,
        name: str,
        *,
        lease: Seconds = UNCHANGED,
        max_read_ct: int = UNCHANGED,
        retention: Seconds | None = UNCHANGED,
        max_payload_bytes: int = UNCHANGED,
    ) -> QueueInfo:
        """Create a queue, or return the one that has the name already, as it is.

        Args:
            name: 1 to 128 of ``A-Z a-z 0-9 . _ : / -``, starting with a letter or a digit.
            lease: Seconds, or a timedelta, that a lease lasts unless `dequeue` says otherwise;
                30 s unless given.
            max_read_ct: Attempts before a message is dead; 5 unless given.
            retention: Seconds, or a timedelta, that settled messages are kept by
                `Archived.prune`; None, unless given, for ever.
            max_payload_bytes: The largest payload, as UTF-8 JSON; 1 MiB unless given.
        """
        return queues.create(
            self._session, self._context, name, lease, max_read_ct, retention, max_payload_bytes
        )

    def get(self, name: str) -> QueueInfo:
        """Return a queue, or raise `QueueNotFound`."""
        return queues.get(self._session, self._context, name)

    def list(self) -> builtins.list[QueueInfo]:
        """Return all queues by name."""
        return queues.everything(self._session, self._context)

    def update(
        self,
        name: str,
        *,
        lease: Seconds = UNCHANGED,
        max_read_ct: int = UNCHANGED,
        retention: Seconds | None = UNCHANGED,
        max_payload_bytes: int = UNCHANGED,
    ) -> QueueInfo:
        """Change the settings that are given; see `create` for what they are.

        A new ``max_read_ct`` holds for messages that were never leased yet.
        """
        return queues.update(
            self._session, self._context, name, lease, max_read_ct, retention, max_payload_bytes
        )

    def pause(self, name: str) -> QueueInfo:
        """Let nothing be leased until `resume`. Enqueueing and settling go on."""
        return queues.pause(self._session, self._context, name)

    def resume(self, name: str) -> QueueInfo:
        """Let messages be leased again."""
        return queues.resume(self._session, self._context, name)

    def purge(self, name: str, *, limit: int | None = None) -> int:
        """Delete the live messages of a queue, held ones too; keep its archive and workers.

        Args:
            name: The queue.
            limit: Delete at most so many, the oldest first. Of a large queue, delete a few
                thousand at a time and commit in between.

        Returns:
            How many were deleted.
        """
        return queues.purge(self._session, self._context, name, limit)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a queue. Until the commit, nothing can be enqueued anywhere: commit at once.

        A transaction in REPEATABLE READ or SERIALIZABLE whose snapshot still has the queue can
        enqueue into it afterwards; `pgqrs doctor` finds such a message.

        Args:
            name: The queue.
            force: Delete its live and archived messages with it.

        Raises:
            QueueNotEmpty: it holds messages, or history, and ``force`` is not given.
        """
        queues.delete(self._session, self._context, name, force)


class Messages(_Facet):
    """Live messages, seen and moved by somebody who holds no lease on them."""

    def get(self, id: int) -> MessageInfo:
        """Return a live message, or raise `MessageNotFound`."""
        return reading.get(self._session, self._context, id)

    def peek(self, queue: str, limit: int = 1) -> builtins.list[MessageInfo]:
        """Return what the next `dequeue` would see, in its order, without taking it."""
        return reading.peek(self._session, self._context, queue, limit)

    def find(
        self,
        queue: str | None = None,
        *,
        state: MessageState | None = None,
        payload: Any = None,
        where: Criteria = None,
        after: int = 0,
        limit: int = 100,
    ) -> builtins.list[MessageInfo]:
        """Return live messages by id, a page at a time.

        Args:
            queue: Only of this queue.
            state: Only ``ready``, ``scheduled``, ``leased`` or ``exhausted`` ones.
            payload: Only those whose payload contains this (``@>`` of PostgreSQL's jsonb).
            where: Further criteria on the message class.
            after: The id of the last message of the page before.
            limit: The length of a page.
        """
        return reading.find(
            self._session, self._context, queue, state, payload, where, after, limit
        )

    def metrics(self, queue: str) -> QueueMetrics:
        """Count the messages of a queue by state, and its archive by outcome."""
        return reading.metrics(self._session, self._context, queue)

    def all_metrics(self) -> builtins.list[QueueMetrics]:
        """Count the messages of each queue, by name of the queue."""
        return reading.all_metrics(self._session, self._context)

    def cancel(self, id: int, *, reason: str | None = None) -> None:
        """Move a message that nobody holds to the archive, as cancelled.

        Raises:
            MessageLeased: a consumer is working on it.
            MessageNotFound: it is not live.
        """
        scheduled.cancel(self._session, self._context, id, reason, strict=True)

    def try_cancel(self, id: int, *, reason: str | None = None) -> bool:
        """Cancel, and return whether it could be."""
        return scheduled.cancel(self._session, self._context, id, reason, strict=False)

    def cancel_where(
        self,
        queue: str,
        where: Criteria = None,
        *,
        payload: Any = None,
        reason: str | None = None,
    ) -> int:
        """Cancel the messages of a queue that match and that nobody holds.

        Args:
            queue: The queue.
            where: Criteria on the message class, such as ``Message.scheduled``.
            payload: What their payload must contain (``@>`` of PostgreSQL's jsonb).
            reason: Kept with them.

        Returns:
            How many were cancelled.
        """
        return scheduled.cancel_where(self._session, self._context, queue, where, payload, reason)

    def reschedule(
        self,
        id: int,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
    ) -> Receipt:
        """Move a message that nobody holds to another time.

        One whose attempts are used up gets one more.

        Raises:
            MessageLeased: a consumer is working on it.
            MessageNotFound: it is not live.
        """
        return scheduled.reschedule(self._session, self._context, id, delay, at)


class Archived(_Facet):
    """Settled messages."""

    def get(self, id: int) -> ArchivedInfo:
        """Return an archived message by the archive's id, or raise `MessageNotFound`."""
        return reading.get_archived(self._session, self._context, id)

    def find(
        self,
        queue: str | None = None,
        *,
        outcome: Outcome | None = None,
        payload: Any = None,
        where: Criteria = None,
        after: int = 0,
        limit: int = 100,
    ) -> builtins.list[ArchivedInfo]:
        """Return archived messages by the archive's id, a page at a time.

        Args:
            queue: Only of this queue.
            outcome: Only ``archived``, ``dead``, ``cancelled`` or ``discarded`` ones.
            payload: Only those whose payload contains this (``@>`` of PostgreSQL's jsonb).
            where: Further criteria on the class of archived messages.
            after: The id of the last one of the page before.
            limit: The length of a page.
        """
        return reading.find_archived(
            self._session, self._context, queue, outcome, payload, where, after, limit
        )

    def bury(self, queue: str, *, limit: int = 1000) -> int:
        """Make dead letters of exhausted messages whose last holder never settled them.

        Returns:
            How many there were, at most ``limit``.
        """
        return archive.bury(self._session, self._context, queue, limit)

    def requeue(
        self,
        id: int,
        *,
        delay: Seconds = 0,
        attempts: int | None = None,
    ) -> Receipt:
        """Move a settled message back into its queue, under the id that it had.

        Args:
            id: The archive's id.
            delay: Seconds, or a timedelta, until it is visible.
            attempts: How many more it gets; as many as the queue gives unless given.

        Raises:
            MessageNotFound: the archive has no such row.
            DuplicateMessage: a live message has its key.
        """
        return self.requeue_many([id], delay=delay, attempts=attempts)[0]

    def requeue_many(
        self, ids: Iterable[int], *, delay: Seconds = 0, attempts: int | None = None
    ) -> builtins.list[Receipt]:
        """Requeue all of these, or none; the receipts come in the order of the ids."""
        return archive.requeue(self._session, self._context, ids, delay, attempts)

    def delete(self, ids: Iterable[int]) -> int:
        """Delete archived messages by the archive's ids, and return how many there were."""
        return archive.delete(self._session, self._context, ids)

    def prune(
        self,
        older_than: Seconds | None = None,
        *,
        queue: str | None = None,
        limit: int = 1000,
    ) -> int:
        """Delete a chunk of what was archived long enough ago; commit, and call again until 0.

        Args:
            older_than: Seconds, or a timedelta; each queue's own retention unless given.
            queue: Only of this queue.
            limit: The size of the chunk.

        Returns:
            How many were deleted.
        """
        return archive.prune(self._session, self._context, older_than, queue, limit)


class Workers(_Facet):
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

    def heartbeat(self, id: int) -> WorkerInfo:
        """Note that a worker lives.

        Returns:
            The worker, whose ``status`` says whether it was suspended meanwhile.

        Raises:
            WorkerNotReady: it was stopped, by itself or for its silence: register again.
        """
        return workers.heartbeat(self._session, self._context, id)

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

    def reclaim(self, *, silent_for: Seconds = 60) -> int:
        """Stop workers that have been silent, and make what they hold visible at once.

        Their attempts stay counted, and a late settle of theirs raises `LeaseLost`.

        Args:
            silent_for: Seconds, or a timedelta, of silence beyond which one counts as dead.

        Returns:
            How many messages came back.
        """
        return workers.reclaim(self._session, self._context, silent_for)

    def release_leases(self, id: int) -> int:
        """Make visible at once what one worker holds, and return how many messages."""
        return workers.release_leases(self._session, self._context, id)

    def purge(self, *, older_than: Seconds) -> int:
        """Delete the rows of workers that stopped long ago and hold nothing.

        Args:
            older_than: Seconds, or a timedelta, since they stopped.

        Returns:
            How many were deleted.
        """
        return workers.purge(self._session, self._context, older_than)

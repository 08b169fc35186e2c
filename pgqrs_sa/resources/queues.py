"""`service.queues`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from .._core import queues
from .._core.queues import UNCHANGED
from ..declared import QueueSource
from ..types import QueueInfo, Seconds, SyncedQueue
from .base import Resource

__all__ = ["Queues"]


class Queues(Resource):
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

    def sync(
        self, declared: QueueSource, *, update: bool = False, dry_run: bool = False
    ) -> builtins.list[SyncedQueue]:
        """Create the declared queues that are missing. Others stay as they are.

        One SELECT looks for them. If some are missing, one INSERT creates these, in the order of
        their names: any number of processes may do so at once. Call it when an application starts,
        in a transaction of its own: until that ends, another process that creates one of the same
        queues waits for it.

        Args:
            declared: A `DeclaredQueue`, a list of them, or a MetaData with `declare_queues`.
            update: Change the settings that differ from the declared ones, as `update` does.
            dry_run: Change nothing, and report what would be done.

        Returns:
            A `SyncedQueue` for each of them, by name.

        Raises:
            InvalidArgument: something else is in the list, or two of one name differ.
        """
        return queues.sync(self._session, self._context, declared, update=update, dry_run=dry_run)

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

    def purge(
        self,
        name: str,
        *,
        limit: int | None = None,
        up_to: int | None = None,
        tokens: Mapping[int, int] | None = None,
    ) -> int:
        """Delete the live messages of a queue, held ones too; keep its archive and workers.

        Args:
            name: The queue.
            limit: Delete at most this many, the oldest first. Of a large queue, delete a few
                thousand at a time and commit in between.
            up_to: Delete only messages up to this id (default: all). Messages with such an id can
                still arrive: a requeue gives a message its old id back, and a transaction that is
                open now commits the ids that it has drawn already.
            tokens: Delete only these messages: the ``fencing_token`` of each by its id, as read
                before, in this transaction or another one. A message that has been leased or
                requeued since then has another token, and stays. So does everything that was not
                read. Takes neither ``limit`` nor ``up_to``: pass some thousands at a time.

        Returns:
            How many were deleted.

        Raises:
            QueueNotFound: there is no such queue.
            InvalidArgument: ``tokens`` is no mapping of ids to tokens, or is given with ``limit``
                or ``up_to``.
        """
        return queues.purge(self._session, self._context, name, limit, up_to, tokens)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a queue. Commit at once: from its lock to the commit, every queue waits.

        A SHARE lock on the table of messages waits for all open transactions that have written
        to it. Until your commit it holds up every enqueue, lease, renewal and settlement, in any
        queue. So empty a large queue first, with `purge` and `Archive.prune` in transactions of
        their own, as `pgqrs queue delete --force` does, and set ``lock_timeout`` where writers
        stay open for long.

        A transaction in REPEATABLE READ or SERIALIZABLE whose snapshot still has the queue can
        enqueue into it afterwards; `pgqrs doctor` finds such a message.

        Args:
            name: The queue.
            force: Delete its live and archived messages with it.

        Raises:
            QueueNotEmpty: it holds messages, or history, and ``force`` is not given.
        """
        queues.delete(self._session, self._context, name, force)

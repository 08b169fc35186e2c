"""`service.archived`."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from typing import Any

from .._core import archive, queries
from ..types import ArchivedInfo, ArchiveOutcome, Criteria, Receipt, Seconds
from .base import Resource

__all__ = ["Archived"]


class Archived(Resource):
    """Settled messages."""

    def get(self, id: int) -> ArchivedInfo:
        """Return an archived message by the archive's id, or raise `MessageNotFound`."""
        return queries.get_archived(self._session, self._context, id)

    def find(
        self,
        queue: str | None = None,
        *,
        outcome: ArchiveOutcome | None = None,
        payload: Any = None,
        where: Criteria = None,
        after: int = 0,
        limit: int = 100,
        newest_first: bool = False,
        content: bool = True,
        timeout: Seconds | None = None,
    ) -> builtins.list[ArchivedInfo]:
        """Return archived messages by the archive's id, a page at a time.

        Args:
            queue: Only of this queue.
            outcome: Only ``archived``, ``dead``, ``cancelled`` or ``discarded`` ones.
            payload: Only those whose payload contains this (``@>`` of PostgreSQL's jsonb).
            where: Further criteria on the class of archived messages.
            after: The id of the last one of the page before.
            limit: The length of a page.
            newest_first: Begin with the highest id.
            content: Read payload, headers, key, error and reason as well; False reads only what
                the grants of a ``dashboard`` allow.
            timeout: Seconds, or a timedelta, after which the server gives up. No index helps with
                ``payload``, nor with every ``where``.

        Raises:
            QueueNotFound: there is no such queue.
            ReadTimeout: it took longer; the transaction can go on.
        """
        return queries.find_archived(
            self._session,
            self._context,
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

    def count(
        self,
        queue: str | None = None,
        *,
        outcome: ArchiveOutcome | None = None,
        payload: Any = None,
        where: Criteria = None,
        timeout: Seconds | None = None,
    ) -> int:
        """Count archived messages to the last; the arguments are those of `find`."""
        return queries.count_archived(
            self._session, self._context, queue, outcome, payload, where, timeout=timeout
        )

    def bury(self, queue: str, *, limit: int = 1000) -> int:
        """Make dead letters of exhausted messages whose last holder never settled them.

        Returns:
            How many there were, at most ``limit``.
        """
        return archive.dead_letter_exhausted(self._session, self._context, queue, limit)

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

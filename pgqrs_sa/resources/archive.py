"""`service.archived`."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Row, Select
from sqlalchemy.exc import IntegrityError

from .. import validation
from .._core import sessions
from .._core.criteria import Criteria, criteria_on
from .._core.lease import dead_letter_exhausted
from .._core.queues import get as get_queue
from .._core.sessions import expire_all_deleted, expire_deleted
from .._core.sql import archive as statements
from .._core.sql import queries
from .._core.wakeup import announce
from ..errors import DuplicateMessage, InvalidArgument, MessageNotFound
from ..types import ArchivedInfo, ArchiveOutcome, Receipt, Seconds
from .messages import Reading

__all__ = ["Archived"]

_TRIES = 10  # a key that is settled between two statements is free; this never ends otherwise


class Archived(Reading):
    """Settled messages."""

    def get(self, id: int) -> ArchivedInfo:
        """Return an archived message by its id, or raise `MessageNotFound`."""
        values = {"id": validation.validate_id(id)}
        statement = queries.archived_by_id(self._scope.tables)
        row = self._scope.execute(statement, values).one_or_none()
        if row is None:
            raise MessageNotFound([id], "is in the archive")
        return self._info(row)

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
        """Return archived messages by id, a page at a time.

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
        found = self._matching(
            queue, outcome, payload, where, newest_first=newest_first, whole=content
        )
        rows = self._page(found, queue, payload, after, limit, timeout)
        return [self._info(row) for row in rows]

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
        found = self._matching(queue, outcome, payload, where)
        return self._count(found, queue, payload, timeout)

    def bury(self, queue: str, *, limit: int = 1000) -> int:
        """Make dead letters of exhausted messages whose last holder never settled them.

        It reads all visible messages of the queue, as no index tells which are exhausted (38,000
        pages of a million). Consumers and a dequeue that finds nothing do the same by themselves.

        Returns:
            How many there were, at most ``limit``.
        """
        return dead_letter_exhausted(self._scope, queue, limit)

    def requeue(
        self,
        id: int,
        *,
        delay: Seconds = 0,
        attempts: int | None = None,
    ) -> Receipt:
        """Move a settled message back into its queue, under the id that it had.

        Args:
            id: The message's id.
            delay: Seconds, or a timedelta, until it is visible.
            attempts: How many more it gets. Default: the queue's limit.

        Raises:
            MessageNotFound: the archive has no such row.
            DuplicateMessage: a live message has its key.
        """
        return self.requeue_many([id], delay=delay, attempts=attempts)[0]

    def requeue_many(
        self, ids: Iterable[int], *, delay: Seconds = 0, attempts: int | None = None
    ) -> builtins.list[Receipt]:
        """Requeue all of these, or none; the receipts come in the order of the ids."""
        listed = [validation.validate_id(id_) for id_ in validation.as_list(ids, "ids")]
        wanted = sorted(set(listed))
        values = {
            "ids": wanted,
            "delay": validation.validate_duration(delay),
            "attempts": None if attempts is None else validation.validate_max_read_ct(attempts),
            "required": len(wanted),
        }
        if not wanted:
            return []
        self._check_movable(wanted)
        moved = {row.id: Receipt(row.id, row.vt) for row in self._moved(values)}
        scope = self._scope
        expire_deleted(scope.session, scope.context.models.archived, wanted if moved else ())
        announce(scope, list(moved))
        if not moved:
            # Since then one was taken from the archive, or its key came alive; or two share a key.
            self._check_movable(wanted)
            raise InvalidArgument(f"archived messages {wanted} share a key: requeue one of them")
        return [moved[id_] for id_ in listed]

    def delete(self, ids: Iterable[int]) -> int:
        """Delete archived messages by their ids, and return how many there were."""
        listed = [validation.validate_id(id_) for id_ in validation.as_list(ids, "ids")]
        if not listed:
            return 0
        scope = self._scope
        gone = scope.execute(statements.delete(scope.tables), {"ids": listed}).scalars().all()
        expire_deleted(scope.session, scope.context.models.archived, gone)
        return len(gone)

    def prune(
        self,
        older_than: Seconds | None = None,
        *,
        queue: str | None = None,
        limit: int = 1000,
    ) -> int:
        """Delete a chunk of what was archived long enough ago; commit, and call again until 0.

        Args:
            older_than: Seconds, or a timedelta. Default: the retentions of each queue.
            queue: Only of this queue.
            limit: The size of the chunk.

        Returns:
            How many were deleted.
        """
        scope, one_queue = self._scope, queue is not None
        left = validation.validate_limit(limit)
        values: dict[str, Any] = {}
        if queue is not None:
            values["queue"] = get_queue(scope, queue).name
        steps = [
            statements.prune_by_retention(scope.tables, failed=failed, one_queue=one_queue)
            for failed in (False, True)
        ]
        if older_than is not None:
            values["older_than"] = validation.validate_age(older_than, "older_than")
            steps = [statements.prune(scope.tables, one_queue=one_queue)]
        for step in steps:
            if left:
                result: Any = scope.execute(step, {**values, "limit": left})
                left -= int(result.rowcount)
        expire_all_deleted(scope.session, scope.context.models.archived)
        return limit - left

    def _matching(
        self,
        queue: str | None,
        outcome: ArchiveOutcome | None,
        payload: Any,
        where: Criteria,
        **order: bool,
    ) -> Select[Any]:
        if outcome is not None:
            validation.validate_choice("outcome", outcome, ArchiveOutcome)
        tables = self._scope.tables
        shape = {"in_queue": queue is not None, "by_payload": payload is not None, **order}
        if where is None:
            return queries.find_archived(tables, outcome=outcome, **shape)
        criteria = criteria_on(where, tables.archived, tables.queue)
        return queries.find_archived_where(tables, criteria, outcome=outcome, **shape)

    def _moved(self, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """Move them, or none of them, without loss to the caller's transaction.

        Another transaction that is just enqueueing one of the keys cannot be seen; the INSERT waits
        for it, and fails if it commits. The next try sees the key, and moves nothing.
        """
        scope = self._scope
        connection = sessions.connect(scope.session, {"mapper": scope.context.mapper})
        alone = sessions.is_autocommit(connection)
        for tried in range(1, _TRIES + 1):
            try:
                with nullcontext() if alone else connection.begin_nested():
                    return scope.execute(statements.requeue(scope.tables), values).all()
            except IntegrityError:
                if tried == _TRIES:  # by a snapshot, which does not show who has the key
                    raise
        raise AssertionError

    def _check_movable(self, wanted: Sequence[int]) -> None:
        """Raise for the first that cannot be moved back."""
        statement = statements.requeue_candidates(self._scope.tables)
        rows = self._scope.execute(statement, {"ids": wanted}).all()
        if missing := sorted(set(wanted) - {row.id for row in rows}):
            raise MessageNotFound(missing, "is in the archive")
        for row in rows:
            if row.live_id is not None:
                raise DuplicateMessage(row.dedup_key, row.live_id)

    def _info(self, row: Any) -> ArchivedInfo:
        return ArchivedInfo(
            outcome=row.outcome,
            reason=getattr(row, "reason", None),
            archived_at=row.archived_at,
            **self._content(row),
        )

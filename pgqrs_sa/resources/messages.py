"""`service.messages`."""

from __future__ import annotations

import builtins
from datetime import datetime
from typing import Any

from .._core import queries, scheduled
from ..types import Criteria, MessageInfo, MessageState, QueueMetrics, Receipt, Seconds
from .base import Resource

__all__ = ["Messages"]


class Messages(Resource):
    """Live messages, seen and moved by somebody who holds no lease on them."""

    def get(self, id: int) -> MessageInfo:
        """Return a live message, or raise `MessageNotFound`."""
        return queries.get(self._session, self._context, id)

    def peek(self, queue: str, limit: int = 1) -> builtins.list[MessageInfo]:
        """Return what the next `dequeue` would see, in its order, without taking it."""
        return queries.peek(self._session, self._context, queue, limit)

    def find(
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
        timeout: Seconds | None = None,
    ) -> builtins.list[MessageInfo]:
        """Return live messages by id, a page at a time.

        Args:
            queue: Only of this queue.
            state: Only ``ready``, ``scheduled``, ``leased`` or ``exhausted`` ones.
            payload: Only those whose payload contains this (``@>`` of PostgreSQL's jsonb).
            where: Further criteria on the message class.
            after: The id of the last message of the page before.
            limit: The length of a page.
            newest_first: Begin with the highest id.
            content: Read payload, headers, key and error as well; False reads only what the
                grants of a ``dashboard`` allow.
            timeout: Seconds, or a timedelta, after which the server gives up. No index helps with
                ``payload``, nor with every ``where``: without a hit each live message is read.

        Raises:
            QueueNotFound: there is no such queue.
            ReadTimeout: it took longer; the transaction can go on.
        """
        return queries.find(
            self._session,
            self._context,
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

    def count(
        self,
        queue: str | None = None,
        *,
        state: MessageState | None = None,
        payload: Any = None,
        where: Criteria = None,
        timeout: Seconds | None = None,
    ) -> int:
        """Count live messages; the arguments are those of `find`."""
        return queries.count(
            self._session, self._context, queue, state, payload, where, timeout=timeout
        )

    def metrics(self, queue: str, *, exact: bool = False) -> QueueMetrics:
        """Count the messages of a queue by state, and its archive by outcome.

        Live messages are counted to the last. Each outcome is counted up to 10,000, since an
        archive may be large; ``QueueMetrics.capped`` names those that have more.

        Args:
            queue: The queue.
            exact: Count the archive of the queue to the end, for as long as it takes.

        Raises:
            QueueNotFound: there is no such queue.
        """
        return queries.metrics(self._session, self._context, queue, exact=exact)

    def all_metrics(self, *, exact: bool = False) -> builtins.list[QueueMetrics]:
        """Count the messages of each queue, by name of the queue.

        The live messages are read once, however many queues there are. Each outcome of a queue is
        counted up to 10,000, and where there are more than 20 queues, up to 200,000 divided by
        their number.

        Args:
            exact: Count the whole archive, for as long as it takes.
        """
        return queries.all_metrics(self._session, self._context, exact=exact)

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

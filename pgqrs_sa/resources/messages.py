"""`service.messages`."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import Row, Select

from .. import validation
from .._core.criteria import Criteria, criteria_on
from .._core.queues import get as get_queue
from .._core.scope import Resource, decoded, encoded, queue_not_found, within
from .._core.sessions import expire_deleted, sync_loaded
from .._core.sql import counts, queues
from .._core.sql import messages as changes
from .._core.sql import queries as statements
from .._core.sql.fragments import MOVED
from .._core.wakeup import announce
from ..errors import InvalidArgument, MessageLeased, MessageNotFound, PayloadError
from ..types import (
    ArchiveOutcome,
    MessageInfo,
    MessageState,
    QueueMetrics,
    Receipt,
    Seconds,
)

__all__ = ["Messages", "Reading"]


class Reading(Resource):
    """Messages of one table, a page at a time."""

    def _page(
        self,
        found: Select[Any],
        queue: str | None,
        payload: Any,
        after: int,
        limit: int,
        timeout: Seconds | None,
    ) -> Sequence[Row[Any]]:
        values = self._binds(queue, payload, after, limit)
        if timeout is None:  # `within` would do nothing
            return self._scope.execute(found, values).all()
        with within(self._scope, timeout):
            return self._scope.execute(found, values).all()

    def _count(
        self, found: Select[Any], queue: str | None, payload: Any, timeout: Seconds | None
    ) -> int:
        values = self._binds(queue, payload, 0, 1) | {"limit": None}
        with within(self._scope, timeout):
            total: int = self._scope.execute(statements.count(found), values).scalar_one()
        return total

    def _binds(self, queue: str | None, payload: Any, after: int, limit: int) -> dict[str, Any]:
        values: dict[str, Any] = {
            "after": 0 if after == 0 else validation.validate_id(after, "after"),
            "limit": validation.validate_limit(limit),
        }
        if payload is not None:
            values["contains"] = encoded(self._scope.context.codec, payload)
        if queue is not None:
            values["queue_id"] = get_queue(self._scope, queue).id
        return values

    def _content(self, row: Any) -> dict[str, Any]:
        return {
            "id": row.id,
            "queue": row.queue,
            "priority": row.priority,
            "vt": row.vt,
            "enqueued_at": row.enqueued_at,
            "read_ct": row.read_ct,
            "max_read_ct": row.max_read_ct,
            "worker_id": row.consumer_worker_id,
            "producer_id": row.producer_worker_id,
            "dequeued_at": row.dequeued_at,
            **self._private(row),
        }

    def _private(self, row: Any) -> dict[str, Any]:
        """Return the fields that may be private; empty where they were not read."""
        if "payload" not in row._mapping:  # noqa: SLF001 - public, despite its name
            unread = PayloadError("payload", f"of message {row.id} was not read: content=False")
            hidden = dict.fromkeys(("headers", "key", "last_error"))
            return {"text": "", "decoded": unread, "content": False, **hidden}
        payload, headers = decoded(self._scope.context.codec, row.id, row.payload, row.headers)
        return {
            "text": row.payload,
            "decoded": payload,
            "headers": headers,
            "key": row.dedup_key,
            "last_error": row.last_error,
        }


class Messages(Reading):
    """Live messages, seen and moved by somebody who holds no lease on them."""

    def get(self, id: int) -> MessageInfo:
        """Return a live message, or raise `MessageNotFound`."""
        values = {"id": validation.validate_id(id)}
        statement = statements.message_by_id(self._scope.tables)
        row = self._scope.execute(statement, values).one_or_none()
        if row is None:
            raise MessageNotFound([id], "is live: look in the archive")
        return self._info(row)

    def peek(self, queue: str, limit: int = 1) -> builtins.list[MessageInfo]:
        """Return what the next `dequeue` would see, in its order, without taking it."""
        validation.validate_queue_name(queue)
        scope, values = self._scope, {"queue": queue, "limit": validation.validate_limit(limit)}
        rows = scope.execute(statements.peek(scope.tables), values).all()
        if (
            not rows
            and scope.execute(queues.get(scope.tables), {"queue": queue}).one_or_none() is None
        ):
            raise queue_not_found(scope, queue)
        return [self._info(row) for row in rows]

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
        found = self._matching(
            queue, state, payload, where, newest_first=newest_first, whole=content
        )
        rows = self._page(found, queue, payload, after, limit, timeout)
        return [self._info(row) for row in rows]

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
        found = self._matching(queue, state, payload, where)
        return self._count(found, queue, payload, timeout)

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
        values = {"queue_id": get_queue(self._scope, queue).id}
        statement = statements.metrics(self._scope.tables, one_queue=True, exact=exact)
        row = self._scope.execute(statement, values).one_or_none()
        if row is None:  # deleted since then
            raise queue_not_found(self._scope, queue)
        return _metrics(row)

    def all_metrics(self, *, exact: bool = False) -> builtins.list[QueueMetrics]:
        """Count the messages of each queue, by name of the queue.

        The live messages are read once, however many queues there are. Each outcome of a queue is
        counted up to 10,000, and where there are more than 20 queues, up to 200,000 divided by
        their number.

        Args:
            exact: Count the whole archive, for as long as it takes.
        """
        statement = statements.metrics(self._scope.tables, one_queue=False, exact=exact)
        return [_metrics(row) for row in self._scope.execute(statement)]

    def cancel(self, id: int, *, reason: str | None = None) -> None:
        """Move a message that nobody holds to the archive, as cancelled.

        Raises:
            MessageLeased: a consumer is working on it.
            MessageNotFound: it is not live.
        """
        if not self.try_cancel(id, reason=reason):
            raise self._refusal(id)

    def try_cancel(self, id: int, *, reason: str | None = None) -> bool:
        """Cancel, and return whether it could be."""
        validation.validate_id(id)
        scope, values = self._scope, {"ids": [id], "reason": _text(reason)}
        row = scope.execute(changes.cancel(scope.tables), values).one_or_none()
        expire_deleted(scope.session, scope.context.models.message, [] if row is None else [id])
        return row is not None

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
        scope = self._scope
        validation.validate_queue_name(queue)
        criteria = criteria_on(where, scope.tables.message)
        if not criteria and payload is None:
            raise InvalidArgument(
                "cancel_where needs criteria or payload=...: to empty a queue use queues.purge()"
            )
        by_payload = payload is not None
        values = {"queue": queue, "reason": _text(reason)}
        if by_payload:
            values["contains"] = encoded(scope.context.codec, payload)
        statement = changes.cancel_where(scope.tables, criteria, by_payload=by_payload)
        ids = scope.execute(statement, values).scalars().all()
        if not ids and not scope.execute(queues.get(scope.tables), {"queue": queue}).all():
            raise queue_not_found(scope, queue)
        expire_deleted(scope.session, scope.context.models.message, ids)
        return len(ids)

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
        validation.validate_id(id)
        if delay is None and at is None:
            raise InvalidArgument("reschedule needs delay=... or at=...")
        span, moment = validation.validate_delay_or_at(delay, at)
        scope, values = self._scope, {"message_id": id, "delay": span, "at": moment}
        row = scope.execute(changes.reschedule(scope.tables), values).one_or_none()
        if row is None:
            raise self._refusal(id)
        sync_loaded(scope.session, scope.context.models.message, [row], MOVED)
        announce(scope, [row.id])
        return Receipt(row.id, row.vt)

    def _matching(
        self,
        queue: str | None,
        state: MessageState | None,
        payload: Any,
        where: Criteria,
        **order: bool,
    ) -> Select[Any]:
        if state is not None:
            validation.validate_choice("state", state, MessageState)
        tables = self._scope.tables
        shape = {"in_queue": queue is not None, "by_payload": payload is not None, **order}
        if where is None:
            return statements.find(tables, state=state, **shape)
        criteria = criteria_on(where, tables.message, tables.queue)
        return statements.find_where(tables, criteria, state=state, **shape)

    def _refusal(self, id: int) -> MessageLeased | MessageNotFound:
        statement = changes.leased_until(self._scope.tables)
        row = self._scope.execute(statement, {"ids": [id]}).one_or_none()
        if row is None or row.until is None:
            return MessageNotFound([id], "is live: it was settled or cancelled, or never was")
        return MessageLeased(id, row.until)

    def _info(self, row: Any) -> MessageInfo:
        return MessageInfo(state=row.state, leased_until=row.leased_until, **self._content(row))


def _metrics(row: Row[Any]) -> QueueMetrics:
    most = math.inf if row.most is None else row.most
    found: dict[str, int] = {name: getattr(row, name) for name in counts.NOT_DONE}
    others_capped = any(count > most for count in found.values())
    # What was settled and is none of the others. If some of these were not counted to the end,
    # it may be one of them just as well.
    found["archived"] = row.settled - sum(found.values())
    capped = {name for name, count in found.items() if count > most}
    if others_capped:
        found["archived"] = 0
        capped.add("archived")
    return QueueMetrics(
        queue=row.queue,
        **{state: getattr(row, state) for state in counts.STATES},
        **{name: min(count, row.most or count) for name, count in found.items()},
        oldest_ready_age=row.oldest_ready_age,
        paused=row.paused,
        capped=frozenset(name for name in get_args(ArchiveOutcome) if name in capped),
    )


def _text(reason: str | None) -> str | None:
    return None if reason is None else validation.error_text(reason)

"""Reading and counting messages, without changing any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import Row, Select
from sqlalchemy.orm import Session

from .. import validation
from ..errors import InvalidArgument, MessageNotFound, PayloadError
from ..types import (
    ArchivedInfo,
    ArchiveOutcome,
    Criteria,
    MessageInfo,
    MessageState,
    QueueMetrics,
    Seconds,
)
from .context import Context, criteria_on, decoded, encoded, execute, queue_not_found
from .queues import get as get_queue
from .sql import counts, queues
from .sql import queries as statements
from .statement_timeout import within

__all__ = [
    "all_metrics",
    "count",
    "count_archived",
    "find",
    "find_archived",
    "get",
    "get_archived",
    "metrics",
    "peek",
]


def peek(session: Session, context: Context, queue: str, limit: int) -> list[MessageInfo]:
    """Return the messages that the next dequeue would lease, in its order."""
    validation.validate_queue_name(queue)
    values = {"queue": queue, "limit": validation.validate_limit(limit)}
    rows = execute(session, context, statements.peek(context.tables), values).all()
    _check_queue(session, context, queue if not rows else None)
    return [_message(context, row) for row in rows]


def get(session: Session, context: Context, id: int) -> MessageInfo:
    """Return one live message."""
    values = {"id": validation.validate_id(id)}
    row = execute(session, context, statements.message_by_id(context.tables), values).one_or_none()
    if row is None:
        raise MessageNotFound([id], "is live: look in the archive")
    return _message(context, row)


def find(
    session: Session,
    context: Context,
    queue: str | None,
    state: MessageState | None,
    payload: Any,
    where: Criteria,
    after: int,
    limit: int,
    newest_first: bool,
    *,
    content: bool = True,
    timeout: Seconds | None = None,
) -> list[MessageInfo]:
    """Return live messages by id, those after ``after``."""
    order = {"newest_first": newest_first, "whole": content}
    statement = _live(context, queue, state, payload, where, **order)
    rows = _page_of(session, context, statement, queue, payload, after, limit, timeout)
    return [_message(context, row) for row in rows]


def count(
    session: Session,
    context: Context,
    queue: str | None,
    state: MessageState | None,
    payload: Any,
    where: Criteria,
    *,
    timeout: Seconds | None = None,
) -> int:
    """Count live messages."""
    found = _live(context, queue, state, payload, where)
    return _counted(session, context, found, queue, payload, timeout)


def get_archived(session: Session, context: Context, id: int) -> ArchivedInfo:
    """Return one archived message, by the id of the archive's row."""
    values = {"id": validation.validate_id(id)}
    row = execute(session, context, statements.archived_by_id(context.tables), values).one_or_none()
    if row is None:
        raise MessageNotFound([id], "is in the archive: this is the archive's own id")
    return _archived(context, row)


def find_archived(
    session: Session,
    context: Context,
    queue: str | None,
    outcome: ArchiveOutcome | None,
    payload: Any,
    where: Criteria,
    after: int,
    limit: int,
    newest_first: bool,
    *,
    content: bool = True,
    timeout: Seconds | None = None,
) -> list[ArchivedInfo]:
    """Return archived messages by id, those after ``after``."""
    order = {"newest_first": newest_first, "whole": content}
    statement = _settled(context, queue, outcome, payload, where, **order)
    rows = _page_of(session, context, statement, queue, payload, after, limit, timeout)
    return [_archived(context, row) for row in rows]


def count_archived(
    session: Session,
    context: Context,
    queue: str | None,
    outcome: ArchiveOutcome | None,
    payload: Any,
    where: Criteria,
    *,
    timeout: Seconds | None = None,
) -> int:
    """Count archived messages."""
    found = _settled(context, queue, outcome, payload, where)
    return _counted(session, context, found, queue, payload, timeout)


def metrics(session: Session, context: Context, queue: str, *, exact: bool = False) -> QueueMetrics:
    """Count the messages of one queue by state and outcome."""
    values = {"queue_id": get_queue(session, context, queue).id}
    statement = statements.metrics(context.tables, one_queue=True, exact=exact)
    row = execute(session, context, statement, values).one_or_none()
    if row is None:  # deleted since then
        raise queue_not_found(session, context, queue)
    return _metrics(row)


def all_metrics(session: Session, context: Context, *, exact: bool = False) -> list[QueueMetrics]:
    """Count the messages of each queue by state and outcome."""
    statement = statements.metrics(context.tables, one_queue=False, exact=exact)
    return [_metrics(row) for row in execute(session, context, statement)]


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


def _live(
    context: Context,
    queue: str | None,
    state: MessageState | None,
    payload: Any,
    where: Criteria,
    **order: bool,
) -> Select[Any]:
    _check_choice("state", state, MessageState)
    known = context.tables
    return statements.find(
        context.tables,
        in_queue=queue is not None,
        state=state,
        by_payload=payload is not None,
        where=criteria_on(where, known.message, known.queue),
        **order,
    )


def _settled(
    context: Context,
    queue: str | None,
    outcome: ArchiveOutcome | None,
    payload: Any,
    where: Criteria,
    **order: bool,
) -> Select[Any]:
    _check_choice("outcome", outcome, ArchiveOutcome)
    known = context.tables
    return statements.find_archived(
        context.tables,
        in_queue=queue is not None,
        outcome=outcome,
        by_payload=payload is not None,
        where=criteria_on(where, known.archived, known.queue),
        **order,
    )


def _page_of(
    session: Session,
    context: Context,
    statement: Select[Any],
    queue: str | None,
    payload: Any,
    after: int,
    limit: int,
    timeout: Seconds | None,
) -> Sequence[Row[Any]]:
    values = _page(session, context, queue, payload, after, limit)
    with within(session, context, timeout):
        return execute(session, context, statement, values).all()


def _counted(
    session: Session,
    context: Context,
    found: Select[Any],
    queue: str | None,
    payload: Any,
    timeout: Seconds | None,
) -> int:
    values = _page(session, context, queue, payload, 0, 1) | {"limit": None}
    with within(session, context, timeout):
        total: int = execute(session, context, statements.count(found), values).scalar_one()
    return total


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value is not None and value not in get_args(choices):
        raise InvalidArgument(
            f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}"
        )


def _page(
    session: Session, context: Context, queue: str | None, payload: Any, after: int, limit: int
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "after": 0 if after == 0 else validation.validate_id(after, "after"),
        "limit": validation.validate_limit(limit),
    }
    if payload is not None:
        values["contains"] = encoded(context.codec, payload)
    if queue is not None:
        values["queue_id"] = get_queue(session, context, queue).id
    return values


def _check_queue(session: Session, context: Context, queue: str | None) -> None:
    """Raise if a queue that returned nothing does not exist."""
    if queue is None:
        return
    if (
        execute(session, context, queues.get(context.tables), {"queue": queue}).one_or_none()
        is None
    ):
        raise queue_not_found(session, context, queue)


def _content(context: Context, row: Any) -> dict[str, Any]:
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
        **_private(context, row),
    }


def _private(context: Context, row: Any) -> dict[str, Any]:
    """Return the fields that may be private; empty where they were not read."""
    if "payload" not in row._mapping:  # noqa: SLF001 - public, despite its name
        unread = PayloadError("payload", f"of message {row.id} was not read: content=False")
        hidden = dict.fromkeys(("headers", "key", "last_error"))
        return {"text": "", "decoded": unread, "content": False, **hidden}
    payload, headers = decoded(context.codec, row.id, row.payload, row.headers)
    return {
        "text": row.payload,
        "decoded": payload,
        "headers": headers,
        "key": row.dedup_key,
        "last_error": row.last_error,
    }


def _message(context: Context, row: Any) -> MessageInfo:
    return MessageInfo(state=row.state, **_content(context, row))


def _archived(context: Context, row: Any) -> ArchivedInfo:
    return ArchivedInfo(
        original_msg_id=row.original_msg_id,
        outcome=row.outcome,
        reason=getattr(row, "reason", None),
        archived_at=row.archived_at,
        **_content(context, row),
    )

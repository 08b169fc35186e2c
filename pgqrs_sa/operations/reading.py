"""Looking at messages and counting them, without touching any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import Row, Select
from sqlalchemy.orm import Session

from .. import arguments
from ..errors import InvalidArgument, MessageNotFound
from ..statements import queues
from ..statements import reading as statements
from ..statements.parts import tables
from ..types import ArchivedInfo, Criteria, MessageInfo, MessageState, Outcome, QueueMetrics
from .context import Context, criteria_on, decoded, encoded, queue_not_found, run

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
    """Return what the next dequeue would see, in its order."""
    arguments.check_queue_name(queue)
    values = {"queue": queue, "limit": arguments.checked_limit(limit)}
    rows = run(session, context, statements.peek(context.models), values).all()
    _check_queue(session, context, queue if not rows else None)
    return [_message(context, row) for row in rows]


def get(session: Session, context: Context, id: int) -> MessageInfo:
    """Return one live message."""
    values = {"id": arguments.checked_id(id)}
    row = run(session, context, statements.message_by_id(context.models), values).one_or_none()
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
) -> list[MessageInfo]:
    """Return live messages by id, those after ``after``."""
    statement = _live(context, queue, state, payload, where, newest_first=newest_first)
    rows = _page_of(session, context, statement, queue, payload, after, limit)
    return [_message(context, row) for row in rows]


def count(
    session: Session,
    context: Context,
    queue: str | None,
    state: MessageState | None,
    payload: Any,
    where: Criteria,
) -> int:
    """Count live messages."""
    return _counted(session, context, _live(context, queue, state, payload, where), queue, payload)


def get_archived(session: Session, context: Context, id: int) -> ArchivedInfo:
    """Return one archived message, by the id of the archive's row."""
    values = {"id": arguments.checked_id(id)}
    row = run(session, context, statements.archived_by_id(context.models), values).one_or_none()
    if row is None:
        raise MessageNotFound([id], "is in the archive: this is the archive's own id")
    return _archived(context, row)


def find_archived(
    session: Session,
    context: Context,
    queue: str | None,
    outcome: Outcome | None,
    payload: Any,
    where: Criteria,
    after: int,
    limit: int,
    newest_first: bool,
) -> list[ArchivedInfo]:
    """Return archived messages by id, those after ``after``."""
    statement = _settled(context, queue, outcome, payload, where, newest_first=newest_first)
    rows = _page_of(session, context, statement, queue, payload, after, limit)
    return [_archived(context, row) for row in rows]


def count_archived(
    session: Session,
    context: Context,
    queue: str | None,
    outcome: Outcome | None,
    payload: Any,
    where: Criteria,
) -> int:
    """Count archived messages."""
    found = _settled(context, queue, outcome, payload, where)
    return _counted(session, context, found, queue, payload)


def metrics(session: Session, context: Context, queue: str) -> QueueMetrics:
    """Count the messages of one queue by state and outcome."""
    arguments.check_queue_name(queue)
    statement = statements.metrics(context.models, one_queue=True)
    row = run(session, context, statement, {"queue": queue}).one_or_none()
    if row is None:
        raise queue_not_found(session, context, queue)
    return QueueMetrics(**row._mapping)  # noqa: SLF001 - public, despite its name


def all_metrics(session: Session, context: Context) -> list[QueueMetrics]:
    """Count the messages of each queue by state and outcome."""
    rows = run(session, context, statements.metrics(context.models, one_queue=False))
    return [QueueMetrics(**row._mapping) for row in rows]  # noqa: SLF001


def _live(
    context: Context,
    queue: str | None,
    state: MessageState | None,
    payload: Any,
    where: Criteria,
    *,
    newest_first: bool = False,
) -> Select[Any]:
    _check_choice("state", state, MessageState)
    known = tables(context.models)
    return statements.find(
        context.models,
        in_queue=queue is not None,
        state=state,
        by_payload=payload is not None,
        where=criteria_on(where, known.message, known.queue),
        newest_first=newest_first,
    )


def _settled(
    context: Context,
    queue: str | None,
    outcome: Outcome | None,
    payload: Any,
    where: Criteria,
    *,
    newest_first: bool = False,
) -> Select[Any]:
    _check_choice("outcome", outcome, Outcome)
    known = tables(context.models)
    return statements.find_archived(
        context.models,
        in_queue=queue is not None,
        outcome=outcome,
        by_payload=payload is not None,
        where=criteria_on(where, known.archived, known.queue),
        newest_first=newest_first,
    )


def _page_of(
    session: Session,
    context: Context,
    statement: Select[Any],
    queue: str | None,
    payload: Any,
    after: int,
    limit: int,
) -> Sequence[Row[Any]]:
    values = _page(context, queue, payload, after, limit)
    rows = run(session, context, statement, values).all()
    _check_queue(session, context, queue if not rows else None)
    return rows


def _counted(
    session: Session, context: Context, found: Select[Any], queue: str | None, payload: Any
) -> int:
    values = _page(context, queue, payload, 0, 1) | {"limit": None}
    total: int = run(session, context, statements.count(found), values).scalar_one()
    _check_queue(session, context, queue if not total else None)
    return total


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value is not None and value not in get_args(choices):
        raise InvalidArgument(
            f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}"
        )


def _page(
    context: Context, queue: str | None, payload: Any, after: int, limit: int
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "after": 0 if after == 0 else arguments.checked_id(after, "after"),
        "limit": arguments.checked_limit(limit),
    }
    if queue is not None:
        values["queue"] = arguments.check_queue_name(queue)
    if payload is not None:
        values["contains"] = encoded(context.codec, payload)
    return values


def _check_queue(session: Session, context: Context, queue: str | None) -> None:
    """Raise when a queue that returned nothing is not there at all."""
    if queue is None:
        return
    if run(session, context, queues.get(context.models), {"queue": queue}).one_or_none() is None:
        raise queue_not_found(session, context, queue)


def _content(context: Context, row: Any) -> dict[str, Any]:
    payload, headers = decoded(context.codec, row.id, row.payload, row.headers)
    return {
        "id": row.id,
        "queue": row.queue,
        "text": row.payload,
        "decoded": payload,
        "headers": headers,
        "priority": row.priority,
        "vt": row.vt,
        "enqueued_at": row.enqueued_at,
        "read_ct": row.read_ct,
        "max_read_ct": row.max_read_ct,
        "key": row.dedup_key,
        "last_error": row.last_error,
        "worker_id": row.consumer_worker_id,
        "producer_id": row.producer_worker_id,
        "dequeued_at": row.dequeued_at,
    }


def _message(context: Context, row: Any) -> MessageInfo:
    return MessageInfo(state=row.state, **_content(context, row))


def _archived(context: Context, row: Any) -> ArchivedInfo:
    return ArchivedInfo(
        original_msg_id=row.original_msg_id,
        outcome=row.outcome,
        reason=row.reason,
        archived_at=row.archived_at,
        **_content(context, row),
    )

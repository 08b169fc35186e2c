"""Cancelling and rescheduling messages that nobody is working on."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from .. import validation
from ..errors import InvalidArgument, MessageLeased, MessageNotFound
from ..types import Criteria, Receipt
from .context import (
    Context,
    criteria_on,
    encoded,
    execute,
    expire_deleted,
    queue_not_found,
    sync_loaded,
)
from .sql import messages as statements
from .sql import queues
from .sql.fragments import MOVED
from .wakeup import announce

__all__ = ["cancel", "cancel_where", "reschedule"]


def cancel(
    session: Session,
    context: Context,
    id: int,
    reason: str | None,
    strict: bool,
) -> bool:
    """Move one message to the archive as cancelled, unless somebody holds it."""
    validation.validate_id(id)
    values = {"ids": [id], "reason": _text(reason)}
    row = execute(session, context, statements.cancel(context.tables), values).one_or_none()
    if row is None and strict:
        raise _refusal(session, context, id)
    expire_deleted(session, context.models.message, [] if row is None else [id])
    return row is not None


def cancel_where(
    session: Session,
    context: Context,
    queue: str,
    where: Criteria,
    payload: Any,
    reason: str | None,
) -> int:
    """Cancel what matches and nobody holds; return how many."""
    validation.validate_queue_name(queue)
    criteria = criteria_on(where, context.tables.message)
    if not criteria and payload is None:
        raise InvalidArgument(
            "cancel_where needs criteria or payload=...: to empty a queue use queues.purge()"
        )
    by_payload = payload is not None
    values = {"queue": queue, "reason": _text(reason)}
    if by_payload:
        values["contains"] = encoded(context.codec, payload)
    statement = statements.cancel_where(context.tables, criteria, by_payload=by_payload)
    ids = execute(session, context, statement, values).scalars().all()
    if (
        not ids
        and not execute(session, context, queues.get(context.tables), {"queue": queue}).all()
    ):
        raise queue_not_found(session, context, queue)
    expire_deleted(session, context.models.message, ids)
    return len(ids)


def reschedule(
    session: Session,
    context: Context,
    id: int,
    delay: float | timedelta | None,
    at: datetime | None,
) -> Receipt:
    """Move a message that nobody holds to another time."""
    validation.validate_id(id)
    if delay is None and at is None:
        raise InvalidArgument("reschedule needs delay=... or at=...")
    span, moment = validation.validate_delay_or_at(delay, at)
    values = {"message_id": id, "delay": span, "at": moment}
    row = execute(session, context, statements.reschedule(context.tables), values).one_or_none()
    if row is None:
        raise _refusal(session, context, id)
    sync_loaded(session, context.models.message, [row], MOVED)
    announce(session, context, [row.id])
    return Receipt(row.id, row.vt)


def _refusal(session: Session, context: Context, id: int) -> MessageLeased | MessageNotFound:
    statement = statements.leased_until(context.tables)
    row = execute(session, context, statement, {"ids": [id]}).one_or_none()
    if row is None or row.until is None:
        return MessageNotFound([id], "is live: it was settled or cancelled, or never was")
    return MessageLeased(id, row.until)


def _text(reason: str | None) -> str | None:
    return None if reason is None else validation.error_text(reason)

"""Settled messages: requeue, delete and prune them, and dead-letter the exhausted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from .. import validation
from ..errors import DuplicateMessage, InvalidArgument, MessageNotFound
from ..types import Receipt
from . import routing
from .context import Context, execute, expire_all_deleted, expire_deleted
from .queues import get as get_queue
from .sql import archive as statements
from .wakeup import announce

__all__ = ["dead_letter_exhausted", "delete", "prune", "requeue"]

_TRIES = 10  # a key that is settled between two statements is free; this never ends otherwise


def dead_letter_exhausted(session: Session, context: Context, queue: str, limit: int) -> int:
    """Archive exhausted messages as dead letters; return how many."""
    validation.validate_queue_name(queue)
    values = {"queue": queue, "limit": validation.validate_limit(limit)}
    ids = (
        execute(session, context, statements.dead_letter_exhausted(context.tables), values)
        .scalars()
        .all()
    )
    if not ids:
        get_queue(session, context, queue)
    expire_deleted(session, context.models.message, ids)
    return len(ids)


def requeue(
    session: Session,
    context: Context,
    ids: Iterable[int],
    delay: float | timedelta,
    attempts: int | None,
) -> list[Receipt]:
    """Move archived messages back, all of them or none."""
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
    original = _originals(session, context, wanted)
    moved = {row.id: Receipt(row.id, row.vt) for row in _moved(session, context, values)}
    expire_deleted(session, context.models.archived, wanted if moved else ())
    announce(session, context, list(moved))
    if not moved:
        # Since then one was taken from the archive, or its key came alive; or two share a key.
        _originals(session, context, wanted)
        raise InvalidArgument(f"archived messages {wanted} share a key: requeue one of them")
    return [moved[original[id_]] for id_ in listed]


def _moved(session: Session, context: Context, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
    """Move them, or none of them, without loss to the caller's transaction.

    Another transaction that is just enqueueing one of the keys cannot be seen; the INSERT waits
    for it, and fails if it commits. The next try sees the key, and moves nothing.
    """
    connection = routing.connect(session, {"mapper": context.mapper})
    alone = routing.is_autocommit(connection)
    for tried in range(1, _TRIES + 1):
        try:
            with nullcontext() if alone else connection.begin_nested():
                return execute(session, context, statements.requeue(context.tables), values).all()
        except IntegrityError:
            if tried == _TRIES:  # by a snapshot, which does not show who has the key
                raise
    raise AssertionError


def _originals(session: Session, context: Context, wanted: Sequence[int]) -> dict[int, int]:
    """Return the message ids by archive id, or raise for the first that cannot be moved."""
    rows = execute(
        session, context, statements.requeue_candidates(context.tables), {"ids": wanted}
    ).all()
    if missing := sorted(set(wanted) - {row.id for row in rows}):
        raise MessageNotFound(missing, "is in the archive: these are the archive's own ids")
    for row in rows:
        if row.live_id is not None:
            raise DuplicateMessage(row.dedup_key, row.live_id)
    return {row.id: row.original_msg_id for row in rows}


def delete(session: Session, context: Context, ids: Iterable[int]) -> int:
    """Delete archived messages by the archive's ids; return how many there were."""
    listed = [validation.validate_id(id_) for id_ in validation.as_list(ids, "ids")]
    if not listed:
        return 0
    rows = execute(session, context, statements.delete(context.tables), {"ids": listed})
    gone = rows.scalars().all()
    expire_deleted(session, context.models.archived, gone)
    return len(gone)


def prune(
    session: Session,
    context: Context,
    older_than: float | timedelta | None,
    queue: str | None,
    limit: int,
) -> int:
    """Delete a chunk of the messages that were archived long enough ago; return how many."""
    values: dict[str, Any] = {"limit": validation.validate_limit(limit)}
    if older_than is not None:
        values["older_than"] = validation.validate_age(older_than, "older_than")
    if queue is not None:
        values["queue"] = get_queue(session, context, queue).name
    statement = statements.prune(
        context.tables, one_queue=queue is not None, by_retention=older_than is None
    )
    result: Any = execute(session, context, statement, values)
    expire_all_deleted(session, context.models.archived)
    return int(result.rowcount)

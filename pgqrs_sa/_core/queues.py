"""Creating, changing and removing queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .. import validation
from ..declared import DeclaredQueue, QueueSource, declared_in
from ..errors import InvalidArgument, PgqrsError, QueueNotEmpty
from ..types import QueueDifference, QueueInfo, SyncedQueue
from . import wakeup
from .context import (
    Context,
    execute,
    expire_all_deleted,
    expire_deleted,
    queue_not_found,
    sync_loaded,
)
from .sql import queues as statements

__all__ = [
    "UNCHANGED",
    "create",
    "delete",
    "everything",
    "get",
    "pause",
    "purge",
    "resume",
    "sync",
    "update",
]

UNCHANGED: Any = object()
"""The default of a setting that is left as it is; None is a value of ``retention``."""

_TRIES = 3
"""A queue that is neither created nor found was deleted in between, or is hidden from this role."""


def create(
    session: Session,
    context: Context,
    name: str,
    lease: object,
    max_read_ct: object,
    retention: object,
    max_payload_bytes: object,
) -> QueueInfo:
    """Return the queue of this name; create it with these settings if it does not exist."""
    validation.validate_queue_name(name)
    given = _checked(lease, max_read_ct, retention, max_payload_bytes)
    statement = statements.create(context.tables, tuple(given))
    while True:
        row = execute(session, context, statement, _values(name, given)).one_or_none()
        if row is None:
            row = execute(
                session, context, statements.get(context.tables), {"queue": name}
            ).one_or_none()
        if row is not None:
            return _info(row)


def sync(
    session: Session,
    context: Context,
    source: QueueSource,
    *,
    update: bool = False,
    dry_run: bool = False,
) -> list[SyncedQueue]:
    """Create declared queues that are missing; report, or change, those that differ."""
    declared = declared_in(source)
    found = _found(session, context, declared)
    missing = [queue for queue in declared if queue.name not in found]
    if missing and not dry_run:
        found |= _create_missing(session, context, missing)
    return [
        _compared(session, context, queue, found[queue.name], update=update and not dry_run)
        if queue.name in found
        else SyncedQueue(queue.name, "missing" if dry_run else "created")
        for queue in declared
    ]


def _found(
    session: Session, context: Context, declared: Sequence[DeclaredQueue]
) -> dict[str, QueueInfo]:
    """Return those that exist. They need no INSERT, which needs a right of its own."""
    if not declared:
        return {}
    names = [queue.name for queue in declared]
    rows = execute(session, context, statements.named(context.tables), {"names": names})
    return {row.queue_name: _info(row) for row in rows}


def _create_missing(
    session: Session, context: Context, missing: Sequence[DeclaredQueue]
) -> dict[str, QueueInfo]:
    """Create queues; return those that another process has created meanwhile."""
    statement = statements.create_missing(context.tables.queue)
    found: dict[str, QueueInfo] = {}
    left = list(missing)
    for _ in range(_TRIES):
        created = execute(session, context, statement, statements.columns_of(left)).scalars().all()
        left = [queue for queue in left if queue.name not in created]
        if not left:
            return found
        found |= _found(session, context, left)
        left = [queue for queue in left if queue.name not in found]
        if not left:
            return found
    raise PgqrsError(
        f"the queue {left[0].name!r} can neither be created nor found: look for a row-level "
        "security policy on pgqrs_queues"
    )


def _compared(
    session: Session,
    context: Context,
    declared: DeclaredQueue,
    found: QueueInfo,
    *,
    update: bool,
) -> SyncedQueue:
    differences = tuple(
        QueueDifference(setting, value, getattr(found, setting))
        for setting, value in declared.settings().items()
        if getattr(found, setting) != value
    )
    if not differences:
        return SyncedQueue(declared.name, "unchanged")
    if update:
        changed = {difference.setting: difference.declared for difference in differences}
        statement = statements.update(context.tables, tuple(changed))
        _one(session, context, statement, declared.name, _values(declared.name, changed))
    return SyncedQueue(declared.name, "updated" if update else "differs", differences)


def get(session: Session, context: Context, name: str) -> QueueInfo:
    """Return the queue of this name."""
    return _one(session, context, statements.get(context.tables), name)


def everything(session: Session, context: Context) -> list[QueueInfo]:
    """Return all queues by name."""
    return [_info(row) for row in execute(session, context, statements.everything(context.tables))]


def update(
    session: Session,
    context: Context,
    name: str,
    lease: object,
    max_read_ct: object,
    retention: object,
    max_payload_bytes: object,
) -> QueueInfo:
    """Change defaults of a queue."""
    given = _checked(lease, max_read_ct, retention, max_payload_bytes)
    if not given:
        raise InvalidArgument("update needs at least one setting to change")
    validation.validate_queue_name(name)
    statement = statements.update(context.tables, tuple(given))
    return _one(session, context, statement, name, _values(name, given))


def pause(session: Session, context: Context, name: str) -> QueueInfo:
    """Pause leasing from a queue until it is resumed."""
    return _one(session, context, statements.pause(context.tables), name)


def resume(session: Session, context: Context, name: str) -> QueueInfo:
    """Resume leasing from a queue."""
    found = _one(session, context, statements.resume(context.tables), name)
    wakeup.mark_enqueued(session, name, context.mapper)
    return found


def purge(
    session: Session,
    context: Context,
    name: str,
    limit: int | None = None,
    up_to: int | None = None,
    tokens: Mapping[int, int] | None = None,
) -> int:
    """Delete live messages, the oldest first; return how many."""
    values: dict[str, Any] = {"queue": name}
    if tokens is None:
        statement = statements.purge(context.tables)
        values["limit"] = None if limit is None else validation.validate_limit(limit)
        values["up_to"] = None if up_to is None else validation.validate_id(up_to)
    else:
        if limit is not None or up_to is not None:
            raise InvalidArgument(
                "tokens name the messages: give neither limit nor up_to with them"
            )
        statement = statements.purge_unchanged(context.tables)
        values |= _read(tokens)
    get(session, context, name)
    result: Any = execute(session, context, statement, values)
    expire_all_deleted(session, context.models.message)
    return int(result.rowcount)


def _read(tokens: object) -> dict[str, list[int]]:
    if not isinstance(tokens, Mapping):
        raise InvalidArgument(
            f"tokens must be a mapping of ids to fencing tokens, not a {type(tokens).__name__}"
        )
    return {
        "ids": [validation.validate_id(id_) for id_ in tokens],
        "tokens": [validation.validate_id(token, "token") for token in tokens.values()],
    }


def delete(session: Session, context: Context, name: str, force: bool) -> None:
    """Delete a queue, and with ``force`` all that it holds."""
    get(session, context, name)
    if not force:
        _refuse_unless_empty(session, context, name)
    # Before anything is deleted: an enqueue that waits for a key which this transaction has
    # freed keeps its lock on the table, and the two would deadlock.
    execute(session, context, statements.lock_messages(context.tables))
    values = {"queue": name}
    if not force:
        _refuse_unless_empty(session, context, name)  # what was being enqueued is there now
    elif not execute(session, context, statements.is_empty(context.tables), values).scalar_one():
        purge(session, context, name)
        execute(session, context, statements.delete_history(context.tables), values)
        expire_all_deleted(session, context.models.archived)
    gone = execute(session, context, statements.delete(context.tables), values).scalars().all()
    expire_deleted(session, context.models.queue, gone)


def _refuse_unless_empty(session: Session, context: Context, name: str) -> None:
    values = {"queue": name}
    if not execute(session, context, statements.is_empty(context.tables), values).scalar_one():
        held = execute(session, context, statements.contents(context.tables), values).one()
        raise QueueNotEmpty(name, held.messages, held.archived)


def _one(
    session: Session,
    context: Context,
    statement: Executable,
    name: str,
    values: Mapping[str, Any] | None = None,
) -> QueueInfo:
    validation.validate_queue_name(name)
    row = execute(session, context, statement, values or {"queue": name}).one_or_none()
    if row is None:
        raise queue_not_found(session, context, name)
    sync_loaded(session, context.models.queue, [row], row._fields)
    return _info(row)


def _checked(
    lease: object, max_read_ct: object, retention: object, max_payload_bytes: object
) -> dict[str, Any]:
    """Return the settings that were given, as their columns take them."""
    settings = {
        "lease": lease,
        "max_read_ct": max_read_ct,
        "retention": retention,
        "max_payload_bytes": max_payload_bytes,
    }
    given = {name: value for name, value in settings.items() if value is not UNCHANGED}
    return validation.validate_queue_settings(given)


def _values(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"queue": name, **{f"new_{setting}": value for setting, value in given.items()}}


def _info(row: Any) -> QueueInfo:
    return QueueInfo(
        id=row.id,
        name=row.queue_name,
        created_at=row.created_at,
        lease_seconds=row.lease_seconds,
        max_read_ct=row.max_read_ct,
        retention_seconds=row.retention_seconds,
        max_payload_bytes=row.max_payload_bytes,
        paused_at=row.paused_at,
    )

"""One queue: what the other operations need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.sql import Executable

from .. import validation
from ..types import QueueInfo
from .scope import Scope, queue_not_found
from .sessions import sync_loaded
from .sql import queues as statements

__all__ = ["binds", "create", "execute_on", "get", "info"]

_FIELDS = tuple(field for field in QueueInfo.__dataclass_fields__ if field != "name")


def create(scope: Scope, name: str, given: Mapping[str, Any]) -> QueueInfo:
    """Return the queue of this name, created with these settings if it does not exist."""
    statement = statements.create(scope.tables, tuple(given))
    while True:
        row = scope.execute(statement, binds(name, given)).one_or_none()
        if row is None:
            values = {"queue": name}
            row = scope.execute(statements.get(scope.tables), values).one_or_none()
        if row is not None:
            return info(row)


def get(scope: Scope, name: str) -> QueueInfo:
    """Return the queue of this name, or raise `QueueNotFound`."""
    return execute_on(scope, statements.get(scope.tables), name)


def execute_on(
    scope: Scope, statement: Executable, name: str, values: Mapping[str, Any] | None = None
) -> QueueInfo:
    """Execute a statement about one queue, and return the queue, or raise `QueueNotFound`."""
    validation.validate_queue_name(name)
    row = scope.execute(statement, values or {"queue": name}).one_or_none()
    if row is None:
        raise queue_not_found(scope, name)
    sync_loaded(scope.session, scope.context.models.queue, [row], row._fields)
    return info(row)


def binds(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a statement that sets settings of a queue."""
    return {"queue": name, **{f"new_{setting}": value for setting, value in settings.items()}}


def info(row: Any) -> QueueInfo:
    """Return a queue from a row of it."""
    return QueueInfo(name=row.queue_name, **{field: getattr(row, field) for field in _FIELDS})

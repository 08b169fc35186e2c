"""Counting rows that refer to rows that do not exist."""

from __future__ import annotations

from sqlalchemy.orm import Session

from .context import Context, execute
from .sql import integrity as statements

__all__ = ["orphans"]


def orphans(session: Session, context: Context) -> dict[str, int]:
    """Count orphans by kind; all are 0 in a sound database.

    Returns:
        ``messages_without_queue`` and ``archived_without_queue``, left behind when a queue was
        deleted by hand; ``leases_without_worker``, whose worker was.
    """
    row = execute(session, context, statements.orphans(context.tables)).one()
    return {name: int(count) for name, count in row._mapping.items()}  # noqa: SLF001

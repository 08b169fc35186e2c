"""Asking the database which version of the schema it has."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .context import Context

__all__ = ["check"]


def check(session: Session, context: Context) -> None:
    """Raise unless the tables are of the version that this release needs."""
    # Here, because the module registers operations with Alembic: only who asks pays for that.
    from ..migrations import check as check_version  # noqa: PLC0415

    connection = session.connection(bind_arguments={"mapper": context.models.queue})
    check_version(connection, sa.inspect(context.models.queue).local_table.schema)

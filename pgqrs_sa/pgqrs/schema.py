"""Installing, removing and checking the tables: the steps of a host's migration, run directly."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .. import migrations
from ..errors import SchemaVersionError
from ..migrations import schemas
from ..models import Models
from ..operations import integrity
from ..operations.catalogue import installed
from ..operations.context import Context
from ..statements.parts import tables
from .errors import NotIntact, SchemaNotOurs

__all__ = ["install", "uninstall", "verify"]


def install(connection: sa.Connection, schema: str | None, models: Models) -> None:
    """Bring the tables to the version of this release; only check them if a host migrates them.

    Args:
        connection: In a transaction.
        schema: Where the tables are; None is ``current_schema()``.
        models: The classes of that schema.

    Raises:
        SchemaNotOurs: They are for a host's Alembic history to make, or to upgrade.
    """
    # Alembic is slow to import, and an extra: only who installs pays for it.
    from ..migrations import install as steps  # noqa: PLC0415

    try:
        steps.install(connection, schema)
    except steps.HostHistory as refusal:
        try:
            migrations.check(connection, schemas.target(connection, schema), models=models)
        except SchemaVersionError:
            raise SchemaNotOurs(str(refusal)) from refusal


def uninstall(connection: sa.Connection, schema: str | None) -> None:
    """Drop the tables with all that they hold; do nothing when they are not there.

    Raises:
        SchemaNotOurs: They belong to a host's Alembic history.
    """
    from ..migrations import install as steps  # noqa: PLC0415

    try:
        steps.uninstall(connection, schema)
    except steps.HostHistory as refusal:
        raise SchemaNotOurs(str(refusal)) from refusal


def verify(session: Session, schema: str | None, models: Models) -> None:
    """Raise unless the tables are there, of a version that works, and without orphans.

    Raises:
        SchemaVersionError: There is no queue schema, or it is too old or too new.
        NotIntact: Tables are missing, or rows refer to rows which are not there.
    """
    migrations.check(session.connection(), schema, models=models)
    context = Context.of(models, None, None, allow_autocommit=False)
    there = installed(session, context, schema)
    if missing := [table.name for table in tables(models) if table.name not in there]:
        raise NotIntact({f"missing table {name}": 1 for name in missing})
    counts = integrity.orphans(session, context)
    if findings := {kind: count for kind, count in counts.items() if count}:
        raise NotIntact(findings)

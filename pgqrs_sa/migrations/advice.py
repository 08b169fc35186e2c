"""Which command makes the tables in a database, or brings them to the version of this release."""

from __future__ import annotations

import shlex

import sqlalchemy as sa

from .._core.sql import catalog

__all__ = ["command", "elsewhere", "install_command"]


def install_command(schema: str | None) -> str:
    """Return how to install without a host's history, ready for a shell."""
    place = () if schema is None else ("--schema", schema)
    return shlex.join(("pgqrs", *place, "install"))


def command(connection: sa.Connection, schema: str | None) -> str:
    """Return the command for a database: that of Alembic where it has a history of revisions.

    Args:
        connection: A connection to the database.
        schema: Where the tables are meant to be; None follows the ``search_path``.
    """
    if connection.scalar(catalog.has_history, {"schema": schema}):
        return "alembic upgrade head"
    return install_command(schema)


def elsewhere(connection: sa.Connection) -> list[str]:
    """Return the schemas that have a table of queues, by name."""
    return list(connection.scalars(catalog.schemas_with, {"name": "pgqrs_queues"}))

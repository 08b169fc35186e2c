"""Create and drop the tables without an Alembic history, with the same steps and the same lock.

``pgqrs install`` and the `Admin` of `pgqrs_sa.pgqrs` call these, for a database without a host's
Alembic history. If the schema has a table ``alembic_version``, it has such a history: a change
outside it would make its next revision fail, and is refused.

They need Alembic: the extra ``alembic``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

from .. import migrations
from ..errors import PgqrsError, SchemaVersionError
from . import schemas
from .ops import DowngradeOp, UpgradeOp

__all__ = ["HostHistory", "install", "owner", "uninstall"]

_OWNER = sa.text(
    "SELECT CAST(to_regclass(quote_ident(:schema) || '.alembic_version') AS text)"
).bindparams(sa.bindparam("schema", type_=sa.Text))


class HostHistory(PgqrsError):
    """The schema belongs to a host's Alembic history, which must make the change itself.

    Attributes:
        table: The host's table of revisions.
    """

    code = "PGQ-032"

    def __init__(self, table: str, advice: str) -> None:
        super().__init__(
            f"this schema belongs to a host's Alembic history (it has {table}): {advice}"
        )
        self.table = table


def owner(connection: sa.Connection, schema: str | None = None) -> str | None:
    """Return the table of a host's Alembic revisions in the schema, or None.

    Args:
        connection: A connection; from asyncio, ``await connection.run_sync(owner)``.
        schema: The schema's plain name, or None for ``current_schema()``.
    """
    place = schemas.target(connection, schema)
    return None if place is None else connection.scalar(_OWNER, {"schema": place})


def install(connection: sa.Connection, schema: str | None = None) -> int:
    """Create the tables, or upgrade them to the version of this release; commit afterwards.

    A second call, also from another process at the same time, finds nothing to do.

    Args:
        connection: A connection; from asyncio, ``await connection.run_sync(install)``.
        schema: The schema's plain name, created if it is missing; None for
            ``current_schema()``.

    Returns:
        The version before; 0 if there were no tables.

    Raises:
        HostHistory: a change is needed, and the host's Alembic history must make it.
        SchemaVersionError: a newer release made the tables, or their version is unknown.
    """
    migrations.lock(connection)
    before = plan(connection, schema)
    if before < migrations.LATEST:
        _operations(connection).invoke(UpgradeOp(before, migrations.LATEST, schema))
    return before


def plan(connection: sa.Connection, schema: str | None = None) -> int:
    """Return the version that `install` would start from; raise if it would refuse."""
    before = _installed(connection, schema)
    if before < migrations.LATEST and (table := owner(connection, schema)):
        raise HostHistory(table, "run `alembic upgrade head` there, or install into another schema")
    return before


def uninstall(connection: sa.Connection, schema: str | None = None) -> int:
    """Drop the tables and everything in them; commit afterwards.

    Args:
        connection: A connection; from asyncio, ``await connection.run_sync(uninstall)``.
        schema: The schema's plain name; the schema itself stays. None for ``current_schema()``.

    Returns:
        The version before; 0 if there were no tables.

    Raises:
        HostHistory: the host's Alembic history created them, and must drop them.
        SchemaVersionError: a newer release made the tables, or their version is unknown.
    """
    migrations.lock(connection)
    before = _installed(connection, schema)
    if before:
        if table := owner(connection, schema):
            raise HostHistory(table, "downgrade the revision that calls op.pgqrs_upgrade")
        _operations(connection).invoke(DowngradeOp(before, 0, schema))
    return before


def _installed(connection: sa.Connection, schema: str | None) -> int:
    place = schemas.target(connection, schema)
    if place is None:
        return 0
    stamp = migrations.read_stamp(connection, place)
    if stamp.schema is not None and stamp.version is None:
        raise SchemaVersionError(None, migrations.LATEST, place, migrations.unstamped(place))
    if stamp.version is not None and stamp.version > migrations.LATEST:
        raise SchemaVersionError(stamp.version, migrations.LATEST, place, migrations.TOO_NEW)
    return stamp.version or 0


def _operations(connection: sa.Connection) -> Operations:
    return Operations(MigrationContext.configure(connection))

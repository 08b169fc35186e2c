"""The two operations that a host's revision calls, as values, and how they run and render.

``op.pgqrs_upgrade(from_version=0, to_version=1, schema=None)`` runs the steps between the two
versions, ``op.pgqrs_downgrade(from_version=1, to_version=0, schema=None)`` their opposites. Both
versions are in the call so that a revision does the same whatever release runs it, and so that an
offline script (``--sql``) needs no database to be complete.

Each starts with the migration lock. Online it then finds out which schema is meant (see `schemas`)
and compares ``from_version`` with the stamp there, before anything is changed. The steps name that
schema in all that they do, and are followed by the new stamp. An offline script does not know the
schema, and leaves only that one on the search path meanwhile.

Both need a transaction, so that an interruption leaves all of a step or nothing: in an
``autocommit_block()`` they are refused.

This module is imported while Alembic is half imported (see `pgqrs_sa.alembic_plugin`): it may use
``alembic.operations`` and ``alembic.autogenerate.render``, which are complete by then, no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy as sa
from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from sqlalchemy.schema import CreateSchema

from .. import migrations
from .._core import sessions
from ..errors import InvalidArgument, SchemaVersionError
from ..models import VERSION_COMMENT
from . import schemas

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["IMPORT", "DowngradeOp", "UpgradeOp", "offline", "untranslated"]

IMPORT = "import pgqrs_sa.migrations  # noqa: F401 - op.pgqrs_upgrade and op.pgqrs_downgrade"


class VersionOp(MigrateOperation):
    """A move of the queue schema from one version to another.

    Attributes:
        name: What the operation is called in a revision.
        from_version: The version to start from; 0 when there are no tables.
        to_version: The version to end with.
        schema: Where the tables are; None is ``current_schema()``.
    """

    name: ClassVar[str]

    def __init__(self, from_version: int, to_version: int, schema: str | None = None) -> None:
        self.from_version = from_version
        self.to_version = to_version
        self.schema = schema

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return (self.name, self.schema, self.from_version, self.to_version)


@Operations.register_operation("pgqrs_upgrade")
class UpgradeOp(VersionOp):
    """Make the tables newer."""

    name = "pgqrs_upgrade"

    @classmethod
    def pgqrs_upgrade(
        cls,
        operations: Operations,
        from_version: int = 0,
        to_version: int = 1,
        schema: str | None = None,
    ) -> None:
        """Create the queue tables, or bring them to a newer version."""
        operations.invoke(cls(from_version, to_version, schema))

    def reverse(self) -> DowngradeOp:
        """Return the operation that undoes this one."""
        return DowngradeOp(self.to_version, self.from_version, self.schema)


@Operations.register_operation("pgqrs_downgrade")
class DowngradeOp(VersionOp):
    """Make the tables older; version 0 drops them and their messages."""

    name = "pgqrs_downgrade"

    @classmethod
    def pgqrs_downgrade(
        cls,
        operations: Operations,
        from_version: int = 1,
        to_version: int = 0,
        schema: str | None = None,
    ) -> None:
        """Bring the queue tables to an older version, or drop them with all their messages."""
        operations.invoke(cls(from_version, to_version, schema))

    def reverse(self) -> UpgradeOp:
        """Return the operation that undoes this one."""
        return UpgradeOp(self.to_version, self.from_version, self.schema)


@Operations.implementation_for(UpgradeOp)
def _upgrade(operations: Operations, move: UpgradeOp) -> None:
    _check_range(move, move.from_version, move.to_version)
    with _begun(operations, move) as schema:
        if schema is not None and move.from_version == 0:
            _ensure_schema(operations, schema)
        for version in range(move.from_version + 1, move.to_version + 1):
            migrations.STEPS[version].upgrade(operations, schema)
        _stamp(operations, move, schema)


@Operations.implementation_for(DowngradeOp)
def _downgrade(operations: Operations, move: DowngradeOp) -> None:
    _check_range(move, move.to_version, move.from_version)
    with _begun(operations, move) as schema:
        for version in range(move.from_version, move.to_version, -1):
            migrations.STEPS[version].downgrade(operations, schema)
        if move.to_version > 0:
            _stamp(operations, move, schema)


def _check_range(move: VersionOp, low: int, high: int) -> None:
    if high > migrations.LATEST:
        raise InvalidArgument(
            f"op.{move.name} speaks of version {high}, and this pgqrs_sa ends at "
            f"{migrations.LATEST}: this pgqrs_sa is older than the migration, upgrade the package"
        )
    if low < 0:
        raise InvalidArgument(f"op.{move.name}: version {low} is below 0, which means no tables")
    if low >= high:
        other = DowngradeOp if isinstance(move, UpgradeOp) else UpgradeOp
        raise InvalidArgument(
            f"op.{move.name} cannot go from version {move.from_version} to {move.to_version}: "
            f"swap the two, or call op.{other.name}"
        )


@contextmanager
def _begun(operations: Operations, move: VersionOp) -> Iterator[str | None]:
    """Take the lock, refuse what does not fit, and yield the schema that the steps name."""
    changes_existing = move.from_version > 0
    if operations.get_context().as_sql:
        with offline(operations, move.schema, changes_existing=changes_existing):
            yield move.schema
        return
    connection = operations.get_bind()
    if sessions.is_autocommit(connection):
        raise InvalidArgument(
            f"op.{move.name} has to run in a transaction, and this connection commits each "
            "statement by itself: call it outside of autocommit_block(), or in a revision of its "
            "own, and migrate without isolation_level='AUTOCOMMIT'"
        )
    migrations.lock(connection)
    schema = schemas.require(connection, move.schema, changes_existing=changes_existing)
    _check_installed(connection, move, schema)
    with untranslated(connection):
        yield schema


@contextmanager
def offline(
    operations: Operations, schema: str | None, *, changes_existing: bool
) -> Iterator[None]:
    """Write what a script (``--sql``) does around an operation: the lock, and the search path."""
    migrations.lock(operations)
    # This fails outside of a transaction, where the lock would not last.
    operations.execute("SAVEPOINT pgqrs_sa")
    if schema is None:
        operations.execute(schemas.KEEP_PATH)
        operations.execute(schemas.NARROW_PATH[changes_existing])
    yield
    if schema is None:
        operations.execute(schemas.RESTORE_PATH)
    operations.execute("RELEASE SAVEPOINT pgqrs_sa")


@contextmanager
def untranslated(connection: sa.Connection) -> Iterator[None]:
    """Take names as they are: the ``schema_translate_map`` was applied already."""
    mapped = connection.get_execution_options().get("schema_translate_map")
    connection.execution_options(schema_translate_map=None)
    try:
        yield
    finally:
        connection.execution_options(schema_translate_map=mapped)


def _check_installed(connection: sa.Connection, move: VersionOp, schema: str) -> None:
    found, installed = migrations.read_stamp(connection, schema)
    if found is not None and installed is None:
        raise _mismatch(None, move, schema, migrations.unstamped(schema))
    if (installed or 0) != move.from_version:
        raise _mismatch(installed, move, schema, " ".join(_advice(move, installed or 0)))
    if found is None:
        schemas.refuse_incomplete(connection, schema)


def _mismatch(installed: int | None, move: VersionOp, schema: str, hint: str) -> SchemaVersionError:
    return SchemaVersionError(installed, move.from_version, schema, hint, subject=f"op.{move.name}")


def _advice(move: VersionOp, installed: int) -> Iterator[str]:
    yield f"op.{move.name} of this revision starts from version {move.from_version}."
    if isinstance(move, UpgradeOp) and installed >= move.to_version:
        yield (
            "If metadata.create_all() made the tables, or another history did, tell Alembic that "
            "it is done: `alembic stamp <this revision>`. If an earlier run of this revision was "
            "interrupted after this call, leave the call out for one run"
        )
    elif isinstance(move, DowngradeOp) and installed <= move.to_version:
        yield "It is done already: `alembic stamp <the revision before this one>`"
    else:
        yield (
            "Run the revisions in between first, or write the installed version into the call "
            "if there are none"
        )


def _ensure_schema(operations: Operations, schema: str) -> None:
    # IF NOT EXISTS asks for the right to create schemas even where the schema exists.
    if operations.get_context().as_sql:
        operations.execute(CreateSchema(schema, if_not_exists=True))
    elif not sa.inspect(operations.get_bind()).has_schema(schema):
        operations.execute(CreateSchema(schema))


def _stamp(operations: Operations, move: VersionOp, schema: str | None) -> None:
    operations.create_table_comment(
        "pgqrs_queues", f"{VERSION_COMMENT}{move.to_version}", schema=schema
    )


@renderers.dispatch_for(VersionOp)
def _render(context: AutogenContext, move: VersionOp) -> str:
    context.imports.add(IMPORT)
    where = "" if move.schema is None else f", schema={str(move.schema)!r}"
    return (
        f"{context.opts['alembic_module_prefix']}{move.name}"
        f"(from_version={move.from_version}, to_version={move.to_version}{where})"
    )

"""The operations that a host's revision calls: their values, how they run and how they render.

``op.pgqrs_upgrade(from_version=0, to_version=1, schema=None)`` runs the steps between the two
versions, ``op.pgqrs_downgrade(from_version=1, to_version=0, schema=None)`` their opposites. The
call contains both versions, so that a revision does the same in every release, and an offline
script (``--sql``) needs no database.

Both first take the migration lock. Online they then determine the schema (see `schemas`) and
compare ``from_version`` with the stamp there, before they change anything. The steps name that
schema in every statement, and the new stamp follows them. An offline script does not know the
schema: it reduces the search path to that schema meanwhile.

Both need a transaction, so that an interruption leaves all of a step or nothing. They refuse to run
in an ``autocommit_block()``.

``op.pgqrs_queue("mail", lease=60)`` creates a queue with the settings of a
`pgqrs_sa.DeclaredQueue`; an existing queue is not changed. ``op.pgqrs_drop_queue("mail")``, its
opposite, deletes the queue only if it is empty, so that a downgrade loses no message, live or
archived. A queue that holds messages stays, and a later upgrade finds it. Autogenerate writes both
for queues that `pgqrs_sa.declare_queues` has attached to a MetaData.

This module is imported while Alembic is partly imported (see `pgqrs_sa.alembic_plugin`): it may
only use ``alembic.operations`` and ``alembic.autogenerate.render``, which are complete by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, cast

import sqlalchemy as sa
from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.schema import CreateSchema

from .. import migrations
from .._core import sessions
from .._core.sql.queues import LockTable, holds_nothing
from ..declared import DeclaredQueue
from ..errors import InvalidArgument, SchemaVersionError
from ..models import VERSION_COMMENT, tables_in
from ..types import Keep, Seconds
from . import schemas

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = [
    "IMPORT",
    "CreateQueueOp",
    "DowngradeOp",
    "DropQueueOp",
    "UpgradeOp",
    "offline",
    "untranslated",
]

IMPORT = "import pgqrs_sa.migrations  # noqa: F401 - op.pgqrs_upgrade and op.pgqrs_downgrade"


class VersionOp(MigrateOperation):
    """A move of the queue schema from one version to another.

    Attributes:
        name: The name of the operation in a revision.
        from_version: The version to start from; 0 for no tables.
        to_version: The version to end with.
        schema: The schema of the tables; None is ``current_schema()``.
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
    """Upgrades the tables."""

    name = "pgqrs_upgrade"

    @classmethod
    def pgqrs_upgrade(
        cls,
        operations: Operations,
        from_version: int = 0,
        to_version: int = 1,
        schema: str | None = None,
    ) -> None:
        """Create the queue tables, or upgrade them to a newer version."""
        operations.invoke(cls(from_version, to_version, schema))

    def reverse(self) -> DowngradeOp:
        """Return the operation that undoes this one."""
        return DowngradeOp(self.to_version, self.from_version, self.schema)


@Operations.register_operation("pgqrs_downgrade")
class DowngradeOp(VersionOp):
    """Downgrades the tables; version 0 drops them and their messages."""

    name = "pgqrs_downgrade"

    @classmethod
    def pgqrs_downgrade(
        cls,
        operations: Operations,
        from_version: int = 1,
        to_version: int = 0,
        schema: str | None = None,
    ) -> None:
        """Downgrade the queue tables to an older version, or drop them with all their messages."""
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
    """Take the lock, check the versions, and yield the schema for the steps."""
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
    """Write what a script (``--sql``) needs around an operation: the lock and the search path."""
    migrations.lock(operations)
    # This fails outside a transaction, where the lock would not last.
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
    """Use names as they are: the ``schema_translate_map`` was applied already."""
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


_log = logging.getLogger(__name__)


class _QueueOp(MigrateOperation):
    """An operation about one queue.

    Attributes:
        queue: The queue and its settings.
        schema: The schema of the tables; None is ``current_schema()``.
    """

    def __init__(self, queue: DeclaredQueue, schema: str | None = None) -> None:
        self.queue = queue
        self.schema = schema


@Operations.register_operation("pgqrs_queue")
class CreateQueueOp(_QueueOp):
    """Creates a queue if it is missing."""

    @classmethod
    def pgqrs_queue(
        cls,
        operations: Operations,
        name: str,
        *,
        lease: Seconds | None = None,
        max_read_ct: int | None = None,
        keep: Keep | None = None,
        retention: Seconds | None = None,
        failed_retention: Seconds | None = None,
        max_payload_bytes: int | None = None,
        schema: str | None = None,
    ) -> None:
        """Create a queue if it is missing; the settings are those of `DeclaredQueue`."""
        queue = DeclaredQueue(
            name, lease, max_read_ct, keep, retention, failed_retention, max_payload_bytes
        )
        operations.invoke(cls(queue, schema))

    def reverse(self) -> DropQueueOp:
        """Return the operation that undoes this one."""
        return DropQueueOp(self.queue, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("pgqrs_queue", self.schema, self.queue.name)


@Operations.register_operation("pgqrs_drop_queue")
class DropQueueOp(_QueueOp):
    """Deletes a queue if it is empty."""

    @classmethod
    def pgqrs_drop_queue(
        cls, operations: Operations, name: str, *, schema: str | None = None
    ) -> None:
        """Delete a queue if it holds no message, live or archived."""
        operations.invoke(cls(DeclaredQueue(name), schema))

    def reverse(self) -> CreateQueueOp:
        """Return the operation that undoes this one."""
        return CreateQueueOp(self.queue, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("pgqrs_drop_queue", self.schema, self.queue.name)


@Operations.implementation_for(CreateQueueOp)
def _create(operations: Operations, op: CreateQueueOp) -> None:
    with _tables_for_change(operations, op.schema) as tables:
        queue = tables["pgqrs_queues"]
        operations.execute(
            insert(queue)
            .values(queue_name=op.queue.name, **op.queue.settings())
            .on_conflict_do_nothing(index_elements=[queue.c.queue_name])
        )


@Operations.implementation_for(DropQueueOp)
def _drop(operations: Operations, op: DropQueueOp) -> None:
    with _tables_for_change(operations, op.schema) as tables:
        queue = tables["pgqrs_queues"]
        # Locked as in `Queues.delete`: no foreign key refuses a message that is being enqueued.
        operations.execute(LockTable(tables["pgqrs_messages"]))
        operations.execute(
            sa.delete(queue).where(
                queue.c.queue_name == op.queue.name,
                holds_nothing(queue.c.id, tables["pgqrs_messages"], tables["pgqrs_archive"]),
            )
        )
        if not operations.get_context().as_sql:
            found = sa.select(queue.c.id).where(queue.c.queue_name == op.queue.name)
            if operations.get_bind().scalar(found) is not None:
                _log.warning("queue %r holds messages, and is not deleted", op.queue.name)


@contextmanager
def _tables_for_change(operations: Operations, schema: str | None) -> Iterator[dict[str, sa.Table]]:
    """Yield the tables by name, in the schema of the statements."""
    if operations.get_context().as_sql:
        with offline(operations, schema, changes_existing=True):
            yield _tables(schema)
        return
    connection = operations.get_bind()
    place = schemas.require(connection, schema, changes_existing=True)
    with untranslated(connection):
        yield _tables(place)


def _tables(schema: str | None) -> dict[str, sa.Table]:
    # A pristine copy, without the host's additions.
    found = tables_in("pg_temp" if schema is None else schema)
    if schema is not None:
        return dict(found)
    metadata, unnamed = sa.MetaData(), cast("Any", None)  # SQLAlchemy takes it, its types do not
    return {name: table.to_metadata(metadata, schema=unnamed) for name, table in found.items()}


@renderers.dispatch_for(CreateQueueOp)
def _render_create(context: AutogenContext, op: CreateQueueOp) -> str:
    settings = {each.name: getattr(op.queue, each.name) for each in fields(op.queue)[1:]}
    return _rendered(context, "pgqrs_queue", op, settings)


@renderers.dispatch_for(DropQueueOp)
def _render_drop(context: AutogenContext, op: DropQueueOp) -> str:
    return _rendered(context, "pgqrs_drop_queue", op, {})


def _rendered(context: AutogenContext, name: str, op: _QueueOp, settings: dict[str, Any]) -> str:
    context.imports.add(IMPORT)
    given = {key: _plain(value) for key, value in settings.items() if value is not None}
    if op.schema is not None:
        given["schema"] = str(op.schema)
    arguments = ", ".join([repr(op.queue.name), *(f"{k}={v!r}" for k, v in given.items())])
    return f"{context.opts['alembic_module_prefix']}{name}({arguments})"


def _plain(value: Any) -> Any:
    """Return a setting as a value that a revision can write without an import."""
    return value.total_seconds() if isinstance(value, timedelta) else value

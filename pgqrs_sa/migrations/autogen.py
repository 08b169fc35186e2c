"""Autogenerate for the four tables: one call per schema, and the host's additions.

It runs after Alembic's own comparisons, and changes their result:

1. The schemas are those of the tables marked as ours in ``target_metadata``, and those that the
   ``pgqrs_schemas`` option names.
2. Operations on objects that the library owns are removed, since a step makes these changes. The
   owned objects are read from a pristine copy of the models. So a host's own columns, indexes and
   constraints are recognized, and stay as ordinary operations in Alembic's order of tables. An
   object renamed by hand looks like an addition of the host under its new name: if its removal is
   proposed, its creation under our name is proposed, too.
3. The version stamp in the database decides whether a call is due. The call goes first, because a
   host's tables may have foreign keys to ours; Alembic puts it last in the downgrade.
4. Missing queues that `declare_queues` has attached to a MetaData are created after it. A setting
   that differs is logged, not changed.

While a step is due, nothing is dropped from our tables: the step may remove what is missing from
the models, and the next autogenerate writes the host's own removals. Tables with our stamp are
never dropped because the models are missing from ``target_metadata``: to remove the queue, write
``op.pgqrs_downgrade`` by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, ops
from alembic.util import PriorityDispatchResult

from .. import migrations
from .._core.sql.queues import SETTINGS
from ..declared import DeclaredQueue, declared_in, joined
from ..errors import SchemaVersionError
from ..models import tables_in
from ..types import QueueDifference
from . import schemas
from .ops import CreateQueueOp, UpgradeOp

__all__ = ["compare"]

_log = logging.getLogger(__name__)


_OWNED = tables_in("pg_temp")
_DROPS = (ops.DropColumnOp, ops.DropIndexOp, ops.DropConstraintOp)
_ADDS = (ops.AddColumnOp, ops.CreateIndexOp, ops.AddConstraintOp)
_COMMENTS = (ops.CreateTableCommentOp, ops.DropTableCommentOp)


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of columns, and of indexes and constraints, which have separate namespaces."""

    columns: frozenset[str]
    others: frozenset[str]

    def hold(self, op: MigrateOperation) -> bool:
        """Return whether an operation is about one of these names."""
        if isinstance(op, ops.AddColumnOp):
            return op.column.name in self.columns
        if isinstance(op, (ops.DropColumnOp, ops.AlterColumnOp)):
            return op.column_name in self.columns
        if isinstance(op, (ops.CreateIndexOp, ops.DropIndexOp)):
            return op.index_name in self.others
        if isinstance(op, (ops.AddConstraintOp, ops.DropConstraintOp)):
            name: str | None = getattr(op, "constraint_name", None)
            return name in self.others
        return False


@dataclass(frozen=True, slots=True)
class _Place:
    """A schema that holds our tables.

    Attributes:
        schema: Its name as the models or the option give it.
        declared: Whether the models are in ``target_metadata``.
        installed: The version in the database; 0 for none.
    """

    schema: str | None
    declared: bool
    installed: int

    @property
    def due(self) -> bool:
        return self.installed < migrations.LATEST


def compare(context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> PriorityDispatchResult:
    """Replace Alembic's operations on our tables with the calls that are due."""
    work = _Comparison(context)
    kept = [kept for op in upgrade_ops.ops for kept in work.keep(op)]
    upgrade_ops.ops[:] = [*work.calls(), *work.queues(), *kept]
    return PriorityDispatchResult.CONTINUE


class _Comparison:
    """One run of autogenerate."""

    def __init__(self, context: AutogenContext) -> None:
        if context.connection is None:
            raise TypeError("autogenerate compares with a database: it needs a connection")
        self._context = context
        self._connection = context.connection
        self._wanted = dict(_wanted(context))
        self._places: dict[str | None, _Place | None] = {}
        self._unseen: dict[tuple[str | None, str], _Names] = {}

    def calls(self) -> Iterator[UpgradeOp]:
        """Yield the calls that are due, in the order of the schemas."""
        for key in sorted(self._wanted, key=lambda name: name or ""):
            place = self._place(key)
            if place is not None and place.due:
                _log.info(
                    "Detected queue schema %s at version %d, %d is due",
                    key or "(default)",
                    place.installed,
                    migrations.LATEST,
                )
                yield UpgradeOp(place.installed, migrations.LATEST, place.schema)

    def queues(self) -> Iterator[CreateQueueOp]:
        """Yield an operation for each missing declared queue; log settings that differ."""
        for key in sorted(self._wanted, key=lambda name: name or ""):
            place = self._place(key)
            declared = _declared(self._context, key)
            if place is None or not declared:
                continue
            found = self._existing(place)
            for queue in declared:
                if (row := found.get(queue.name)) is None:
                    _log.info("Detected missing queue %r", queue.name)
                    yield CreateQueueOp(queue, place.schema)
                    continue
                for setting, value in queue.settings().items():
                    if row[setting] != value:
                        difference = QueueDifference(setting, value, row[setting])
                        _log.warning("queue %r: %s; it is not changed", queue.name, difference)

    def _existing(self, place: _Place) -> dict[str, Any]:
        """Return the settings of the queues in a schema, by name."""
        if not place.installed:
            return {}
        schema = schemas.target(self._connection, place.schema)
        columns: list[sa.ColumnClause[Any]] = [
            sa.column(name) for name in ("queue_name", *SETTINGS)
        ]
        # The schema's plain name: a schema_translate_map was applied to it already.
        table = sa.table("pgqrs_queues", schema=sa.quoted_name(schema or "", quote=True))
        statement = sa.select(*columns).select_from(table)
        rows = self._connection.execute(
            statement, execution_options={"schema_translate_map": None}
        ).mappings()
        return {row["queue_name"]: row for row in rows}

    def keep(self, op: MigrateOperation) -> Iterable[MigrateOperation]:
        """Return the parts of an operation that no step makes."""
        table: str | None = getattr(op, "table_name", None)
        if table is None or table not in _OWNED:
            return [op]
        place = self._place(getattr(op, "schema", None))
        if place is None:
            return [op]
        if isinstance(op, ops.CreateTableOp):
            return self._additions(op, place)
        if isinstance(op, ops.DropTableOp) or not place.declared:
            return []
        if not isinstance(op, ops.ModifyTableOps):
            return [op] if self._is_hosts(op, table, place) else []
        kept = [inner for inner in op.ops if self._is_hosts(inner, table, place)]
        renamed = {_shape(inner) for inner in kept if isinstance(inner, _DROPS)}
        op.ops[:] = [
            inner
            for inner in op.ops
            if inner in kept or (isinstance(inner, _ADDS) and _shape(inner) in renamed)
        ]
        return [] if op.is_empty() else [op]

    def _is_hosts(self, op: MigrateOperation, table: str, place: _Place) -> bool:
        if isinstance(op, _COMMENTS) or (place.due and isinstance(op, _DROPS)):
            return False
        unseen = self._unseen.get((self._key(place.schema), table))
        return not (_names(_OWNED[table]).hold(op) or (unseen is not None and unseen.hold(op)))

    def _additions(self, op: ops.CreateTableOp, place: _Place) -> list[MigrateOperation]:
        """Return the host's own columns and constraints of a table that a step creates."""
        existing = _Names(frozenset(), frozenset())
        if place.installed:
            # Alembic does not look into this schema, so the existing table was not compared.
            existing = self._reflect(op.table_name, place)
            self._unseen[self._key(place.schema), op.table_name] = existing
        columns = [item for item in op.columns if isinstance(item, sa.Column)]
        constraints = [item for item in op.columns if isinstance(item, sa.Constraint)]
        # A table's constraints are a set; a foreign key may refer to a unique one of them.
        constraints.sort(key=lambda item: (isinstance(item, sa.ForeignKeyConstraint), _label(item)))
        found: list[MigrateOperation] = [
            ops.AddColumnOp.from_column_and_tablename(op.schema, op.table_name, column)
            for column in columns
        ]
        found += [
            ops.AddConstraintOp.from_constraint(constraint)
            for constraint in constraints
            if not _exists(constraint, existing)
        ]
        return [each for each in found if self._is_hosts(each, op.table_name, place)]

    def _reflect(self, table: str, place: _Place) -> _Names:
        seen = _names(
            sa.Table(
                table,
                sa.MetaData(),
                schema=place.schema,
                autoload_with=self._connection,
                resolve_fks=False,
            )
        )
        checks = sa.inspect(self._connection).get_check_constraints(table, schema=place.schema)
        return _Names(seen.columns, seen.others | {str(check["name"]) for check in checks})

    def _key(self, schema: str | None) -> str | None:
        return None if schema == self._connection.dialect.default_schema_name else schema

    def _place(self, schema: str | None) -> _Place | None:
        key = self._key(schema)
        if key not in self._places:
            self._places[key] = self._look_up(key)
        return self._places[key]

    def _look_up(self, key: str | None) -> _Place | None:
        schema, declared = self._wanted.get(key, (key, False))
        target = schemas.target(self._connection, schema)
        found, installed = migrations.read_stamp(self._connection, target or "")
        if key not in self._wanted and installed is None:
            return None
        if found is not None and installed is None:
            unstamped = migrations.unstamped(found)
            raise SchemaVersionError(None, migrations.LATEST, found, unstamped)
        if installed is not None and installed > migrations.LATEST:
            raise SchemaVersionError(installed, migrations.LATEST, found, migrations.TOO_NEW)
        if target is not None and installed in {None, migrations.LATEST}:
            schemas.refuse_incomplete(self._connection, target)
        return _Place(schema, declared, installed or 0)


def _wanted(context: AutogenContext) -> Iterator[tuple[str | None, tuple[str | None, bool]]]:
    """Yield the schemas by key, as written, and whether the models are in ``target_metadata``."""
    default = context.dialect.default_schema_name
    option: Iterable[str | None] = context.opts.get("pgqrs_schemas") or ()
    for schema in option:
        yield None if schema == default else schema, (schema, False)
    for table in context.sorted_tables:
        if table.info.get("pgqrs_sa"):
            schema = table.schema
            yield None if schema == default else schema, (schema, True)


def _declared(context: AutogenContext, key: str | None) -> tuple[DeclaredQueue, ...]:
    """Return the queues that are declared for a schema.

    Queues of a MetaData with queue tables belong to the schemas of these tables; queues of another
    MetaData belong to each schema.
    """
    default = context.dialect.default_schema_name
    given: Any = context.metadata
    several: Sequence[sa.MetaData] = [given] if isinstance(given, sa.MetaData) else given or ()
    found: tuple[DeclaredQueue, ...] = ()
    for metadata in several:
        tables = [table for table in metadata.tables.values() if table.info.get("pgqrs_sa")]
        keys = {None if table.schema == default else table.schema for table in tables}
        if not keys or key in keys:
            found = joined(found, declared_in(metadata))
    return found


def _names(table: sa.Table) -> _Names:
    names = [item.name for item in table.constraints] + [item.name for item in table.indexes]
    return _Names(
        frozenset(column.name for column in table.columns),
        frozenset(str(name) for name in names if name is not None),
    )


def _shape(op: MigrateOperation) -> tuple[str, ...]:
    """Return the properties that a rename keeps: the kind, and the columns or the type."""
    made = op.reverse() if isinstance(op, _DROPS) else op
    if isinstance(made, ops.AddColumnOp):
        return ("column", str(made.column.type))
    if isinstance(made, ops.CreateIndexOp):
        return ("index", str(bool(made.unique)), *(_column_name(item) for item in made.columns))
    if isinstance(made, ops.AddConstraintOp):
        constraint = made.to_constraint()
        return (type(constraint).__name__, *(c.name for c in getattr(constraint, "columns", ())))
    return (type(made).__name__,)


def _column_name(item: Any) -> str:
    return str(getattr(item, "name", item))


def _label(constraint: sa.Constraint) -> str:
    columns = ",".join(column.name for column in getattr(constraint, "columns", ()))
    return f"{constraint.name or ''} {columns}"


def _exists(constraint: sa.Constraint, existing: _Names) -> bool:
    """Return whether a constraint needs no operation: it exists, or is created with its columns."""
    if getattr(constraint, "_type_bound", False):
        return True
    columns = getattr(constraint, "columns", ())
    return bool(columns) and {column.name for column in columns} <= existing.columns

"""The four tables as they should be, and as the database has them, in the same terms.

What they should be is what PostgreSQL makes of the models: the tables are created in ``pg_temp``,
inside a savepoint that is rolled back, and read from the catalog by the statements that read
the real ones. So both texts of an expression come from the same server, and no release of it
needs a translation of ours. It takes the right to create temporary tables, which everybody has
unless it was taken away; neither a schema nor a name of the host's is touched, and no other
session can see it. In a read-only transaction, in AUTOCOMMIT or without the right, the models are
read directly instead: names, types and order are known from them, but not how the server would
write their expressions, so those are left out of the comparison.

Only what is the library's own is in the expectation, which is what tells a host's columns,
indexes and constraints apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from .._core import sessions
from .._core.scope import Scope
from .._core.sql import catalog
from ..models import tables_in

__all__ = ["DIALECT", "TABLES", "Column", "Constraint", "Index", "Table", "expected", "installed"]

# The styles of drivers double the percent signs of names, and the text is to be pasted.
DIALECT = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
"""The dialect of SQL that people read."""


TABLES = tables_in("pg_temp")
"""The released tables by name, in the schema ``pg_temp``."""

_METADATA = TABLES["pgqrs_queues"].metadata

_KINDS: dict[type[sa.Constraint], str] = {
    sa.PrimaryKeyConstraint: "p",
    sa.UniqueConstraint: "u",
    sa.CheckConstraint: "c",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column; the default is None when there is none, and ``...`` when only that is known."""

    type: str
    nullable: bool
    default: Any
    identity: bool


@dataclass(frozen=True, slots=True)
class Index:
    """An index; the definition begins after USING, and is None when it is not known."""

    unique: bool
    partial: bool
    keys: tuple[str, ...]
    definition: str | None
    valid: bool = True
    of_constraint: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """A primary key (p), unique constraint (u) or CHECK (c); the body is None when not known."""

    kind: str
    body: str | None


@dataclass(slots=True)
class Table:
    """One table; its columns, indexes and constraints by their names."""

    oid: int
    schema: str | None
    persistence: str
    options: dict[str, str]
    columns: dict[str, Column] = field(default_factory=dict)
    indexes: dict[str, Index] = field(default_factory=dict)
    constraints: dict[str, Constraint] = field(default_factory=dict)


def installed(scope: Scope, schema: str | None) -> dict[str, Table]:
    """Return those of the four tables that the database has.

    Without a schema they are looked up along the ``search_path``, as statements find them. If that
    leads to several schemas, only what is in the first of these is returned.
    """
    found = _read(scope, schema)
    first = next((table.schema for table in found.values()), None)
    if all(table.schema == first for table in found.values()):
        return found
    return _read(scope, first)


def expected(scope: Scope, *, exact: bool) -> dict[str, Table]:
    """Return the four tables as they should be; ``exact`` needs temporary tables."""
    if not exact:
        return {name: _declared(table) for name, table in TABLES.items()}
    connection = sessions.connect(scope.session, {"mapper": scope.context.mapper})
    savepoint = connection.begin_nested()
    try:
        _METADATA.create_all(connection, checkfirst=False)
        return _read(scope, "pg_temp")
    finally:
        savepoint.rollback()


def _read(scope: Scope, schema: str | None) -> dict[str, Table]:
    names = {"schema": schema, "names": list(TABLES)}
    found: dict[str, Table] = {}
    for row in scope.execute(catalog.relations, names):
        options = dict(option.split("=", 1) for option in row.options)
        found[row.name] = Table(row.oid, row.schema, row.persistence, options)
    by_oid = {table.oid: table for table in found.values()}
    oids = {"oids": list(by_oid)}
    for row in scope.execute(catalog.columns, oids):
        column = Column(row.type, row.nullable, row.default, row.identity)
        by_oid[row.oid].columns[row.name] = column
    for row in scope.execute(catalog.indexes, oids):
        by_oid[row.oid].indexes[row.name] = Index(
            row.unique,
            row.partial,
            tuple(row.keys),
            row.definition.partition(" USING ")[2],
            row.valid,
            row.of_constraint,
        )
    for row in scope.execute(catalog.constraints, oids):
        by_oid[row.oid].constraints[row.name] = Constraint(row.kind, row.body)
    return found


def _declared(table: sa.Table) -> Table:
    options = dict(table.dialect_options["postgresql"].get("with") or {})
    found = Table(0, None, "p", options)
    for column in table.columns:
        found.columns[column.name] = Column(
            # PostgreSQL's names of types are SQLAlchemy's, in small letters.
            column.type.compile(dialect=DIALECT).lower(),
            bool(column.nullable),
            None if column.server_default is None or column.identity else ...,
            column.identity is not None,
        )
    for index in table.indexes:
        where = index.dialect_options["postgresql"]["where"]
        found.indexes[str(index.name)] = Index(
            bool(index.unique), where is not None, _names(index.columns), None
        )
    for constraint in table.constraints:
        kind = _KINDS[type(constraint)]
        found.constraints[str(constraint.name)] = Constraint(kind, None)
        if isinstance(constraint, (sa.PrimaryKeyConstraint, sa.UniqueConstraint)):
            keys = _names(constraint.columns)
            found.indexes[str(constraint.name)] = Index(
                unique=True, partial=False, keys=keys, definition=None, of_constraint=True
            )
    return found


def _names(columns: Iterable[Any]) -> tuple[str, ...]:
    listed: Sequence[Any] = list(columns)
    return tuple(column.name for column in listed)

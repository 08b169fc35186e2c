"""The database that one run of the doctor examines, and how it writes statements as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Row
from sqlalchemy.dialects import postgresql

from .._core import sessions
from .._core.scope import Scope
from .._core.sql import catalog
from .catalog import DIALECT, Table, installed
from .findings import Thresholds
from .fixes import TableRepairs

__all__ = ["CheckContext", "text_of"]

_TEMPLATE = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class CheckContext:
    """One run of the doctor.

    Attributes:
        scope: The session of the check, and the settings of the service.
        thresholds: Above which something is a finding.
        connection: The connection of the session.
        schema: The schema that the tables belong in; None follows the search path.
        facts: The row of `pgqrs_sa._core.sql.catalog.facts`.
        tables: Those of the four tables that exist.
    """

    scope: Scope
    thresholds: Thresholds
    connection: sa.Connection
    schema: str | None
    facts: Row[Any]
    tables: Mapping[str, Table]
    _seen: dict[Any, list[Row[Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, scope: Scope, thresholds: Thresholds) -> CheckContext:
        """Return the context for the database of a session."""
        connection = sessions.connect(scope.session, {"mapper": scope.context.mapper})
        declared = scope.tables.queue
        mapped = connection.get_execution_options().get("schema_translate_map") or {}
        schema: str | None = mapped.get(declared.schema, declared.schema)
        facts = scope.execute(catalog.facts).one()
        tables = installed(scope, schema)
        return cls(scope, thresholds, connection, schema, facts, tables)

    def rows(self, statement: Any, **values: Any) -> list[Row[Any]]:
        """Return the rows of a statement."""
        return list(self.scope.execute(statement, values).all())

    def rows_once(self, statement: Any) -> list[Row[Any]]:
        """Return the rows of a statement that several checks read."""
        if statement not in self._seen:
            self._seen[statement] = self.rows(statement)
        return self._seen[statement]

    @property
    def oids(self) -> list[int]:
        """The ids of the tables."""
        return [table.oid for table in self.tables.values()]

    @property
    def place(self) -> str | None:
        """The schema that the tables are in, or else belong in."""
        return next((table.schema for table in self.tables.values()), self.schema)

    def repairs(self, name: str) -> TableRepairs:
        """Return what fixes a table."""
        return TableRepairs(name, self.place, citus=self.facts.citus)

    def command(self, *words: str) -> str:
        """Return a command of pgqrs for this schema, quoted for a shell."""
        schema = () if self.schema is None else ("--schema", self.schema)
        return shlex.join(("pgqrs", *schema, *words))

    def sql(self, statement: Any, **values: object) -> str:
        """Return a statement as one line, with its values and the schema written out."""
        options = self.connection.get_execution_options()
        compiled = statement.compile(
            dialect=_TEMPLATE,
            schema_translate_map={None: self.place, **(options.get("schema_translate_map") or {})},
            render_schema_translate=True,
        )
        # params() refuses an UPDATE, so the values are put into the text.
        texts = {
            name: sa.literal(value, compiled.binds[name].type).compile(
                dialect=DIALECT, compile_kwargs={"literal_binds": True}
            )
            for name, value in compiled.construct_params(values).items()
        }
        return f"{' '.join((str(compiled) % texts).split())};"


def text_of(age: timedelta | None) -> str:
    """Return a span of time as text."""
    return "never" if age is None else str(age - timedelta(microseconds=age.microseconds))

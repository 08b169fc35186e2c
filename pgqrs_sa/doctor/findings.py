"""A finding of the doctor, the thresholds above which there is one, and a check's context."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Row
from sqlalchemy.dialects import postgresql

from .._core import sessions
from .._core.scope import Scope
from .._core.sql import catalog
from .catalog import DIALECT, Table, installed
from .fixes import TableRepairs

__all__ = ["CheckContext", "Finding", "Severity", "Thresholds", "text_of"]

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, and how to fix it.

    Attributes:
        check: The check that found it, one of `pgqrs_sa.doctor.CHECKS`.
        severity: ``error`` when messages cannot be worked on as promised, else ``warning``.
        subject: The table, index, queue or server process that it is about.
        problem: The problem in a sentence.
        fix: The SQL or the command that fixes it, one statement a line, ready to paste.
    """

    check: str
    severity: Severity
    subject: str
    problem: str
    fix: str

    @property
    def mend(self) -> str:
        """The former name of ``fix``."""
        return self.fix


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds above which a condition is reported (exclusive).

    Attributes:
        clock_skew: Between this computer's clock and the database's.
        transaction_age: How long a transaction may hold back vacuum; prepared ones, too.
        slot_age: How many transactions a replication slot that nobody reads may hold back.
        dead_rows: Dead rows of a table that vacuum has not been at for ``vacuum_age``.
        archived_rows: Rows of the archive, as PostgreSQL estimates them, while there are queues
            without a retention.
        vacuum_age: Since the last vacuum of a table with more than ``dead_rows`` dead rows.
        lease_ahead: How far in the future a lease may end whose worker is stopped or gone.
        exhausted_age: How long a message may stay without attempts.
        paused_age: How long a queue with messages that are ready may be paused.
        ready_age: How long a message of a queue that is not paused may wait to be taken.
        worker_silence: Since the last heartbeat of a worker that is not stopped.
        notifications: The share of the server's notification queue that is in use.
        connections: The share of the connections that is in use.
        sequence: The share of its numbers that a sequence has given out.
    """

    clock_skew: timedelta = timedelta(seconds=1)
    transaction_age: timedelta = timedelta(minutes=5)
    slot_age: int = 100_000
    dead_rows: int = 10_000
    archived_rows: int = 1_000_000
    vacuum_age: timedelta = timedelta(minutes=10)
    lease_ahead: timedelta = timedelta(minutes=5)
    exhausted_age: timedelta = timedelta(minutes=10)
    paused_age: timedelta = timedelta(hours=1)
    ready_age: timedelta = timedelta(minutes=15)
    worker_silence: timedelta = timedelta(minutes=5)
    notifications: float = 0.5
    connections: float = 0.9
    sequence: float = 0.8


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

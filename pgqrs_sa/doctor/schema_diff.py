"""Checks of the tables: their version, their drift from the models, and additions that harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import migrations
from .._core import sessions
from .._core.sql import catalog
from .._core.sql.fragments import LEASED
from ..migrations import schemas
from ..models import VERSION_COMMENT
from .catalog import TABLES, Column, Constraint, Index, Table, expected
from .findings import CheckContext, Finding, Severity
from .fixes import TableRepairs, lines, quoted, replacing

__all__ = ["compare", "invariants", "version"]

_MESSAGES = ("pgqrs_messages", "pgqrs_archive")
_ON_DELETE_FAILS = {"a", "r"}
_OUR_CONSTRAINTS = frozenset(
    str(constraint.name) for table in TABLES.values() for constraint in table.constraints
)
_OUR_INDEXES = _OUR_CONSTRAINTS | {
    str(index.name) for table in TABLES.values() for index in table.indexes
}


def version(check: CheckContext) -> Iterator[Finding]:
    """Yield what is wrong with the version of the tables."""
    place = check.schema
    found, stamped = migrations.read_stamp(check.connection, check.place)
    upgrade = schemas.upgrade_command(check.connection, check.schema)
    if found is None and check.tables:
        return  # some of them exist: the drift reports which is missing, and how it is created
    if found is None:
        where = "the default schema" if place is None else f"schema {place!r}"
        yield Finding("schema", "error", "schema", f"{where} holds no queue tables", upgrade)
    elif stamped is None:
        queues_table = check.repairs("pgqrs_queues").name
        stamp = f"{VERSION_COMMENT}{migrations.LATEST}"
        yield Finding(
            "schema",
            "error",
            queues_table,
            "the tables exist without their version, which pg_dump --no-comments loses; "
            "stamp them once nothing has drifted",
            lines(f"COMMENT ON TABLE {queues_table} IS '{stamp}'"),
        )
    elif stamped > migrations.LATEST:
        problem = f"version {stamped} is newer than {migrations.LATEST}, which this release knows"
        yield Finding("schema", "error", "schema", problem, "pip install --upgrade pgqrs-sa")
    elif stamped < migrations.LATEST:
        severity: Severity = "error" if stamped < migrations.OLDEST else "warning"
        problem = f"version {stamped} is older than {migrations.LATEST}, which this release makes"
        yield Finding("schema", severity, "schema", problem, upgrade)


def compare(check: CheckContext) -> Iterator[Finding]:
    """Yield what differs from the models, if the tables are of their version."""
    _, stamped = migrations.read_stamp(check.connection, check.place)
    if stamped not in {None, migrations.LATEST}:
        return
    reason = _inexact(check)
    yield from _compare_tables(check, exact=reason is None)
    if reason is not None:
        problem, fix = reason
        yield Finding(
            "drift",
            "warning",
            "comparison",
            f"{problem}, so that the words of defaults, predicates and CHECKs were not compared",
            fix,
        )


def _inexact(check: CheckContext) -> tuple[str, str] | None:
    """Return why no temporary table can be made, and what to do about it."""
    role, database = quoted(check.facts.role), quoted(check.facts.database)
    if check.facts.read_only:
        return "the transaction is read-only", "pgqrs doctor --only drift"
    if not check.facts.temporary:
        grant = f"GRANT TEMPORARY ON DATABASE {database} TO {role}"
        return "this role may not make temporary tables", lines(grant)
    if sessions.is_autocommit(check.connection):
        return "the connection is in AUTOCOMMIT", "pgqrs doctor --only drift"
    return None


def _compare_tables(check: CheckContext, *, exact: bool) -> Iterator[Finding]:
    """Yield what differs from the models; if ``exact``, expressions too."""
    for name, wanted in expected(check.scope, exact=exact).items():
        repairs = check.repairs(name)
        if name not in check.tables:
            problem = "the table is missing"
            yield _drift("error", repairs.name, problem, repairs.create(wanted.options))
        else:
            there = check.tables[name]
            yield from _columns(repairs, wanted, there)
            yield from _indexes(repairs, wanted, there)
            yield from _constraints(repairs, wanted, there)
            yield from _storage(repairs, wanted, there)


def _drift(severity: Severity, subject: str, problem: str, fix: str) -> Finding:
    return Finding("drift", severity, subject, problem, fix)


def _columns(repairs: TableRepairs, wanted: Table, there: Table) -> Iterator[Finding]:
    for name, column in wanted.columns.items():
        subject = f"{repairs.name}.{quoted(name)}"
        if name not in there.columns:
            yield _drift("error", subject, "the column is missing", repairs.add_column(name))
        else:
            yield from _column(repairs, subject, name, column, there.columns[name])


def _column(
    repairs: TableRepairs, subject: str, name: str, wanted: Column, there: Column
) -> Iterator[Finding]:
    if there.type != wanted.type:
        action = f"TYPE {wanted.type} USING CAST({quoted(name)} AS {wanted.type})"
        problem = f"the type is {there.type}, and should be {wanted.type}"
        yield _drift("error", subject, problem, lines(repairs.alter_column(name, action)))
    if there.nullable and not wanted.nullable:
        fix = lines(repairs.alter_column(name, "SET NOT NULL"))
        yield _drift("error", subject, "the column may be NULL, and should not", fix)
    if wanted.nullable and not there.nullable:
        fix = lines(repairs.alter_column(name, "DROP NOT NULL"))
        yield _drift("error", subject, "the column may not be NULL, and should", fix)
    if wanted.identity and not there.identity:
        fix = repairs.identity(name, has_default=there.default is not None)
        yield _drift("error", subject, "the column is not an identity column", fix)
    elif _differs(there.default, wanted.default):
        problem = f"the default is {there.default or 'missing'}, and should be {wanted.default}"
        problem = problem.replace("be Ellipsis", "be the models'").replace("be None", "be none")
        yield _drift("error", subject, problem, lines(repairs.default(name)))


def _differs(there: Any, wanted: Any) -> bool:
    return there is None if wanted is ... else bool(there != wanted)


def _indexes(repairs: TableRepairs, wanted: Table, there: Table) -> Iterator[Finding]:
    for name, index in wanted.indexes.items():
        found = there.indexes.get(name)
        if found is not None and not found.valid:
            broken = "the index is invalid: building it was interrupted"
            yield _drift("error", name, broken, repairs.reindex(name))
        if index.of_constraint:
            continue
        if found is None:
            fix = repairs.index(name, replaces=False)
            yield _drift("error", name, f"the index of {repairs.name} is missing", fix)
        elif (problem := _index_problem(index, found)) is not None:
            yield _drift("error", name, problem, repairs.index(name, replaces=True))


def _index_problem(wanted: Index, there: Index) -> str | None:
    if there.keys != wanted.keys:
        is_, should = ", ".join(there.keys), ", ".join(wanted.keys)
        return f"the index is on ({is_}), and should be on ({should})"
    if there.unique != wanted.unique:
        return "the index is unique, and should not be" if there.unique else "it is not unique"
    if wanted.definition is None:
        if there.partial == wanted.partial:
            return None
        return f"the index should {'' if wanted.partial else 'not '}be partial"
    if there.definition != wanted.definition:
        return f"the index is {there.definition}, and should be {wanted.definition}"
    return None


def _constraints(repairs: TableRepairs, wanted: Table, there: Table) -> Iterator[Finding]:
    for name, constraint in wanted.constraints.items():
        found = there.constraints.get(name)
        if found is None:
            yield _missing(repairs, name, constraint, there)
        elif found.kind != constraint.kind or _body_differs(found, constraint):
            yield _changed(repairs, name, constraint, found)


def _body_differs(there: Constraint, wanted: Constraint) -> bool:
    if wanted.body is None:
        return (there.body or "").endswith(" NOT VALID")
    return there.body != wanted.body


def _missing(repairs: TableRepairs, name: str, wanted: Constraint, there: Table) -> Finding:
    for other, found in there.constraints.items():
        same = found.body == wanted.body or wanted.kind == "p"
        if found.kind == wanted.kind and other not in _OUR_CONSTRAINTS and same:
            problem = f"the constraint of {repairs.name} is called {other}"
            return _drift("warning", name, problem, repairs.rename_constraint(other, name))
    fix = repairs.constraint(name, replaces=False)
    return _drift("error", name, f"the constraint of {repairs.name} is missing", fix)


def _changed(repairs: TableRepairs, name: str, wanted: Constraint, there: Constraint) -> Finding:
    if wanted.body is None or there.body == f"{wanted.body} NOT VALID":
        problem = "rows from before the constraint were never checked"
        return _drift("warning", name, problem, lines(repairs.validate(name)))
    problem = f"the constraint is {there.body}, and should be {wanted.body}"
    return _drift("error", name, problem, repairs.constraint(name, replaces=True))


def _storage(repairs: TableRepairs, wanted: Table, there: Table) -> Iterator[Finding]:
    if there.persistence != "p":
        fix = lines(repairs.alter("SET LOGGED"))
        yield _drift("error", repairs.name, "the table is unlogged: a crash empties it", fix)
    off = {name: value for name, value in wanted.options.items() if not _same(there, name, value)}
    if off:
        listed = ", ".join(f"{name} is {there.options.get(name, 'not set')}" for name in off)
        fix = lines(repairs.set_options(off))
        yield _drift("warning", repairs.name, f"storage parameters differ: {listed}", fix)


def _same(there: Table, name: str, value: str) -> bool:
    if name not in there.options:
        return False
    # Another fillfactor is a choice: less space for a backlog, more for each lease.
    return name == "fillfactor" or float(there.options[name]) == float(value)


def invariants(check: CheckContext) -> Iterator[Finding]:
    """Yield what was added to the tables that breaks a promise of the queue."""
    names = {table.oid: name for name, table in check.tables.items()}
    oids = [table.oid for name, table in check.tables.items() if name in _MESSAGES]
    for row in check.rows(catalog.triggers, oids=oids):
        fix = lines(f"DROP TRIGGER {quoted(row.name)} ON {check.repairs(names[row.oid]).name}")
        problem = "a trigger on messages: it slows every statement, and its error fails them"
        yield Finding("promises", "warning", row.name, problem, fix)
    for row in check.rows(catalog.foreign_keys, oids=oids):
        if finding := _foreign_key(row, names, citus=check.facts.citus):
            yield finding
    yield from _indexes_on_leases(check)
    for name, table in check.tables.items():
        yield from _required(check, name, table)


def _indexes_on_leases(check: CheckContext) -> Iterator[Finding]:
    """Yield a host's indexes that a lease would have to write: all are written then."""
    if (table := check.tables.get("pgqrs_messages")) is None:
        return
    repairs = check.repairs("pgqrs_messages")
    for row in check.rows(catalog.indexes_on, oids=[table.oid], columns=list(LEASED)):
        if row.name in _OUR_INDEXES:
            continue  # a drift, whose fix builds it again
        problem = (
            f"the index depends on {', '.join(row.columns)}, which each lease writes: a lease "
            "then writes an entry into every index of the table, not only into this one"
        )
        fix = repairs.drop_index(row.name)
        if row.constraint is not None:
            fix = lines(repairs.alter(f"DROP CONSTRAINT {quoted(row.constraint)}"))
        yield Finding("promises", "warning", row.name, problem, fix)


def _foreign_key(row: Any, names: dict[int, str], *, citus: bool) -> Finding | None:
    drop = f"ALTER TABLE {row.table} DROP CONSTRAINT {quoted(row.name)}"
    own = names.get(row.oid)
    if own in _MESSAGES and set(row.columns) & set(TABLES[own].columns.keys()):
        problem = (
            f"a foreign key on {own}: it locks what it refers to with every message, "
            "and keeps queues and workers from being deleted"
        )
        return Finding("promises", "warning", row.name, problem, lines(drop))
    referred = names.get(row.referred)
    if row.on_delete not in _ON_DELETE_FAILS or referred not in _MESSAGES:
        return None
    what = "pruned or requeued" if referred == "pgqrs_archive" else "settled"
    problem = f"the foreign key keeps what {row.table} refers to in {referred} from being {what}"
    fix = [drop]
    if not row.required:
        body = _set_null(row.body.replace(" ON DELETE RESTRICT", ""))
        fix = replacing(row.table, row.name, f"{quoted(row.name)} {body}", citus=citus)
    return Finding("promises", "error", row.name, problem, lines(*fix))


def _set_null(body: str) -> str:
    """Return a foreign key's definition with ON DELETE SET NULL, before what may follow it."""
    for following in (" DEFERRABLE", " NOT VALID", " NOT ENFORCED"):
        head, separator, tail = body.partition(following)
        if separator:
            return f"{head} ON DELETE SET NULL{separator}{tail}"
    return f"{body} ON DELETE SET NULL"


def _required(check: CheckContext, name: str, table: Table) -> Iterator[Finding]:
    """Yield columns of a host that statements of the library would leave empty, and must not."""
    along = check.tables["pgqrs_messages"].columns if name == "pgqrs_archive" else {}
    for column, found in table.columns.items():
        filled = found.default is not None or found.identity or column in along
        if column in TABLES[name].columns or found.nullable or filled:
            continue
        repairs = check.repairs(name)
        subject = f"{repairs.name}.{quoted(column)}"
        problem = "the added column may not be NULL and has no default: nothing can be inserted"
        fix = lines(repairs.alter_column(column, "DROP NOT NULL"))
        yield Finding("promises", "error", subject, problem, fix)

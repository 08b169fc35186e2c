"""Whether a database is fit to work with, and how to fix what is not.

Everything here only reads, and works in a read-only transaction; only the exact comparison of
the schema wants temporary tables (see `catalogue`), and is less exact without. Run it in a
transaction of its own, which may be ended as one likes::

    with Session(engine) as session:
        for finding in diagnose(session, Context.of(READY_MADE, None, None, allow_autocommit=True)):
            print(finding.problem, finding.fix)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from sqlalchemy.orm import Session

from .. import migrations
from .._core import routing
from .._core.context import Context
from .._core.sql import archive, catalog, health, integrity, queues
from ..errors import InvalidArgument
from ..migrations import schemas
from ..models import VERSION_COMMENT
from . import schema_diff
from .catalog import TABLES
from .check_context import CheckContext, text_of
from .findings import Finding, Severity, Thresholds
from .fixes import lines, quoted
from .server_checks import SERVER_CHECKS, TABLE_CHECKS

__all__ = ["CHECKS", "diagnose"]

_NO_LIMITS = Thresholds()
_DEAD_LETTER_CHUNK = 10_000
_A_YEAR = 365.0 * 86_400


def diagnose(
    session: Session,
    context: Context,
    *,
    limits: Thresholds = _NO_LIMITS,
    only: Collection[str] = (),
) -> list[Finding]:
    """Return what is wrong with a database, the errors first.

    Args:
        session: The session to ask through.
        context: The service's settings.
        limits: From when on something is a finding.
        only: The names of the checks to make; all of `CHECKS` unless given.

    Raises:
        InvalidArgument: a check of that name does not exist.
    """
    if unknown := sorted(set(only) - set(CHECKS)):
        raise InvalidArgument(f"no check is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
    visit = CheckContext.of(session, context, limits)
    found: list[Finding] = []
    for name, check in _possible(visit).items():
        if not only or name in only:
            found += check(visit)
    return sorted(found, key=lambda finding: finding.severity)


def _possible(visit: CheckContext) -> Mapping[str, Callable[[CheckContext], Iterator[Finding]]]:
    """Return the checks that can be made with the tables that are there."""
    if not visit.tables:
        return {"schema": schema, **SERVER_CHECKS}
    missing = [table for name, table in TABLES.items() if name not in visit.tables]
    lacking = any(
        column.name not in visit.tables[name].columns
        for name, table in TABLES.items()
        if name in visit.tables
        for column in table.columns
    )
    if missing or lacking:  # the others would fail for what the drift is about to say
        return {"schema": schema, "drift": compared, **SERVER_CHECKS}
    return CHECKS


def schema(visit: CheckContext) -> Iterator[Finding]:
    """Yield what is wrong with the version of the tables."""
    place = visit.schema
    found, version = migrations.read_stamp(visit.connection, visit.place)
    upgrade = schemas.upgrade_command(visit.connection, visit.schema)
    if found is None and visit.tables:
        return  # some of them are there: the drift says which is missing, and how it is made
    if found is None:
        where = "the default schema" if place is None else f"schema {place!r}"
        yield Finding("schema", "error", "schema", f"{where} holds no queue tables", upgrade)
    elif version is None:
        queues_table = visit.repairs("pgqrs_queues").name
        stamp = f"{VERSION_COMMENT}{migrations.LATEST}"
        yield Finding(
            "schema",
            "error",
            queues_table,
            "the tables are there without their version, which pg_dump --no-comments loses; "
            "stamp them once nothing has drifted",
            lines(f"COMMENT ON TABLE {queues_table} IS '{stamp}'"),
        )
    elif version > migrations.LATEST:
        problem = f"version {version} is newer than {migrations.LATEST}, which this release knows"
        yield Finding("schema", "error", "schema", problem, "pip install --upgrade pgqrs-sa")
    elif version < migrations.LATEST:
        severity: Severity = "error" if version < migrations.OLDEST else "warning"
        problem = f"version {version} is older than {migrations.LATEST}, which this release makes"
        yield Finding("schema", severity, "schema", problem, upgrade)


def compared(visit: CheckContext) -> Iterator[Finding]:
    """Yield what differs from the models, if the tables are of their version."""
    _, version = migrations.read_stamp(visit.connection, visit.place)
    if version not in {None, migrations.LATEST}:
        return
    reason = _inexact(visit)
    yield from schema_diff.compare(visit, exact=reason is None)
    if reason is not None:
        problem, fix = reason
        yield Finding(
            "drift",
            "warning",
            "comparison",
            f"{problem}, so that the words of defaults, predicates and CHECKs were not compared",
            fix,
        )


def _inexact(visit: CheckContext) -> tuple[str, str] | None:
    """Return why no temporary table can be made, and what to do about it."""
    role, database = quoted(visit.facts.role), quoted(visit.facts.database)
    if visit.facts.read_only:
        return "the transaction is read-only", "pgqrs doctor --only drift"
    if not visit.facts.temporary:
        grant = f"GRANT TEMPORARY ON DATABASE {database} TO {role}"
        return "this role may not make temporary tables", lines(grant)
    if routing.is_autocommit(visit.connection):
        return "the connection is in AUTOCOMMIT", "pgqrs doctor --only drift"
    return None


def leases(visit: CheckContext) -> Iterator[Finding]:
    """Yield leases that nobody is going to settle, and that end only far in the future."""
    tables = visit.context.tables
    for row in visit.rows(health.stuck_leases(tables), ahead=visit.limits.lease_ahead):
        yield Finding(
            "leases",
            "warning",
            f"worker {row.worker_id}",
            f"it is stopped or gone, and {row.leases} message(s) are leased to it until "
            f"{row.until.isoformat()} at the latest",
            visit.sql(health.release_worker(tables), worker_id=row.worker_id),
        )


def backlog(visit: CheckContext) -> Iterator[Finding]:
    """Yield queues whose messages are not worked on."""
    tables, limits = visit.context.tables, visit.limits
    for row in visit.rows_once(health.backlog(tables)):
        paused, waiting = row.paused_age, row.ready_age
        if paused is not None and paused > limits.paused_age and row.ready:
            fix = visit.sql(queues.resume(tables), queue=row.queue)
            problem = f"paused {text_of(paused)} ago, with {row.ready} message(s) ready"
            yield Finding("backlog", "warning", row.queue, problem, fix)
        if paused is None and waiting is not None and waiting > limits.ready_age:
            problem = (
                f"{row.ready} message(s) are ready, and the oldest has waited {text_of(waiting)}: "
                "there are too few consumers; these are there"
            )
            fix = visit.command("worker", "list", "--queue", row.queue)
            yield Finding("backlog", "warning", row.queue, problem, fix)


def exhausted(visit: CheckContext) -> Iterator[Finding]:
    """Yield messages that are out of attempts, and that nobody has made dead letters."""
    tables = visit.context.tables
    for row in visit.rows_once(health.backlog(tables)):
        if row.exhausted_age is not None and row.exhausted_age > visit.limits.exhausted_age:
            fix = visit.sql(
                archive.dead_letter_exhausted(tables), queue=row.queue, limit=_DEAD_LETTER_CHUNK
            )
            problem = (
                f"{row.exhausted} message(s) are out of attempts, the oldest since "
                f"{text_of(row.exhausted_age)}, and were not made dead letters"
            )
            yield Finding("exhausted", "warning", row.queue, problem, fix)


def retention(visit: CheckContext) -> Iterator[Finding]:
    """Yield queues whose settled messages nothing deletes, once the archive is large."""
    oids = [visit.tables["pgqrs_archive"].oid]
    (archive_table,) = visit.rows(catalog.estimated_rows, oids=oids)
    if archive_table.estimate <= visit.limits.archived_rows:
        return
    queue = visit.context.tables.queue
    for row in visit.rows(health.kept_for_ever(visit.context.tables)):
        keep = queue.update().where(queue.c.id == row.id).values(retention_seconds=_A_YEAR)
        problem = (
            f"the archive has about {archive_table.estimate} rows: this queue has no retention, "
            "so that its settled messages are never deleted; this keeps them for a year"
        )
        yield Finding("retention", "warning", row.queue, problem, visit.sql(keep))


def orphans(visit: CheckContext) -> Iterator[Finding]:
    """Yield messages whose queue is gone."""
    queue = visit.context.tables.queue
    places: dict[int, list[str]] = {}
    statements = integrity.missing_queues(visit.context.tables)
    for place, statement in zip(("live", "archived"), statements, strict=True):
        for row in visit.rows(statement):
            places.setdefault(row.id, []).append(place)
    for id_, found in sorted(places.items()):
        problem = f"there are {' and '.join(found)} messages of a queue that is gone; this brings "
        problem += "back a queue for them, to be worked on or purged"
        again = queue.insert().values(id=id_, queue_name=f"recovered-{id_}")
        yield Finding("orphans", "error", f"queue {id_}", problem, visit.sql(again))


def workers(visit: CheckContext) -> Iterator[Finding]:
    """Yield workers that are silent but not stopped."""
    worker = visit.context.tables.worker
    silence = visit.limits.worker_silence
    for row in visit.rows(health.silent_workers(visit.context.tables), silence=silence):
        stop = worker.update().where(worker.c.id == row.id)
        stop = stop.values(status="stopped", shutdown_at=worker.c.heartbeat_at)
        problem = f"{row.name} on {row.hostname} was last heard of {text_of(row.silence)} ago"
        yield Finding("workers", "warning", f"worker {row.id}", problem, visit.sql(stop))


CHECKS: Mapping[str, Callable[[CheckContext], Iterator[Finding]]] = {
    "schema": schema,
    "drift": compared,
    "promises": schema_diff.invariants,
    **SERVER_CHECKS,
    **TABLE_CHECKS,
    "leases": leases,
    "exhausted": exhausted,
    "retention": retention,
    "orphans": orphans,
    "backlog": backlog,
    "workers": workers,
}
"""The checks by name, in the order in which they are made."""

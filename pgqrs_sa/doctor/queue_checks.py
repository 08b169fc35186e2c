"""Checks of queues, messages and workers: those that nobody works on or deletes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .._core.sql import archive, catalog, health, integrity, queues
from .._core.sql import workers as worker_statements
from .check_context import CheckContext, text_of
from .findings import Finding

__all__ = ["QUEUE_CHECKS"]

_DEAD_LETTER_CHUNK = 10_000
_A_YEAR = 365.0 * 86_400


def leases(check: CheckContext) -> Iterator[Finding]:
    """Yield leases that nobody is going to settle, and that end only far in the future."""
    tables = check.scope.tables
    for row in check.rows(health.stuck_leases(tables), ahead=check.thresholds.lease_ahead):
        yield Finding(
            "leases",
            "warning",
            f"worker {row.worker_id}",
            f"it is stopped or gone, and {row.leases} message(s) are leased to it until "
            f"{row.until.isoformat()} at the latest",
            check.sql(worker_statements.release_worker(tables), worker_id=row.worker_id),
        )


def backlog(check: CheckContext) -> Iterator[Finding]:
    """Yield queues whose messages are not worked on."""
    tables, thresholds = check.scope.tables, check.thresholds
    for row in check.rows_once(health.backlog(tables)):
        paused, waiting = row.paused_age, row.ready_age
        if paused is not None and paused > thresholds.paused_age and row.ready:
            fix = check.sql(queues.resume(tables), queue=row.queue)
            problem = f"paused {text_of(paused)} ago, with {row.ready} message(s) ready"
            yield Finding("backlog", "warning", row.queue, problem, fix)
        if paused is None and waiting is not None and waiting > thresholds.ready_age:
            problem = (
                f"{row.ready} message(s) are ready, and the oldest has waited {text_of(waiting)}: "
                "there are too few consumers; these are there"
            )
            fix = check.command("worker", "list", "--queue", row.queue)
            yield Finding("backlog", "warning", row.queue, problem, fix)


def exhausted(check: CheckContext) -> Iterator[Finding]:
    """Yield messages that are out of attempts, and that nobody has made dead letters."""
    tables = check.scope.tables
    for row in check.rows_once(health.backlog(tables)):
        if row.exhausted_age is not None and row.exhausted_age > check.thresholds.exhausted_age:
            fix = check.sql(
                archive.dead_letter_exhausted(tables), queue=row.queue, limit=_DEAD_LETTER_CHUNK
            )
            problem = (
                f"{row.exhausted} message(s) are out of attempts, the oldest since "
                f"{text_of(row.exhausted_age)}, and were not made dead letters"
            )
            yield Finding("exhausted", "warning", row.queue, problem, fix)


def retention(check: CheckContext) -> Iterator[Finding]:
    """Yield queues whose settled messages nothing deletes, once the archive is large."""
    oids = [check.tables["pgqrs_archive"].oid]
    (archive_table,) = check.rows(catalog.estimated_rows, oids=oids)
    if archive_table.estimate <= check.thresholds.archived_rows:
        return
    queue = check.scope.tables.queue
    for row in check.rows(health.kept_for_ever(check.scope.tables)):
        keep = queue.update().where(queue.c.id == row.id).values(retention_seconds=_A_YEAR)
        problem = (
            f"the archive has about {archive_table.estimate} rows: this queue has no retention, "
            "so that its settled messages are never deleted; this keeps them for a year"
        )
        yield Finding("retention", "warning", row.queue, problem, check.sql(keep))


def orphans(check: CheckContext) -> Iterator[Finding]:
    """Yield messages whose queue is gone."""
    queue = check.scope.tables.queue
    places: dict[int, list[str]] = {}
    statements = integrity.missing_queues(check.scope.tables)
    for place, statement in zip(("live", "archived"), statements, strict=True):
        for row in check.rows(statement):
            places.setdefault(row.id, []).append(place)
    for id_, found in sorted(places.items()):
        problem = f"there are {' and '.join(found)} messages of a queue that is gone; this brings "
        problem += "back a queue for them, to be worked on or purged"
        again = queue.insert().values(id=id_, queue_name=f"recovered-{id_}")
        yield Finding("orphans", "error", f"queue {id_}", problem, check.sql(again))


def workers(check: CheckContext) -> Iterator[Finding]:
    """Yield workers that are silent but not stopped."""
    worker = check.scope.tables.worker
    silence = check.thresholds.worker_silence
    for row in check.rows(health.silent_workers(check.scope.tables), silence=silence):
        stop = worker.update().where(worker.c.id == row.id)
        stop = stop.values(status="stopped", shutdown_at=worker.c.heartbeat_at)
        problem = f"{row.name} on {row.hostname} was last heard of {text_of(row.silence)} ago"
        yield Finding("workers", "warning", f"worker {row.id}", problem, check.sql(stop))


QUEUE_CHECKS: Mapping[str, Callable[[CheckContext], Iterator[Finding]]] = {
    "leases": leases,
    "exhausted": exhausted,
    "retention": retention,
    "orphans": orphans,
    "backlog": backlog,
    "workers": workers,
}
"""The checks of what is in the tables, by name."""

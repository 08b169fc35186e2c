"""Checks of the server, and of the queues, messages and workers in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row

from .._core.sql import archive, catalog, health, queues
from .._core.sql import workers as worker_statements
from .._core.tables import FENCING_TOKEN, fencing_sequence
from .catalog import TABLES
from .findings import CheckContext, Finding, text_of
from .fixes import lines, literal, quoted

__all__ = ["QUEUE_CHECKS", "SERVER_CHECKS", "TABLE_CHECKS"]

_BIGGEST = 2**63 - 1
_MOST_SHOWN = 10
_FOR_MESSAGES = ("pgqrs_messages", "pgqrs_archive")


def rights(check: CheckContext) -> Iterator[Finding]:
    """Yield that this role is not shown what other sessions do."""
    if not check.facts.sees_others:
        yield Finding(
            "rights",
            "warning",
            check.facts.role,
            "this role is not shown the transactions of others: those checks saw nothing",
            lines(f"GRANT pg_read_all_stats TO {quoted(check.facts.role)}"),
        )


def read_only(check: CheckContext) -> Iterator[Finding]:
    """Yield that this is no server to write to."""
    database = check.facts.database
    if check.facts.standby:
        yield Finding(
            "read_only",
            "error",
            database,
            "this is a standby: nothing can be enqueued or leased here",
            "add target_session_attrs=read-write to the DSN, and list the primary in it",
        )
    for row in check.rows(catalog.settings):
        # A session that is read-only on purpose, like a doctor's, says nothing about the others.
        ours = row.source in {"session", "user", "client", "override"}
        if row.name == "default_transaction_read_only" and row.setting == "on" and not ours:
            reset = "RESET default_transaction_read_only"
            fix = lines(f"ALTER SYSTEM {reset}", "SELECT pg_reload_conf()")
            if "database" in row.source:
                fix = lines(f"ALTER DATABASE {quoted(database)} {reset}")
            problem = "transactions are read-only: nothing can be enqueued or leased"
            yield Finding("read_only", "error", database, problem, fix)


def clock(check: CheckContext) -> Iterator[Finding]:
    """Yield that the clocks of this computer and of the database differ."""
    before = _now()
    at: datetime = check.rows(catalog.clock)[0].at
    after = _now()
    # Somewhere between the two the database looked at its clock.
    skew = before - at if at < before else max(at - after, timedelta(0))
    if skew > check.thresholds.clock_skew:
        ahead = "behind" if at < before else "ahead of"
        yield Finding(
            "clock",
            "warning",
            "clock",
            f"the database's clock is {skew.total_seconds():.3f} s {ahead} this computer's: "
            "times that the application computes (at=...) are off by that",
            "sudo chronyc makestep",
        )


def _now() -> datetime:
    return datetime.now(UTC)


def transactions(check: CheckContext) -> Iterator[Finding]:
    """Yield transactions that keep vacuum from removing dead messages."""
    rows = check.rows(catalog.transactions, longest=check.thresholds.transaction_age)
    for row in rows[:_MOST_SHOWN]:
        started = "never" if row.query_start is None else row.query_start.isoformat()
        yield Finding(
            "transactions",
            "warning",
            f"pid {row.pid}",
            f"a transaction of {row.role or row.kind} ({row.application or 'unnamed'}, "
            f"{row.state or 'no state'}) is {text_of(row.age)} old, its last query began "
            f"{started}: no dead message since then can be vacuumed",
            lines(f"SELECT pg_terminate_backend({row.pid})"),
        )


def slots(check: CheckContext) -> Iterator[Finding]:
    """Yield replication slots that keep vacuum from removing dead messages."""
    for row in check.rows(catalog.slots, most=check.thresholds.slot_age):
        yield Finding(
            "slots",
            "warning",
            row.name,
            f"nobody reads the {row.kind} replication slot, and it holds back vacuum by "
            f"{row.age} transactions, and the log",
            lines(f"SELECT pg_drop_replication_slot({literal(row.name)})"),
        )


def prepared(check: CheckContext) -> Iterator[Finding]:
    """Yield prepared transactions that nobody has ended."""
    longest = check.thresholds.transaction_age
    for row in check.rows(catalog.prepared_transactions, longest=longest):
        fix = f"ROLLBACK PREPARED {literal(row.name)}"
        if check.facts.citus and row.name.startswith("citus_"):
            # Only Citus knows whether the other nodes have committed theirs.
            fix = "SELECT recover_prepared_transactions()"
        yield Finding(
            "prepared",
            "warning",
            row.name,
            f"the transaction that {row.role} prepared {text_of(row.age)} ago was never ended: "
            "it keeps its locks, and vacuum from removing dead messages",
            lines(fix),
        )


def notifications(check: CheckContext) -> Iterator[Finding]:
    """Yield that a listener lets notifications pile up."""
    used = check.facts.notifications
    if used is not None and used > check.thresholds.notifications:
        yield Finding(
            "notifications",
            "error",
            "notification queue",
            f"{used:.0%} of it is in use: a session that listens has a transaction open. When it "
            "is full, commits that notify fail",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE state LIKE 'idle in transaction%' ORDER BY xact_start LIMIT 1;",
        )


def connections(check: CheckContext) -> Iterator[Finding]:
    """Yield that the server is about to refuse connections."""
    used, most = check.facts.connections, check.facts.most_connections
    if used > most * check.thresholds.connections:
        yield Finding(
            "connections",
            "warning",
            "connections",
            f"{used} of {most} are in use: lower the pools' sizes, or put PgBouncer between; "
            "more of them take effect when the server is restarted",
            lines(f"ALTER SYSTEM SET max_connections = {most * 2}"),
        )


def autovacuum(check: CheckContext) -> Iterator[Finding]:
    """Yield that nothing removes dead messages."""
    for row in check.rows(catalog.settings):
        if row.name in {"autovacuum", "track_counts"} and row.setting == "off":
            fix = lines(f"ALTER SYSTEM SET {row.name} = on", "SELECT pg_reload_conf()")
            problem = "is off on this server: dead messages are never removed"
            yield Finding("autovacuum", "error", row.name, f"{row.name} {problem}", fix)
    for name, table in check.tables.items():
        if table.options.get("autovacuum_enabled") in {"false", "off", "0", "no"}:
            repairs = check.repairs(name)
            fix = lines(repairs.alter("RESET (autovacuum_enabled)"))
            problem = "autovacuum is switched off for the table"
            yield Finding("autovacuum", "error", repairs.name, problem, fix)


def vacuum(check: CheckContext) -> Iterator[Finding]:
    """Yield tables that are full of dead rows."""
    names = {check.tables[name].oid: name for name in _FOR_MESSAGES if name in check.tables}
    for row in check.rows(catalog.vacuum, oids=list(names)):
        fresh = row.age is not None and row.age <= check.thresholds.vacuum_age
        if row.dead > check.thresholds.dead_rows and not fresh:
            repairs = check.repairs(names[row.oid])
            problem = f"{row.dead} dead rows; last vacuumed: {text_of(row.age)}"
            problem += "" if row.age is None else " ago"
            fix = lines(f"VACUUM (ANALYZE) {repairs.name}")
            yield Finding("vacuum", "warning", repairs.name, problem, fix)


def sequences(check: CheckContext) -> Iterator[Finding]:
    """Yield sequences that run out of numbers, or give out some that are taken."""
    if check.facts.citus:
        return  # each node has a range of its own: the highest id says nothing about this sequence
    highest = check.rows(health.highest_ids(check.scope.tables))[0]
    names = {table.oid: name for name, table in check.tables.items()}
    for row in check.rows(catalog.sequences, oids=check.oids):
        if row.column == FENCING_TOKEN:
            yield from _tokens(check, row)
        name = names[row.oid]
        if row.last is None or name == "pgqrs_archive":  # which numbers nothing by itself
            continue
        # An archived message keeps its id, and another message of that id could not be archived.
        holders = _FOR_MESSAGES if name == "pgqrs_messages" else (name,)
        taken, holder = max((getattr(highest, holder) or 0, holder) for holder in holders)
        if row.last > row.highest * check.thresholds.sequence:
            fix = f"ALTER SEQUENCE {row.name} AS bigint MAXVALUE {_BIGGEST}"
            problem = f"{row.last} of its {row.highest} numbers are given out"
            yield Finding("sequences", "error", row.name, problem, lines(fix))
        if row.column == "id" and row.last < taken:
            problem = (
                f"the next id is {row.last + 1}, and {holder} has {taken} already: "
                f"{'archiving' if holder == 'pgqrs_archive' else 'inserts'} will fail "
                "(rows were restored without their sequence)"
            )
            fix = f"SELECT setval({literal(row.name)}, {taken})"
            yield Finding("sequences", "error", row.name, problem, lines(fix))
        if row.column == "id" and name == "pgqrs_messages":
            yield from _ids_in_archive(check, row)


def _ids_in_archive(check: CheckContext, row: Row[Any]) -> Iterator[Finding]:
    """Yield that live messages have ids that archived ones have."""
    count = check.rows(health.ids_in_archive(check.scope.tables))[0].messages
    if count:
        live, archived = (check.repairs(name).name for name in _FOR_MESSAGES)
        problem = (
            f"{count} live message(s) have the id of an archived one, and cannot be archived: a "
            "consumer that tries ends with an error; this gives the archived ones other ids"
        )
        number = f"nextval({literal(row.name)})"
        chosen = f"WHERE id IN (SELECT id FROM {live})"  # noqa: S608 - names from the catalog
        fix = f"UPDATE {archived} SET id = {number} {chosen}"  # noqa: S608
        yield Finding("sequences", "error", live, problem, lines(fix))


def _tokens(check: CheckContext, row: Row[Any]) -> Iterator[Finding]:
    """Yield why fencing tokens would repeat, or not grow, or not be found."""
    wanted = fencing_sequence(TABLES["pgqrs_messages"]).name
    if row.short_name != wanted:
        rename = f"ALTER SEQUENCE {row.name} RENAME TO {quoted(wanted)}"
        problem = f"a dequeue draws its fencing token from {wanted}, and cannot find it"
        yield Finding("sequences", "error", row.name, problem, lines(rename))
    for wrong, problem, setting in (
        (row.cycle, "begins again after its last number: fencing tokens would repeat", "NO CYCLE"),
        (row.cache > 1, "is cached by each session: fencing tokens would not grow", "CACHE 1"),
        (row.increment < 1, "counts down: fencing tokens would not grow", "INCREMENT BY 1"),
    ):
        if wrong:
            fix = f"ALTER SEQUENCE {row.name} {setting}"
            yield Finding("sequences", "error", row.name, f"the sequence {problem}", lines(fix))
    newest = check.rows(health.newest_token(check.scope.tables))[0].token
    if row.last is not None and row.last < (newest or 0):
        problem = (
            f"the next fencing token is {row.last + 1}, and a message has {newest} already: "
            "tokens would repeat (rows were restored without their sequence)"
        )
        fix = check.repairs("pgqrs_messages").count_on(FENCING_TOKEN)
        yield Finding("sequences", "error", row.name, problem, lines(fix))


SERVER_CHECKS = {
    "rights": rights,
    "read_only": read_only,
    "clock": clock,
    "transactions": transactions,
    "slots": slots,
    "prepared": prepared,
    "notifications": notifications,
    "connections": connections,
}
"""Checks that need no table of ours."""

TABLE_CHECKS = {"autovacuum": autovacuum, "vacuum": vacuum, "sequences": sequences}
"""Checks of the tables, of any version."""


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
                "there are too few consumers; list them"
            )
            fix = check.command("worker", "list", "--queue", row.queue)
            yield Finding("backlog", "warning", row.queue, problem, fix)


def exhausted(check: CheckContext) -> Iterator[Finding]:
    """Yield messages that are out of attempts, and that nobody has made dead letters."""
    tables = check.scope.tables
    for row in check.rows_once(health.backlog(tables)):
        if row.exhausted_age is not None and row.exhausted_age > check.thresholds.exhausted_age:
            fix = check.sql(
                archive.dead_letter_exhausted(tables),
                queue=row.queue,
                limit=_DEAD_LETTER_CHUNK,
                look=None,
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
            "so that its settled messages are never deleted; this keeps them for a year "
            "(keep='failed' of the queue would keep those alone that failed)"
        )
        yield Finding("retention", "warning", row.queue, problem, check.sql(keep))


def orphans(check: CheckContext) -> Iterator[Finding]:
    """Yield messages whose queue is gone."""
    queue = check.scope.tables.queue
    places: dict[int, list[str]] = {}
    statements = health.missing_queues(check.scope.tables)
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
        problem = (
            f"the last heartbeat of {row.name} on {row.hostname} was {text_of(row.silence)} ago"
        )
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

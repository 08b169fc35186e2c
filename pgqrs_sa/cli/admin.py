"""``pgqrs admin``, ``schema`` and ``doctor``: the tables, their rights, their state; statistics."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Command, Group, Work, pass_app
from .failures import PROBLEMS, Failed
from .output import Column, text
from .params import DURATION, ask_options, confirmed, dry_run_option, exact_option, watch_option

if TYPE_CHECKING:
    import sqlalchemy as sa
    from rich.console import RenderableType

    from ..doctor import Finding

__all__ = ["admin", "doctor", "examine", "install", "schema", "script", "uninstall", "verify"]

CHECKS = (Column("check", style="bold"), Column("ok"), Column("problem", least=20, wrap=True))

_STYLES = {"error": "bold red", "warning": "yellow"}
_FINDING_KEYS = ("check", "severity", "subject", "problem", "fix", "mend")  # mend: its former name
_KINDS = ("producer", "consumer", "dashboard", "operator", "migrator")


@click.command(cls=Command)
@dry_run_option
@pass_app
def install(app: App, dry_run: bool) -> None:
    """Create the tables, or bring them to the version of this release.

    The steps are those that a host's Alembic revision runs. Where one takes care of this schema
    already, it has to do the upgrade: then there is nothing to do, or this refuses.
    """
    from ..migrations import LATEST  # noqa: PLC0415 - SQLAlchemy takes a while
    from ..migrations.install import install as run  # noqa: PLC0415
    from ..migrations.install import owner, plan  # noqa: PLC0415

    schema = app.settings.schema
    with app.connect() as connection:
        before = plan(connection, schema) if dry_run else run(connection, schema)
        host = owner(connection, schema)
    if before == LATEST:
        app.say(f"there is nothing to do: {app.target} has version {LATEST}")
        if host:
            app.say(f"this schema belongs to a host's Alembic history (it has {host})")
    elif dry_run:
        app.say(f"would bring {app.target} from version {before} to {LATEST}")
    else:
        app.say(f"{app.target} has version {LATEST} now")
    app.emit_one(_moved("install", schema, before, LATEST, dry_run=dry_run))


@click.command(cls=Command)
@ask_options
@pass_app
def uninstall(app: App, yes: bool, dry_run: bool) -> None:
    """Drop the tables with all messages. Refused where a host's Alembic history made them."""
    from ..migrations.install import HostHistory, owner  # noqa: PLC0415
    from ..migrations.install import uninstall as run  # noqa: PLC0415

    schema = app.settings.schema
    with app.connect() as connection:
        before = _version(connection, schema)
        host = owner(connection, schema) if before else None
    if host:
        raise HostHistory(host, "downgrade the revision that calls op.pgqrs_upgrade")
    if not before:
        app.say(f"there is nothing to do: {app.target} has no tables of pgqrs_sa")
    else:
        what = "message(s), live and settled, with the four tables"
        held = _holdings(app)
        if not confirmed(app, "drop", held, what, yes=yes, dry_run=dry_run, if_none=True):
            app.emit_one(_moved("uninstall", schema, before, 0, dry_run=True))
            return
        with app.connect() as connection:
            run(connection, schema)
    app.emit_one(_moved("uninstall", schema, before, 0, dry_run=dry_run))


@click.command(cls=Command)
@pass_app
def verify(app: App) -> None:
    """Check that the tables exist, complete and free of orphans; exit 1 if not.

    Use this after `install` or a restore. `schema check` also compares each column, index and
    constraint, for a deployment. `doctor` makes these checks and looks at the server, the queues
    and the workers. `admin verify` is another name for `verify`.
    """
    rows = list(_checks(app))
    app.emit(rows, CHECKS)
    if bad := [row["check"] for row in rows if not row["ok"]]:
        raise Failed(f"problems: {', '.join(bad)}", hint="pgqrs doctor", code=PROBLEMS)


def _moved(
    action: str, schema: str | None, before: int, after: int, *, dry_run: bool
) -> dict[str, Any]:
    return {
        "action": action,
        "schema": schema,
        "from_version": before,
        "to_version": after,
        "dry_run": dry_run,
    }


def _version(connection: sa.Connection, schema: str | None) -> int:
    from .. import migrations  # noqa: PLC0415

    return migrations.current_version(connection, schema) or 0


def _holdings(app: App) -> int:
    with app.begin() as work:
        counts = work.service.messages.all_metrics(exact=True)
    settled = ("archived", "dead", "cancelled", "discarded")
    return sum(queue.live + sum(getattr(queue, name) for name in settled) for queue in counts)


def _checks(app: App) -> Iterator[dict[str, Any]]:
    from .. import migrations  # noqa: PLC0415
    from ..errors import SchemaVersionError  # noqa: PLC0415

    with app.connect() as connection:
        try:
            migrations.check(connection, app.settings.schema)
        except SchemaVersionError as error:
            yield _check("version", str(error))
            return
    yield _check("version")
    with app.begin() as work:
        yield from _tables(work, app.settings.schema)
        yield from _orphans(work)


def _tables(work: Work, schema: str | None) -> Iterator[dict[str, Any]]:
    from .._core.scope import Context, Scope  # noqa: PLC0415
    from ..doctor.catalog import TABLES, installed  # noqa: PLC0415
    from ..models import READY_MADE  # noqa: PLC0415

    context = Context.of(READY_MADE, None, None, allow_autocommit=True)
    there = installed(Scope(work.session, context), schema)
    for name, table in TABLES.items():
        if name not in there:
            yield _check(name, "the table is missing")
            continue
        missing = [column.name for column in table.c if column.name not in there[name].columns]
        yield _check(name, f"without {', '.join(missing)}" if missing else None)


def _orphans(work: Work) -> Iterator[dict[str, Any]]:
    for name, count in work.service.orphans().items():
        yield _check(name, f"{count} row(s)" if count else None)


def _check(name: str, problem: str | None = None) -> dict[str, Any]:
    return {"check": name, "ok": problem is None, "problem": problem}


@click.group(cls=Group)
def schema() -> None:
    """The schema as SQL, its version, the rights it needs."""


@schema.command("sql")
@click.option("--from", "from_version", type=click.IntRange(0), metavar="N", help="Start there.")
@click.option("--to", "to_version", type=click.IntRange(0), metavar="M", help="End there.")
@click.option("--down", is_flag=True, help="The way back: from the newest version to none.")
@pass_app
def sql(app: App, from_version: int | None, to_version: int | None, down: bool) -> None:
    """Print the SQL that makes the tables, without connecting to a database.

    It is what the migrations run: from no tables to the newest version, or between the versions
    given. Pipe it into psql, or pass it to a role that may run DDL. With --schema the schema is
    created, too; without it the tables go where the search path leads.
    """
    from ..migrations import LATEST  # noqa: PLC0415 - only now: it takes a while

    start, end = (LATEST, 0) if down else (0, LATEST)
    start = start if from_version is None else from_version
    end = end if to_version is None else to_version
    if (start <= end) if down else (start >= end):
        way = "down" if down else "up"
        raise click.UsageError(f"from version {start} to {end} is not the way {way}")
    app.output.file.write(script(start, end, _schema_of(app)))
    app.output.file.flush()


def script(start: int, end: int, schema: str | None) -> str:
    """Return the SQL that leads from one version to another, in one transaction."""
    from alembic.operations import Operations  # noqa: PLC0415 - of the extra `alembic`
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415

    from ..migrations.ops import DowngradeOp, UpgradeOp  # noqa: PLC0415

    out = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        # Drivers' styles double the percent signs of names, which no script wants.
        dialect_opts={"paramstyle": "named"},
        opts={"as_sql": True, "output_buffer": out, "literal_binds": True},
    )
    with context.begin_transaction():
        way = UpgradeOp if start < end else DowngradeOp
        Operations(context).invoke(way(start, end, schema))
    return out.getvalue()


def _schema_of(app: App) -> str | None:
    # The settings ask for a database, which this needs none of; of the rest, only the schema.
    from ..errors import InvalidArgument  # noqa: PLC0415
    from ..settings import Settings  # noqa: PLC0415

    options = app.options
    try:
        return app.settings.schema
    except InvalidArgument:
        nowhere = "postgresql://"
        return Settings.load(dsn=nowhere, schema=options.schema, config=options.config).schema


@schema.command("check")
@pass_app
def check(app: App) -> None:
    """Check that the tables exist, have the needed version, and have not drifted.

    Ends with 1 when they are not, and prints the command or the SQL that fixes it. Use this in a
    deployment, before the application starts: it is `doctor` for the tables alone. `verify` is a
    quicker check for complete tables and orphans.
    """
    findings = examine(app, ("schema", "drift", "promises"))
    for finding in findings:
        app.say(f"{finding.subject}: {finding.problem}")
        click.echo(finding.fix, file=app.output.file)
    if findings:
        raise Failed(f"{len(findings)} problem(s) in {app.target}", code=PROBLEMS)
    app.say(f"the tables in {app.target} are as they should be")


@schema.command("grants")
@click.option("--role", type=click.Choice(_KINDS), required=True, help="What it is to do.")
@click.option("--to", "grantee", metavar="NAME", help="The role. Default: pgqrs_<role>.")
@pass_app
def grants(app: App, role: str, grantee: str | None) -> None:
    """Print the GRANT statements that a role needs, and none besides.

    A producer enqueues, and sees no payload. A consumer leases and settles; it cannot enqueue,
    nor read the archive. A dashboard counts, without contents. An operator does everything but
    change the tables; a migrator does that.
    """
    from typing import cast  # noqa: PLC0415

    from ..grants import RoleKind  # noqa: PLC0415
    from ..grants import grants as statements  # noqa: PLC0415

    kind = cast("RoleKind", role)
    for line in statements(kind, grantee or f"pgqrs_{role}", _schema_of(app)):
        click.echo(line, file=app.output.file)


@click.group(cls=Group)
def admin() -> None:
    """Install, verify, statistics, reclaim."""


admin.add_command(install)
admin.add_command(uninstall)
admin.add_command(verify)


@admin.command()
@exact_option
@watch_option
@pass_app
def stats(app: App, exact: bool, every: timedelta | None) -> None:
    """Count everything: queues, messages, the archive, workers.

    The archive is counted as `queue metrics` does it: the outcomes that are capped have at least
    as many.
    """

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            counts = work.service.messages.all_metrics(exact=exact)
            statuses = [worker.status for worker in work.service.workers.list()]
        row = {
            "queues": len(counts),
            "paused": sum(queue.paused for queue in counts),
            **{name: sum(getattr(queue, name) for queue in counts) for name in views.COUNTS},
            "capped": sorted({name for queue in counts for name in queue.capped}),
            "workers": len(statuses),
            **{
                f"workers_{status}": statuses.count(status)
                for status in ("ready", "suspended", "stopped")
            },
        }
        return [row]

    if every is None:
        app.emit_one(produce()[0])
    else:
        app.show(produce, None, every)


@admin.command()
@click.option("--queue", "-q", help="Only workers of this queue.")
@click.option(
    "--older-than",
    "--timeout",
    "silent_for",
    type=DURATION,
    help="Silence after which any worker counts as dead. Default: 60s, and only workers that hold "
    "messages.",
)
@pass_app
def reclaim(app: App, queue: str | None, silent_for: timedelta | None) -> None:
    """Stop workers that have been silent, and make what they hold visible at once."""
    patient = silent_for is None
    with app.begin() as work:
        if queue is not None:
            work.service.queues.get(queue)
        count = work.service.workers.reclaim(
            silent_for=60 if silent_for is None else silent_for, queue=queue, holding=patient
        )
    app.emit_one(views.done("reclaim", count, queue=queue))


@click.command(cls=Command)
@click.option("--only", multiple=True, metavar="CHECK", help="Make only this check; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Name the checks and what they look for.")
@pass_app
def doctor(app: App, only: tuple[str, ...], listed: bool) -> None:
    """Look for what is wrong, and say what fixes it.

    Ends with 1 when there is a finding, and with 0 when there is none. Nothing is changed. Each
    finding has the keys check, severity (error or warning), subject, problem and fix; the fix
    is SQL, a statement a line, or a command.

    Use this when something is wrong, or from a monitor. For the tables alone there are
    `schema check`, which compares everything, and `verify`, which is quick.
    """
    if listed:
        _list_checks(app)
        return
    findings = examine(app, only)
    if app.output.format != "table":
        app.emit(
            [asdict(finding) | {"mend": finding.mend} for finding in findings], keys=_FINDING_KEYS
        )
    elif findings:
        _show(app, findings)
    if findings:
        errors = sum(finding.severity == "error" for finding in findings)
        app.say(f"{errors} error(s) and {len(findings) - errors} warning(s) in {app.target}")
        click.get_current_context().exit(PROBLEMS)
    app.say(f"nothing is wrong with {app.target}")


def examine(app: App, only: tuple[str, ...] = ()) -> list[Finding]:
    """Return the findings about the database of a command."""
    from sqlalchemy.orm import Session  # noqa: PLC0415 - only now: it takes a while

    from .._core.scope import Context  # noqa: PLC0415
    from ..doctor import diagnose  # noqa: PLC0415
    from ..models import READY_MADE  # noqa: PLC0415

    context = Context.of(READY_MADE, None, None, allow_autocommit=True)
    schema = app.settings.schema
    # Not app.begin(): that refuses a schema of another version, which is one of the findings.
    with app.connect() as plain:
        mapped = plain.execution_options(schema_translate_map={None: schema} if schema else None)
        with Session(mapped) as session:
            return diagnose(session, context, only=only)


def _list_checks(app: App) -> None:
    from ..doctor import CHECKS  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for name, check in CHECKS.items():
        what = (check.__doc__ or "").partition("\n")[0].removeprefix("Yield ").rstrip(".")
        rows.append({"check": name, "looks_for": what})
    app.emit(rows, (Column("check", style="bold"), Column("looks_for", least=20, wrap=True)))


def _show(app: App, findings: list[Finding]) -> None:
    # Not a table: a fix must be copied whole, at any width of the terminal.
    if not app.output.file.isatty():
        app.output.lines(_plain(findings))
        return
    console = app.output.console
    for finding in findings:
        console.print(_heading(finding), soft_wrap=True)
        for line in finding.fix.splitlines():
            console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _plain(findings: list[Finding]) -> Iterator[str]:
    for finding in findings:
        about = f"{finding.severity} {finding.check} {text(finding.subject)}"
        yield f"{about}: {text(finding.problem)}"
        yield from (f"    {line}" for line in finding.fix.splitlines())
        yield ""


def _heading(finding: Finding) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415 - of the extra `cli`

    return Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        (f" {finding.check} ", "dim"),
        (text(finding.subject), "bold"),
        f": {text(finding.problem)}",
    )

"""``pgqrs install``, ``uninstall``, ``verify`` and ``schema``: the tables and their rights."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .app import App, Command, Group, Work, pass_app
from .confirm import confirmed
from .failures import PROBLEMS, Failed
from .output import Column
from .params import ask_options, dry_run_option

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["install", "schema", "script", "uninstall", "verify"]

CHECKS = (Column("check", style="bold"), Column("ok"), Column("problem", least=20, wrap=True))

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
    from .doctor import examine  # noqa: PLC0415

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

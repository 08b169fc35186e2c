"""``pgqrs schema``: the tables as SQL, whether they are there, and the rights that roles need."""

from __future__ import annotations

import io

import click

from .app import App, Group, pass_app
from .failures import PROBLEMS, Failed

__all__ = ["schema"]

_KINDS = ("producer", "consumer", "dashboard", "operator", "migrator")


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
    given. Pipe it into psql, or hand it to whoever may run DDL. With --schema the schema is
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
    """Check that the tables are there, of the version needed, and not changed since.

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
@click.option("--to", "grantee", metavar="NAME", help="The role; pgqrs_<role> unless given.")
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

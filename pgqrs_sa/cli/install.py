"""``pgqrs install``, ``uninstall`` and ``verify``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .app import App, Command, Work, pass_app
from .confirm import confirmed
from .failures import PROBLEMS, Failed
from .output import Column
from .params import dry_run_option, yes_option

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["install", "uninstall", "verify"]

CHECKS = (Column("check", style="bold"), Column("ok"), Column("problem", least=20, wrap=True))


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
@yes_option
@dry_run_option
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
    """Check that the tables are there, complete, and free of orphans; exit 1 if not.

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
    return sum(one.live + sum(getattr(one, name) for name in settled) for one in counts)


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
    from .._core.context import Context  # noqa: PLC0415
    from ..doctor.catalog import TABLES, installed  # noqa: PLC0415

    context = Context.of(None, None, None, allow_autocommit=True)
    there = installed(work.session, context, schema)
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

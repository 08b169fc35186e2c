"""``pgqrs doctor``: the problems of a database, and their fixes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .app import App, Command, pass_app
from .failures import PROBLEMS
from .output import Column

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..doctor import Finding

__all__ = ["doctor", "examine"]

_STYLES = {"error": "bold red", "warning": "yellow"}
_KEYS = ("check", "severity", "subject", "problem", "fix", "mend")  # mend: its former name


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
        app.emit([asdict(finding) | {"mend": finding.mend} for finding in findings], keys=_KEYS)
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
    from .output import text  # noqa: PLC0415

    for finding in findings:
        about = f"{finding.severity} {finding.check} {text(finding.subject)}"
        yield f"{about}: {text(finding.problem)}"
        yield from (f"    {line}" for line in finding.fix.splitlines())
        yield ""


def _heading(finding: Finding) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415 - of the extra `cli`

    from .output import text  # noqa: PLC0415

    return Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        (f" {finding.check} ", "dim"),
        (text(finding.subject), "bold"),
        f": {text(finding.problem)}",
    )

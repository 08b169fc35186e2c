"""The group ``pgqrs``: its global options, and which command is in which module."""

from __future__ import annotations

import os
from typing import Any

import click

from .app import App, Command, Group, pass_app
from .failures import Failed
from .params import Options, global_options

__all__ = ["completion", "demo", "group"]

COMMANDS = {
    "queue": (".queues:queue", "Queues: create, pause, count, purge, delete."),
    "message": (".messages:message", "Messages: enqueue, dequeue, look, settle, cancel."),
    "worker": (".workers:worker", "Run consumers; the register of workers, their health."),
    "archive": (".archive:archive", "Settled messages: look, requeue, delete."),
    "dead": (".archive:dead", "Dead letters: look, retry, discard."),
    "install": (".admin:install", "Create the tables, or bring them up to date."),
    "uninstall": (".admin:uninstall", "Drop the tables with all messages."),
    "verify": (".admin:verify", "Check that the tables exist and are sound."),
    "admin": (".admin:admin", "Install, verify, statistics, reclaim."),
    "schema": (".admin:schema", "The schema as SQL, its drift, the rights it needs."),
    "doctor": (".admin:doctor", "Look for what is wrong, and say what fixes it."),
    "top": (".top:top", "A live view of queues and workers."),
    "demo": (".root:demo", "A small shop on a throw-away server, from end to end."),
    "completion": (".root:completion", "Print the completion script of a shell."),
}
"""Each command, where it is, and its line in ``pgqrs --help``."""

EPILOG = """
The global options may also stand after a command. Settings come from options, then PGQRS_*
variables, then a file (--config, PGQRS_CONFIG_FILE, ./pgqrs.yaml, ./pgqrs.yml or ./pgqrs.toml).

Exit codes: 0 ok, 1 found problems, 2 usage, 3 not found, 4 cannot connect, 5 refused without
--yes, 130 interrupted.
"""


def _begin(ctx: click.Context, **options: Any) -> None:
    """Keep the options for the commands, each of which adds those that stand after it."""
    ctx.obj = Options().merged(options)


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version  # noqa: PLC0415

        click.echo(f"pgqrs_sa {version('pgqrs-sa')}")
        ctx.exit()


group = Group(
    "pgqrs",
    callback=click.pass_context(_begin),
    params=[
        *global_options(environment=True),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_version,
            help="Show the version.",
        ),
    ],
    lazy=COMMANDS,
    help="Message queues inside PostgreSQL.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""The whole command line; mount it with ``add_command``."""


@click.command(cls=Command)
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run a small shop from end to end, and check its books.

    On a throw-away server, or in a scratch database of the server that --dsn or PGQRS_DSN names.
    """
    from .. import embedded  # noqa: PLC0415 - SQLAlchemy takes a while
    from ..demo import run  # noqa: PLC0415

    app = ctx.ensure_object(App)
    if app.options.dsn:
        os.environ["PGQRS_DSN"] = app.options.dsn  # where the demo looks for it
    try:
        code = run()
    except embedded.EmbeddedServerError as error:
        raise Failed(str(error), hint="pip install 'pgqrs-sa[embedded]', or --dsn") from error
    ctx.exit(code)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_app
def completion(app: App, shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(pgqrs completion bash)"
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    found = get_completion_class(shell)
    if found is None:  # pragma: no cover - click has these three
        raise Failed(f"click cannot complete for {shell}")
    script = found(group, {}, "pgqrs", "_PGQRS_COMPLETE").source()
    click.echo(script, file=app.output.file)

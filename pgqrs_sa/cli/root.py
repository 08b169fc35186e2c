"""The group ``pgqrs``: its global options, and which command is in which module."""

from __future__ import annotations

from typing import Any

import click

from .app import Group, Options, global_options

__all__ = ["group"]

COMMANDS = {
    "queue": (".queues:queue", "Queues: create, pause, count, purge, delete."),
    "message": (".messages:message", "Messages: enqueue, dequeue, look, settle, cancel."),
    "worker": (".workers:worker", "Run consumers; the register of workers, their health."),
    "archive": (".archive:archive", "Settled messages: look, requeue, delete."),
    "dead": (".dead:dead", "Dead letters: look, retry, discard."),
    "install": (".install:install", "Create the tables, or bring them up to date."),
    "uninstall": (".install:uninstall", "Drop the tables with all messages."),
    "verify": (".install:verify", "Check that the tables are there and sound."),
    "admin": (".admin:admin", "Install, verify, statistics, reclaim."),
    "schema": (".schema:schema", "The schema as SQL, its drift, the rights it needs."),
    "doctor": (".doctor:doctor", "Look for what is wrong, and say what fixes it."),
    "top": (".top:top", "A live view of queues and workers."),
    "demo": (".extras:demo", "A small shop on a throw-away server, from end to end."),
    "completion": (".extras:completion", "Print the completion script of a shell."),
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

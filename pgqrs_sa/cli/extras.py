"""``pgqrs demo`` and ``pgqrs completion``."""

from __future__ import annotations

import os

import click

from .app import App, Command, pass_app
from .failures import Failed

__all__ = ["completion", "demo"]


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

    from .root import group  # noqa: PLC0415

    found = get_completion_class(shell)
    if found is None:  # pragma: no cover - click has these three
        raise Failed(f"click cannot complete for {shell}")
    script = found(group, {}, "pgqrs", "_PGQRS_COMPLETE").source()
    click.echo(script, file=app.output.file)

"""``pgqrs admin``: other names of commands, and statistics of all queues."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from . import schema, views
from .app import App, Group, pass_app
from .params import DURATION, exact_option, watch_option

__all__ = ["admin"]


@click.group(cls=Group)
def admin() -> None:
    """Install, verify, statistics, reclaim."""


admin.add_command(schema.install)
admin.add_command(schema.uninstall)
admin.add_command(schema.verify)


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

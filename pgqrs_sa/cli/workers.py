"""``pgqrs worker``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from . import views
from .app import App, Group, add_call, pass_app
from .confirm import confirmed
from .failures import Failed
from .messages import listing
from .params import (
    DURATION,
    ask_options,
    given,
    page_options,
    watch_option,
)

__all__ = ["worker"]

identified = given("id", "--id", type=click.IntRange(1), what="The worker's id.")
of_queue = given("queue", "--queue", "-q", required=False, what="Of this queue only.")


RUNNING = {
    "run": (".running:run", "Work on messages, with the handlers of an application."),
    "check": (".running:check", "Look whether an application's consumer could work."),
}


@click.group(cls=Group, lazy=RUNNING)
def worker() -> None:
    """Run consumers; the register of workers, and their health."""


worker.alias("release-messages", "release")


@worker.command()
@given("name", "--name", required=False, what="For people. Default: the host's name.")
@click.option("--queue", "-q", "queues", multiple=True, help="What it works on.")
@click.option("--host", "hostname", help="Where it runs. Default: this computer.")
@click.option("--port", type=click.IntRange(0, 65_535), help="A port to tell it by.")
@click.option("--pid", type=click.IntRange(1), help="Its process id there.")
@click.option("--app-version", "version", help="Of the application.")
@pass_app
def create(app: App, name: str | None, hostname: str | None, **about: Any) -> None:
    """Register a worker: each start of a process is a new one."""
    import socket  # noqa: PLC0415

    host = hostname or socket.gethostname()
    with app.begin() as work:
        info = work.service.workers.register(name or host, hostname=host, **about)
    app.emit_one(views.worker(info))


@worker.command("list")
@of_queue
@click.option("--status", type=click.Choice(["ready", "suspended", "stopped"]))
@page_options
@pass_app
def list_(
    app: App, queue: str | None, status: Any, limit: int, after: int, every: timedelta | None
) -> None:
    """List workers by id."""

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            if queue is not None:
                work.service.queues.get(queue)  # a name that is wrong has no workers either
            found = work.service.workers.list(status=status, queue=queue)
        return [views.worker(info) for info in found if info.id > after][:limit]

    app.show_page(produce, views.WORKERS, every, views.WORKER_KEYS, limit)


add_call(worker, identified, "workers.get", "Show a worker.", views.worker)


@worker.command()
@identified
@page_options
@pass_app
def messages(app: App, id: int, limit: int, after: int, every: timedelta | None) -> None:
    """List the messages that a worker holds."""
    from .queries import held_by  # noqa: PLC0415 - SQLAlchemy takes a while

    with app.begin() as work:
        work.service.workers.get(id)
    listing(app, every, where=held_by(id), limit=limit, after=after)


@worker.command()
@identified
@pass_app
def release(app: App, id: int) -> None:
    """Make visible at once what a worker holds."""
    with app.begin() as work:
        count = work.service.workers.release_leases(id)
    app.emit_one(views.done("release", count, id=id))


for _method, _help in {
    "suspend": "Let a worker lease nothing until `resume`.",
    "resume": "Let a suspended worker lease again.",
    "stop": "Note that a worker has ended; its leases run out by themselves.",
    "heartbeat": "Note that a worker lives.",
}.items():
    add_call(worker, identified, f"workers.{_method}", _help, views.worker)
worker.alias("shutdown", "stop")


@worker.command()
@of_queue
@click.option(
    "--timeout",
    "--max-age",
    type=DURATION,
    default="60",
    show_default=True,
    help="Silence up to which one is healthy.",
)
@click.option("--group-by-queue", is_flag=True, help="Count them by queue.")
@click.option("--exit-zero", is_flag=True, help="End with 0 also when a worker is silent.")
@watch_option
@pass_app
def health(
    app: App,
    queue: str | None,
    timeout: timedelta,
    group_by_queue: bool,
    exit_zero: bool,
    every: timedelta | None,
) -> None:
    """Say which workers have sent a heartbeat lately.

    The data is printed in any case. Exit 1 when a worker is silent, unless --exit-zero.
    """
    silent: list[int] = []

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            if queue is not None:
                work.service.queues.get(queue)
            found = work.service.workers.health(silent_for=timeout)
        if queue is not None:
            found = [health for health in found if queue in health.worker.queues]
        silent[:] = [health.worker.id for health in found if not health.healthy]
        if group_by_queue:
            return views.health_by_queue(found)
        return [views.health(health) for health in found]

    columns = None if group_by_queue else views.HEALTH
    keys = views.HEALTH_BY_QUEUE_KEYS if group_by_queue else views.HEALTH_KEYS
    app.show(produce, columns, every, keys)
    if silent and not exit_zero:
        listed = ", ".join(map(str, silent))
        raise Failed(f"silent for too long: worker {listed}", hint="pgqrs admin reclaim")


@worker.command()
@of_queue
@pass_app
def stats(app: App, queue: str | None) -> None:
    """Count workers by status, and what they hold."""
    with app.begin() as work:
        if queue is not None:
            work.service.queues.get(queue)
        found = work.service.workers.list(queue=queue)
        living = work.service.workers.health()
    known = {info.id for info in found}
    statuses = [info.status for info in found]
    heartbeats = [info.heartbeat_at for info in found if info.status != "stopped"]
    app.emit_one(
        {
            "queue": queue,
            "workers": len(found),
            **{status: statuses.count(status) for status in ("ready", "suspended", "stopped")},
            "leases": views.leases(health for health in living if health.worker.id in known),
            "oldest_heartbeat_at": min(heartbeats, default=None),
            "newest_heartbeat_at": max(heartbeats, default=None),
        }
    )


@worker.command()
@click.option("--older-than", type=DURATION, default="7d", show_default=True)
@ask_options
@pass_app
def purge(app: App, older_than: timedelta, yes: bool, dry_run: bool) -> None:
    """Delete the rows of workers that stopped long ago and hold nothing."""
    from .queries import delete_old_workers, old_workers  # noqa: PLC0415

    with app.begin() as work:
        ids = old_workers(work.session, older_than)
    count = len(ids)
    if confirmed(app, "delete", count, "stopped worker(s)", yes=yes, dry_run=dry_run):
        with app.begin() as work:
            count = delete_old_workers(work.session, older_than, ids)
    app.emit_one(views.done("purge", count, dry_run=dry_run))


@worker.command()
@identified
@ask_options
@pass_app
def delete(app: App, id: int, yes: bool, dry_run: bool) -> None:
    """Delete the row of a worker that is stopped and holds nothing."""
    with app.begin() as work:
        info = work.service.workers.get(id)
    what = f"worker, {id} ({info.name} on {info.hostname}, {info.status})"
    if confirmed(app, "delete", 1, what, yes=yes, dry_run=dry_run):
        with app.begin() as work:
            work.service.workers.delete(id)
    app.emit_one(views.done("delete", 1, id=id, dry_run=dry_run))

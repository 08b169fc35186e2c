"""``pgqrs worker``: the register of workers, and an application's consumer as a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Group, add_call, pass_app
from .failures import CANNOT_CONNECT, PROBLEMS, Failed, failure
from .messages import listing
from .output import Column, Row, span
from .params import (
    DURATION,
    ask_options,
    confirmed,
    given,
    page_options,
    together,
    watch_option,
)

if TYPE_CHECKING:
    from ..consumer.handlers import Handler
    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from ..types import WorkerInfo
    from .application import Counter

    AnyConsumer = Consumer | AsyncConsumer

__all__ = ["worker"]

identified = given("id", "--id", type=click.IntRange(1), what="The worker's id.")
of_queue = given("queue", "--queue", "-q", required=False, what="Of this queue only.")


@click.group(cls=Group)
def worker() -> None:
    """Run consumers; the register of workers, and their health."""


worker.alias("release-messages", "release")


def _split(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> list[str]:
    return [name.strip() for names in given for name in names.split(",") if name.strip()]


_options = together(
    click.argument("target", metavar="MODULE:CONSUMER"),
    click.option(
        "--queues",
        "-q",
        multiple=True,
        metavar="A,B",
        callback=_split,
        help="Only these, of those that have a handler.",
    ),
    click.option("--concurrency", type=click.IntRange(1), help="Calls at the same time."),
)


@worker.command(short_help="Work on messages, with the handlers of an application.")
@_options
@click.option("--until-empty", is_flag=True, help="End when nothing is visible in any queue.")
@click.option("--drain-timeout", type=DURATION, help="What handlers get when it stops, as 30s.")
@pass_app
def run(
    app: App,
    target: str,
    queues: list[str],
    concurrency: int | None,
    until_empty: bool,
    drain_timeout: timedelta | None,
) -> None:
    """Work on messages, with the handlers of an application's consumer.

    SIGTERM and SIGINT end the leasing, and wait for the handlers that run; a second signal gives
    their messages back at once. Ends with 0 when every handler had ended, with 1 when some were
    given up. The database is the one of the consumer's own engine.
    """
    from .application import Counter  # noqa: PLC0415 - SQLAlchemy takes a while

    def begun(worker: WorkerInfo) -> None:
        calls = consumer.concurrency
        app.say(f"worker {worker.id} works on {', '.join(worker.queues)}, {calls} at a time")

    consumer = _loaded(app, target, queues)
    counter = Counter(begun)
    consumer.configure(concurrency=concurrency, drain_timeout=drain_timeout, hooks=[counter])
    try:
        with _reaching():
            code = _call(consumer, "run", until_empty=until_empty)
    finally:
        _tell(app, counter)
    click.get_current_context().exit(code)


@worker.command(short_help="Look whether an application's consumer could work.")
@_options
@pass_app
def check(app: App, target: str, queues: list[str], concurrency: int | None) -> None:
    """Check that a consumer could start, and show its handlers; exit 1 if it could not.

    It can be imported; its queues exist; the tables have the right version, and can be written;
    the pool has a connection for each handler that runs. Nothing is registered or leased.
    """
    consumer = _loaded(app, target, queues)
    consumer.configure(concurrency=concurrency)
    try:
        with _reaching():
            leases: dict[str, timedelta] = _call(consumer, "check")
    except Exception as error:
        failed = failure(error, app.secrets)
        code = failed.exit_code if failed.exit_code == CANNOT_CONNECT else PROBLEMS
        raise Failed(failed.message, hint=failed.hint, code=code) from error
    app.emit([_row(handler, leases) for handler in consumer.handlers], _HANDLERS)
    app.say(f"{target} can work on {len(leases)} queue(s)")


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


_NO_CONNECTION = ("08", "28", "3D", "53", "57P")
"""SQLSTATEs of a refused connection: server down or full, unknown user or database."""


def _optional_span(key: str, otherwise: str) -> Callable[[Row], str]:
    return lambda row: otherwise if row[key] is None else span(row[key])


_HANDLERS = (
    Column("queue", style="bold", least=12),
    Column("handler", least=16, rank=1),
    Column("lease_seconds", "lease", _optional_span("lease_seconds", "-"), right=True, rank=2),
    Column("concurrency", right=True, rank=3),
    Column("batch", right=True, rank=5),
    Column(
        "timeout_seconds", "timeout", _optional_span("timeout_seconds", "none"), right=True, rank=4
    ),
    Column("acknowledge", rank=6),
)


def _loaded(app: App, target: str, queues: Sequence[str]) -> AnyConsumer:
    from .application import load  # noqa: PLC0415 - the application takes a while

    for option in ("dsn", "schema", "config"):
        if getattr(app.options, option) is not None:
            raise click.UsageError(f"--{option} has no effect on {target}: its engine is its own")
    consumer = load(target)
    app.log.join_application()
    if queues:
        consumer.only(*queues)
    return consumer


def _tell(app: App, counter: Counter) -> None:
    """Print the counts, unless the consumer never began."""
    if counter.worker is None:
        return
    if app.output.format == "table":
        app.say(f"worker {counter.worker.id} has ended: {counter.sentence()}")
    else:
        app.emit_one(counter.row())


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn the error of a refused connection into `Failed`."""
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415 - it takes a while

    from ..consumer.retrying import sqlstate  # noqa: PLC0415
    from . import connection  # noqa: PLC0415

    try:
        yield
    except (DBAPIError, OSError) as error:
        if not (sqlstate(error) or "08").startswith(_NO_CONNECTION):
            raise
        said = getattr(error, "orig", None) or error
        hint = connection.hint(
            str(said),
            "check where the consumer's engine connects to",
            address="the URL that the consumer's engine connects to",
        )
        raise Failed(f"cannot connect: {said}", hint=hint, code=CANNOT_CONNECT) from error


def _call(consumer: AnyConsumer, method: str, **options: Any) -> Any:
    """Call a method of either class of consumer, and dispose of the consumer."""
    from ..consumer.threads import Consumer  # noqa: PLC0415

    if isinstance(consumer, Consumer):
        try:
            return getattr(consumer, method)(**options)
        finally:
            consumer.dispose()

    import asyncio  # noqa: PLC0415 - not for the other commands

    async def call() -> Any:
        try:
            return await getattr(consumer, method)(**options)
        finally:
            await consumer.dispose()

    return asyncio.run(call())


def _row(handler: Handler, leases: Mapping[str, timedelta]) -> dict[str, Any]:
    return {
        "queue": handler.queue,
        "handler": handler.name,
        "lease_seconds": leases[handler.queue].total_seconds(),
        "concurrency": handler.concurrency,
        "batch": handler.batch,
        "timeout_seconds": handler.timeout.total_seconds() if handler.timeout else None,
        "acknowledge": handler.acknowledge,
    }

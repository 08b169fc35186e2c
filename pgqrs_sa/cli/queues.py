"""``pgqrs queue``."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Group, add_call, pass_app
from .archive import deleting
from .failures import PROBLEMS, Failed
from .messages import listing
from .params import (
    DURATION,
    ask_options,
    attempts_option,
    bulk_options,
    chunk_option,
    confirmed,
    dry_run_option,
    exact_option,
    given,
    in_chunks,
    in_slices,
    page_options,
    together,
    watch_option,
)

if TYPE_CHECKING:
    from .queries import Live

__all__ = ["queue"]

named = given("name", "--queue", "-q", what="The queue's name.")


@click.group(cls=Group)
def queue() -> None:
    """Queues: create, pause, count, purge, delete."""


_settings = together(
    click.option("--lease", type=DURATION, help="How long a lease lasts."),
    attempts_option,
    click.option(
        "--keep",
        type=click.Choice(["all", "failed", "nothing"]),
        help="Which settled messages are kept.",
    ),
    click.option("--retention", type=DURATION, help="How long settled messages are kept."),
    click.option(
        "--failed-retention",
        type=DURATION,
        help="How long those are kept that are dead, cancelled or discarded.",
    ),
    click.option("--max-payload-bytes", type=click.IntRange(1), help="The largest payload."),
)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


@queue.command()
@named
@_settings
@pass_app
def create(app: App, name: str, **settings: Any) -> None:
    """Create a queue; an existing queue is not changed."""
    # A file or PGQRS_MAX_READ_CT may set the default; the table's default is the same 5.
    wanted: Any = {"max_read_ct": app.settings.max_read_ct} | _given(settings)
    with app.begin() as work:
        known = {info.name for info in work.service.queues.list()}
        info = work.service.queues.create(name, **wanted)
    if name in known:
        app.say(f"queue {name!r} was there already, and stays as it is")
    app.emit_one(views.queue(info), views.QUEUES)


@queue.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option("--update", is_flag=True, help="Change settings that differ from the declared ones.")
@dry_run_option
@pass_app
def sync(app: App, target: str, update: bool, dry_run: bool) -> None:
    """Create the queues that an application declares, where they are missing.

    The name is that of a DeclaredQueue, of a list of them, of a MetaData or a declarative base with
    declare_queues(), or of a consumer. The database is that of --dsn, also for a consumer.
    """
    from .application import load_queues  # noqa: PLC0415 - the application takes a while

    declared = load_queues(target)
    app.log.join_application()
    with app.begin() as work:
        found = work.service.queues.sync(declared, update=update, dry_run=dry_run)
    app.emit([views.synced(queue, dry_run=dry_run) for queue in found], views.SYNCED)
    if not update and any(queue.differences for queue in found):
        app.say("settings differ from the declared ones: --update changes them")


@queue.command("list")
@watch_option
@pass_app
def list_(app: App, every: timedelta | None) -> None:
    """List the queues."""

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            return [views.queue(info) for info in work.service.queues.list()]

    app.show(produce, views.QUEUES, every, views.QUEUE_KEYS)


add_call(queue, named, "queues.get", "Show a queue and its settings.", views.queue, views.QUEUES)


@queue.command()
@named
@_settings
@pass_app
def update(app: App, name: str, **settings: Any) -> None:
    """Change settings of a queue."""
    with app.begin() as work:
        info = work.service.queues.update(name, **_given(settings))
    app.emit_one(views.queue(info), views.QUEUES)


@queue.command()
@named
@page_options
@pass_app
def messages(app: App, name: str, limit: int, after: int, every: timedelta | None) -> None:
    """List the live messages of a queue."""
    listing(app, every, queue=name, limit=limit, after=after)


@queue.command()
@given("name", "--queue", "-q", required=False, what="Of this queue only.")
@exact_option
@watch_option
@pass_app
def metrics(app: App, name: str | None, exact: bool, every: timedelta | None) -> None:
    """Count messages by state, and the archive by outcome.

    Each outcome is counted up to 10,000, and of more than 20 queues, up to 200,000 divided by
    their number. 10000+ means that there are at least as many.

    json prints an object for a named queue, and a list without a name.
    """

    def produce() -> list[dict[str, Any]]:
        from .queries import enqueued_between  # noqa: PLC0415 - SQLAlchemy takes a while

        with app.begin() as work:
            reading = work.service.messages
            if name is None:
                return [views.metrics(counts) for counts in reading.all_metrics(exact=exact)]
            counts = views.metrics(reading.metrics(name, exact=exact))
            return [counts | enqueued_between(work.service, name)]

    if name is not None and every is None and app.output.format == "json":
        app.emit_one(produce()[0])
    else:
        app.show(produce, views.METRICS, every, views.METRICS_KEYS)


add_call(
    queue,
    named,
    "queues.pause",
    "Let nothing be leased; enqueueing and settling go on.",
    views.queue,
    views.QUEUES,
)
add_call(queue, named, "queues.resume", "Let messages be leased again.", views.queue, views.QUEUES)


@queue.command()
@named
@bulk_options
@pass_app
def purge(app: App, name: str, chunk: int, yes: bool, dry_run: bool) -> None:
    """Delete the live messages of a queue, held ones too; its archive stays.

    What arrives after the count stays. So does a counted message that is leased or requeued before
    it can be deleted: the key `kept` says how many of these there are.
    """
    from .queries import Live  # noqa: PLC0415 - SQLAlchemy takes a while

    with app.begin() as work:
        work.service.queues.get(name)
        counted = Live.of(work.session, name)

    job, count = _Purge(app, counted), len(counted)
    if confirmed(
        app, "delete", count, f"live message(s) of queue {name!r}", yes=yes, dry_run=dry_run
    ):
        count = in_slices("purging", count, job.step, chunk)
    if job.kept:
        app.say(f"{job.kept:,} counted message(s) stayed: leased or requeued since")
    app.emit_one(views.done("purge", count, queue=name, kept=job.kept, dry_run=dry_run))


class _Purge:
    """Deletes the live messages that were counted.

    Attributes:
        kept: How many are live still, since they have been leased or requeued.
    """

    def __init__(self, app: App, counted: Live) -> None:
        self._app = app
        self._counted = counted
        self.kept = 0

    def step(self, part: slice) -> int:
        """Delete some in a transaction of its own; return how many."""
        with self._app.begin() as work:
            deleted = self._counted.purge(work.service, part)
            if deleted < part.stop - part.start:
                self.kept += self._counted.still_live(work.session, part)
        return deleted


@queue.command()
@named
@chunk_option
@click.option("--force", is_flag=True, help="With the messages and the history that it holds.")
@ask_options
@pass_app
def delete(app: App, name: str, chunk: int, force: bool, yes: bool, dry_run: bool) -> None:
    """Delete a queue; with --force, first what it holds, a chunk at a time.

    What arrives after the count is not deleted: then the queue stays too, and the command fails.
    """
    from ..errors import QueueNotEmpty  # noqa: PLC0415 - SQLAlchemy takes a while
    from .queries import Live, Settled  # noqa: PLC0415

    with app.begin() as work:
        work.service.queues.get(name)
        waiting = Live.of(work.session, name)
        settled = Settled(name).ids(work.service, work.session)
    held = len(waiting) + len(settled)
    if held and not force:
        raise QueueNotEmpty(name, len(waiting), len(settled))
    what = f"queue {name!r}, with {len(waiting):,} live and {len(settled):,} archived message(s)"
    if confirmed(app, "delete", 1, what, yes=yes, dry_run=dry_run):
        held = in_slices("purging", len(waiting), _Purge(app, waiting).step, chunk)
        held += in_slices("pruning", len(settled), deleting(app, settled), chunk)
        try:
            with app.begin() as work:
                work.service.queues.delete(name)
        except QueueNotEmpty as arrived:
            raise Failed(
                f"queue {name!r} has got {arrived.messages:,} live and {arrived.archived:,} "
                f"archived message(s) since they were counted: it stays; {held:,} are deleted",
                hint="stop its producers and consumers, and run it again",
                code=PROBLEMS,
            ) from None
    app.emit_one(views.done("delete", held, queue=name, dry_run=dry_run))


@queue.command("archive-dlq")
@given("name", "--queue", "-q", required=False, what="Of this queue only.")
@chunk_option
@dry_run_option
@pass_app
def archive_dlq(app: App, name: str | None, chunk: int, dry_run: bool) -> None:
    """Make dead letters of messages whose attempts are used up."""
    with app.begin() as work:
        reading = work.service.messages
        counts = reading.all_metrics() if name is None else [reading.metrics(name)]
    rows = []
    for metrics in counts:

        def step(limit: int, queue: str = metrics.queue) -> int:
            with app.begin() as work:
                return work.service.archived.bury(queue, limit=limit)

        moved = metrics.exhausted
        if not dry_run:
            moved = in_chunks(f"archiving {metrics.queue}", moved, step, chunk)
        rows.append(views.done("archive-dlq", moved, queue=metrics.queue, dry_run=dry_run))
    app.emit(rows, keys=views.DONE_KEYS)

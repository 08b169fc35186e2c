"""``pgqrs archive``, and the long jobs that `dead` shares with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Group, pass_app
from .confirm import confirmed, in_slices
from .messages import worker_option
from .params import (
    DURATION,
    JSON,
    after_option,
    chunk_option,
    content_option,
    dry_run_option,
    given,
    limit_option,
    timeout_option,
    watch_option,
    yes_option,
)

if TYPE_CHECKING:
    from .queries import Settled

__all__ = ["archive", "delete_ids", "delete_settled", "deleting", "listing", "requeue_ids"]

OUTCOMES = ("archived", "dead", "cancelled", "discarded")

identified = given("id", "--id", type=click.IntRange(1), what="The archive's id.")
of_queue = given("queue", "--queue", "-q", required=False, what="Of this queue only.")
outcome_option = click.option("--outcome", type=click.Choice(OUTCOMES), help="Only with this one.")
ids_argument = click.argument("ids", nargs=-1, type=click.IntRange(1), metavar="[ID]...")
ids_option = click.option("--id", "more", multiple=True, type=click.IntRange(1), metavar="ID")


@click.group(cls=Group)
def archive() -> None:
    """Settled messages: look, requeue, delete.

    They have ids of their own; original_msg_id is the one that a message had while it was live.
    """


def listing(app: App, every: timedelta | None, settled: Settled, **page: Any) -> None:
    """List settled messages, and say how to see the next page."""

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            found = work.service.archived.find(
                settled.queue, outcome=settled.outcome, where=settled.criteria(), **page
            )
        rows = [views.archived(one) for one in found]
        if every is None and (hint := views.more(rows, page["limit"])):
            app.say(hint)
        return rows

    app.show(produce, views.ARCHIVED, every, views.ARCHIVED_KEYS)


@archive.command("list")
@of_queue
@worker_option
@outcome_option
@click.option("--message", type=click.IntRange(1), help="What had this id while it was live.")
@click.option("--payload", type=JSON, help="Only with a payload that contains this.")
@content_option
@limit_option
@after_option
@timeout_option
@watch_option
@pass_app
def list_(
    app: App,
    payload: tuple[Any] | None,
    content: bool,
    limit: int,
    after: int,
    timeout: timedelta | None,
    every: timedelta | None,
    **which: Any,
) -> None:
    """List settled messages by the archive's id."""
    from .queries import Settled  # noqa: PLC0415 - SQLAlchemy takes a while

    page = {"limit": limit, "after": after, "content": content, "timeout": timeout}
    contains = None if payload is None else payload[0]
    listing(app, every, Settled(**which), payload=contains, **page)


@archive.command()
@of_queue
@worker_option
@outcome_option
@pass_app
def count(app: App, **which: Any) -> None:
    """Count settled messages."""
    from .queries import Settled  # noqa: PLC0415

    with app.begin() as work:
        number = Settled(**which).count(work.service)
    keys = ("queue", "worker", "outcome")
    app.emit_one({**{key: which[key] for key in keys}, "count": number})


@archive.command()
@identified
@pass_app
def get(app: App, id: int) -> None:
    """Show a settled message."""
    with app.begin() as work:
        info = work.service.archived.get(id)
    app.emit_one(views.archived(info))


@archive.command()
@ids_argument
@ids_option
@click.option("--delay", type=DURATION, default="0", help="Visible after so long.")
@click.option("--attempts", type=click.IntRange(1), help="How many more attempts it gets.")
@pass_app
def requeue(
    app: App, ids: tuple[int, ...], more: tuple[int, ...], delay: timedelta, attempts: int | None
) -> None:
    """Move settled messages back into their queues, under the ids that they had."""
    requeue_ids(app, (*ids, *more), delay, attempts)


@archive.command()
@of_queue
@ids_option
@worker_option
@outcome_option
@click.option("--older-than", type=DURATION, help="Only what was settled so long ago.")
@chunk_option
@yes_option
@dry_run_option
@pass_app
def delete(
    app: App,
    queue: str | None,
    more: tuple[int, ...],
    chunk: int,
    yes: bool,
    dry_run: bool,
    **which: Any,
) -> None:
    """Delete settled messages: those of a queue, or by --id."""
    from .queries import Settled  # noqa: PLC0415

    if (queue is None) == (not more):
        raise click.UsageError("name a queue, or give --id: one of them")
    if more:
        delete_ids(app, more, yes=yes, dry_run=dry_run)
        return
    delete_settled(app, "delete", Settled(queue, **which), chunk, yes=yes, dry_run=dry_run)


@archive.command()
@of_queue
@click.option("--older-than", type=DURATION, help="Each queue's own retention unless given.")
@chunk_option
@yes_option
@dry_run_option
@pass_app
def prune(
    app: App,
    queue: str | None,
    older_than: timedelta | None,
    chunk: int,
    yes: bool,
    dry_run: bool,
) -> None:
    """Delete what was settled long enough ago."""
    from .queries import Settled  # noqa: PLC0415

    settled = Settled(queue, older_than=older_than, by_retention=older_than is None)
    delete_settled(app, "prune", settled, chunk, yes=yes, dry_run=dry_run)


def delete_settled(
    app: App, action: str, settled: Settled, chunk: int, *, yes: bool, dry_run: bool
) -> None:
    """Delete some of the archive in chunks, after asking: what was counted, and nothing else."""
    with app.begin() as work:
        ids = settled.ids(work.service, work.session)
    total = len(ids)
    if confirmed(app, "delete", total, _what(settled), yes=yes, dry_run=dry_run):
        total = in_slices("deleting", total, deleting(app, ids), chunk)
    app.emit_one(views.done(action, total, queue=settled.queue, dry_run=dry_run))


def deleting(app: App, ids: Sequence[int]) -> Callable[[slice], int]:
    """Return a step that deletes some of the archive, in a transaction of its own."""

    def step(part: slice) -> int:
        with app.begin() as work:
            return work.service.archived.delete(ids[part])

    return step


def delete_ids(
    app: App,
    ids: Sequence[int],
    action: str = "delete",
    *,
    yes: bool,
    dry_run: bool,
    check: Callable[[Any], None] = lambda _info: None,
) -> None:
    """Delete settled messages by the archive's ids, after asking."""
    with app.begin() as work:
        for id_ in ids:
            check(work.service.archived.get(id_))
    count = len(set(ids))
    if confirmed(app, "delete", count, "settled message(s)", yes=yes, dry_run=dry_run):
        with app.begin() as work:
            count = work.service.archived.delete(ids)
    app.emit_one(views.done(action, count, queue=None, dry_run=dry_run))


def requeue_ids(
    app: App, ids: Sequence[int], delay: timedelta = timedelta(0), attempts: int | None = None
) -> None:
    """Requeue all of these, or none."""
    if not ids:
        raise click.UsageError("Missing id: ID or --id")
    with app.begin() as work:
        receipts = work.service.archived.requeue_many(ids, delay=delay, attempts=attempts)
    app.emit([views.receipt(one) for one in receipts])


def _what(settled: Settled) -> str:
    words = [settled.outcome or "settled", "message(s)"]
    if settled.queue:
        words.append(f"of queue {settled.queue!r}")
    if settled.worker:
        words.append(f"of worker {settled.worker}")
    if settled.older_than:
        words.append(f"older than {settled.older_than}")
    if settled.by_retention:
        words.append("past the retention of their queues")
    return " ".join(words)

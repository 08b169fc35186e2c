"""``pgqrs archive`` and ``pgqrs dead``: settled messages, and the dead letters among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Group, add_call, pass_app
from .failures import NOT_FOUND, PROBLEMS, Failed
from .messages import worker_option
from .params import (
    DURATION,
    JSON,
    bulk_options,
    confirmed,
    content_page_options,
    given,
    in_slices,
    together,
)

if TYPE_CHECKING:
    from .queries import Settled

__all__ = ["archive", "dead", "deleting"]

OUTCOMES = ("archived", "dead", "cancelled", "discarded")

identified = given("id", "--id", type=click.IntRange(1), what="The message's id.")
of_queue = given("queue", "--queue", "-q", required=False, what="Of this queue only.")
outcome_option = click.option("--outcome", type=click.Choice(OUTCOMES), help="Only with this one.")
ids_argument = click.argument("ids", nargs=-1, type=click.IntRange(1), metavar="[ID]...")
ids_option = click.option("--id", "more", multiple=True, type=click.IntRange(1), metavar="ID")
delay_option = click.option("--delay", type=DURATION, default="0", help="Visible after so long.")
dead_letters = together(
    ids_argument,
    ids_option,
    click.option("--queue", "-q", help="All those of this queue."),
    click.option("--all", "all_", is_flag=True, help="Those of every queue."),
)


@click.group(cls=Group)
def archive() -> None:
    """Settled messages: look, requeue, delete. They keep their ids."""


@archive.command("list")
@of_queue
@worker_option
@outcome_option
@click.option("--message", type=click.IntRange(1), help="What had this id while it was live.")
@click.option("--payload", type=JSON, help="Only with a payload that contains this.")
@content_page_options
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
    """List settled messages by id."""
    from .queries import Settled  # noqa: PLC0415 - SQLAlchemy takes a while

    page = {"limit": limit, "after": after, "content": content, "timeout": timeout}
    contains = None if payload is None else payload[0]
    _list(app, every, Settled(**which), payload=contains, **page)


def _list(app: App, every: timedelta | None, settled: Settled, **page: Any) -> None:
    """List settled messages, and say how to see the next page."""

    def produce() -> list[dict[str, Any]]:
        with app.begin() as work:
            found = work.service.archived.find(
                settled.queue, outcome=settled.outcome, where=settled.criteria(), **page
            )
        return [views.archived(info) for info in found]

    app.show_page(produce, views.ARCHIVED, every, views.ARCHIVED_KEYS, page["limit"])


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


add_call(archive, identified, "archived.get", "Show a settled message.", views.archived)


@archive.command()
@ids_argument
@ids_option
@delay_option
@click.option("--attempts", type=click.IntRange(1), help="How many more attempts it gets.")
@pass_app
def requeue(app: App, ids: tuple[int, ...], more: tuple[int, ...], **options: Any) -> None:
    """Move settled messages back into their queues, under the ids that they had."""
    _requeue_ids(app, (*ids, *more), options)


@archive.command()
@of_queue
@ids_option
@worker_option
@outcome_option
@click.option("--older-than", type=DURATION, help="Only what was settled so long ago.")
@bulk_options
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
    settled = Settled(queue, **which)
    _delete(app, "delete", more or settled, chunk, yes=yes, dry_run=dry_run)


@archive.command()
@of_queue
@click.option("--older-than", type=DURATION, help="Default: each queue's own retention.")
@bulk_options
@pass_app
def prune(
    app: App, queue: str | None, older_than: timedelta | None, chunk: int, **asked: bool
) -> None:
    """Delete what was settled long enough ago."""
    from .queries import Settled  # noqa: PLC0415

    settled = Settled(queue, older_than=older_than, by_retention=older_than is None)
    _delete(app, "prune", settled, chunk, **asked)


# Dead letters


@click.group(cls=Group)
def dead() -> None:
    """Dead letters: look, retry, discard."""


@dead.command("list")
@of_queue
@content_page_options
@pass_app
def list_dead(app: App, queue: str | None, every: timedelta | None, **page: Any) -> None:
    """List dead letters, with the reason and the last error of each."""
    from .queries import Settled  # noqa: PLC0415 - SQLAlchemy takes a while

    _list(app, every, Settled(queue, "dead"), **page)


@dead.command()
@dead_letters
@delay_option
@click.option("--attempts", type=click.IntRange(1), help="How many more attempts each gets.")
@bulk_options
@pass_app
def retry(app: App, chunk: int, yes: bool, dry_run: bool, **options: Any) -> None:
    """Move dead letters back into their queues, by id or in bulk."""
    chosen = _dead_letters(app, options)
    if not isinstance(chosen, Sequence):
        _retry_all(app, chosen, options, chunk, yes=yes, dry_run=dry_run)
    elif dry_run:
        count = len(set(chosen))
        app.say(f"would requeue {count} dead letter(s)")
        app.emit_one(views.done("retry", count, queue=None, skipped=0, dry_run=True))
    else:
        _requeue_ids(app, chosen, options)


@dead.command()
@dead_letters
@bulk_options
@pass_app
def discard(app: App, chunk: int, **options: Any) -> None:
    """Delete dead letters for good, by id or in bulk."""
    chosen = _dead_letters(app, options)
    _delete(app, "discard", chosen, chunk, **options)


def _dead_letters(app: App, options: dict[str, Any]) -> Sequence[int] | Settled:
    """Take the options of `dead_letters`; return ids of dead letters, or those in bulk."""
    from .queries import Settled  # noqa: PLC0415

    ids, queue = (*options.pop("ids"), *options.pop("more")), options.pop("queue")
    if sum((bool(ids), queue is not None, options.pop("all_"))) != 1:
        raise click.UsageError("give ids, or --queue, or --all: one of them")
    if not ids:
        return Settled(queue, "dead")
    with app.begin() as work:
        for id_ in ids:
            if work.service.archived.get(id_).outcome != "dead":
                raise Failed(
                    f"archived message {id_} is no dead letter",
                    hint="pgqrs dead list; pgqrs archive has the others",
                    code=NOT_FOUND,
                )
    return ids


# Delete and requeue


def _delete(
    app: App,
    action: str,
    chosen: Sequence[int] | Settled,
    chunk: int,
    *,
    yes: bool,
    dry_run: bool,
) -> None:
    """Delete settled messages after asking: by id in one transaction, or in chunks.

    In chunks, exactly the messages that were counted are deleted.
    """
    if isinstance(chosen, Sequence):
        queue, what = None, "settled message(s)"
        with app.begin() as work:
            for id_ in chosen:
                work.service.archived.get(id_)
        ids, total = chosen, len(set(chosen))
    else:
        queue, what = chosen.queue, _described(chosen)
        with app.begin() as work:
            ids = chosen.ids(work.service, work.session)
        total = len(ids)
    if confirmed(app, "delete", total, what, yes=yes, dry_run=dry_run):
        step = deleting(app, ids)
        total = step(slice(None)) if ids is chosen else in_slices("deleting", total, step, chunk)
    app.emit_one(views.done(action, total, queue=queue, dry_run=dry_run))


def deleting(app: App, ids: Sequence[int]) -> Callable[[slice], int]:
    """Return a step that deletes a slice of these ids from the archive in a transaction."""

    def step(part: slice) -> int:
        with app.begin() as work:
            return work.service.archived.delete(ids[part])

    return step


def _described(settled: Settled) -> str:
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


def _requeue_ids(app: App, ids: Sequence[int], options: dict[str, Any]) -> None:
    """Requeue all of these, or none."""
    if not ids:
        raise click.UsageError("Missing id: ID or --id")
    with app.begin() as work:
        receipts = work.service.archived.requeue_many(ids, **options)
    app.emit([views.receipt(receipt) for receipt in receipts])


def _retry_all(
    app: App, settled: Settled, options: dict[str, Any], chunk: int, *, yes: bool, dry_run: bool
) -> None:
    with app.begin() as work:
        ids = settled.ids(work.service, work.session)
    total = len(ids)
    job = _Retry(app, ids, options)
    where = "of every queue" if settled.queue is None else f"of queue {settled.queue!r}"
    if confirmed(app, "requeue", total, f"dead letter(s) {where}", yes=yes, dry_run=dry_run):
        total = in_slices("requeueing", total, job.step, chunk)
    about = {"queue": settled.queue, "skipped": len(job.skipped)}
    app.emit_one(views.done("retry", total, dry_run=dry_run, **about))
    if job.skipped:
        listed = ", ".join(map(str, job.skipped[:10]))
        raise Failed(
            f"{len(job.skipped)} stayed, since a live message has the key of each: {listed}",
            hint="settle that one first, or discard these",
            code=PROBLEMS,
        )


class _Retry:
    """A bulk retry of the dead letters that were counted.

    Attributes:
        skipped: The ids of those that were not requeued, since a live message has their key.
    """

    def __init__(self, app: App, ids: Sequence[int], options: dict[str, Any]) -> None:
        self._app = app
        self._ids = ids
        self._options = options
        self.skipped: list[int] = []

    def step(self, part: slice) -> int:
        """Requeue a slice in one transaction, as far as possible; return how many."""
        from ..errors import DuplicateMessage, InvalidArgument, MessageNotFound  # noqa: PLC0415
        from .queries import still_archived  # noqa: PLC0415

        with self._app.begin() as work:
            ids = still_archived(work.session, self._ids[part])
            try:
                return len(work.service.archived.requeue_many(ids, **self._options))
            except (DuplicateMessage, InvalidArgument, MessageNotFound):
                # Nothing was requeued: a key is live, two of them share a key, or another process
                # has just removed a message from the archive. Try each by itself.
                return sum(self._requeue(work.service, id_) for id_ in ids)

    def _requeue(self, service: Any, id_: int) -> bool:
        from ..errors import DuplicateMessage, MessageNotFound  # noqa: PLC0415

        try:
            service.archived.requeue(id_, **self._options)
        except DuplicateMessage:
            self.skipped.append(id_)
        except MessageNotFound:
            pass
        else:
            return True
        return False

"""``pgqrs dead``: the part of the archive that somebody has to look at."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import views
from .app import App, Group, pass_app
from .archive import (
    delete_ids,
    delete_settled,
    ids_argument,
    ids_option,
    listing,
    of_queue,
    requeue_ids,
)
from .confirm import confirmed, in_slices
from .failures import NOT_FOUND, PROBLEMS, Failed
from .params import (
    DURATION,
    after_option,
    chunk_option,
    content_option,
    dry_run_option,
    limit_option,
    timeout_option,
    watch_option,
    yes_option,
)

if TYPE_CHECKING:
    from .queries import Settled

__all__ = ["dead"]

everything = click.option("--all", "all_", is_flag=True, help="Those of every queue.")
in_queue = click.option("--queue", "-q", help="All those of this queue.")


@click.group(cls=Group)
def dead() -> None:
    """Dead letters: look, retry, discard. The ids are the archive's."""


@dead.command("list")
@of_queue
@content_option
@limit_option
@after_option
@timeout_option
@watch_option
@pass_app
def list_(app: App, queue: str | None, every: timedelta | None, **page: Any) -> None:
    """List dead letters, with the reason and the last error of each."""
    from .queries import Settled  # noqa: PLC0415 - SQLAlchemy takes a while

    listing(app, every, Settled(queue, "dead"), **page)


@dead.command()
@ids_argument
@ids_option
@in_queue
@everything
@click.option("--delay", type=DURATION, default="0", help="Visible after so long.")
@click.option("--attempts", type=click.IntRange(1), help="How many more attempts each gets.")
@chunk_option
@yes_option
@dry_run_option
@pass_app
def retry(
    app: App,
    ids: tuple[int, ...],
    more: tuple[int, ...],
    queue: str | None,
    all_: bool,
    delay: timedelta,
    attempts: int | None,
    chunk: int,
    yes: bool,
    dry_run: bool,
) -> None:
    """Move dead letters back into their queues, by id or in bulk."""
    chosen = (*ids, *more)
    settled = _which(app, chosen, queue, all_)
    if settled is None:
        if dry_run:
            count = len(set(chosen))
            app.say(f"would requeue {count} dead letter(s)")
            app.emit_one(views.done("retry", count, queue=None, skipped=0, dry_run=True))
            return
        requeue_ids(app, chosen, delay, attempts)
        return
    _retry_all(app, settled, delay, attempts, chunk, yes=yes, dry_run=dry_run)


@dead.command()
@ids_argument
@ids_option
@in_queue
@everything
@chunk_option
@yes_option
@dry_run_option
@pass_app
def discard(
    app: App,
    ids: tuple[int, ...],
    more: tuple[int, ...],
    queue: str | None,
    all_: bool,
    chunk: int,
    yes: bool,
    dry_run: bool,
) -> None:
    """Delete dead letters for good, by id or in bulk."""
    chosen = (*ids, *more)
    settled = _which(app, chosen, queue, all_)
    if settled is None:
        delete_ids(app, chosen, "discard", yes=yes, dry_run=dry_run)
        return
    delete_settled(app, "discard", settled, chunk, yes=yes, dry_run=dry_run)


def _which(app: App, ids: Sequence[int], queue: str | None, all_: bool) -> Settled | None:
    """Return what is meant in bulk, or None when ids are, all of which are of dead letters."""
    from .queries import Settled  # noqa: PLC0415

    if sum((bool(ids), queue is not None, all_)) != 1:
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
    return None


def _retry_all(
    app: App,
    settled: Settled,
    delay: timedelta,
    attempts: int | None,
    chunk: int,
    *,
    yes: bool,
    dry_run: bool,
) -> None:
    with app.begin() as work:
        ids = settled.ids(work.service, work.session)
    total = len(ids)
    job = _Retry(app, ids, {"delay": delay, "attempts": attempts})
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
    """A bulk retry of the dead letters that were counted."""

    def __init__(self, app: App, ids: Sequence[int], options: dict[str, Any]) -> None:
        self._app = app
        self._ids = ids
        self._options = options
        self.skipped: list[int] = []

    def step(self, part: slice) -> int:
        """Requeue some in one transaction, what can be of them; return how many."""
        from ..errors import DuplicateMessage, InvalidArgument, MessageNotFound  # noqa: PLC0415
        from .queries import still_archived  # noqa: PLC0415

        with self._app.begin() as work:
            ids = still_archived(work.session, self._ids[part])
            try:
                return len(work.service.archived.requeue_many(ids, **self._options))
            except (DuplicateMessage, InvalidArgument, MessageNotFound):
                # Nothing was moved: some key is live, two of them share one, or somebody else has
                # just taken one from the archive. One by one, then.
                return sum(self._one(work.service, id_) for id_ in ids)

    def _one(self, service: Any, id_: int) -> bool:
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

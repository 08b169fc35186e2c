"""``pgqrs message``."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import click

from . import views
from .app import App, Group, Work, pass_app
from .failures import NOT_FOUND, PROBLEMS, Failed
from .params import (
    DURATION,
    JSON,
    MOMENT,
    ask_options,
    attempts_option,
    confirmed,
    content_page_options,
    exclusive,
    given,
)

__all__ = ["listing", "message"]

STATES = ("ready", "scheduled", "leased", "exhausted")

identified = given("id", "--id", type=click.IntRange(1), what="The message's id.")
in_queue = given("queue", "--queue", "-q", what="The queue's name.")
of_queue = click.option("--queue", "-q", help="Only if it is a message of this queue.")
token_option = click.option(
    "--token", type=click.IntRange(1), help="The fencing token that `dequeue` printed: your lease."
)
worker_option = click.option("--worker", type=click.IntRange(1), help="A worker's id.")


@click.group(cls=Group)
def message() -> None:
    """Messages: enqueue, dequeue, look, settle, cancel.

    `dequeue` prints an id and a fencing token. Together they are the lease: `archive` and `delete`
    with both settle what you hold, and change nothing once somebody else holds it. Without
    --token they only touch a message that nobody holds.
    """


def listing(app: App, every: timedelta | None, **page: Any) -> None:
    """List live messages, and say how to see the next page."""

    def produce() -> list[dict[str, Any]]:
        from .queries import now  # noqa: PLC0415 - SQLAlchemy takes a while

        with app.begin() as work:
            moment = now(work.session)
            return [views.message(info, moment) for info in work.service.messages.find(**page)]

    app.show_page(produce, views.MESSAGES, every, views.MESSAGE_KEYS, page["limit"])


@message.command()
@in_queue
@click.option("--payload", type=JSON, required=True, help="JSON, or - for stdin.")
@click.option("--delay", type=DURATION, help="Visible after so long.")
@click.option("--at", type=MOMENT, help="Visible at this time, with its offset.")
@click.option("--priority", type=int, default=0, help="Lower goes first.")
@click.option("--headers", type=JSON, help="A JSON object stored with the payload.")
@click.option("--key", help="Only one live message has it.")
@attempts_option
@worker_option
@pass_app
def enqueue(
    app: App,
    queue: str,
    payload: tuple[Any],
    headers: tuple[Any] | None,
    worker: int | None,
    **options: Any,
) -> None:
    """Put a message into a queue."""
    from ..service import QueueService  # noqa: PLC0415

    exclusive(delay=options["delay"], at=options["at"])
    with app.begin() as work:
        service = QueueService(work.session, worker=worker)
        given = None if headers is None else headers[0]
        receipt = service.enqueue(queue, payload[0], headers=given, **options)
    if receipt.duplicate:
        app.say(f"message {receipt.id} is live under this key: no second one was made")
    app.emit_one(views.receipt(receipt, queue))


@message.command()
@in_queue
@click.option("--limit", type=click.IntRange(1), default=1, show_default=True)
@click.option("--lease", "--lock-time", type=DURATION, help="How long they are yours.")
@worker_option
@pass_app
def dequeue(app: App, queue: str, limit: int, lease: timedelta | None, worker: int | None) -> None:
    """Lease messages: id and fencing token are what settles them later."""
    if limit > app.settings.default_max_batch_size:
        most = app.settings.default_max_batch_size
        raise click.UsageError(f"--limit {limit} is more than default_max_batch_size={most}")
    with app.begin() as work:
        leased = work.service.dequeue(queue, limit, lease=lease, worker=worker)
    if not leased:
        app.say(f"nothing is visible in queue {queue!r}")
    rows = [views.delivery(delivery) for delivery in leased]
    app.emit(rows, views.DELIVERIES, views.DELIVERY_KEYS)
    if leased:
        first = leased[0]
        app.say(f"when done: pgqrs message archive {first.id} --token {first.fencing_token}")


@message.command("list")
@given("queue", "--queue", "-q", required=False, what="Of this queue only.")
@click.option("--state", type=click.Choice(STATES), help="Only in this state.")
@click.option("--payload", type=JSON, help="Only with a payload that contains this.")
@content_page_options
@pass_app
def list_(
    app: App, queue: str | None, payload: tuple[Any] | None, every: timedelta | None, **page: Any
) -> None:
    """List live messages by id."""
    contains = None if payload is None else payload[0]
    listing(app, every, queue=queue, payload=contains, **page)


@message.command()
@identified
@of_queue
@pass_app
def get(app: App, id: int, queue: str | None) -> None:
    """Show a live message."""
    from .queries import now  # noqa: PLC0415

    with app.begin() as work:
        _check_queue(work, id, queue)
        row = views.message(work.service.messages.get(id), now(work.session))
    app.emit_one(row)


@message.command()
@in_queue
@click.option("--state", type=click.Choice(STATES), help="Only in this state.")
@pass_app
def count(app: App, queue: str, state: str | None) -> None:
    """Count the live messages of a queue."""
    from .queries import count_live  # noqa: PLC0415 - SQLAlchemy takes a while

    with app.begin() as work:
        work.service.queues.get(queue)
        count = count_live(work.session, queue, state)
    app.emit_one({"queue": queue, "state": state, "count": count})


@message.command()
@identified
@of_queue
@token_option
@click.option("--reason", help="Kept with it.")
@pass_app
def archive(app: App, id: int, queue: str | None, token: int | None, reason: str | None) -> None:
    """Settle a message and keep it in the archive.

    With --token: what you leased, as done. Without: one that nobody holds, as cancelled.
    """
    outcome = "cancelled" if token is None else "archived"
    with app.begin() as work:
        _check_queue(work, id, queue)
        if token is None:
            work.service.messages.cancel(id, reason=reason)
        else:
            work.service.archive(_held(work, id, token), reason=reason)
    if token is None:
        app.say(f"nobody held message {id}: it is archived as cancelled")
    app.emit_one({"action": "archive", "id": id, "outcome": outcome})


@message.command()
@identified
@of_queue
@token_option
@ask_options
@pass_app
def delete(
    app: App, id: int, queue: str | None, token: int | None, yes: bool, dry_run: bool
) -> None:
    """Settle a message and keep nothing of it.

    With --token: what you leased. Without: one that nobody holds.
    """
    with app.begin() as work:
        _check_queue(work, id, queue)
        info = work.service.messages.get(id)
    what = f"message, {id} of queue {info.queue!r} ({info.state})"
    if confirmed(app, "delete", 1, what, yes=yes, dry_run=dry_run):
        with app.begin() as work:
            if token is None:
                _delete_unheld(work, id)
            else:
                work.service.delete(_held(work, id, token))
    app.emit_one({"action": "delete", "id": id, "dry_run": dry_run})


@message.command()
@identified
@click.option("--reason", help="Kept with it.")
@pass_app
def cancel(app: App, id: int, reason: str | None) -> None:
    """Move a message that nobody holds to the archive, as cancelled."""
    with app.begin() as work:
        work.service.messages.cancel(id, reason=reason)
    app.emit_one({"action": "cancel", "id": id, "outcome": "cancelled"})


@message.command()
@identified
@click.option("--delay", type=DURATION, help="Visible after so long.")
@click.option("--at", type=MOMENT, help="Visible at this time, with its offset.")
@pass_app
def reschedule(app: App, id: int, delay: timedelta | None, at: datetime | None) -> None:
    """Move a message that nobody holds to another time."""
    exclusive(delay=delay, at=at)
    with app.begin() as work:
        receipt = work.service.messages.reschedule(id, delay=delay, at=at)
    app.emit_one(views.receipt(receipt))


def _check_queue(work: Work, id: int, queue: str | None) -> None:
    """Raise unless a live or settled message is of a queue. A message never changes its queue."""
    from ..errors import MessageNotFound  # noqa: PLC0415
    from .queries import Settled  # noqa: PLC0415

    if queue is None:
        return
    work.service.queues.get(queue)
    try:
        found = work.service.messages.get(id).queue
    except MessageNotFound:
        past = work.service.archived.find(where=Settled(message=id).criteria(), limit=1)
        if not past:
            raise
        found = past[0].queue
    if found != queue:
        hint = f"it is a message of queue {found!r}"
        raise Failed(f"no message with id {id} in queue {queue!r}", hint=hint, code=NOT_FOUND)


def _held(work: Work, id: int, token: int) -> Any:
    from ..errors import LeaseLost, MessageNotFound, Whereabouts  # noqa: PLC0415
    from .queries import Settled, delivery  # noqa: PLC0415

    try:
        return delivery(work.service.messages.get(id), token)
    except MessageNotFound:
        past = work.service.archived.find(where=Settled(message=id).criteria(), limit=1)
        if not past:
            raise
        lost = Whereabouts(id, past[0].outcome, past[0].read_ct)
        raise LeaseLost({id: lost}) from None


def _delete_unheld(work: Work, id: int) -> None:
    from .queries import Settled  # noqa: PLC0415

    find, where = work.service.archived.find, Settled(message=id).criteria()
    before = {info.id for info in find(where=where)}
    # Through the archive, in the same transaction: cancel() does not touch a leased message.
    work.service.messages.cancel(id, reason="deleted")
    gone = [info.id for info in find(where=where, limit=1000) if info.id not in before]
    if work.service.archived.delete(gone) != 1:
        raise Failed(f"message {id} is being changed by others: try again", code=PROBLEMS)

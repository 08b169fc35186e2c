"""``pgqrs worker run`` and ``pgqrs worker check``: an application's consumer, as a process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from .app import App, Command, pass_app
from .failures import CANNOT_CONNECT, PROBLEMS, Failed, failure
from .output import Column, Row, span
from .params import DURATION, together

if TYPE_CHECKING:
    from ..consumer.handlers import Handler
    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from ..types import WorkerInfo
    from .counter import Counter

    AnyConsumer = Consumer | AsyncConsumer

__all__ = ["check", "run"]

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


@click.command(cls=Command)
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
    from .counter import Counter  # noqa: PLC0415 - SQLAlchemy takes a while

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


@click.command(cls=Command)
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


def _loaded(app: App, target: str, queues: Sequence[str]) -> AnyConsumer:
    from .target import load  # noqa: PLC0415 - the application takes a while

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

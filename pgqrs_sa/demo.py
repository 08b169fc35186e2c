"""A small shop, end to end, on a real server: ``python -m pgqrs_sa demo``.

The sample host of the repository (its Alembic history and its models) is migrated on a throw-away
server, or in a scratch database of the server that ``PGQRS_DSN`` names. The shop then writes orders
together with the messages that will send their receipts, and rolls some back; two consumer
processes drain the queues, one of which is killed while it holds a lease; and at the end the
counts must add up.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from . import dsns, embedded
from .service import QueueService
from .settings import database_url
from .types import Delivery

__all__ = ["run"]

ORDERS = 16
ROLLED_BACK = range(3, ORDERS, 4)  # every fourth order is refused after its message was enqueued
LEASE_SECONDS = 2.0
SENDING_SECONDS = 0.02  # what it takes to send a receipt
DEADLINE_SECONDS = 60.0
_CONNECT = {"prepare_threshold": None}  # so that the address may be PgBouncer's


class _Refused(Exception):
    """The order is refused: its transaction rolls back."""


@dataclass
class _Story:
    """The events of the demo: printed as they happen, and counted for the end."""

    counts: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def tell(self, who: str, what: str, *count: str) -> None:
        """Print a line, and count what it tells."""
        self.counts.update(count)
        elapsed = time.monotonic() - self.started
        _console()(f"{elapsed:5.1f}s  {who:<10}  {what}")


def run() -> int:
    """Run the demo; return 0 if its counts add up, and 1 if they do not."""
    story = _Story()
    with _database(story) as url:
        _migrate(url, story)
        engine = sa.create_engine(url, connect_args=_CONNECT)
        try:
            _set_up(engine)
            _sell(engine, story)
            _remind(engine, story)
            _consume(url, story)
            return _balance(engine, story)
        finally:
            engine.dispose()


@contextmanager
def _database(story: _Story) -> Iterator[str]:
    """Yield the URL of a database that is dropped afterwards."""
    if dsn := os.environ.get("PGQRS_DSN"):
        with _scratch_database(database_url(dsn, without_asyncio=True), story) as url:
            yield url
        return
    story.tell("server", "starting a throw-away PostgreSQL server")
    with embedded.start() as server:
        story.tell("server", "it runs, on a Unix socket of its own")
        yield server.dsn().replace("postgresql:", "postgresql+psycopg:", 1)


@contextmanager
def _scratch_database(url: sa.URL, story: _Story) -> Iterator[str]:
    # Never in the database that was named: it belongs to the user.
    url = url.set(drivername="postgresql+psycopg")
    name = f"pgqrs_demo_{os.getpid()}"
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    story.tell("server", f"using {dsns.shown(url)}, in the scratch database {name}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def _sample_host() -> Path:
    """Return the folder that holds the sample host: the checkout, or its copy in the wheel."""
    inside = Path(__file__).parent / "sample_host"
    return inside if inside.is_dir() else Path(__file__).parents[1]


def _order() -> Any:
    """Return the shop's own model of an order."""
    examples = str(_sample_host() / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    from shop_models import Order  # noqa: PLC0415

    return Order


def _migrate(url: str, story: _Story) -> None:
    from alembic import command  # noqa: PLC0415 - an extra that only the demo needs
    from alembic.config import Config  # noqa: PLC0415

    _order()
    config = Config()
    config.set_main_option("script_location", str(_sample_host() / "alembic").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=_CONNECT)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        command.check(config)
    story.tell("alembic", "upgrade head: the shop's own history made its tables and the queue's")


def _set_up(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.queues.create("receipts", lease=LEASE_SECONDS)
        service.queues.create("reminders")


def _sell(engine: sa.Engine, story: _Story) -> None:
    """Write orders, each in one transaction with the message that will send its receipt."""
    order_class = _order()
    for number in range(ORDERS):
        try:
            with Session(engine) as session, session.begin():
                order = order_class(customer=f"customer {number}", total_cents=100 * number)
                session.add(order)
                session.flush()
                payload = {"number": str(number), "order": order.id}
                order.receipt_id = QueueService(session).enqueue("receipts", payload).id
                _check_stock(number)
        except _Refused:
            story.tell("shop", f"order {number}: rolled back, and its message with it", "refused")
        else:
            story.tell("shop", f"order {number}: committed, with its message", "sold")


def _check_stock(number: int) -> None:
    if number in ROLLED_BACK:
        raise _Refused


def _remind(engine: sa.Engine, story: _Story) -> None:
    """Schedule three reminders, and cancel the second by its payload."""
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        for seconds in (1, 2, 3):
            service.enqueue("reminders", {"number": f"reminder {seconds}"}, delay=seconds)
            story.tell("shop", f"reminder {seconds}: scheduled {seconds} s ahead", "scheduled")
    with Session(engine) as session, session.begin():
        cancelled = QueueService(session).messages.cancel_where(
            "reminders", payload={"number": "reminder 2"}, reason="the demo says so"
        )
    story.tell("shop", "reminder 2: cancelled by its payload", *["cancelled"] * cancelled)


def _consume(url: str, story: _Story) -> None:
    """Drain the queues with two processes, and kill the first while it holds a lease."""
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    pipes: dict[Connection, str] = {}
    processes = {}
    for name, fragile in (("consumer A", True), ("consumer B", False)):
        here, there = spawn.Pipe(duplex=False)
        processes[name] = spawn.Process(
            target=_consumer, args=(url, there, start, fragile), daemon=True
        )
        processes[name].start()
        there.close()
        pipes[here] = name
    expected = story.counts["sold"] + story.counts["scheduled"] - story.counts["cancelled"]
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while pipes and story.counts["handled"] < expected and time.monotonic() < deadline:
            for pipe in wait(list(pipes), timeout=1.0):
                _hear(pipe, pipes, processes, story)  # type: ignore[arg-type]
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    # The database is read after every process has ended: their own reports prove nothing.
    story.tell("audit", "both consumers are gone")


def _hear(
    pipe: Connection, pipes: dict[Connection, str], processes: dict[str, Any], story: _Story
) -> None:
    """Print what a consumer reports, and kill it when it reports that it holds a message."""
    name = pipes[pipe]
    try:
        event, number, attempt = pipe.recv()
    except EOFError:
        del pipes[pipe]
        return
    label = number if number.startswith("reminder") else f"order {number}"
    if event == "holds":
        story.tell(name, f"{label}: leased, and working on it")
        processes[name].kill()
        processes[name].join()
        story.tell("SIGKILL", f"{name} is dead; nobody is told about its lease", "killed")
    elif attempt > 1:
        story.tell(
            name, f"{label}: came back by itself, attempt {attempt}; done", "handled", "returned"
        )
    else:
        story.tell(name, f"{label}: done", "handled")


def _consumer(url: str, pipe: Connection, start: Barrier, fragile: bool) -> None:
    """Work until killed; if ``fragile``, report the first message and never finish it."""
    engine = sa.create_engine(url, connect_args=_CONNECT)
    # A fragile consumer holds a single message when it is killed: it leases from one queue.
    queues = ("receipts",) if fragile else ("receipts", "reminders")
    start.wait()
    while True:
        deliveries = []
        for queue in queues:
            with Session(engine) as session, session.begin():
                deliveries += QueueService(session).dequeue(queue)
        for delivery in deliveries:
            number = delivery.payload["number"]
            if fragile:
                pipe.send(("holds", number, delivery.read_ct))
                time.sleep(DEADLINE_SECONDS)
            _handle(engine, delivery)
            pipe.send(("done", number, delivery.read_ct))
        if not deliveries:
            time.sleep(0.05)


def _handle(engine: sa.Engine, delivery: Delivery) -> None:
    """Send a receipt: the shop's own row and the acknowledgement commit together."""
    order_class = _order()
    time.sleep(SENDING_SECONDS)
    with Session(engine) as session, session.begin():
        if "order" in delivery.payload:
            session.execute(
                sa.update(order_class)
                .where(order_class.id == delivery.payload["order"])
                .values(receipts_sent=order_class.receipts_sent + 1)
            )
        QueueService(session).archive(delivery)


def _balance(engine: sa.Engine, story: _Story) -> int:
    """Print the counts in the database; return 0 if they add up."""
    order_class = _order()
    with Session(engine) as session:
        service = QueueService(session)
        orders = session.scalars(sa.select(order_class.receipts_sent)).all()
        metrics = service.messages.all_metrics()
    counts = story.counts
    live = sum(queue.live for queue in metrics)
    archived = sum(queue.archived for queue in metrics)
    cancelled = sum(queue.cancelled for queue in metrics)
    handled = counts["sold"] + counts["scheduled"] - counts["cancelled"]
    rows = [
        ("orders committed", len(orders), ORDERS - len(ROLLED_BACK)),
        ("orders rolled back", counts["refused"], len(ROLLED_BACK)),
        ("orders with exactly one receipt", sum(sent == 1 for sent in orders), len(orders)),
        ("reminders cancelled", cancelled, 1),
        ("consumers killed while holding a lease", counts["killed"], 1),
        ("messages that came back by themselves", counts["returned"], 1),
        ("messages done and archived", archived, handled),
        ("messages left in the queues", live, 0),
    ]
    _table(rows)
    right = all(found == expected for _, found, expected in rows)
    story.tell("audit", "the counts add up" if right else "THE COUNTS DO NOT ADD UP")
    return 0 if right else 1


def _console() -> Callable[[str], None]:
    if find_spec("rich") is None:
        return lambda line: print(line, flush=True)  # noqa: T201
    from rich.console import Console  # noqa: PLC0415 - an extra

    return Console(soft_wrap=True).print


def _table(rows: list[tuple[str, int, int]]) -> None:
    if find_spec("rich") is None:
        for what, found, expected in rows:
            print(f"{what:<42} {found:>4}  (expected {expected})")  # noqa: T201
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("what", "found", "expected")
    for what, found, expected in rows:
        style = "green" if found == expected else "bold red"
        table.add_row(what, f"[{style}]{found}[/]", str(expected))
    Console().print(table)

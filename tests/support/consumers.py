"""A kit that runs the same handlers in threads and in tasks.

A handler of these tests is a plain function of a session (None, if it takes none) and a delivery
(a list of them in a batch). In an `AsyncConsumer` it runs in SQLAlchemy's greenlet, so that the
same code does the same there; `Kit.wait` waits for an event without blocking the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import await_only, greenlet_spawn

from pgqrs_sa import (
    AsyncConsumer,
    Consumer,
    Delivery,
    Event,
    Hooks,
    QueueService,
)
from support.engines import new_async_engine, new_engine
from support.waiting import PATIENCE, until, until_awaited

_PLAIN = "read_ct, max_read_ct, vt, dequeued_at, consumer_worker_id, last_error"
"""Not the payload, which may be one that cannot be read."""

QUICK: dict[str, Any] = {
    "poll_interval": 0.02,
    "drain_timeout": 60,
    "heartbeat": 0.1,
    "housekeeping": None,
    "concurrency": 4,
}


class Ear(Hooks):
    """Notes what hooks are told, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Event]] = []

    def on_start(self, event: Event) -> None:
        self.heard.append(("on_start", event))

    def on_success(self, event: Event) -> None:
        self.heard.append(("on_success", event))

    def on_retry(self, event: Event) -> None:
        self.heard.append(("on_retry", event))

    def on_dead(self, event: Event) -> None:
        self.heard.append(("on_dead", event))

    def on_lease_lost(self, event: Event) -> None:
        self.heard.append(("on_lease_lost", event))

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


class Driver:
    """A consumer of either kind, as the tests use it."""

    def __init__(self, kit: Kit, settings: dict[str, Any]) -> None:
        self._kit = kit
        self.consumer: Any = kit.made(QUICK | settings)
        self.future: Any = None
        self._thread: threading.Thread | None = None
        self._result: list[Any] = []

    def on(self, queue: str, *, session: bool = True, **options: Any) -> Callable[[Any], Any]:
        """Register a function of a session and a delivery (or a list of them)."""

        def register(function: Any) -> Any:
            many = options.get("batch") is not None
            handler = self._kit.handler(function, session=session, many=many)
            self.consumer.on(queue, **options)(handler)
            return function

        return register

    def run(self, *, until_empty: bool = True) -> int:
        """Run it; raise what it raises."""
        if self._kit.is_async:
            return self._kit.call(lambda: self.consumer.run(until_empty=until_empty))
        end = threading.Timer(2 * PATIENCE, self.consumer.stop)  # fail rather than hang
        end.start()
        try:
            return self.consumer.run(until_empty=until_empty)
        finally:
            end.cancel()
            end.join()

    def start(self) -> Driver:
        """Begin to run, in the background."""

        def run() -> None:
            try:
                self._result.append(self.run(until_empty=False))
            except BaseException as error:  # noqa: BLE001 - for the test
                self._result.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        until(lambda: self.running or self._result, "the consumer runs")
        if self._result:
            self.result()
        return self

    @property
    def running(self) -> bool:
        run = self.consumer._run
        return run is not None and run.runtime.state.worker is not None

    @property
    def runtime(self) -> Any:
        return self.consumer._run.runtime

    def result(self) -> int:
        """Wait for the end; return the exit code, or raise."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the consumer hangs"
        (result,) = self._result
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> int:
        """Stop it; return what `run` returned."""
        if self._thread.is_alive():
            self._kit.stop(self.consumer)
        return self.result()


class Kit:
    """What the tests do, on one database and with one kind of consumer."""

    def __init__(self, url: str, driver: str, async_url: str | None) -> None:
        self.engine = new_engine(url, pool_size=30)
        self.is_async = async_url is not None
        self.driver = driver
        self.options: dict[str, Any] = {"pool_size": 30}
        self._async_url = async_url
        self._url = url
        self._drivers: list[Driver] = []
        self._engines: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self.lose_replies = False
        if self.is_async:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._loop_thread.start()

    # ------------------------------------------------------------------------- consumers

    def app_engine(self, **options: Any) -> Any:
        """The engine that the consumer is given."""
        options = self.options | options
        if self.is_async:
            engine: Any = new_async_engine(self._async_url, **options)
        else:
            engine = new_engine(self._url, **options)
        self._engines.append(engine)
        return engine

    def made(self, settings: dict[str, Any]) -> Any:
        settings = dict(settings)
        engine, maker = settings.pop("engine", None), settings.pop("maker", None)
        maker = maker or self.maker(engine or self.app_engine())
        return (AsyncConsumer if self.is_async else Consumer)(maker, **settings)

    def maker(self, engine: Any, **options: Any) -> Any:
        """The sessionmaker of the consumer's kind."""
        return (async_sessionmaker if self.is_async else sessionmaker)(engine, **options)

    def consumer(self, **settings: Any) -> Driver:
        driver = Driver(self, settings)
        self._drivers.append(driver)
        return driver

    def handler(self, function: Any, *, session: bool, many: bool) -> Any:
        if not self.is_async:
            return _threaded(function, session=session, many=many)
        return _awaited(function, session=session, many=many)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a method of a consumer, and wait for what it returns."""
        if not self.is_async:
            return function()

        async def guarded() -> Any:
            try:
                return await function()
            except BaseException as error:  # noqa: BLE001 - it would end the loop
                return _Raised(error)

        result = asyncio.run_coroutine_threadsafe(guarded(), self._loop).result(2 * PATIENCE)
        if isinstance(result, _Raised):
            raise result.error
        return result

    def stop(self, consumer: Any) -> int:
        return self.call(consumer.stop)

    def wait(self, event: threading.Event) -> None:
        """Wait for an event, in a handler."""
        if greenlet.getcurrent().parent is not None:
            await_only(_awaited_event(event))
        else:
            assert event.wait(PATIENCE)

    def wait_a_moment(self) -> None:
        """Let a moment pass, in a handler."""
        if greenlet.getcurrent().parent is not None:
            await_only(asyncio.sleep(0.005))
        else:
            time.sleep(0.005)

    # -------------------------------------------------------------------------- database

    def queue(self, name: str = "mail", **options: Any) -> None:
        with Session(self.engine) as session, session.begin():
            QueueService(session).queues.create(name, **options)

    def send(self, *payloads: Any, queue: str = "mail", **options: Any) -> list[int]:
        with Session(self.engine) as session, session.begin():
            service = QueueService(session)
            return [service.enqueue(queue, payload, **options).id for payload in payloads]

    def sql(self, text: str, **values: Any) -> Sequence[Any]:
        with self.engine.begin() as connection:
            result = connection.execute(sa.text(text), values)
            return result.all() if result.returns_rows else []

    def steal(self, id: int) -> None:
        """Let somebody else lease a message, as after its lease has run out."""
        self.sql(
            "UPDATE pgqrs_messages SET read_ct = read_ct + 1, consumer_worker_id = NULL,"
            " fencing_token = nextval('pgqrs_messages_fencing_token_seq'),"
            " dequeued_at = now(), leased_until = now() + interval '1 hour' WHERE id = :id",
            id=id,
        )

    def live(self) -> dict[int, Any]:
        """The messages by id."""
        rows = self.sql(f"SELECT id, leased_until, {_PLAIN} FROM pgqrs_messages ORDER BY id")  # noqa: S608
        return {row.id: row for row in rows}

    def archive(self) -> dict[int, Any]:
        """What is in the archive, by id."""
        rows = self.sql(f"SELECT id, outcome, reason, {_PLAIN} FROM pgqrs_archive")  # noqa: S608
        return {row.id: row for row in rows}

    def outcomes(self) -> dict[int, str]:
        return {id_: delivery.outcome for id_, delivery in self.archive().items()}

    def effects(self) -> list[tuple[int, int]]:
        """Which attempts of which messages have had an effect."""
        rows = self.sql("SELECT msg_id, read_ct FROM effects ORDER BY id")
        return [(row.msg_id, row.read_ct) for row in rows]

    def held(self) -> list[int]:
        """The messages that somebody has leased."""
        return [message.id for message in self.live().values() if message.leased_until is not None]

    def workers(self) -> list[Any]:
        return list(self.sql("SELECT * FROM pgqrs_workers ORDER BY id"))

    def close(self) -> None:
        for driver in self._drivers:
            if driver._thread is not None and driver._thread.is_alive():
                with contextlib.suppress(BaseException):
                    driver.stop()
        for engine in self._engines:
            if isinstance(engine, AsyncEngine):
                asyncio.run_coroutine_threadsafe(engine.dispose(), self._loop).result(PATIENCE)
            else:
                engine.dispose()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(PATIENCE)
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
        self.engine.dispose()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _awaited_event(event: threading.Event) -> None:
    await until_awaited(event.is_set, "the event")


def _threaded(function: Any, *, session: bool, many: bool) -> Any:
    if session and many:

        def batch(session: Session, deliveries: list[Delivery]) -> Any:
            return function(session, deliveries)

        return batch
    if session:

        def one(session: Session, delivery: Delivery) -> Any:
            return function(session, delivery)

        return one
    if many:

        def alone_batch(deliveries: list[Delivery]) -> Any:
            return function(None, deliveries)

        return alone_batch

    def alone(delivery: Delivery) -> Any:
        return function(None, delivery)

    return alone


def _awaited(function: Any, *, session: bool, many: bool) -> Any:
    if session and many:

        async def batch(session: AsyncSession, deliveries: list[Delivery]) -> Any:
            return await session.run_sync(function, deliveries)

        return batch
    if session:

        async def one(session: AsyncSession, delivery: Delivery) -> Any:
            return await session.run_sync(function, delivery)

        return one
    if many:

        async def alone_batch(deliveries: list[Delivery]) -> Any:
            return await greenlet_spawn(function, None, deliveries)

        return alone_batch

    async def alone(delivery: Delivery) -> Any:
        return await greenlet_spawn(function, None, delivery)

    return alone


def effect(session: Session | None, delivery: Delivery, note: str = "") -> None:
    """Write something, as the business of a handler."""
    session.execute(
        sa.text("INSERT INTO effects (msg_id, read_ct, note) VALUES (:id, :n, :note)"),
        {"id": delivery.id, "n": delivery.read_ct, "note": note},
    )


def kit_for(database: Any, kind: str) -> Kit:
    """Return a kit of threads, or of tasks over one of the drivers."""
    return Kit(database.url, kind, None if kind == "threads" else database.async_url(kind))

"""A standby is promoted while consumers and producers work, on one URL that names both servers.

Synchronous replication loses nothing that was acknowledged, and gives no fencing token twice.
Asynchronous replication may do both: see docs/how-to/high-availability.md.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from pgqrs_sa import AsyncConsumer, AsyncQueueService, Consumer, Delivery, QueueService
from pgqrs_sa._core.sql.wakeup import channel
from pgqrs_sa.consumer.retrying import is_transient
from pgqrs_sa.settings import database_url
from pgqrs_sa.wakeup import Listener
from support.ledger import Effect, Sent, audit
from support.replica import Standby, either, make_synchronous, standby_of
from support.results import Results
from support.servers import Address, OwnServer, own_server, run_sql
from support.waiting import until

LONG = 120.0
"""Seconds after which something that should have happened did not."""
TOKENS = "pgqrs_messages_fencing_token_seq"
LAST_TOKEN = f"SELECT last_value FROM {TOKENS}"  # noqa: S608 - no input
LISTENING = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND query ~ '^(NOTIFY|LISTEN) '"
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    """A business row. It is unique, so that a commit whose reply was lost is not done again."""

    __tablename__ = "orders"

    unit: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def libpq_form(url: sa.URL) -> str:
    """The same address as people write it."""
    hosts, ports = str(url.query["host"]).split(","), str(url.query["port"]).split(",")
    places = (f"{host.replace('/', '%2F')}:{port}" for host, port in zip(hosts, ports, strict=True))
    attributes = url.query["target_session_attrs"]
    return (
        f"postgresql://{url.username}@{','.join(places)}/{url.database}"
        f"?target_session_attrs={attributes}"
    )


@dataclass
class Seen:
    """What handlers and producers saw, which may differ from the database."""

    acknowledged: set[int] = field(default_factory=set)
    leases: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    woken: list[str | None] = field(default_factory=list)
    unsure: int = 0
    found: int = 0

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Message and token of each lease that a handler was called for, in the order of calls."""
        return [lease for leases in self.leases.values() for lease in leases]


class Load:
    """A producer and a consumer in threads, a producer and a consumer in tasks, and a listener.

    Args:
        dsn: Where, in libpq's form.
        driver: Of the tasks and the listener; the threads have psycopg.
        units: How many business rows are written, each with its message.
    """

    def __init__(self, dsn: str, driver: str, units: int) -> None:
        options = {"pool_pre_ping": True, "pool_size": 10}
        self.engine = sa.create_engine(database_url(dsn), **options)
        self.url = database_url(dsn, driver)
        self.options = options
        self.units = units
        self.seen = Seen()
        self.consumer = Consumer(sessionmaker(self.engine), notify=True, name="threads")
        self.consumer.on("mail", lease=4, concurrency=3)(self._handle)
        self.enough, self.started = threading.Event(), threading.Event()
        self.failed: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._guarded, args=(work,))
            for work in (self._produce, lambda: asyncio.run(self._tasks()))
        ]

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self.failed.append(error)
            raise

    def _handle(self, session: Session, delivery: Delivery) -> None:
        self._write("threads", session, delivery)

    def _write(self, name: str, session: Session | AsyncSession, delivery: Delivery) -> None:
        self.seen.leases[name].append((delivery.id, delivery.fencing_token))
        session.add(Effect(message_id=delivery.id, read_ct=delivery.read_ct, by=name))

    def _produce(self) -> None:
        for unit in range(0, self.units, 2):
            while unit not in self.seen.acknowledged:
                try:
                    with Session(self.engine) as session, session.begin():
                        session.add(Order(unit=unit))
                        receipt = QueueService(session, notify=True).enqueue("mail", {"unit": unit})
                        session.add(Sent(message_id=receipt.id, unit=str(unit)))
                except Exception as error:  # noqa: BLE001
                    self._look(unit, error)
                    threading.Event().wait(0.02)  # the server is away: do not spin
                else:
                    self.seen.acknowledged.add(unit)

    async def _produce_in_task(self, engine: AsyncEngine) -> None:
        for unit in range(1, self.units, 2):
            while unit not in self.seen.acknowledged:
                try:
                    async with AsyncSession(engine) as session, session.begin():
                        session.add(Order(unit=unit))
                        service = AsyncQueueService(session, notify=True)
                        receipt = await service.enqueue("mail", {"unit": unit})
                        session.add(Sent(message_id=receipt.id, unit=str(unit)))
                except Exception as error:  # noqa: BLE001
                    self._look(unit, error)
                    await asyncio.sleep(0.02)
                else:
                    self.seen.acknowledged.add(unit)

    def _look(self, unit: int, error: Exception) -> None:
        """Go on after what a failover brings: try again, until the order is known to be there."""
        if isinstance(error, IntegrityError):
            self.seen.acknowledged.add(unit)  # an earlier commit has happened; its reply was lost
            self.seen.found += 1
        elif is_transient(error):
            self.seen.unsure += 1
        else:
            raise error

    async def _tasks(self) -> None:
        engine = create_async_engine(self.url, **self.options)
        consumer = AsyncConsumer(async_sessionmaker(engine), notify=True, name="tasks")

        @consumer.on("mail", lease=4, concurrency=3)
        async def handle(session: AsyncSession, delivery: Delivery) -> None:
            self._write("tasks", session, delivery)

        listener = Listener(engine, self.seen.woken.append)
        listener.start()
        try:
            async with consumer:
                self.started.set()
                await self._produce_in_task(engine)
                await asyncio.to_thread(self.enough.wait)
        finally:
            await asyncio.to_thread(listener.stop)
            await engine.dispose()

    def __enter__(self) -> Self:
        self.consumer.start()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.enough.set()
        for thread in self.threads:
            thread.join(LONG)
        self.consumer.stop()
        self.engine.dispose()

    def wait_for(self, acknowledged: int, leases: int) -> None:
        """Wait until these are enqueued, and each consumer was called this many more times."""
        before = {name: len(self.seen.leases[name]) for name in ("threads", "tasks")}
        until(
            lambda: (
                self.failed
                or (
                    len(self.seen.acknowledged) >= acknowledged
                    and all(len(self.seen.leases[n]) >= had + leases for n, had in before.items())
                )
            ),
            f"{acknowledged} acknowledged, {leases} leases each",
            LONG,
        )
        assert not self.failed


@pytest.fixture(scope="module")
def results(chaos_results: Callable[..., Results]) -> Results:
    counts = ["acknowledged", "lost", "effects", "doubled", "leases", "repeated", "unsure", "found"]
    return chaos_results("failover", counts=counts)


@pytest.fixture
def pair() -> Iterator[tuple[OwnServer, Standby]]:
    with own_server() as primary:
        engine = sa.create_engine(primary.database("load").url(), poolclass=sa.NullPool)
        Base.metadata.create_all(engine)
        with standby_of(primary) as standby:
            yield primary, standby


@pytest.mark.long
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_consumers_carry_on_after_a_failover_under_load(pair, results, driver) -> None:
    fail_over(*pair, results, driver, units=4000)


def test_consumers_carry_on_after_a_failover(pair, results) -> None:
    """Both drivers at once: the consumer in threads has psycopg."""
    fail_over(*pair, results, "asyncpg", units=200)


def fail_over(
    primary: OwnServer, standby: Standby, results: Results, driver: str, units: int
) -> None:
    make_synchronous(primary)
    there = replace(standby.address, dbname="load")
    with Load(libpq_form(either(primary, standby, "load")), driver, units) as load:
        load.wait_for(units // 3, units // 20)
        primary.server.stop("immediate")  # SIGQUIT
        standby.promote()
        load.wait_for(units, units // 20)
        # Both consumers and the listener have found the new primary by themselves.
        until(lambda: run_sql(there, LISTENING) == [(3,)], "three listen", LONG)
        until(lambda: notified(there, load.seen), "the listener hears", LONG)
        until(lambda: audit(load.engine).live == 0, "nothing is left", LONG)
        row = counted(load, there)
    results.write(mode=f"synchronous, {driver}", units=units, **row)
    assert not load.failed
    assert (row["lost"], row["doubled"], row["repeated"]) == (0, 0, 0)


def notified(there: Address, seen: Seen) -> bool:
    """Send until it was heard: the listener may be connecting just now."""
    run_sql(there, "SELECT pg_notify(:channel, 'probe')", channel=channel(None))
    return "probe" in seen.woken


def counted(load: Load, there: Address) -> dict[str, int]:
    """Compare what producers and handlers saw with what the new primary has."""
    seen = load.seen
    found = audit(load.engine)
    with Session(load.engine) as session:
        sent = Counter(session.scalars(sa.select(Sent.unit)))
        workers = QueueService(session).workers.list()
    assert sorted(worker.name for worker in workers) == ["tasks", "threads"]  # none was restarted
    assert (found.lost, found.missing, found.stray, found.leased) == (0, 0, 0, 0)
    by_message = defaultdict(list)
    for message, token in seen.tokens:
        by_message[message].append(token)
    tokens = [token for _, token in seen.tokens]
    ((latest,),) = run_sql(there, f"SELECT nextval('{TOKENS}')")
    assert latest > max(tokens)
    return {
        "acknowledged": len(seen.acknowledged),
        "lost": sum(not sent[str(unit)] for unit in seen.acknowledged),
        "effects": found.effects,
        "doubled": found.doubled + sum(n > 1 for n in sent.values()),
        "leases": len(tokens),
        "repeated": len(tokens) - len(set(tokens)),
        "unsure": seen.unsure,
        "found": seen.found,
    }


def leased(engine: sa.Engine, count: int) -> list[int]:
    """Lease messages in committed transactions, one in each, and return their tokens."""
    tokens = []
    for _ in range(count):
        with Session(engine) as session, session.begin():
            (delivery,) = QueueService(session).dequeue("mail", lease=3600)
        tokens.append(delivery.fencing_token)
    return tokens


@pytest.mark.long
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_tokens_after_a_promotion_have_gaps_and_repeat_only_where_wal_was_lost(pair, mode) -> None:
    """PostgreSQL writes a sequence ahead, 32 numbers at a time (SEQ_LOG_VALS in sequence.c)."""
    primary, standby = pair
    there = replace(primary.address, dbname="load")
    if mode == "synchronous":
        make_synchronous(primary)
    engine = sa.create_engine(either(primary, standby, "load"), pool_pre_ping=True)
    with Session(engine) as session, session.begin():
        QueueService(session).enqueue_many("mail", range(200))
    before = leased(engine, 5)
    standby.wait_for(primary)
    if mode == "asynchronous":
        standby.link.freeze()
        before += leased(engine, 70)  # acknowledged, and about to be lost
    assert run_sql(there, LAST_TOKEN) == [(before[-1],)]
    primary.server.stop("immediate")
    standby.promote()
    after = leased(engine, 5)
    engine.dispose()
    assert after == sorted(set(after))
    if mode == "synchronous":
        assert 1 <= after[0] - before[-1] <= 33
    else:
        assert set(after) & set(before), "the promotion lost no WAL: the test shows nothing"

"""Streaming replication between two servers: what a standby refuses, and a promotion under load.

What PostgreSQL promises is what the queue promises: with a synchronous standby nothing that was
acknowledged is lost; with an asynchronous one, what it had not received is, messages and effects
alike, and both halves of a transaction together (F27). Nothing happens twice in what is left.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, QueueService
from pgqrs_sa.cli import group
from pgqrs_sa.wakeup import Listener
from support.ledger import Effect, Sent, audit
from support.loops import produce, work
from support.replica import Standby, either, make_synchronous, standby_of
from support.results import Results
from support.servers import OwnServer, own_server, run_sql
from support.waiting import until

READ_ONLY = "25006"
WRITES: dict[str, Callable[[Any], Any]] = {
    "enqueue": lambda queue: queue.enqueue("mail", {}),
    "dequeue": lambda queue: queue.dequeue("mail"),
    "create": lambda queue: queue.queues.create("other"),
    "register": lambda queue: queue.workers.register("w"),
    "prune": lambda queue: queue.archived.prune(3600),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[OwnServer, Standby]]:
    with own_server() as primary, standby_of(primary) as standby:
        primary.database("replicated")
        standby.wait_for(primary)
        yield primary, standby


@pytest.fixture
def replica(pair):
    return replace(pair[1].address, dbname="replicated")


@pytest.mark.parametrize("call", WRITES)
def test_a_standby_refuses_with_the_servers_own_error(replica, call):
    """E16, F26, F28: SQLSTATE 25006, unchanged."""
    engine = sa.create_engine(replica.url(), poolclass=sa.NullPool)
    with Session(engine) as session, pytest.raises(DBAPIError) as caught:
        WRITES[call](QueueService(session))
    assert caught.value.orig.sqlstate == READ_ONLY


@pytest.mark.parametrize("call", WRITES)
async def test_a_standby_refuses_asyncpg_alike(replica, call):
    engine = create_async_engine(replica.url("asyncpg"), poolclass=sa.NullPool)
    async with AsyncSession(engine) as session:
        with pytest.raises(DBAPIError) as caught:
            await WRITES[call](AsyncQueueService(session))
    assert caught.value.orig.sqlstate == READ_ONLY


def test_a_standby_refuses_to_listen_and_the_listener_says_so(replica, caplog):
    with pytest.raises(DBAPIError) as caught:
        run_sql(replica, "LISTEN mail")
    assert caught.value.orig.sqlstate == READ_ONLY
    listener = Listener(sa.create_engine(replica.url()), lambda _: None)
    with caplog.at_level(logging.WARNING, "pgqrs_sa.wakeup"):
        listener.start()
        until(lambda: "cannot execute LISTEN during recovery" in caplog.text, "it says why")
    assert not listener.connected
    listener.stop()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_command_says_that_no_host_takes_writes(replica, driver):
    place = f"{quote(replica.host, safe='')}:{replica.port}"
    dsn = (
        f"postgresql+{driver}://{replica.user}@{place},{place}/{replica.dbname}"
        "?target_session_attrs=read-write"
    )
    done = CliRunner().invoke(group, ["--dsn", dsn, "queue", "list"])
    assert done.exit_code == 4
    assert "hint: no host of the DSN takes writes now" in done.stderr


def test_a_standby_answers_whoever_only_looks(pair, replica):
    primary, standby = pair
    source = sa.create_engine(replace(primary.address, dbname="replicated").url())
    produce(source, "mail", range(3))
    source.dispose()
    standby.wait_for(primary)
    engine = sa.create_engine(replica.url(), poolclass=sa.NullPool)
    with Session(engine) as session:
        service = QueueService(session)
        service.check_schema()
        assert service.messages.metrics("mail").ready == 3
        assert len(service.messages.find("mail")) == 3


def test_whichever_of_two_hosts_takes_writes(pair):
    """F30: an address with two hosts is passed on as it is, and the standby comes first in it."""
    primary, standby = pair
    engine = sa.create_engine(either(standby, primary, "replicated"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        recovering = sa.text("SELECT pg_is_in_recovery()")
        assert connection.execute(recovering).scalar_one() is False


# --- promotion -----------------------------------------------------------------------------------


class Load:
    """Producers and consumers, in threads, that follow the primary wherever it goes."""

    def __init__(self, url: sa.URL, units: int) -> None:
        self.engine = sa.create_engine(url, pool_size=10, connect_args={"connect_timeout": 5})
        self.units = units
        self.told: list[int] = []
        self.worked: list[int] = []
        self.troubles: list[BaseException] = []
        self.progress = threading.Semaphore(0)
        self.producers = [threading.Thread(target=self._produce, args=(n,)) for n in (0, 1)]
        self.consumers = [threading.Thread(target=self._work) for _ in range(2)]

    def _produce(self, first: int) -> None:
        for unit in range(first, self.units, 2):
            produce(self.engine, "mail", [unit], trouble=self._trouble)
            self.told.append(unit)
            self.progress.release()

    def _work(self) -> None:
        def alive() -> bool:
            return any(producer.is_alive() for producer in self.producers)

        work(
            self.engine,
            "mail",
            lease=2,
            trouble=self._trouble,
            settled=lambda item: self.worked.append(item.payload["unit"]),
            until=lambda: not alive(),
        )

    def _trouble(self, error: BaseException) -> None:
        self.troubles.append(error)
        threading.Event().wait(0.02)  # the server is away: do not spin

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in (*self.producers, *self.consumers):
            thread.start()
        yield
        for thread in (*self.producers, *self.consumers):
            thread.join(120)
            assert not thread.is_alive()

    def wait_for(self, n: int) -> None:
        for _ in range(n):
            assert self.progress.acquire(timeout=90)


@pytest.fixture(scope="module")
def results(pair, chaos_results: Callable[..., Results]) -> Results:
    ((version,),) = run_sql(pair[0].address, "SHOW server_version")
    counts = ["acknowledged", "lost", "effects", "effects_lost", "redone", "doubled", "torn"]
    return chaos_results("standby", postgresql=version, counts=counts)


@pytest.mark.long
@pytest.mark.parametrize("link", ["", ", silent link"])
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_promotion_under_load(results, mode, link):
    with own_server() as primary, standby_of(primary) as standby:
        promote_under_load(primary, standby, results, mode + link, 2000)


def test_a_promotion_under_a_little_load(pair, results):
    """The last one of this file: afterwards there is no standby any more."""
    promote_under_load(*pair, results, "synchronous", 120)


def promote_under_load(
    primary: OwnServer, standby: Standby, results: Results, mode: str, units: int
) -> None:
    primary.database("load")
    standby.wait_for(primary)
    if mode.startswith("synchronous"):
        make_synchronous(primary)
    load = Load(either(primary, standby, "load"), units)
    try:
        with load.running():
            load.wait_for(units // 3)
            if mode.endswith("silent link"):
                standby.link.freeze()
                if mode.startswith("asynchronous"):
                    load.wait_for(units // 6)  # acknowledged, and about to be lost
                else:
                    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                    until(lambda: run_sql(primary.address, waiting), "a commit waits")
            primary.server.stop("immediate")
            standby.promote()
        assert load.troubles
        # What was leased when the primary went away comes back by itself.
        work(load.engine, "mail", until=lambda: audit(load.engine).live == 0)
        row = counted(load)
    finally:
        load.engine.dispose()
    results.write(mode=mode, units=units, **row)
    assert (row["doubled"], row["torn"]) == (0, 0)
    if mode == "asynchronous, silent link":
        assert row["lost"] >= units // 6 - 4, "nothing was lost: the test shows nothing"
    elif mode.startswith("synchronous"):
        assert row["lost"] == row["effects_lost"] == 0


def counted(load: Load) -> dict[str, int]:
    """Compare what the threads were told with what the new primary has.

    ``doubled`` counts within what is left; ``torn`` the transactions of which half is left.
    """
    found = audit(load.engine)
    assert (found.live, found.leased) == (0, 0)
    with Session(load.engine) as session:
        sent = Counter(session.scalars(sa.select(Sent.unit)))
        ids = {row.message_id: row.unit for row in session.scalars(sa.select(Sent))}
        done = {ids.get(item) for item in session.scalars(sa.select(Effect.message_id))}
    assert len({*load.told}) == load.units
    return {
        "acknowledged": len({*load.told}),
        "lost": sum(not sent[str(unit)] for unit in {*load.told}),
        "effects": len({*load.worked}),
        "effects_lost": sum(str(unit) not in done for unit in {*load.worked}),
        "redone": sum(n > 1 for n in Counter(load.worked).values()),
        "doubled": found.doubled + sum(n > 1 for n in sent.values()),
        "torn": found.lost + found.missing + found.stray + found.uncounted + (None in done),
    }

"""The harness does what it says: a fault that does not happen would make every test pass."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from support.bouncer import PSYCOPG, PgBouncer
from support.ledger import Effect, Sent, Start, audit
from support.loops import produce, work
from support.proxy import Proxy
from support.scripts import Script
from support.servers import run_sql, terminate_backends


@pytest.fixture
def proxy(address):
    with Proxy(address.target) as proxy:
        yield proxy


@pytest.fixture
def through(address, proxy):
    engine = sa.create_engine(address.via(*proxy.address).url())
    yield engine
    engine.dispose()


def sent(address):
    return run_sql(address, "SELECT unit FROM book_sent ORDER BY unit")


def send(engine, unit):
    with Session(engine) as session, session.begin():
        session.add(Sent(message_id=1, unit=unit))


def test_a_lost_reply_leaves_the_commit_done(address, proxy, through):
    fault = proxy.lose_reply("COMMIT")
    with pytest.raises(OperationalError) as caught:
        send(through, "a")
    assert caught.value.connection_invalidated
    fault.wait()
    assert sent(address) == [("a",)]
    send(through, "b")  # once only
    assert sent(address) == [("a",), ("b",)]


def test_a_cut_before_the_commit_leaves_nothing(address, proxy, through):
    fault = proxy.cut_before("COMMIT")
    with pytest.raises(OperationalError):
        send(through, "a")
    fault.wait()
    assert sent(address) == []


def test_a_statement_is_known_by_its_text_though_it_is_prepared(address, proxy, through):
    for unit in "abcdefg":  # psycopg prepares at the sixth
        send(through, unit)
    fault = proxy.lose_reply("INSERT INTO book_sent")
    with pytest.raises(OperationalError):
        send(through, "h")
    fault.wait()
    assert len(sent(address)) == 7


async def test_asyncpg_loses_its_reply_too(address, proxy):
    engine = create_async_engine(address.via(*proxy.address).url("asyncpg"))
    for fault, rows in ((proxy.cut_before("^COMMIT"), 0), (proxy.lose_reply("^COMMIT"), 1)):
        with pytest.raises(DBAPIError):
            async with engine.begin() as connection:
                await connection.execute(sa.insert(Sent).values(message_id=1, unit="a"))
        fault.wait()
        assert len(sent(address)) == rows
    await engine.dispose()


def test_a_frozen_connection_is_silent_and_others_are_not(address, proxy):
    engine = sa.create_engine(
        address.via(*proxy.address).url(),
        connect_args={"tcp_user_timeout": 300},
        poolclass=sa.NullPool,
    )
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        proxy.freeze()
        began = time.monotonic()
        with pytest.raises(OperationalError, match=r"(?i)timed out|timeout"):
            connection.execute(sa.text("SELECT 1"))
        assert time.monotonic() - began > 0.2
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_all_connections_are_cut(proxy, through):
    with through.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        assert proxy.connections == 1
        proxy.cut_all()
        assert proxy.connections == 0
        with pytest.raises(OperationalError):
            connection.execute(sa.text("SELECT 1"))


def test_backends_are_gone_when_they_were_terminated(address, engine):
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        assert terminate_backends(address, "state = :state", state="idle in transaction") == 1
        with pytest.raises(OperationalError):
            connection.execute(sa.text("SELECT 1"))


def test_a_crash_keeps_what_was_committed(own, address, engine):
    send(engine, "a")
    with engine.connect() as connection:
        connection.execute(sa.insert(Sent).values(message_id=1, unit="b"))
        own.crash()
        with pytest.raises(OperationalError):
            connection.commit()
    assert sent(address) == [("a",)]


def test_a_process_says_how_far_it_is(address):
    code = """
    with Session(sa.create_engine(args["url"])) as session:
        say("counted", live=QueueService(session).messages.metrics("mail").live)
        hear("go")
    say("over")
    """
    with Script(code, url=address.url()) as process:
        assert process.expect("counted") == {"live": 0}
        process.freeze()
        process.tell("go")
        process.thaw()
        process.expect("over")
        assert process.wait() == 0
    with Script(code, url=address.url()) as process:
        process.expect("counted")
        assert process.kill() == -9


def test_a_process_that_fails_is_quoted():
    with Script("hear('never')") as process:
        process.tell("else")
        with pytest.raises(AssertionError, match="heard 'else' instead of 'never'"):
            process.expect("anything")


def test_the_loops_leave_clean_books(engine):
    def handle(session, delivery):
        if delivery.payload["unit"] == 3 and delivery.read_ct < 3:
            raise ValueError("not yet")
        if delivery.payload["unit"] == 4:
            raise ValueError("never")

    assert len(produce(engine, "mail", range(10))) == 10
    with Session(engine) as session, session.begin():
        QueueService(session).queues.update("mail", max_read_ct=3)
    work(engine, "mail", handle=handle, limit=4)
    found = audit(engine).assert_clean()
    assert (found.committed, found.archived, found.dead) == (10, 9, 1)
    assert (found.attempts, found.started) == (14, 14)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        ("DELETE FROM pgqrs_archive WHERE id = 1", "lost"),
        ("INSERT INTO book_effects (message_id, read_ct) VALUES (1, 1)", "doubled"),
        ("DELETE FROM book_effects WHERE message_id = 1", "missing"),
        ("UPDATE pgqrs_archive SET outcome = 'dead' WHERE id = 1", "stray"),
        ("INSERT INTO book_starts (message_id, read_ct) VALUES (1, 2)", "uncounted"),
        ("INSERT INTO book_starts (message_id, read_ct) VALUES (1, 1)", "uncounted"),
        (
            "INSERT INTO pgqrs_messages (queue_id, payload, leased_until) VALUES (1, '{}', now())",
            "leased",
        ),
    ],
)
def test_the_audit_finds(address, engine, spoil, what):
    produce(engine, "mail", range(3))
    work(engine, "mail")
    assert audit(engine).assert_clean().committed == 3
    run_sql(address, spoil)
    with pytest.raises(AssertionError, match=f"'{what}'"):
        audit(engine).assert_clean()


def test_the_loops_outlive_a_crash(own, engine):
    troubles = []
    told = threading.Semaphore(0)
    producing = threading.Thread(
        target=produce,
        args=(engine, "mail", range(150)),
        kwargs={"told": lambda _: told.release(), "trouble": troubles.append},
    )
    working = threading.Thread(
        target=work,
        args=(engine, "mail"),
        kwargs={"lease": 1, "until": lambda: not producing.is_alive(), "trouble": troubles.append},
    )
    producing.start()
    working.start()
    for _ in range(50):
        assert told.acquire(timeout=90)
    own.crash()
    producing.join(90)
    working.join(90)
    assert troubles
    leased = audit(engine)
    assert (leased.committed, leased.lost, leased.doubled) == (150, 0, 0)
    work(engine, "mail", until=lambda: audit(engine).live == 0)
    audit(engine).assert_clean()


PID = sa.text("SELECT pg_backend_pid()")


@pytest.fixture
def bouncer(address):
    with PgBouncer(address, pool_size=2) as bouncer:
        yield bouncer


@pytest.fixture
def pooled(bouncer):
    engine = sa.create_engine(bouncer.address.url(), pool_pre_ping=True, **PSYCOPG)
    yield engine
    engine.dispose()


@pytest.mark.pgbouncer
def test_pgbouncer_shares_connections(pooled):
    with pooled.connect() as connection, pooled.connect() as two, pooled.connect() as three:
        pids = {each.execute(PID).scalar_one() for each in (connection, two)}
        assert len(pids) == 2
        connection.rollback()
        first = three.execute(PID).scalar_one()
        three.rollback()
        two.rollback()
        assert first in pids
        # One client's transactions run on both.
        found = set()
        for _ in range(4):
            found.add(three.execute(PID).scalar_one())
            three.rollback()
        assert found == pids


@pytest.mark.pgbouncer
def test_pgbouncer_comes_back(bouncer, pooled):
    for again in (bouncer.restart, bouncer.crash):
        with pooled.connect() as connection:
            assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1
            again()
            with pytest.raises(OperationalError):
                connection.execute(sa.text("SELECT 1"))
    assert bouncer.show("pools")


def test_starts_may_be_recorded_by_a_handler(engine):
    produce(engine, "mail", range(1))
    with Session(engine) as session, session.begin():
        (delivery,) = QueueService(session).dequeue("mail")
        session.add(Start(message_id=delivery.id, read_ct=delivery.read_ct))
        session.add(Effect(message_id=delivery.id, read_ct=delivery.read_ct))
        QueueService(session).archive(delivery)
    assert audit(engine).assert_clean().started == 1

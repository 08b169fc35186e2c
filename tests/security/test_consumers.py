"""Consumers and producers at work under exactly the rights that are printed, and no others.

A role of their kind must be allowed to execute all of their statements, also after errors.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import DeadLetter, Delivery, Discard, QueueService, Retry, RetryIn, Snooze
from pgqrs_sa._core import wakeup
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa._core.sql.wakeup import channel
from pgqrs_sa.consumer import store
from pgqrs_sa.models import READY_MADE
from support.consumers import Kit, effect, kit_for
from support.waiting import PATIENCE, until

MAKE_EFFECTS = """
CREATE TABLE IF NOT EXISTS effects
    (id bigserial PRIMARY KEY, msg_id bigint, read_ct int, note text);
TRUNCATE effects
"""
ITS_OWN = (
    # What a handler writes is the application's, and so are its rights.
    "GRANT INSERT ON effects TO {name}",
    "GRANT USAGE ON SEQUENCE effects_id_seq TO {name}",
)
PRODUCE = """
import sys
import sqlalchemy as sa
from sqlalchemy.orm import Session
from pgqrs_sa import Item, Message, QueueService

url, queue = sys.argv[1:]
with Session(sa.create_engine(url)) as session, session.begin():
    service = QueueService(session, notify=True)
    service.check_schema()
    service.enqueue(queue, "ok")
    service.enqueue(queue, "ok", key="k")
    service.enqueue_many(queue, ["ok", Item("ok", key="l")])
    service.enqueue_from(queue, sa.select(sa.literal("ok")))
    session.add(Message(queue_name=queue, payload="ok"))
"""


def settle_and_lease(scope, *leasing):
    """Send the statement, and wait for it."""
    return store.SettleAndLease(scope, *leasing).run(scope)


@pytest.fixture(params=["threads", "psycopg", "asyncpg"])
def kit(request: pytest.FixtureRequest, migrated: Any) -> Iterator[Kit]:
    """Its own connection is the owner's; the consumer gets another."""
    kit = kit_for(migrated, request.param)
    kit.sql(MAKE_EFFECTS)
    yield kit
    kit.close()


@pytest.fixture
def under_its_role(kit: Kit, login: Callable[..., sa.Engine]) -> Callable[..., Any]:
    """Return a function that makes an engine which has logged in as a consumer."""
    url = login("consumer", more=ITS_OWN).url

    def make(**options: Any) -> Any:
        if kit.is_async:
            driven = url.set(drivername=f"postgresql+{kit.driver}")
            engine: Any = create_async_engine(driven, pool_size=20, **options)
        else:
            engine = sa.create_engine(url, pool_size=20, **options)
        kit._engines.append(engine)
        return engine

    return make


def decide(delivery: Delivery) -> Any:
    """What a message asks for, at its first attempt or always."""
    match delivery.payload, delivery.read_ct:
        case ("raises", _) | ("raises once", 1):
            raise ValueError(delivery.payload)
        case "dead", _:
            return DeadLetter("of no use")
        case "discarded", _:
            return Discard("not wanted")
        case "again", 1:
            return RetryIn(0)
        case "snoozed", 1:
            return Snooze(0.01)
    return None


PAYLOADS = {
    "ok": "archived",
    "raises once": "archived",
    "raises": "dead",
    "dead": "dead",
    "discarded": "discarded",
    "again": "archived",
    "snoozed": "archived",
}


def renewed(kit: Kit) -> Callable[..., None]:
    """A handler that lasts until its lease was renewed."""

    def long(session: Any, delivery: Any) -> None:
        before = kit.live()[delivery.id].leased_until
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            kit.wait_a_moment()
            if kit.live()[delivery.id].leased_until > before:
                effect(session, delivery)
                return

    return long


def too_slow(kit: Kit) -> Callable[..., None]:
    """A handler that takes too long, the first time."""

    def slow(_session: Any, delivery: Any) -> None:
        end = time.monotonic() + PATIENCE
        while delivery.read_ct == 1 and not delivery.lease_lost and time.monotonic() < end:
            kit.wait_a_moment()

    return slow


def deciding(session: Any, delivery: Any) -> Any:
    if session is not None:
        effect(session, delivery)
    return decide(delivery)


def in_batches(session: Any, deliveries: Any) -> None:
    for delivery in deliveries:
        effect(session, delivery)


def registered(kit: Kit, consumer: Any) -> None:
    """Handlers of every kind, each for a queue of its own."""
    quick = Retry(base=0, jitter=0)
    consumer.on("single", retry=quick)(deciding)
    consumer.on("plain", session=False, retry=quick)(deciding)
    consumer.on("batch", batch=4)(in_batches)
    consumer.on("first", acknowledge="first", session=False)(deciding)
    consumer.on("long", lease=5)(renewed(kit))
    consumer.on("slow", timeout=3, retry=quick)(too_slow(kit))


QUEUES = ("single", "plain", "batch", "first", "long", "slow")


def left_behind(kit: Kit) -> tuple[int, int]:
    """A message in the hands of somebody who is dead, and one that is out of attempts."""
    orphan, exhausted = kit.send("ok", "ok", queue="plain")
    kit.sql(
        "INSERT INTO pgqrs_workers (name, hostname, heartbeat_at)"
        " VALUES ('gone', 'x', now() - interval '1 day')"
    )
    kit.sql(
        "UPDATE pgqrs_messages SET read_ct = 1, max_read_ct = 5, dequeued_at = now(),"
        " consumer_worker_id = 1, leased_until = now() + interval '1 day' WHERE id = :id",
        id=orphan,
    )
    kit.sql(
        "UPDATE pgqrs_messages SET read_ct = 1, max_read_ct = 1, dequeued_at = now(),"
        " leased_until = now() WHERE id = :id",
        id=exhausted,
    )
    return orphan, exhausted


def test_a_consumer_does_all_its_work_with_the_rights_of_one(
    kit: Kit, under_its_role: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Every kind of handler and decision; renewals, timeouts, the heartbeat, and tidying up."""
    caplog.set_level(logging.INFO, "pgqrs_sa.consumer")
    for queue in QUEUES:
        kit.queue(queue, max_read_ct=2)
    expected = {}
    for queue in ("single", "plain"):
        ids = kit.send(*PAYLOADS, queue=queue)
        expected |= dict(zip(ids, PAYLOADS.values(), strict=True))
    for queue, n in (("batch", 6), ("first", 2), ("long", 1), ("slow", 1)):
        expected |= dict.fromkeys(kit.send(*["ok"] * n, queue=queue), "archived")
    orphan, exhausted = left_behind(kit)
    expected |= {orphan: "archived", exhausted: "dead"}
    consumer = kit.consumer(
        engine=under_its_role(), heartbeat=0.05, housekeeping=0.05, concurrency=8
    )
    registered(kit, consumer)
    consumer.start()
    until(lambda: kit.outcomes() == expected, "all is settled")
    before = kit.workers()[1].heartbeat_at
    until(lambda: kit.workers()[1].heartbeat_at > before, "its heart beats")
    assert consumer.stop() == 0
    assert [worker.status for worker in kit.workers()] == ["stopped", "stopped"]
    assert kit.held() == []
    # Not for it: to prune the archive, and to forget workers. That is said, and harms nothing.
    denied = [record for record in caplog.records if "tidying up" in record.getMessage()]
    assert denied
    assert all(item.levelno == logging.INFO for item in denied)


def test_a_consumer_under_its_role_is_woken_by_a_producer_under_its_own(
    kit: Kit, migrated: Any, under_its_role: Callable[..., Any], login: Callable[..., sa.Engine]
) -> None:
    """The producer is another process: nothing but a notification can wake the consumer."""
    kit.queue("mail")
    ear = psycopg.connect(migrated.dsn, autocommit=True)
    ear.execute(f"LISTEN {channel(None)}")
    engine = under_its_role()
    listen = login("consumer", more=ITS_OWN).url.set(drivername="postgresql")
    consumer = kit.consumer(
        engine=engine,
        notify=True,
        listen_dsn=listen.render_as_string(hide_password=False),
        poll_interval=600,
    )
    consumer.on("mail")(effect)
    consumer.start()
    until(lambda: kit.workers()[0].waiting_until, "it waits")
    url = login("producer").url.render_as_string(hide_password=False)
    subprocess.run([sys.executable, "-c", PRODUCE, url, "mail"], check=True, timeout=180)
    assert [notification.payload for notification in ear.notifies(timeout=60, stop_after=1)] == [
        "mail"
    ]
    until(lambda: len(kit.effects()) == 6, "all are done")
    assert consumer.stop() == 0
    assert set(kit.outcomes().values()) == {"archived"}
    ear.close()


def test_a_consumer_that_keeps_snapshots_needs_no_more_rights(
    kit: Kit, under_its_role: Callable[..., Any]
) -> None:
    """It locks its message first: renewals could not be seen."""
    kit.queue("mail")
    ids = kit.send(1, 2, 3)
    engine = under_its_role(isolation_level="REPEATABLE READ")
    consumer = kit.consumer(engine=engine)
    consumer.on("mail")(effect)
    assert consumer.run() == 0
    assert sorted(id_ for id_, _ in kit.effects()) == ids


def test_what_a_consumer_executes_only_in_trouble_needs_no_more_rights(
    migrated: Any, engine: sa.Engine, login: Callable[..., sa.Engine]
) -> None:
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
        QueueService(session).enqueue_many("mail", range(4))
    context = Context.of(READY_MADE, None, None, allow_autocommit=True)
    with Session(login("consumer", more=())) as session, session.begin():
        assert store.server_info(Scope(session, context)) == "read committed"
        service = QueueService(session)
        worker = service.workers.register("w", queues=["mail"])
        scope = Scope(session, Context.of(READY_MADE, None, worker.id, allow_autocommit=True))
        assert store.check_queues(scope, ["mail"]).ready == {"mail"}
        turn = settle_and_lease(scope, [], "mail", 1, timedelta(minutes=1), None)
        again = settle_and_lease(scope, turn.leased, "mail", 2, timedelta(minutes=1), 3)
        assert again.settled == {turn.leased[0].id}
        assert store.renew(scope, again.leased, timedelta(minutes=2))
        store.lock_messages(scope, again.leased)
        assert set(store.lookup_status(scope, turn.leased).values()) == {"archived"}
        settle_and_lease(scope, [], "mail", 1, timedelta(minutes=1), None)
        now = time.monotonic()
        lost = store.UnansweredLease(worker.id, "mail", timedelta(minutes=1), now - 60, now)
        assert store.release_unanswered(scope, [lost], [again.leased[0].fencing_token]) == 1
        assert store.try_housekeeping_lock(scope)
        wakeup.set_waiting(scope, worker.id, None)

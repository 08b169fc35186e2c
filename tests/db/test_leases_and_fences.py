"""Leases run out by themselves, and only the holder of a lease can settle it.

Time is moved in the database by UPDATE (``leased_until``, ``vt``, ``heartbeat_at``), never waited
for. The numbers F1 to F54 are the failure modes of the design, A.3 the defects of pgqrs that are
not to be copied.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from pgqrs_sa import (
    DEFAULT_BACKOFF,
    ArchivedMessage,
    Delivery,
    Failure,
    InvalidArgument,
    Item,
    LeaseLost,
    Message,
    Queue,
    QueueNotFound,
    QueueService,
    Receipt,
    Worker,
    WorkerNotFound,
    WorkerNotReady,
    metadata,
)
from pgqrs_sa._core.settle import lease_lost
from support.cases import each_case
from support.waiting import PATIENCE, until, until_blocked


class AppBase(DeclarativeBase):
    pass


class Customer(AppBase):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    active: Mapped[bool]


class Visit(AppBase):
    __tablename__ = "visits"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """As everywhere, but a wait for a lock that is never given fails the test."""
    engine = sa.create_engine(migrated.url, connect_args={"options": "-c lock_timeout=90s"})
    yield engine
    engine.dispose()


@pytest.fixture
def other(engine: sa.Engine, service: QueueService) -> Iterator[QueueService]:
    """The service of somebody else, in a session that commits by itself: see `theirs`."""
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        yield QueueService(session)


def lease(service: QueueService, n: int = 1, *, worker: Any = None, **options: Any) -> Any:
    """Enqueue and lease, and commit both: one delivery, or a list of ``n``."""
    service.enqueue_many("mail", [Item(i, **options) for i in range(n)])
    deliveries = service.dequeue("mail", n, worker=worker)
    assert len(deliveries) == n
    service.session.commit()
    return deliveries if n > 1 else deliveries[0]


def run_out(session: Session, *deliveries: Delivery) -> None:
    """Let leases end a second ago."""
    ids = [delivery.id for delivery in deliveries]
    ended = sa.func.statement_timestamp() - timedelta(seconds=1)
    session.execute(sa.update(Message).where(Message.id.in_(ids)).values(leased_until=ended))
    session.commit()


def come_due(session: Session, delivery: Delivery) -> None:
    """Let the delay of a message have ended a second ago."""
    due = sa.func.statement_timestamp() - timedelta(seconds=1)
    session.execute(sa.update(Message).where(Message.id == delivery.id).values(vt=due))
    session.commit()


def silence(session: Session, worker: Any) -> None:
    """Let the last heartbeat of a worker be an hour old."""
    past = sa.func.statement_timestamp() - timedelta(hours=1)
    session.execute(sa.update(Worker).where(Worker.id == worker.id).values(heartbeat_at=past))
    session.commit()


def lost_to(other: QueueService, session: Session, delivery: Delivery, **options: Any) -> Delivery:
    """Let a lease run out and somebody else take the message."""
    run_out(session, delivery)
    (theirs,) = other.dequeue("mail", where=Message.id == delivery.id, **options)
    assert theirs.read_ct == delivery.read_ct + 1
    assert theirs.vt == delivery.vt
    return theirs


def rows(session: Session) -> dict[str, list[Any]]:
    """Everything there is in the tables."""
    session.expire_all()
    return {
        table.name: session.execute(sa.select(table).order_by(table.c.id)).all()
        for table in metadata.sorted_tables
    }


def now(session: Session) -> Any:
    return session.execute(sa.select(sa.func.statement_timestamp())).scalar_one()


SETTLE: dict[str, Callable[[QueueService, list[Delivery]], Any]] = {
    "archive": lambda queue, held: queue.archive_many(held),
    "discard": lambda queue, held: queue.archive_many(held, outcome="discarded", reason="no"),
    "delete": lambda queue, held: queue.delete_many(held),
    "extend": lambda queue, held: queue.extend_many(held, 900),
    "release": lambda queue, held: queue.release_many(held),
    "fail": lambda queue, held: queue.fail_many(held, "no"),
    "bury": lambda queue, held: queue.fail_many(held, "no", dead=True),
}
TRY: dict[str, Callable[[QueueService, list[Delivery]], list[bool]]] = {
    "archive": lambda queue, held: queue.try_archive_many(held),
    "discard": lambda queue, held: queue.try_archive_many(held, outcome="discarded"),
    "delete": lambda queue, held: queue.try_delete_many(held),
    "extend": lambda queue, held: queue.try_extend_many(held, 900),
    "release": lambda queue, held: queue.try_release_many(held),
    "fail": lambda queue, held: queue.try_fail_many(held, "no"),
    "bury": lambda queue, held: queue.try_fail_many(held, "no", dead=True),
}
FINAL = [name for name in SETTLE if name != "extend"]

each_way = each_case("way", list(SETTLE), before="reset")


def assert_all_lost(service: QueueService, delivery: Delivery) -> None:
    """No way to settle it is open, and none changes anything."""
    session = service.session
    before = rows(session)
    for name, settle in SETTLE.items():
        with pytest.raises(LeaseLost) as lost:
            settle(service, [delivery])
        assert lost.value.ids == (delivery.id,), name
        assert TRY[name](service, [delivery]) == [False]
        assert rows(session) == before, name
    session.rollback()


# --- leases --------------------------------------------------------------------------------------


def test_a_lease_ends_by_itself_with_nobody_sweeping(service, session, other):
    """F1, A.3.1."""
    mine = lease(service)
    assert other.dequeue("mail") == []
    run_out(session, mine)
    (theirs,) = other.dequeue("mail")
    assert (theirs.id, theirs.read_ct, theirs.vt) == (mine.id, 2, mine.vt)
    assert other.dequeue("mail") == []


def test_a_lease_ends_when_it_was_to_end_and_not_before(service, session, other):
    """F1: on the database's clock."""
    mine = lease(service)
    soon = sa.func.statement_timestamp() + timedelta(seconds=1)
    shortened = sa.update(Message).values(leased_until=soon).returning(Message.leased_until)
    ends = session.execute(shortened).scalar_one()
    session.commit()
    empty = []

    def taken() -> list[Delivery]:
        begun = now(session)
        session.rollback()
        found = other.dequeue("mail", lease=60)
        if not found:
            empty.append(begun)
        return found

    (theirs,) = until(taken, "it is free again")
    assert theirs.id == mine.id
    assert theirs.leased_until - timedelta(seconds=60) >= ends  # it was taken when that was over
    assert all(begun < ends for begun in empty)  # and by the first that began after it


def test_a_lease_lasts_as_long_as_it_was_asked_for(service, session):
    service.queues.update("mail", lease=40)
    service.enqueue_many("mail", [1, 2, 3])
    begun = now(session)
    (default,) = service.dequeue("mail")
    (seconds,) = service.dequeue("mail", lease=0.5)
    (span,) = service.dequeue("mail", lease=timedelta(days=2))
    took = (now(session) - begun).total_seconds()
    for delivery, expected in ((default, 40), (seconds, 0.5), (span, 172_800)):
        assert 0 <= (delivery.leased_until - begun).total_seconds() - expected <= took


def test_a_lease_that_is_not_committed_never_was(service, session, other):
    """F7: a crash before the commit costs no attempt."""
    service.enqueue("mail", 1)
    session.commit()
    assert service.dequeue("mail")
    assert other.dequeue("mail") == []
    session.rollback()
    assert [delivery.read_ct for delivery in other.dequeue("mail")] == [1]


def test_extending_counts_from_now(service, session):
    """A.3.7: neither from the old end, nor into the past."""
    delivery, ten = lease(service), timedelta(seconds=10)
    far = service.extend(delivery, 1000)
    begun = now(session)
    near = service.extend(far, 10)
    assert begun + ten <= near.leased_until <= now(session) + ten
    run_out(session, delivery)
    begun = now(session)
    again = service.extend(near, 10)
    assert begun + ten <= again.leased_until <= now(session) + ten
    info = service.messages.get(delivery.id)
    assert info.leased_until == again.leased_until
    assert info.vt == again.vt == near.vt == far.vt == delivery.vt


@each_way
def test_a_delivery_settles_as_well_after_it_was_extended(service, session, way):
    old = lease(service)
    new = service.extend(old, 600)
    assert (new.id, new.read_ct, new.payload) == (old.id, old.read_ct, old.payload)
    SETTLE[way](service, [old])
    session.rollback()
    SETTLE[way](service, [new])


@each_way
def test_a_lease_that_ran_out_and_that_nobody_took_may_still_be_settled(service, session, way):
    """F2."""
    delivery = lease(service)
    run_out(session, delivery)
    SETTLE[way](service, [delivery])
    session.rollback()
    assert TRY[way](service, [delivery]) == [True]


@each_way
def test_so_may_one_that_was_the_last_attempt(service, session, way):
    """F2: exhausted, but not buried yet."""
    delivery = lease(service, max_read_ct=1)
    run_out(session, delivery)
    assert service.messages.get(delivery.id).state == "exhausted"
    SETTLE[way](service, [delivery])


# --- the fence -----------------------------------------------------------------------------------


@each_way
def test_a_former_holder_settles_nothing(service, session, other, way):
    """F2: by a second consumer, in both orders."""
    mine = lease(service)
    theirs = lost_to(other, session, mine)
    assert_all_lost(service, mine)
    SETTLE[way](other, [theirs])
    assert_all_lost(service, mine)


def test_threads_of_one_worker_are_told_apart(service, session, other):
    """F2, E10: the worker is the same, the attempt is not."""
    worker = service.workers.register("w")
    mine = lease(service, worker=worker)
    theirs = lost_to(other, session, mine, worker=worker)
    assert mine.worker_id == theirs.worker_id == worker.id
    assert_all_lost(service, mine)
    other.archive(theirs)
    assert_all_lost(service, mine)


def test_a_worker_that_came_back_is_not_the_one_before(service, session, other):
    """F4, A.3.2 and A.3.3: a second start under the same name, host and port."""
    here = {"hostname": "host", "pid": 1, "port": 80}
    before = service.workers.register("w", **here)
    after = service.workers.register("w", **here)
    assert before.id != after.id
    mine = lease(service, worker=before)
    theirs = lost_to(other, session, mine, worker=after)
    assert_all_lost(service, mine)
    other.archive(theirs)


@each_case("n", [-1, 1], before="reset")
def test_another_token_is_another_lease(service, n):
    mine = lease(service)
    other = dataclasses.replace(mine, fencing_token=mine.fencing_token + n)
    assert_all_lost(service, other)


# How a lease comes to be one that was never committed.


def roll_back(session: Session, worker: Any) -> Delivery:
    (delivery,) = QueueService(session).dequeue("mail", worker=worker)
    session.rollback()
    return delivery


def roll_back_to_a_savepoint(session: Session, worker: Any) -> Delivery:
    savepoint = session.begin_nested()
    (delivery,) = QueueService(session).dequeue("mail", worker=worker)
    savepoint.rollback()
    session.commit()
    return delivery


def fail_to_commit(session: Session, worker: Any) -> Delivery:
    """By a constraint that is only checked then."""
    (delivery,) = QueueService(session).dequeue("mail", worker=worker)
    session.execute(sa.text("INSERT INTO checked_late VALUES (1), (1)"))
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.rollback()
    return delivery


def lose_the_connection(session: Session, worker: Any) -> Delivery:
    (delivery,) = QueueService(session).dequeue("mail", worker=worker)
    session.connection().invalidate()
    session.rollback()
    return delivery


UNCOMMITTED = [roll_back, roll_back_to_a_savepoint, fail_to_commit, lose_the_connection]
each_uncommitted = each_case("uncommitted", UNCOMMITTED, ids=lambda f: f.__name__, before="reset")


@pytest.fixture
def checked_late(session: Session) -> Iterator[None]:
    column = "n int UNIQUE DEFERRABLE INITIALLY DEFERRED"
    session.execute(sa.text(f"CREATE TABLE checked_late ({column})"))
    session.commit()
    yield
    session.rollback()
    session.execute(sa.text("DROP TABLE checked_late"))
    session.commit()


@each_uncommitted
@each_case("registered", {"no_worker": False, "one_worker": True}, before="reset")
def test_a_lease_that_was_never_committed_settles_nothing(
    service, session, other, checked_late, uncommitted, registered
):
    """Neither while nobody holds the message, nor the lease of who took it afterwards."""
    worker = service.workers.register("w") if registered else None
    service.enqueue("mail", 1)
    session.commit()
    never = uncommitted(session, worker)
    assert_all_lost(service, never)
    (theirs,) = other.dequeue("mail", worker=worker)
    assert (theirs.id, theirs.read_ct, theirs.worker_id) == (
        never.id,
        never.read_ct,
        never.worker_id,
    )
    assert theirs.fencing_token > never.fencing_token
    assert_all_lost(service, never)
    other.archive(theirs)
    assert_all_lost(service, never)


def test_a_failure_noted_after_a_rollback_is_not_that_of_the_next_holder(service, session, other):
    """The lease was taken in the transaction that the error rolled back."""
    service.enqueue("mail", 1)
    session.commit()
    try:
        (never,) = service.dequeue("mail")
        raise ValueError("no such address")  # noqa: TRY301
    except ValueError as error:
        session.rollback()
        (theirs,) = other.dequeue("mail")
        with pytest.raises(LeaseLost) as lost:
            service.fail(never, error)
    assert lost.value.whereabouts[never.id].state == "leased"
    assert lost.value.whereabouts[never.id].until == theirs.leased_until
    session.rollback()
    other.archive(theirs)
    assert service.archived.find("mail")[0].last_error is None


@each_way
def test_a_lease_that_was_never_committed_spoils_no_batch(service, session, other, way):
    """Tried, the others are settled; asked for all or none, none is."""
    service.enqueue("mail", 1)
    session.commit()
    never = roll_back(session, None)
    held = [*lease(service, 2)]  # the message of `never` is one of them
    theirs = [lease for lease in held if lease.id != never.id]
    with pytest.raises(LeaseLost) as lost:
        SETTLE[way](service, [never, *theirs])
    assert lost.value.ids == (never.id,)
    session.rollback()
    assert TRY[way](service, [never, *theirs]) == [False, *[True] * len(theirs)]
    (kept,) = [lease for lease in held if lease.id == never.id]
    service.archive(kept)


def test_the_tokens_of_a_message_only_grow(service, session, other):
    """Over every way in which a lease ends, and every way back to the queue."""
    service.enqueue("mail", 1)
    session.commit()
    tokens: list[int] = []

    def take() -> Delivery:
        (delivery,) = service.dequeue("mail")
        tokens.append(delivery.fencing_token)
        return delivery

    service.fail(take(), "no", delay=0)
    service.release(take())
    session.commit()
    take()
    session.rollback()
    run_out(session, take())
    savepoint = session.begin_nested()
    take()
    savepoint.rollback()
    service.archive(take())
    assert session.scalars(sa.select(ArchivedMessage.fencing_token)).one() == tokens[-1]
    service.archived.requeue(service.archived.find("mail")[0].id)
    service.fail(take(), "no", dead=True)
    service.archived.requeue(service.archived.find("mail")[0].id)
    delivery = take()
    assert service.extend(delivery, 60).fencing_token == delivery.fencing_token
    service.delete(delivery)
    assert tokens == sorted(set(tokens))


@each_case("limit", [1, 3], before="reset")
def test_a_lease_draws_one_number_for_each_message_that_it_takes(service, session, limit):
    """And none for those that it looks at, or that others hold."""
    service.enqueue_many("mail", range(10))
    service.dequeue("mail", 2)
    drawn = sa.text("SELECT last_value FROM pgqrs_messages_fencing_token_seq")
    before = session.scalar(drawn)
    taken = service.dequeue("mail", limit)
    assert sorted(delivery.fencing_token for delivery in taken) == [
        before + n + 1 for n in range(limit)
    ]
    assert session.scalar(drawn) == before + limit
    assert service.dequeue("mail", where=sa.false()) == []
    assert session.scalar(drawn) == before + limit


def test_a_requeued_message_cannot_be_settled_by_who_had_it_before(service, session, other):
    """F3 (ABA), A.3.5: attempts are added, the count of them never falls."""
    first = lease(service, max_read_ct=1)
    service.fail(first, "no")
    (dead,) = service.archived.find("mail", outcome="dead")
    assert service.archived.requeue(dead.id).id == first.id
    session.commit()
    assert_all_lost(service, first)
    (second,) = other.dequeue("mail")
    assert (second.id, second.read_ct, second.max_read_ct) == (first.id, 2, 6)
    assert_all_lost(service, first)
    other.archive(second)
    (done,) = service.archived.find("mail", outcome="archived")
    service.archived.requeue(done.id, attempts=1)
    session.commit()
    (third,) = other.dequeue("mail")
    assert (third.read_ct, third.max_read_ct) == (3, 3)
    assert_all_lost(service, first)
    assert_all_lost(service, second)


def test_a_rescheduled_message_cannot_be_settled_by_who_had_it_before(service, session, other):
    """F3: one that was exhausted gets an attempt, not its count back."""
    mine = lease(service, max_read_ct=1)
    run_out(session, mine)
    service.messages.reschedule(mine.id, delay=0)
    session.commit()
    assert_all_lost(service, mine)
    (theirs,) = other.dequeue("mail")
    assert (theirs.read_ct, theirs.max_read_ct) == (2, 2)
    assert_all_lost(service, mine)


@each_case("first", FINAL, before="reset")
def test_a_delivery_is_settled_once(service, session, first):
    """F2: by the holder itself, in any second way."""
    delivery = lease(service)
    SETTLE[first](service, [delivery])
    session.commit()
    assert_all_lost(service, delivery)


@each_case("first", ["release", "fail"], before="reset")
def test_a_delivery_is_not_settled_after_it_came_back_to_the_same_consumer(service, session, first):
    mine = lease(service)
    SETTLE[first](service, [mine])
    session.execute(sa.update(Message).values(vt=sa.func.statement_timestamp()))
    (again,) = service.dequeue("mail")
    session.commit()
    assert_all_lost(service, mine)
    service.archive(again)


@each_way
def test_a_batch_is_settled_whole_or_not_at_all(service, session, other, way):
    a, b, c = lease(service, 3)
    lost_to(other, session, b)
    before = rows(session)
    for order in ([a, b, c], [b, c, a], [c, a, b]):
        with pytest.raises(LeaseLost) as lost:
            SETTLE[way](service, order)
        assert lost.value.ids == (b.id,)
        assert rows(session) == before
    SETTLE[way](service, [c, a])


def test_a_batch_that_fails_with_one_lost_buries_none_of_the_others(service, session, other):
    """Two statements, for those to be tried again and for the dead, are still one decision."""
    (spent,) = [lease(service, max_read_ct=1)]
    left, gone = lease(service, 2)
    lost_to(other, session, gone)
    before = rows(session)
    for order in ([spent, left, gone], [gone, left, spent], [spent, gone]):
        with pytest.raises(LeaseLost) as lost:
            service.fail_many(order, "no")
        assert lost.value.ids == (gone.id,)
        assert rows(session) == before
    assert [failure.dead for failure in service.fail_many([left, spent], "no")] == [False, True]


@each_way
def test_trying_settles_what_is_held_and_says_so(service, session, other, way):
    held = lease(service, 5)
    lost_to(other, session, held[1])
    lost_to(other, session, held[4])
    order = [held[4], held[0], held[3], held[1], held[2]]
    assert TRY[way](service, order) == [False, True, True, False, True]
    session.commit()
    metrics = service.messages.metrics("mail")
    if way == "extend":
        assert metrics.leased == 5
    else:
        assert (metrics.leased, TRY[way](service, order)) == (2, [False] * 5)


@each_way
def test_a_repeated_delivery_and_what_is_none_are_refused(service, session, way):
    delivery = lease(service)
    before = rows(session)
    assert not SETTLE[way](service, [])  # of nothing, nothing is settled
    assert TRY[way](service, []) == []
    for wrong in ([delivery, delivery], [delivery.id], delivery, [None]):
        for settle in (SETTLE[way], TRY[way]):
            with pytest.raises(InvalidArgument):
                settle(service, wrong)
    assert rows(session) == before


async def test_a_lease_that_was_never_committed_settles_nothing_on_any_driver(
    async_service, async_session, engine
):
    await async_service.enqueue("mail", 1)
    await async_session.commit()
    (never,) = await async_service.dequeue("mail")
    await async_session.rollback()
    with Session(engine) as session:
        (theirs,) = QueueService(session).dequeue("mail")
        session.commit()
    for settle in (
        lambda: async_service.archive(never),
        lambda: async_service.delete(never),
        lambda: async_service.extend(never, 60),
        lambda: async_service.release(never),
        lambda: async_service.fail(never, "no"),
    ):
        with pytest.raises(LeaseLost):
            await settle()
    for attempt in (
        async_service.try_archive,
        async_service.try_delete,
        async_service.try_release,
    ):
        assert await attempt(never) is False
    assert not await async_service.try_extend(never, 60)
    assert not await async_service.try_fail(never, "no")
    assert await async_service.try_archive(theirs)


async def test_the_fence_holds_on_every_driver(async_service, async_session, engine):
    """F2."""
    await async_service.enqueue_many("mail", [1, 2, 3])
    a, b, c = await async_service.dequeue("mail", 3)
    await async_session.commit()
    with Session(engine) as session:
        theirs = lost_to(QueueService(session), session, b)
        session.commit()
    for settle in (
        lambda: async_service.archive_many([a, b, c]),
        lambda: async_service.delete_many([a, b, c]),
        lambda: async_service.extend_many([a, b, c], 60),
        lambda: async_service.release_many([a, b, c]),
        lambda: async_service.fail_many([a, b, c], "no"),
    ):
        with pytest.raises(LeaseLost) as lost:
            await settle()
        assert lost.value.ids == (b.id,)
        assert lost.value.whereabouts[b.id].until == theirs.leased_until
    assert (await async_service.messages.metrics("mail")).leased == 3
    assert await async_service.try_fail_many([b, a], "no") == [False, True]
    assert await async_service.try_archive_many([b, c]) == [False, True]


# --- what a lost lease says ----------------------------------------------------------------------


def test_a_lost_lease_says_who_holds_it_and_until_when(service, session, other):
    worker = other.workers.register("their worker")
    mine = lease(service)
    theirs = lost_to(other, session, mine, worker=worker)
    with pytest.raises(LeaseLost) as lost:
        service.archive(mine)
    where = lost.value.whereabouts[mine.id]
    assert (where.state, where.read_ct, where.worker_id) == ("leased", 2, worker.id)
    assert where.until == theirs.leased_until
    assert lost.value.id == mine.id
    until = theirs.leased_until.isoformat()
    for part in (f"message {mine.id} is leased", f"worker {worker.id}", until):
        assert part in str(lost.value)


WENT: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "ready": lambda queue, theirs: queue.release(theirs),
    "scheduled": lambda queue, theirs: queue.release(theirs, delay=60),
    "archived": lambda queue, theirs: queue.archive(theirs),
    "discarded": lambda queue, theirs: queue.archive(theirs, outcome="discarded"),
    "dead": lambda queue, theirs: queue.fail(theirs, "no", dead=True),
    "cancelled": lambda queue, theirs: (
        queue.release(theirs),
        queue.messages.cancel(theirs.id),
    ),
    "gone": lambda queue, theirs: queue.delete(theirs),
    "exhausted": lambda queue, theirs: run_out(queue.session, theirs),
}


@each_case("state", list(WENT), before="reset")
def test_a_lost_lease_says_what_became_of_the_message(service, session, other, state):
    mine = lease(service, max_read_ct=2)
    WENT[state](other, lost_to(other, session, mine))
    with pytest.raises(LeaseLost) as lost:
        service.archive(mine)
    where = lost.value.whereabouts[mine.id]
    assert where.state == state
    assert where.read_ct == (None if state == "gone" else 2)
    assert (where.until is not None) == (state == "scheduled")
    assert f"message {mine.id} is {state}" in str(lost.value)


def test_a_lost_lease_names_each_lost_message_of_a_batch_and_no_other(service, session, other):
    held = lease(service, 6)
    lost_to(other, session, held[4])
    other.archive(lost_to(other, session, held[1]))
    other.delete(lost_to(other, session, held[3]))
    with pytest.raises(LeaseLost) as lost:
        service.archive_many(reversed(held))
    states = {id_: where.state for id_, where in lost.value.whereabouts.items()}
    assert states == {held[4].id: "leased", held[3].id: "gone", held[1].id: "archived"}
    assert lost.value.ids == (held[4].id, held[3].id, held[1].id)


def test_a_released_lease_is_lost_to_nobody(service, session):
    """The holder's own release is told as such: the message waits for anyone."""
    mine = lease(service)
    service.release(mine)
    with pytest.raises(LeaseLost) as lost:
        service.archive(mine)
    where = lost.value.whereabouts[mine.id]
    assert (where.state, where.worker_id, where.until) == ("ready", None, None)


# --- fail ----------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_after_a_backoff(service, session):
    delivery = lease(service)
    for attempt in (1, 2, 3):
        assert delivery.read_ct == attempt
        begun = now(session)
        failure = service.fail(delivery, ValueError(f"no {attempt}"))
        wait = (failure.vt - begun).total_seconds()
        expected = DEFAULT_BACKOFF.base * DEFAULT_BACKOFF.factor ** (attempt - 1)
        assert 0.9 * expected <= wait <= 1.1 * expected + 2
        assert service.dequeue("mail") == []
        come_due(session, delivery)
        (delivery,) = service.dequeue("mail")
        assert delivery.last_error == f"ValueError: no {attempt}"


def test_a_failure_is_tried_again_after_the_delay_given(service, session):
    delivery = lease(service)
    begun = now(session)
    failure = service.fail(delivery, "no", delay=timedelta(minutes=5))
    assert (failure.id, failure.dead) == (delivery.id, False)
    assert 0 <= (failure.vt - begun).total_seconds() - 300 < 5
    info = service.messages.get(delivery.id)
    assert (info.state, info.vt, info.worker_id) == ("scheduled", failure.vt, None)


def test_the_last_failure_makes_a_dead_letter(service, session):
    """F43."""
    delivery = lease(service, max_read_ct=3, headers={"h": 1}, key="k")
    for _ in range(2):
        assert not service.fail(delivery, "no", delay=0).dead
        (delivery,) = service.dequeue("mail")
    assert service.fail(delivery, "never") == Failure(delivery.id, dead=True, vt=None)
    session.commit()
    (dead,) = service.archived.find("mail")
    assert (dead.id, dead.outcome, dead.read_ct) == (delivery.id, "dead", 3)
    assert (dead.payload, dead.headers, dead.key) == (0, {"h": 1}, "k")
    assert (dead.last_error, dead.reason) == ("never", "attempt 3 of 3 failed")
    assert service.messages.metrics("mail").live == 0


def test_a_message_can_be_buried_with_attempts_left(service):
    delivery = lease(service)
    failure = service.fail(delivery, "poison", dead=True, reason="not for us")
    assert failure == Failure(delivery.id, dead=True, vt=None)
    (dead,) = service.archived.find("mail", outcome="dead")
    assert (dead.read_ct, dead.last_error, dead.reason) == (1, "poison", "not for us")


def test_failures_of_a_batch_come_in_its_order(service, session):
    spent = lease(service, max_read_ct=1)
    left = lease(service, 2)
    failures = service.fail_many([left[1], spent, left[0]], "no", delay=5)
    assert [(failure.id, failure.dead) for failure in failures] == [
        (left[1].id, False),
        (spent.id, True),
        (left[0].id, False),
    ]
    assert all((failure.vt is None) == failure.dead for failure in failures)


class Noise(Exception):
    def __str__(self) -> str:
        return "noise " * 100_000


@each_case(
    ("error", "text"),
    {
        "NUL": ("a\0b", "a\\x00b"),
        "surrogate": ("lone \ud800", "lone \\ud800"),
        "exception": (ValueError("x\0"), "ValueError: x\\x00"),
        "interrupt": (KeyboardInterrupt(), "KeyboardInterrupt: "),
        "empty": ("", ""),
        "longest": ("\N{SNOWMAN}" * 8192, "\N{SNOWMAN}" * 8192),
        "too long": ("\N{SNOWMAN}" * 8193, "\N{SNOWMAN}" * 8192 + "…"),
    },
)
@each_case("dead", [False, True], before="reset_async")
async def test_any_error_can_be_kept(async_service, async_session, error, text, dead):
    await async_service.enqueue("mail", 1)
    (delivery,) = await async_service.dequeue("mail")
    await async_service.fail(delivery, error, dead=dead, reason=str(error), delay=0)
    await async_session.commit()
    if dead:
        (found,) = await async_service.archived.find("mail")
        if isinstance(error, str):
            assert found.reason == text
    else:
        (found,) = await async_service.dequeue("mail")
    assert found.last_error == text


def test_an_error_of_any_length_is_bounded(service):
    delivery = lease(service)
    service.fail(delivery, Noise(), delay=0)
    assert len(service.messages.get(delivery.id).last_error.encode()) < 9000


def test_an_error_is_kept_when_the_next_attempt_succeeds(service):
    """What went wrong before stays in the archive."""
    service.fail(lease(service), "first", delay=0)
    (delivery,) = service.dequeue("mail")
    service.archive(delivery)
    assert service.archived.find("mail")[0].last_error == "first"


# --- release and attempts ------------------------------------------------------------------------


def test_a_release_gives_the_attempt_back(service, session):
    delivery = lease(service, max_read_ct=1)
    for _ in range(5):
        service.release(delivery)
        (delivery,) = service.dequeue("mail")
    assert delivery.max_read_ct - delivery.read_ct == 0
    assert service.fail(delivery, "no").dead
    assert service.dequeue("mail") == []


def test_a_release_can_wait(service, session):
    delivery, minute = lease(service), timedelta(minutes=1)
    begun = now(session)
    service.release(delivery, delay=60)
    info = service.messages.get(delivery.id)
    assert (info.state, info.worker_id, info.dequeued_at) == ("scheduled", None, None)
    assert begun + minute <= info.vt <= now(session) + minute


def test_attempts_are_those_of_the_message_or_else_of_its_queue(service, session):
    service.queues.update("mail", max_read_ct=2)
    service.enqueue_many("mail", ["queue's", Item("own", max_read_ct=7)])
    service.enqueue("mail", "own", max_read_ct=8)
    assert [delivery.max_read_ct for delivery in service.dequeue("mail", 5)] == [2, 7, 8]


def test_a_new_limit_holds_for_messages_that_were_never_leased(service, session):
    service.enqueue_many("mail", ["leased", "waiting"])
    (leased,) = service.dequeue("mail")
    service.queues.update("mail", max_read_ct=1)
    service.release(leased)
    deliveries = service.dequeue("mail", 5)
    assert {delivery.payload: delivery.max_read_ct for delivery in deliveries} == {
        "leased": 6,
        "waiting": 1,
    }


# --- bury ----------------------------------------------------------------------------------------


def test_a_message_whose_last_lease_ran_out_is_given_to_nobody_and_buried(service, session):
    """F43: its holder died, or never said."""
    delivery = lease(service, max_read_ct=1)
    assert service.archived.bury("mail") == 0
    run_out(session, delivery)
    assert service.messages.metrics("mail").exhausted == 1
    assert service.dequeue("mail", 5) == []  # finds nothing, and so sees to what nobody will
    assert service.messages.metrics("mail").exhausted == 0
    (dead,) = service.archived.find("mail")
    assert (dead.id, dead.outcome) == (delivery.id, "dead")
    assert "no attempts left" in dead.reason
    assert_all_lost(service, delivery)


def test_burying_takes_only_what_is_exhausted(service, session):
    """A.3.4: no live lease, no attempts left over, no other queue."""
    service.queues.create("other")
    service.enqueue("other", 1, max_read_ct=1)
    elsewhere = service.dequeue("other")
    again, *spent = [lease(service, max_read_ct=n) for n in (2, 1, 1, 1)]
    run_out(session, again, *spent[:2], *elsewhere)
    assert service.archived.bury("mail", limit=1) == 1
    assert service.archived.bury("mail") == 1
    assert service.archived.bury("mail") == 0
    assert {message.id for message in service.archived.find()} == {
        delivery.id for delivery in spent[:2]
    }


def test_burying_leaves_to_others_what_they_are_settling(service, session, other, engine):
    """F14: an exhausted message that its holder archives this very moment."""
    a, b = lease(service, 2, max_read_ct=1)
    run_out(session, a, b)
    service.archive(a)
    assert other.archived.bury("mail") == 1
    session.commit()
    outcomes = {message.id: message.outcome for message in service.archived.find("mail")}
    assert outcomes == {a.id: "archived", b.id: "dead"}


def test_a_dead_letter_can_be_requeued_and_worked_on(service, session):
    """A.3.5."""
    service.fail(lease(service, max_read_ct=1, key="k", headers={"h": 1}), "no")
    (dead,) = service.archived.find("mail")
    receipt = service.archived.requeue(dead.id, delay=0, attempts=2)
    assert isinstance(receipt, Receipt)
    assert service.archived.find("mail") == []
    (delivery,) = service.dequeue("mail")
    assert (delivery.id, delivery.payload, delivery.key) == (receipt.id, 0, "k")
    assert (delivery.read_ct, delivery.max_read_ct, delivery.last_error) == (2, 3, "no")
    assert not service.fail(delivery, "no", delay=0).dead


# --- workers -------------------------------------------------------------------------------------


def test_a_lease_records_its_worker(service, session):
    worker = service.workers.register("w")
    session.commit()
    by_id = QueueService(session, worker=worker.id)
    assert lease(by_id).worker_id == worker.id
    row = session.get_one(Worker, worker.id)
    assert lease(service, worker=row).worker_id == worker.id
    assert lease(service).worker_id is None
    holds = sa.select(sa.func.count()).where(Message.consumer_worker_id == worker.id)
    assert session.scalar(holds) == 2


@each_case("status", ["suspended", "stopped"], before="reset")
def test_a_worker_that_is_not_ready_leases_nothing(service, session, status):
    """A.3.8."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    service.enqueue("mail", 1)
    {"suspended": service.workers.suspend, "stopped": service.workers.stop}[status](worker.id)
    session.commit()
    before = rows(session)
    with pytest.raises(WorkerNotReady) as refused:
        service.dequeue("mail", worker=worker)
    assert (refused.value.id, refused.value.status) == (worker.id, status)
    assert rows(session) == before
    service.archive(held)


def test_a_worker_that_was_never_registered_leases_nothing(service, session):
    service.enqueue("mail", 1)
    with pytest.raises(WorkerNotFound):
        service.dequeue("mail", worker=77)
    assert service.dequeue("mail")


def test_a_worker_whose_row_was_deleted_loses_what_it_held_when_the_lease_ends(
    service, session, other
):
    """F13."""
    worker = service.workers.register("w")
    mine = lease(service, worker=worker)
    session.execute(sa.delete(Worker))
    session.commit()
    assert other.dequeue("mail") == []
    with pytest.raises(WorkerNotFound):
        service.dequeue("mail", worker=worker)
    theirs = lost_to(other, session, mine)
    assert theirs.worker_id is None
    assert_all_lost(service, mine)


def test_a_worker_that_holds_something_is_not_purged(service, session):
    """F13."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    service.workers.stop(worker.id)
    session.commit()
    assert service.workers.purge(older_than=0) == 0
    service.archive(held)
    session.commit()
    assert service.workers.purge(older_than=0) == 1


def test_reclaiming_takes_back_what_the_silent_hold_and_nothing_else(service, session, other):
    """F14."""
    silent, live = service.workers.register("silent"), service.workers.register("live")
    lost = lease(service, 2, worker=silent)
    kept = lease(service, worker=live)
    nobodys = lease(service)
    silence(session, silent)
    assert service.workers.reclaim(silent_for=60) == 2
    session.commit()
    assert service.workers.get(silent.id).status == "stopped"
    assert service.workers.get(live.id).status == "ready"
    for delivery in lost:
        assert_all_lost(service, delivery)
    service.archive_many([kept, nobodys])
    assert [delivery.read_ct for delivery in other.dequeue("mail", 5)] == [2, 2]
    with pytest.raises(WorkerNotReady):
        service.workers.heartbeat(silent.id)
    with pytest.raises(WorkerNotReady):
        service.dequeue("mail", worker=silent)


def test_reclaiming_spares_a_worker_that_is_just_coming_back(service, session, other):
    """F14: its heartbeat is on the way, and judged before it is seen."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    silence(session, worker)
    service.workers.heartbeat(worker.id)
    assert other.workers.reclaim(silent_for=60) == 0
    session.commit()
    assert other.workers.reclaim(silent_for=60) == 0
    service.archive(held)


def test_a_worker_that_comes_back_during_a_reclaim_learns_of_it(service, session, engine):
    """F14: the heartbeat waits for the disposition."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    silence(session, worker)
    assert service.workers.reclaim(silent_for=60) == 1
    with blocked(engine, lambda other: other.workers.heartbeat(worker.id)) as heartbeat:
        session.commit()
        with pytest.raises(WorkerNotReady):
            heartbeat.result(10)
    assert_all_lost(service, held)


def test_a_reclaim_that_was_rolled_back_took_nothing(service, session, engine):
    """F14."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    silence(session, worker)
    assert service.workers.reclaim(silent_for=60) == 1
    with blocked(engine, lambda other: other.archive(held)) as archived:
        session.rollback()
        archived.result(10)
    assert service.workers.get(worker.id).status == "ready"


def test_a_settlement_during_a_reclaim_is_lost_once_that_commits(service, session, engine):
    """F14: the settlement waits for the row, and finds it given away."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    silence(session, worker)
    assert service.workers.reclaim(silent_for=60) == 1
    with blocked(engine, lambda other: other.archive(held)) as archived:
        session.commit()
        with pytest.raises(LeaseLost) as lost:
            archived.result(10)
    assert lost.value.whereabouts[held.id].state == "ready"


def test_a_reclaim_during_a_settlement_leaves_that_alone(service, session, other):
    """F14."""
    worker = service.workers.register("w")
    settled, held = lease(service, 2, worker=worker)
    silence(session, worker)
    service.archive(settled)
    assert other.workers.reclaim(silent_for=60) == 1
    session.commit()
    assert [message.id for message in service.archived.find()] == [settled.id]
    assert_all_lost(service, held)


def test_leases_of_one_worker_can_be_released_by_others(service, session, other):
    a, b = service.workers.register("a"), service.workers.register("b")
    lost, kept = lease(service, worker=a), lease(service, worker=b)
    assert other.workers.release_leases(a.id) == 1
    assert_all_lost(service, lost)
    service.archive(kept)


# --- what a dequeue gives ------------------------------------------------------------------------


def test_a_paused_queue_gives_nothing_and_takes_everything_else(service, session):
    held = lease(service)
    service.queues.pause("mail")
    session.commit()
    service.enqueue("mail", 1)
    assert service.dequeue("mail", 5) == []
    service.archive(held)
    service.queues.resume("mail")
    assert len(service.dequeue("mail", 5)) == 1


def test_priority_goes_before_age_and_age_before_id(service, session):
    for payload, priority in (("c", 0), ("d", 0), ("a", -32768), ("b", -1), ("e", 32767)):
        service.enqueue("mail", payload, priority=priority)
    service.enqueue("mail", "b2", priority=-1)
    earlier = sa.func.statement_timestamp() - timedelta(minutes=1)
    session.execute(
        sa.update(Message)
        .where(Message.payload == sa.literal("d", Message.payload.type))
        .values(vt=earlier)
    )
    assert "".join(delivery.payload for delivery in service.dequeue("mail", 3)) == "abb2"
    assert [delivery.payload for delivery in service.dequeue("mail", 9)] == ["d", "c", "e"]


def test_what_is_scheduled_is_given_when_its_time_comes(service, session):
    receipt = service.enqueue("mail", 1, delay=3600)
    assert service.dequeue("mail") == []
    session.execute(sa.update(Message).values(vt=sa.func.statement_timestamp()))
    assert [delivery.id for delivery in service.dequeue("mail")] == [receipt.id]


def test_a_queue_gives_only_its_own(service, session):
    service.queues.create("other")
    service.enqueue("other", 1)
    assert service.dequeue("mail") == []
    with pytest.raises(QueueNotFound) as missing:
        service.dequeue("mial")
    assert missing.value.suggestions == ("mail",)


@pytest.fixture
def customers(session: Session, service: QueueService) -> None:
    AppBase.metadata.create_all(session.connection())
    session.add_all([Customer(id=n, active=n % 2 == 0) for n in range(1, 6)])
    session.add_all([Visit(id=n, customer_id=2) for n in range(3)])
    for n in range(1, 6):
        service.enqueue(
            "mail",
            {"customer": n, "kind": "bill" if n < 4 else "note", "tags": [n, "x"]},
            headers={"tenant": n},
            priority=-n,
        )
    session.commit()


_OF_CUSTOMER = Message.payload["customer"].as_integer() == Customer.id
WHERE: dict[str, tuple[Any, list[int]]] = {
    "path": (Message.payload["kind"].astext == "bill", [3, 2, 1]),
    "deep path": (Message.payload[("tags", "0")].as_integer() >= 4, [5, 4]),
    "contains": (Message.payload.contains({"kind": "note"}), [5, 4]),
    "headers": (Message.headers["tenant"].as_integer() == 2, [2]),
    "column": (Message.priority < -3, [5, 4]),
    "several": ([Message.priority < -1, Message.payload["kind"].astext == "bill"], [3, 2]),
    "hybrid": (Message.ready, [5, 4, 3, 2, 1]),
    "exists": (sa.exists().where(_OF_CUSTOMER, Customer.active), [4, 2]),
    "in a subquery": (
        Message.payload["customer"].as_integer().in_(sa.select(Customer.id).where(Customer.active)),
        [4, 2],
    ),
    "join": ([_OF_CUSTOMER, Customer.active], [4, 2]),
    "join to many": (Message.payload["customer"].as_integer() == Visit.customer_id, [2]),
    "text": (sa.text("pgqrs_messages.priority = -1"), [1]),
    "none": (sa.false(), []),
}


@each_case("name", list(WHERE))
@each_case("limit", [1, 5], before="rollback")
def test_criteria_choose_among_the_visible(service, customers, name, limit):
    criteria, expected = WHERE[name]
    taken = service.dequeue("mail", limit, where=criteria)
    assert [delivery.payload["customer"] for delivery in taken] == expected[:limit]
    rest = service.dequeue("mail", 5)
    assert len(taken) + len(rest) == 5


@each_case("name", list(WHERE), before="rollback_async")
async def test_criteria_choose_among_the_visible_on_every_driver(
    async_service, service, customers, name
):
    criteria, expected = WHERE[name]
    found = await async_service.messages.find("mail", where=criteria)
    assert {row.payload["customer"] for row in found} == set(expected)
    taken = await async_service.dequeue("mail", 5, where=criteria)
    assert [delivery.payload["customer"] for delivery in taken] == expected


def test_rows_of_the_application_are_not_locked_by_criteria(service, session, customers, engine):
    """Only messages are: the application goes on with its own."""
    assert service.dequeue("mail", where=[_OF_CUSTOMER, Customer.active])
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '1s'"))
        connection.execute(sa.update(Customer).values(active=False))


# --- queues that go away -------------------------------------------------------------------------


def test_a_deleted_queue_is_told_to_its_consumers(service, session, other):
    """F40."""
    mine = lease(service)
    other.queues.purge("mail")
    session.execute(sa.delete(Queue))
    session.commit()
    with pytest.raises(QueueNotFound):
        service.dequeue("mail")
    assert_all_lost(service, mine)


def test_a_queue_deleted_by_force_takes_what_is_held(service, session):
    """F40."""
    mine = lease(service)
    service.archive(lease(service))
    service.queues.delete("mail", force=True)
    session.commit()
    assert_all_lost(service, mine)
    assert session.scalars(sa.select(Message.id)).all() == []
    assert session.scalars(sa.select(ArchivedMessage.id)).all() == []


def test_a_purge_keeps_the_archive_and_the_workers(service, session):
    """A.3.10."""
    worker = service.workers.register("w")
    service.archive(lease(service, worker=worker))
    mine = lease(service, worker=worker)
    service.enqueue("mail", 1)
    assert service.queues.purge("mail") == 2
    session.commit()
    assert len(service.archived.find("mail")) == 1
    assert service.workers.get(worker.id)
    assert_all_lost(service, mine)


def test_metrics_tell_the_held_from_the_waiting(service, session):
    """A.3.15: what a dead worker holds is leased until its lease has run out."""
    worker = service.workers.register("w")
    held = lease(service, worker=worker)
    service.workers.stop(worker.id)
    service.enqueue("mail", 1)
    service.enqueue("mail", 1, delay=60)
    metrics = service.messages.metrics("mail")
    assert (metrics.ready, metrics.scheduled, metrics.leased) == (1, 1, 1)
    run_out(session, held)
    metrics = service.messages.metrics("mail")
    assert (metrics.ready, metrics.scheduled, metrics.leased) == (2, 1, 0)


# --- keys ----------------------------------------------------------------------------------------


def test_a_retry_under_a_key_after_a_lost_commit_makes_one_message(service, session):
    """F17, E4: whether the first went through or not."""
    first = service.enqueue("mail", 1, key="order-1", delay=60)
    session.commit()
    again = service.enqueue("mail", 1, key="order-1")
    assert again == dataclasses.replace(first, duplicate=True)
    assert service.enqueue_many("mail", [Item(1, key="order-1")]) == [again]
    assert service.messages.metrics("mail").live == 1


@each_way
def test_a_key_is_free_once_its_message_has_left(service, session, way):
    delivery = lease(service, key="k")
    assert service.enqueue("mail", 2, key="k").duplicate
    SETTLE[way](service, [delivery])
    left = way in ("archive", "discard", "delete", "bury")
    assert service.enqueue("mail", 2, key="k").duplicate is not left


# --- one moment ----------------------------------------------------------------------------------


class blocked:  # noqa: N801 - reads like the function that it is
    """Run a call in a session of its own, in a thread, and enter once it waits for a lock."""

    def __init__(self, engine: sa.Engine, call: Callable[[QueueService], Any]) -> None:
        self.engine = engine
        self.call = call
        self.pid = 0
        self.begun = threading.Event()
        self.pool = ThreadPoolExecutor(1)

    def _run(self) -> Any:
        with Session(self.engine) as session, session.begin():
            self.pid = session.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()
            self.begun.set()
            return self.call(QueueService(session))

    def __enter__(self) -> Future[Any]:
        future = self.pool.submit(self._run)
        assert self.begun.wait(PATIENCE)
        until_blocked(self.engine, self.pid, future)
        return future

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def test_a_dequeue_waits_for_nobody(service, session, other):
    """What others are leasing, settling or cancelling is passed over."""
    service.enqueue_many("mail", range(5))
    session.commit()
    (first,) = service.dequeue("mail")
    assert [delivery.payload for delivery in other.dequeue("mail")] == [1]
    service.messages.cancel_where("mail", payload=2)
    assert [delivery.payload for delivery in other.dequeue("mail")] == [3]
    session.rollback()
    assert [delivery.payload for delivery in other.dequeue("mail", 5)] == [0, 2, 4]
    assert first.payload == 0


@each_way
def test_a_late_settlement_waits_for_the_new_lease_and_is_lost(service, session, engine, way):
    """F2: the lease ran out, and somebody takes the message this very moment."""
    mine = lease(service)
    run_out(session, mine)
    (theirs,) = service.dequeue("mail")
    with blocked(engine, lambda other: SETTLE[way](other, [mine])) as settled:
        session.commit()
        with pytest.raises(LeaseLost):
            settled.result(10)
    service.archive(theirs)


def test_a_late_settlement_goes_through_when_the_new_lease_is_rolled_back(service, session, engine):
    """F2."""
    mine = lease(service)
    run_out(session, mine)
    assert service.dequeue("mail")
    with blocked(engine, lambda other: other.archive(mine)) as settled:
        session.rollback()
        settled.result(10)
    assert service.archived.find("mail")[0].read_ct == 1


def test_criteria_that_only_name_another_table_are_refused(service, session, engine):
    """A forgotten join: one such row would make every message match."""
    session.execute(sa.text("CREATE TABLE stray (id int, cancelled bool)"))
    session.execute(sa.text("INSERT INTO stray VALUES (1, true), (2, false)"))
    stray = sa.table("stray", sa.column("id", sa.Integer), sa.column("cancelled", sa.Boolean))
    service.enqueue_many("mail", [{"stray": 2}, {"stray": 2}])
    for refused in (
        lambda: service.messages.cancel_where("mail", stray.c.cancelled),
        lambda: service.dequeue("mail", where=stray.c.cancelled),
        lambda: service.messages.find("mail", where=[stray.c.cancelled, Message.id > 0]),
        lambda: service.archived.count("mail", where=stray.c.cancelled),
    ):
        with pytest.raises(InvalidArgument, match="where speaks of stray without joining it"):
            refused()
    with pytest.raises(InvalidArgument, match="where must be criteria"):
        service.dequeue("mail", where="priority = 1")
    assert service.messages.metrics("mail").ready == 2
    session.rollback()


@each_case(
    "where",
    {
        "true": True,
        "false": False,
        "false among criteria": [Message.id > 0, False],
        "none": [None],
        "number": [5],
        "function": [lambda: Message.id > 0],
        "text": "priority = 1",
    },
    before="rollback",
)
def test_criteria_that_are_no_sql_are_refused(service, where):
    """A comparison in Python: it would match every message, or none."""
    service.enqueue("mail", 1)
    for refused in (
        lambda: service.messages.cancel_where("mail", where),
        lambda: service.dequeue("mail", where=where),
        lambda: service.messages.find("mail", where=where),
        lambda: service.archived.count("mail", where=where),
    ):
        with pytest.raises(InvalidArgument, match="where must be criteria of SQLAlchemy"):
            refused()
    assert service.messages.count("mail", where=sa.true()) == 1


@each_case(
    ("criterion", "name"),
    {
        "alias": (lambda: aliased(Message).id > 0, "an alias of pgqrs_messages"),
        "named alias": (
            lambda: aliased(Message, name="m").id > 0,
            r"m \(an alias of pgqrs_messages\)",
        ),
        "subquery": (lambda: sa.select(Message.id).subquery("s").c.id > 0, r"s \(a subquery\)"),
    },
    before="rollback",
)
def test_criteria_that_only_name_an_alias_are_refused_by_its_name(service, criterion, name):
    with pytest.raises(InvalidArgument, match=f"where speaks of {name} without joining"):
        service.messages.find("mail", where=criterion())


def test_criteria_that_join_to_many_match_a_message_once(service, session):
    session.execute(sa.text("CREATE TABLE lines (order_id int, n int)"))
    session.execute(
        sa.text(
            "INSERT INTO lines SELECT o, n FROM generate_series(1, 3) o, generate_series(1, 4) n"
        )
    )
    lines = sa.table("lines", sa.column("order_id", sa.Integer), sa.column("n", sa.Integer))
    service.enqueue_many("mail", [{"order": n} for n in range(1, 5)])
    joined = [lines.c.order_id == Message.payload["order"].as_integer(), lines.c.n > 1]
    assert service.messages.count("mail", where=joined) == 3
    assert [
        message.payload["order"] for message in service.messages.find("mail", where=joined)
    ] == [
        1,
        2,
        3,
    ]
    assert len(service.dequeue("mail", 3, where=joined)) == 3
    session.rollback()


def test_the_error_names_what_was_lost_also_if_it_is_held_again_by_then(service, session):
    """As after the rollback of another transaction that had changed it."""
    deliveries = lease(service, 2)
    error = lease_lost(service._scope, deliveries)
    assert error.ids == tuple(delivery.id for delivery in deliveries)

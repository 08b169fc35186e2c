"""Several sessions at once, in threads and in processes.

Races that can be told step by step are: the second session is seen to wait for the first (in
``pg_blocking_pids``) before the first goes on. The others start together at a barrier, and are
judged by what is in the tables in the end.
"""

from __future__ import annotations

import inspect
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqrs_sa import (
    ArchivedMessage,
    DuplicateMessage,
    Item,
    LeaseLost,
    Message,
    MessageLeased,
    MessageNotFound,
    Queue,
    QueueNotEmpty,
    QueueNotFound,
    QueueService,
    Worker,
    WorkerNotReady,
)
from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.models import READY_MADE
from support import programs
from support.waiting import PATIENCE, until, until_blocked


class AppBase(DeclarativeBase):
    pass


class Effect(AppBase):
    """What the work on a message left behind; written in the transaction that settles it."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int]
    read_ct: Mapped[int]


class Taken(AppBase):
    """A lease that somebody was given; written in the transaction that took it."""

    __tablename__ = "taken"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int]
    read_ct: Mapped[int]


@pytest.fixture
def migrated(migrated: Any) -> Any:
    engine = sa.create_engine(migrated.url, poolclass=sa.NullPool)
    AppBase.metadata.create_all(engine)
    return migrated


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """Wide enough for the threads; a wait for a lock that is never given fails the test."""
    options = {"options": "-c lock_timeout=90s"}
    engine = sa.create_engine(migrated.url, pool_size=20, connect_args=options)
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def no_deadlock(kept: Any) -> Iterator[None]:
    """The server's own count of deadlocks, over a test."""

    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"

    def deadlocks() -> int:
        """Counted once the connections are gone: a server process reports at its end."""
        url = kept.direct.url
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            until(lambda: not connection.execute(sa.text(others)).scalar_one(), "all are closed")
            return connection.execute(sa.text(counted)).scalar_one()

    before = deadlocks()
    yield
    assert deadlocks() == before


def together(engine: sa.Engine, *calls: Callable[[Session], Any]) -> list[Any]:
    """Each call in a thread and a session of its own, begun together; what they return."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[Session], Any]) -> Any:
        with Session(engine) as session:
            session.connection()
            barrier.wait(PATIENCE)
            result = call(session)
            session.commit()
            return result

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(one, call) for call in calls]
    return [future.result() for future in futures]


class blocked:  # noqa: N801 - reads like the function that it is
    """Run a call in a session of its own, in a thread, and enter once it waits for a lock."""

    def __init__(
        self, engine: sa.Engine, call: Callable[[QueueService], Any], **options: Any
    ) -> None:
        self.engine = engine.execution_options(**options)
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


def count(engine: sa.Engine, model: Any = Message, *where: Any) -> int:
    with engine.connect() as connection:
        statement = sa.select(sa.func.count()).select_from(model).where(*where)
        return connection.execute(statement).scalar_one()


def orphans(engine: sa.Engine) -> int:
    """Messages, live or archived, of queues that are not there."""
    queues = sa.select(Queue.id)
    return sum(
        count(engine, model, model.queue_id.not_in(queues)) for model in (Message, ArchivedMessage)
    )


def leased(engine: sa.Engine, n: int, **options: Any) -> list[Any]:
    with Session(engine) as session:
        queue = QueueService(session)
        queue.enqueue_many("mail", [Item(i, **options) for i in range(n)])
        deliveries = queue.dequeue("mail", n)
        session.commit()
    assert len(deliveries) == n
    return deliveries


# --- draining ------------------------------------------------------------------------------------


def drain(session: Session) -> int:
    """Lease and settle until nothing is left; some of it only at a later attempt."""
    queue, done = QueueService(session), 0
    while deliveries := queue.dequeue("mail", random.randint(1, 5)):
        session.add_all(
            Taken(message_id=delivery.id, read_ct=delivery.read_ct) for delivery in deliveries
        )
        session.commit()
        for delivery in deliveries:
            match delivery.payload % 3 if delivery.read_ct == 1 else 0:
                case 1:
                    queue.fail(delivery, "not yet", delay=0)
                case 2:
                    queue.release(delivery)
                case _:
                    session.add(Effect(message_id=delivery.id, read_ct=delivery.read_ct))
                    queue.archive(delivery)
                    done += 1
        session.commit()
    return done


def assert_drained(engine: sa.Engine, n: int) -> None:
    """Each lease was given once, and each message settled once."""
    with Session(engine) as session:
        taken = Counter(session.execute(sa.select(Taken.message_id, Taken.read_ct)).all())
        effects = Counter(session.scalars(sa.select(Effect.message_id)))
        settled = Counter(session.scalars(sa.select(ArchivedMessage.id)))
        metrics = QueueService(session).messages.metrics("mail")
    expected = {(id_ + 1, 1) for id_ in range(n)} | {(i + 1, 2) for i in range(n) if i % 3}
    assert set(taken) == expected
    assert set(taken.values()) == set(effects.values()) == set(settled.values()) == {1}
    assert set(effects) == set(settled) == set(range(1, n + 1))
    assert (metrics.live, metrics.archived) == (0, n)


def test_threads_drain_a_queue_together(engine, service, session):
    service.enqueue_many("mail", range(300))
    session.commit()
    done = together(engine, *[drain] * 8)
    assert sum(done) == 300
    assert_drained(engine, 300)


PROCESS = inspect.cleandoc(
    """
    import random, sys
    import sqlalchemy as sa
    from sqlalchemy.orm import Session
    from pgqrs_sa import QueueService

    taken = sa.table("taken", sa.column("message_id"), sa.column("read_ct"))
    effects = sa.table("effects", sa.column("message_id"), sa.column("read_ct"))
    engine = sa.create_engine(sys.argv[1])
    with Session(engine) as session:
        worker = QueueService(session).workers.register("process", queues=["mail"])
        queue = QueueService(session, worker=worker)
        session.commit()
        print("ready", flush=True)
        sys.stdin.readline()
        while deliveries := queue.dequeue("mail", random.randint(1, 5)):
            values = [{"message_id": one.id, "read_ct": one.read_ct} for one in deliveries]
            session.execute(sa.insert(taken), values)
            session.commit()
            for delivery, value in zip(deliveries, values):
                if delivery.read_ct == 1 and delivery.payload % 3:
                    queue.fail(delivery, "not yet", delay=0)
                else:
                    session.execute(sa.insert(effects), value)
                    queue.archive(delivery)
            session.commit()
    engine.dispose()
    """
)


def test_processes_drain_a_queue_together(engine, service, session, migrated):
    service.enqueue_many("mail", range(300))
    session.commit()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(programs.start("-c", PROCESS, migrated.url)) for _ in range(4)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=2 * PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends
    assert_drained(engine, 300)
    holders = session.scalars(sa.select(ArchivedMessage.consumer_worker_id).distinct()).all()
    assert set(holders) <= set(session.scalars(sa.select(Worker.id)))


def test_effects_happen_once_though_leases_run_out_all_the_time(engine, service, session):
    """The promise: work and settlement in one transaction, whichever consumer got the message."""
    service.queues.update("mail", max_read_ct=100_000)
    service.enqueue_many("mail", range(60))
    session.commit()
    lost: list[int] = []
    deadline = time.monotonic() + 2 * PATIENCE

    def work(session: Session) -> None:
        queue = QueueService(session)
        while queue.messages.metrics("mail").live and time.monotonic() < deadline:
            # Now and then one that lasts, or on a slow machine none is ever long enough.
            deliveries = queue.dequeue("mail", 3, lease=random.choice([0.004, 0.004, 0.004, 5]))
            session.commit()
            for delivery in deliveries:
                session.execute(sa.select(sa.func.pg_sleep(random.choice([0, 0.002, 0.006]))))
                session.add(Effect(message_id=delivery.id, read_ct=delivery.read_ct))
                try:
                    queue.archive(delivery)
                except LeaseLost:
                    lost.append(delivery.id)
                    session.rollback()
                else:
                    session.commit()

    together(engine, *[work] * 6)
    effects = Counter(session.scalars(sa.select(Effect.message_id)))
    assert len(effects) == 60
    assert set(effects.values()) == {1}
    assert lost, "no lease ran out: the test shows nothing"


# --- locks ---------------------------------------------------------------------------------------

BATCHES: dict[str, Callable[[QueueService, list[Any]], list[bool]]] = {
    "archive": lambda queue, held: queue.try_archive_many(held),
    "delete": lambda queue, held: queue.try_delete_many(held),
    "release": lambda queue, held: queue.try_release_many(held),
    "fail": lambda queue, held: queue.try_fail_many(held, "no", delay=60),
    "bury": lambda queue, held: queue.try_fail_many(held, "no", dead=True),
}


@pytest.mark.parametrize("way", BATCHES)
def test_batches_in_opposite_orders_do_not_deadlock(engine, service, way):
    """E2, F31: all of them are settled by one or the other."""
    rounds = 20 if way == "archive" else 5
    for _ in range(rounds):
        held = leased(engine, 300)
        shuffled = random.sample(held, len(held))
        first, second, third = together(
            engine,
            lambda session, held=held: BATCHES[way](QueueService(session), held),
            lambda session, held=held: BATCHES[way](QueueService(session), held[::-1])[::-1],
            lambda session, some=shuffled: BATCHES["archive"](QueueService(session), some),
        )
        third = [
            done for _, done in sorted(zip([entry.id for entry in shuffled], third, strict=True))
        ]
        assert [sum(done) for done in zip(first, second, third, strict=True)] == [1] * len(held)


def test_batches_of_two_kinds_do_not_deadlock(engine, service):
    """F31: a batch that fails takes two statements."""
    for _ in range(5):
        held = leased(engine, 200)
        failed, extended = together(
            engine,
            lambda session, held=held: QueueService(session).try_fail_many(held, "no", delay=60),
            lambda session, held=held: QueueService(session).try_extend_many(held[::-1], 60),
        )
        assert all(failed)
        assert len(extended) == len(held)


def test_maintenance_and_consumers_do_not_deadlock(engine, service, session):
    """F31: all that locks several messages, at once."""
    service.queues.update("mail", max_read_ct=2, retention=0)
    rounds = 25

    def produce(session: Session) -> None:
        for n in range(rounds):
            QueueService(session).enqueue_many(
                "mail", [Item(i, delay=n % 2 / 100) for i in range(20)]
            )
            session.commit()

    def consume(session: Session) -> None:
        worker = QueueService(session).workers.register("w")
        queue = QueueService(session)
        for n in range(rounds):
            try:
                held = queue.dequeue("mail", 15, worker=worker, lease=0.01)
            except WorkerNotReady:
                session.rollback()
                worker = queue.workers.register("w")
                continue
            session.commit()
            random.shuffle(held)
            if held:
                [queue.try_archive_many, queue.try_release_many, queue.try_delete_many][n % 3](held)
            session.commit()

    def maintain(call: Callable[[QueueService], Any]) -> Callable[[Session], None]:
        def work(session: Session) -> None:
            for _ in range(rounds):
                call(QueueService(session))
                session.commit()

        return work

    together(
        engine,
        produce,
        consume,
        consume,
        maintain(lambda queue: queue.archived.bury("mail")),
        maintain(lambda queue: queue.workers.reclaim(silent_for=0.001)),
        maintain(lambda queue: queue.queues.purge("mail", limit=10)),
        maintain(lambda queue: queue.messages.cancel_where("mail", Message.scheduled)),
        maintain(lambda queue: queue.archived.prune(limit=10)),
    )
    assert orphans(engine) == 0


CHUNKS: dict[str, Callable[[QueueService], int]] = {
    "bury": lambda queue: queue.archived.bury("mail", limit=7),
    "purge": lambda queue: queue.queues.purge("mail", limit=7),
    "prune": lambda queue: queue.archived.prune(older_than=0, limit=7),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_of_several_at_once_add_up(engine, service, session, name):
    """Each row is counted by who removed it."""
    held = leased(engine, 100, max_read_ct=1)
    if name == "prune":
        service.archive_many(held)
    session.execute(sa.update(Message).values(leased_until=sa.func.statement_timestamp()))
    session.commit()

    def work(session: Session) -> int:
        done = 0
        while chunk := CHUNKS[name](QueueService(session)):
            session.commit()
            done += chunk
        return done

    # One that finds the rest in the hands of others stops early: what is left comes last.
    assert sum(together(engine, *[work] * 4)) + work(session) == 100


def test_leases_of_the_silent_are_reclaimed_once(engine, service, session):
    """A.3.8."""
    for n in range(4):
        worker = service.workers.register(f"w{n}")
        service.enqueue_many("mail", range(25))
        assert len(service.dequeue("mail", 25, worker=worker)) == 25
    session.execute(sa.update(Worker).values(heartbeat_at=sa.text("now() - interval '1 h'")))
    session.commit()
    calls = [lambda session: QueueService(session).workers.reclaim(silent_for=60)] * 4
    assert sum(together(engine, *calls)) == 100
    assert service.messages.metrics("mail").ready == 100


# --- keys ----------------------------------------------------------------------------------------


def test_one_key_at_once_makes_one_message(engine, service):
    def work(session: Session) -> Any:
        receipt = QueueService(session).enqueue("mail", 1, key="k")
        assert session.execute(sa.select(1)).scalar_one() == 1
        return receipt

    for n in range(1, 6):
        receipts = together(engine, *[work] * 8)
        assert Counter(receipt.duplicate for receipt in receipts) == {True: 7, False: 1}
        assert len({(receipt.id, receipt.vt) for receipt in receipts}) == 1
        assert count(engine) == 1
        with Session(engine) as session:
            QueueService(session).archive_many(QueueService(session).dequeue("mail"))
            session.commit()
        assert count(engine, ArchivedMessage) == n


def test_batches_of_the_same_keys_make_each_message_once(engine, service):
    items = [Item(n, key=f"k{n}") if n % 2 else n for n in range(100)]
    receipts = together(
        engine, *[lambda session: QueueService(session).enqueue_many("mail", items)] * 6
    )
    for n in range(100):
        places = Counter(some[n].duplicate for some in receipts)
        assert places == ({True: 5, False: 1} if n % 2 else {False: 6})
        assert len({some[n].id for some in receipts}) == (1 if n % 2 else 6)
    assert count(engine) == 50 + 6 * 50


def test_batches_of_the_same_keys_in_opposite_orders_do_not_deadlock(engine, service):
    """F31: each waits for the keys that the other has inserted and not committed."""
    for n in range(10):
        items = [Item(i, key=f"{n}-{i}") for i in range(500)]
        receipts = together(
            engine,
            lambda session, items=items: QueueService(session).enqueue_many("mail", items),
            lambda session, items=items: QueueService(session).enqueue_many("mail", items[::-1]),
        )
        assert sum(item.duplicate for some in receipts for item in some) == 500
    assert count(engine) == 5000


ENQUEUE: dict[str, Callable[[QueueService], Any]] = {
    "enqueue": lambda queue: queue.enqueue("mail", 2, key="k"),
    "enqueue_many": lambda queue: queue.enqueue_many("mail", [1, Item(2, key="k")])[1],
}
each_way = pytest.mark.parametrize("way", ENQUEUE)


@each_way
def test_a_key_in_flight_is_a_duplicate_once_it_commits(engine, service, session, way):
    first = service.enqueue("mail", 1, key="k")
    with blocked(engine, ENQUEUE[way]) as second:
        session.commit()
        receipt = second.result(10)
    assert (receipt.id, receipt.vt, receipt.duplicate) == (first.id, first.vt, True)


@each_way
def test_a_key_in_flight_is_free_once_it_rolls_back(engine, service, session, way):
    first = service.enqueue("mail", 1, key="k")
    with blocked(engine, ENQUEUE[way]) as second:
        session.rollback()
        receipt = second.result(10)
    assert receipt.id != first.id
    assert not receipt.duplicate
    assert count(engine, Message, Message.dedup_key == "k") == 1


@each_way
@pytest.mark.parametrize("settle", ["archive", "delete"])
def test_a_key_that_is_being_settled_is_free_once_that_commits(
    engine, service, session, way, settle
):
    (held,) = leased(engine, 1, key="k")
    getattr(service, settle)(held)
    with blocked(engine, ENQUEUE[way]) as second:
        session.commit()
        receipt = second.result(10)
    assert (receipt.duplicate, receipt.id != held.id) == (False, True)


@each_way
def test_a_key_that_was_not_settled_after_all_is_a_duplicate(engine, service, session, way):
    (held,) = leased(engine, 1, key="k")
    service.archive(held)
    with blocked(engine, ENQUEUE[way]) as second:
        session.rollback()
        receipt = second.result(10)
    assert (receipt.duplicate, receipt.id) == (True, held.id)


def test_keys_that_are_settled_meanwhile_are_duplicates_of_a_batch(engine, service, session):
    """They were live when its statement began: it need not be said again."""
    items = [Item(n, key=f"k{n}") for n in range(150)]
    first = service.enqueue_many("mail", items)
    held = service.dequeue("mail", 150)
    session.commit()
    sent: list[str] = []

    @event.listens_for(engine, "after_cursor_execute")
    def settle(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO pgqrs_messages" in statement:
            sent.append(statement)
            with Session(engine) as other, other.begin():
                QueueService(other).archive(held.pop())

    receipts = service.enqueue_many("mail", items)
    session.commit()
    assert all(receipt.duplicate for receipt in receipts)
    assert [receipt.id for receipt in receipts] == [item.id for item in first]
    assert len(sent) == 1
    assert count(engine) == 149


@each_way
def test_a_key_that_is_settled_between_the_two_statements_is_free(engine, service, session, way):
    """Found taken by the INSERT, which waited, and gone by the time that its message is looked for.

    A batch looks for those alone that were committed while it waited.
    """
    first = service.enqueue("mail", 1, key="k")
    settled = threading.Event()

    @event.listens_for(engine, "before_cursor_execute")
    def settle(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and "dedup_key" in statement and not settled.is_set():
            settled.set()
            with Session(engine) as other, other.begin():
                QueueService(other).messages.cancel(first.id)

    with blocked(engine, ENQUEUE[way]) as second:
        session.commit()
        receipt = second.result(PATIENCE)
    assert settled.is_set()
    assert (receipt.duplicate, receipt.id != first.id) == (False, True)
    assert count(engine, Message, Message.id == receipt.id) == 1


def test_a_key_that_is_settled_between_two_statements_makes_no_deadlock(engine, service, session):
    """Its batch has inserted later keys by then, for which another batch may wait."""
    first = service.enqueue("mail", "b", key="b")
    items = [Item(key, key=key) for key in ("d", "b", "c", "a")]
    pending = Message(queue_name="mail", payload="pending")  # flushed on the way, and kept
    others: list[Any] = []

    @event.listens_for(engine, "before_cursor_execute")
    def settle(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if others or not (statement.startswith("SELECT") and "dedup_key" in statement):
            return
        others.append(None)
        with Session(engine) as other, other.begin():
            QueueService(other).messages.cancel(first.id)
        other_batch = blocked(engine, lambda queue: queue.enqueue_many("mail", items[2:0:-1]))
        others[0] = other_batch, other_batch.__enter__()  # it has b, and waits

    def enqueue(queue: QueueService) -> Any:
        queue.session.add(pending)
        receipts = queue.enqueue_many("mail", items)
        assert queue.session.get(Message, pending.id) is pending
        return receipts

    with blocked(engine, enqueue) as second:
        session.commit()
        receipts = second.result(PATIENCE)
    ((batch, future),) = others
    theirs = future.result(PATIENCE)
    batch.__exit__()
    assert [delivery.duplicate for delivery in theirs] == [False, False]
    assert [receipt.duplicate for receipt in receipts] == [False, True, True, False]
    assert {delivery.id for delivery in theirs} <= {receipt.id for receipt in receipts}
    assert count(engine) == 5


def test_a_batch_whose_keys_come_and_go_is_sent_in_smaller_parts(engine, service, session):
    """So that what happens to one key does not send all the others again."""
    items = [Item(key, key=key) for key in "abcdefgh"]
    in_flight: queue.Queue[Session] = queue.Queue()
    taken = [service.enqueue("mail", "a", key="a").id]
    sent: list[int] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "INSERT INTO pgqrs_messages" in statement and "keys" in values:
            sent.append(len(values["keys"]))
        if statement.startswith("SELECT") and "dedup_key" in statement and taken[-1]:
            first = taken[-1]
            taken.append(0)
            with Session(engine) as other, other.begin():
                QueueService(other).messages.cancel(first)
            if len(taken) <= 4:  # twice more
                other = Session(engine)
                taken.append(QueueService(other).enqueue("mail", "a", key="a").id)
                in_flight.put(other)

    second = blocked(engine, lambda queue: queue.enqueue_many("mail", items))
    with second as future:
        session.commit()
        for _ in range(2):
            other = in_flight.get(timeout=PATIENCE)
            until_blocked(engine, second.pid, future)
            other.commit()
            other.close()
        receipts = future.result(PATIENCE)
    assert not any(receipt.duplicate for receipt in receipts)
    assert sent == [8, 4, 2, 1, 2, 4, 1]
    assert count(engine) == 8


@each_way
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_key_that_the_snapshot_cannot_see_is_a_serialization_failure(
    engine, service, session, way, level
):
    """F32: rather than a wait without end, or a second message."""
    with Session(engine.execution_options(isolation_level=level)) as old:
        old.execute(sa.select(Message.id)).all()
        service.enqueue("mail", 1, key="k")
        session.commit()
        with pytest.raises(sa.exc.DBAPIError) as failure:
            ENQUEUE[way](QueueService(old))
        assert failure.value.orig.sqlstate == "40001"


def test_a_key_is_not_shared_by_queues(engine, service, session):
    service.queues.create("other")
    session.commit()
    service.enqueue("mail", 1, key="k")
    with Session(engine) as other:
        assert not QueueService(other).enqueue("other", 1, key="k").duplicate


def test_an_archived_message_is_requeued_once(engine, service, session):
    (held,) = leased(engine, 1)
    service.archive(held)
    session.commit()
    (archived,) = service.archived.find("mail")
    session.rollback()

    def work(session: Session) -> int:
        try:
            return QueueService(session).archived.requeue(archived.id).id
        except MessageNotFound:
            return 0

    assert sorted(together(engine, *[work] * 4)) == [0, 0, 0, held.id]
    assert (count(engine), count(engine, ArchivedMessage)) == (1, 0)


def test_a_requeue_against_the_same_key_in_flight_loses_nothing(engine, service, session):
    (held,) = leased(engine, 1, key="k")
    service.archive(held)
    session.commit()
    (archived,) = service.archived.find("mail")
    session.rollback()
    service.enqueue("mail", 2, key="k")
    with blocked(engine, lambda queue: queue.archived.requeue(archived.id)) as requeue:
        session.commit()
        with pytest.raises(DuplicateMessage):
            requeue.result(10)
    assert (count(engine), count(engine, ArchivedMessage)) == (1, 1)


# --- queues --------------------------------------------------------------------------------------


def test_a_queue_created_at_once_is_one_queue(engine, migrated):
    """F41."""
    for n in range(5):
        infos = together(
            engine, *[lambda session, n=n: QueueService(session).queues.create(f"q{n}")] * 8
        )
        assert len(set(infos)) == 1
    assert count(engine, Queue) == 5


def test_a_queue_being_created_is_waited_for(engine, service, session):
    """F41: its settings are those of the first creator, or one's own if that one rolled back."""
    for n, end in enumerate((session.commit, session.rollback)):
        name = f"q{n}"
        service.queues.create(name, max_read_ct=7)
        with blocked(engine, lambda queue, name=name: queue.queues.create(name)) as second:
            end()
            assert second.result(10).max_read_ct == (7, 5)[n]


def test_a_queue_being_created_is_not_there_yet(engine, service, session):
    """F41."""
    service.queues.create("new")
    with Session(engine) as other:
        with pytest.raises(QueueNotFound):
            QueueService(other).enqueue("new", 1)
        with pytest.raises(QueueNotFound):
            QueueService(other).dequeue("new")
        session.commit()
        assert QueueService(other).enqueue("new", 1)


INTO: dict[str, Callable[[QueueService], Any]] = {
    "enqueue": lambda queue: queue.enqueue("mail", 1),
    "enqueue with a key": lambda queue: queue.enqueue("mail", 1, key="k"),
    "enqueue_many": lambda queue: queue.enqueue_many("mail", [1, 2]),
    "enqueue_from": lambda queue: queue.enqueue_from(
        "mail", sa.select(sa.literal(1).label("payload"))
    ),
    "add": lambda queue: (
        queue.session.add(Message(queue_name="mail", payload=1)),
        queue.session.flush(),
    ),
}
each_enqueue = pytest.mark.parametrize("into", INTO)


@each_enqueue
def test_deleting_a_queue_waits_for_what_is_being_enqueued(engine, service, session, into):
    """F40."""
    INTO[into](service)
    with blocked(engine, lambda queue: queue.queues.delete("mail")) as deletion:
        session.commit()
        with pytest.raises(QueueNotEmpty):
            deletion.result(10)
    assert (orphans(engine), count(engine, Queue)) == (0, 1)


def test_a_queue_that_is_not_empty_is_refused_without_a_wait(engine, service, session):
    service.enqueue("mail", 1)
    session.commit()
    service.queues.create("others")
    service.enqueue("others", 1)  # whose transaction keeps the table from being locked
    with Session(engine) as other:
        other.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
        with pytest.raises(QueueNotEmpty):
            QueueService(other).queues.delete("mail")


@each_enqueue
def test_deleting_a_queue_by_force_takes_what_was_being_enqueued(engine, service, session, into):
    """F40."""
    INTO[into](service)
    with blocked(engine, lambda queue: queue.queues.delete("mail", force=True)) as deletion:
        session.commit()
        deletion.result(10)
    assert (orphans(engine), count(engine), count(engine, Queue)) == (0, 0, 0)


@each_enqueue
def test_enqueueing_waits_for_the_deletion_of_a_queue(engine, service, session, into):
    """F40."""
    service.queues.delete("mail")
    with blocked(engine, INTO[into]) as enqueue:
        session.commit()
        with pytest.raises(QueueNotFound):
            enqueue.result(10)
    assert (orphans(engine), count(engine)) == (0, 0)


@each_enqueue
def test_enqueueing_goes_on_when_the_deletion_is_rolled_back(engine, service, session, into):
    """F40."""
    service.queues.delete("mail")
    with blocked(engine, INTO[into]) as enqueue:
        session.rollback()
        enqueue.result(10)
    assert (orphans(engine), count(engine) > 0) == (0, True)


def test_a_queue_is_not_deleted_between_the_check_and_the_insert_of_a_flush(
    engine, service, session
):
    """F40: ``session.add(Message(...))`` takes two statements, and a deletion would fit between."""

    refused: list[BaseException] = []

    @event.listens_for(engine, "before_cursor_execute")
    def delete(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO pgqrs_messages") and not refused:
            with Session(engine) as other:
                other.execute(sa.text("SET LOCAL lock_timeout = '200ms'"))
                with pytest.raises(sa.exc.OperationalError) as caught:
                    QueueService(other).queues.delete("mail")
            refused.append(caught.value)

    session.add(Message(queue_name="mail", payload=1))
    session.commit()
    assert "lock timeout" in str(refused[0])
    assert orphans(engine) == 0


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("into", ["enqueue", "add"])
def test_what_gets_into_a_queue_that_only_an_old_snapshot_has_is_found_by_the_doctor(
    engine, service, into, level
):
    """F40, F32: the deletion is committed, and a snapshot from before it still has the queue.

    Only a lock on the queue's row would refuse that, which each enqueue would pay for, and which
    a producer's rights do not allow. `Queues.delete` says so.
    """
    with Session(engine.execution_options(isolation_level=level)) as old:
        assert QueueService(old).queues.get("mail")
        with Session(engine) as other:
            QueueService(other).queues.delete("mail")
            other.commit()
        try:
            INTO[into](QueueService(old))
            old.commit()
        except QueueNotFound:
            old.rollback()
    left = orphans(engine)
    assert left == (0 if level == "READ COMMITTED" else 1)
    with Session(engine) as session:
        context = Context.of(READY_MADE, None, None, allow_autocommit=False)
        findings = diagnose(session, context, only=["orphans"])
    assert len(findings) == left


def repeated(
    stop: threading.Event, call: Callable[[QueueService], Any]
) -> Callable[[Session], None]:
    """A call over and over, through the times when there is no queue."""

    def work(session: Session) -> None:
        while not stop.is_set():
            try:
                call(QueueService(session))
                session.commit()
            except QueueNotFound:
                session.rollback()

    return work


def delete_and_create(session: Session) -> None:
    queue = QueueService(session)
    for _ in range(25):
        try:
            queue.queues.delete("mail", force=random.random() < 0.7)
            session.commit()
        except QueueNotEmpty:
            session.rollback()
        queue.queues.create("mail")
        session.commit()


@pytest.mark.parametrize(
    "ways", [[name for name in INTO if name != "add"], ["add"]], ids=["service", "add"]
)
def test_queues_that_come_and_go_leave_no_orphans(engine, service, ways):
    """F40."""
    stop = threading.Event()

    def produce(queue: QueueService) -> None:
        INTO[random.choice(ways)](queue)

    def consume(queue: QueueService) -> None:
        if held := queue.dequeue("mail", 5):
            queue.try_archive_many(held)

    def administer(session: Session) -> None:
        try:
            delete_and_create(session)
        finally:
            stop.set()

    producer, consumer = repeated(stop, produce), repeated(stop, consume)
    together(engine, producer, producer, consumer, administer)
    assert orphans(engine) == 0


def test_a_queue_being_deleted_gives_nothing_to_lose(engine, service, session):
    """F40: a lease that waits for the deletion finds no queue; a settlement no message."""
    (held,) = leased(engine, 1)
    service.queues.delete("mail", force=True)
    with (
        blocked(engine, lambda queue: queue.archive(held)) as settled,
        blocked(engine, lambda queue: queue.dequeue("mail")) as dequeued,
    ):
        session.commit()
        with pytest.raises(LeaseLost):
            settled.result(10)
        with pytest.raises(QueueNotFound):
            dequeued.result(10)
    assert orphans(engine) == 0


# --- one message, several minds ------------------------------------------------------------------


def test_a_message_is_either_cancelled_or_leased(engine, service, session):
    def cancel(id_: int) -> Callable[[Session], str]:
        def work(session: Session) -> str:
            try:
                QueueService(session).messages.cancel(id_)
            except MessageLeased:
                return "leased"
            return "cancelled"

        return work

    seen = Counter()
    for _ in range(40):
        receipt = service.enqueue("mail", 1)
        session.commit()
        disposition, deliveries = together(
            engine, cancel(receipt.id), lambda session: QueueService(session).dequeue("mail")
        )
        assert disposition == ("leased" if deliveries else "cancelled")
        assert service.messages.metrics("mail").ready == 0
        session.rollback()
        seen[disposition] += 1
    metrics = service.messages.metrics("mail")
    assert (metrics.leased, metrics.cancelled) == (seen["leased"], seen["cancelled"])


@pytest.mark.parametrize(
    "call",
    [
        lambda queue, id_: queue.messages.cancel(id_),
        lambda queue, id_: queue.messages.reschedule(id_, delay=60),
    ],
    ids=["cancel", "reschedule"],
)
def test_moving_a_message_waits_for_a_lease_in_flight(engine, service, session, call):
    for end in (session.rollback, session.commit):
        receipt = service.enqueue("mail", 1)
        session.commit()
        (held,) = service.dequeue("mail")
        with blocked(engine, lambda queue, id_=receipt.id: call(queue, id_)) as moved:
            end()
            if end == session.rollback:
                moved.result(10)
            else:
                with pytest.raises(MessageLeased) as refused:
                    moved.result(10)
                assert refused.value.until == held.leased_until


def test_cancelling_many_leaves_out_a_lease_in_flight(engine, service, session):
    service.enqueue_many("mail", range(5))
    session.commit()
    (held,) = service.dequeue("mail")
    cancel = lambda queue: queue.messages.cancel_where("mail", Message.priority == 0)  # noqa: E731
    with blocked(engine, cancel) as cancelled:
        session.commit()
        assert cancelled.result(10) == 4
    service.archive(held)


def test_a_dequeue_does_not_wait_for_a_cancellation_or_a_settlement_in_flight(
    engine, service, session
):
    service.enqueue_many("mail", range(3))
    session.commit()
    service.messages.cancel_where("mail", payload=0)
    service.archive_many(service.dequeue("mail"))
    with Session(engine) as other:
        assert [delivery.payload for delivery in QueueService(other).dequeue("mail", 5)] == [2]


def test_a_message_in_flight_is_seen_by_its_own_transaction_alone(engine, service, session):
    receipt = service.enqueue("mail", 1)
    with Session(engine) as other:
        queue = QueueService(other)
        assert queue.dequeue("mail") == []
        assert queue.messages.metrics("mail").live == 0
        with pytest.raises(MessageNotFound):
            queue.messages.cancel(receipt.id)
    (held,) = service.dequeue("mail")
    assert held.id == receipt.id
    service.archive(held)
    session.commit()
    assert count(engine, ArchivedMessage) == 1


def test_two_settlements_of_one_delivery_at_once_are_one(engine, service):
    """A client that retries while the first try is still under way."""
    for _ in range(10):
        (held,) = leased(engine, 1)

        def archive(session: Session, held: Any = held) -> bool:
            try:
                QueueService(session).archive(held)
            except LeaseLost:
                return False
            return True

        assert sorted(together(engine, *[archive] * 4)) == [False, False, False, True]
    assert count(engine, ArchivedMessage) == 10

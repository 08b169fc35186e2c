"""A lease leaves a message at its place, and writes no index entry.

``vt`` is when a message became visible, and only a delay moves it; ``leased_until`` is the end of
its lease. So a message whose lease ended comes before the newer ones again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateIndex

from pgqrs_sa import Delivery, Message, QueueService, Worker, metadata
from pgqrs_sa._core import cursors
from pgqrs_sa._core.cursor import DequeueCursor
from pgqrs_sa._core.lease import dead_letter_exhausted
from pgqrs_sa._core.sql import consume, lease, settle, workers
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.consumer import store
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.testing import advance
from support.cases import each_case

TABLES = tables_of(READY_MADE)
HOUR = timedelta(hours=1)
LOOK = consume._LOOK

# ------------------------------------------------------------------------------- the place


def run_out(session: Session, *deliveries: Delivery) -> None:
    """Let leases end a second ago."""
    ended = sa.func.statement_timestamp() - timedelta(seconds=1)
    ids = [delivery.id for delivery in deliveries]
    session.execute(sa.update(Message).where(Message.id.in_(ids)).values(leased_until=ended))


def reclaim(service: QueueService, delivery: Delivery) -> None:
    past = sa.func.statement_timestamp() - HOUR
    service.session.execute(sa.update(Worker).values(heartbeat_at=past))
    assert service.workers.reclaim(silent_for=60) == 1


KEEPS: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "extend": lambda service, delivery: service.extend(delivery, 600),
    "renew": lambda service, delivery: store.renew(service._scope, [delivery], HOUR),
}
ENDS: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "release": lambda service, delivery: service.release(delivery),
    "try to release": lambda service, delivery: service.try_release(delivery),
    "reclaim": reclaim,
    "release leases": lambda service, delivery: service.workers.release_leases(delivery.worker_id),
    "expiry": lambda service, delivery: run_out(service.session, delivery),
}
MOVES: dict[str, Callable[[QueueService, Delivery], Any]] = {
    "release with a delay": lambda service, delivery: service.release(delivery, delay=0.001),
    "fail": lambda service, delivery: service.fail(delivery, "no", delay=0),
    "reschedule": lambda service, delivery: (
        service.release(delivery),
        service.messages.reschedule(delivery.id, delay=0),
    ),
    "requeue": lambda service, delivery: (
        service.archive(delivery),
        service.archived.requeue(delivery.id),
    ),
}


@pytest.fixture
def first(session: Session, service: QueueService) -> Delivery:
    """The lease of the first of three messages, by a worker."""
    worker = service.workers.register("w", queues=["mail"])
    receipts = service.enqueue_many("mail", [1, 2, 3])
    (delivery,) = service.dequeue("mail", worker=worker, lease=60)
    assert delivery.id == receipts[0].id
    assert delivery.vt == receipts[0].vt
    session.commit()
    return delivery


def read(session: Session, delivery: Delivery) -> Any:
    columns = (Message.vt, Message.leased_until, Message.dequeued_at, Message.consumer_worker_id)
    return session.execute(sa.select(*columns).where(Message.id == delivery.id)).one()


@pytest.mark.parametrize("way", KEEPS)
def test_a_renewal_changes_the_end_of_the_lease_and_nothing_else(service, session, first, way):
    before = read(session, first)
    assert (before.vt, before.leased_until) == (first.vt, first.leased_until)
    assert before.leased_until == before.dequeued_at + timedelta(seconds=60)
    KEEPS[way](service, first)
    after = read(session, first)
    assert after.leased_until > before.leased_until
    assert (after.vt, *after[2:]) == (before.vt, *before[2:])
    assert service.dequeue("mail", 3, where=Message.id == first.id) == []


@pytest.mark.parametrize("way", ENDS)
def test_a_lease_that_ended_gives_the_message_back_at_its_old_place(service, session, first, way):
    ENDS[way](service, first)
    after = read(session, first)
    assert after.vt == first.vt
    if way == "expiry":
        assert after.leased_until is not None
    else:
        assert after[1:] == (None, None, None)
    assert [row.payload for row in service.messages.peek("mail", 3)] == [1, 2, 3]
    found = service.dequeue("mail", 3, where=sa.true())
    assert [row.payload for row in found] == [1, 2, 3]
    assert found[0].vt == first.vt


@pytest.mark.parametrize("way", MOVES)
def test_a_delay_moves_a_message_behind_those_that_are_visible(service, session, first, way):
    MOVES[way](service, first)
    after = read(session, first)
    assert after.vt > first.vt
    assert after[1:] == (None, None, None)
    advance(session, 1)
    assert [row.payload for row in service.messages.peek("mail", 3)] == [2, 3, 1]
    assert [row.payload for row in service.dequeue("mail", 3, where=sa.true())] == [2, 3, 1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock of all cursors, which stands still until a test moves it."""
    moments = [1_000.0]
    cursors._cursors.clear()
    monkeypatch.setattr(cursors, "DequeueCursor", lambda: DequeueCursor(clock=lambda: moments[0]))
    monkeypatch.setattr("pgqrs_sa._core.cursor.interval", lambda _took: 1.0)
    yield moments
    cursors._cursors.clear()


@pytest.mark.parametrize("way", ["release", "expiry"])
def test_a_cursor_finds_it_by_the_next_full_scan(service, session, first, clock, way):
    def take() -> Any:
        (delivery,) = service.dequeue("mail")
        session.commit()
        return delivery.payload

    service.enqueue_many("mail", range(4, 10))
    assert take() == 2  # a full scan, and from now on there is a cursor
    ENDS[way](service, first)
    session.commit()
    assert [take(), take()] == [3, 4]
    clock[0] += 1.01
    assert [take(), take()] == [1, 5]


@pytest.mark.parametrize("way", ["release", "expiry"])
def test_a_cursor_finds_it_at_once_when_nothing_else_is_visible(
    service, session, first, clock, way
):
    assert [row.payload for row in service.dequeue("mail", 3)] == [2, 3]
    session.commit()
    assert service.dequeue("mail") == []
    service.enqueue("mail", 4)
    assert [row.payload for row in service.dequeue("mail")] == [4]
    session.commit()
    ENDS[way](service, first)
    session.commit()
    assert [row.id for row in service.dequeue("mail")] == [first.id]


def test_what_is_leased_is_scheduled_neither_before_nor_after(service, session):
    """A time that lies ahead and a lease are two things: a lease that ended does not hide it."""
    service.enqueue("mail", 1)
    (delivery,) = service.dequeue("mail")
    service.release(delivery, delay=60)
    assert service.messages.get(delivery.id).state == "scheduled"
    run_out(session, delivery)  # as if the delay had come beside a lease that is over
    assert service.messages.get(delivery.id).state == "scheduled"
    assert service.dequeue("mail") == []
    assert service.messages.reschedule(delivery.id, delay=0)
    assert [row.id for row in service.dequeue("mail")] == [delivery.id]


# ------------------------------------------------------------------------ the index entries


PAYLOADS: dict[str, Callable[[int], Any]] = {
    "a number": lambda n: n,
    "20 to 70 bytes": lambda n: "x" * (20 + n * 7 % 50),
    "100 to 200 bytes": lambda n: "x" * (100 + n * 7 % 100),
    "100 to 900 bytes": lambda n: "x" * (100 + n * 37 % 800),
}


@pytest.fixture(params=PAYLOADS)
def filled(request: pytest.FixtureRequest, service: QueueService) -> QueueService:
    """A table as a migration makes it, with 3,000 messages; nothing in it is dead."""
    session, payload = service.session, PAYLOADS[request.param]
    session.execute(sa.text("TRUNCATE pgqrs_messages CASCADE"))
    # What autovacuum would do at some moment must not happen within a measurement.
    session.execute(sa.text("ALTER TABLE pgqrs_messages SET (autovacuum_enabled = off)"))
    service.enqueue_many("mail", [payload(n) for n in range(3_000)])
    session.commit()
    return service


class Written:
    """What transactions have written: updates, those of them without index entries, and growth."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.updates = self.heap_only = 0
        self._size = self._index_size()
        self._before = self._counted()

    def _index_size(self) -> int:
        return self.session.scalar(sa.text("SELECT pg_relation_size('pgqrs_messages_order_idx')"))

    def commit(self) -> None:
        """Count what this transaction has done, and commit it."""
        self.count()
        self.session.commit()
        self._before = self._counted()

    def _counted(self) -> tuple[int, int]:
        # Those of earlier transactions are among them until the server has reported them.
        oid = "CAST(CAST('pgqrs_messages' AS regclass) AS oid)"
        text = (
            f"SELECT pg_stat_get_xact_tuples_updated({oid}),"
            f" pg_stat_get_xact_tuples_hot_updated({oid})"
        )
        updates, heap_only = self.session.execute(sa.text(text)).one()
        return updates, heap_only

    def count(self) -> None:
        """Count what this transaction has done, once."""
        now = self._counted()
        self.updates += now[0] - self._before[0]
        self.heap_only += now[1] - self._before[1]

    @property
    def growth(self) -> int:
        """How many bytes longer the order index is."""
        return self._index_size() - self._size


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[None]:
    """Let another session keep what it sees, so that nothing that dies can be removed."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(sa.text("SELECT count(*) FROM pgqrs_messages"))
        yield


@contextmanager
def no_snapshot(engine: sa.Engine) -> Iterator[None]:
    yield


def lease_all(service: QueueService, written: Written, limit: int) -> list[Delivery]:
    found: list[Delivery] = []
    worker = service.workers.register("w", queues=["mail"])
    while taken := service.dequeue("mail", limit, worker=worker):
        found += taken
        written.commit()
    written.session.commit()
    return found


@pytest.mark.parametrize("held", [no_snapshot, snapshot], ids=lambda f: f.__name__)
def test_a_lease_is_a_heap_only_update(engine, filled, session, held):
    written = Written(session)
    with held(engine):
        assert len(lease_all(filled, written, 50)) == 3_000
    assert (written.updates, written.heap_only) == (3_000, 3_000)
    assert written.growth == 0


VERY_SHORT = ["a number", "20 to 70 bytes"]


@pytest.mark.parametrize("held", [no_snapshot, snapshot], ids=lambda f: f.__name__)
def test_so_is_a_renewal_or_a_release(engine, filled, session, held, request):
    """It is the second one of its row: what the lease left dead must be nobody's to see.

    So the snapshot that is held here is one from after the leases. Rows of very short messages are
    a third longer once they are leased, so that a page has no room for all of them twice.
    """
    fewest = 2_400 if request.node.callspec.params["filled"] in VERY_SHORT else 3_000
    deliveries = lease_all(filled, Written(session), 500)
    for settled in (
        lambda batch: store.renew(filled._scope, batch, HOUR),
        filled.release_many,
    ):
        written = Written(session)
        with held(engine):
            for start in range(0, 3_000, 50):
                settled(deliveries[start : start + 50])
                written.commit()
        assert written.updates == 3_000
        assert written.heap_only >= fewest
        assert fewest < 3_000 or written.growth == 0


def test_a_retry_is_none_and_an_index_of_a_host_ends_it(filled, session):
    """What is counted above can be seen: a message that is moved needs an entry."""
    written = Written(session)
    deliveries = filled.dequeue("mail", 1_000)
    written.commit()
    assert written.heap_only == 1_000
    filled.fail_many(deliveries, "no", delay=5)
    written.commit()
    assert (written.updates, written.heap_only) == (2_000, 1_000)
    session.execute(sa.text("CREATE INDEX host_idx ON pgqrs_messages (leased_until)"))
    filled.dequeue("mail", 1_000)
    written.count()
    assert (written.updates, written.heap_only) == (3_000, 1_000)
    assert written.growth > 0
    session.rollback()


def columns_set(statement: Any) -> set[str]:
    """The columns that an UPDATE of the package sets."""
    return {column if isinstance(column, str) else column.name for column in statement._values}


LEASING = {
    "lease": lease.dequeue(TABLES, by_worker=True),
    "lease with criteria": lease.dequeue_where(TABLES, (sa.true(),), by_worker=False),
    "extend": settle.extend(TABLES),
    "renew": settle.extend(TABLES, skip_locked=True),
    "release": settle.release(TABLES),
    "release leases": workers.release_leases(TABLES),
    "release unanswered": consume.release_unanswered(TABLES),
}
WRITTEN = {
    *("leased_until", "dequeued_at", "consumer_worker_id", "fencing_token"),
    *("read_ct", "max_read_ct"),
}


@each_case("name", list(LEASING))
def test_a_lease_and_its_end_set_these_columns_and_never_vt(name):
    columns = columns_set(LEASING[name])
    assert columns
    assert columns <= WRITTEN
    if name.startswith("lease"):
        assert columns == WRITTEN
    assert "leased_until" in columns
    assert "vt" in columns_set(settle.release(TABLES, delayed=True))


def indexes() -> dict[str, str]:
    """Each index and each key of the four tables as SQL, with its predicate."""
    found = {}
    for table in TABLES:
        for index in table.indexes:
            text = str(CreateIndex(index).compile(dialect=postgresql.dialect()))
            found[str(index.name)] = text.partition(" USING ")[2] or text.partition("(")[2]
        for constraint in table.constraints:
            if isinstance(constraint, sa.PrimaryKeyConstraint | sa.UniqueConstraint):
                names = " ".join(column.name for column in constraint.columns)
                found[f"{constraint.name} of {table.name}"] = names
    return found


def test_no_index_of_the_models_and_no_predicate_names_a_column_that_a_lease_writes():
    found = indexes()
    assert "pgqrs_messages_order_idx" in found
    assert "vt" in found["pgqrs_messages_order_idx"]
    for name, text in found.items():
        assert not WRITTEN & {*re.findall(r"\w+", text)}, (name, text)


def test_no_index_of_the_migrated_tables_names_one_either(session):
    names = [table.name for table in metadata.sorted_tables]
    rows = session.execute(
        sa.text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = ANY(:names)"),
        {"names": names},
    ).all()
    assert {"pgqrs_messages_order_idx", "pgqrs_messages_pkey"} <= {row.indexname for row in rows}
    for row in rows:
        text = row.indexdef.partition(" USING ")[2]
        assert not WRITTEN & {*re.findall(r"\w+", text)}, row.indexname
    options = session.scalar(
        sa.text("SELECT reloptions FROM pg_class WHERE relname = 'pgqrs_messages'")
    )
    assert "fillfactor=45" in options


# --------------------------------------------------------------- what is out of attempts


def exhaust(session: Session, count: int, *, priority: int = 0, queue: str = "mail") -> set[int]:
    """Put so many messages without attempts into a queue; return their ids."""
    service = QueueService(session)
    taken: list[Delivery] = []
    if count:
        service.enqueue_many(queue, ["spent"] * count)
        spent = (
            sa.update(Message)
            .where(
                Message.payload == sa.literal("spent", Message.payload.type), Message.read_ct == 0
            )
            .values(max_read_ct=1, priority=priority)
        )
        session.execute(spent, execution_options={"synchronize_session": False})
        taken = service.dequeue(queue, count, where=Message.max_read_ct == 1)
        run_out(session, *taken)
    session.commit()
    assert len(taken) == count
    return {delivery.id for delivery in taken}


def looked_at(session: Session, *queues: str) -> set[tuple[str, str]]:
    """What a consumer that looks at queues finds."""
    worker = QueueService(session).workers.register("w", queues=list(queues))
    values = {"queues": list(queues), "worker": worker.id}
    rows = session.execute(consume.check_queues(TABLES), values).all()
    assert len(set(rows)) == len(rows)
    return {(row.queue, row.found) for row in rows}


READY, EXHAUSTED = ("mail", "ready"), ("mail", "exhausted")


@pytest.mark.parametrize("spent", [1, LOOK - 1, LOOK, LOOK + 1, 3 * LOOK])
def test_a_look_finds_what_is_exhausted_in_front_and_what_is_ready_behind(service, session, spent):
    ids = exhaust(session, spent)
    service.enqueue_many("mail", range(3))
    session.commit()
    assert looked_at(session, "mail") == {READY, EXHAUSTED}
    found = 0
    while dead := dead_letter_exhausted(service._scope, "mail", 1_000, look=LOOK):
        assert dead <= LOOK
        found += dead
        assert {READY} <= looked_at(session, "mail")
    assert found == spent
    assert {row.id for row in service.archived.find("mail", outcome="dead", limit=99)} == ids
    assert looked_at(session, "mail") == {READY}
    assert [row.payload for row in service.dequeue("mail", 9)] == [0, 1, 2]
    assert looked_at(session, "mail") == set()


def test_a_look_is_bounded_for_each_level_and_so_is_what_is_made_of_it(service, session):
    for priority in (-5, 0, 7):
        exhaust(session, 5, priority=priority)
    service.enqueue("mail", "last", priority=9)
    session.commit()
    assert looked_at(session, "mail") == {READY, EXHAUSTED}
    bury = lambda **bound: dead_letter_exhausted(service._scope, "mail", **bound)  # noqa: E731
    assert bury(limit=1_000, look=2) == 6  # two of each level
    levels = sa.select(Message.priority, sa.func.count()).group_by(Message.priority)
    assert dict(session.execute(levels).all()) == {-5: 3, 0: 3, 7: 3, 9: 1}
    assert bury(limit=2, look=LOOK) == 2
    assert bury(limit=1_000, look=None) == 7
    assert bury(limit=1_000, look=None) == 0
    assert looked_at(session, "mail") == {READY}


def test_a_look_finds_what_is_exhausted_at_one_level_and_ready_at_another(service, session):
    exhaust(session, LOOK - 1, priority=-1)
    session.commit()
    assert looked_at(session, "mail") == {EXHAUSTED}
    service.enqueue("mail", 1, priority=1)
    assert looked_at(session, "mail") == {READY, EXHAUSTED}


def test_a_paused_queue_has_nothing_ready_but_its_exhausted_messages_are_found(service, session):
    exhaust(session, LOOK + 1)
    service.enqueue("mail", 1)
    service.queues.pause("mail")
    session.commit()
    assert looked_at(session, "mail") == {EXHAUSTED}
    assert dead_letter_exhausted(service._scope, "mail", 1_000, look=LOOK) == LOOK
    assert looked_at(session, "mail") == {EXHAUSTED}
    assert service.archived.bury("mail") == 1
    assert looked_at(session, "mail") == set()
    service.queues.resume("mail")
    assert looked_at(session, "mail") == {READY}


def test_a_look_passes_what_is_leased_or_scheduled(service, session):
    """Neither counts as one of those that are looked at."""
    service.enqueue_many("mail", range(3 * LOOK))
    assert len(service.dequeue("mail", 3 * LOOK)) == 3 * LOOK
    service.enqueue("mail", "later", delay=60)
    session.commit()
    assert looked_at(session, "mail") == set()
    exhaust(session, 1)
    assert looked_at(session, "mail") == {EXHAUSTED}
    assert dead_letter_exhausted(service._scope, "mail", 1_000, look=1) == 1


def test_what_lies_behind_a_backlog_is_found_by_the_exact_one_and_once_the_backlog_is_leased(
    service, session
):
    service.enqueue_many("mail", range(LOOK))
    spent = exhaust(session, 2)
    assert looked_at(session, "mail") == {READY}
    assert dead_letter_exhausted(service._scope, "mail", 1_000, look=LOOK) == 0
    session.execute(sa.text("SAVEPOINT before"))
    assert dead_letter_exhausted(service._scope, "mail", 1, look=None) == 1
    assert service.archived.bury("mail") == 1
    session.execute(sa.text("ROLLBACK TO SAVEPOINT before"))
    service.dequeue("mail", LOOK, where=sa.true())
    assert looked_at(session, "mail") == {EXHAUSTED}
    assert dead_letter_exhausted(service._scope, "mail", 1_000, look=LOOK) == 2
    assert {row.id for row in service.archived.find("mail")} == spent


@pytest.mark.parametrize("by_cursor", [True, False])
def test_nothing_starves_behind_what_is_out_of_attempts(service, session, by_cursor):
    """More of it than anybody looks at, at two levels, and some between the ready ones."""
    where = None if by_cursor else sa.true()
    spent = exhaust(session, 3 * LOOK, priority=-1)
    service.enqueue_many("mail", range(5))
    spent |= exhaust(session, 2 * LOOK)
    service.enqueue_many("mail", range(5, 10))
    session.commit()
    taken = []
    while found := service.dequeue("mail", 3, where=where):
        taken += [row.payload for row in found]
        service.archive_many(found)
        session.commit()
    assert taken == [*range(10)]
    # The dequeue that found nothing has seen to some of them, and so do the next ones.
    while service.messages.metrics("mail").live:
        before = service.messages.metrics("mail").exhausted
        assert service.dequeue("mail", where=where) == []
        session.commit()
        assert before == 0 or service.messages.metrics("mail").exhausted < before
    assert {row.id for row in service.archived.find("mail", outcome="dead", limit=999)} == spent


def test_what_a_former_holder_settles_this_very_moment_is_no_dead_letter(engine, service, session):
    """Its lease is judged again under the lock, by the exact one and by the one that looks."""
    spent = exhaust(session, 2)
    row = session.scalars(sa.select(Message.id).where(Message.id.in_(spent)).limit(1)).one()
    with Session(engine) as holder:
        holder.execute(sa.select(Message.id).where(Message.id == row).with_for_update())
        assert dead_letter_exhausted(service._scope, "mail", 10, look=LOOK) == 1
        session.commit()
    assert dead_letter_exhausted(service._scope, "mail", 10, look=None) == 1

"""Many queues that have nothing: one statement looks at all of them, however many there are."""

from __future__ import annotations

from collections import Counter

import pytest
import sqlalchemy as sa

from pgqrs_sa.consumer import dispatcher
from support.consumers import Ear
from support.waiting import until

LOOK, LEASE = "pgqrs_asked", "pq_leased"


def make_queues(kit, count):
    kit.sql(
        "INSERT INTO pgqrs_queues (queue_name) SELECT 'idle/' || n FROM generate_series(1, :n) n",
        n=count,
    )
    return [f"idle/{number}" for number in range(1, count + 1)]


def nothing(_session, _delivery):
    """Do no work."""


def on_all(consumer, names):
    for name in names:
        consumer.on(name, session=False)(nothing)


def counted(engine):
    """Count what an engine's connections execute from now on, by kind."""
    found: Counter[str] = Counter()

    def note(_connection, _cursor, statement, *_):
        (kind,) = [case for case in (LOOK, LEASE) if case in statement] or [
            statement.split("\n")[0]
        ]
        found[kind] += 1

    sa.event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", note)
    return found


@pytest.mark.parametrize("notify", [False, True], ids=["polling", "notify"])
def test_one_statement_looks_at_all_idle_queues(kit, notify):
    engine = kit.app_engine()
    consumer = kit.consumer(engine=engine, heartbeat=60, notify=notify)
    names = make_queues(kit, 100)
    on_all(consumer, names)
    executed = counted(engine)
    consumer.start()
    until(lambda: executed[LOOK] >= 10, "it looks again and again")
    assert executed[LEASE] == 0
    before = executed.copy()
    until(lambda: executed[LOOK] >= before[LOOK] + 5, "it goes on")
    # All else that it does meanwhile is to say once in a while that it waits for notifications.
    assert (executed - before).total() <= (executed - before)[LOOK] + 2 * notify
    ids = kit.send(1, 2, queue=names[37])
    until(lambda: kit.archive().keys() == set(ids), "they are archived")
    until(lambda: executed[LOOK] >= before[LOOK] + 20, "it looks on")
    assert 1 <= executed[LEASE] <= 4  # of this queue alone: until there is nothing
    assert consumer.stop() == 0


def test_a_run_until_empty_asks_no_empty_queue_for_a_lease(kit):
    engine = kit.app_engine()
    consumer = kit.consumer(engine=engine, heartbeat=60)
    names = make_queues(kit, 100)
    on_all(consumer, names)
    (id_,) = kit.send(1, queue=names[3])
    executed = counted(engine)
    assert consumer.run() == 0
    assert kit.outcomes() == {id_: "archived"}
    assert executed[LEASE] <= 2


def test_among_many_idle_queues_exhausted_messages_become_dead_letters(kit):
    names = make_queues(kit, 50)
    consumer = kit.consumer()
    on_all(consumer, names)
    ids = kit.send(1, 2, queue=names[7]) + kit.send(3, queue=names[8])
    kit.sql("UPDATE pgqrs_messages SET read_ct = 5, max_read_ct = 5")
    consumer.start()
    until(lambda: kit.outcomes() == dict.fromkeys(ids, "dead"), "they are dead letters")
    assert consumer.stop() == 0


def test_a_run_until_empty_does_not_wait_between_chunks_of_exhausted_messages(kit, monkeypatch):
    monkeypatch.setattr(dispatcher, "_EXPLAIN_INTERVAL", 1000.0)
    consumer = kit.consumer(heartbeat=60, housekeeping=None)
    (name,) = make_queues(kit, 1)
    on_all(consumer, [name])
    ids = kit.send(*range(450), queue=name)
    kit.sql("UPDATE pgqrs_messages SET read_ct = 5, max_read_ct = 5")
    assert consumer.run() == 0
    assert kit.outcomes() == dict.fromkeys(ids, "dead")


def test_a_run_until_empty_that_found_messages_makes_dead_letters_too(kit):
    consumer = kit.consumer(heartbeat=60, housekeeping=None)
    (name,) = make_queues(kit, 1)
    on_all(consumer, [name])
    *done, exhausted = kit.send(*range(31), queue=name)  # behind more than a look at a queue sees
    kit.sql("UPDATE pgqrs_messages SET read_ct = 5, max_read_ct = 5 WHERE id = :id", id=exhausted)
    assert consumer.run() == 0
    assert kit.outcomes() == dict.fromkeys(done, "archived") | {exhausted: "dead"}


def test_among_many_idle_queues_one_that_is_deleted_is_dropped_and_the_others_go_on(kit, caplog):
    names = make_queues(kit, 50)
    consumer = kit.consumer()
    on_all(consumer, names)
    consumer.start()
    kit.sql("DELETE FROM pgqrs_queues WHERE queue_name = :name", name=names[7])
    until(lambda: f"'{names[7]}'" in caplog.text, "it says so")
    (id_,) = kit.send(1, queue=names[8])
    until(lambda: kit.outcomes() == {id_: "archived"}, "it goes on")
    assert consumer.stop() == 0
    assert len(caplog.records) == 1


def test_a_message_for_one_of_many_idle_queues_is_picked_up_without_asking_the_others(kit):
    """By a look at all of them, and leases of its own queue; not by one statement for each."""
    ear = Ear()
    engine = kit.app_engine()
    names = make_queues(kit, 300)
    consumer = kit.consumer(engine=engine, poll_interval=0.2, hooks=[ear])
    on_all(consumer, names)
    executed = counted(engine)
    consumer.start()
    for number in range(5):
        before = executed[LOOK]
        until(lambda before=before: executed[LOOK] > before, "it is idle, and looks")
        leases = executed[LEASE]
        kit.send(number, queue=names[50 * number + 9])
        until(lambda number=number: len(ear.heard) == 2 * (number + 1), "it is worked on")
        assert executed[LEASE] - leases <= 4
    assert consumer.stop() == 0

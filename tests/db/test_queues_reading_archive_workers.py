"""The resources: queues, messages at rest, the archive, workers and states."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, aliased

from pgqrs_sa import (
    ArchivedMessage,
    DuplicateMessage,
    InvalidArgument,
    Item,
    LeaseLost,
    Message,
    MessageLeased,
    MessageNotFound,
    PayloadError,
    Queue,
    QueueMetrics,
    QueueNotEmpty,
    QueueNotFound,
    QueueService,
    Receipt,
    Worker,
    WorkerInUse,
    WorkerNotFound,
    WorkerNotReady,
)
from support.cases import each_case

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
FAR = datetime(2400, 1, 1, tzinfo=UTC)


def set_back(session: Session, column: sa.orm.InstrumentedAttribute, span: timedelta, *ids: int):
    """Let a time in the database be ``span`` earlier, for some rows or for all."""
    cls = column.class_
    statement = sa.update(cls).values({column: column - sa.literal(span, sa.Interval)})
    if ids:
        statement = statement.where(cls.id.in_(ids))
    session.execute(statement, execution_options={"synchronize_session": False})
    session.expire_all()


def expire_leases(session: Session, *ids: int) -> None:
    """Let leases have run out a second ago."""
    past = sa.func.statement_timestamp() - timedelta(seconds=1)
    statement = (
        sa.update(Message).values(leased_until=past).where(Message.leased_until.is_not(None))
    )
    if ids:
        statement = statement.where(Message.id.in_(ids))
    session.execute(statement, execution_options={"synchronize_session": False})
    session.expire_all()


@pytest.fixture
def states(session: Session, service: QueueService) -> dict[int, str]:
    """Messages in every state that there is, two ways into most, by id."""
    enqueue = service.enqueue
    found = {}
    exhausted = enqueue("mail", {"n": "exhausted"}, max_read_ct=1).id
    back = enqueue("mail", {"n": "lease ran out"}).id
    service.dequeue("mail", 2)
    expire_leases(session, exhausted, back)
    found[exhausted], found[back] = "exhausted", "ready"
    leased = enqueue("mail", {"n": "leased"}, priority=-1).id
    last = enqueue("mail", {"n": "leased, last attempt"}, priority=-1, max_read_ct=1).id
    retried = enqueue("mail", {"n": "failed"}, priority=-1).id
    released = enqueue("mail", {"n": "released"}, priority=-1).id
    deliveries = {delivery.id: delivery for delivery in service.dequeue("mail", 4, lease=600)}
    service.fail(deliveries[retried], "no", delay=600)
    service.release(deliveries[released])
    found |= {leased: "leased", last: "leased", retried: "scheduled", released: "ready"}
    found[enqueue("mail", {"n": "ready"}).id] = "ready"
    found[enqueue("mail", {"n": "delayed"}, delay=600).id] = "scheduled"
    session.commit()
    return found


# --------------------------------------------------------------------------------- queues


def test_a_queue_is_created_with_the_defaults(service):
    info = service.queues.create("orders")

    assert (info.name, info.lease_seconds, info.max_read_ct) == ("orders", 30, 5)
    assert (info.retention_seconds, info.max_payload_bytes) == (None, 1_048_576)
    assert info.paused_at is None
    assert abs(info.created_at - datetime.now(UTC)) < MINUTE


@each_case(
    ("settings", "stored"),
    [
        ({"lease": 2.5}, {"lease_seconds": 2.5}),
        ({"lease": MINUTE}, {"lease_seconds": 60}),
        ({"max_read_ct": 1}, {"max_read_ct": 1}),
        ({"retention": 0}, {"retention_seconds": 0}),
        ({"retention": 7 * DAY}, {"retention_seconds": 7 * 86_400}),
        ({"retention": None}, {"retention_seconds": None}),
        ({"max_payload_bytes": 10}, {"max_payload_bytes": 10}),
        (
            {"lease": 1, "max_read_ct": 2, "retention": 3, "max_payload_bytes": 4},
            {
                "lease_seconds": 1,
                "max_read_ct": 2,
                "retention_seconds": 3,
                "max_payload_bytes": 4,
            },
        ),
    ],
    before="reset",
)
def test_a_queue_is_created_and_updated_with_the_settings_given(session, service, settings, stored):
    defaults = {
        "lease_seconds": 30,
        "max_read_ct": 5,
        "retention_seconds": None,
        "max_payload_bytes": 1_048_576,
    }
    for info in (service.queues.create("a", **settings), service.queues.update("mail", **settings)):
        assert {name: getattr(info, name) for name in defaults} == defaults | stored
        session.commit()
        assert service.queues.get(info.name) == info


def test_creating_a_queue_that_is_there_returns_it_as_it_is(session, service):
    first = service.queues.create("orders", lease=5, retention=60)
    service.queues.pause("orders")
    paused = service.queues.get("orders")
    session.commit()

    assert service.queues.create("orders") == paused
    assert service.queues.create("orders", lease=99, max_read_ct=1, retention=None) == paused
    assert paused.id == first.id
    assert [entry.name for entry in service.queues.list()] == ["mail", "orders"]


def test_creating_a_queue_that_another_session_has_just_created_returns_that(engine, service):
    with Session(engine) as session, Session(engine) as two:
        first = QueueService(session).queues.create("orders", lease=5)
        session.commit()
        assert QueueService(two).queues.create("orders", lease=6) == first


def test_queues_are_listed_by_name(service):
    for name in ("b", "a", "a.b", "B", "0"):
        service.queues.create(name)

    assert [entry.name for entry in service.queues.list()] == ["0", "B", "a", "a.b", "b", "mail"]


def test_names_of_queues_differ_by_case(service):
    assert service.queues.create("Mail").id != service.queues.get("mail").id


def test_an_update_leaves_what_is_not_given_and_the_other_queues(service):
    service.queues.create("other")
    before = service.queues.list()
    service.queues.update("mail", lease=7)
    after = service.queues.list()

    assert after[1] == before[1]
    assert after[0].lease_seconds == 7
    assert after[0].max_read_ct == before[0].max_read_ct


def test_a_new_limit_of_attempts_holds_for_messages_that_were_never_leased(session, service):
    service.enqueue_many("mail", ["old", "new", Item("own", max_read_ct=9)])
    service.dequeue("mail")
    service.queues.update("mail", max_read_ct=2)
    expire_leases(session)
    limits = {delivery.payload: delivery.max_read_ct for delivery in service.dequeue("mail", 3)}

    assert limits == {"old": 5, "new": 2, "own": 9}


def test_a_new_lease_holds_for_the_next_dequeue(service):
    service.queues.update("mail", lease=120)
    service.enqueue_many("mail", [1, 2])
    (by_queue,) = service.dequeue("mail")
    (by_call,) = service.dequeue("mail", lease=5)

    for delivery, seconds in ((by_queue, 120), (by_call, 5)):
        info = service.messages.get(delivery.id)
        assert delivery.leased_until - info.dequeued_at == timedelta(seconds=seconds)


def test_a_paused_queue_gives_nothing_and_takes_everything(session, service):
    service.enqueue_many("mail", [1, 2])
    (held,) = service.dequeue("mail")
    paused = service.queues.pause("mail")
    session.commit()

    assert paused.paused_at is not None
    assert service.dequeue("mail", 5) == []
    service.enqueue("mail", 3)
    service.archive(held)
    assert service.messages.metrics("mail").paused
    assert service.queues.resume("mail").paused_at is None
    assert [delivery.payload for delivery in service.dequeue("mail", 5)] == [2, 3]


def test_pausing_again_keeps_the_time_and_resuming_again_does_nothing(session, service):
    first = service.queues.pause("mail")
    session.commit()

    assert service.queues.pause("mail") == first
    assert service.queues.resume("mail") == service.queues.resume("mail")
    session.commit()
    assert service.queues.pause("mail").paused_at > first.paused_at


def test_pausing_one_queue_pauses_no_other(service):
    service.queues.create("other")
    service.enqueue("other", 1)
    service.queues.pause("mail")

    assert service.dequeue("other")


def test_a_queue_that_holds_something_is_refused_without_a_wait_for_who_enqueues(
    engine, service, session
):
    service.enqueue("mail", 1)
    session.commit()
    with Session(engine) as other:
        QueueService(other).enqueue("mail", 2)
        session.execute(sa.text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(QueueNotEmpty):
            service.queues.delete("mail")


def test_a_purge_deletes_every_live_message_and_nothing_else(service, states):
    service.queues.create("other")
    service.enqueue("other", 1)
    worker = service.workers.register("w", queues=["mail"])
    service.archive(service.dequeue("mail")[0])

    assert service.queues.purge("mail") == len(states) - 1
    assert service.messages.find("mail") == []
    assert [message.payload for message in service.messages.find()] == [1]
    assert len(service.archived.find("mail")) == 1
    assert service.workers.get(worker.id) == worker
    assert service.queues.purge("mail") == 0
    assert service.enqueue("mail", 2)


def test_a_purge_with_a_limit_deletes_the_oldest(service):
    service.enqueue_many("mail", [Item(n, priority=-n) for n in range(5)])

    assert service.queues.purge("mail", limit=2) == 2
    assert [message.payload for message in service.messages.find("mail")] == [2, 3, 4]
    assert service.queues.purge("mail", limit=99) == 3


def fencing_tokens(session: Session) -> dict[int, int]:
    """The fencing token of each live message by its id."""
    rows = session.execute(sa.select(Message.id, Message.fencing_token))
    return {row.id: row.fencing_token for row in rows}


def test_a_purge_of_named_messages_spares_those_that_have_changed(session, service):
    service.enqueue_many("mail", ["a", "b", "c"])
    before = fencing_tokens(session)
    (held,) = service.dequeue("mail")
    assert service.queues.purge("mail", tokens=before) == 2
    assert [message.id for message in service.messages.find("mail")] == [held.id]


@each_case("bound", [{"limit": 1}, {"up_to": 1}], before="reset")
def test_a_purge_of_named_messages_has_no_other_bound(session, service, bound):
    service.enqueue("mail", 1)
    with pytest.raises(InvalidArgument, match="give neither limit nor up_to"):
        service.queues.purge("mail", tokens=fencing_tokens(session), **bound)
    assert service.messages.count("mail") == 1


def test_a_lease_on_a_purged_message_is_lost(service):
    service.enqueue("mail", 1)
    (held,) = service.dequeue("mail")
    service.queues.purge("mail")

    with pytest.raises(LeaseLost, match="is gone"):
        service.archive(held)


def test_an_empty_queue_is_deleted(service):
    service.queues.delete("mail")

    assert service.queues.list() == []
    with pytest.raises(QueueNotFound):
        service.enqueue("mail", 1)


@each_case(("live", "settled"), [(2, 0), (0, 1), (2, 3)], before="reset")
def test_a_queue_that_holds_something_is_deleted_only_by_force(session, service, live, settled):
    service.queues.create("other")
    for queue in ("mail", "other"):
        service.enqueue_many(queue, range(live + settled))
        if settled:
            service.archive_many(service.dequeue(queue, settled))
    session.commit()
    with pytest.raises(QueueNotEmpty) as caught:
        service.queues.delete("mail")

    assert (caught.value.messages, caught.value.archived) == (live, settled)
    assert f"holds {live} live and {settled} archived" in str(caught.value)
    assert service.messages.metrics("mail").live == live  # the transaction goes on
    service.queues.delete("mail", force=True)
    session.commit()
    assert [entry.name for entry in service.queues.list()] == ["other"]
    assert len(service.messages.find()) == live
    assert len(service.archived.find()) == settled


def test_a_queue_created_anew_begins_with_nothing_of_the_old_one(session, service):
    old = service.queues.get("mail")
    service.enqueue("mail", 1, key="k")
    service.queues.delete("mail", force=True)
    new = service.queues.create("mail")

    assert new.id > old.id
    assert service.messages.metrics("mail").live == 0
    assert not service.enqueue("mail", 2, key="k").duplicate


def test_deleting_a_queue_waits_for_nobody_who_only_reads(engine, service):
    with Session(engine) as reader, Session(engine) as owner:
        QueueService(reader).messages.metrics("mail")
        owner.execute(sa.text("SET LOCAL lock_timeout = '20s'"))
        QueueService(owner).queues.delete("mail")


# ------------------------------------------------------------------------------- messages


def test_a_peek_shows_what_the_next_dequeue_takes_in_its_order_and_takes_nothing(session, service):
    rows = [(0, 0), (5, 0), (-5, 0), (0, 0), (-5, 60), (0, 0)]
    service.enqueue_many("mail", [Item(n, priority=p, delay=d) for n, (p, d) in enumerate(rows)])
    session.commit()
    seen = service.messages.peek("mail", 10)

    assert [item.payload for item in seen] == [2, 0, 3, 5, 1]
    assert {item.state for item in seen} == {"ready"}
    assert service.messages.peek("mail", 2) == seen[:2]
    assert [message.id for message in service.messages.peek("mail")] == [seen[0].id]
    assert [delivery.id for delivery in service.dequeue("mail", 10)] == [item.id for item in seen]
    assert service.messages.peek("mail", 10) == []


def test_messages_of_one_priority_come_in_the_order_in_which_they_became_visible(session, service):
    ids = [receipt.id for receipt in service.enqueue_many("mail", range(4))]
    for place, id_ in enumerate(reversed(ids)):
        set_back(session, Message.vt, timedelta(seconds=100 - place), id_)

    assert [message.id for message in service.messages.peek("mail", 4)] == ids[::-1]
    assert [delivery.id for delivery in service.dequeue("mail", 4)] == ids[::-1]


def test_a_peek_leaves_out_what_is_not_ready(service, states):
    seen = {message.id for message in service.messages.peek("mail", 100)}

    assert seen == {id_ for id_, state in states.items() if state == "ready"}


def test_a_peek_takes_no_lock(engine, service):
    service.enqueue("mail", 1)
    service.session.commit()
    with Session(engine) as reader, Session(engine) as consumer:
        assert QueueService(reader).messages.peek("mail")
        assert QueueService(consumer).dequeue("mail")
        assert QueueService(reader).messages.peek("mail")


def test_a_message_is_seen_with_everything_there_is_to_know(session, service):
    producer, consumer = (service.workers.register(n) for n in ("producer", "consumer"))
    receipt = QueueService(session, worker=producer).enqueue(
        "mail", {"a": 1}, priority=3, headers={"h": 1}, key="k", max_read_ct=4
    )
    (first,) = service.dequeue("mail", worker=consumer)
    service.fail(first, ValueError("no"), delay=0)
    (second,) = service.dequeue("mail", worker=consumer, lease=600)
    info = service.messages.get(receipt.id)

    assert (info.id, info.queue, info.payload, info.text) == (
        receipt.id,
        "mail",
        {"a": 1},
        '{"a": 1}',
    )
    assert (info.headers, info.priority, info.key) == ({"h": 1}, 3, "k")
    assert (info.read_ct, info.max_read_ct, info.last_error) == (2, 4, "ValueError: no")
    assert (info.producer_id, info.worker_id) == (producer.id, consumer.id)
    assert info.state == "leased"
    assert info.vt == second.vt
    assert info.leased_until == second.leased_until
    assert info.dequeued_at == second.leased_until - timedelta(seconds=600)
    assert info.enqueued_at == receipt.vt


@each_case("state", ["ready", "scheduled", "leased", "exhausted"], before="rollback")
def test_messages_are_found_by_state(service, states, state):
    found = service.messages.find("mail", state=state)

    assert {row.id for row in found} == {i for i, s in states.items() if s == state}
    assert {row.state for row in found} == {state}
    assert service.messages.find(state=state) == found


def test_all_messages_are_found_by_id_with_their_states(service, states):
    found = service.messages.find("mail")

    assert {row.id: row.state for row in found} == states
    assert [row.id for row in found] == sorted(states)


PAYLOADS = [
    {"a": 1, "b": {"c": [1, 2]}},
    {"a": "1"},
    {"b": {"c": [2]}},
    [1, 2],
    [],
    1,
    "x",
    None,
    True,
]


@each_case(
    ("contained", "found"),
    [
        ({"a": 1}, [0]),
        ({"b": {"c": [2]}}, [0, 2]),
        ({}, [0, 1, 2]),
        ([2], [3]),
        ([], [3, 4]),
        (1, [3, 5]),  # PostgreSQL: an array contains the scalars in it
        ("x", [6]),
        (True, [8]),
        (False, []),
        ({"a": 1, "z": None}, []),
    ],
    before="rollback",
)
def test_messages_are_found_and_cancelled_by_what_their_payload_contains(service, contained, found):
    service.enqueue_many("mail", PAYLOADS)
    expected = [PAYLOADS[n] for n in found]

    assert [message.payload for message in service.messages.find(payload=contained)] == expected
    assert service.messages.cancel_where("mail", payload=contained) == len(found)
    assert [message.payload for message in service.archived.find(payload=contained)] == expected


@each_case(
    ("where", "found"),
    [
        (Message.priority < 2, [0, 1]),
        ([Message.priority >= 1, Message.dedup_key == "k2"], [2]),
        ((Message.priority >= 1, Message.priority < 3), [1, 2]),
        (Message.payload["n"].as_integer().in_([1, 3]), [1, 3]),
        (Message.headers["tenant"].astext == "a", [0, 2]),
        (Message.ready, [0, 1, 2, 3]),
        (Message.state == "scheduled", []),
        (sa.not_(Message.ready), []),
        (Message.queue_id.in_(sa.select(Queue.id).where(Queue.queue_name == "mail")), [0, 1, 2, 3]),
        ([], [0, 1, 2, 3]),
        (sa.false(), []),
    ],
    before="reset",
)
def test_criteria_choose_what_is_found_leased_and_cancelled(session, service, where, found):
    items = [
        Item({"n": n}, priority=n, key=f"k{n}", headers={"tenant": "ab"[n % 2]}) for n in range(4)
    ]
    service.enqueue_many("mail", items)
    session.commit()

    def numbers(messages):
        return [message.payload["n"] for message in messages]

    assert numbers(service.messages.find("mail", where=where)) == found
    assert numbers(service.messages.find(where=where)) == found
    assert numbers(service.dequeue("mail", 10, where=where)) == found
    session.rollback()
    if where != []:
        assert service.messages.cancel_where("mail", where) == len(found)
        assert numbers(service.archived.find("mail", outcome="cancelled")) == found


def test_messages_are_found_a_page_at_a_time(service):
    service.queues.create("other")
    for n in range(10):
        service.enqueue(("mail", "other")[n % 2], n)
    pages, after = [], 0
    while page := service.messages.find("mail", after=after, limit=2):
        pages.append([item.payload for item in page])
        after = page[-1].id

    assert pages == [[0, 2], [4, 6], [8]]
    assert len(service.messages.find(limit=100)) == 10
    assert service.messages.find(after=10**15) == []


def test_a_search_is_limited_to_a_hundred_unless_it_says_otherwise(service):
    service.enqueue_many("mail", range(120))

    assert len(service.messages.find()) == 100
    assert len(service.messages.find(limit=1_000)) == 120


UNDECODABLE = {
    "integer of 5000 digits": sa.func.repeat("9", 5_000),
    # Python 3.13 reads up to 10,000 levels, PostgreSQL stores over 12,000.
    "nested 12000 deep": sa.func.concat(sa.func.repeat("[", 12_000), sa.func.repeat("]", 12_000)),
}


@each_case("text", UNDECODABLE)
@each_case("column", ["payload", "headers"], before="reset")
def test_a_row_that_cannot_be_decoded_hides_none_of_its_neighbours(session, service, column, text):
    ids = [receipt.id for receipt in service.enqueue_many("mail", ["first", "bad", "last"])]
    value = sa.cast(text, JSONB)
    session.execute(
        sa.update(Message.__table__)
        .where(Message.id == ids[1])
        .values({column: value if column == "payload" else sa.func.jsonb_build_object("h", value)})
    )
    session.commit()

    def check(messages):
        assert len(messages) == 3
        assert [messages[0].payload, messages[2].payload] == ["first", "last"]
        repr(messages)
        with pytest.raises(PayloadError, match="cannot be decoded"):
            _ = messages[1].payload
        assert len(messages[1].text) > 4_000 if column == "payload" else messages[1].text == '"bad"'

    check(service.messages.peek("mail", 3))
    check(service.messages.find("mail"))
    service.archive_many(service.dequeue("mail", 3))  # which makes a dead letter of the other
    check(sorted(service.archived.find("mail"), key=lambda message: message.id))


def test_metrics_count_every_state_and_outcome(session, service, states):
    service.queues.create("other")
    service.enqueue("other", 1)
    for outcome, count in {"archived": 1, "discarded": 2, "dead": 3, "cancelled": 4}.items():
        for _ in range(count):
            id_ = service.enqueue("mail", outcome, priority=-9).id
            if outcome == "cancelled":
                service.messages.cancel(id_)
                continue
            (held,) = service.dequeue("mail", where=Message.id == id_)
            if outcome == "dead":
                service.fail(held, "no", dead=True)
            else:
                service.archive(held, outcome=outcome)
    session.commit()
    metrics = service.messages.metrics("mail")

    counted = {name: list(states.values()).count(name) for name in set(states.values())}
    assert {name: getattr(metrics, name) for name in counted} == counted
    assert set(counted) == {"ready", "scheduled", "leased", "exhausted"}
    assert (metrics.archived, metrics.discarded, metrics.dead, metrics.cancelled) == (1, 2, 3, 4)
    assert metrics.live == len(states)
    assert (metrics.queue, metrics.paused) == ("mail", False)


def test_the_age_of_the_oldest_ready_message_counts_from_when_it_became_visible(session, service):
    assert service.messages.metrics("mail").oldest_ready_age is None
    ids = [receipt.id for receipt in service.enqueue_many("mail", [1, 2, Item(3, delay=600)])]
    session.commit()
    set_back(session, Message.vt, 10 * MINUTE, ids[0])
    set_back(session, Message.vt, 5 * MINUTE, ids[1])

    assert 10 * MINUTE < service.messages.metrics("mail").oldest_ready_age < 11 * MINUTE
    service.dequeue("mail")
    assert 5 * MINUTE < service.messages.metrics("mail").oldest_ready_age < 6 * MINUTE
    service.dequeue("mail")
    assert service.messages.metrics("mail").oldest_ready_age is None


def test_metrics_of_all_queues_are_those_of_each_by_name(session, service, states):
    service.queues.create("empty")
    service.queues.create("a")
    service.enqueue("a", 1)
    service.queues.pause("a")
    session.commit()
    together = service.messages.all_metrics()

    assert [item.queue for item in together] == ["a", "empty", "mail"]
    for item in together:
        alone = service.messages.metrics(item.queue)
        ages = (item.oldest_ready_age, alone.oldest_ready_age)
        assert (ages[0] is None) == (ages[1] is None)
        assert {n: getattr(item, n) for n in QueueMetrics.__slots__ if n != "oldest_ready_age"} == {
            n: getattr(alone, n) for n in QueueMetrics.__slots__ if n != "oldest_ready_age"
        }
    assert together[0].paused
    assert together[1] == QueueMetrics("empty", *[0] * 8, None, False)


def test_there_are_no_metrics_without_queues(service):
    service.queues.delete("mail")

    assert service.messages.all_metrics() == []


# ------------------------------------------------------------------- cancel and reschedule


def test_a_message_that_nobody_holds_is_cancelled_with_its_reason(service, states):
    for id_, state in states.items():
        if state == "leased":
            with pytest.raises(MessageLeased, match=rf"message {id_} is leased until 2\d\d\d-"):
                service.messages.cancel(id_)
            assert service.messages.try_cancel(id_) is False
            continue
        service.messages.cancel(id_, reason="not needed")
        (row,) = service.archived.find(where=ArchivedMessage.id == id_)
        assert (row.outcome, row.reason) == ("cancelled", "not needed")
        assert service.messages.try_cancel(id_) is False

    assert {message.state for message in service.messages.find()} == {"leased"}


def test_cancelling_keeps_all_that_the_message_was(service):
    receipt = service.enqueue(
        "mail", {"a": 1}, priority=3, headers={"h": 1}, key="k", max_read_ct=4, delay=60
    )
    before = service.messages.get(receipt.id)
    assert service.messages.try_cancel(receipt.id, reason=None) is True
    (after,) = service.archived.find()

    kept = ("queue", "text", "payload", "headers", "priority", "vt", "enqueued_at", "read_ct")
    kept += ("max_read_ct", "key", "last_error", "worker_id", "producer_id", "dequeued_at")
    assert {n: getattr(after, n) for n in kept} == {n: getattr(before, n) for n in kept}
    assert (after.id, after.outcome, after.reason) == (receipt.id, "cancelled", None)


def test_a_lease_that_ran_out_does_not_keep_a_message_from_being_cancelled(session, service):
    service.enqueue("mail", 1)
    (held,) = service.dequeue("mail")
    expire_leases(session)
    service.messages.cancel(held.id)

    with pytest.raises(LeaseLost, match="is cancelled"):
        service.archive(held)


def test_cancelling_by_criteria_leaves_what_is_held_and_other_queues(service, states):
    service.queues.create("other")
    service.enqueue("other", {"n": 1})
    waiting = [state for state in states.values() if state != "leased"]

    assert service.messages.cancel_where("mail", Message.scheduled, reason="r") == 2
    assert service.messages.cancel_where("mail", payload={}) == len(waiting) - 2
    assert service.messages.cancel_where("mail", payload={}) == 0
    assert {message.state for message in service.messages.find("mail")} == {"leased"}
    assert len(service.messages.find("other")) == 1
    assert [message.reason for message in service.archived.find()].count("r") == 2


@each_case("to", [{"delay": 600}, {"at": FAR}, {"delay": 0}], before="rollback")
def test_a_message_that_nobody_holds_is_rescheduled(service, states, to):
    for id_, state in states.items():
        if state == "leased":
            with pytest.raises(MessageLeased):
                service.messages.reschedule(id_, **to)
            continue
        before = service.messages.get(id_)
        receipt = service.messages.reschedule(id_, **to)
        after = service.messages.get(id_)
        assert receipt == Receipt(id_, after.vt)
        assert after.state == ("ready" if to == {"delay": 0} else "scheduled")
        assert after.read_ct == before.read_ct
        assert after.worker_id is None
        assert (after.dequeued_at, after.leased_until) == (None, None)
        if state == "exhausted":
            assert after.max_read_ct == after.read_ct + 1
        else:
            assert after.max_read_ct == before.max_read_ct
    assert service.messages.metrics("mail").exhausted == 0


def test_a_message_is_rescheduled_by_the_databases_clock_and_to_no_earlier_than_now(
    session, service
):
    id_ = service.enqueue("mail", 1, delay=600).id
    clock = session.scalar(sa.select(sa.func.clock_timestamp()))
    later = service.messages.reschedule(id_, delay=60).vt
    now = service.messages.reschedule(id_, at=datetime(2001, 1, 1, tzinfo=UTC)).vt

    assert clock + MINUTE <= later <= clock + 2 * MINUTE
    assert clock <= now <= clock + MINUTE
    assert service.messages.reschedule(id_, at=FAR).vt == FAR
    assert service.dequeue("mail") == []


# -------------------------------------------------------------------------------- archive


@pytest.fixture
def settled(session: Session, service: QueueService) -> dict[str, int]:
    """An archived message of each outcome, by outcome; the archive's ids."""
    for outcome in ("archived", "discarded", "dead", "cancelled"):
        service.enqueue("mail", {"was": outcome}, key=outcome)
    for held in service.dequeue("mail", 3):
        outcome = held.payload["was"]
        if outcome == "dead":
            service.fail(held, ValueError("broken"), reason="because", dead=True)
        else:
            service.archive(held, outcome=outcome, reason="because")
    service.messages.cancel(service.messages.find()[0].id, reason="because")
    session.commit()
    return {message.outcome: message.id for message in service.archived.find()}


@each_case("outcome", ["archived", "discarded", "dead", "cancelled"], before="rollback")
def test_archived_messages_are_found_by_outcome(service, settled, outcome):
    (found,) = service.archived.find("mail", outcome=outcome)

    assert (found.id, found.outcome, found.payload) == (settled[outcome], outcome, {"was": outcome})
    assert found.reason == "because"
    assert found.read_ct == (0 if outcome == "cancelled" else 1)
    assert found.last_error == ("ValueError: broken" if outcome == "dead" else None)
    assert abs(found.archived_at - datetime.now(UTC)) < MINUTE
    assert service.archived.get(found.id) == found
    assert service.archived.find(outcome=outcome) == [found]


def test_archived_messages_are_found_by_queue_criteria_and_page(session, service, settled):
    service.queues.create("other")
    service.enqueue("other", {"was": "other"})
    service.delete(service.dequeue("other")[0])
    everything = service.archived.find()

    assert [item.id for item in everything] == sorted(settled.values())
    assert service.archived.find("other") == []
    assert service.archived.find("mail") == everything
    assert service.archived.find(where=ArchivedMessage.dedup_key == "dead")[0].key == "dead"
    assert service.archived.find(where=[ArchivedMessage.read_ct == 0])[0].key == "cancelled"
    assert service.archived.find(payload={"was": "archived"})[0].key == "archived"
    pages, after = [], 0
    while page := service.archived.find(after=after, limit=3):
        pages.append(page)
        after = page[-1].id
    assert [item for page in pages for item in page] == everything
    assert [len(page) for page in pages] == [3, 1]


def test_what_is_dead_says_which_attempt_failed(session, service):
    service.enqueue("mail", 1, max_read_ct=2)
    service.fail(service.dequeue("mail")[0], "first", delay=0)
    failure = service.fail(service.dequeue("mail")[0], "second", delay=0)
    (dead,) = service.archived.find(outcome="dead")

    assert (failure.dead, failure.vt) == (True, None)
    assert (dead.reason, dead.last_error) == ("attempt 2 of 2 failed", "second")
    assert (dead.read_ct, dead.max_read_ct) == (2, 2)


def test_burying_takes_the_exhausted_and_nothing_else(session, service, states):
    service.queues.create("other")
    service.enqueue("other", 1, max_read_ct=1)
    service.dequeue("other")
    expire_leases(session, *[message.id for message in service.messages.find("other")])
    session.commit()

    assert service.archived.bury("mail") == 1
    assert service.archived.bury("mail") == 0
    (dead,) = service.archived.find()
    assert (dead.outcome, dead.reason) == ("dead", "no attempts left: the last lease ran out")
    assert states[dead.id] == "exhausted"
    assert service.messages.metrics("other").exhausted == 1
    assert service.messages.metrics("mail").exhausted == 0


def test_burying_takes_at_most_so_many_the_longest_waiting_first(session, service):
    ids = [
        receipt.id
        for receipt in service.enqueue_many("mail", [Item(n, max_read_ct=1) for n in range(5)])
    ]
    service.dequeue("mail", 5)
    expire_leases(session)
    set_back(session, Message.vt, MINUTE, ids[3])

    assert service.archived.bury("mail", limit=2) == 2
    assert {message.payload for message in service.archived.find()} == {0, 3}
    assert service.archived.bury("mail", limit=2) == 2
    assert service.archived.bury("mail", limit=2) == 1


@each_case("outcome", ["archived", "discarded", "dead", "cancelled"], before="rollback")
def test_a_settled_message_is_requeued_under_the_id_that_it_had(session, service, settled, outcome):
    before = service.archived.get(settled[outcome])
    receipt = service.archived.requeue(settled[outcome])
    after = service.messages.get(receipt.id)

    assert receipt == Receipt(before.id, after.vt)
    assert (after.state, after.read_ct) == ("ready", before.read_ct)
    assert after.max_read_ct == before.read_ct + 5
    kept = ("queue", "text", "headers", "priority", "enqueued_at", "key", "last_error")
    assert {n: getattr(after, n) for n in kept} == {n: getattr(before, n) for n in kept}
    assert (after.worker_id, after.dequeued_at, after.leased_until) == (None, None, None)
    with pytest.raises(MessageNotFound, match=f"{settled[outcome]} is in the archive"):
        service.archived.get(settled[outcome])
    assert [delivery.id for delivery in service.dequeue("mail")] == [before.id]


@each_case(("attempts", "limit"), [(None, 6), (1, 2), (7, 8)], before="rollback")
def test_a_requeued_message_gets_further_attempts(session, service, settled, attempts, limit):
    id_ = service.archived.requeue(settled["dead"], attempts=attempts).id
    for attempt in range(2, limit + 1):
        (held,) = service.dequeue("mail")
        assert (held.read_ct, held.max_read_ct) == (attempt, limit)
        failure = service.fail(held, "again", delay=0)
        assert failure.dead == (attempt == limit)

    (dead,) = service.archived.find(where=ArchivedMessage.id == id_)
    assert dead.read_ct == limit


def test_a_requeued_message_may_wait(service, settled):
    receipt = service.archived.requeue(settled["dead"], delay=60)
    info = service.messages.get(receipt.id)

    assert info.state == "scheduled"
    assert receipt.vt - datetime.now(UTC) > MINUTE / 2


def test_a_holder_from_before_the_archive_cannot_settle_what_was_requeued(session, service):
    service.enqueue("mail", 1)
    (held,) = service.dequeue("mail")
    service.archive(held)
    service.archived.requeue(service.archived.find()[0].id)
    for settle in (service.archive, service.delete, service.release):
        with pytest.raises(LeaseLost):
            settle(held)
    (again,) = service.dequeue("mail")
    with pytest.raises(LeaseLost):
        service.archive(held)
    service.archive(again)


def test_a_message_whose_key_is_live_is_not_requeued(session, service, settled):
    live = service.enqueue("mail", "new", key="dead")
    with pytest.raises(DuplicateMessage) as caught:
        service.archived.requeue(settled["dead"])

    assert (caught.value.key, caught.value.id) == ("dead", live.id)
    assert service.archived.get(settled["dead"]).payload == {"was": "dead"}
    service.messages.cancel(live.id)
    assert service.archived.requeue(settled["dead"])


def test_a_key_that_is_live_in_another_queue_does_not_matter(service, settled):
    service.queues.create("other")
    service.enqueue("other", 1, key="dead")

    assert service.archived.requeue(settled["dead"])


def test_two_that_share_a_key_are_not_requeued_together(session, service):
    for n in range(2):
        service.enqueue("mail", n, key="k")
        service.archive(service.dequeue("mail")[0])
    ids = [message.id for message in service.archived.find()]
    with pytest.raises(InvalidArgument, match="share a key") as caught:
        service.archived.requeue_many(ids)

    assert all(str(id_) in str(caught.value) for id_ in ids)
    assert len(service.archived.find()) == 2
    assert service.archived.requeue(ids[1])


def test_requeueing_many_is_all_or_nothing_and_answers_in_the_order_of_the_ids(session, service):
    service.enqueue_many("mail", range(6))
    service.archive_many(service.dequeue("mail", 6))
    ids = [message.id for message in service.archived.find()]
    with pytest.raises(MessageNotFound):
        service.archived.requeue_many([*ids, 10**12])
    assert service.messages.find() == []
    order = [ids[n] for n in (3, 0, 5, 3)]
    receipts = service.archived.requeue_many(iter(order))

    assert [receipt.id for receipt in receipts] == order
    assert len(service.messages.find()) == 3
    assert len(service.archived.find()) == 3


def test_requeueing_rolls_back_with_the_caller(session, service, settled):
    service.archived.requeue(settled["dead"])
    session.rollback()

    assert service.archived.get(settled["dead"])
    assert service.messages.find() == []


def test_archived_messages_are_deleted_by_their_ids(service, settled):
    wanted = [settled["dead"], settled["cancelled"], 10**12, settled["dead"]]

    assert service.archived.delete(wanted) == 2
    assert {message.outcome for message in service.archived.find()} == {"archived", "discarded"}
    assert service.archived.delete(iter(wanted)) == 0


def archive_some(service: QueueService, queue: str, count: int) -> list[int]:
    service.enqueue_many(queue, range(count))
    service.archive_many(service.dequeue(queue, count))
    return [message.id for message in service.archived.find(queue, limit=1000)]


def test_pruning_by_age_deletes_what_is_older(session, service):
    ids = archive_some(service, "mail", 4)
    set_back(session, ArchivedMessage.archived_at, DAY, *ids[:2])

    assert service.archived.prune(2 * DAY) == 0
    assert service.archived.prune(DAY - MINUTE) == 2
    assert [message.id for message in service.archived.find()] == ids[2:]
    session.commit()
    assert service.archived.prune(0) == 2


def test_pruning_by_retention_follows_each_queue_and_keeps_where_there_is_none(session, service):
    service.queues.create("short", retention=3_600)
    service.queues.create("long", retention=7 * DAY)
    kept = {queue: archive_some(service, queue, 2) for queue in ("mail", "short", "long")}
    set_back(session, ArchivedMessage.archived_at, DAY)

    assert service.archived.prune() == 2
    assert [message.id for message in service.archived.find("short")] == []
    set_back(session, ArchivedMessage.archived_at, 7 * DAY)
    assert service.archived.prune() == 2
    assert service.archived.prune() == 0
    assert [message.id for message in service.archived.find()] == kept["mail"]


def test_pruning_may_be_kept_to_one_queue(session, service):
    service.queues.create("other", retention=60)
    service.queues.update("mail", retention=60)
    for queue in ("mail", "other"):
        archive_some(service, queue, 2)
    set_back(session, ArchivedMessage.archived_at, DAY)

    assert service.archived.prune(queue="other") == 2
    assert service.archived.prune(60, queue="other") == 0
    assert len(service.archived.find("mail")) == 2


def test_pruning_goes_by_chunks_the_oldest_first(session, service):
    ids = archive_some(service, "mail", 7)
    set_back(session, ArchivedMessage.archived_at, DAY)
    set_back(session, ArchivedMessage.archived_at, DAY, ids[6])
    counts = [service.archived.prune(60, limit=3)]
    assert [message.id for message in service.archived.find()] == ids[2:6]
    while counts[-1]:
        counts.append(service.archived.prune(60, limit=3))

    assert counts == [3, 3, 1, 0]


def test_pruning_leaves_live_messages_and_a_queue_that_can_then_be_deleted(session, service):
    archive_some(service, "mail", 1)
    id_ = service.enqueue("mail", "live").id
    set_back(session, ArchivedMessage.archived_at, DAY)
    service.archived.prune(60)

    assert service.messages.get(id_)
    service.messages.cancel(id_)
    session.commit()
    assert service.archived.prune(0) == 1
    service.queues.delete("mail")


# -------------------------------------------------------------------------------- workers


def test_a_worker_is_registered_as_this_process_unless_it_says_otherwise(service):
    worker = service.workers.register("w")

    assert (worker.name, worker.hostname, worker.pid) == ("w", socket.gethostname(), os.getpid())
    assert (worker.port, worker.version, list(worker.queues)) == (None, None, [])
    assert (worker.status, worker.shutdown_at) == ("ready", None)
    assert worker.started_at == worker.heartbeat_at
    assert service.workers.get(worker.id) == worker


def test_a_worker_is_registered_with_what_it_says(service):
    worker = service.workers.register(
        "w", queues=("mail", "b"), hostname="h", pid=1, port=8080, version="1.2é"
    )

    assert (worker.hostname, worker.pid, worker.port, worker.version) == ("h", 1, 8080, "1.2é")
    assert list(worker.queues) == ["mail", "b"]
    assert service.workers.register("w", hostname="elsewhere").pid is None
    assert service.workers.register("w", pid=5).pid == 5


def test_a_worker_that_registers_twice_is_two_rows(service):
    first, second = (service.workers.register("w", hostname="h", pid=1) for _ in range(2))

    assert first.id < second.id
    service.workers.stop(first.id)
    assert service.workers.get(second.id).status == "ready"


def test_a_heartbeat_moves_the_time_and_nothing_else(session, service):
    worker = service.workers.register("w", queues=["mail"])
    set_back(session, Worker.heartbeat_at, MINUTE)
    before = service.workers.get(worker.id)
    after = service.workers.heartbeat(worker.id)

    assert after.heartbeat_at - before.heartbeat_at >= MINUTE
    same = [name for name in before.__slots__ if name != "heartbeat_at"]
    assert [getattr(after, n) for n in same] == [getattr(before, n) for n in same]


def test_a_suspended_worker_lives_and_leases_nothing_until_it_is_resumed(session, service):
    worker = service.workers.register("w")
    service.enqueue("mail", 1)
    session.commit()

    assert service.workers.suspend(worker.id).status == "suspended"
    assert service.workers.suspend(worker.id).status == "suspended"
    assert service.workers.heartbeat(worker.id).status == "suspended"
    with pytest.raises(WorkerNotReady, match="suspended: resume it first"):
        service.dequeue("mail", worker=worker)
    assert service.workers.resume(worker.id).status == "ready"
    assert service.dequeue("mail", worker=worker)[0].worker_id == worker.id


def test_a_stopped_worker_stays_stopped_with_the_time_of_its_first_stop(session, service):
    worker = service.workers.register("w")
    stopped = service.workers.stop(worker.id)
    session.commit()

    assert (stopped.status, stopped.shutdown_at is not None) == ("stopped", True)
    assert service.workers.stop(worker.id) == stopped
    for method in (service.workers.heartbeat, service.workers.suspend, service.workers.resume):
        with pytest.raises(WorkerNotReady, match="stopped: register again") as caught:
            method(worker.id)
        assert (caught.value.id, caught.value.status) == (worker.id, "stopped")
    assert service.workers.get(worker.id) == stopped


def test_a_worker_may_be_suspended_and_then_stopped(service):
    worker = service.workers.register("w")
    service.workers.suspend(worker.id)

    assert service.workers.stop(worker.id).status == "stopped"


def test_workers_are_listed_by_id_status_and_queue(service):
    a, b, c = (
        service.workers.register(name, queues=queues)
        for name, queues in (("a", ["mail"]), ("b", ["mail", "x"]), ("c", []))
    )
    service.workers.suspend(b.id)
    service.workers.stop(c.id)

    def names(**filters):
        return [entry.name for entry in service.workers.list(**filters)]

    assert names() == ["a", "b", "c"]
    assert names(status="ready") == ["a"]
    assert names(status="suspended") == ["b"]
    assert names(status="stopped") == ["c"]
    assert names(queue="mail") == ["a", "b"]
    assert names(queue="x") == ["b"]
    assert names(queue="mail", status="ready") == ["a"]
    assert names(queue="y") == []
    assert a.id < b.id < c.id


def test_health_tells_the_silent_from_the_lively(session, service):
    lively, silent, stopped, idle = (
        service.workers.register(n) for n in ("lively", "silent", "stopped", "idle")
    )
    service.enqueue_many("mail", range(5))
    service.dequeue("mail", 2, worker=lively)
    service.dequeue("mail", 1, worker=silent)
    expired = service.dequeue("mail", 1, worker=lively)
    expire_leases(session, expired[0].id)
    service.workers.stop(stopped.id)
    set_back(session, Worker.heartbeat_at, 2 * MINUTE, silent.id)
    service.workers.suspend(idle.id)
    service.workers.heartbeat(lively.id, leased=2)
    service.workers.heartbeat(idle.id, leased=0)
    health = {health.worker.name: health for health in service.workers.health(silent_for=60)}

    assert list(health) == ["lively", "silent", "idle"]
    assert {name: worker.healthy for name, worker in health.items()} == {
        "lively": True,
        "silent": False,
        "idle": True,
    }
    assert {name: worker.leases for name, worker in health.items()} == {
        "lively": 2,
        "silent": None,
        "idle": 0,
    }
    assert 2 * MINUTE <= health["silent"].silent_for < 3 * MINUTE
    assert health["idle"].worker.status == "suspended"
    assert all(health.healthy for health in service.workers.health(silent_for=5 * MINUTE))


def test_health_reads_the_workers_alone(service, session, engine):
    service.workers.register("w")
    executed = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: executed.append(a[2]))
    service.workers.health()
    assert len(executed) == 1
    assert "pgqrs_workers" in executed[0]
    assert "pgqrs_messages" not in executed[0]


def test_reclaiming_stops_the_silent_and_gives_back_what_they_hold(session, service):
    silent, lively, stopped = (service.workers.register(n) for n in ("silent", "lively", "stopped"))
    service.enqueue_many("mail", range(6))
    lost = service.dequeue("mail", 2, worker=silent, lease=600)
    kept = service.dequeue("mail", 1, worker=lively, lease=600)
    leaving = service.dequeue("mail", 1, worker=stopped, lease=600)
    anonymous = service.dequeue("mail", 1, lease=600)
    service.workers.stop(stopped.id)
    set_back(session, Worker.heartbeat_at, 2 * MINUTE)
    service.workers.heartbeat(lively.id)
    session.commit()

    assert service.workers.reclaim(silent_for=5 * MINUTE) == 0
    assert service.workers.reclaim(silent_for=MINUTE) == 2
    assert service.workers.reclaim(silent_for=MINUTE) == 0
    assert service.workers.get(silent.id).status == "stopped"
    assert service.workers.get(silent.id).shutdown_at is not None
    assert service.workers.get(lively.id).status == "ready"
    with pytest.raises(LeaseLost):
        service.archive(lost[0])
    with pytest.raises(WorkerNotReady):
        service.dequeue("mail", worker=silent)
    again = service.dequeue("mail", 10)
    assert {item.id for item in again if item.read_ct == 2} == {lease.id for lease in lost}
    service.archive_many([*kept, *leaving, *anonymous])


def test_what_was_reclaimed_on_its_last_attempt_is_exhausted(session, service):
    worker = service.workers.register("w")
    service.enqueue("mail", 1, max_read_ct=1)
    service.dequeue("mail", worker=worker, lease=600)
    set_back(session, Worker.heartbeat_at, 2 * MINUTE)

    assert service.workers.reclaim(silent_for=60) == 1
    assert service.messages.metrics("mail").exhausted == 1
    assert service.archived.bury("mail") == 1


def test_releasing_the_leases_of_a_worker_gives_back_what_it_alone_holds(session, service):
    worker, other = (service.workers.register(n) for n in ("one", "other"))
    service.enqueue_many("mail", range(4))
    mine = service.dequeue("mail", 2, worker=worker, lease=600)
    theirs = service.dequeue("mail", 1, worker=other, lease=600)
    session.commit()

    assert service.workers.release_leases(worker.id) == 2
    assert service.workers.release_leases(worker.id) == 0
    assert service.workers.get(worker.id).status == "ready"
    with pytest.raises(LeaseLost):
        service.delete(mine[0])
    service.archive_many(theirs)
    # They lie before the one that is left: a dequeue that goes on from there comes to that first.
    found = service.dequeue("mail", 10) + service.dequeue("mail", 10)
    assert sorted(delivery.read_ct for delivery in found) == [1, 2, 2]


def test_purging_deletes_those_that_stopped_long_ago_and_hold_nothing(session, service):
    names = ("old", "holding", "expired", "fresh", "lively")
    workers = {name: service.workers.register(name) for name in names}
    service.enqueue_many("mail", range(2))
    service.dequeue("mail", worker=workers["holding"], lease=600)
    (gone,) = service.dequeue("mail", worker=workers["expired"], lease=600)
    expire_leases(session, gone.id)
    for name in ("old", "holding", "expired", "fresh"):
        service.workers.stop(workers[name].id)
    old = [workers[name].id for name in ("old", "holding", "expired")]
    set_back(session, Worker.shutdown_at, DAY, *old)
    set_back(session, Worker.heartbeat_at, DAY)
    session.commit()

    assert service.workers.purge(older_than=2 * DAY) == 0
    assert service.workers.purge(older_than=DAY) == 2
    assert [entry.name for entry in service.workers.list()] == ["holding", "fresh", "lively"]
    with pytest.raises(WorkerNotFound):
        service.workers.get(workers["old"].id)
    assert service.messages.get(gone.id).worker_id == workers["expired"].id


# --------------------------------------------------------------------------------- states

STATES = ("ready", "scheduled", "leased", "exhausted")


@each_case("state", STATES, before="rollback")
def test_a_state_can_be_a_criterion_of_a_select(session, states, state):
    expected = {id_ for id_, name in states.items() if name == state}
    hybrid = getattr(Message, state)

    def ids(*criteria):
        return set(session.scalars(sa.select(Message.id).where(*criteria)))

    assert ids(hybrid) == expected
    assert ids(Message.state == state) == expected
    assert ids(~hybrid) == set(states) - expected
    assert ids(Message.state != state) == set(states) - expected
    assert ids(Message.state.in_([state])) == expected


def test_each_message_is_in_one_state(session, states):
    columns = [getattr(Message, name).label(name) for name in STATES]
    rows = session.execute(sa.select(Message.id, Message.state.label("state"), *columns)).all()

    assert {row.id: row.state for row in rows} == states
    for row in rows:
        assert [name for name in STATES if getattr(row, name)] == [row.state]


def test_states_can_be_grouped_and_ordered_by(session, states):
    counts = session.execute(
        sa.select(Message.state, sa.func.count()).group_by(Message.state).order_by(Message.state)
    ).all()
    expected = sorted((name, list(states.values()).count(name)) for name in STATES)

    assert [tuple(row) for row in counts] == expected
    ordered = session.scalars(
        sa.select(Message.id).order_by(Message.ready.desc(), Message.state, Message.id)
    ).all()
    assert ordered == sorted(states, key=lambda i: (states[i] != "ready", states[i], i))


def test_states_work_on_an_alias_and_in_an_aggregate_and_an_update(session, states):
    other = aliased(Message)
    assert set(session.scalars(sa.select(other.id).where(other.leased))) == {
        id_ for id_, name in states.items() if name == "leased"
    }
    assert session.scalar(
        sa.select(sa.func.count().filter(Message.ready)).select_from(Message)
    ) == list(states.values()).count("ready")
    changed = session.execute(
        sa.update(Message).where(Message.scheduled).values(priority=9),
        execution_options={"synchronize_session": False},
    )
    assert changed.rowcount == 2


def test_a_state_on_an_instance_is_the_state_in_sql(session, service, states):
    loaded = {item.id: item for item in session.scalars(sa.select(Message))}
    infos = {message.id: message for message in service.messages.find("mail")}

    for id_, state in states.items():
        message = loaded[id_]
        assert message.state == infos[id_].state == state
        assert [name for name in STATES if getattr(message, name)] == [state]
        in_sql = session.scalar(sa.select(Message.has_attempts).where(Message.id == id_))
        assert message.has_attempts == in_sql


def test_a_message_that_was_never_flushed_has_no_state_yet(session, service):
    message = Message(queue_name="mail", payload=1, delay=60)
    with pytest.raises(InvalidArgument, match="flush it first"):
        _ = message.state
    session.add(message)
    session.flush()

    assert message.state == "scheduled"
    assert message.has_attempts


@each_case("name", ["delay", "at"])
def test_what_only_sets_the_time_cannot_be_read(name):
    message = Message(queue_name="mail", payload=1)
    with pytest.raises(AttributeError, match="only sets vt: read vt"):
        getattr(message, name)
    assert not hasattr(message, name)


def test_the_boundary_of_a_state_is_the_databases_clock(session, service):
    # A message whose time is this very moment is ready, as dequeue sees it.
    service.enqueue("mail", 1)
    session.commit()
    row = session.execute(
        sa.update(Message)
        .values(vt=sa.func.statement_timestamp())
        .returning(Message.state, Message.ready, Message.scheduled),
        execution_options={"synchronize_session": False},
    ).one()

    assert tuple(row) == ("ready", True, False)


# ----------------------------------------------------------------------------------- async


async def test_the_resources_do_the_same_awaited(async_session, async_service):
    service = async_service
    await service.queues.create("other", lease=5, retention=60)
    assert [entry.name for entry in await service.queues.list()] == ["mail", "other"]
    assert (await service.queues.update("other", lease=6)).lease_seconds == 6
    assert (await service.queues.pause("other")).paused_at is not None
    assert (await service.queues.resume("other")).paused_at is None
    worker = await service.workers.register("w", queues=["mail", "other"], port=1)
    assert (await service.workers.heartbeat(worker.id)).status == "ready"
    assert [entry.id for entry in await service.workers.list(queue="other")] == [worker.id]

    await service.enqueue_many("mail", [{"n": n} for n in range(6)])
    assert [message.payload["n"] for message in await service.messages.peek("mail", 2)] == [0, 1]
    held = await service.dequeue("mail", 2, worker=worker, lease=600)
    assert (await service.workers.health())[0].leases is None
    await service.workers.heartbeat(worker.id, leased=2)
    assert (await service.workers.health())[0].leases == 2
    await service.archive(held[0])
    assert await service.workers.release_leases(worker.id) == 1
    found = await service.messages.find("mail", payload={"n": 5}, where=Message.ready)
    await service.messages.cancel(found[0].id, reason="r")
    receipt = await service.messages.reschedule(found[0].id - 1, at=FAR)
    assert receipt.vt == FAR
    assert await service.messages.cancel_where("mail", Message.scheduled) == 1
    metrics = await service.messages.metrics("mail")
    assert (metrics.ready, metrics.archived, metrics.cancelled) == (3, 1, 2)
    assert [metrics.queue for metrics in await service.messages.all_metrics()] == ["mail", "other"]

    archived = await service.archived.find("mail", outcome="archived")
    assert (await service.archived.get(archived[0].id)).payload == {"n": 0}
    assert (await service.archived.requeue(archived[0].id)).id == held[0].id
    assert await service.archived.bury("mail") == 0
    assert await service.archived.prune(DAY) == 0
    rest = [message.id for message in await service.archived.find()]
    assert await service.archived.delete(rest) == 2
    assert await service.queues.purge("mail", limit=1) == 1
    with pytest.raises(QueueNotEmpty):
        await service.queues.delete("mail")
    await service.queues.delete("mail", force=True)
    assert (await service.workers.suspend(worker.id)).status == "suspended"
    assert (await service.workers.resume(worker.id)).status == "ready"
    assert (await service.workers.stop(worker.id)).status == "stopped"
    assert await service.workers.reclaim() == 0
    assert await service.workers.purge(older_than=DAY) == 0
    await async_session.commit()
    assert [entry.name for entry in await service.queues.list()] == ["other"]


# -------------------------------------------------------------------------------- counting


def test_counts_agree_with_what_is_found(session, service):
    service.enqueue_many("mail", [{"n": n, "odd": n % 2 == 1} for n in range(7)])
    service.enqueue("mail", {"n": 9}, delay=60)
    service.archive_many(service.dequeue("mail", 3))
    messages, archived = service.messages, service.archived

    assert messages.count("mail") == len(messages.find("mail")) == 5
    assert messages.count("mail", state="scheduled") == 1
    assert messages.count(payload={"odd": True}) == len(messages.find(payload={"odd": True})) == 2
    assert messages.count(where=Message.id > messages.find("mail")[2].id) == 2
    assert archived.count("mail", outcome="archived") == 3
    assert archived.count(outcome="dead") == 0
    with pytest.raises(QueueNotFound):
        messages.count("mial")


def test_the_newest_come_first_a_page_at_a_time(service):
    ids = [receipt.id for receipt in service.enqueue_many("mail", range(7))]
    newest = service.messages.find("mail", limit=3, newest_first=True)
    before = service.messages.find("mail", limit=9, after=newest[-1].id, newest_first=True)

    assert [message.id for message in newest + before] == ids[::-1]


def test_only_a_worker_that_is_stopped_and_holds_nothing_is_deleted(service):
    worker = service.workers.register("w")
    service.enqueue("mail", 1)
    service.dequeue("mail", worker=worker)
    with pytest.raises(WorkerInUse, match="is ready: stop it first"):
        service.workers.delete(worker.id)
    service.workers.stop(worker.id)
    with pytest.raises(WorkerInUse, match="still holds messages"):
        service.workers.delete(worker.id)
    service.workers.release_leases(worker.id)
    service.workers.delete(worker.id)
    with pytest.raises(WorkerNotFound):
        service.workers.delete(worker.id)


def test_a_reclaim_may_be_for_one_queue_and_for_those_that_hold_something(service):
    service.enqueue("mail", 1)
    holder = service.workers.register("holder", queues=["mail"])
    idle = service.workers.register("idle", queues=["mail"])
    service.dequeue("mail", worker=holder)

    assert service.workers.reclaim(silent_for=1e-6, queue="other") == 0
    assert service.workers.reclaim(silent_for=1e-6, queue="mail", holding=True) == 1
    assert service.workers.get(holder.id).status == "stopped"
    assert service.workers.get(idle.id).status == "ready"

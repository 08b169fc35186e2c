"""The handler's commit is the acknowledgement: both, or neither."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from pgqrs_sa import (
    AsyncConsumer,
    DeadLetter,
    Delivery,
    Discard,
    LeaseLost,
    PayloadError,
    QueueService,
    Retry,
    RetryIn,
    Snooze,
    TransactionRefused,
)
from support.cases import each_case
from support.consumers import Ear, effect


def test_what_a_handler_writes_commits_with_the_archive(kit):
    (id_,) = kit.send({"n": 1})
    consumer = kit.consumer()
    seen = []

    @consumer.on("mail")
    def handler(session, delivery):
        seen.append(delivery)
        effect(session, delivery)
        with Session(kit.engine) as other:  # neither exists before the commit
            assert other.execute(sa.text("SELECT count(*) FROM effects")).scalar_one() == 0
            assert id_ in kit.live()

    assert consumer.run() == 0
    assert kit.effects() == [(id_, 1)]
    assert kit.outcomes() == {id_: "archived"}
    assert kit.live() == {}
    assert (seen[0].payload, seen[0].read_ct, seen[0].queue) == ({"n": 1}, 1, "mail")
    assert not seen[0].lease_lost


def test_a_lease_lost_in_the_middle_rolls_the_writes_back(kit):
    (id_,) = kit.send({})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear])

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        kit.steal(delivery.id)

    assert consumer.run() == 0
    assert kit.effects() == []
    assert kit.archive() == {}
    assert (kit.live()[id_].read_ct, kit.live()[id_].last_error) == (2, None)
    assert ear.names() == ["on_start", "on_lease_lost"]
    assert isinstance(ear.heard[1][1].error, LeaseLost)


def test_a_handler_that_settles_what_the_consumer_settles_is_charged_and_ends_as_dead_letter(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(max_attempts=2, base=0, jitter=0))

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        QueueService(session, worker=delivery.worker_id).delete(delivery)

    assert consumer.run() == 0
    assert kit.effects() == []
    assert kit.outcomes() == {id_: "dead"}


def test_an_error_rolls_the_writes_back_and_is_kept_with_its_traceback(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=1000, jitter=0))

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        raise ValueError("no such address")

    assert consumer.run() == 0
    assert kit.effects() == []
    row = kit.live()[id_]
    assert (row.read_ct, row.max_read_ct, row.dequeued_at, row.consumer_worker_id) == (
        1,
        5,
        None,
        None,
    )
    (wait,) = kit.sql("SELECT vt - now() FROM pgqrs_messages")[0]
    assert 990 < wait.total_seconds() <= 1000
    assert row.last_error.startswith("ValueError: no such address\n")
    assert 'raise ValueError("no such address")' in row.last_error
    assert "pgqrs_sa" not in row.last_error


def test_an_error_of_the_commit_itself_is_a_failed_attempt(kit):
    kit.sql(
        "CREATE TABLE IF NOT EXISTS late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    )
    (id_,) = kit.send({})
    consumer = kit.consumer()

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        session.execute(sa.text("INSERT INTO late VALUES (1), (1)"))

    try:
        assert consumer.run() == 0
    finally:
        kit.sql("DROP TABLE late")
    assert kit.effects() == []
    assert kit.live()[id_].last_error.startswith("sqlalchemy.exc.IntegrityError")


def test_a_handler_without_a_session_is_acknowledged_after_it_has_returned(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()
    states = []

    @consumer.on("mail", session=False)
    def handler(session, delivery):
        assert session is None
        states.append(kit.held())

    assert consumer.run() == 0
    assert states == [[id_]]
    assert kit.outcomes() == {id_: "archived"}


def test_acknowledged_first_a_message_is_archived_before_its_handler_begins(kit):
    good, bad = kit.send({"n": 1}, {"n": 2})
    ear = Ear()
    consumer = kit.consumer(hooks=[ear], concurrency=1)
    seen = []

    @consumer.on("mail", acknowledge="first")
    def handler(session, delivery):
        seen.append(kit.outcomes().get(delivery.id))
        effect(session, delivery)
        if delivery.id == bad:
            raise ValueError

    assert consumer.run() == 0
    assert seen == ["archived"] * 2
    assert kit.effects() == [(good, 1)]
    assert kit.outcomes() == {good: "archived", bad: "archived"}
    assert ear.names() == ["on_start", "on_success", "on_start"]


def test_acknowledged_by_hand_nothing_is_settled_for_the_handler(kit):
    settled, left = kit.send({"n": 1}, {"n": 2})
    consumer = kit.consumer()
    reported = []

    @consumer.on("mail", acknowledge="manual", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        reported.append(delivery.id)
        if delivery.id == settled:
            QueueService(session).archive(delivery)
        return True  # no decision

    assert consumer.run() == 0
    assert sorted(reported) == [settled, left]
    assert kit.outcomes() == {settled: "archived"}
    assert kit.held() == [left]
    assert len(kit.effects()) == 2


def test_acknowledged_by_hand_a_message_may_be_settled_later_with_its_delivery(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()
    kept = []

    @consumer.on("mail", session=False, acknowledge="manual", lease=600)
    def handler(_session, delivery):
        kept.append(delivery)

    assert consumer.run() == 0
    with Session(kit.engine) as session, session.begin():
        QueueService(session).archive(kept[0])
    assert kit.outcomes() == {id_: "archived"}


@each_case(("result", "session"), [("mapping", True), ("list", False)], before="cleared")
def test_a_batch_gives_a_result_for_each_message(kit, result, session):
    ids = kit.send(*({"n": n} for n in range(6)))
    consumer = kit.consumer(retry=Retry(base=1000))
    calls = []

    @consumer.on("mail", batch=6, session=session)
    def handler(session, deliveries):
        calls.append([delivery.id for delivery in deliveries])
        if session is not None:
            for delivery in deliveries:
                effect(session, delivery)
        results = [
            None,
            ValueError("bad"),
            DeadLetter("hopeless"),
            Discard("not wanted"),
            Snooze(500),
            RetryIn(700),
        ]
        if result == "list":
            return results
        return dict(zip([*deliveries[:3], *ids[3:]], results, strict=True))

    assert consumer.run() == 0
    assert calls == [ids]
    assert kit.outcomes() == {ids[0]: "archived", ids[2]: "dead", ids[3]: "discarded"}
    assert (kit.archive()[ids[2]].reason, kit.archive()[ids[3]].reason) == (
        "hopeless",
        "not wanted",
    )
    live = kit.live()
    assert live[ids[1]].last_error.startswith("ValueError: bad")
    assert (live[ids[1]].read_ct, live[ids[1]].max_read_ct) == (1, 5)
    assert (live[ids[4]].read_ct, live[ids[4]].max_read_ct) == (1, 6)
    assert (live[ids[5]].read_ct, live[ids[5]].max_read_ct) == (1, 5)
    assert len(kit.effects()) == (6 if session else 0)
    assert kit.held() == []


def test_a_batch_of_which_one_was_lost_goes_back_uncharged(kit):
    ids = kit.send(1, 2, 3)
    consumer = kit.consumer(concurrency=1)
    calls = []

    @consumer.on("mail", batch=3)
    def handler(session, deliveries):
        calls.append([(delivery.id, delivery.read_ct) for delivery in deliveries])
        for delivery in deliveries:
            effect(session, delivery)
        if len(calls) == 1:
            kit.steal(ids[1])

    assert consumer.run() == 0
    assert calls == [[(ids[0], 1), (ids[1], 1), (ids[2], 1)], [(ids[0], 2), (ids[2], 2)]]
    assert kit.effects() == [(ids[0], 2), (ids[2], 2)]
    assert {delivery.max_read_ct - delivery.read_ct for delivery in kit.archive().values()} == {4}
    assert list(kit.live()) == [ids[1]]


def test_a_batch_with_a_wrong_result_is_a_failed_attempt_of_all(kit):
    ids = kit.send(1, 2)
    consumer = kit.consumer(retry=Retry(base=1000))

    @consumer.on("mail", batch=2)
    def handler(session, deliveries):
        effect(session, deliveries[0])
        return [None]

    assert consumer.run() == 0
    assert kit.effects() == []
    for id_ in ids:
        assert "returned 1 results for 2 messages" in kit.live()[id_].last_error


DECISIONS = {
    "retry": RetryIn(1000),
    "snooze": Snooze(1000),
    "discard": Discard("not wanted"),
    "dead": DeadLetter("hopeless"),
}


@each_case("how", ["raised", "returned"], before="cleared")
def test_a_decision_commits_the_writes_when_returned_and_not_when_raised(kit, how):
    ids = dict(zip(DECISIONS, kit.send(*DECISIONS), strict=True))
    consumer = kit.consumer()

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        if how == "raised":
            raise DECISIONS[delivery.payload]
        return DECISIONS[delivery.payload]

    assert consumer.run() == 0
    assert sorted(kit.effects()) == ([(id_, 1) for id_ in ids.values()] * (how == "returned"))
    live, archive = kit.live(), kit.archive()
    retried, snoozed = live[ids["retry"]], live[ids["snooze"]]
    assert (retried.read_ct, retried.max_read_ct, retried.last_error) == (1, 5, "again in 1000 s")
    assert (snoozed.read_ct, snoozed.max_read_ct, snoozed.last_error) == (1, 6, None)
    for (wait,) in kit.sql("SELECT vt - now() FROM pgqrs_messages"):
        assert 990 < wait.total_seconds() <= 1000
    found = {
        name: (archive[ids[name]].outcome, archive[ids[name]].reason)
        for name in ("discard", "dead")
    }
    assert found == {"discard": ("discarded", "not wanted"), "dead": ("dead", "hopeless")}
    assert kit.held() == []


def test_a_snooze_costs_no_attempt_and_a_retry_does(kit):
    (snoozed,) = kit.send("snooze", max_read_ct=1)
    (retried,) = kit.send("retry", max_read_ct=2)
    consumer = kit.consumer()
    calls = []

    @consumer.on("mail")
    def handler(_session, delivery):
        calls.append((delivery.payload, delivery.read_ct))
        if delivery.payload == "retry":
            return RetryIn(0)
        return Snooze(0) if delivery.read_ct < 4 else None

    assert consumer.run() == 0
    assert sorted(calls) == [("retry", 1), ("retry", 2), *(("snooze", n) for n in (1, 2, 3, 4))]
    assert kit.outcomes() == {snoozed: "archived", retried: "dead"}


def test_an_exhausted_message_is_dead_with_its_reason_and_its_last_error(kit):
    (id_,) = kit.send({})
    ear = Ear()
    retry = Retry(max_attempts=3, base=0, jitter=0)
    consumer = kit.consumer(retry=retry, hooks=[ear])

    @consumer.on("mail")
    def handler(session, delivery):
        raise KeyError(f"attempt {delivery.read_ct}")

    assert consumer.run() == 0
    dead = kit.archive()[id_]
    assert (dead.outcome, dead.read_ct, dead.reason) == ("dead", 3, "attempt 3 of 3 failed")
    assert dead.last_error.startswith("KeyError: 'attempt 3'\n")
    assert "raise KeyError" in dead.last_error
    assert ear.names() == ["on_start", "on_retry"] * 2 + ["on_start", "on_dead"]
    assert isinstance(ear.heard[-1][1].error, KeyError)


def test_attempts_of_the_message_come_before_those_of_the_handler_and_of_the_queue(kit):
    kit.queue("quick", max_read_ct=4)
    own, handlers = (kit.send({}, max_read_ct=n)[0] for n in (2, None))
    (queues,) = kit.send({}, queue="quick")
    consumer = kit.consumer(retry=Retry(base=0))

    @consumer.on("mail", retry=Retry(max_attempts=3, base=0))
    @consumer.on("quick")
    def handler(session, delivery):
        raise ValueError

    assert consumer.run() == 0
    assert {id_: delivery.read_ct for id_, delivery in kit.archive().items()} == {
        own: 2,
        handlers: 3,
        queues: 4,
    }


def test_what_the_last_holder_left_without_attempts_is_buried_by_whoever_runs(kit):
    dead, fine = kit.send({}, {})
    kit.sql(
        "UPDATE pgqrs_messages SET read_ct = 2, max_read_ct = 2, dequeued_at = now(),"
        " leased_until = now(), last_error = 'before' WHERE id = :id",
        id=dead,
    )
    consumer = kit.consumer()
    calls = []

    @consumer.on("mail")
    def handler(_session, delivery):
        calls.append(delivery.id)

    assert consumer.run() == 0
    assert calls == [fine]
    assert kit.outcomes() == {fine: "archived", dead: "dead"}
    assert "no attempts left" in kit.archive()[dead].reason
    assert kit.archive()[dead].last_error == "before"


@each_case("batch", [None, 3], before="cleared")
def test_rows_that_cannot_be_decoded_are_dead_at_once_and_neighbours_flow(kit, batch):
    kit.sql(
        "INSERT INTO pgqrs_messages (queue_id, payload, priority, vt)"
        " SELECT id, ('1' || repeat('0', 5000))::jsonb, -5, now() - interval '1 day'"
        " FROM pgqrs_queues, generate_series(1, 30)"
    )
    fine = kit.send(*range(5))
    ear = Ear()
    # So that a queue which is taken for empty would be asked again only after a minute.
    consumer = kit.consumer(retry=Retry(max_attempts=2, base=0), poll_interval=60, hooks=[ear])
    calls = []

    @consumer.on("mail", batch=batch)
    def handler(session, deliveries):
        calls.extend(case.payload for case in ([deliveries] if batch is None else deliveries))

    assert consumer.run() == 0
    assert sorted(calls) == [0, 1, 2, 3, 4]
    outcomes = kit.outcomes()
    assert [outcomes[id_] for id_ in fine] == ["archived"] * 5
    dead = [delivery for delivery in kit.archive().values() if delivery.outcome == "dead"]
    assert [message.read_ct for message in dead] == [1] * 30
    assert dead[0].reason == "cannot be decoded"
    assert f"payload of message {dead[0].id}" in dead[0].last_error
    events = [event for name, event in ear.heard if name == "on_dead"]
    assert {event.delivery.id for event in events} == {message.id for message in dead}
    assert len(events) == 30
    assert {event.reason for event in events} == {"cannot be decoded"}
    assert all(isinstance(event.error, PayloadError) for event in events)


class DecryptionError(Exception):
    pass


class Encrypted:
    def dumps(self, value):
        return json.dumps(value)

    def loads(self, text):
        if text == '"bad"':
            raise DecryptionError("wrong key")
        return json.loads(text)


def test_an_error_of_a_codec_ends_no_consumer_and_charges_no_neighbour(kit):
    ids = kit.send(1, "bad", 2, "bad", 3)
    consumer = kit.consumer(codec=Encrypted())
    calls = []

    @consumer.on("mail", batch=5)
    def handler(session, deliveries):
        calls.extend((delivery.payload, delivery.read_ct) for delivery in deliveries)

    assert consumer.run() == 0
    assert sorted(calls) == [(1, 1), (2, 1), (3, 1)]
    assert [kit.outcomes()[id_] for id_ in ids] == [
        "archived", "dead", "archived", "dead", "archived",
    ]  # fmt: skip
    assert "DecryptionError: wrong key" in kit.archive()[ids[1]].last_error


def test_a_message_that_does_not_fit_its_handler_is_alone_in_that_also_in_a_batch(kit):
    ids = kit.send({"n": 1}, "odd", {"n": 2})
    consumer = kit.consumer(retry=Retry(max_attempts=2, base=0))
    calls = []

    def handler(payloads: list[dict], deliveries: list[Delivery]) -> None:
        calls.extend(
            (delivery.payload, delivery.read_ct, delivery.max_read_ct) for delivery in deliveries
        )

    async def asynchronous(payloads: list[dict], deliveries: list[Delivery]) -> None:
        handler(payloads, deliveries)

    consumer.consumer.on("mail", batch=3)(asynchronous if kit.is_async else handler)
    assert consumer.run() == 0
    outcomes = kit.outcomes()
    assert [outcomes[id_] for id_ in ids] == ["archived", "dead", "archived"]
    assert sorted(call[0]["n"] for call in calls) == [1, 2]
    # Those of the same batch came again, and have as many attempts left as before.
    assert {most - read for _, read, most in calls} == {1}
    letter = kit.archive()[ids[1]]
    assert letter.read_ct == 2
    assert "payload must be an object, not str" in letter.last_error


def test_a_message_of_another_queue_that_was_lost_is_an_ordinary_error(kit):
    """A handler that settles others by hand, and loses one of these, has failed."""
    kit.queue("other")
    kit.send({}, queue="other")
    (id_,) = kit.send({}, max_read_ct=2)
    with Session(kit.engine) as session, session.begin():
        (foreign,) = QueueService(session).dequeue("other")
    kit.steal(foreign.id)
    consumer = kit.consumer(retry=Retry(base=0))

    @consumer.on("mail")
    def handler(session, delivery):
        QueueService(session).archive(foreign)

    assert consumer.run() == 0
    assert kit.outcomes() == {id_: "dead"}
    assert kit.archive()[id_].read_ct == 2
    assert kit.archive()[id_].last_error.startswith("pgqrs_sa.errors.LeaseLost")


def test_a_lease_that_a_handler_took_and_rolled_back_settles_nothing_later(kit):
    """By its own worker, in the next attempt, while another holder works on the message."""
    kit.queue("post")
    (id_,), (other,) = kit.send({}), kit.send({}, queue="post")
    consumer = kit.consumer(retry=Retry(base=0))
    never: list[Delivery] = []
    lost: list[bool] = []

    @consumer.on("mail")
    def handler(session, delivery):
        service = QueueService(session)
        if delivery.read_ct == 1:
            never.extend(service.dequeue("post", worker=delivery.worker_id))
            raise ValueError
        with Session(kit.engine) as theirs, theirs.begin():
            (held,) = QueueService(theirs).dequeue("post", worker=delivery.worker_id)
        assert (held.id, held.read_ct) == (never[0].id, never[0].read_ct)
        lost.append(service.try_archive(never[0]))
        lost.append(service.try_delete(never[0]))
        lost.append(service.try_release(never[0]))
        lost.append(bool(service.try_extend(never[0], 60)))
        lost.append(bool(service.try_fail(never[0], "no")))
        with Session(kit.engine) as theirs, theirs.begin():
            QueueService(theirs).archive(held)

    assert consumer.run() == 0
    assert lost == [False] * 5
    assert kit.outcomes() == {id_: "archived", other: "archived"}


# ----------------------------------------------------------- the transaction is the consumer's


@each_case("method", ["commit", "rollback", "close"], before="cleared")
def test_a_handler_that_ends_its_transaction_fails_before_anything_is_kept(kit, method):
    (id_,) = kit.send({}, max_read_ct=2)
    consumer = kit.consumer(retry=Retry(base=0, jitter=0))

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        getattr(session, method)()

    assert consumer.run() == 0
    assert (kit.effects(), kit.outcomes()) == ([], {id_: "dead"})
    error = kit.archive()[id_].last_error
    assert f"session.{method}() in " in error
    assert "the consumer ends this transaction" in error


async def test_an_awaited_commit_in_a_handler_is_refused_too(async_engine, threads):
    (id_,) = threads.send({}, max_read_ct=1)
    consumer = AsyncConsumer(async_sessionmaker(async_engine), poll_interval=0.02)

    @consumer.on("mail")
    async def handler(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)
        await session.commit()

    assert await consumer.run(until_empty=True) == 0
    assert (threads.effects(), threads.outcomes()) == ([], {id_: "dead"})
    assert "session.commit() in " in threads.archive()[id_].last_error


def test_a_refusal_that_is_caught_leaves_the_transaction_as_it_is(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()

    @consumer.on("mail")
    def handler(session, delivery):
        effect(session, delivery)
        with pytest.raises(TransactionRefused) as caught:
            session.commit()
        assert caught.value.method == "commit"
        with session.begin_nested():  # a savepoint is the handler's own
            effect(session, delivery)
        savepoint = session.begin_nested()
        effect(session, delivery)
        savepoint.rollback()

    assert consumer.run() == 0
    assert kit.effects() == [(id_, 1)] * 2
    assert kit.outcomes() == {id_: "archived"}


def test_a_handler_may_end_the_transaction_of_what_it_acknowledges_itself(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer()

    @consumer.on("mail", acknowledge="manual", lease=600)
    def handler(session, delivery):
        effect(session, delivery)
        QueueService(session).archive(delivery)
        session.commit()

    assert consumer.run() == 0
    assert (kit.effects(), kit.outcomes()) == ([(id_, 1)], {id_: "archived"})


# --- messages that schedule their next run -------------------------------------------------------


def test_a_handler_s_own_key_is_taken_until_its_message_is_settled(kit):
    """Under its own key a run schedules nothing, as docs/reference/consumers.md says."""
    receipts = []
    with Session(kit.engine) as session, session.begin():
        first = QueueService(session).enqueue("mail", {"run": 1}, key="report")
    consumer = kit.consumer()

    @consumer.on("mail")
    def handler(session, delivery):
        run = {"run": delivery.payload["run"] + 1}
        receipts.append(QueueService(session).enqueue("mail", run, key=delivery.key))

    assert consumer.run() == 0
    assert [(receipt.id, receipt.duplicate) for receipt in receipts] == [(first.id, True)]
    assert kit.live() == {}


def name_the_run(queue, delivery, run):
    return queue.enqueue("mail", {"run": run}, key=f"report-{run}", delay=3600 if run > 3 else 0)


def archive_first(queue, delivery, run):
    queue.archive(delivery)
    return queue.enqueue("mail", {"run": run}, key=delivery.key, delay=3600 if run > 3 else 0)


def keep_the_key(queue, delivery, run):
    return queue.enqueue("mail", {"run": run}, key=delivery.key, delay=3600 if run > 3 else 0)


@each_case(
    ("acknowledge", "schedule"),
    [("commit", name_the_run), ("manual", archive_first), ("first", keep_the_key)],
    before="cleared",
)
def test_a_handler_schedules_its_next_run(kit, acknowledge, schedule):
    """Each of the ways that docs/reference/consumers.md names."""
    with Session(kit.engine) as session, session.begin():
        QueueService(session).enqueue("mail", {"run": 1}, key="report-1")
    consumer = kit.consumer()
    runs, failed = [], []

    @consumer.on("mail", acknowledge=acknowledge, retry=Retry(base=0))
    def handler(session, delivery):
        run = delivery.payload["run"]
        receipt = schedule(QueueService(session), delivery, run + 1)
        assert not receipt.duplicate
        if run == 2 and not failed and acknowledge != "first":
            failed.append(run)
            raise ValueError("once: the next run goes with it")
        runs.append(run)

    assert consumer.run() == 0
    assert runs == [1, 2, 3]
    assert kit.sql("SELECT payload FROM pgqrs_messages") == [({"run": 4},)]
    assert [delivery.outcome for delivery in kit.archive().values()] == ["archived"] * 3

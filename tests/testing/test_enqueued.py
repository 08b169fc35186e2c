"""What is in the queues, and what a test is told when it is not what it expected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqrs_sa import InvalidArgument, Message, QueueNotFound
from pgqrs_sa.testing import all_enqueued, assert_enqueued, refute_enqueued
from pgqrs_sa.testing.enqueued import lacks, same
from support.cases import each_case
from support.properties import at_least


def test_a_message_is_found_by_what_its_payload_contains_and_returned(session, service):
    receipt = service.enqueue("mail", {"to": "ada", "tags": ["a", "b"], "n": {"x": 1, "y": 2}})

    (found,) = assert_enqueued(session, "mail", payload__contains={"tags": ["b"], "n": {"x": 1}})

    assert (found.id, found.payload["to"]) == (receipt.id, "ada")


def test_a_whole_payload_is_compared_as_the_codec_stores_it(session, service):
    service.enqueue("mail", {"pair": [1, 2]})

    assert_enqueued(session, "mail", payload={"pair": (1, 2)})
    refute_enqueued(session, "mail", payload={"pair": [1]})
    refute_enqueued(session, "mail", payload={"pair": [True, 2]})


def test_a_payload_of_null_is_something_else_than_no_expectation(session, service):
    service.enqueue("mail", {"a": 1})
    refute_enqueued(session, "mail", payload=None)

    service.enqueue("mail", None)
    assert_enqueued(session, "mail", payload=None, count=1)


def test_a_message_that_was_only_added_is_flushed_first(connection):
    factory = sessionmaker(connection, autoflush=False, join_transaction_mode="create_savepoint")
    with factory() as session:
        session.add(Message(queue_name="mail", payload={"to": "ada"}))

        assert_enqueued(session, "mail", payload={"to": "ada"})


@each_case(
    "delay",
    {
        "seconds": 3600,
        "within the tolerance": 3604,
        "a timedelta": timedelta(hours=1),
        "approx": pytest.approx(3590, abs=30),
    },
    before="reset",
)
def test_a_delay_is_compared_with_the_clock_of_the_database(session, service, delay):
    service.enqueue("mail", 1, delay=3600)

    assert_enqueued(session, "mail", delay=delay)


@each_case("delay", [0, 3600.5, timedelta(hours=2), pytest.approx(3600, abs=0.001)], before="reset")
def test_another_delay_does_not_match(session, service, delay):
    service.enqueue("mail", 1, delay=3590)

    refute_enqueued(session, "mail", delay=delay)
    assert_enqueued(session, "mail", delay=3600, tolerance=20)


def test_approx_of_a_timedelta_decides_by_itself(session, service):
    service.enqueue("mail", 1, delay=3600)

    assert_enqueued(
        session, "mail", delay=pytest.approx(timedelta(hours=1), abs=timedelta(seconds=9))
    )
    refute_enqueued(
        session, "mail", delay=pytest.approx(timedelta(hours=2), abs=timedelta(seconds=9))
    )


def test_what_has_been_visible_for_long_has_no_delay(session, service):
    service.enqueue("mail", 1)
    session.execute(sa.update(Message).values(vt=Message.vt - timedelta(hours=1)))

    assert_enqueued(session, "mail", delay=0)


def test_a_message_is_found_by_its_time_priority_key_and_headers(session, service):
    at = datetime(2100, 1, 1, tzinfo=UTC)
    service.enqueue("mail", 1, at=at, priority=-3, key="k", headers={"trace": "t", "b": 1})
    expected = {"at": at, "priority": -3, "key": "k", "headers__contains": {"trace": "t"}}

    assert_enqueued(session, "mail", **expected)
    for name, other in {
        "at": at + timedelta(seconds=6),
        "priority": 3,
        "key": None,
        "headers__contains": {"trace": "u"},
    }.items():
        refute_enqueued(session, "mail", **(expected | {name: other}))


def test_the_number_of_messages_can_be_demanded(session, service):
    service.enqueue_many("mail", [{"n": 1}, {"n": 1}, {"n": 2}])

    assert len(assert_enqueued(session, "mail", payload={"n": 1}, count=2)) == 2
    assert assert_enqueued(session, "mail", payload={"n": 9}, count=0) == []
    with pytest.raises(AssertionError, match=r"^2 message\(s\) have payload=\{'n': 1\}, not 3"):
        assert_enqueued(session, "mail", payload={"n": 1}, count=3)


def test_a_failure_lists_what_is_there_and_says_what_keeps_the_closest_from_matching(
    session, service
):
    service.enqueue("mail", {"to": "bob", "long": "x" * 10_000})
    closest = service.enqueue("mail", {"to": "ada"}, delay=60, key="k", priority=2)

    with pytest.raises(AssertionError) as failed:
        assert_enqueued(session, "mail", payload__contains={"to": "ada"}, delay=3600)

    text = str(failed.value)
    first, second, third, fourth = text.splitlines()
    assert first == (
        "no message has payload__contains={'to': 'ada'}, delay=3600; "
        "in the queue 'mail' there are 2 message(s):"
    )
    assert second.startswith(f'  {closest.id}: {{"to": "ada"}}, scheduled for ')
    assert second.endswith("priority 2, key 'k'")
    assert "closest, but delay is " in third
    assert "not 3600 s ± 5 s" in third
    assert "xxx…, ready" in fourth
    assert len(text) < 1000


def test_a_failure_with_many_messages_is_no_longer_than_needed(session, service):
    service.enqueue_many("mail", [{"n": n} for n in range(100)])

    with pytest.raises(AssertionError, match="and 80 more") as failed:
        assert_enqueued(session, "mail", payload__contains={"n": 99, "x": 1})

    assert len(str(failed.value).splitlines()) == 23


def test_an_empty_queue_is_said_to_be_empty(session):
    with pytest.raises(AssertionError, match="no message has been enqueued; the queue 'mail' is"):
        assert_enqueued(session, "mail")


def test_refuting_lists_only_those_that_should_not_be_there(session, service):
    service.enqueue_many("mail", [{"to": "ada"}, {"to": "bob"}])

    with pytest.raises(AssertionError, match=r"1 message\(s\) have payload") as failed:
        refute_enqueued(session, "mail", payload={"to": "ada"})

    assert "bob" not in str(failed.value)


def test_a_misspelt_queue_is_no_empty_queue(session):
    for helper in (assert_enqueued, refute_enqueued, all_enqueued):
        with pytest.raises(QueueNotFound, match="did you mean 'mail'"):
            helper(session, "mial")


def test_a_misspelt_expectation_is_refused(session):
    with pytest.raises(TypeError, match="unexpected paylod: a message has payload, payload__"):
        assert_enqueued(session, "mail", paylod={})


def test_all_messages_of_one_queue_or_of_all_are_listed_by_id(session, service):
    ids = [service.enqueue(queue, 1).id for queue in ("mail", "receipts", "mail")]

    assert [message.id for message in all_enqueued(session)] == ids
    assert [message.id for message in all_enqueued(session, "mail")] == [ids[0], ids[2]]


def test_a_payload_that_cannot_be_decoded_matches_nothing_and_hides_nobody(session, service):
    class Broken:
        def dumps(self, value):
            return str(value)

        def loads(self, text):
            if text == '"old"':
                raise ValueError("not any more")
            return 1

    service.enqueue("mail", "old")
    service.enqueue("mail", 1)

    assert_enqueued(session, "mail", payload=1, codec=Broken(), count=1)


def test_a_scoped_session_will_do(connection):
    scoped = scoped_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))
    scoped.add(Message(queue_name="mail", payload=1))

    assert_enqueued(scoped, "mail", payload=1)
    scoped.remove()


def test_something_else_than_a_session_is_refused(host_engine):
    with pytest.raises(InvalidArgument, match="a Session or an AsyncSession is needed here"):
        assert_enqueued(host_engine, "mail")


# ------------------------------------------------------------------- as PostgreSQL decides

SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "b", 1.0, 0.5])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=6,
)


@settings(at_least(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=VALUES, wanted=VALUES)
def test_containment_and_equality_are_those_of_the_database(session: Session, found, wanted):
    left, right = sa.literal(found, JSONB), sa.literal(wanted, JSONB)
    contains, equal = session.execute(sa.select(left.contains(right), left == right)).one()

    assert (lacks(found, wanted, "payload") is None) == contains
    assert same(found, wanted) == equal

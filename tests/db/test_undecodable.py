"""What cannot be decoded is one message's alone: it is dead at once, and hides no other.

So is any error of a host's codec. F44 and E5 are failure modes of the design.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedInfo, Item, JsonCodec, Message, PayloadError, QueueService
from pgqrs_sa._core import lease as lease_operations
from support.cases import each_case

UNDECODABLE = {  # Python 3.13 reads up to 10,000 levels, PostgreSQL stores over 12,000
    "nested": sa.text("(repeat('[', 12000) || repeat(']', 12000))::jsonb"),
    "digits": sa.text("repeat('9', 5000)::jsonb"),
}


class DecryptionError(Exception):
    """Of a codec: neither ValueError nor TypeError nor LookupError."""

    def __str__(self) -> str:
        return "wrong key"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Broken:
    """A codec that raises, for the payloads that say so."""

    def __init__(self, error: type[Exception] = DecryptionError) -> None:
        self.error = error

    def dumps(self, value: Any) -> str:
        if value == "bad":
            raise self.error
        return json.dumps(value)

    def loads(self, text: str) -> Any:
        if text in ("1", '"bad"'):
            raise self.error
        return json.loads(text)


def poison(value: sa.TextClause) -> sa.Insert:
    """What SQL can store and Python cannot read."""
    return sa.insert(Message.__table__).values(queue_id=1, payload=value).returning(Message.id)


@pytest.fixture
def poisoned(session: Session, service: QueueService) -> dict[str, int]:
    """Two messages that cannot be read, ahead of two good ones."""
    ids = {name: session.execute(poison(value)).scalar_one() for name, value in UNDECODABLE.items()}
    service.enqueue_many("mail", ["good", "good"])
    session.commit()
    return ids


def letters(service: QueueService) -> dict[int, ArchivedInfo]:
    """The dead letters, by id."""
    return {message.id: message for message in service.archived.find("mail", outcome="dead")}


def test_an_undecodable_payload_is_dead_at_once_and_does_not_hide_its_neighbours(
    service, session, poisoned
):
    """F44, E5: the lease that meets it makes it a dead letter, and gives the others."""
    deliveries = service.dequeue("mail", 10)
    session.commit()
    assert [delivery.payload for delivery in deliveries] == ["good", "good"]
    found = letters(service)
    assert set(found) == set(poisoned.values())
    for id_, letter in found.items():
        assert letter.reason == "cannot be decoded"
        assert f"payload of message {id_} cannot be decoded" in letter.last_error
        assert letter.read_ct == 1
        assert letter.text.startswith(("[[[", "999"))
        assert repr(letter)
        with pytest.raises(PayloadError, match=f"message {id_}"):
            _ = letter.payload
    service.archive_many(deliveries)


def test_undecodable_messages_do_not_starve_those_behind_them(service, session, poisoned):
    """A dequeue that leases nothing else leases again, in the same transaction."""
    (good,) = service.dequeue("mail", 1)
    assert good.payload == "good"
    assert set(letters(service)) == set(poisoned.values())
    session.rollback()
    assert letters(service) == {}  # all of it was the caller's
    assert [delivery.payload for delivery in service.dequeue("mail", 2)] == ["good", "good"]


def test_a_dequeue_makes_only_so_many_dead_letters(service, session, monkeypatch):
    monkeypatch.setattr(lease_operations, "_MOST_TRIES", 3)
    for _ in range(4):
        session.execute(poison(UNDECODABLE["digits"]))
    service.enqueue("mail", "good")
    session.commit()
    assert service.dequeue("mail") == []
    assert len(letters(service)) == 3
    (good,) = service.dequeue("mail")
    assert good.payload == "good"
    assert len(letters(service)) == 4


@each_case("payload", [None, "good"], before="reset")
def test_a_dequeue_that_meets_nothing_undecodable_leases_once(
    service, session, monkeypatch, payload
):
    if payload is not None:
        service.enqueue("mail", payload)
    session.commit()
    leases: list[str] = []
    explained: list[object] = []

    def note(_c: Any, _cur: Any, sql: str, *_rest: Any) -> None:
        if "fencing_token" in sql:
            leases.append(sql)

    sa.event.listen(session.connection(), "before_cursor_execute", note)
    monkeypatch.setattr(lease_operations, "explain_nothing", lambda *given: explained.append(given))
    deliveries = service.dequeue("mail")
    assert [delivery.payload for delivery in deliveries] == ([] if payload is None else ["good"])
    assert (len(leases), len(explained)) == (1, 1 if payload is None else 0)


def test_criteria_meet_undecodable_messages_as_well(service, session, poisoned):
    assert service.dequeue("mail", 1, where=Message.id.in_(poisoned.values())) == []
    assert set(letters(service)) == set(poisoned.values())


def test_an_undecodable_message_that_is_requeued_is_dead_again(service, session, poisoned):
    """F44."""
    service.dequeue("mail", 10)
    session.commit()
    (first, *_) = letters(service).values()
    assert service.archived.requeue(first.id).id == first.id
    assert service.dequeue("mail") == []
    session.commit()
    assert letters(service)[first.id].read_ct == 2


def test_loaded_objects_of_undecodable_messages_are_forgotten(service, session):
    message = Message(queue_name="mail", payload=1)
    session.add(message)
    session.commit()
    id_ = message.id
    service = QueueService(session, codec=Broken())
    assert service.dequeue("mail") == []
    session.commit()
    assert session.get(Message, id_) is None


ERRORS = [
    DecryptionError, Silent, AttributeError, AssertionError, OSError, MemoryError, RuntimeError,
    StopIteration, RecursionError, NotImplementedError, KeyError, ValueError,
]  # fmt: skip


@each_case("error", ERRORS, before="reset")
def test_whatever_a_codec_raises_is_the_message_s_alone(service, session, error):
    service.enqueue_many("mail", ["first", "bad", "last"])
    session.commit()
    strange = QueueService(session, codec=Broken(error))
    seen = [strange.messages.find("mail"), strange.messages.peek("mail", 3)]
    for messages in seen:
        assert [messages[0].payload, messages[2].payload] == ["first", "last"]
        with pytest.raises(PayloadError, match=r"payload of message \d+ cannot be decoded"):
            _ = messages[1].payload
    assert [delivery.payload for delivery in strange.dequeue("mail", 3)] == ["first", "last"]
    session.commit()
    (letter,) = strange.archived.find("mail", outcome="dead")
    assert "cannot be decoded" in letter.last_error
    assert error.__name__ in letter.last_error
    with pytest.raises(PayloadError):
        _ = letter.payload
    assert service.archived.get(letter.id).payload == "bad"  # what is stored is as it was


@each_case("error", ERRORS, before="reset")
def test_whatever_a_codec_raises_at_an_enqueue_is_an_error_with_its_place(service, session, error):
    strange = QueueService(session, codec=Broken(error))
    ways = {
        "payload": lambda: strange.enqueue("mail", "bad"),
        "items[1].payload": lambda: strange.enqueue_many("mail", ["good", "bad"]),
        "items[2].payload": lambda: strange.enqueue_many("mail", ["a", "b", Item("bad", key="k")]),
    }
    for path, way in ways.items():
        with pytest.raises(PayloadError) as caught:
            way()
        assert caught.value.path == path
        assert caught.value.__cause__ is not None
    assert session.scalars(sa.select(Message.id)).all() == []
    strange.enqueue("mail", "good")  # the transaction goes on
    session.commit()


@each_case(
    "text",
    [
        None, b"1", 1, "", "nope", "1,2", "1],[2", "NaN", "-Infinity", '"\0"', '"\ud800"',
        r'"\u0000"', r'"\\\u0000"', r'"\ud800"', "[" * 100_000,
    ],
    before="reset",
)  # fmt: skip
def test_what_a_codec_returns_must_be_json(service, session, text):
    """A batch travels as one array: text that is no JSON could change its neighbours."""

    class Wrong(JsonCodec):
        def dumps(self, _value: Any, /, *, path: str = "payload") -> Any:  # noqa: ARG002
            return text

    strange = QueueService(session, codec=Wrong())
    for path, way in {
        "payload": lambda: strange.enqueue("mail", 1),
        "items[0].payload": lambda: strange.enqueue_many("mail", [1]),
    }.items():
        with pytest.raises(PayloadError) as caught:
            way()
        assert caught.value.path == path
    assert session.scalars(sa.select(Message.id)).all() == []


@each_case("text", [r'"\\u0000"', r'"\ud83d\ude00"', '{"a":[1e400,"\\\\"]}'], before="reset")
def test_text_of_a_codec_that_only_looks_odd_is_sent(service, session, text):
    class Odd(JsonCodec):
        def dumps(self, _value: Any, /, *, path: str = "payload") -> Any:  # noqa: ARG002
            return text

    QueueService(session, codec=Odd()).enqueue_many("mail", [1, Item(2, key="k")])
    assert session.scalar(sa.select(sa.func.count(Message.id))) == 2


def test_an_undecodable_payload_is_found_peeked_and_counted(service, session, poisoned):
    """F44."""
    assert {message.id for message in service.messages.find("mail")} >= set(poisoned.values())
    assert len(service.messages.peek("mail", 10)) == 4
    assert service.messages.metrics("mail").ready == 4
    for id_ in poisoned.values():
        with pytest.raises(PayloadError):
            _ = service.messages.get(id_).payload
        service.messages.cancel(id_)
    assert len(service.messages.find("mail", payload="good")) == 2


async def test_an_undecodable_payload_is_one_bad_row_on_every_driver(async_service, engine):
    """F44."""
    with engine.begin() as connection:
        for value in UNDECODABLE.values():
            connection.execute(poison(value))
    await async_service.enqueue("mail", "good")
    (good,) = await async_service.dequeue("mail", 3)
    assert good.payload == "good"
    assert len(await async_service.archived.find("mail", outcome="dead")) == 2


def test_undecodable_headers_are_one_bad_row_too(service, session):
    """F44: the payload is not shown as good with headers missing."""
    session.execute(
        sa.text(
            "INSERT INTO pgqrs_messages (queue_id, payload, headers) VALUES (1, '1',"
            " ('{\"n\": ' || repeat('9', 5000) || '}')::jsonb)"
        )
    )
    service.enqueue("mail", "good")
    (good,) = service.dequeue("mail", 2)
    assert good.payload == "good"
    (letter,) = letters(service).values()
    with pytest.raises(PayloadError):
        _ = letter.payload

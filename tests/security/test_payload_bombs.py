"""Payloads made to hurt: refused with their place and nothing written, by every way of enqueueing.

Those that only SQL can put there become dead letters, one by one, among their
neighbours (``tests/db/test_undecodable.py`` has the rest about these).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Item, Message, PayloadError, Queue, QueueService, metadata
from support.cases import each_case

LIMIT = 1_048_576


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def looped() -> Any:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


NAN = float("nan")
# What it is, and how the place and the problem begin; "payload" is where the payload is.
BOMBS: dict[str, tuple[Callable[[], Any], str]] = {
    "deep": (lambda: {"a": nested(100_000)}, "payload.a[0][0]"),
    "a loop": (looped, "payload.self.self"),
    "a huge integer": (lambda: {"n": [1, 10**5000]}, "payload.n[1] is an integer of more than"),
    "a huge negative": (lambda: {"n": -(10**5000)}, "payload.n is an integer of more than"),
    "NUL": (lambda: {"a": ["x", "a\0b"]}, "payload.a[1] contains NUL"),
    "NUL in a key": (lambda: {"a": {"b\0": 1}}, "payload.a['b\\x00'] contains NUL"),
    "a lone surrogate": (lambda: {"a": {"b": "\ud800"}}, "payload.a.b contains a lone surrogate"),
    "a surrogate key": (lambda: {"\udfff": 1}, "payload['\\udfff'] contains a lone surrogate"),
    "NaN far inside": (lambda: {"a": [[{"b": NAN}]]}, "payload.a[0][0].b is nan"),
    "infinity": (lambda: [float("-inf")], "payload[0] is -inf"),
    "bytes": (lambda: {"a": b"x"}, "payload.a is a bytes"),
    "a number as a key": (lambda: {"a": {7: 1}}, "payload.a has the key 7"),
    "one byte too many": (lambda: "x" * (LIMIT - 1), "payload takes 1048577 bytes"),
    "one byte too many in all": (lambda: {"a": "é" * 524_285}, "payload takes 1048578 bytes"),
    "a wide object": (
        lambda: {f"key{n}": n for n in range(100_000)},
        "payload takes 1677781 bytes",
    ),
    "a wide list": (lambda: [0] * 600_000, "payload takes 1200001 bytes"),
}


def add(service: QueueService, value: Any) -> None:
    service.session.add(Message(queue_name="mail", payload=value))
    service.session.flush()


def add_all(service: QueueService, value: Any) -> None:
    session = service.session
    session.add_all([Message(queue_name="mail", payload=n) for n in (1, value, 2)])
    session.flush()


WAYS: dict[str, tuple[Callable[[QueueService, Any], Any], str]] = {
    "enqueue": (lambda service, value: service.enqueue("mail", value), ""),
    "with a key": (lambda service, value: service.enqueue("mail", value, key="k"), ""),
    "last of many": (
        lambda service, value: service.enqueue_many("mail", [*range(5200), value]),
        "items[5200].",
    ),
    "among keys": (
        lambda service, value: service.enqueue_many("mail", [Item(1, key="k"), Item(value), 3]),
        "items[1].",
    ),
    "add": (add, ""),
    "add all": (add_all, ""),
}


def everything(engine: sa.Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        return {
            table.name: connection.execute(sa.select(table)).all()
            for table in metadata.sorted_tables
        }


@each_case("way", list(WAYS))
@each_case("bomb", list(BOMBS), before="reset")
def test_a_bomb_is_refused_where_it_is_and_leaves_nothing_behind(
    engine, service, session, bomb: str, way: str
) -> None:
    make, told = BOMBS[bomb]
    attempt, prefix = WAYS[way]
    before = everything(engine)
    with pytest.raises(PayloadError) as refused:
        attempt(service, make())
    message = str(refused.value)
    assert message.startswith(prefix + told)
    assert message.startswith(refused.value.path)
    assert len(message) < 2000
    session.expunge_all()
    # The caller's transaction goes on, with what it does besides, and without the bomb.
    service.enqueue("mail", "after")
    session.commit()
    after = everything(engine)
    assert [row.payload for row in after.pop("pgqrs_messages")] == ["after"]
    before.pop("pgqrs_messages")
    assert after == before


HEADER_BOMBS: dict[str, tuple[Any, str]] = {
    "deep": ({"a": nested(5000)}, "headers.a[0][0]"),
    "NUL": ({"a": "\0"}, "headers.a contains NUL"),
    "too large": ({"a": "x" * 65_536}, "headers takes 65544 bytes"),
    "a huge integer": ({"a": 10**5000}, "headers.a is an integer of more than"),
    "no dict": (["a"], "headers must be a dict"),
}


@each_case("bomb", list(HEADER_BOMBS), before="reset")
def test_headers_are_no_way_around_it(engine, service, session, bomb: str) -> None:
    headers, told = HEADER_BOMBS[bomb]
    for attempt, prefix in (
        (lambda: service.enqueue("mail", 1, headers=headers), ""),
        (lambda: service.enqueue_many("mail", [0, Item(1, headers=headers)]), "items[1]."),
        (lambda: Message(queue_name="mail", payload=1, headers=headers), ""),
    ):
        with pytest.raises(PayloadError) as refused:
            attempt()
        assert str(refused.value).startswith(prefix + told)
    session.commit()
    assert everything(engine)["pgqrs_messages"] == []


def test_a_bomb_that_a_query_makes_is_refused_and_none_of_its_rows_is_there(
    engine, service, session
) -> None:
    n = sa.func.generate_series(1, 3).table_valued("n").render_derived("g")
    text = sa.func.repeat("x", sa.case((n.c.n == 3, LIMIT - 1), else_=5))
    with pytest.raises(PayloadError, match="payload takes 1048577 bytes"):
        service.enqueue_from("mail", sa.select(text).select_from(n))
    session.commit()
    assert everything(engine)["pgqrs_messages"] == []


def test_what_only_looks_like_a_bomb_is_taken(service) -> None:
    values = [
        "x" * (LIMIT - 2),
        nested(200),
        10**4299,
        {str(n): n for n in range(60_000)},
        "[" * 9999,
    ]
    service.enqueue_many("mail", values)
    assert [delivery.payload for delivery in service.dequeue("mail", 9)] == values


# --- put there by SQL ----------------------------------------------------------------------------

RAW = {  # Python 3.13 reads up to 10,000 levels, PostgreSQL stores over 12,000
    "deep": "(repeat('[', 12000) || repeat(']', 12000))::jsonb",
    "deep objects": """(repeat('{"a":', 12000) || '1' || repeat('}', 12000))::jsonb""",
    "digits": "repeat('9', 5000)::jsonb",
    "a huge exponent": "'1e100000'::jsonb",
    "digits inside": """('{"a": [1, ' || repeat('7', 4301) || ']}')::jsonb""",
}
READABLE = {
    # More than enqueue takes, and yet to be read: a limit is for those who enqueue.
    "too large": ("to_jsonb(repeat('x', 1048577))", "x" * 1_048_577),
    "wide": (
        "(SELECT jsonb_object_agg(n, n) FROM generate_series(1, 100000) n)",
        {str(n): n for n in range(1, 100_001)},
    ),
    "an astral escape": (r"""'"\ud83d\ude00"'::jsonb""", "\N{GRINNING FACE}"),
    "a number beyond doubles": ("'1e400'::jsonb", 10**400),
}


def put(session: Session, payload: str, headers: str = "NULL") -> int:
    statement = (
        f"INSERT INTO pgqrs_messages (queue_id, payload, headers)"  # noqa: S608 - of this file
        f" SELECT id, {payload}, {headers} FROM pgqrs_queues WHERE queue_name = 'mail' RETURNING id"
    )
    return session.connection().exec_driver_sql(statement).scalar_one()


@each_case("bomb", list(RAW), before="reset")
def test_a_bomb_put_there_by_sql_is_one_undecodable_message_between_its_neighbours(
    service, session, bomb: str
) -> None:
    service.enqueue("mail", "before")
    bad = put(session, RAW[bomb])
    worse = put(session, "'1'", f"jsonb_build_object('h', {RAW[bomb]})")
    service.enqueue("mail", "after")
    session.commit()
    before, after = service.dequeue("mail", 9)
    session.commit()
    assert (before.payload, after.payload) == ("before", "after")
    service.archive_many([before, after])
    session.commit()
    letters = service.archived.find("mail", outcome="dead")
    assert [letter.original_msg_id for letter in letters] == [bad, worse]
    for letter in letters:
        assert letter.read_ct == 1
        problem = f"payload of message {letter.original_msg_id} cannot be decoded"
        assert problem in letter.last_error
        assert len(letter.last_error) < 9000
        with pytest.raises(PayloadError, match=r"^payload of message \d+ cannot be decoded"):
            _ = letter.payload
        assert len(repr(letter)) < 9000
    again = service.archived.requeue_many([letter.id for letter in letters])
    assert [item.id for item in again] == [bad, worse]
    assert service.messages.metrics("mail").ready == 2


@each_case("what", list(READABLE), before="reset")
def test_what_sql_put_there_and_python_can_read_is_delivered(service, session, what: str) -> None:
    expression, value = READABLE[what]
    put(session, expression)
    service.enqueue("mail", "after")
    delivery, after = service.dequeue("mail", 2)
    assert delivery.payload == value
    assert after.payload == "after"
    service.archive_many([delivery, after])
    assert service.archived.find("mail")[0].payload == value


def test_a_queue_may_take_less_and_says_so(service) -> None:
    service.queues.update("mail", max_payload_bytes=10)
    service.enqueue("mail", "12345678")
    with pytest.raises(PayloadError, match=r"payload takes 11 bytes, queue 'mail' accepts 10"):
        service.enqueue("mail", "123456789")


def test_a_payload_that_grows_in_another_thread_is_stored_as_it_was_checked(
    service, session
) -> None:
    """What is checked is the text that is sent, not the value that it was made from."""
    value: dict[str, Any] = {"n": 0}
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            value["n"] += 1
            value["bad"] = NAN if value["n"] % 2 else 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            try:
                service.enqueue("mail", value)
            except (PayloadError, RuntimeError):
                continue
    finally:
        stop.set()
        thread.join()
    texts = session.scalars(sa.select(sa.cast(Message.payload, sa.Text)))
    assert all(json.loads(text)["n"] >= 0 for text in texts)
    assert session.scalar(sa.select(sa.func.count()).select_from(Queue)) == 1

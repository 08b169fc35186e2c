"""What the database makes of payloads: numbers come back as they were, by every way of enqueueing.

Which objects are written, and how, is in ``tests/unit/test_encoding.py``.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from pgqrs_sa import InvalidArgument, Item, JsonCodec, Message, PayloadError, QueueService
from support.cases import each_case
from support.properties import at_least

codec = JsonCodec()
ID = uuid.UUID(int=7)


@dataclass
class Order:
    id: uuid.UUID
    price: Decimal
    placed: datetime


ORDER = Order(ID, Decimal("1.10"), datetime(2026, 1, 2, tzinfo=UTC))
OBJECTS = {"order": ORDER, "ids": [ID], "wait": timedelta(days=1), "large": 1e22}
TEXT = (
    '{"ids": ["00000000-0000-0000-0000-000000000007"], "wait": "P1DT0S", '
    '"large": 10000000000000000000000.0, "order": {"id": "00000000-0000-0000-0000-000000000007", '
    '"price": "1.10", "placed": "2026-01-02T00:00:00+00:00"}}'
)


def jsonb(text: str) -> str:
    """The numbers of JSON text as jsonb writes them: as `numeric`, in digits, and without -0."""

    def digits(found: re.Match[str]) -> str:
        number = Decimal(found[0])
        return f"{number.copy_abs() if number == 0 else number:f}"

    return re.sub(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", digits, text)


def sample(count: int) -> list[float]:
    """Floats of all sizes, by their bits, and those at the edges."""
    edges = [
        0.0, 1.0, 0.1, 1e15, 1e16, 9007199254740993.0, 1e21, 1e22, 1e23, 1e308,
        123456789012345678.0, 1.7976931348623157e308, 2.2250738585072014e-308, 5e-324, 1e-5,
        1e-4, 1e-7, 2.0**53, 2.0**63,
    ]  # fmt: skip
    drawn = random.Random(16)
    floats = [struct.unpack("<d", drawn.randbytes(8))[0] for _ in range(count)]
    found = [*edges, *filter(math.isfinite, floats)]
    return [*found, *(-row for row in found if row)]


def same(found: Any, wanted: list[float]) -> None:
    assert [type(row) for row in found] == [float] * len(wanted)
    assert [row.hex() for row in found] == [item.hex() for item in wanted]


@at_least(100)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_comes_back_from_what_jsonb_makes_of_it(number):
    back = json.loads(jsonb(codec.dumps(number)))
    assert type(back) is float
    assert back == number
    assert back.hex() == number.hex() or number == 0
    assert json.loads(jsonb(codec.dumps_each([number])[0])) == back


@at_least(50)
@given(st.integers() | st.integers(-(10**400), 10**400))
def test_every_integer_comes_back_from_what_jsonb_makes_of_it(number):
    back = json.loads(jsonb(codec.dumps(number)))
    assert type(back) is int
    assert back == number


def test_the_server_keeps_floats_and_is_as_the_model_says(service, session):
    numbers = sample(5_000)
    service.enqueue("mail", numbers)
    service.enqueue_many("mail", [numbers, Item(numbers)])
    session.add(Message(queue_name="mail", payload=numbers))
    session.flush()
    (queue_id,) = session.scalars(sa.select(Message.queue_id).distinct())
    session.execute(sa.insert(Message), [{"queue_id": queue_id, "payload": numbers}] * 2)
    session.execute(sa.insert(Message.__table__).values(queue_id=queue_id, payload=numbers))
    session.bulk_save_objects([Message(queue_id=queue_id, payload=numbers)])
    deliveries = service.dequeue("mail", 9)
    assert len(deliveries) == 8
    model = json.dumps([json.loads(jsonb(codec.dumps(number))) for number in numbers])
    for delivery in deliveries:
        same(delivery.payload, numbers)
        assert json.dumps(json.loads(delivery.text)) == model
    assert deliveries[0].text == jsonb(codec.dumps(numbers)).replace(",", ", ")


async def test_every_driver_keeps_floats(async_service):
    numbers = sample(500)
    await async_service.enqueue("mail", numbers, headers={"f": 1e22})
    await async_service.enqueue_many("mail", [numbers])
    for delivery in await async_service.dequeue("mail", 2):
        same(delivery.payload, numbers)
        assert type((delivery.headers or {"f": 1.0})["f"]) is float


HEADERS = {"small": 1e22, "large": 1e308, "n": [-1e16, 10**25, 0.1, True, None]}
HEADER_WAYS: dict[str, Callable[[Session, dict[str, Any]], Any]] = {
    "add": lambda s, row: s.add(Message(**row)),
    "add, changed later": lambda s, row: (
        s.add(message := Message(**row | {"headers": {}})) or message.headers.update(row["headers"])
    ),
    "bulk INSERT of the ORM": lambda s, row: s.execute(sa.insert(Message), [row] * 2),
    "INSERT of Core": lambda s, row: s.execute(sa.insert(Message.__table__).values(**row)),
    "bulk_save_objects": lambda s, row: s.bulk_save_objects([Message(**row)]),
    "UPDATE": lambda s, row: (
        s.execute(sa.insert(Message), [row | {"headers": None}]),
        s.execute(sa.update(Message).values(headers=row["headers"])),
    ),
}
header_ways = each_case("way", HEADER_WAYS, before="reset")


@header_ways
def test_every_way_keeps_the_numbers_of_headers(service, session, way):
    way(session, {"queue_id": service.queues.get("mail").id, "payload": 1, "headers": HEADERS})
    for delivery in service.dequeue("mail", 5):
        assert delivery.headers == HEADERS
        small, large, numbers = (delivery.headers[name] for name in HEADERS)
        assert [type(value) for value in (small, large, *numbers[:2])] == [float] * 3 + [int]
    message = session.scalars(sa.select(Message)).first()
    assert message.headers == HEADERS


@header_ways
def test_every_way_keeps_headers_that_are_none(service, session, way):
    row = {"queue_id": service.queues.get("mail").id, "payload": 1, "headers": None}
    if way is not HEADER_WAYS["add, changed later"]:
        way(session, row)
    session.flush()
    count = sa.select(sa.func.count()).select_from(Message)
    assert session.scalar(count.where(sa.not_(Message.headers.is_(None)))) == 0


@header_ways
def test_every_way_refuses_headers_that_enqueue_refuses(service, session, way):
    row = {"queue_id": service.queues.get("mail").id, "payload": 1, "headers": {"n": float("inf")}}

    def write() -> None:
        way(session, row)
        session.flush()

    with pytest.raises(PayloadError, match="headers") as caught, session.begin_nested():
        write()
    assert caught.value.path == "headers.n"


def test_headers_are_compared_and_read_as_jsonb(service, session):
    service.enqueue("mail", 1, headers={"n": 1e22, "t": {"id": "x"}})
    found = sa.select(Message.headers["t"]["id"].astext).where(Message.headers["n"].is_not(None))
    assert session.scalar(found) == "x"
    assert session.scalar(sa.select(Message.id).where(Message.headers.contains({"n": 1e22})))
    assert session.scalar(sa.select(Message.id).where(Message.headers.has_key("t")))
    assert session.scalar(sa.select(Message.headers)) == {"n": 1e22, "t": {"id": "x"}}


def test_the_sign_of_zero_is_what_jsonb_does_not_keep(service):
    service.enqueue("mail", [-0.0, 0.0])
    (delivery,) = service.dequeue("mail")
    assert delivery.payload == [-0.0, 0.0]
    assert [math.copysign(1, item) for item in delivery.payload] == [1, 1]


def bulk(session: Session, payload: Any, how: Callable[[Session, int, Any], Any]) -> Any:
    queue_id = QueueService(session).queues.get("mail").id
    return how(session, queue_id, payload)


def add_changed(session: Session, payload: Any) -> None:
    message = Message(queue_name="mail", payload={})
    session.add(message)
    message.payload.update(payload)


WAYS: dict[str, Callable[[Session, Any], Any]] = {
    "enqueue": lambda s, p: QueueService(s).enqueue("mail", p),
    "enqueue_many": lambda s, p: QueueService(s).enqueue_many("mail", [p]),
    "an Item": lambda s, p: QueueService(s).enqueue_many("mail", [Item(p, key="k")]),
    "add": lambda s, p: s.add(Message(queue_name="mail", payload=p)),
    "add, changed in place": add_changed,
    "bulk INSERT of the ORM": lambda s, p: bulk(
        s, p, lambda s, q, p: s.execute(sa.insert(Message), [{"queue_id": q, "payload": p}] * 2)
    ),
    "INSERT of Core": lambda s, p: bulk(
        s,
        p,
        lambda s, q, p: s.execute(sa.insert(Message.__table__).values(queue_id=q, payload=p)),
    ),
    "bulk_save_objects": lambda s, p: bulk(
        s, p, lambda s, q, p: s.bulk_save_objects([Message(queue_id=q, payload=p)])
    ),
    "bulk_insert_mappings": lambda s, p: bulk(
        s,
        p,
        lambda s, q, p: s.bulk_insert_mappings(Message, [{"queue_id": q, "payload": p}]),
    ),
}
ways = each_case("way", WAYS, before="reset")


@ways
def test_every_way_writes_objects_alike(service, session, way):
    way(session, dict(OBJECTS))
    for delivery in service.dequeue("mail", 5):
        assert delivery.text == TEXT


@ways
def test_every_way_refuses_with_the_path_and_before_anything_is_sent(service, session, way):
    with pytest.raises(PayloadError) as caught, session.begin_nested():
        way(session, {"items": [{"price": Decimal("NaN")}]})
    assert caught.value.path.removeprefix("items[0].") == "payload.items[0].price"
    session.expunge_all()
    assert service.messages.find("mail") == []


@ways
def test_every_way_knows_null(service, session, way):
    if way is WAYS["add, changed in place"]:
        pytest.skip("it needs a dict")
    way(session, None)
    assert {delivery.text for delivery in service.dequeue("mail", 5)} == {"null"}


async def test_every_driver_writes_objects(async_service, async_session):
    await async_service.enqueue("mail", OBJECTS)
    async_session.add(Message(queue_name="mail", payload=OBJECTS))
    await async_session.flush()
    queue_id = (await async_service.queues.get("mail")).id
    rows = [{"queue_id": queue_id, "payload": OBJECTS}] * 2
    await async_session.execute(sa.insert(Message), rows)
    assert [delivery.text for delivery in await async_service.dequeue("mail", 9)] == [TEXT] * 4


def test_a_filter_by_payload_takes_objects_as_enqueue_does(service, session):
    service.enqueue("mail", OBJECTS)
    assert len(service.messages.find("mail", payload={"ids": [ID]})) == 1
    assert len(service.messages.find("mail", payload={"order": {"price": Decimal("1.10")}})) == 1
    assert service.messages.find("mail", payload={"ids": [uuid.UUID(int=8)]}) == []
    by_text = sa.select(Message.id).where(Message.payload["order"]["price"].astext == "1.10")
    assert len(session.scalars(by_text).all()) == 1
    assert len(session.scalars(sa.select(Message.id).where(Message.payload.has_key("ids"))).all())


# --- ways that do not know the queue's name ------------------------------------------------------

NAMELESS: dict[str, Callable[[Session], Any]] = {
    "merge": lambda s: s.merge(Message(queue_name="mail", payload=1)),
    "merge with an id": lambda s: s.merge(Message(id=99, queue_name="mail", payload=1)),
    "bulk_save_objects": lambda s: s.bulk_save_objects([Message(queue_name="mail", payload=1)]),
    "bulk_insert_mappings": lambda s: s.bulk_insert_mappings(
        Message, [{"queue_name": "mail", "payload": 1}]
    ),
    "bulk INSERT": lambda s: s.execute(
        sa.insert(Message), [{"queue_name": "mail", "payload": 1}] * 2
    ),
    "INSERT of Core": lambda s: s.execute(sa.insert(Message.__table__).values(payload=1)),
}


@each_case("way", NAMELESS, before="reset")
def test_a_way_that_loses_the_name_of_the_queue_says_what_to_use(service, session, way):
    with pytest.raises(InvalidArgument, match=r"session\.add") as caught, session.begin_nested():
        way(session)
    assert "give queue_id" in str(caught.value)
    session.expunge_all()
    service.enqueue("mail", 1)  # the transaction goes on
    session.commit()

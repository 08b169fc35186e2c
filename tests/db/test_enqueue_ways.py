"""Every way to enqueue makes the same row, keys deduplicate, and receipts tell the truth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy import event, insert
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlalchemy.orm import Session

from pgqrs_sa import DuplicateMessage, InvalidArgument, Item, Message, QueueService, Receipt
from pgqrs_sa._core import enqueue as enqueue_operation
from support.cases import each_case

ZERO = timedelta(0)
MICROSECOND = timedelta(microseconds=1)


def inserts(engine: sa.Engine) -> list[str]:
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _note(_connection, _cursor, statement, _parameters, _context, _many):
        if "INSERT INTO" in statement:
            statements.append(statement)

    return statements


def stored(session: Session) -> dict[int, dict[str, Any]]:
    """The rows as they are in the table, JSON as text, by id."""
    rows = session.execute(
        sa.text(
            "SELECT m.*, m.payload::text AS payload, m.headers::text AS headers, q.queue_name,"
            " jsonb_typeof(m.payload) AS kind"
            " FROM pgqrs_messages m JOIN pgqrs_queues q ON q.id = m.queue_id ORDER BY m.id"
        )
    )
    return {row.id: dict(row._mapping) for row in rows}


# ------------------------------------------------------------------------------ the same row


@dataclass(frozen=True)
class Given:
    """What is given to each of the ways."""

    payload: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        names = {"key": "dedup_key"}
        return {names.get(name, name): value for name, value in self.options.items()}


def by_query(service: QueueService, given: Given) -> None:
    types = {"headers": JSONB(none_as_null=True)}
    query = sa.select(
        sa.literal(given.payload, JSONB).label("payload"),
        *(sa.literal(v, types.get(n)).label(n) for n, v in given.options.items()),
    )
    assert service.enqueue_from("mail", query) == 1


def by_bulk_insert(service: QueueService, given: Given) -> None:
    row = {
        "queue_id": service.queues.get("mail").id,
        "payload": given.payload,
        "producer_worker_id": service._scope.context.worker,
        **given.attributes,
    }
    service.session.execute(insert(Message), [row])


def by_adding(service: QueueService, given: Given, *, how: str = "add") -> None:
    message = Message(
        queue_name="mail",
        payload=given.payload,
        producer_worker_id=service._scope.context.worker,
        **given.attributes,
    )
    if how == "add":
        service.session.add(message)
    else:
        service.session.add_all([message])
    service.session.flush()


WAYS: dict[str, Callable[[QueueService, Given], object]] = {
    "enqueue": lambda s, g: s.enqueue("mail", g.payload, **g.options),
    "enqueue_many": lambda s, g: s.enqueue_many("mail", [Item(g.payload, **g.options)]),
    "enqueue_from": by_query,
    "session.add": by_adding,
    "session.add_all": lambda s, g: by_adding(s, g, how="add_all"),
    "bulk insert": by_bulk_insert,
}
ways = each_case("way", WAYS, before="reset")
BY_ITEM = {name: WAYS[name] for name in ("enqueue", "enqueue_many", "session.add")}

GIVEN: dict[str, Given] = {
    "object": Given({"order": 7, "nested": {"list": [1, [2, {"x": None}]]}}),
    "None": Given(None),
    "false": Given(False),
    "zero": Given(0),
    "empty text": Given(""),
    "empty list": Given([]),
    "empty object": Given({}),
    "text that looks like JSON": Given('{"a": 1}'),
    "characters": Given({"é 日😀": "\u2028 \\u0000 \x01 \" ' \\ % :x %(x)s $1"}),
    "numbers": Given([2**63, -(10**40), 10**4299, 0.1, 1e-300, -0.5, 3.0, 1e15]),
    "tuple": Given({"t": (1, (2, 3))}),
    "every option": Given(
        {"order": 7},
        {
            "priority": -32_768,
            "headers": {"trace": "é", "n": [1, None, {}]},
            "key": "order:7 'é'",
            "max_read_ct": 3,
        },
    ),
    "the other borders": Given(
        [1], {"priority": 32_767, "headers": {}, "key": "k" * 255, "max_read_ct": 2_147_483_647}
    ),
    "options that are the defaults": Given(
        1, {"priority": 0, "headers": None, "key": None, "max_read_ct": None}
    ),
}
given_all = each_case("given", GIVEN, before="reset")


@given_all
@each_case("with_worker", {"no worker": False, "worker": True})
def test_every_way_makes_the_same_row(session, service, given, with_worker):
    worker = service.workers.register("producer") if with_worker else None
    service = QueueService(session, worker=worker)
    rows = {}
    for name, way in WAYS.items():
        session.commit()
        way(service, given)
        (row,) = stored(session).values()
        assert row["vt"] == row["enqueued_at"], name
        own = {"id", "vt", "enqueued_at", "fencing_token"}
        rows[name] = {column: value for column, value in row.items() if column not in own}
        session.rollback()

    expected = rows["enqueue"]
    assert expected["producer_worker_id"] == (worker.id if worker else None)
    assert expected["read_ct"] == 0
    for name, row in rows.items():
        assert row == expected, name


@ways
@given_all
def test_what_is_enqueued_is_what_is_delivered(session, service, way, given):
    way(service, given)
    session.commit()
    (delivery,) = service.dequeue("mail")

    payload = given.payload
    if isinstance(payload, dict) and "t" in payload:
        payload = {"t": [1, [2, 3]]}
    assert delivery.payload == payload
    assert delivery.headers == given.options.get("headers")
    assert delivery.priority == given.options.get("priority", 0)
    assert delivery.key == given.options.get("key")
    assert delivery.max_read_ct == (given.options.get("max_read_ct") or 5)


@each_case("number", [1e16, 1e22, 1e23, 1e100, -1e308, 1.7976931348623157e308])
def test_a_large_float_is_delivered_as_the_same_number(service, number):
    service.enqueue("mail", [number])

    assert float(service.dequeue("mail")[0].payload[0]) == number


@ways
def test_an_empty_payload_of_python_is_the_null_of_json_and_not_of_sql(session, service, way):
    way(service, Given(None))
    session.flush()

    assert [row["kind"] for row in stored(session).values()] == ["null"]


@each_case("way", ["enqueue", "enqueue_many"], before="reset")
def test_the_engines_own_json_settings_do_not_change_what_is_stored(engine, service, way):
    # A host may have configured a serializer that does other things to some values.
    host = sa.create_engine(engine.url, json_serializer=lambda value: f'"mangled {value!r}"')
    try:
        with Session(host) as session:
            WAYS[way](QueueService(session), Given({"a": 1}))
            session.flush()
            assert [row["payload"] for row in stored(session).values()] == ['{"a": 1}']
    finally:
        host.dispose()


@each_case("way", ["session.add", "session.add_all", "bulk insert"], before="reset")
def test_rows_of_the_orm_are_written_by_the_engines_own_serializer(engine, service, way):
    # They are the host's rows, of a plain JSONB column; any serializer of JSON stores the same.
    host = sa.create_engine(engine.url, json_serializer=lambda value: json.dumps(value, indent=3))
    try:
        with Session(host) as session:
            WAYS[way](QueueService(session), Given({"a": 1}))
            session.flush()
            assert [row["payload"] for row in stored(session).values()] == ['{"a": 1}']
    finally:
        host.dispose()


def test_add_all_keeps_the_order_and_takes_one_select_for_all(engine, session, service):
    service.queues.create("other")
    session.commit()
    selects = []

    @event.listens_for(engine, "before_cursor_execute")
    def _note(_connection, _cursor, statement, _parameters, _context, _many):
        if not statement.startswith("INSERT"):
            selects.append(statement)

    messages = [Message(queue_name=("mail", "other")[n % 2], payload=n) for n in range(200)]
    session.add_all(messages)
    session.flush()

    assert len(selects) == 1
    assert [message.id for message in messages] == sorted(message.id for message in messages)
    rows = stored(session)
    assert [rows[message.id]["payload"] for message in messages] == [str(n) for n in range(200)]
    assert [rows[message.id]["queue_name"] for message in messages[:4]] == ["mail", "other"] * 2


def test_a_message_may_be_added_by_the_id_of_its_queue(session, service):
    session.add(Message(queue_id=service.queues.get("mail").id, payload=1))
    session.flush()

    assert [row["queue_name"] for row in stored(session).values()] == ["mail"]


def test_an_added_message_is_delivered_with_its_columns_loaded(session, service):
    message = Message(queue_name="mail", payload={"a": 1}, delay=60)
    session.add(message)
    session.flush()

    assert message.vt - message.enqueued_at == timedelta(seconds=60)
    assert (message.read_ct, message.priority, message.queue_name) == (0, 0, "mail")
    assert session.get(Message, message.id) is message


# ----------------------------------------------------------------------------------- times


def added(service: QueueService, **options: Any) -> dict[str, Any]:
    service.session.add(Message(queue_name="mail", payload=1, **options))
    service.session.flush()
    return next(iter(stored(service.session).values()))


def enqueued(service: QueueService, **options: Any) -> dict[str, Any]:
    receipt = service.enqueue("mail", 1, **options)
    row = stored(service.session)[receipt.id]
    assert row["vt"] == receipt.vt
    return row


def enqueued_with_key(service: QueueService, **options: Any) -> dict[str, Any]:
    return enqueued(service, key="k", **options)


def enqueued_many(service: QueueService, **options: Any) -> dict[str, Any]:
    receipt, plain = service.enqueue_many("mail", [Item(1, **options), 2])
    rows = stored(service.session)
    assert rows[receipt.id]["vt"] == receipt.vt
    assert rows[plain.id]["vt"] == plain.vt == rows[plain.id]["enqueued_at"]
    return rows[receipt.id]


def enqueued_from(service: QueueService, **options: Any) -> dict[str, Any]:
    query = sa.select(
        sa.literal(1).label("payload"), *(sa.literal(v).label(n) for n, v in options.items())
    )
    service.enqueue_from("mail", query)
    return next(iter(stored(service.session).values()))


TIMED = {
    "enqueue": enqueued,
    "enqueue with a key": enqueued_with_key,
    "enqueue_many": enqueued_many,
    "enqueue_from": enqueued_from,
    "session.add": added,
}
timed = each_case("way", TIMED, before="reset")


@timed
@each_case(
    "delay",
    [
        0,
        0.0,
        1,
        2.5,
        0.000001,
        86_400 * 365 * 10,
        ZERO,
        timedelta(days=3, microseconds=7),
        timedelta(days=1000, seconds=1, microseconds=999_999),
    ],
)
def test_a_delay_is_added_to_the_databases_clock(service, way, delay):
    row = way(service, delay=delay)
    span = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)

    assert row["vt"] - row["enqueued_at"] == span


@timed
def test_no_delay_and_no_time_mean_now(service, way):
    row = way(service, delay=None, at=None)

    assert row["vt"] == row["enqueued_at"]


@timed
@each_case(
    "zone",
    [UTC, timezone(timedelta(hours=-5)), ZoneInfo("Pacific/Kiritimati"), ZoneInfo("Asia/Kolkata")],
)
def test_a_time_in_another_zone_is_the_same_moment(service, way, zone):
    at = datetime(2400, 7, 1, 12, 30, 15, 123_456, tzinfo=UTC)

    assert way(service, at=at.astimezone(zone))["vt"] == at


@timed
@each_case(
    "at",
    [
        datetime(2001, 1, 1, tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=-14))),
        datetime(1, 1, 2, tzinfo=ZoneInfo("Asia/Tokyo")),
    ],
)
def test_a_time_that_has_passed_means_now(service, way, at):
    row = way(service, at=at)

    assert row["vt"] == row["enqueued_at"]
    assert service.dequeue("mail")


@timed
def test_the_last_moment_that_can_be_said_can_be_stored_and_read(session, service, way):
    at = datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    session.execute(sa.text("SET LOCAL TIME ZONE 'Pacific/Kiritimati'"))
    row = way(service, at=at)

    assert row["vt"] == at
    assert service.messages.get(row["id"]).vt == at


@timed
def test_a_message_ahead_of_its_time_is_not_delivered_and_comes_in_time(session, service, way):
    row = way(service, delay=3_600)
    service.dequeue("mail")
    assert service.dequeue("mail") == []

    session.execute(
        sa.text("UPDATE pgqrs_messages SET vt = statement_timestamp() WHERE id = :id"), row
    )
    assert [delivery.id for delivery in service.dequeue("mail")] == [row["id"]]


def test_the_clock_is_that_of_each_statement_and_not_of_the_transaction(session, service):
    first = service.enqueue("mail", 1)
    session.execute(sa.text("SELECT pg_sleep(0.05)"))
    second = service.enqueue("mail", 2)
    added = Message(queue_name="mail", payload=3)
    session.add(added)
    session.flush()

    assert second.vt - first.vt >= timedelta(seconds=0.05)
    assert added.vt > second.vt


# ------------------------------------------------------------------------------------ keys

KEYED: dict[str, Callable[[QueueService, str, Any, str], Receipt]] = {
    "enqueue": lambda s, queue, payload, key: s.enqueue(queue, payload, key=key),
    "enqueue_many": lambda s, queue, payload, key: s.enqueue_many(queue, [Item(payload, key=key)])[
        0
    ],
    "enqueue_many mixed": lambda s, queue, payload, key: s.enqueue_many(
        queue, ["filler", Item(payload, key=key), "filler"]
    )[1],
}
keyed = each_case("again", KEYED, before="reset")


@keyed
@ways
def test_a_live_key_gives_the_message_that_is_there(session, service, way, again):
    way(service, Given("first", {"key": "k"}))
    session.commit()
    ((id_, row),) = stored(session).items()
    receipt = again(service, "mail", "second", "k")

    assert receipt == Receipt(id_, row["vt"], duplicate=True)
    assert stored(session)[id_] == row
    assert [r["payload"] for r in stored(session).values()].count('"second"') == 0


@keyed
def test_a_duplicate_changes_nothing_about_the_message_that_is_there(session, service, again):
    first = service.enqueue("mail", 1, key="k", delay=60, priority=3)
    session.commit()
    before = stored(session)[first.id]
    xmin = sa.text("SELECT xmin, xmax FROM pgqrs_messages WHERE id = :id")
    system = session.execute(xmin, {"id": first.id}).one()
    receipt = again(service, "mail", 2, "k")

    assert receipt.vt == first.vt
    assert stored(session)[first.id] == before
    assert session.execute(xmin, {"id": first.id}).one() == system  # nor is it locked


@keyed
def test_a_key_is_live_while_its_message_is_leased(service, again):
    first = service.enqueue("mail", 1, key="k")
    (delivery,) = service.dequeue("mail", lease=60)
    receipt = again(service, "mail", 2, "k")

    assert receipt == Receipt(first.id, delivery.vt, duplicate=True)


SETTLED: dict[str, Callable[[QueueService, int], object]] = {
    "archived": lambda s, _: s.archive(s.dequeue("mail")[0]),
    "discarded": lambda s, _: s.archive(s.dequeue("mail")[0], outcome="discarded"),
    "dead": lambda s, _: s.fail(s.dequeue("mail")[0], "no", dead=True),
    "deleted": lambda s, _: s.delete(s.dequeue("mail")[0]),
    "cancelled": lambda s, id_: s.messages.cancel(id_),
    "purged": lambda s, _: s.queues.purge("mail"),
}


@keyed
@each_case("settle", SETTLED)
def test_a_key_is_free_again_once_its_message_is_settled(service, again, settle):
    first = service.enqueue("mail", 1, key="k")
    settle(service, first.id)
    second = again(service, "mail", 2, "k")

    assert not second.duplicate
    assert second.id > first.id
    assert service.messages.get(second.id).payload == 2


@keyed
@each_case("give_back", [lambda s, d: s.release(d), lambda s, d: s.fail(d, "no", delay=0)])
def test_a_key_stays_live_when_its_message_comes_back(service, again, give_back):
    first = service.enqueue("mail", 1, key="k")
    give_back(service, service.dequeue("mail")[0])

    assert again(service, "mail", 2, "k").duplicate
    assert service.messages.get(first.id).payload == 1


@keyed
def test_the_same_key_in_another_queue_is_another_message(service, again):
    service.queues.create("other")
    first = again(service, "mail", 1, "k")
    second = again(service, "other", 2, "k")

    assert not first.duplicate
    assert not second.duplicate
    assert service.messages.get(second.id).queue == "other"


@keyed
def test_a_key_is_compared_to_the_character(service, again):
    keys = ["k", "K", "k ", "\uff4b", "é", "e\u0301", "\u212a"]
    receipts = [again(service, "mail", key, key) for key in keys]

    assert not any(receipt.duplicate for receipt in receipts)
    assert [service.messages.get(receipt.id).key for receipt in receipts] == keys


@keyed
def test_a_key_that_was_rolled_back_is_free(session, service, again):
    again(service, "mail", 1, "k")
    session.rollback()

    assert not again(service, "mail", 2, "k").duplicate


def test_a_key_twice_in_one_batch_makes_one_message_for_both(service):
    items = [Item("a", key="k"), "plain", Item("b", key="k", delay=60), Item("c", key="other")]
    first, plain, again, other = service.enqueue_many("mail", items)

    assert again == Receipt(first.id, first.vt, duplicate=True)
    assert [first.duplicate, plain.duplicate, other.duplicate] == [False] * 3
    # Those with a key come after the others, in the order of the keys: see `enqueue_many`.
    assert [message.payload for message in service.messages.find("mail")] == ["plain", "a", "c"]
    assert service.messages.get(first.id).payload == "a"


@each_case("chunk", [1, 2, 3], before="reset")
def test_a_key_twice_in_two_chunks_makes_one_message_for_both(monkeypatch, service, chunk):
    monkeypatch.setattr(enqueue_operation, "CHUNK_ROWS", chunk)
    items = [Item("a", key="k"), "plain", "more", Item("b", key="k"), "end"]
    receipts = service.enqueue_many("mail", items)

    assert receipts[3] == Receipt(receipts[0].id, receipts[0].vt, duplicate=True)
    assert [message.payload for message in service.messages.find("mail")] == [
        "plain",
        "more",
        "end",
        "a",
    ]


def add_in_savepoint(session: Session, message: Message) -> None:
    with session.begin_nested():
        session.add(message)
        session.flush()


def test_adding_a_live_key_is_refused_by_the_key_and_the_message_that_has_it(session, service):
    first = service.enqueue("mail", 1, key="k")
    again = Message(queue_name="mail", payload=2, dedup_key="k")
    with pytest.raises(DuplicateMessage) as caught:
        add_in_savepoint(session, again)

    assert (caught.value.key, caught.value.id) == ("k", first.id)
    service.enqueue("mail", 3)
    session.commit()
    assert [message.payload for message in service.messages.find("mail")] == [1, 3]


def test_adding_a_key_that_is_live_elsewhere_or_no_more_is_fine(session, service):
    service.queues.create("other")
    service.enqueue("other", 1, key="k")
    service.enqueue("mail", 2, key="k")
    service.archive(service.dequeue("mail")[0])
    session.add_all(
        [
            Message(queue_name="mail", payload=3, dedup_key="k"),
            Message(queue_name="mail", payload=4, dedup_key="j"),
            Message(queue_name="other", payload=5, dedup_key="j"),
        ]
    )
    session.commit()

    assert [message.payload for message in service.messages.find()] == [1, 3, 4, 5]


@each_case("seed", range(12), before="reset")
def test_batches_at_random_agree_with_a_model_of_keys(monkeypatch, session, service, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(enqueue_operation, "CHUNK_ROWS", rng.choice([1, 2, 3, 5, 1000]))
    live: dict[str, tuple[int, str]] = {}
    for batch in range(6):
        items = [
            Item(f"{batch}/{n}", key=rng.choice("abcdefgh"))
            if rng.random() < 0.5
            else f"{batch}/{n}"
            for n in range(rng.randint(1, 12))
        ]
        receipts = service.enqueue_many("mail", items)
        session.commit()
        assert len(receipts) == len(items)
        fresh = []
        plain = []
        rows = stored(session)
        for item, receipt in zip(items, receipts, strict=True):
            key = item.key if isinstance(item, Item) else None
            payload = item.payload if isinstance(item, Item) else item
            assert receipt.duplicate == (key in live)
            if key in live:
                assert (receipt.id, rows[receipt.id]["payload"]) == live[key]
            else:
                assert rows[receipt.id]["payload"] == f'"{payload}"'
                fresh.append(receipt.id)
                if key is None:
                    plain.append(receipt.id)
                else:
                    live[key] = (receipt.id, f'"{payload}"')
            assert rows[receipt.id]["dedup_key"] == key
            assert rows[receipt.id]["vt"] == receipt.vt
        assert len(set(fresh)) == len(fresh)
        assert plain == sorted(plain)
        for id_ in rng.sample(fresh, k=min(2, len(fresh))):
            service.messages.cancel(id_)
            live = {key: found for key, found in live.items() if found[0] != id_}


# ------------------------------------------------------------------------- batches and chunks


def test_receipts_come_in_the_order_of_the_items_and_ids_rise_with_it(session, service):
    items = [Item(n, priority=-n, delay=(7 * n) % 5) for n in range(500)]
    receipts = service.enqueue_many("mail", items)
    ids = [receipt.id for receipt in receipts]
    rows = stored(session)

    assert ids == sorted(set(ids))
    assert [rows[id_]["payload"] for id_ in ids] == [str(n) for n in range(500)]
    assert [rows[receipt.id]["vt"] for receipt in receipts] == [receipt.vt for receipt in receipts]


MANY = enqueue_operation._GATHERED
LARGE: dict[str, Callable[[int], Any]] = {
    "payloads": lambda n: {"n": n},
    "items without options": lambda n: Item({"n": n}),
    "items with one delay": lambda n: Item({"n": n}, delay=60),
    "items with delays": lambda n: Item({"n": n}, delay=n % 3),
    "payloads and items": lambda n: Item({"n": n}, headers={"h": n}) if n % 2 else {"n": n},
}


@each_case("make", LARGE, before="reset")
@each_case("count", [1, MANY - 1, MANY, MANY + 1], before="reset")
def test_receipts_of_a_batch_of_any_size_are_those_of_its_rows(session, service, make, count):
    receipts = service.enqueue_many("mail", [make(n) for n in range(count)])
    rows = stored(session)

    assert [receipt.id for receipt in receipts] == sorted(rows)
    for n, receipt in enumerate(receipts):
        assert json.loads(rows[receipt.id]["payload"]) == {"n": n}
        assert receipt == Receipt(receipt.id, rows[receipt.id]["vt"])


async def test_receipts_of_a_large_batch_are_those_of_its_rows_with_async_drivers(
    async_service, async_session
):
    for make in LARGE.values():
        receipts = await async_service.enqueue_many("mail", [make(n) for n in range(MANY)])
        rows = await async_session.run_sync(stored)

        for n, receipt in enumerate(receipts):
            assert json.loads(rows[receipt.id]["payload"]) == {"n": n}
            assert receipt == Receipt(receipt.id, rows[receipt.id]["vt"])
        assert len({receipt.id for receipt in receipts}) == MANY


def test_receipts_have_the_times_that_a_trigger_of_the_host_has_set(session, service):
    session.execute(
        sa.text(
            "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
            " NEW.vt = NEW.vt + make_interval(mins => (NEW.payload::text::int % 2)::int);"
            " RETURN NEW; END'"
        )
    )
    session.execute(
        sa.text(
            "CREATE TRIGGER later BEFORE INSERT ON pgqrs_messages"
            " FOR EACH ROW EXECUTE FUNCTION later()"
        )
    )
    receipts = service.enqueue_many("mail", range(MANY))
    rows = stored(session)

    assert len({receipt.vt for receipt in receipts}) == 2
    assert [rows[receipt.id]["vt"] for receipt in receipts] == [receipt.vt for receipt in receipts]
    assert [rows[receipt.id]["payload"] for receipt in receipts] == [str(n) for n in range(MANY)]
    session.rollback()


@each_case("count", [2, MANY + 2], before="reset")
@each_case("value", [True, 1.0, 40_000, "0"], before="reset")
def test_a_priority_that_is_none_is_named_in_a_batch_and_nothing_is_there(
    session, service, count, value
):
    items: list[Any] = [Item(n) for n in range(count)]
    items[-1] = Item(1, priority=value)
    with pytest.raises(InvalidArgument, match=rf"items\[{count - 1}\]\.priority must be"):
        service.enqueue_many("mail", items)

    assert stored(session) == {}


@each_case(("rows", "statements"), [(1, 10), (3, 4), (9, 2), (10, 1), (11, 1)])
@each_case("key", [None, "k"], before="reset")
def test_a_batch_is_sent_in_chunks_of_so_many_rows(
    monkeypatch, engine, session, service, rows, statements, key
):
    monkeypatch.setattr(enqueue_operation, "CHUNK_ROWS", rows)
    sent = inserts(engine)
    items = [Item(n, key=key and f"{key}{n}") for n in range(10)]
    receipts = service.enqueue_many("mail", items)

    assert len(sent) == statements
    found = stored(session)
    assert [found[receipt.id]["payload"] for receipt in receipts] == [str(n) for n in range(10)]
    assert [receipt.id for receipt in receipts] == sorted(found)


@each_case(("size", "statements"), [(1, 10), (12, 10), (24, 5), (60, 2), (1000, 1)], before="reset")
def test_a_batch_is_sent_in_chunks_of_so_many_bytes(
    monkeypatch, engine, session, service, size, statements
):
    monkeypatch.setattr(enqueue_operation, "CHUNK_BYTES", size)
    sent = inserts(engine)
    payloads = [f"{n}é......." for n in range(10)]  # 12 bytes each, as JSON
    receipts = service.enqueue_many("mail", payloads)

    assert len(sent) == statements
    assert [service.messages.get(receipt.id).payload for receipt in receipts] == payloads


def test_a_batch_whose_headers_are_large_is_sent_in_chunks_too(monkeypatch, engine, service):
    # 100 items of 60 KB of headers each: one statement would carry 6 MB beyond its measure.
    monkeypatch.setattr(enqueue_operation, "CHUNK_BYTES", 1_000_000)
    sent = inserts(engine)
    headers = {"h": "x" * 60_000}
    service.enqueue_many("mail", [Item(n, headers=headers) for n in range(100)])

    assert len(sent) >= 6


def test_a_batch_of_one_statement_follows_what_is_given_lazily(service):
    receipts = service.enqueue_many("mail", (n for n in range(3)))

    assert [service.messages.get(receipt.id).payload for receipt in receipts] == [0, 1, 2]


def test_a_batch_of_ten_thousand_is_two_statements(engine, service):
    sent = inserts(engine)
    receipts = service.enqueue_many("mail", range(10_000))

    assert len(sent) == 2
    assert [receipt.id for receipt in receipts] == sorted({receipt.id for receipt in receipts})
    assert service.messages.metrics("mail").ready == 10_000


# --------------------------------------------------------------------------------- by a query


ORDERS = sa.Table(
    "host_orders",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer),
    sa.Column("text", sa.Text),
    sa.Column("amount", sa.Numeric(10, 2)),
    sa.Column("day", sa.Date),
    sa.Column("tags", sa.ARRAY(sa.Text)),
    sa.Column("plain", JSON(none_as_null=True)),
    sa.Column("data", JSONB(none_as_null=True)),
    sa.Column("wait", sa.Interval),
    sa.Column("seconds", sa.Numeric),
    sa.Column("due", sa.DateTime(timezone=True)),
    sa.Column("key", sa.Text),
    sa.Column("priority", sa.Integer),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)
order = ORDERS.c


@pytest.fixture
def orders(session: Session) -> sa.Table:
    """A table of the host, with columns of many types; the last of its rows is NULLs."""
    ORDERS.create(session.connection())
    row = {
        "number": 7,
        "text": 'it\'s "é"',
        "amount": "1.50",
        "day": datetime(2026, 1, 2, tzinfo=UTC).date(),
        "tags": ["a", "b"],
        "plain": {"p": [1]},
        "data": {"d": None},
        "wait": timedelta(minutes=2),
        "seconds": "1.5",
        "due": datetime(2400, 1, 1, tzinfo=UTC),
        "priority": 5,
    }
    nothing = dict.fromkeys(row)
    session.execute(
        ORDERS.insert(),
        [{"id": n, "key": f"order:{n}", **(row if n < 4 else nothing)} for n in range(1, 5)],
    )
    return ORDERS


def payloads(session: Session) -> list[str]:
    return [row["payload"] for row in stored(session).values()]


@each_case(
    ("column", "first", "last"),
    [
        ("number", "7", "null"),
        ("text", '"it\'s \\"é\\""', "null"),
        ("amount", "1.50", "null"),
        ("day", '"2026-01-02"', "null"),
        ("tags", '["a", "b"]', "null"),
        ("plain", '{"p": [1]}', "null"),
        ("data", '{"d": null}', "null"),
        ("due", '"2400-01-01T00:00:00+00:00"', "null"),
        ("key", '"order:1"', '"order:4"'),
        ("priority", "5", "null"),
    ],
)
def test_a_query_of_one_column_is_the_payload_whatever_it_is_called(
    session, service, orders, column, first, last
):
    session.execute(sa.delete(Message))
    session.execute(sa.text("SET LOCAL TIME ZONE 'UTC'"))
    query = sa.select(order[column]).order_by(order.id)

    assert service.enqueue_from("mail", query) == 4
    rows = list(stored(session).values())
    assert [rows[0]["payload"], rows[-1]["payload"]] == [first, last]
    assert {row["dedup_key"] for row in rows} == {None}
    assert {row["priority"] for row in rows} == {0}
    assert all(row["vt"] == row["enqueued_at"] for row in rows)


def test_a_query_may_say_everything_about_a_message(session, service, orders):
    worker = service.workers.register("producer")
    query = sa.select(
        sa.func.jsonb_build_object("order", order.id).label("payload"),
        order.wait.label("delay"),
        order.due.label("at"),
        order.priority,
        order.data.label("headers"),
        order.number.label("max_read_ct"),
        order.key,
    ).order_by(order.id)

    assert QueueService(session, worker=worker).enqueue_from("mail", query) == 4
    *_, third, fourth = stored(session).values()
    common = {"read_ct": 0, "producer_worker_id": worker.id, "queue_name": "mail"}
    assert (
        third.items()
        >= {
            **common,
            "payload": '{"order": 3}',
            "vt": datetime(2400, 1, 1, tzinfo=UTC),
            "priority": 5,
            "headers": '{"d": null}',
            "max_read_ct": 7,
            "dedup_key": "order:3",
        }.items()
    )
    # What is NULL was not said.
    assert (
        fourth.items()
        >= {
            **common,
            "payload": '{"order": 4}',
            "vt": fourth["enqueued_at"],
            "priority": 0,
            "headers": None,
            "max_read_ct": None,
            "dedup_key": "order:4",
        }.items()
    )


@each_case(
    ("delay", "seconds"),
    [
        (order.wait, 120),
        (order.seconds, 1.5),
        (order.number, 7),
        (sa.cast(order.seconds, sa.Double), 1.5),
        (sa.literal(timedelta(hours=1)), 3_600),
        (sa.literal(2.25), 2.25),
        (order.wait + timedelta(seconds=1), 121),
        (sa.func.make_interval(0, 0, 0, 0, 0, 0, 5, type_=sa.Interval), 5),
        (sa.null(), 0),
        (sa.cast(sa.null(), sa.Interval), 0),
    ],
)
def test_the_delay_of_a_query_is_an_interval_or_seconds(session, service, orders, delay, seconds):
    session.execute(sa.delete(Message))
    query = sa.select(order.id.label("payload"), delay.label("delay"))
    service.enqueue_from("mail", query.where(order.id == 1))
    (row,) = stored(session).values()

    assert row["vt"] - row["enqueued_at"] == timedelta(seconds=seconds)


def test_headers_of_a_query_that_are_the_null_of_json_are_no_headers(session, service):
    # What SQLAlchemy writes for None into a JSON column, unless it is told otherwise.
    null = sa.cast(sa.literal("null", sa.Text), JSONB)
    service.enqueue_from("mail", sa.select(sa.literal(1).label("payload"), null.label("headers")))

    assert [row["headers"] for row in stored(session).values()] == [None]


def test_the_time_of_a_query_that_has_passed_means_now(session, service, orders):
    past = sa.literal(datetime(2001, 1, 1, tzinfo=UTC)).label("at")
    service.enqueue_from("mail", sa.select(order.id.label("payload"), past))

    assert all(row["vt"] == row["enqueued_at"] for row in stored(session).values())


@each_case(
    "rows",
    {
        "select": sa.select(order.id.label("payload")),
        "two columns": sa.select(order.id.label("payload"), order.priority),
        "union": sa.union_all(
            sa.select(order.id.label("payload")).where(order.id < 3),
            sa.select(order.id).where(order.id >= 3),
        ),
        "limit": sa.select(order.id).order_by(order.id).limit(4),
        "cte": sa.select(sa.select(order.id).cte("mine").c.id.label("payload")),
        "text": sa.text("SELECT id AS payload FROM host_orders").columns(sa.column("payload")),
        "parameter": sa.select(order.id).where(
            sa.func.coalesce(order.number, 0) >= sa.bindparam("n", 0)
        ),
    },
)
def test_any_form_of_select_will_do(session, service, orders, rows):
    session.execute(sa.delete(Message))
    assert service.enqueue_from("mail", rows) == 4
    assert sorted(payloads(session)) == ["1", "2", "3", "4"]


def test_a_query_may_read_a_mapped_class_and_sees_what_is_pending(session, service):
    service.queues.create("copies")
    session.add(Message(queue_name="mail", payload={"pending": True}))

    assert service.enqueue_from("copies", sa.select(Message.payload)) == 1
    assert [message.payload for message in service.messages.find("copies")] == [{"pending": True}]


def test_ids_follow_the_order_of_the_query(session, service, orders):
    service.enqueue_from("mail", sa.select(order.id).order_by(order.id.desc()))

    assert payloads(session) == ["4", "3", "2", "1"]


def test_rows_whose_key_is_live_make_no_message_and_are_not_counted(session, service, orders):
    service.enqueue("mail", "there", key="order:2")
    query = sa.select(order.id.label("payload"), order.key)

    assert service.enqueue_from("mail", query) == 3
    assert service.enqueue_from("mail", query) == 0
    assert sorted(payloads(session)) == ['"there"', "1", "3", "4"]


def test_a_key_twice_in_a_query_makes_one_message(session, service, orders):
    query = sa.select(order.id.label("payload"), sa.literal("k").label("key"))

    assert service.enqueue_from("mail", query.order_by(order.id)) == 1
    assert len(payloads(session)) == 1


def test_rows_without_a_key_are_all_made(session, service, orders):
    query = sa.select(order.id.label("payload"), sa.null().label("key"))

    assert service.enqueue_from("mail", query) == 4


def test_a_query_is_sent_as_one_statement(engine, service, orders):
    sent = inserts(engine)
    service.enqueue_from("mail", sa.select(order.id))

    assert len(sent) == 1
    assert "host_orders" in sent[0]


def test_the_query_given_can_be_used_again(session, service, orders):
    query = sa.select(order.id.label("payload"))

    assert [service.enqueue_from("mail", query) for _ in range(2)] == [4, 4]
    assert session.execute(query).scalars().all() == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------- async


async def test_the_async_service_makes_the_same_row(async_session, async_service):
    # asyncpg and psycopg encode parameters differently: the rows must not.
    item = Item(
        {"é": [1, 2.5, None, 10**30]},
        at=datetime(2400, 1, 1, 12, tzinfo=timezone(timedelta(hours=5))),
        priority=-7,
        headers={"h": "😀"},
        key="k",
        max_read_ct=9,
    )
    options = {n: getattr(item, n) for n in ("at", "priority", "headers", "max_read_ct")}
    entry = await async_service.enqueue("mail", item.payload, key="k1", **options)
    (two,) = await async_service.enqueue_many("mail", [item])
    added = Message(queue_name="mail", payload=item.payload, dedup_key="k2", **options)
    async_session.add(added)
    await async_session.flush()
    rows = await async_session.run_sync(stored)
    differs = {"id", "enqueued_at", "dedup_key", "fencing_token"}
    alike = [
        {n: v for n, v in rows[id_].items() if n not in differs}
        for id_ in (entry.id, two.id, added.id)
    ]

    assert alike[0] == alike[1] == alike[2]
    assert entry.vt == two.vt == item.at
    assert await async_service.enqueue("mail", 1, key="k") == Receipt(two.id, two.vt, True)


@each_case("delay", [0.000001, 2.5, timedelta(days=1000, microseconds=7)], before="reset_async")
async def test_the_async_service_adds_a_delay_to_the_databases_clock(
    async_session, async_service, delay
):
    receipts = [
        await async_service.enqueue("mail", 1, delay=delay),
        *await async_service.enqueue_many("mail", [Item(1, delay=delay)]),
    ]
    rows = await async_session.run_sync(stored)
    span = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)

    assert [rows[receipt.id]["vt"] - rows[receipt.id]["enqueued_at"] for receipt in receipts] == [
        span,
        span,
    ]


async def test_the_async_service_enqueues_by_a_query(async_session, async_service):
    rows = sa.func.generate_series(1, 5).table_valued("n").render_derived()
    query = sa.select(
        rows.c.n.label("payload"),
        sa.cast(rows.c.n, sa.Double).label("delay"),
        sa.func.concat("k", rows.c.n).label("key"),
    )

    assert await async_service.enqueue_from("mail", query) == 5
    assert await async_service.enqueue_from("mail", query) == 0
    found = await async_service.messages.find("mail")
    assert [row.payload for row in found] == [1, 2, 3, 4, 5]
    assert [(row.vt - row.enqueued_at).total_seconds() for row in found] == [1, 2, 3, 4, 5]

"""What cannot be is refused: by its name, before a statement, and without harm to the caller."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from pgqrs_sa import (
    AsyncQueueService,
    DeclaredQueue,
    DelayError,
    DuplicateMessage,
    InvalidArgument,
    Item,
    LeaseLost,
    Message,
    MessageNotFound,
    NonAtomicEnqueue,
    PayloadError,
    PgqrsError,
    QueueNotFound,
    QueueService,
    WorkerNotFound,
    WorkerNotReady,
    errors,
)
from pgqrs_sa._core import enqueue as enqueue_operation
from support.cases import each_case

LATER = datetime(2030, 1, 1, tzinfo=UTC)
NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001
YEARS = timedelta(days=365)
STORED = """
    SELECT jsonb_build_object(
        'messages', (SELECT coalesce(jsonb_agg(jsonb_build_array(id, payload) ORDER BY id), '[]')
                     FROM pgqrs_messages),
        'leases',   (SELECT jsonb_agg(jsonb_build_array(id, read_ct, vt, leased_until) ORDER BY id)
                     FROM pgqrs_messages WHERE read_ct > 0),
        'archive',  (SELECT jsonb_agg(to_jsonb(a) ORDER BY id) FROM pgqrs_archive a),
        'queues',   (SELECT jsonb_agg(to_jsonb(q) ORDER BY id) FROM pgqrs_queues q),
        'workers',  (SELECT jsonb_agg(to_jsonb(w) ORDER BY id) FROM pgqrs_workers w))
"""


def record(engine: sa.Engine) -> list[str]:
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _note(_connection, _cursor, statement, _parameters, _context, _many):
        statements.append(statement)

    return statements


class Caller:
    """A transaction that is under way, and what is expected of it when a call is refused."""

    def __init__(self, engine: sa.Engine, session: Session, service: QueueService) -> None:
        self.engine, self.session, self.service = engine, session, service
        self.sent = record(engine)
        self._begin()

    def begin(self) -> None:
        """Begin another transaction, for the next call that is refused."""
        self.session.rollback()
        self._begin()

    def _begin(self) -> None:
        self.service.enqueue("mail", "before")
        self.before = self.stored(self.session)
        self.sent.clear()

    def refuses(
        self, call: Callable[[QueueService], object], error: type[PgqrsError], says: str
    ) -> Any:
        """Call, and check the error's class and words."""
        with pytest.raises(error) as caught:
            call(self.service)
        assert caught.type is error
        assert says in str(caught.value)
        return caught.value

    def is_unharmed(self) -> None:
        """Check that nothing was half written, and that the transaction goes on and commits."""
        assert self.stored(self.session) == self.before
        after = self.service.enqueue("mail", "after")
        self.session.commit()
        with Session(self.engine) as other:
            rows = self.stored(other)
        assert rows["messages"] == [*self.before["messages"], [after.id, "after"]]
        assert {**rows, "messages": None} == {**self.before, "messages": None}
        self.begin()

    def stored(self, session: Session) -> dict[str, list[Any]]:
        with session.no_autoflush:
            return session.connection().exec_driver_sql(STORED).scalar_one()


@pytest.fixture
def caller(engine: sa.Engine, session: Session, service: QueueService) -> Caller:
    return Caller(engine, session, service)


# -------------------------------------------------------- the options of enqueue, each way

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[PgqrsError], str]] = {
    "negative delay": ({"delay": -1}, DelayError, "delay must be 0 or more seconds, not -1"),
    "delay of nan": ({"delay": math.nan}, DelayError, "delay must be finite, not nan"),
    "delay of inf": ({"delay": math.inf}, DelayError, "delay must be finite, not inf"),
    "delay as text": ({"delay": "5"}, DelayError, "delay must be seconds or a timedelta, not '5'"),
    "delay of True": ({"delay": True}, DelayError, "delay must be seconds or a timedelta, not T"),
    "delay of 1e300": ({"delay": 1e300}, DelayError, "delay=1e+300 ends past year 9998"),
    "endless delay": ({"delay": timedelta.max}, DelayError, "delay=datetime.timedelta(days=999999"),
    "naive at": ({"at": NAIVE}, DelayError, f"at={NAIVE!r} is naive"),
    "at as text": ({"at": "soon"}, DelayError, "at must be an aware datetime, not 'soon'"),
    "at in year 9999": (
        {"at": datetime(9999, 1, 1, tzinfo=UTC)},
        DelayError,
        "at=datetime.datetime(9999, 1, 1, 0, 0, tzinfo=datetime.timezone.utc) lies past",
    ),
    "delay and at": ({"delay": 1, "at": LATER}, DelayError, "delay=1 and at=datetime.datetime("),
    "priority too low": (
        {"priority": -32_769},
        InvalidArgument,
        "priority must be from -32768 to 32767, not -32769",
    ),
    "priority too high": (
        {"priority": 32_768},
        InvalidArgument,
        "priority must be from -32768 to 32767, not 32768",
    ),
    "priority as float": ({"priority": 1.5}, InvalidArgument, "priority must be an integer, not 1"),
    "priority as text": (
        {"priority": "1"},
        InvalidArgument,
        "priority must be an integer, not '1'",
    ),
    "no attempts": ({"max_read_ct": 0}, InvalidArgument, "max_read_ct must be from 1 to"),
    "attempts of True": (
        {"max_read_ct": True},
        InvalidArgument,
        "max_read_ct must be an integer, not True",
    ),
    "attempts beyond int4": ({"max_read_ct": 2**31}, InvalidArgument, "not 2147483648"),
    "empty key": ({"key": ""}, InvalidArgument, "key must be a string of 1 to 255 characters"),
    "long key": ({"key": "k" * 256}, InvalidArgument, "not 'kkkk"),
    "key as number": ({"key": 7}, InvalidArgument, "characters, not 7"),
    "key with nul": ({"key": "a\0"}, PayloadError, "key contains NUL"),
    "key with surrogate": ({"key": "\ud83d"}, PayloadError, "key contains a lone surrogate"),
    "headers as list": ({"headers": [1]}, PayloadError, "headers must be a dict, not a list"),
    "headers with nan": ({"headers": {"t": math.nan}}, PayloadError, "headers.t is nan"),
    "headers with nul": ({"headers": {"t": ["\0"]}}, PayloadError, "headers.t[0] contains NUL"),
    "headers with number as key": ({"headers": {1: 2}}, PayloadError, "headers has the key 1"),
    "headers of 64 KiB": ({"headers": {"h": "x" * 65_536}}, PayloadError, "headers takes 65544"),
}
bad_options = each_case(("options", "error", "says"), BAD_OPTIONS)

BAD_PAYLOADS: dict[str, tuple[Any, str, str]] = {
    "nan": ({"x": math.nan}, "payload.x", "is nan"),
    "infinity": ([1, -math.inf], "payload[1]", "is -inf"),
    "nul": ({"items": [{"price": "\0"}]}, "payload.items[0].price", "contains NUL"),
    "nul in a key": ({"a\0": 1}, "payload['a\\x00']", "contains NUL"),
    "surrogate": ({"a b": {"x": "\ud83d"}}, "payload['a b'].x", "lone surrogate"),
    "number as key": ({"a": {1: 2}}, "payload.a", "has the key 1"),
    "None as key": ({None: 2}, "payload", "has the key None"),
    "set": ({"s": {1}}, "payload.s", "is a set"),
    "nan of decimal": ({"when": Decimal("NaN")}, "payload.when", "is a Decimal"),
    "bytes": (b"raw", "payload", "is a bytes"),
    "integer of 4301 digits": ([[10**4300]], "payload[0][0]", "more than 4300 digits"),
    "SQL": (sa.func.now(), "payload", "is a now"),
}
bad_payloads = each_case(("payload", "path", "problem"), BAD_PAYLOADS)


@bad_options
def test_enqueue_refuses_an_option_without_a_statement(caller, options, error, says):
    caller.refuses(lambda s: s.enqueue("mail", {}, **options), error, says)

    assert caller.sent == []
    caller.is_unharmed()


@bad_payloads
def test_enqueue_refuses_a_payload_without_a_statement(caller, payload, path, problem):
    refused = caller.refuses(lambda s: s.enqueue("mail", payload), PayloadError, problem)

    assert refused.path == path
    assert caller.sent == []
    caller.is_unharmed()


@bad_options
def test_enqueue_many_names_the_item_of_an_option_and_sends_nothing(caller, options, error, says):
    items = ["fine", Item({}, **options), Item(1, key="k")]
    refused = caller.refuses(lambda s: s.enqueue_many("mail", items), error, says)

    assert str(refused).startswith("items[1].")
    assert caller.sent == []
    caller.is_unharmed()


@bad_payloads
@each_case("wrap", {"payload": lambda p: p, "item": Item})
def test_enqueue_many_names_the_item_of_a_payload_and_sends_nothing(
    caller, wrap, payload, path, problem
):
    items = ["fine", Item(1, delay=5), wrap(payload)]
    refused = caller.refuses(lambda s: s.enqueue_many("mail", items), PayloadError, problem)

    assert refused.path == f"items[2].{path}"
    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    ("items", "says"),
    [
        ("abc", "items must be a list, not of type str"),
        (b"abc", "items must be a list, not of type bytes"),
        ({"a": 1}, "items must be a list, not of type dict"),
        (7, "items must be a list, not of type int"),
        (None, "items must be a list, not of type NoneType"),
    ],
)
def test_enqueue_many_refuses_what_is_no_list_of_items(caller, items, says):
    caller.refuses(lambda s: s.enqueue_many("mail", items), InvalidArgument, says)

    assert caller.sent == []
    caller.is_unharmed()


ATTRIBUTES = {"key": "dedup_key"}


@bad_options
def test_a_message_refuses_an_option_as_it_is_assigned(caller, options, error, says):
    attributes = {ATTRIBUTES.get(name, name): value for name, value in options.items()}
    caller.refuses(lambda _: Message(queue_name="mail", payload={}, **attributes), error, says)

    assert caller.sent == []
    caller.is_unharmed()


@bad_payloads
def test_a_message_refuses_a_payload_as_it_is_assigned(caller, payload, path, problem):
    refused = caller.refuses(
        lambda _: Message(queue_name="mail", payload=payload), PayloadError, problem
    )

    assert refused.path == path
    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    ("attributes", "error", "says"),
    [
        ({"vt": NAIVE}, DelayError, "is naive"),
        ({"leased_until": NAIVE}, DelayError, "leased_until=datetime.datetime("),
        ({"leased_until": "soon"}, DelayError, "leased_until must be an aware datetime"),
        ({"vt": "soon"}, DelayError, "vt must be an aware datetime, not 'soon'"),
        ({"vt": datetime(9999, 1, 1, tzinfo=UTC)}, DelayError, "past year 9998"),
        ({"vt": datetime(1969, 12, 31, tzinfo=UTC)}, DelayError, "vt=datetime.datetime(1969, 12"),
        ({"vt": datetime.min.replace(tzinfo=UTC)}, DelayError, "vt=datetime.datetime(1, 1, 1"),
        ({"queue_name": "no name"}, InvalidArgument, "'no name' is no queue name"),
        ({"queue_name": None}, InvalidArgument, "queue must be a name, not None"),
    ],
)
def test_a_message_refuses_what_only_a_row_has_as_it_is_assigned(caller, attributes, error, says):
    caller.refuses(lambda _: Message(payload=1, **attributes), error, says)
    assert caller.sent == []


def test_a_message_refuses_a_bad_value_whenever_it_is_assigned(caller):
    message = Message(queue_name="mail", payload={})

    def assign(name: str, value: object) -> Callable[[QueueService], None]:
        return lambda _: setattr(message, name, value)

    caller.refuses(assign("payload", {"x": {1}}), PayloadError, "payload.x")
    caller.refuses(assign("priority", 40_000), InvalidArgument, "40000")
    caller.refuses(assign("delay", -1), DelayError, "not -1")
    assert (message.payload, message.priority, message.vt) == ({}, None, None)


LATE: dict[str, tuple[Callable[[], Message], type[PgqrsError], str]] = {
    "unknown queue": (
        lambda: Message(queue_name="mial", payload=1),
        QueueNotFound,
        "no queue 'mial': did you mean 'mail'?",
    ),
    "unknown id of a queue": (
        lambda: Message(queue_id=99, payload=1),
        QueueNotFound,
        "no queue 99",
    ),
    "no queue": (lambda: Message(payload=1), InvalidArgument, "a message needs a queue"),
    "live key": (
        lambda: Message(queue_name="mail", payload=1, dedup_key="live"),
        DuplicateMessage,
        "live under the key 'live'",
    ),
    "too large": (
        lambda: Message(queue_name="mail", payload="x" * 1_048_575),
        PayloadError,
        "payload takes 1048577 bytes, queue 'mail' accepts 1048576",
    ),
    "no payload": (lambda: Message(queue_name="mail"), InvalidArgument, "payload"),
    "payload changed in place": (
        lambda: changed("payload"),
        PayloadError,
        "payload.late is nan",
    ),
    "headers changed in place": (
        lambda: changed("headers"),
        PayloadError,
        "headers.late is nan",
    ),
}
late = each_case(("make", "error", "says"), LATE)


def changed(name: str) -> Message:
    message = Message(queue_name="mail", payload={}, headers={})
    getattr(message, name)["late"] = math.nan
    return message


@pytest.fixture
def with_live_key(service: QueueService, session: Session) -> None:
    service.enqueue("mail", "live", key="live")
    session.commit()


@late
def test_a_flush_refuses_what_enqueue_refuses_and_inserts_nothing(
    with_live_key, caller, make, error, says
):
    caller.session.add_all([Message(queue_name="mail", payload="beside"), make()])
    caller.refuses(lambda _: caller.session.flush(), error, says)

    assert not [statement for statement in caller.sent if statement.startswith("INSERT")]
    caller.begin()


@late
def test_a_flush_that_refuses_inside_a_savepoint_leaves_the_transaction_usable(
    with_live_key, caller, make, error, says
):
    def flush(_):
        with caller.session.begin_nested():
            caller.session.add_all([Message(queue_name="mail", payload="beside"), make()])
            caller.session.flush()

    caller.refuses(flush, error, says)
    caller.is_unharmed()


@late
def test_a_flush_that_refuses_leaves_the_transaction_usable(
    with_live_key, caller, make, error, says
):
    message = make()
    caller.session.add(message)
    caller.refuses(lambda _: caller.session.flush(), error, says)

    if message in caller.session:
        caller.session.expunge(message)
    caller.is_unharmed()


def test_two_messages_of_a_flush_with_the_same_key_are_refused_by_the_key(caller):
    twice = [Message(queue_name="mail", payload=n, dedup_key="order:7") for n in range(2)]
    caller.session.add_all(twice)
    caller.refuses(lambda _: caller.session.flush(), InvalidArgument, "'order:7'")


def test_a_batch_of_added_messages_is_refused_as_one_by_the_bad_one(caller):
    good = [Message(queue_name="mail", payload=n) for n in range(3)]
    caller.session.add_all([*good, Message(queue_name="mial", payload=3)])
    caller.refuses(lambda _: caller.session.flush(), QueueNotFound, "'mial'")

    caller.session.rollback()
    assert caller.stored(caller.session)["messages"] == []


def test_messages_that_were_rolled_back_are_checked_again_when_they_are_added_again(
    engine, session, service
):
    messages = [Message(queue_name="mail", payload=n, dedup_key=f"k{n}") for n in range(3)]
    session.add_all(messages)
    session.flush()
    session.rollback()
    service.enqueue("mail", "first", key="k2")
    session.add_all(messages)

    with pytest.raises(DuplicateMessage, match="'k2'"):
        session.flush()


# ------------------------------------------------------------------------------- queue names

QUEUE_METHODS: dict[str, Callable[[QueueService, Any], object]] = {
    "enqueue": lambda s, q: s.enqueue(q, 1),
    "enqueue with a key": lambda s, q: s.enqueue(q, 1, key="k"),
    "enqueue of 2 MB": lambda s, q: s.enqueue(q, "x" * 2_000_000),
    "enqueue_many": lambda s, q: s.enqueue_many(q, [1, 2]),
    "enqueue_many with keys": lambda s, q: s.enqueue_many(q, [Item(1, key="k"), 2]),
    "enqueue_many with a key at the end": lambda s, q: s.enqueue_many(q, [1, Item(2, key="k")]),
    "enqueue_many of 2 MB": lambda s, q: s.enqueue_many(q, [1, "x" * 2_000_000]),
    "enqueue_from": lambda s, q: s.enqueue_from(q, sa.select(sa.literal(1).label("payload"))),
    "enqueue_from no rows": lambda s, q: s.enqueue_from(
        q, sa.select(sa.literal(1).label("payload")).where(sa.false())
    ),
    "dequeue": lambda s, q: s.dequeue(q),
    "dequeue where": lambda s, q: s.dequeue(q, where=Message.priority == 0),
    "queues.get": lambda s, q: s.queues.get(q),
    "queues.update": lambda s, q: s.queues.update(q, lease=5),
    "queues.pause": lambda s, q: s.queues.pause(q),
    "queues.resume": lambda s, q: s.queues.resume(q),
    "queues.purge": lambda s, q: s.queues.purge(q),
    "queues.delete": lambda s, q: s.queues.delete(q),
    "queues.delete force": lambda s, q: s.queues.delete(q, force=True),
    "messages.peek": lambda s, q: s.messages.peek(q),
    "messages.find": lambda s, q: s.messages.find(q),
    "messages.count": lambda s, q: s.messages.count(q),
    "messages.metrics": lambda s, q: s.messages.metrics(q),
    "messages.cancel_where": lambda s, q: s.messages.cancel_where(q, payload={"a": 1}),
    "archived.find": lambda s, q: s.archived.find(q),
    "archived.count": lambda s, q: s.archived.count(q),
    "archived.bury": lambda s, q: s.archived.bury(q),
    "archived.prune": lambda s, q: s.archived.prune(queue=q),
}
NAMED_OTHERWISE = {
    # Where a name may be new, or is a label for people.
    "queues.create": lambda s, q: s.queues.create(q),
    "queues.sync": lambda s, q: s.queues.sync(DeclaredQueue(q)),
    "workers.list": lambda s, q: s.workers.list(queue=q),
    "workers.register": lambda s, q: s.workers.register("w", queues=[q]),
}
BAD_NAMES = [
    "",
    "a b",
    "mail\n",
    "größe",
    "'; DROP TABLE pgqrs_messages; --",
    "a" * 129,
    7,
    b"mail",
]


def test_every_method_that_takes_a_queue_is_tried():
    resources = {
        name: getattr(QueueService, name).fget for name in ("queues", "messages", "archived")
    }
    tried = {name.split()[0] for name in (*QUEUE_METHODS, *NAMED_OTHERWISE)}
    service = QueueService(Session())
    taking = {
        f"{prefix}{name}"
        for prefix, owner in (("", service), *((f"{f}.", getattr(service, f)) for f in resources))
        for name, method in inspect.getmembers(owner, inspect.ismethod)
        if not name.startswith("_")
        and ("queue" in inspect.signature(method).parameters or prefix == "queues.")
    } - {"queues.list"}

    assert taking <= tried


@each_case("method", QUEUE_METHODS)
def test_an_unknown_queue_is_refused_with_the_name_that_was_meant(caller, method):
    refused = caller.refuses(
        lambda s: method(s, "mial"),
        QueueNotFound,
        "there is no queue 'mial': did you mean 'mail'?",
    )

    assert (refused.queue, refused.suggestions) == ("mial", ("mail",))
    caller.is_unharmed()


def test_an_unknown_queue_is_refused_before_an_unknown_worker(caller):
    caller.refuses(
        lambda s: s.dequeue("mial", worker=99), QueueNotFound, "there is no queue 'mial'"
    )


def test_an_unknown_queue_like_no_other_is_refused_with_the_way_to_create_it(caller):
    refused = caller.refuses(
        lambda s: s.enqueue("zzz", 1), QueueNotFound, "create it first with service.queues.create"
    )
    assert refused.suggestions == ()


@each_case("method", QUEUE_METHODS | NAMED_OTHERWISE)
def test_a_name_that_no_queue_can_have_is_refused_without_a_statement(engine, session, method):
    sent = record(engine)
    for name in BAD_NAMES:
        with pytest.raises(InvalidArgument) as caught:
            method(QueueService(session), name)
        assert repr(name) in str(caught.value)
    assert sent == []


# --------------------------------------------------------------------------- size of payloads

LARGE = {
    "enqueue": lambda s, text: s.enqueue("box", text),
    "enqueue with a key": lambda s, text: s.enqueue("box", text, key="k"),
    "enqueue_many": lambda s, text: s.enqueue_many("box", ["ok", text]),
    "enqueue_many with keys": lambda s, text: s.enqueue_many("box", ["ok", Item(text, key="k")]),
    "enqueue_many with keys first": lambda s, text: s.enqueue_many(
        "box", [Item("ok", key="a"), Item(text, key="k")]
    ),
    "enqueue_from": lambda s, text: s.enqueue_from(
        "box", sa.union_all(row(payload="ok"), row(payload=text))
    ),
    "session.add": lambda s, text: add(s, text),  # noqa: PLW0108 - defined below
}
ways = each_case("way", LARGE)
limits = each_case("limit", [20, 1_048_576, 1_500_000])


def add(service: QueueService, text: str) -> None:
    service.session.add_all(
        [Message(queue_name="box", payload="ok"), Message(queue_name="box", payload=text)]
    )
    service.session.flush()


def text_of(size: int) -> str:
    """A string that takes ``size`` bytes as JSON, and fewer characters."""
    sample = 'é😀"x'
    width = len(sample.encode()) + 1
    return sample * ((size - 2) // width) + "." * ((size - 2) % width)


@ways
@limits
def test_a_payload_may_take_as_many_bytes_as_its_queue_accepts(session, service, way, limit):
    service.queues.create("box", max_payload_bytes=limit)
    way(service, text := text_of(limit))

    stored = session.scalars(sa.select(Message.payload).order_by(Message.id)).all()
    assert text in stored
    session.rollback()


@ways
@limits
def test_a_payload_of_one_byte_more_is_refused_and_nothing_is_inserted(
    caller, service, session, way, limit
):
    service.queues.create("box", max_payload_bytes=limit)
    session.commit()
    caller.before = caller.stored(session)

    def flushed(s: QueueService) -> None:
        with session.begin_nested() if way is LARGE["session.add"] else session.no_autoflush:
            way(s, text_of(limit + 1))

    caller.refuses(
        flushed, PayloadError, f"payload takes {limit + 1} bytes, queue 'box' accepts {limit}"
    )
    caller.is_unharmed()
    service.queues.delete("box")
    session.commit()
    caller.begin()


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("limit", [20, 1_048_576])
def test_enqueue_many_names_the_item_that_is_too_large(service, limit, key):
    service.queues.create("box", max_payload_bytes=limit)
    with pytest.raises(PayloadError) as caught:
        service.enqueue_many("box", ["ok", 1, Item(text_of(limit + 1), key=key), "ok"])

    assert caught.value.path == "items[2].payload"


@pytest.mark.parametrize("limit", [20, 1_048_576])
def test_a_payload_too_large_in_the_last_chunk_leaves_nothing_of_the_first(
    monkeypatch, caller, service, session, limit
):
    monkeypatch.setattr(enqueue_operation, "CHUNK_ROWS", 2)
    service.queues.create("box", max_payload_bytes=limit)
    session.commit()
    caller.before = caller.stored(session)

    caller.refuses(
        lambda s: s.enqueue_many("box", [1, 2, 3, 4, text_of(limit + 1)]),
        PayloadError,
        f"takes {limit + 1} bytes",
    )
    caller.is_unharmed()


@pytest.mark.parametrize("delete", [False, True], ids=["smaller limit", "no queue"])
def test_an_item_with_a_key_never_gets_in_without_the_others_of_its_batch(
    caller, service, session, delete
):
    service.queues.create("box", max_payload_bytes=20)
    if delete:
        service.queues.delete("box")
    session.commit()
    caller.before = caller.stored(session)
    items = [Item(1, key="a"), Item(2, key="b"), Item("x" * 30, key="c"), 4]

    caller.refuses(
        lambda s: s.enqueue_many("box", items), QueueNotFound if delete else PayloadError, "box"
    )
    caller.is_unharmed()


# -------------------------------------------------------------------------------- enqueue_from


def row(**columns: Any) -> sa.Select[Any]:
    return sa.select(*(sa.literal(value).label(name) for name, value in columns.items()))


@each_case(
    ("query", "says"),
    [
        (row(payload=1, prio=2), "['payload', 'prio']: label its columns payload (needed)"),
        (row(delay=1, key="k"), "['delay', 'key']"),
        (row(id=1, payload=1), "['id', 'payload']"),
        (sa.select(Message), "'queue_id'"),
        (sa.select(), "[]"),
        (sa.union_all(row(a=1, payload=1), row(a=2, payload=2)), "['a', 'payload']"),
        ("SELECT 1", "SELECT 1"),
        (sa.text("SELECT 1 AS payload"), "TextClause"),
        (None, "None"),
        ([{"payload": 1}], "payload"),
    ],
    ids=[
        *("unknown label", "no payload", "id", "entity", "nothing", "union"),
        *("str", "text", "None", "rows"),
    ],
)
def test_enqueue_from_refuses_a_query_it_cannot_read_without_a_statement(caller, query, says):
    caller.refuses(lambda s: s.enqueue_from("mail", query), InvalidArgument, says)

    assert caller.sent == []
    caller.is_unharmed()


def test_enqueue_from_of_no_rows_inserts_nothing_and_is_no_error(caller):
    assert caller.service.enqueue_from("mail", row(payload=1).where(sa.false())) == 0
    caller.is_unharmed()


# --------------------------------------------------------------------------- dequeue and settle


@each_case(
    ("options", "error", "says"),
    [
        ({"limit": 0}, InvalidArgument, "limit must be from 1 to 2147483647, not 0"),
        ({"limit": -1}, InvalidArgument, "not -1"),
        ({"limit": 2**31}, InvalidArgument, "not 2147483648"),
        ({"limit": True}, InvalidArgument, "limit must be an integer, not True"),
        ({"limit": None}, InvalidArgument, "limit must be an integer, not None"),
        ({"limit": "1"}, InvalidArgument, "limit must be an integer, not '1'"),
        ({"limit": 1.0}, InvalidArgument, "limit must be an integer, not 1.0"),
        ({"lease": 0}, DelayError, "lease must be more than 0 seconds, not 0"),
        ({"lease": -5}, DelayError, "lease must be more than 0 seconds, not -5"),
        ({"lease": math.nan}, DelayError, "lease must be finite, not nan"),
        ({"lease": "30"}, DelayError, "lease must be seconds or a timedelta, not '30'"),
        ({"lease": True}, DelayError, "lease must be seconds or a timedelta, not True"),
        ({"lease": 1e300}, DelayError, "lease=1e+300 ends past year 9998"),
        ({"worker": 0}, InvalidArgument, "worker must be from 1 to"),
        ({"worker": "w"}, InvalidArgument, "worker must be an integer, not 'w'"),
        ({"worker": True}, InvalidArgument, "worker must be an integer, not True"),
    ],
)
def test_dequeue_refuses_a_bad_argument_without_a_statement(caller, options, error, says):
    caller.refuses(lambda s: s.dequeue("mail", **options), error, says)

    assert caller.sent == []
    caller.is_unharmed()


def test_dequeue_refuses_a_worker_that_is_not_there_or_not_ready(engine, session, service):
    workers = [service.workers.register(name) for name in ("suspended", "stopped")]
    service.workers.suspend(workers[0].id)
    service.workers.stop(workers[1].id)
    caller = Caller(engine, session, service)
    first, second = workers

    caller.refuses(lambda s: s.dequeue("mail", worker=99), WorkerNotFound, "no worker 99")
    caller.refuses(lambda s: s.dequeue("mail", worker=first), WorkerNotReady, "is suspended")
    caller.refuses(lambda s: s.dequeue("mail", worker=second.id), WorkerNotReady, "is stopped")
    caller.is_unharmed()


@each_case("worker", [0, -1, "w", True, 1.5, Message()])
def test_a_service_refuses_what_is_no_worker_when_it_is_built(worker):
    with pytest.raises(InvalidArgument, match="worker must be"):
        QueueService(Session(), worker=worker)


SETTLE: dict[str, Callable[[QueueService, Any], object]] = {
    "archive_many": lambda s, d: s.archive_many(d),
    "try_archive_many": lambda s, d: s.try_archive_many(d),
    "delete_many": lambda s, d: s.delete_many(d),
    "try_delete_many": lambda s, d: s.try_delete_many(d),
    "extend_many": lambda s, d: s.extend_many(d, 5),
    "try_extend_many": lambda s, d: s.try_extend_many(d, 5),
    "release_many": lambda s, d: s.release_many(d),
    "try_release_many": lambda s, d: s.try_release_many(d),
    "fail_many": lambda s, d: s.fail_many(d, "no"),
    "try_fail_many": lambda s, d: s.try_fail_many(d, "no"),
    "fail_many dead": lambda s, d: s.fail_many(d, "no", dead=True),
}
SETTLE_ONE: dict[str, Callable[[QueueService, Any], object]] = {
    "archive": lambda s, d: s.archive(d),
    "try_archive": lambda s, d: s.try_archive(d),
    "delete": lambda s, d: s.delete(d),
    "try_delete": lambda s, d: s.try_delete(d),
    "extend": lambda s, d: s.extend(d, 5),
    "try_extend": lambda s, d: s.try_extend(d, 5),
    "release": lambda s, d: s.release(d),
    "try_release": lambda s, d: s.try_release(d),
    "fail": lambda s, d: s.fail(d, "no"),
    "try_fail": lambda s, d: s.try_fail(d, "no"),
}


@each_case("method", SETTLE)
def test_settling_refuses_what_are_no_deliveries_without_a_statement(
    engine, session, service, method
):
    service.enqueue_many("mail", [1, 2, 3])
    held = service.dequeue("mail", 2)
    seen = service.messages.peek("mail")[0]
    caller = Caller(engine, session, service)

    for deliveries, says in (
        (held[0], "deliveries must be a list, not Delivery("),
        (None, "deliveries must be a list, not None"),
        (held[0].id, f"deliveries must be a list, not {held[0].id}"),
        ([held[0], 77], "deliveries[1] must come from dequeue(), not be 77"),
        ([None], "deliveries[0] must come from dequeue(), not be None"),
        ([seen], "deliveries[0] must come from dequeue(), not be MessageInfo("),
        ([held[0], held[1], held[0]], "twice"),
        ([held[0], replace(held[0], read_ct=2)], "twice"),
    ):
        caller.refuses(lambda s, d=deliveries: method(s, d), InvalidArgument, says)
    assert caller.sent == []
    caller.is_unharmed()


def test_a_delivery_that_is_given_twice_is_named(service):
    service.enqueue("mail", 1)
    held = service.dequeue("mail")
    with pytest.raises(InvalidArgument, match=rf"\b{held[0].id}\b"):
        service.archive_many(held * 2)


@each_case("method", SETTLE_ONE)
@each_case("wrong", [5, None, "x", []])
def test_settling_one_refuses_what_is_no_delivery_without_a_statement(caller, method, wrong):
    caller.refuses(lambda s: method(s, wrong), InvalidArgument, repr(wrong))

    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    ("settle", "error", "says"),
    [
        (lambda s, d: s.archive(d, outcome="dead"), InvalidArgument, "not 'dead'"),
        (lambda s, d: s.try_archive(d, outcome="done"), InvalidArgument, "not 'done'"),
        (lambda s, d: s.archive(d, outcome=None), InvalidArgument, "not None"),
        (lambda s, d: s.extend(d, 0), DelayError, "lease must be more than 0 seconds, not 0"),
        (lambda s, d: s.extend(d, -1), DelayError, "lease must be more than 0 seconds, not -1"),
        (lambda s, d: s.try_extend(d, "5"), DelayError, "not '5'"),
        (lambda s, d: s.extend(d, None), DelayError, "not None"),
        (lambda s, d: s.release(d, delay=-1), DelayError, "delay must be 0 or more"),
        (lambda s, d: s.try_release(d, delay=math.inf), DelayError, "not inf"),
        (lambda s, d: s.fail(d, "e", delay=-1), DelayError, "delay must be 0 or more"),
        (lambda s, d: s.fail(d, "e", delay="x"), DelayError, "not 'x'"),
        (lambda s, d: s.try_fail(d, "e", delay=math.nan), DelayError, "not nan"),
    ],
)
def test_settling_refuses_a_bad_argument_without_a_statement(
    engine, session, service, settle, error, says
):
    service.enqueue("mail", 1)
    held = service.dequeue("mail")[0]
    caller = Caller(engine, session, service)

    caller.refuses(lambda s: settle(s, held), error, says)
    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    "reason", {"nul": "a\0b", "lone": "\ud83d", "long": "x" * 100_000, "e": ValueError("a\0")}
)
def test_a_reason_or_error_that_cannot_be_stored_as_it_is_is_stored_in_part(service, reason):
    service.enqueue_many("mail", [1, 2, 3])
    first, second, third = service.dequeue("mail", 3)
    service.archive(first, outcome="discarded", reason=reason)
    service.fail(second, reason, dead=True, reason=reason)
    service.fail(third, reason, delay=60)
    service.messages.cancel(third.id, reason=reason)

    for settled in service.archived.find("mail"):
        assert 0 < len(settled.reason) <= 8_193


def test_a_message_that_may_be_tried_any_number_of_times_can_be_released(service):
    # release() raises the limit by one: it must not overflow the column.
    service.enqueue("mail", 1, max_read_ct=2_147_483_647)
    service.release(service.dequeue("mail")[0])

    assert service.dequeue("mail")[0].read_ct == 2


def test_a_message_can_be_requeued_with_any_number_of_attempts(service):
    service.enqueue("mail", 1)
    service.archive(service.dequeue("mail")[0])
    service.archived.requeue(service.archived.find()[0].id, attempts=2_147_483_647)

    assert service.dequeue("mail")[0].read_ct == 2


# ------------------------------------------------------------------------------ ids and searches

BY_ID: dict[str, tuple[Callable[[QueueService, Any], object], type[PgqrsError]]] = {
    "messages.get": (lambda s, i: s.messages.get(i), MessageNotFound),
    "messages.cancel": (lambda s, i: s.messages.cancel(i), MessageNotFound),
    "messages.reschedule": (lambda s, i: s.messages.reschedule(i, delay=1), MessageNotFound),
    "archived.get": (lambda s, i: s.archived.get(i), MessageNotFound),
    "archived.requeue": (lambda s, i: s.archived.requeue(i), MessageNotFound),
    "archived.requeue_many": (lambda s, i: s.archived.requeue_many([i]), MessageNotFound),
    "workers.get": (lambda s, i: s.workers.get(i), WorkerNotFound),
    "workers.heartbeat": (lambda s, i: s.workers.heartbeat(i), WorkerNotFound),
    "workers.suspend": (lambda s, i: s.workers.suspend(i), WorkerNotFound),
    "workers.resume": (lambda s, i: s.workers.resume(i), WorkerNotFound),
    "workers.stop": (lambda s, i: s.workers.stop(i), WorkerNotFound),
    "workers.release_leases": (lambda s, i: s.workers.release_leases(i), WorkerNotFound),
}
ONLY_CHECKED = {
    "messages.try_cancel": (lambda s, i: s.messages.try_cancel(i), InvalidArgument),
    "archived.delete": (lambda s, i: s.archived.delete([i]), InvalidArgument),
}


@each_case(("method", "error"), BY_ID)
@each_case("number", [4_711, 2**63 - 1])
def test_an_id_that_is_not_there_is_named(caller, method, error, number):
    refused = caller.refuses(lambda s: method(s, number), error, str(number))

    assert isinstance(refused, LookupError)
    if error is MessageNotFound:
        assert refused.ids == (number,)
    caller.is_unharmed()


@each_case(("method", "error"), BY_ID | ONLY_CHECKED)
def test_an_id_that_cannot_be_is_refused_without_a_statement(engine, session, method, error):
    sent = record(engine)
    for wrong in (0, -1, 2**63, True, "1", 1.0, None):
        with pytest.raises(InvalidArgument) as caught:
            method(QueueService(session), wrong)
        assert repr(wrong) in str(caught.value)
    assert sent == []


def test_try_cancel_and_delete_say_that_nothing_was_there(caller):
    assert caller.service.messages.try_cancel(4_711) is False
    assert caller.service.archived.delete([4_711, 4_712]) == 0
    caller.is_unharmed()


def test_all_ids_that_are_missing_are_named_and_none_is_requeued(service, engine, session):
    service.enqueue("mail", 1)
    service.archive(service.dequeue("mail")[0])
    there = service.archived.find()[0].id
    caller = Caller(engine, session, service)

    refused = caller.refuses(
        lambda s: s.archived.requeue_many([there, 81, 80, 81]), MessageNotFound, "80, 81"
    )
    assert refused.ids == (80, 81)
    caller.is_unharmed()


MISUSE: dict[str, tuple[Callable[[QueueService], object], type[PgqrsError], str]] = {
    "reschedule to no time": (
        lambda s: s.messages.reschedule(1),
        InvalidArgument,
        "reschedule needs delay=... or at=...",
    ),
    "reschedule to two times": (
        lambda s: s.messages.reschedule(1, delay=1, at=LATER),
        DelayError,
        "contradict",
    ),
    "reschedule by a negative delay": (
        lambda s: s.messages.reschedule(1, delay=-1),
        DelayError,
        "not -1",
    ),
    "reschedule to a naive time": (
        lambda s: s.messages.reschedule(1, at=NAIVE),
        DelayError,
        "is naive",
    ),
    "requeue text": (lambda s: s.archived.requeue_many("12"), InvalidArgument, "'12'"),
    "requeue a number": (lambda s: s.archived.requeue_many(12), InvalidArgument, "12"),
    "requeue without attempts": (
        lambda s: s.archived.requeue(1, attempts=0),
        InvalidArgument,
        "not 0",
    ),
    "requeue with a bad delay": (
        lambda s: s.archived.requeue(1, delay=-1),
        DelayError,
        "not -1",
    ),
    "delete a number": (lambda s: s.archived.delete(12), InvalidArgument, "12"),
    "cancel everything": (
        lambda s: s.messages.cancel_where("mail"),
        InvalidArgument,
        "queues.purge()",
    ),
    "cancel by no criteria": (
        lambda s: s.messages.cancel_where("mail", []),
        InvalidArgument,
        "queues.purge()",
    ),
    "cancel by a bad payload": (
        lambda s: s.messages.cancel_where("mail", payload={"x": {1}}),
        PayloadError,
        "payload.x",
    ),
    "find a state that is none": (
        lambda s: s.messages.find(state="pending"),
        InvalidArgument,
        "state must be one of ready, scheduled, leased, exhausted, not 'pending'",
    ),
    "find an outcome that is none": (
        lambda s: s.archived.find(outcome="done"),
        InvalidArgument,
        "outcome must be one of archived, dead, cancelled, discarded, not 'done'",
    ),
    "find a bad payload": (
        lambda s: s.messages.find(payload={"x": math.nan}),
        PayloadError,
        "payload.x",
    ),
    "find a page of none": (lambda s: s.messages.find(limit=0), InvalidArgument, "not 0"),
    "find after a negative id": (lambda s: s.messages.find(after=-1), InvalidArgument, "not -1"),
    "find archived after text": (lambda s: s.archived.find(after="1"), InvalidArgument, "'1'"),
    "peek at none": (lambda s: s.messages.peek("mail", 0), InvalidArgument, "not 0"),
    "bury none": (lambda s: s.archived.bury("mail", limit=0), InvalidArgument, "not 0"),
    "prune none": (lambda s: s.archived.prune(limit=0), InvalidArgument, "not 0"),
    "prune the future": (lambda s: s.archived.prune(-1), DelayError, "older_than must be 0 or"),
    "purge none": (lambda s: s.queues.purge("mail", limit=0), InvalidArgument, "not 0"),
    "purge tokens": (
        lambda s: s.queues.purge("mail", tokens=[1]),
        InvalidArgument,
        "mapping of ids to fencing tokens, not a list",
    ),
    "purge token": (lambda s: s.queues.purge("mail", tokens={1: "2"}), InvalidArgument, "'2'"),
    "purge token id": (lambda s: s.queues.purge("mail", tokens={"1": 2}), InvalidArgument, "'1'"),
    "purge tokens and a limit": (
        lambda s: s.queues.purge("mail", tokens={1: 2}, limit=3),
        InvalidArgument,
        "neither limit nor up_to",
    ),
    "purge text": (lambda s: s.queues.purge("mail", limit="5"), InvalidArgument, "'5'"),
    "workers of a status that is none": (
        lambda s: s.workers.list(status="dead"),
        InvalidArgument,
        "status must be one of ready, suspended, stopped, not 'dead'",
    ),
    "health of a negative silence": (
        lambda s: s.workers.health(silent_for=-1),
        DelayError,
        "silent_for must be 0 or more seconds, not -1",
    ),
    "reclaim after no silence": (
        lambda s: s.workers.reclaim(silent_for=0),
        DelayError,
        "silent_for must be more than 0 seconds, not 0",
    ),
    "purge workers of the future": (
        lambda s: s.workers.purge(older_than=-1),
        DelayError,
        "older_than must be 0 or more seconds, not -1",
    ),
}


@each_case(("call", "error", "says"), MISUSE)
def test_a_call_that_cannot_be_meant_is_refused_without_a_statement(caller, call, error, says):
    caller.refuses(call, error, says)

    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    "call",
    {
        "prune": lambda s, span: s.archived.prune(span),
        "prune queue": lambda s, span: s.archived.prune(span, queue="mail"),
        "purge workers": lambda s, span: s.workers.purge(older_than=span),
        "reclaim": lambda s, span: s.workers.reclaim(silent_for=span),
        "health": lambda s, span: s.workers.health(silent_for=span),
        "retention": lambda s, span: (
            s.queues.update("mail", retention=span),
            s.archived.prune(),
        )[1],
    },
)
def test_a_span_that_reaches_back_before_the_calendar_finds_nothing(caller, call):
    # PostgreSQL's timestamps begin in 4713 BC; spans are accepted up to the year 9998.
    caller.service.archive(caller.service.dequeue("mail")[0])
    assert call(caller.service, 7_000 * YEARS) in (0, [])
    caller.session.commit()
    caller.begin()


# -------------------------------------------------------------------------------- settings

BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[PgqrsError], str]] = {
    "lease of nothing": ({"lease": 0}, DelayError, "lease must be more than 0 seconds, not 0"),
    "negative lease": ({"lease": -1}, DelayError, "lease must be more than 0 seconds, not -1"),
    "lease below a microsecond": ({"lease": 1e-9}, DelayError, "not 1e-09"),
    "lease of nan": ({"lease": math.nan}, DelayError, "lease must be finite, not nan"),
    "no lease": ({"lease": None}, DelayError, "not None"),
    "lease as text": ({"lease": "30"}, DelayError, "not '30'"),
    "endless lease": ({"lease": timedelta.max}, DelayError, "ends past year 9998"),
    "no attempts": ({"max_read_ct": 0}, InvalidArgument, "max_read_ct must be from 1"),
    "attempts of None": ({"max_read_ct": None}, InvalidArgument, "not None"),
    "attempts of True": ({"max_read_ct": True}, InvalidArgument, "not True"),
    "attempts beyond int4": ({"max_read_ct": 2**31}, InvalidArgument, "not 2147483648"),
    "negative retention": ({"retention": -1}, DelayError, "retention must be 0 or more"),
    "retention as text": ({"retention": "1d"}, DelayError, "not '1d'"),
    "endless retention": ({"retention": math.inf}, DelayError, "not inf"),
    "payloads of nothing": (
        {"max_payload_bytes": 0},
        InvalidArgument,
        "max_payload_bytes must be from 1",
    ),
    "payloads of any size": ({"max_payload_bytes": None}, InvalidArgument, "not None"),
    "payloads of 1e6": ({"max_payload_bytes": 1e6}, InvalidArgument, "not 1000000.0"),
    "payloads beyond int4": ({"max_payload_bytes": 2**31}, InvalidArgument, "not 2147483648"),
}
bad_settings = each_case(("settings", "error", "says"), BAD_SETTINGS)


@bad_settings
@each_case("name", ["mail", "fresh"])
def test_create_refuses_a_setting_without_a_statement(caller, name, settings, error, says):
    caller.refuses(lambda s: s.queues.create(name, **settings), error, says)

    assert caller.sent == []
    caller.is_unharmed()


@bad_settings
def test_update_refuses_a_setting_without_a_statement(caller, settings, error, says):
    caller.refuses(lambda s: s.queues.update("mail", **{"max_read_ct": 3} | settings), error, says)

    assert caller.sent == []
    caller.is_unharmed()


def test_update_refuses_to_change_nothing(caller):
    caller.refuses(lambda s: s.queues.update("mail"), InvalidArgument, "at least one setting")

    assert caller.sent == []
    caller.is_unharmed()


@each_case(
    ("wrong", "says"),
    [
        ({"name": ""}, "name must be text that is not empty, not ''"),
        ({"name": "  "}, "not '  '"),
        ({"name": None}, "not None"),
        ({"name": 7}, "not 7"),
        ({"name": "a\0"}, "name"),
        ({"name": "\ud83d"}, "name"),
        ({"hostname": ""}, "hostname must be text"),
        ({"hostname": "\ud83d"}, "hostname"),
        ({"queues": "mail"}, "queues must be a list of names, not 'mail'"),
        ({"queues": ["a b"]}, "'a b' is no queue name"),
        ({"queues": [None]}, "not None"),
        ({"queues": 7}, "7"),
        ({"pid": "x"}, "pid must be an integer, not 'x'"),
        ({"pid": 2**31}, "2147483648"),
        ({"pid": 1.5}, "1.5"),
        ({"port": "http"}, "port must be an integer, not 'http'"),
        ({"port": 2**31}, "2147483648"),
        ({"version": "1\0"}, "version"),
        ({"version": "\ud83d"}, "version"),
        ({"version": ("1", "2")}, "version"),
    ],
)
def test_register_refuses_a_bad_argument_without_a_statement(caller, wrong, says):
    with pytest.raises(InvalidArgument) as caught:
        caller.service.workers.register(**{"name": "w"} | wrong)

    assert says in str(caught.value)
    assert caller.sent == []
    caller.is_unharmed()


# ------------------------------------------------------------------------------ autocommit


@pytest.mark.parametrize(
    "enqueue",
    [
        lambda s: s.enqueue("mail", 1),
        lambda s: s.enqueue_many("mail", [1]),
        lambda s: s.enqueue_from("mail", row(payload=1)),
    ],
    ids=["enqueue", "enqueue_many", "enqueue_from"],
)
def test_enqueueing_in_autocommit_is_refused_unless_it_is_asked_for(engine, service, enqueue):
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(autocommit) as session:
        with pytest.raises(NonAtomicEnqueue, match="AUTOCOMMIT"):
            enqueue(QueueService(session))
        assert QueueService(session).messages.metrics("mail").live == 0
        enqueue(QueueService(session, allow_autocommit=True))
        assert QueueService(session).messages.metrics("mail").live == 1


# ----------------------------------------------------------------------------------- async

ASYNC: dict[str, tuple[Callable[[AsyncQueueService], Any], type[PgqrsError], str]] = {
    # A call, its error, and what the error says: what only a statement finds out. The arguments
    # are checked by the same function for both services.
    "unknown queue": (lambda s: s.enqueue("mial", 1), QueueNotFound, "mean 'mail'"),
    "unknown queue of many": (
        lambda s: s.enqueue_many("mial", [1, Item(2, key="k")]),
        QueueNotFound,
        "mean 'mail'",
    ),
    "unknown queue to read": (lambda s: s.dequeue("mial"), QueueNotFound, "mean 'mail'"),
    "too large": (
        lambda s: s.enqueue("mail", "x" * 1_048_575),
        PayloadError,
        "takes 1048577 bytes",
    ),
    "too large among many": (
        lambda s: s.enqueue_many("mail", [1, "é" * 524_288]),
        PayloadError,
        "takes 1048578 bytes",
    ),
    "too large in a query": (
        lambda s: s.enqueue_from("mail", row(payload="x" * 1_048_575)),
        PayloadError,
        "takes 1048577 bytes",
    ),
    "missing message": (lambda s: s.messages.cancel(99), MessageNotFound, "99"),
    "missing archived": (lambda s: s.archived.requeue(99), MessageNotFound, "99"),
    "missing worker": (lambda s: s.dequeue("mail", worker=99), WorkerNotFound, "99"),
}


@each_case(("call", "error", "says"), ASYNC)
async def test_the_async_service_refuses_the_same(async_session, async_service, call, error, says):
    first = await async_service.enqueue("mail", "before", delay=60)
    with pytest.raises(error) as caught:
        await call(async_service)
    assert caught.type is error
    assert says in str(caught.value)

    second = await async_service.enqueue("mail", "after")
    await async_session.commit()
    assert [message.id for message in await async_service.messages.find()] == [first.id, second.id]
    await async_service.queues.purge("mail")


async def test_the_async_service_refuses_a_delivery_given_twice(async_service):
    await async_service.enqueue("mail", 1)
    held = await async_service.dequeue("mail")
    with pytest.raises(InvalidArgument, match="twice"):
        await async_service.archive_many(held * 2)
    await async_service.archive_many(held)
    with pytest.raises(LeaseLost, match="is archived"):
        await async_service.archive_many(held)


async def test_an_async_flush_refuses_what_a_flush_refuses(async_session, async_service):
    await async_service.enqueue("mail", 1, key="k")
    await async_session.commit()
    for make, error in (
        (lambda: Message(queue_name="mial", payload=1), QueueNotFound),
        (lambda: Message(queue_name="mail", payload=1, dedup_key="k"), DuplicateMessage),
        (lambda: Message(queue_name="mail", payload="x" * 1_048_575), PayloadError),
    ):
        async_session.add(make())
        with pytest.raises(error):
            await async_session.flush()
        await async_session.rollback()
    assert (await async_service.messages.metrics("mail")).live == 1


# ------------------------------------------------------------------------------ the errors

CLASSES = [
    getattr(errors, name) for name in errors.__all__ if name not in {"Copyable", "Whereabouts"}
]


def test_every_error_has_a_code_of_its_own():
    codes = [cls.code for cls in CLASSES]

    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"PGQ-\d{3}", code) for code in codes)
    assert all("code" in vars(cls) for cls in CLASSES)


def test_every_error_is_public_and_in_the_tree_at_its_place():
    defined = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, PgqrsError)
    }
    assert defined == set(CLASSES)

    above: list[tuple[int, type[PgqrsError]]] = []
    drawn = set()
    for line in errors.__doc__.splitlines():
        if not (found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?", line)):
            continue
        depth, name, builtin = len(found[1]), found[2], found[3]
        cls = getattr(errors, name)
        above = [(d, c) for d, c in above if d < depth]
        assert (PgqrsError if not above else above[-1][1]) in (cls, *cls.__bases__)
        if builtin:
            assert builtin in {base.__name__ for base in cls.__bases__}
        above.append((depth, cls))
        drawn.add(cls)
    assert drawn == defined


def test_every_error_says_in_words_what_its_code_stands_for():
    assert all(inspect.getdoc(cls) for cls in CLASSES)

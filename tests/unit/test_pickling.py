"""Public values survive pickle and copy: process pools and loggers send them on."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import pgqrs_sa
from pgqrs_sa import pgqrs
from pgqrs_sa._core.lease import new_delivery
from pgqrs_sa.errors import Whereabouts
from pgqrs_sa.types import Delivery
from support.cases import each_case

NOW = datetime(2026, 1, 2, tzinfo=UTC)
CONTENT: dict[str, Any] = {
    "id": 1,
    "queue": "mail",
    "text": '{"a": [1]}',
    "decoded": {"a": [1]},
    "headers": {"h": 1},
    "priority": 0,
    "vt": NOW,
    "enqueued_at": NOW,
    "read_ct": 1,
    "max_read_ct": 5,
    "key": None,
    "last_error": None,
}
LOST = {7: Whereabouts(7, "leased", 2, 3, NOW)}
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "PayloadError": (("payload.a", "is bad"), {}),
    "QueueNotFound": (("mial", ["mail"]), {}),
    "QueueNotEmpty": (("mail", 1, 2), {}),
    "MessageNotFound": (([1, 2], "in the queue"), {}),
    "MessageLeased": ((1, NOW), {}),
    "DuplicateMessage": (("k", 1), {}),
    "LeaseLost": ((LOST,), {}),
    "WorkerNotFound": ((1,), {}),
    "WorkerNotReady": ((1, "suspended"), {}),
    "WorkerInUse": ((1, "stopped"), {}),
    "NonAtomicEnqueue": (("something",), {}),
    "SchemaVersionError": ((1, 2, None, "upgrade"), {"subject": "the test"}),
    "ReadTimeout": ((1.5,), {}),
    "IncompleteSchema": (("shop", ["pgqrs_queues"]), {}),
    "TransactionRefused": (("commit", "handler"), {}),
    "SplitTransaction": ((["a"], ["b"]), {}),
    "HandlerTimeout": (("handler", 3.5, "where"), {}),
    "PoolTooSmall": ((1, 2, "why"), {}),
    "ReadOnlyDatabase": ((), {"standby": True}),
    "RetryIn": ((60,), {}),
    "Snooze": ((timedelta(minutes=1),), {}),
    "Discard": (("why",), {}),
    "DeadLetter": (("why",), {}),
    "QueueExists": (("mail",), {}),
    "QueueInUse": (("mail", [1]), {}),
    "InvalidStateTransition": (("ready", "stopped"), {}),
    "WorkerHasPendingMessages": ((1, [2]), {}),
    "NotRegistered": ((), {}),
    "InvalidWorkerType": ((1,), {}),
    "RateLimited": ((0.5, 10), {}),
    "NotIntact": (({"missing_tables": 1},), {}),
}
"""Of the classes whose constructor takes something else than a text."""


def public(module: Any) -> list[type[BaseException]]:
    found = [getattr(module, name) for name in module.__all__]
    return [row for row in found if isinstance(row, type) and issubclass(row, BaseException)]


ERRORS = [*public(pgqrs_sa), *public(pgqrs)]
ROADS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {number}": lambda value, number=number: pickle.loads(pickle.dumps(value, number))  # noqa: S301
        for number in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
roads = each_case("road", ROADS)


def made(kind: type[BaseException]) -> BaseException:
    arguments, options = ARGUMENTS.get(kind.__name__, (("a text",), {}))
    error = kind(*arguments, **options)
    error.add_note("a note")
    return error


@roads
@each_case("kind", ERRORS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_an_error_or_decision_comes_back_with_its_text_and_attributes(kind, road):
    error = made(kind)
    back = road(error)
    assert type(back) is kind
    assert back is not error
    assert (str(back), repr(back), back.args) == (str(error), repr(error), error.args)
    assert vars(back) == vars(error)
    assert getattr(back, "code", None) == getattr(error, "code", None)
    assert road(back).args == error.args


@roads
def test_errors_of_a_hosts_own_come_back_as_well(road):
    back = road(Own(7, hint="x"))
    assert (type(back), str(back), back.hint) == (Own, "7 is wrong", "x")


class Own(pgqrs_sa.PgqrsError):
    def __init__(self, number: int, *, hint: str) -> None:
        super().__init__(f"{number} is wrong")
        self.hint = hint


VALUES = [
    pgqrs_sa.Delivery(**CONTENT, leased_until=NOW, fencing_token=9, worker_id=3),
    pgqrs_sa.Item({"a": 1}, delay=timedelta(1), headers={"h": 1}),
    pgqrs_sa.Receipt(1, NOW, duplicate=True),
    pgqrs_sa.Failure(1, True, None),
    pgqrs_sa.Backoff(base=1, cap=9),
    pgqrs_sa.DEFAULT_BACKOFF,
    pgqrs_sa.Retry(max_attempts=3),
    pgqrs_sa.JsonCodec(),
    pgqrs_sa.Models(),
    Whereabouts(7, "leased", 2, 3, NOW),
]


@roads
@each_case("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal(value, road):
    back = road(value)
    assert type(back) is type(value)
    if dataclasses.is_dataclass(value):
        assert back == value


@roads
def test_a_retry_comes_back_with_its_decisions(road):
    on = {ValueError: pgqrs_sa.DeadLetter("no"), KeyError: pgqrs_sa.Snooze(5)}
    back = road(pgqrs_sa.Retry(max_attempts=3, on=on))
    assert (back.max_attempts, str(back.on[ValueError])) == (3, "no")
    assert back.on[KeyError].delay == timedelta(seconds=5)


@roads
def test_an_event_comes_back_with_its_error(road):
    event = pgqrs_sa.Event(VALUES[0], "retry", "send", 1, error=pgqrs_sa.QueueNotFound("mial"))
    back = road(event)
    assert (back.delivery, str(back.error)) == (event.delivery, str(event.error))


def test_a_delivery_that_is_renewed_here_is_not_renewed_elsewhere():
    watched = dataclasses.replace(VALUES[0], watch=lambda: True)
    assert watched.lease_lost
    for same in (copy.copy(watched), copy.deepcopy(watched)):
        assert same == watched
        assert same.lease_lost
    back = pickle.loads(pickle.dumps(watched))  # noqa: S301
    assert back == watched
    assert back.payload == watched.payload
    assert not back.lease_lost


def test_a_deep_copy_of_a_delivery_has_a_payload_of_its_own():
    copied = copy.deepcopy(VALUES[0])
    copied.payload["a"].append(2)
    assert VALUES[0].payload == {"a": [1]}


def test_a_delivery_that_is_made_quickly_is_a_delivery():
    values = [field.name for field in dataclasses.fields(Delivery) if field.name != "watch"]
    delivery = new_delivery(*values)  # type: ignore[arg-type]
    assert type(delivery) is Delivery
    assert delivery == Delivery(*values)  # type: ignore[arg-type]
    assert dataclasses.astuple(delivery) == dataclasses.astuple(Delivery(*values))  # type: ignore[arg-type]
    assert delivery.lease_lost is False
    for name in (*values, "watch"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(delivery, name, None)

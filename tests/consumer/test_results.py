"""What a handler may return; and that what has not run, or is no decision, fails its attempt."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import logging
from collections import ChainMap, UserList, deque
from collections.abc import Collection
from unittest.mock import MagicMock

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import Backoff, DeadLetter, Delivery, InvalidResult, Retry, RetryIn, Snooze
from pgqrs_sa.consumer import results
from pgqrs_sa.consumer.disposition import dispositions_for_result
from pgqrs_sa.consumer.handlers import Invocation
from pgqrs_sa.consumer.invocation import after_return
from support.cases import each_case
from support.consumers import Kit, effect
from support.handlers import delivery, handlers


def unit(count=1, **options):
    (handler,) = handlers(options)
    return Invocation(handler, tuple(delivery(n + 1) for n in range(count)))


async def coroutine():
    """Never runs."""
    raise AssertionError


def generator():
    yield


async def async_generator():
    yield


@contextlib.contextmanager
def managed():
    yield


@contextlib.asynccontextmanager
async def async_managed():
    yield


def function():
    """Is never called."""


class Awaited:
    def __await__(self):
        yield


class AsyncIterated:
    def __aiter__(self):
        return async_generator()


class Iterated:
    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


@dataclasses.dataclass
class Wrapper:
    value: object


@dataclasses.dataclass(slots=True)
class Slotted:
    value: object


NOT_RUN = {
    "coroutine": coroutine,
    "awaitable": Awaited,
    "future": concurrent.futures.Future,
    "generator": generator,
    "async_generator": async_generator,
    "context manager": managed,
    "async context manager": async_managed,
    "map": lambda: map(print, [1]),
    "filter": lambda: filter(print, [1]),
    "starmap": lambda: itertools.starmap(print, [[1]]),
    "zip": lambda: zip([1], strict=True),
    "chain": lambda: itertools.chain(generator()),
    "islice": lambda: itertools.islice(generator(), 1),
    "list iterator": lambda: iter([1]),
    "iterator": Iterated,
    "async iterable": AsyncIterated,
    "function": lambda: function,
    "builtin": lambda: print,
    "method": lambda: "text".upper,
    "partial": lambda: functools.partial(function),
    "class": lambda: Awaited,
}
NOT_MEANT = {
    "decision class": lambda: Snooze,
    "other decision class": lambda: DeadLetter,
    "exception class": lambda: ValueError,
    "retry": lambda: Retry(max_attempts=3),
    "backoff": Backoff,
    "exception": lambda: ValueError("hunter2"),
    "group": lambda: ExceptionGroup("hunter2", [ValueError("hunter2")]),
}
REFUSED = NOT_RUN | NOT_MEANT
INSIDE = {
    "list": lambda value: [value],
    "tuple": lambda value: (True, value),
    "dict": lambda value: {"a": 1, "b": value},
    "deque": lambda value: deque([value]),
    "nested": lambda value: [1, {"a": (value,)}],
    "nested deep": lambda value: functools.reduce(lambda inner, _: [inner], range(500), value),
    "values of a dict": lambda value: {"a": value}.values(),
    "items of a dict": lambda value: {"a": value}.items(),
    "UserList": lambda value: UserList([value]),
    "ChainMap": lambda value: ChainMap({}, {"a": value}),
    "key of a dict": lambda value: {value: 1},
    "after others": lambda value: [*range(900), value],
}
FIELDS = {
    "dataclass": Wrapper,
    "dataclass with slots": Slotted,
    "nested": lambda v: [Wrapper((v,))],
}


@each_case("made", REFUSED)
@each_case("acknowledge", ["commit", "manual", "first"])
def test_what_has_not_run_or_is_no_decision_is_refused(made, acknowledge):
    with pytest.raises(InvalidResult) as caught:
        after_return(unit(acknowledge=acknowledge), made())
    assert "returned" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@each_case(
    ("kind", "told"),
    [
        ("coroutine", "a coroutine, whose work has not run: await it"),
        ("awaitable", "a Awaited, whose work may not have run: wait for it"),
        ("generator", "a generator, whose work has not run: use it up"),
        ("function", "the function function: call it in the handler"),
        ("class", "the class Awaited: call it in the handler"),
        ("partial", "the function partial: call it in the handler"),
        ("decision class", "the class Snooze: return an instance"),
        ("retry", "a Retry, which is for retry=: return RetryIn"),
        ("exception", "the exception ValueError: raise it"),
    ],
)
def test_the_error_says_what_to_do_instead(kind, told):
    with pytest.raises(InvalidResult, match=f"returned {told}"):
        dispositions_for_result(unit(), REFUSED[kind]())


def test_nothing_is_a_result_for_each_message_of_a_batch():
    assert results.read(unit(2, batch=2), None) == [None, None]


def test_a_container_that_contains_itself_is_a_plain_value():
    value: list[object] = []
    value.append(value)
    assert [disposition.action for disposition in dispositions_for_result(unit(), value)] == [
        "archive"
    ]


@each_case("wrap", INSIDE)
@each_case("made", [coroutine, generator, lambda: Snooze, lambda: RetryIn(60)])
def test_a_container_of_these_or_of_decisions_is_refused(made, wrap):
    with pytest.raises(InvalidResult, match="that contains"):
        dispositions_for_result(unit(), wrap(made()))


@each_case("wrap", FIELDS)
@each_case("made", [coroutine, generator, AsyncIterated, lambda: RetryIn(60)])
def test_work_or_a_decision_in_a_field_of_a_dataclass_is_refused(made, wrap):
    with pytest.raises(InvalidResult, match="that contains"):
        dispositions_for_result(unit(), wrap(made()))


@each_case("value", [print, Snooze, ValueError("x"), delivery(1)])
def test_a_dataclass_may_have_functions_classes_and_errors_in_its_fields(value):
    assert [
        disposition.action for disposition in dispositions_for_result(unit(), Wrapper(value))
    ] == ["archive"]


def test_a_delivery_is_a_plain_value():
    assert [disposition.action for disposition in dispositions_for_result(unit(), delivery(1))] == [
        "archive"
    ]


class Stream(Iterated):
    def read(self):
        return ""


class Cursor(AsyncIterated):
    def fetchall(self):
        return []


@each_case("made", [io.StringIO, io.BytesIO, Stream, Cursor, lambda: [Cursor()]])
def test_a_file_a_stream_and_a_cursor_are_plain_values(made):
    assert [disposition.action for disposition in dispositions_for_result(unit(), made())] == [
        "archive"
    ]


def test_the_result_of_a_statement_is_a_plain_value(engine):
    with Session(engine) as session:
        item = sa.select(sa.literal(1))
        for result in (
            session.execute(item),
            session.scalars(item),
            session.execute(item).mappings(),
        ):
            assert [found.action for found in dispositions_for_result(unit(), result)] == [
                "archive"
            ]


def test_a_result_that_contains_itself_is_looked_at_once():
    cyclic: list[object] = [1]
    cyclic += [cyclic, {"again": cyclic}, Wrapper(cyclic)]
    assert [disposition.action for disposition in dispositions_for_result(unit(), cyclic)] == [
        "archive"
    ]
    cyclic.append(lost := coroutine())
    with pytest.raises(InvalidResult):
        dispositions_for_result(unit(), cyclic)
    assert inspect.getcoroutinestate(lost) == inspect.CORO_CLOSED


class Endless(Collection):
    """A collection of collections, each of its own."""

    made = 0

    def __len__(self):
        return 10**12

    def __contains__(self, _value):
        return False

    def __iter__(self):
        while True:
            Endless.made += 1
            yield Endless()


def test_a_huge_result_costs_a_bounded_look():
    for huge in (range(10**12), Endless()):
        assert [disposition.action for disposition in dispositions_for_result(unit(), huge)] == [
            "archive"
        ]
    assert Endless.made <= 1_000


class Text(str):
    __slots__ = ()


def test_what_comes_again_and_the_letters_of_a_text_are_not_looked_at():
    """Otherwise their siblings would not be: only a limited number of values is."""
    shared = [[n] for n in range(results.LOOKED_AT // 4)]
    for value in ([shared] * 8, [Text("x" * results.LOOKED_AT)]):
        with pytest.raises(InvalidResult):
            dispositions_for_result(unit(), [*value, [[[Snooze]]]])


def test_the_members_of_a_field_are_judged_as_the_field_is():
    assert [
        disposition.action
        for disposition in dispositions_for_result(unit(), Wrapper([print, Snooze]))
    ] == ["archive"]


@dataclasses.dataclass
class Later:
    """A class whose attribute is a decision: the default of its instances."""

    decision: object = Snooze(60)


def test_a_class_in_a_field_is_not_looked_at():
    assert [
        disposition.action for disposition in dispositions_for_result(unit(), Wrapper(Later))
    ] == ["archive"]


def test_what_is_read_once_is_not_read_by_the_look():
    stream = io.StringIO("one\ntwo\n")
    dispositions_for_result(unit(), stream)
    assert stream.readline() == "one\n"


class Broken(Endless):
    def __iter__(self):
        raise RuntimeError("not now")


def test_a_collection_that_cannot_be_read_is_a_plain_value():
    assert [disposition.action for disposition in dispositions_for_result(unit(), [Broken()])] == [
        "archive"
    ]


@each_case("made", [*NOT_RUN.values(), lambda: Snooze, lambda: [RetryIn(1)], Retry])
@each_case("as_mapping", [True, False])
def test_each_result_of_a_batch_obeys_the_same_rule(made, as_mapping):
    results = [None, made()]
    with pytest.raises(InvalidResult):
        dispositions_for_result(
            unit(2, batch=2), dict(enumerate(results, 1)) if as_mapping else results
        )


@each_case("made", [*NOT_RUN.values(), lambda: Snooze, lambda: ValueError("x")])
def test_a_batch_that_returns_such_a_thing_for_all_is_refused(made):
    with pytest.raises(InvalidResult):
        dispositions_for_result(unit(2, batch=2), made())


@each_case(
    "value", [None, True, 0, 1.5, "text", b"x", {}, {"a": [1]}, [], [[1]], (), {1}, object()]
)
def test_a_plain_value_is_ignored(value):
    assert [disposition.action for disposition in dispositions_for_result(unit(), value)] == [
        "archive"
    ]
    assert [
        disposition.action
        for disposition in dispositions_for_result(unit(2, batch=2), [value, None])
    ] == ["archive"] * 2


def test_an_object_with_every_attribute_is_a_plain_value():
    assert [disposition.action for disposition in dispositions_for_result(unit(), MagicMock())] == [
        "archive"
    ]


def test_an_exception_is_told_as_the_cause():
    error = ValueError("no such address")
    for returned in (error, [error]):
        with pytest.raises(InvalidResult, match="ValueError: raise it") as caught:
            dispositions_for_result(unit(), returned)
        assert caught.value.__cause__ is error


def test_work_that_nobody_waits_for_is_ended():
    lost, inner, future = coroutine(), coroutine(), concurrent.futures.Future()
    begun = generator()
    next(begun)
    for result in (lost, [1, inner, future, begun]):
        with pytest.raises(InvalidResult):
            dispositions_for_result(unit(), result)
    for case in (lost, inner):
        assert inspect.getcoroutinestate(case) == inspect.CORO_CLOSED
    assert future.cancelled()
    assert inspect.getgeneratorstate(begun) == inspect.GEN_CLOSED


async def test_a_task_that_nobody_waits_for_is_cancelled():
    task = asyncio.create_task(asyncio.sleep(60))
    with pytest.raises(InvalidResult, match="returned a Task"):
        dispositions_for_result(unit(), task)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


# -------------------------------------------------------------------------------- in a consumer


@each_case("session", [True, False])
@each_case("made", [coroutine, generator, lambda: Snooze, lambda: [RetryIn(1)]], before="cleared")
def test_the_attempt_fails_and_its_writes_are_rolled_back(kit, made, session):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=1000))

    @consumer.on("mail", session=session)
    def handler(session, delivery):
        if session is not None:
            effect(session, delivery)
        return made()

    assert consumer.run() == 0
    assert (kit.outcomes(), kit.effects(), kit.held()) == ({}, [], [])
    assert kit.live()[id_].read_ct == 1
    assert "InvalidResult" in kit.live()[id_].last_error
    assert "handler" in kit.live()[id_].last_error or "one" in kit.live()[id_].last_error


def test_the_text_of_an_exception_that_was_returned_is_kept(kit):
    (id_,) = kit.send({})
    consumer = kit.consumer(retry=Retry(base=1000))
    consumer.on("mail")(lambda _session, _delivery: ValueError("no such address"))

    assert consumer.run() == 0
    assert "raise it" in kit.live()[id_].last_error
    assert "ValueError: no such address" in kit.live()[id_].last_error


def test_acknowledged_first_it_is_told_in_the_log(kit, caplog):
    (id_,) = kit.send({})
    consumer = kit.consumer()
    consumer.on("mail", acknowledge="first")(lambda _session, _delivery: coroutine())

    assert consumer.run() == 0
    assert kit.outcomes() == {id_: "archived"}
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "failed after its acknowledgement: InvalidResult" in record.getMessage()


class Callables:
    """Handlers whose work is a coroutine, though each of them is a plain function."""

    def __init__(self, seen: list[int]) -> None:
        async def work(payload: int) -> None:
            seen.append(payload)

        async def noted(payload: int, prefix: str = "") -> None:
            seen.append(payload)

        @functools.wraps(work)
        def wrapped(*args, **kwargs):
            return work(*args, **kwargs)

        @functools.wraps(wrapped)
        def twice(*args, **kwargs):
            return wrapped(*args, **kwargs)

        @functools.wraps(noted)
        def partly(*args, **kwargs):
            return noted(*args, **kwargs)

        class Calls:
            async def __call__(self, payload: int) -> None:
                seen.append(payload)

            def method(self, payload: int):
                return work(payload)

        @functools.wraps(Calls())
        def of_object(payload: int):
            return Calls()(payload)

        self.wrapped = {
            "wrapped": wrapped,
            "twice": twice,
            "partial": functools.partial(partly, prefix="x"),
            "object": of_object,
        }

        def lazily(payload: int):
            yield seen.append(payload)

        self.plain = {
            "lambda": lambda payload: work(payload),  # noqa: PLW0108 - it is what is tested
            "method": Calls().method,
            "generator": functools.wraps(lazily)(lambda payload: lazily(payload)),  # noqa: PLW0108
        }


@each_case("name", ["wrapped", "twice", "partial", "object"], before="cleared")
def test_a_task_awaits_a_wrapped_coroutine_function(tasks: Kit, name):
    seen: list[int] = []
    tasks.send(1, 2)
    consumer = tasks.consumer()
    consumer.consumer.on("mail")(Callables(seen).wrapped[name])

    assert consumer.run() == 0
    assert (sorted(seen), set(tasks.outcomes().values())) == ([1, 2], {"archived"})


@each_case(
    "name",
    ["wrapped", "twice", "partial", "object", "lambda", "method", "generator"],
    before="cleared",
)
@pytest.mark.filterwarnings("error")
def test_a_thread_that_gets_a_coroutine_has_not_worked(threads: Kit, name):
    seen: list[int] = []
    callables = Callables(seen)
    (id_,) = threads.send(1)
    consumer = threads.consumer(retry=Retry(base=1000))
    consumer.consumer.on("mail")((callables.wrapped | callables.plain)[name])

    assert consumer.run() == 0
    assert (seen, threads.outcomes()) == ([], {})
    assert "whose work has not run" in threads.live()[id_].last_error


def test_a_decorator_may_decide_without_its_coroutine(tasks: Kit):
    (id_,) = tasks.send({})
    consumer = tasks.consumer()

    async def work(session: AsyncSession, delivery: Delivery) -> None:
        raise AssertionError

    @consumer.consumer.on("mail")
    @functools.wraps(work)
    def never(**_arguments):
        return DeadLetter("not today")

    assert consumer.run() == 0
    assert tasks.archive()[id_].reason == "not today"


def test_a_decorator_may_run_its_coroutine_in_a_thread(threads: Kit):
    (id_,) = threads.send({})
    consumer = threads.consumer()
    seen = []

    async def work(session: Session, delivery: Delivery) -> None:
        effect(session, delivery)
        seen.append(delivery.id)

    @consumer.consumer.on("mail")
    @functools.wraps(work)
    def run(**arguments):
        return asyncio.run(work(**arguments))

    assert consumer.run() == 0
    assert (seen, threads.outcomes()) == ([id_], {id_: "archived"})

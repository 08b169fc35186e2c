"""What a handler may return: decided here, for consumers, `testing.drain` and `testing.work_one`.

========================================  =======================================================
a handler returns                         what becomes of its message
========================================  =======================================================
``None``                                  it is archived
a decision: ``Snooze(60)``                what the decision says
another plain value: ``True``, a dict     it is archived; the value is ignored
from a batch: ``None``, or a decision     the same, for each message
from a batch: a mapping, or a list        each value is read as above; an exception is the failure
                                          of that message
anything else from a batch                the attempt has failed
work that may not have run: a coroutine,  the attempt has failed
a task, an iterator, a function
what was to be a decision: a class, a     the attempt has failed
`Retry`, an exception
a collection, or a dataclass, that        the attempt has failed
contains such a thing, or a decision
========================================  =======================================================

A collection is a `Collection` of Python that is no text: its members are looked at, of a mapping
the keys too, and so on at any depth. A dataclass may have functions, classes and exceptions in its
fields. At most `LOOKED_AT` values are looked at for each message: what comes after these is not
refused. A file, a stream and a cursor are iterators, but plain values: what has ``read()`` or
``fetchall()`` gives access to data, and no work of the handler's waits in it.

An attempt that has failed so raises `InvalidResult` in the handler's transaction, which rolls back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import inspect
from collections import deque
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from itertools import chain, islice
from typing import Any

from ..decisions import Backoff, Decision, Retry
from ..errors import InvalidResult
from .handlers import Invocation

__all__ = ["LOOKED_AT", "read"]

LOOKED_AT = 1_000
"""How many values of a result are looked at, those of the upper levels first.

The look takes time from the commit (measured: 3 ms for as many numbers or texts, at most 30 ms for
as many objects, on a busy machine).
"""

_LAZY = (
    Iterator,
    AsyncIterable,
    contextlib._GeneratorContextManager,  # noqa: SLF001 - of @contextmanager: not entered
    contextlib._AsyncGeneratorContextManager,  # noqa: SLF001
)
_TEXTS = (str, bytes, bytearray, memoryview)
_ATOMS = frozenset({*_TEXTS, type(None), bool, int, float, complex})
"""Types whose instances need no look. Most values of a large result are of these."""


def read(invocation: Invocation, result: Any) -> list[Any]:
    """Return what a handler returned for each of its messages.

    Args:
        invocation: What the handler worked on.
        result: What it returned.

    Returns:
        Plain values and decisions, in the order of the messages; of a batch exceptions, too.

    Raises:
        InvalidResult: nothing of that kind may be returned. What was to run is ended.
    """
    name, count = invocation.handler.name, len(invocation.deliveries)
    if result is None or isinstance(result, Decision):
        return [result] * count
    if not invocation.handler.call.many:
        _check(name, result)
        return [result]
    _check(name, result, most=1)  # what it contains is looked at message by message
    results = _by_delivery(invocation, result)
    for value in results:
        if not isinstance(value, BaseException):
            _check(name, value)
    return results


def _by_delivery(invocation: Invocation, result: Any) -> list[Any]:
    name = invocation.handler.name
    if isinstance(result, Mapping):
        by_id = {getattr(key, "id", key): value for key, value in result.items()}
        if strays := by_id.keys() - {delivery.id for delivery in invocation.deliveries}:
            # Keys that are no ids may be anything of the payload's.
            ids = sorted(key for key in strays if isinstance(key, int))
            raise InvalidResult(
                f"{name} returned results for messages that it was not given: "
                f"{ids or 'its keys are neither deliveries nor ids'}"
            )
        return [by_id.get(delivery.id) for delivery in invocation.deliveries]
    if isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        if len(result) == len(invocation.deliveries):
            return list(result)
        raise InvalidResult(
            f"{name} returned {len(result)} results for {len(invocation.deliveries)} messages"
        )
    raise InvalidResult(
        f"{name} returned a {type(result).__name__}: a batch's handler returns None, "
        "a decision, or one result for each message (a mapping by delivery, or a list)"
    )


def _check(name: str, result: Any, most: int = LOOKED_AT) -> None:
    """Raise `InvalidResult` unless a result is plain, and end the work that it stands for."""
    found = [] if isinstance(result, Decision) else list(_wrong(result, most))
    if not found:
        return
    for value in found:
        _end(value)
    where = "" if found[0] is result else f"a {type(result).__name__} that contains "
    problem = "a decision" if isinstance(found[0], Decision) else _problem(found[0])
    cause = next((value for value in found if isinstance(value, BaseException)), None)
    raise InvalidResult(f"{name} returned {where}{problem}") from cause


def _wrong(result: Any, most: int) -> Iterator[Any]:
    """Yield what must not be returned, and all of it: each is to be ended."""
    # Level by level, so that a long first list does not hide its siblings. The members of a field
    # are judged as its value is. What is kept in `seen` cannot lose its id to another object.
    level: deque[tuple[Any, bool]] = deque([(result, False)])
    seen: dict[int, Any] = {}
    left = most - 1
    while level:
        value, in_field = level.popleft()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Decision) or (_waiting if in_field else _problem)(value):
            yield value
            continue
        members, of_fields = _members(value)
        with contextlib.suppress(Exception):  # of a class of the host's, which cannot be read
            for member in islice(members, left):
                left -= 1
                level.append((member, in_field or of_fields))


def _members(value: Any) -> tuple[Iterable[Any], bool]:
    """Return what a value contains, and whether that is in the fields of a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _field_values(value), True
    if isinstance(value, _TEXTS) or not isinstance(value, Collection):
        return (), False
    return (chain.from_iterable(_pairs(value)) if isinstance(value, Mapping) else value), False


def _pairs(mapping: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    yield from mapping.items()


def _field_values(value: Any) -> Iterator[Any]:
    """Yield the fields that are set, and load nothing: it may be a mapped object of the host's."""
    if (attributes := getattr(value, "__dict__", None)) is None:
        yield from (getattr(value, field.name, None) for field in dataclasses.fields(value))
    else:
        yield from (attributes.get(field.name) for field in dataclasses.fields(value))


def _waiting(value: Any) -> str | None:
    """Say how to do the work that waits in a value, if any does."""
    kind = type(value)
    if callable(getattr(kind, "read", None)) or callable(getattr(kind, "fetchall", None)):
        return None
    if isinstance(value, Coroutine):
        how = "whose work has not run: await it, in an async def for AsyncConsumer"
    elif isinstance(value, (Awaitable, concurrent.futures.Future)):
        how = "whose work may not have run: wait for it in the handler"
    elif isinstance(value, _LAZY) and not isinstance(value, Collection):
        how = "whose work has not run: use it up in the handler"
    else:
        return None
    return f"a {kind.__name__}, {how}"


def _problem(value: Any) -> str | None:
    """Say what is wrong with a value as a result: without its text, which may be a payload's."""
    kind, problem = type(value).__name__, _waiting(value)
    if problem is not None:
        return problem
    match value:
        case None | bool() | int() | float() | str() | bytes() | Decision():
            pass
        case type() if issubclass(value, Decision):
            problem = f"the class {value.__name__}: return an instance, with its arguments"
        case _ if isinstance(value, (type, partial)) or inspect.isroutine(value):
            problem = f"{_named(value)}: call it in the handler"
        case Retry() | Backoff():
            problem = f"a {kind}, which is for retry=: return RetryIn(seconds)"
        case BaseException():
            problem = f"the exception {kind}: raise it"
    return problem


def _named(value: Any) -> str:
    what = "the class" if isinstance(value, type) else "the function"
    return f"{what} {getattr(value, '__qualname__', type(value).__name__)}"


def _end(value: Any) -> None:
    """End work that nobody will wait for: the message comes again, and the work with it."""
    with contextlib.suppress(Exception):
        if isinstance(value, asyncio.Future):
            value.get_loop().call_soon_threadsafe(value.cancel)
        elif isinstance(value, concurrent.futures.Future):
            value.cancel()
        elif isinstance(value, (Coroutine, Generator)):
            value.close()

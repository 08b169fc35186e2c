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
work that has not run: a coroutine, a     the attempt has failed
task, a generator, a function
what was to be a decision: a class, a     the attempt has failed
`Retry`, an exception, a list of these
========================================  =======================================================

An attempt that has failed so raises `InvalidResult` in the handler's transaction, which rolls back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from itertools import starmap
from typing import Any

from ..decisions import Decision
from ..errors import InvalidResult
from ..retry import Backoff, Retry
from .handlers import Unit

__all__ = ["read"]

_LAZY = (
    Generator,
    AsyncGenerator,
    map,
    filter,
    starmap,
    contextlib._GeneratorContextManager,  # noqa: SLF001 - of @contextmanager: not entered
    contextlib._AsyncGeneratorContextManager,  # noqa: SLF001
)
_CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)
_DEPTH = 3
"""How far containers within containers are looked into."""


def read(unit: Unit, result: Any) -> list[Any]:
    """Return what a handler returned for each of its messages.

    Args:
        unit: What the handler worked on.
        result: What it returned.

    Returns:
        Plain values and decisions, in the order of the messages; of a batch exceptions, too.

    Raises:
        InvalidResult: nothing of that kind may be returned. What was to run is ended.
    """
    name, count = unit.handler.name, len(unit.deliveries)
    if result is None or isinstance(result, Decision):
        return [result] * count
    if not unit.handler.call.many:
        _check(name, result)
        return [result]
    _check(name, result, depth=0)
    results = _by_delivery(unit, result)
    for value in results:
        if not isinstance(value, BaseException):
            _check(name, value)
    return results


def _by_delivery(unit: Unit, result: Any) -> list[Any]:
    name = unit.handler.name
    if isinstance(result, Mapping):
        by_id = {getattr(key, "id", key): value for key, value in result.items()}
        if strays := by_id.keys() - {delivery.id for delivery in unit.deliveries}:
            # Keys that are no ids may be anything of the payload's.
            ids = sorted(key for key in strays if isinstance(key, int))
            raise InvalidResult(
                f"{name} returned results for messages that it was not given: "
                f"{ids or 'its keys are neither deliveries nor ids'}"
            )
        return [by_id.get(delivery.id) for delivery in unit.deliveries]
    if isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        if len(result) == len(unit.deliveries):
            return list(result)
        raise InvalidResult(
            f"{name} returned {len(result)} results for {len(unit.deliveries)} messages"
        )
    raise InvalidResult(
        f"{name} returned a {type(result).__name__}: a batch's handler returns None, "
        "a decision, or one result for each message (a mapping by delivery, or a list)"
    )


def _check(name: str, result: Any, depth: int = _DEPTH) -> None:
    """Raise `InvalidResult` unless a result is plain, and end the work that it stands for."""
    found = [] if isinstance(result, Decision) else list(_wrong(result, depth))
    if not found:
        return
    for value in found:
        _end(value)
    where = "" if found[0] is result else f"a {type(result).__name__} that contains "
    problem = "a decision" if isinstance(found[0], Decision) else _problem(found[0])
    cause = next((value for value in found if isinstance(value, BaseException)), None)
    raise InvalidResult(f"{name} returned {where}{problem}") from cause


def _wrong(value: Any, depth: int) -> Iterator[Any]:
    """Yield what must not be returned, and all of it: each is to be ended."""
    if isinstance(value, Decision) or _problem(value) is not None:
        yield value
    elif depth > 0 and isinstance(value, _CONTAINERS):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _wrong(inner, depth - 1)


def _problem(value: Any) -> str | None:
    """Say what is wrong with a value as a result: without its text, which may be a payload's."""
    kind, problem = type(value).__name__, None
    match value:
        case None | bool() | int() | float() | str() | bytes() | Decision():
            pass
        case Coroutine():
            problem = (
                f"a {kind}, whose work has not run: await it, in an async def for AsyncConsumer"
            )
        case Awaitable() | concurrent.futures.Future():
            problem = f"a {kind}, whose work may not have run: wait for it in the handler"
        case _ if isinstance(value, _LAZY):
            problem = f"a {kind}, whose work has not run: use it up in the handler"
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

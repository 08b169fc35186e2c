"""Assertions about the messages in a queue, and how a message is compared with what is expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict, overload

import sqlalchemy as sa

from .. import validation
from .._core.scope import Context, Scope, decoded, encoded
from .._core.states import now
from ..codecs import Codec, JsonCodec
from ..errors import PayloadError, safe_repr
from ..models import Models, models_of
from ..resources import Messages
from ..types import MessageInfo, Seconds
from .sessions import SessionLike, perform

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Unpack

    from .sessions import AsyncSessionLike

__all__ = ["Wanted", "all_enqueued", "assert_enqueued", "refute_enqueued"]

_ALL = 2_147_483_647
_LISTED = 20  # messages in the text of a failed assertion
_TEXT = 200  # characters of each payload in it
_VALUE = 100  # characters of each value that differs
_TOLERANCE = 5.0  # seconds


class Wanted(TypedDict, total=False):
    """The expected values of a message; all of them must match.

    Attributes:
        payload: The payload, compared after encoding and decoding: tuples are lists.
        payload__contains: A part of the payload, by the rules of PostgreSQL's ``@>``: an object
            with at least these names, an array with at least these elements.
        headers__contains: A part of the headers, by the same rules.
        delay: Seconds, or a timedelta, from now until it becomes visible; 0 if it is visible
            already. Or ``pytest.approx(seconds, abs=...)``, with its own tolerance.
        at: The aware datetime at which it becomes visible.
        tolerance: By how much ``delay`` and ``at`` may differ: seconds, or a timedelta; default: 5
            seconds.
        priority: The priority.
        key: The key; None for no key.
    """

    payload: Any
    payload__contains: Any
    headers__contains: Mapping[str, Any]
    delay: object
    at: datetime
    tolerance: Seconds
    priority: int
    key: str | None


@dataclass(frozen=True, slots=True)
class _Seen:
    messages: Sequence[MessageInfo]
    now: datetime

    def matching(self, wanted: Mapping[str, Any]) -> list[MessageInfo]:
        return [message for message in self.messages if not differences(message, wanted, self.now)]


class _Tables(TypedDict, total=False):
    models: Models | None
    codec: Codec | None


class _Refuted(Wanted, _Tables, total=False):
    pass


class _Asserted(_Refuted, total=False):
    count: int | None


@overload
def all_enqueued(
    session: SessionLike, queue: str | None = None, **options: Unpack[_Tables]
) -> list[MessageInfo]: ...
@overload
def all_enqueued(
    session: AsyncSessionLike, queue: str | None = None, **options: Unpack[_Tables]
) -> Coroutine[Any, Any, list[MessageInfo]]: ...
def all_enqueued(
    session: Any,
    queue: str | None = None,
    *,
    models: Models | None = None,
    codec: Codec | None = None,
) -> Any:
    """Return the live messages, including those that the session has not flushed yet.

    Args:
        session: The test's session; with an ``AsyncSession`` the result is awaited.
        queue: The name of a queue; default: all queues.
        models: A host's own classes; default: the ready-made classes.
        codec: Converts JSON text to payloads; default: strict standard JSON.

    Returns:
        The messages of every state, in the order of their ids. Messages that a handler has settled
        are no longer live: see ``service.archived``.

    Raises:
        QueueNotFound: with similar names.
    """
    context = Context.of(models_of(models), codec, None, allow_autocommit=True)
    return perform(
        session, lambda it: _look(Scope(it, context), queue), lambda seen: list(seen.messages)
    )


@overload
def assert_enqueued(
    session: SessionLike, queue: str, **options: Unpack[_Asserted]
) -> list[MessageInfo]: ...
@overload
def assert_enqueued(
    session: AsyncSessionLike, queue: str, **options: Unpack[_Asserted]
) -> Coroutine[Any, Any, list[MessageInfo]]: ...
def assert_enqueued(
    session: Any,
    queue: str,
    *,
    count: int | None = None,
    models: Models | None = None,
    codec: Codec | None = None,
    **wanted: Any,
) -> Any:
    """Assert that a queue has a message like this.

    Args:
        session: The test's session, which is flushed first. With an ``AsyncSession`` the result is
            awaited.
        queue: The name of a queue.
        count: The exact number of messages that must match; default: one or more.
        models: A host's own classes; default: the ready-made classes.
        codec: Converts payloads to JSON text and back; default: strict standard JSON.
        wanted: The expected values, see `Wanted`: ``payload``, ``payload__contains``,
            ``headers__contains``, ``delay``, ``at``, ``tolerance``, ``priority``, ``key``.

    Returns:
        The live messages that match, in the order of their ids.

    Raises:
        AssertionError: it lists the messages of the queue, and why the closest does not match.
        QueueNotFound: with similar names.
    """
    __tracebackhide__ = True
    context = Context.of(models_of(models), codec, None, allow_autocommit=True)
    if count is not None:
        validation.validate_number(count, "count")
    expected = checked(wanted, context.codec)

    def judge(seen: _Seen) -> list[MessageInfo]:
        __tracebackhide__ = True
        found = seen.matching(expected)
        if len(found) == count or (found and count is None):
            return found
        what = _described(wanted)
        headline = (
            f"no message has {what}"
            if not found
            else f"{len(found)} message(s) have {what}, not {count}"
        )
        raise AssertionError(report(headline, queue, seen.messages, expected, seen.now))

    return perform(session, lambda it: _look(Scope(it, context), queue), judge)


@overload
def refute_enqueued(session: SessionLike, queue: str, **options: Unpack[_Refuted]) -> None: ...
@overload
def refute_enqueued(
    session: AsyncSessionLike, queue: str, **options: Unpack[_Refuted]
) -> Coroutine[Any, Any, None]: ...
def refute_enqueued(
    session: Any,
    queue: str,
    *,
    models: Models | None = None,
    codec: Codec | None = None,
    **wanted: Any,
) -> Any:
    """Assert that a queue has no message like this; without expectations, that it is empty.

    Args:
        session: See `assert_enqueued`.
        queue: The name of an existing queue: a misspelt name is an error.
        models: A host's own classes; default: the ready-made classes.
        codec: Converts payloads to JSON text and back; default: strict standard JSON.
        wanted: The values that no message may have together: see `Wanted`.

    Raises:
        AssertionError: it lists the messages that match.
        QueueNotFound: with similar names.
    """
    __tracebackhide__ = True
    context = Context.of(models_of(models), codec, None, allow_autocommit=True)
    expected = checked(wanted, context.codec)

    def judge(seen: _Seen) -> None:
        __tracebackhide__ = True
        if found := seen.matching(expected):
            headline = f"{len(found)} message(s) have {_described(wanted)}, and none should"
            raise AssertionError(report(headline, queue, found, expected, seen.now))

    return perform(session, lambda it: _look(Scope(it, context), queue), judge)


def _look(scope: Scope, queue: str | None) -> _Seen:
    scope.session.flush()  # even if autoflush is off
    messages = Messages(scope).find(queue, limit=_ALL)
    return _Seen(messages, scope.execute(sa.select(now())).scalar_one())


def _described(wanted: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
    return told[:500] or "been enqueued"


_strict = JsonCodec()


def checked(wanted: Mapping[str, Any], codec: Codec) -> dict[str, Any]:
    """Return expectations with their values as the database would return them.

    Raises:
        TypeError: an expectation does not exist.
        PayloadError, DelayError: no message can have this value.
    """
    if strays := wanted.keys() - Wanted.__annotations__.keys():
        known = ", ".join(Wanted.__annotations__)
        raise TypeError(f"unexpected {', '.join(sorted(strays))}: a message has {known}")
    values = dict(wanted)
    for name in ("payload", "payload__contains"):
        if name in values:
            values[name] = _through(codec, values[name], name)
    if "headers__contains" in values:
        text = validation.headers_text(values["headers__contains"])
        values["headers__contains"] = _strict.loads(text or "{}")
    values["tolerance"] = validation.validate_duration(
        values.get("tolerance", _TOLERANCE), "tolerance"
    )
    if isinstance(values.get("delay"), (int, float, timedelta)):
        values["delay"] = validation.validate_duration(values["delay"])
    if "at" in values:
        values["at"] = validation.validate_moment(values["at"])
    return values


def _through(codec: Codec, value: Any, name: str) -> Any:
    found, _ = decoded(codec, 0, encoded(codec, value, name), None)
    if isinstance(found, PayloadError):
        raise found
    return found


def differences(message: MessageInfo, wanted: Mapping[str, Any], now: datetime) -> list[str]:
    """Return one sentence for each expectation that a message does not fulfil.

    Args:
        message: Any live message.
        wanted: The result of `checked`.
        now: The database's clock.
    """
    return list(_differences(message, wanted, now))


def _differences(message: MessageInfo, wanted: Mapping[str, Any], now: datetime) -> Iterator[str]:
    if "payload" in wanted or "payload__contains" in wanted:
        yield from _of_payload(message, wanted)
    if "headers__contains" in wanted:
        problem = lacks(message.headers or {}, wanted["headers__contains"], "headers")
        if problem:
            yield problem
    if "delay" in wanted:
        yield from _of_delay(message, wanted["delay"], wanted["tolerance"], now)
    if "at" in wanted and abs(message.vt - wanted["at"]) > wanted["tolerance"]:
        yield f"it becomes visible at {message.vt.isoformat()}, not {wanted['at'].isoformat()}"
    for name in ("priority", "key"):
        if name in wanted and getattr(message, name) != wanted[name]:
            yield f"{name} is {safe_repr(getattr(message, name), _VALUE)}, not {wanted[name]!r}"


def _of_payload(message: MessageInfo, wanted: Mapping[str, Any]) -> Iterator[str]:
    try:
        payload = message.payload
    except PayloadError as error:
        yield str(error)
        return
    if "payload" in wanted and not same(payload, wanted["payload"]):
        yield f"payload is not {safe_repr(wanted['payload'], _VALUE)}"
    if "payload__contains" in wanted:
        problem = lacks(payload, wanted["payload__contains"], "payload")
        if problem:
            yield problem


def _of_delay(
    message: MessageInfo, wanted: Any, tolerance: timedelta, now: datetime
) -> Iterator[str]:
    found = max(message.vt - now, timedelta(0))
    if isinstance(wanted, timedelta):
        if abs(found - wanted) > tolerance:
            yield f"delay is {_seconds(found)}, not {_seconds(wanted)} ± {_seconds(tolerance)}"
        return
    # pytest.approx, of seconds or of a timedelta, compares for itself.
    spans = isinstance(getattr(wanted, "expected", None), timedelta)
    if (found if spans else found.total_seconds()) != wanted:
        yield f"delay is {_seconds(found)}, not {wanted}"


def _seconds(span: timedelta) -> str:
    return f"{round(span.total_seconds(), 3):g} s"


def same(first: Any, other: Any) -> bool:
    """Return whether two JSON values are equal by JSON's rules: ``true`` is not 1."""
    if isinstance(first, dict) and isinstance(other, dict):
        same_keys = first.keys() == other.keys()
        return same_keys and all(same(first[name], other[name]) for name in first)
    if isinstance(first, list) and isinstance(other, list):
        return len(first) == len(other) and all(map(same, first, other))
    return isinstance(first, bool) is isinstance(other, bool) and bool(first == other)


def lacks(found: Any, wanted: Any, path: str, *, top: bool = True) -> str | None:
    """Return why a JSON value does not contain another, or None if it does.

    The rules are those of PostgreSQL's ``@>``.

    Args:
        found: The value.
        wanted: The value that it should contain.
        path: Its name in the problem.
        top: False for an inner value; only the outermost array contains a single element.
    """
    if isinstance(wanted, dict) and isinstance(found, dict):
        return _object_lacks(found, wanted, path)
    if isinstance(wanted, list) and isinstance(found, list):
        missing = [
            element
            for element in wanted
            if all(lacks(value, element, path, top=False) for value in found)
        ]
    elif top and isinstance(found, list) and not isinstance(wanted, dict):
        missing = [] if any(same(value, wanted) for value in found) else [wanted]
    elif isinstance(wanted, (dict, list)) or not same(found, wanted):
        return f"{path} is {safe_repr(found, _VALUE)}, not {safe_repr(wanted, _VALUE)}"
    else:
        return None
    return f"{path} has no element {safe_repr(missing[0], _VALUE)}" if missing else None


def _object_lacks(found: dict[str, Any], wanted: dict[str, Any], path: str) -> str | None:
    for name, inner in wanted.items():
        if name not in found:
            return f"{path} has no {name!r}"
        if problem := lacks(found[name], inner, f"{path}.{name}", top=False):
            return problem
    return None


def report(
    headline: str,
    queue: str,
    messages: Sequence[MessageInfo],
    wanted: Mapping[str, Any],
    now: datetime,
) -> str:
    """Return the text of a failed assertion: the messages of the queue, and the closest match."""
    if not messages:
        return f"{headline}; the queue {queue!r} is empty"
    problems = {message.id: differences(message, wanted, now) for message in messages}
    closest = min(messages, key=lambda message: len(problems[message.id]))
    # The closest first, so that a shortened list includes it.
    listed = sorted(messages, key=lambda message: message is not closest)[:_LISTED]
    lines = [f"{headline}; in the queue {queue!r} there are {len(messages)} message(s):"]
    for message in listed:
        lines.append(f"  {_line(message, now)}")
        if message is closest and problems[message.id]:
            lines.append(f"      closest, but {'; '.join(problems[message.id])}")
    if len(listed) < len(messages):
        lines.append(f"  and {len(messages) - len(listed)} more")
    return "\n".join(lines)


def _line(message: MessageInfo, now: datetime) -> str:
    text = message.text if len(message.text) <= _TEXT else f"{message.text[:_TEXT]}…"
    parts = [f"{message.id}: {text}", message.state]
    if message.vt > now:
        parts[1] += f" for {_seconds(message.vt - now)}"
    if message.priority:
        parts.append(f"priority {message.priority}")
    if message.key is not None:
        parts.append(f"key {message.key!r}")
    if message.headers:
        parts.append(f"headers {safe_repr(message.headers, _VALUE)}")
    if message.read_ct:
        parts.append(f"attempt {message.read_ct}")
    return ", ".join(parts)

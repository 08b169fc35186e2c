"""Assertions about the messages in a queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict, overload

import sqlalchemy as sa

from .. import validation
from .._core.scope import Context, Scope
from .._core.states import now
from ..codecs import Codec
from ..models import READY_MADE, Models
from ..resources import Messages
from ..types import MessageInfo
from .matching import Wanted, checked, differences, report
from .sessions import SessionLike, perform

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Unpack

    from .sessions import AsyncSessionLike

__all__ = ["all_enqueued", "assert_enqueued", "refute_enqueued"]

_ALL = 2_147_483_647


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
    context = Context.of(models or READY_MADE, codec, None, allow_autocommit=True)
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
    context = Context.of(models or READY_MADE, codec, None, allow_autocommit=True)
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
    context = Context.of(models or READY_MADE, codec, None, allow_autocommit=True)
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

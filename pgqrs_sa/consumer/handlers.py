"""Handlers, and how each wants its messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack, get_args

from .. import validation
from ..decisions import Retry
from ..errors import InvalidArgument, safe_repr
from ..types import Delivery, Seconds
from .signature import HandlerSignature, inspect_handler

__all__ = [
    "HANDLER_DEFAULTS",
    "Acknowledge",
    "Handler",
    "HandlerOptions",
    "Handlers",
    "Invocation",
    "invocations",
]

Acknowledge: TypeAlias = Literal["commit", "first", "manual"]
"""When a message is settled: with the handler's commit (or its return), before it is called (at
most once), or by the handler itself."""

_F = TypeVar("_F", bound=Callable[..., Any])


class HandlerOptions(TypedDict, total=False):
    """The options of `Consumer.on`, which says what each means."""

    lease: Seconds | None
    concurrency: int | None
    prefetch: int
    timeout: Seconds | None
    retry: Retry | None
    batch: int | None
    weight: int
    acknowledge: Acknowledge
    payload: Any


HANDLER_DEFAULTS: dict[str, object] = {
    "lease": None,
    "concurrency": None,
    "prefetch": 0,
    "timeout": None,
    "retry": None,
    "batch": None,
    "weight": 1,
    "acknowledge": "commit",
    "payload": None,
}
"""The defaults of `HandlerOptions`."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A function and its options; see `Consumer.on`."""

    queue: str
    call: HandlerSignature
    lease: timedelta | None
    concurrency: int
    prefetch: int
    timeout: timedelta | None
    retry: Retry
    batch: int
    weight: int
    acknowledge: Acknowledge

    @property
    def name(self) -> str:
        """The function's name, for people."""
        function = self.call.function
        return str(getattr(function, "__qualname__", type(function).__qualname__))


@dataclass(slots=True, eq=False)  # not frozen, which takes four times as long to make
class Invocation:
    """What one call of a handler works on: a message, or a batch."""

    handler: Handler
    deliveries: tuple[Delivery, ...]
    number: int = field(default_factory=count(1).__next__)


def invocations(handler: Handler, deliveries: Sequence[Delivery]) -> list[Invocation]:
    """Split leased messages into the invocations of a handler, by its batch size."""
    size = handler.batch
    return [
        Invocation(handler, tuple(deliveries[start : start + size]))
        for start in range(0, len(deliveries), size)
    ]


class Handlers:
    """The handlers of a consumer, one for each queue.

    Args:
        concurrency: The default of ``on(concurrency=...)``.
        retry: The default of ``on(retry=...)``.
        asynchronous: Whether handlers are coroutine functions, or plain ones.

    Attributes:
        by_queue: The handlers by the names of their queues, in the order of their registration.
    """

    def __init__(self, concurrency: int, retry: Retry, *, asynchronous: bool) -> None:
        self._concurrency = concurrency
        self._retry = retry
        self._asynchronous = asynchronous
        self.by_queue: dict[str, Handler] = {}
        self._as_many: set[str] = set()  # follow the consumer's concurrency, also when it changes

    def get(self, queue: str) -> Handler:
        """Return the handler of a queue, or raise `InvalidArgument`."""
        if queue not in self.by_queue:
            known = ", ".join(map(repr, self.by_queue)) or "none"
            raise InvalidArgument(f"no handler is for the queue {queue!r}; there are: {known}")
        return self.by_queue[queue]

    def only(self, queues: Sequence[str]) -> None:
        """Keep the handlers of these queues, and forget the others."""
        self.by_queue = {queue: self.get(queue) for queue in queues}

    def run_as_many(self, concurrency: int) -> None:
        """Change the concurrency of those that have no number of their own."""
        self._concurrency = concurrency
        for queue in self._as_many & self.by_queue.keys():
            self.by_queue[queue] = replace(self.by_queue[queue], concurrency=concurrency)

    def add(self, queue: str, function: _F, **options: Unpack[HandlerOptions]) -> _F:
        """Register a handler; see `Consumer.on`."""
        given: dict[str, Any] = {**HANDLER_DEFAULTS, **options}
        validation.validate_queue_name(queue)
        if queue in self.by_queue:
            raise InvalidArgument(
                f"the queue {queue!r} has a handler already: {self.by_queue[queue].name}"
            )
        if (acknowledge := given["acknowledge"]) not in get_args(Acknowledge):
            raise InvalidArgument(
                f"acknowledge must be 'commit', 'first' or 'manual', not {acknowledge!r}"
            )
        if (retry := given["retry"]) is not None and not isinstance(retry, Retry):
            raise InvalidArgument(f"retry must be a Retry, not {safe_repr(retry)}")
        if given["prefetch"] != 0:
            validation.validate_limit(given["prefetch"], "prefetch")
        call = inspect_handler(
            function,
            many=given["batch"] is not None,
            payload=given["payload"],
            asynchronous=self._asynchronous,
        )
        if call.is_async is not self._asynchronous:
            wanted = "AsyncConsumer" if call.is_async else "Consumer"
            raise InvalidArgument(f"{function!r} is a handler for {wanted}, not for this consumer")
        if given["concurrency"] is None:
            self._as_many.add(queue)
        self.by_queue[queue] = Handler(
            queue=queue,
            call=call,
            lease=_duration(given["lease"], "lease"),
            concurrency=_limit(given["concurrency"], "concurrency", self._concurrency),
            prefetch=given["prefetch"],
            timeout=_duration(given["timeout"], "timeout"),
            retry=retry or self._retry,
            batch=_limit(given["batch"], "batch", 1),
            weight=validation.validate_limit(given["weight"], "weight"),
            acknowledge=acknowledge,
        )
        return function


def _duration(value: object, name: str) -> timedelta | None:
    return None if value is None else validation.validate_duration(value, name, positive=True)


def _limit(value: object, name: str, default: int) -> int:
    return default if value is None else validation.validate_limit(value, name)

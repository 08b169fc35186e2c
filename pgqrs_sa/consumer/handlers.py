"""Handlers, and how each wants its messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from .. import validation
from ..errors import InvalidArgument, safe_repr
from ..retry import Retry
from ..types import Delivery, Seconds
from .signature import HandlerSignature, inspect_handler

__all__ = ["Acknowledge", "Handler", "Handlers", "Invocation"]

Acknowledge: TypeAlias = Literal["commit", "first", "manual"]
"""When a message is settled: with the handler's commit (or its return), before it is called (at
most once), or by the handler itself."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """A function and what it works on; see `Handlers.on` for the attributes."""

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


@dataclass(frozen=True, slots=True)
class Invocation:
    """What one call of a handler works on: a message, or a batch."""

    handler: Handler
    deliveries: tuple[Delivery, ...]
    number: int = field(default_factory=count(1).__next__)


class Handlers:
    """The handlers of a consumer, one for each queue.

    Args:
        concurrency: The default of ``on(concurrency=...)``.
        retry: The default of ``on(retry=...)``.
        asynchronous: Whether handlers are coroutine functions, or plain ones.
    """

    def __init__(self, concurrency: int, retry: Retry, *, asynchronous: bool) -> None:
        self._concurrency = concurrency
        self._retry = retry
        self._asynchronous = asynchronous
        self._by_queue: dict[str, Handler] = {}
        self._as_many: set[str] = set()  # of the consumer's concurrency, whatever that becomes

    def __iter__(self) -> Iterator[Handler]:
        return iter(self._by_queue.values())

    def __len__(self) -> int:
        return len(self._by_queue)

    def get(self, queue: str) -> Handler:
        """Return the handler of a queue, or raise `InvalidArgument`."""
        if queue not in self._by_queue:
            known = ", ".join(map(repr, self._by_queue)) or "none"
            raise InvalidArgument(f"no handler is for the queue {queue!r}; there are: {known}")
        return self._by_queue[queue]

    def only(self, queues: Sequence[str]) -> None:
        """Keep the handlers of these queues, and forget the others."""
        self._by_queue = {queue: self.get(queue) for queue in queues}

    def run_as_many(self, concurrency: int) -> None:
        """Change the concurrency of those that have no number of their own."""
        self._concurrency = concurrency
        for queue in self._as_many & self._by_queue.keys():
            self._by_queue[queue] = replace(self._by_queue[queue], concurrency=concurrency)

    def add(
        self,
        queue: str,
        function: _F,
        *,
        lease: Seconds | None,
        concurrency: int | None,
        prefetch: int,
        timeout: Seconds | None,
        retry: Retry | None,
        batch: int | None,
        weight: int,
        acknowledge: Acknowledge,
        payload: Any,
    ) -> _F:
        """Register a handler, whose settings are documented at `Consumer.on`."""
        validation.validate_queue_name(queue)
        if queue in self._by_queue:
            raise InvalidArgument(
                f"the queue {queue!r} has a handler already: {self._by_queue[queue].name}"
            )
        if acknowledge not in get_args(Acknowledge):
            raise InvalidArgument(
                f"acknowledge must be 'commit', 'first' or 'manual', not {acknowledge!r}"
            )
        if retry is not None and not isinstance(retry, Retry):
            raise InvalidArgument(f"retry must be a Retry, not {safe_repr(retry)}")
        if prefetch != 0:
            validation.validate_limit(prefetch, "prefetch")
        call = inspect_handler(
            function, many=batch is not None, payload=payload, asynchronous=self._asynchronous
        )
        if call.is_async is not self._asynchronous:
            wanted = "AsyncConsumer" if call.is_async else "Consumer"
            raise InvalidArgument(f"{function!r} is a handler for {wanted}, not for this consumer")
        if concurrency is None:
            self._as_many.add(queue)
        self._by_queue[queue] = Handler(
            queue=queue,
            call=call,
            lease=None
            if lease is None
            else validation.validate_duration(lease, "lease", positive=True),
            concurrency=self._concurrency
            if concurrency is None
            else validation.validate_limit(concurrency, "concurrency"),
            prefetch=prefetch,
            timeout=None
            if timeout is None
            else validation.validate_duration(timeout, "timeout", positive=True),
            retry=retry or self._retry,
            batch=1 if batch is None else validation.validate_limit(batch, "batch"),
            weight=validation.validate_limit(weight, "weight"),
            acknowledge=acknowledge,
        )
        return function

"""`Producer`: enqueues messages into one queue, within limits of their shape, size and rate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..codecs import JsonCodec
from ..errors import PayloadError
from ..settings import Validation
from ..types import Item, Seconds
from .admin import Admin, replay
from .config import Config
from .errors import RateLimited
from .types import Alias, QueueMessage
from .worker import QueueWorker

__all__ = ["Producer", "RateLimitStatus"]


class Producer(QueueWorker):
    """Puts messages into one queue; each call is a transaction of its own.

    To enqueue in the transaction that writes your rows, use `pgqrs_sa.AsyncQueueService` with
    your own session instead.

    Args:
        admin: An `Admin`; or a DSN or `Config`, and the producer closes its connections itself.
        queue: The name of a queue. That it exists is checked by the next awaited call.
        hostname: Where this runs, or what it is called: for people.
        port: A number to tell it by: for people.
    """

    _kind = "producer"

    def __init__(self, admin: Admin | Config | str, queue: str, hostname: str, port: int) -> None:
        super().__init__(admin, queue, hostname, port)
        rules = self.validation_config()
        self._codec = ValidatingCodec(rules)
        self._bucket: TokenBucket | None = None
        if rules.max_enqueue_per_second is not None:
            self._bucket = TokenBucket(rules.max_enqueue_per_second, rules.max_enqueue_burst)

    async def enqueue(self, payload: Any, *, headers: Mapping[str, Any] | None = None) -> int:
        """Put a message into the queue, visible at once, and return its id.

        Args:
            payload: Any strict JSON value.
            headers: A dict stored with the payload.

        Raises:
            QueueNotFound: with similar names.
            PayloadError: not strict JSON, or not allowed by the validation settings; names the
                place.
            RateLimited: with the time to wait; nothing was sent.
        """
        return await self.enqueue_delayed(payload, 0, headers=headers)

    async def enqueue_delayed(
        self, payload: Any, delay_seconds: Seconds, *, headers: Mapping[str, Any] | None = None
    ) -> int:
        """Put a message into the queue that becomes visible later, and return its id.

        Args:
            payload: Any strict JSON value.
            delay_seconds: Seconds, or a timedelta, from now by the database's clock.
            headers: A dict stored with the payload.

        Raises:
            DelayError: The delay is negative, or ends past year 9998.
            QueueNotFound, PayloadError, RateLimited: see `enqueue`.
        """
        self._admit([payload])
        async with self._service(self._codec) as service:
            receipt = await service.enqueue(
                self.queue, payload, delay=delay_seconds, headers=headers
            )
        return receipt.id

    async def enqueue_batch(self, payloads: Sequence[Any]) -> list[QueueMessage]:
        """Put all of these messages into the queue, or none.

        Returns:
            The messages in the order of the payloads; an empty list for an empty list.

        Raises:
            PayloadError: A payload is invalid; names its place.
            QueueNotFound, RateLimited: see `enqueue`.
        """
        if not payloads:
            return []
        self._admit(payloads)
        async with self._service(self._codec) as service:
            # Wrapped, so that a payload that is an Item itself is not taken for the wrapper.
            items = [Item(payload) for payload in payloads]
            receipts = await service.enqueue_many(self.queue, items)
        # They are visible at once, so ``vt`` is the time of the enqueue.
        return [
            QueueMessage(receipt.id, self._queue_id, payload, None, 0, receipt.vt, receipt.vt)
            for receipt, payload in zip(receipts, payloads, strict=True)
        ]

    def _admit(self, payloads: Sequence[Any]) -> None:
        if self._bucket is not None:
            # An invalid payload must not consume tokens.
            for index, payload in enumerate(payloads):
                self._codec.dumps(payload, path=f"items[{index}].payload")
            self._bucket.take(len(payloads))

    async def replay_dlq(self, archived_id: int) -> QueueMessage | None:
        """Requeue a dead letter of this queue with its attempts reset, under its original id.

        Returns:
            The message, visible now; None when no dead letter of this queue has this archive id.
        """
        async with self._service() as service:
            return await replay(service, archived_id, self.queue)

    def validation_config(self) -> Validation:
        """Return the limits of this producer's payloads."""
        return self._database.settings.validation

    def rate_limit_status(self) -> RateLimitStatus | None:
        """Return how many messages may be sent now; None when there is no limit."""
        return None if self._bucket is None else self._bucket.status()


class ValidatingCodec(JsonCodec):
    """Strict JSON that refuses what the validation settings do not allow.

    As a codec it sees each payload once, and its errors name the place in a batch.
    """

    def __init__(self, validation: Validation) -> None:
        self._validation = validation
        self._walks = bool(
            validation.max_string_length
            or validation.max_object_depth
            or validation.forbidden_keys
            or validation.required_keys
        )

    def dumps(self, value: Any, /, *, path: str = "payload") -> str:
        """Return ``value`` as JSON text, or raise `PayloadError`."""
        text = super().dumps(value, path=path)
        limit = self._validation.max_payload_size_bytes
        if limit is not None and (size := len(text.encode())) > limit:
            raise PayloadError(path, f"takes {size} bytes, more than {limit}")
        if self._walks:
            self._check_required(value, path)
            self._check(value, path, 1)
        return text

    def _check_required(self, value: Any, path: str) -> None:
        required = self._validation.required_keys
        if not required:
            return
        if not isinstance(value, dict):
            raise PayloadError(path, f"must be a dict with the keys {', '.join(required)}")
        if missing := [key for key in required if key not in value]:
            raise PayloadError(path, f"lacks the keys {', '.join(missing)}")

    def _check(self, value: Any, path: str, depth: int) -> None:
        rules = self._validation
        if isinstance(value, str):
            self._check_length(value, path)
        if not isinstance(value, (dict, list, tuple)):
            return
        if rules.max_object_depth is not None and depth > rules.max_object_depth:
            raise PayloadError(path, f"is nested deeper than {rules.max_object_depth} levels")
        for inner, item in self._members(value, path):
            self._check(item, inner, depth + 1)

    def _members(
        self, value: dict[str, Any] | list[Any] | tuple[Any, ...], path: str
    ) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
            return
        for key, item in value.items():
            if key in self._validation.forbidden_keys:
                raise PayloadError(path, f"has the key {key!r}, which is forbidden")
            self._check_length(key, f"a key of {path}")
            yield f"{path}.{key}", item

    def _check_length(self, text: str, path: str) -> None:
        limit = self._validation.max_string_length
        if limit is not None and (length := len(text.encode())) > limit:
            raise PayloadError(path, f"takes {length} bytes, more than {limit}")


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """How many messages a producer may send now.

    Attributes:
        available: Messages that may be sent at once.
        burst: The maximum of ``available``.
        per_second: The rate at which ``available`` grows, in messages a second.
    """

    available: float
    burst: int
    per_second: float

    @property
    def available_tokens(self) -> int:
        """`available` in whole messages."""
        return int(self.available)

    max_per_second = Alias[float]("per_second")
    burst_capacity = Alias[int]("burst")

    @property
    def utilization_percentage(self) -> float:
        """How much of the burst is available, in percent, as pgqrs defines it: 100 is unused."""
        return 100.0 * self.available_tokens / self.burst

    @property
    def is_near_empty(self) -> bool:
        """True while at most a tenth of the burst is available."""
        return self.utilization_percentage <= 10  # noqa: PLR2004 - percent

    @property
    def is_full(self) -> bool:
        """True while the whole burst is available."""
        return self.available_tokens == self.burst


class TokenBucket:
    """Allows ``burst`` messages at once, and ``per_second`` messages a second from then on.

    A batch larger than the burst is allowed when the bucket is full, and makes its level negative:
    the rate holds over time, and every batch is allowed eventually.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._counted_at = time.monotonic()

    def take(self, count: int) -> None:
        """Take a token for each message, or raise `RateLimited` and take none."""
        self._refill()
        lacking = min(count, self._burst) - self._tokens
        if lacking > 0:
            raise RateLimited(lacking / self._per_second, self._per_second)
        self._tokens -= count

    def status(self) -> RateLimitStatus:
        """Return how many messages may be sent now."""
        self._refill()
        return RateLimitStatus(max(0.0, self._tokens), self._burst, self._per_second)

    def _refill(self) -> None:
        moment = time.monotonic()
        grown = self._tokens + (moment - self._counted_at) * self._per_second
        self._tokens, self._counted_at = min(float(self._burst), grown), moment

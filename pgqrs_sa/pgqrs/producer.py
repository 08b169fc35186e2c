"""`Producer`: enqueues messages into one queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..settings import Validation
from ..types import Item, Seconds
from .admin import Admin, replay
from .config import Config
from .limits import RateLimitStatus, TokenBucket, ValidatingCodec
from .types import QueueMessage
from .worker import QueueWorker

__all__ = ["Producer"]


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

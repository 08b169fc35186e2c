"""Handlers and deliveries for tests that need no database."""

from __future__ import annotations

from datetime import UTC, datetime

from pgqrs_sa import Delivery, Retry
from pgqrs_sa.consumer.handlers import Handlers


def handlers(*wanted, concurrency=4):
    """Handlers of queues ``q0``, ``q1`` ..., each with these options."""
    made = Handlers(concurrency, Retry(), asynchronous=False)
    for number, options in enumerate(wanted):
        made.add(f"q{number}", lambda payload: None, **options)
    return list(made.by_queue.values())


def delivery(id_, read_ct=1):
    """A delivery of queue ``q0``, as a lease returns it."""
    now = datetime.now(UTC)
    return Delivery(
        id_, "q0", "1", 1, None, 0, now, now, read_ct, 5, None, None, now, 10 * id_ + read_ct, None
    )

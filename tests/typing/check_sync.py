"""What a type checker sees of the synchronous API; `tests/test_typing.py` runs the checkers."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import (
    ArchivedInfo,
    ArchivedMessage,
    Backoff,
    Delivery,
    Failure,
    Item,
    JsonCodec,
    Message,
    MessageInfo,
    Models,
    Queue,
    QueueInfo,
    QueueMetrics,
    QueueService,
    Receipt,
    Worker,
    WorkerHealth,
    WorkerInfo,
)
from pgqrs_sa.resources import Archived, Messages, Queues, Workers


def make(session: Session) -> QueueService:
    """A service is made with any part of its settings, by name."""
    QueueService(session, models=Models(Queue, Message, ArchivedMessage, Worker), worker=7)
    return QueueService(session, codec=JsonCodec(), allow_autocommit=True)


def enqueue(service: QueueService) -> None:
    """Enqueueing gives receipts."""
    receipt = service.enqueue("mail", {"a": 1}, delay=5, priority=1, headers={"h": 1}, key="k")
    assert_type(receipt, Receipt)
    assert_type(receipt.id, int)
    assert_type(receipt.vt, datetime)
    assert_type(receipt.duplicate, bool)
    assert_type(service.enqueue("mail", None, at=datetime.now(UTC), max_read_ct=3), Receipt)
    assert_type(service.enqueue("mail", [1], delay=timedelta(seconds=1)), Receipt)
    assert_type(service.enqueue_many("mail", [1, Item(2, delay=3.5)]), list[Receipt])
    assert_type(service.enqueue_many("mail", (n for n in range(3))), list[Receipt])
    assert_type(service.enqueue_from("mail", sa.select(Message.payload)), int)


def dequeue(service: QueueService, worker: WorkerInfo) -> None:
    """Dequeueing gives deliveries, and settling takes them."""
    deliveries = service.dequeue("mail", 10, lease=30, worker=worker)
    assert_type(deliveries, list[Delivery])
    (delivery,) = service.dequeue("mail", where=[Message.priority > 1, Message.ready])
    assert_type(delivery.payload, Any)
    assert_type(delivery.headers, dict[str, Any] | None)
    assert_type(delivery.text, str)
    assert_type(delivery.worker_id, int | None)
    assert_type(delivery.max_read_ct, int | None)
    assert_type(delivery.vt, datetime)
    assert_type(delivery.leased_until, datetime)

    service.archive(delivery, outcome="discarded", reason="r")
    service.archive_many(deliveries)
    assert_type(service.try_archive(delivery), bool)
    assert_type(service.try_archive_many(deliveries), list[bool])
    service.delete(delivery)
    assert_type(service.try_delete_many(deliveries), list[bool])
    assert_type(service.extend(delivery, 30), Delivery)
    assert_type(service.extend_many(deliveries, timedelta(minutes=1)), list[Delivery])
    assert_type(service.try_extend(delivery, 30), bool)
    service.release(delivery, delay=1)
    assert_type(service.try_release(delivery), bool)
    assert_type(service.fail(delivery, ValueError("no")), Failure)
    assert_type(service.fail_many(deliveries, "no", dead=True), list[Failure])
    assert_type(service.try_fail(delivery, "no", delay=Backoff().delay(1)), bool)


def resources(service: QueueService) -> None:
    """The resources give values."""
    assert_type(service.queues, Queues)
    assert_type(service.messages, Messages)
    assert_type(service.archived, Archived)
    assert_type(service.workers, Workers)

    assert_type(service.queues.create("a", lease=5, retention=None), QueueInfo)
    assert_type(service.queues.list(), list[QueueInfo])
    assert_type(service.queues.get("a").retention_seconds, float | None)
    assert_type(service.queues.purge("a", limit=3), int)

    assert_type(service.messages.peek("a", 5), list[MessageInfo])
    assert_type(service.messages.find("a", state="leased", where=Message.leased), list[MessageInfo])
    assert_type(service.messages.get(1), MessageInfo)
    assert_type(service.messages.metrics("a"), QueueMetrics)
    assert_type(service.messages.metrics("a").oldest_ready_age, timedelta | None)
    assert_type(service.messages.all_metrics(), list[QueueMetrics])
    assert_type(service.messages.try_cancel(1), bool)
    assert_type(service.messages.cancel_where("a", Message.scheduled), int)
    assert_type(service.messages.reschedule(1, delay=5), Receipt)

    assert_type(service.archived.find(outcome="dead"), list[ArchivedInfo])
    assert_type(service.archived.get(1).reason, str | None)
    assert_type(service.archived.requeue(1, attempts=3), Receipt)
    assert_type(service.archived.requeue_many([1, 2]), list[Receipt])
    assert_type(service.archived.prune(timedelta(days=7), limit=10), int)

    assert_type(service.workers.register("w", queues=["a"]), WorkerInfo)
    assert_type(service.workers.list(status="ready"), list[WorkerInfo])
    assert_type(service.workers.health(silent_for=60), list[WorkerHealth])
    assert_type(service.workers.reclaim(), int)
    assert_type(service.workers.get(1).queues, Sequence[str])


def wrong(service: QueueService, delivery: Delivery) -> None:
    """What is wrong is an error for the checker: an ignore that is not needed is one too."""
    service.enqueue(7, 1)  # type: ignore[arg-type]
    service.enqueue("mail", 1, delay="5")  # type: ignore[arg-type]
    service.enqueue("mail", 1, 5)  # type: ignore[call-arg]
    service.dequeue("mail", lease="30")  # type: ignore[arg-type]
    service.archive(delivery.id)  # type: ignore[arg-type]
    service.archive(delivery, outcome="dead")  # type: ignore[arg-type]
    service.messages.find(state="pending")  # type: ignore[arg-type]
    service.archived.find(outcome="done")  # type: ignore[arg-type]
    delivery.payload = 1  # type: ignore[misc]

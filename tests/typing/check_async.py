"""What a type checker sees of the asynchronous API: the twins of `check_sync`."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import assert_type

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import (
    ArchivedInfo,
    AsyncQueueService,
    Delivery,
    Failure,
    Item,
    Message,
    MessageInfo,
    QueueInfo,
    QueueMetrics,
    Receipt,
    WorkerHealth,
    WorkerInfo,
)
from pgqrs_sa.aio_resources import Archived, Messages, Queues, Workers


async def enqueue(session: AsyncSession) -> None:
    """Enqueueing gives receipts."""
    service = AsyncQueueService(session, worker=7)
    assert_type(await service.enqueue("mail", {"a": 1}, delay=5, key="k"), Receipt)
    assert_type(await service.enqueue_many("mail", [1, Item(2)]), list[Receipt])
    assert_type(await service.enqueue_from("mail", sa.select(Message.payload)), int)


async def dequeue(service: AsyncQueueService) -> None:
    """Dequeueing gives deliveries, and settling takes them."""
    deliveries = await service.dequeue("mail", 10, lease=30, where=Message.priority > 1)
    assert_type(deliveries, list[Delivery])
    delivery = deliveries[0]
    await service.archive(delivery, outcome="discarded", reason="r")
    await service.archive_many(deliveries)
    assert_type(await service.try_archive(delivery), bool)
    assert_type(await service.try_delete_many(deliveries), list[bool])
    assert_type(await service.extend(delivery, 30), Delivery)
    assert_type(await service.extend_many(deliveries, 30), list[Delivery])
    assert_type(await service.try_release(delivery), bool)
    assert_type(await service.fail(delivery, ValueError("no")), Failure)
    assert_type(await service.fail_many(deliveries, "no", dead=True), list[Failure])
    await service.check_schema()


async def resources(service: AsyncQueueService) -> None:
    """The resources give values."""
    assert_type(service.queues, Queues)
    assert_type(service.messages, Messages)
    assert_type(service.archived, Archived)
    assert_type(service.workers, Workers)
    assert_type(await service.queues.create("a", lease=5), QueueInfo)
    assert_type(await service.queues.list(), list[QueueInfo])
    assert_type(await service.messages.peek("a", 5), list[MessageInfo])
    assert_type(await service.messages.metrics("a"), QueueMetrics)
    assert_type(await service.messages.try_cancel(1), bool)
    assert_type(await service.messages.reschedule(1, delay=5), Receipt)
    assert_type(await service.archived.find(outcome="dead"), list[ArchivedInfo])
    assert_type(await service.archived.requeue_many([1]), list[Receipt])
    assert_type(await service.workers.register("w"), WorkerInfo)
    assert_type(await service.workers.health(), list[WorkerHealth])


async def wrong(service: AsyncQueueService, session: Session) -> None:
    """What is wrong is an error for the checker: an ignore that is not needed is one too."""
    AsyncQueueService(session)  # type: ignore[arg-type]
    await service.enqueue("mail", 1, delay="5")  # type: ignore[arg-type]
    await service.archive(5)  # type: ignore[arg-type]

"""What a type checker sees of the asynchronous API: the methods of `check_sync`, awaited."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, assert_type

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
from pgqrs_sa.aio import AsyncArchived, AsyncMessages, AsyncQueues, AsyncWorkers


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
    assert_type(service.queues, AsyncQueues)
    assert_type(service.messages, AsyncMessages)
    assert_type(service.archived, AsyncArchived)
    assert_type(service.workers, AsyncWorkers)
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


async def signatures(service: AsyncQueueService, delivery: Delivery) -> None:
    """Names, defaults and results are those of the synchronous method."""
    assert_type(service.session, AsyncSession)
    enqueueing: Coroutine[Any, Any, Receipt] = service.enqueue("mail", 1)
    assert_type(await enqueueing, Receipt)
    assert_type(await AsyncQueueService.enqueue(service, "mail", payload=1, at=None), Receipt)
    await service.archive(delivery=delivery, outcome="archived", reason=None)
    await service.enqueue("mail", 1, dely=5)  # type: ignore[call-arg]
    await service.enqueue("mail")  # type: ignore[call-arg]
    await service.archive(delivery, "archived")  # type: ignore[call-arg]
    await service.archive(delivery, outcome="nope")  # type: ignore[arg-type]
    await service.messages.find(state="nope")  # type: ignore[arg-type]
    await service.queues.create("a", leese=5)  # type: ignore[call-arg]
    await service.archived.prune(older_than="1 day")  # type: ignore[arg-type]
    await service.workers.reclaim(30)  # type: ignore[call-arg]


class Logged(AsyncQueueService):
    """A host may override a method, and await the one that it overrides."""

    async def archive_many(self, *args: Any, **kwargs: Any) -> None:
        """Archive, and more."""
        assert_type(await super().archive_many(*args, **kwargs), None)


async def wrong(service: AsyncQueueService, session: Session) -> None:
    """What is wrong is an error for the checker: an ignore that is not needed is one too."""
    AsyncQueueService(session)  # type: ignore[arg-type]
    await service.enqueue("mail", 1, delay="5")  # type: ignore[arg-type]
    await service.archive(5)  # type: ignore[arg-type]

"""The queue, inside an ``AsyncSession``: `QueueService`, awaited.

Each method runs the same operation as its synchronous twin, through ``AsyncSession.run_sync``, so
that flushes, binds and session events are those of the application, with any async driver. The
documentation of parameters, results and errors is there.

Needs greenlet, as SQLAlchemy's own asyncio extension does: ``pip install 'pgqrs-sa[asyncio]'``.

A task that is cancelled in the middle of a statement leaves its session in need of a rollback, as
any statement would; close the session, and a lease that was just being taken is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.sql.expression import SelectBase

from . import aio_resources, extras
from ._core import enqueue, integrity, schema, settle
from ._core import lease as lease_operations
from ._core.context import Context
from ._core.sessions import asynchronous
from .codecs import Codec
from .models import Models
from .types import Criteria, Delivery, Failure, Item, Receipt, Seconds

__all__ = ["AsyncQueueService"]

extras.require("AsyncQueueService")  # SQLAlchemy 2.0 finds out only when it is used


class AsyncQueueService(aio_resources.AsyncResource):
    """`QueueService` for an ``AsyncSession``, with the same parameters."""

    def __init__(
        self,
        session: AsyncSession | async_scoped_session[Any],
        *,
        models: Models | None = None,
        codec: Codec | None = None,
        worker: object = None,
        allow_autocommit: bool = False,
        notify: bool = False,
        cursor_key: str | None = None,
        create_queues: bool = False,
    ) -> None:
        context = Context.of(
            models,
            codec,
            worker,
            allow_autocommit,
            notify=notify,
            cursor_key=cursor_key,
            create_queues=create_queues,
        )
        super().__init__(asynchronous(session), context)

    def __repr__(self) -> str:
        return self._context.represented(type(self), self._session.sync_session)

    @property
    def queues(self) -> aio_resources.Queues:
        """See `QueueService.queues`."""
        return aio_resources.Queues(self._session, self._context)

    @property
    def messages(self) -> aio_resources.Messages:
        """See `QueueService.messages`."""
        return aio_resources.Messages(self._session, self._context)

    @property
    def archived(self) -> aio_resources.Archived:
        """See `QueueService.archived`."""
        return aio_resources.Archived(self._session, self._context)

    @property
    def workers(self) -> aio_resources.Workers:
        """See `QueueService.workers`."""
        return aio_resources.Workers(self._session, self._context)

    async def check_schema(self) -> None:
        """See `QueueService.check_schema`."""
        await self._run(schema.check)

    async def orphans(self) -> dict[str, int]:
        """See `QueueService.orphans`."""
        return await self._run(integrity.orphans)

    async def enqueue(
        self,
        queue: str,
        payload: Any,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
        priority: int = 0,
        headers: Mapping[str, Any] | None = None,
        key: str | None = None,
        max_read_ct: int | None = None,
    ) -> Receipt:
        """See `QueueService.enqueue`."""
        item = Item(payload, delay, at, priority, headers, key, max_read_ct)
        return await self._run(enqueue.one, queue, item)

    async def enqueue_many(self, queue: str, items: Iterable[Any]) -> list[Receipt]:
        """See `QueueService.enqueue_many`."""
        return await self._run(enqueue.many, queue, items)

    async def enqueue_from(self, queue: str, query: SelectBase) -> int:
        """See `QueueService.enqueue_from`."""
        return await self._run(enqueue.from_query, queue, query)

    async def dequeue(
        self,
        queue: str,
        limit: int = 1,
        *,
        lease: Seconds | None = None,
        worker: object = None,
        where: Criteria = None,
    ) -> list[Delivery]:
        """See `QueueService.dequeue`."""
        return await self._run(lease_operations.dequeue, queue, limit, lease, worker, where)

    async def archive(
        self,
        delivery: Delivery,
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> None:
        """See `QueueService.archive`."""
        await self.archive_many([delivery], outcome=outcome, reason=reason)

    async def archive_many(
        self,
        deliveries: Iterable[Delivery],
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> None:
        """See `QueueService.archive_many`."""
        await self._run(settle.archive, deliveries, outcome, reason, strict=True)

    async def try_archive(
        self,
        delivery: Delivery,
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> bool:
        """See `QueueService.try_archive`."""
        return (await self.try_archive_many([delivery], outcome=outcome, reason=reason))[0]

    async def try_archive_many(
        self,
        deliveries: Iterable[Delivery],
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> list[bool]:
        """See `QueueService.try_archive_many`."""
        return await self._run(settle.archive, deliveries, outcome, reason, strict=False)

    async def delete(self, delivery: Delivery) -> None:
        """See `QueueService.delete`."""
        await self.delete_many([delivery])

    async def delete_many(self, deliveries: Iterable[Delivery]) -> None:
        """See `QueueService.delete_many`."""
        await self._run(settle.delete, deliveries, strict=True)

    async def try_delete(self, delivery: Delivery) -> bool:
        """See `QueueService.try_delete`."""
        return (await self.try_delete_many([delivery]))[0]

    async def try_delete_many(self, deliveries: Iterable[Delivery]) -> list[bool]:
        """See `QueueService.try_delete_many`."""
        return await self._run(settle.delete, deliveries, strict=False)

    async def extend(self, delivery: Delivery, lease: Seconds) -> Delivery:
        """See `QueueService.extend`."""
        return (await self.extend_many([delivery], lease))[0]

    async def extend_many(self, deliveries: Iterable[Delivery], lease: Seconds) -> list[Delivery]:
        """See `QueueService.extend_many`."""
        kept = await self._run(settle.extend, deliveries, lease, strict=True)
        return [one for one in kept if one is not None]

    async def try_extend(self, delivery: Delivery, lease: Seconds) -> bool:
        """See `QueueService.try_extend`."""
        return (await self.try_extend_many([delivery], lease))[0]

    async def try_extend_many(self, deliveries: Iterable[Delivery], lease: Seconds) -> list[bool]:
        """See `QueueService.try_extend_many`."""
        kept = await self._run(settle.extend, deliveries, lease, strict=False)
        return [one is not None for one in kept]

    async def release(self, delivery: Delivery, *, delay: Seconds = 0) -> None:
        """See `QueueService.release`."""
        await self.release_many([delivery], delay=delay)

    async def release_many(self, deliveries: Iterable[Delivery], *, delay: Seconds = 0) -> None:
        """See `QueueService.release_many`."""
        await self._run(settle.release, deliveries, delay, strict=True)

    async def try_release(self, delivery: Delivery, *, delay: Seconds = 0) -> bool:
        """See `QueueService.try_release`."""
        return (await self.try_release_many([delivery], delay=delay))[0]

    async def try_release_many(
        self, deliveries: Iterable[Delivery], *, delay: Seconds = 0
    ) -> list[bool]:
        """See `QueueService.try_release_many`."""
        return await self._run(settle.release, deliveries, delay, strict=False)

    async def fail(
        self,
        delivery: Delivery,
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> Failure:
        """See `QueueService.fail`."""
        return (await self.fail_many([delivery], error, delay=delay, reason=reason, dead=dead))[0]

    async def fail_many(
        self,
        deliveries: Iterable[Delivery],
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> list[Failure]:
        """See `QueueService.fail_many`."""
        done = await self._run(settle.fail, deliveries, error, delay, reason, dead, strict=True)
        return [one for one in done if one is not None]

    async def try_fail(
        self,
        delivery: Delivery,
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> bool:
        """See `QueueService.try_fail`."""
        return (await self.try_fail_many([delivery], error, delay=delay, reason=reason, dead=dead))[
            0
        ]

    async def try_fail_many(
        self,
        deliveries: Iterable[Delivery],
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> list[bool]:
        """See `QueueService.try_fail_many`."""
        done = await self._run(settle.fail, deliveries, error, delay, reason, dead, strict=False)
        return [one is not None for one in done]

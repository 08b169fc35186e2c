"""Reading all pages of what the service gives a page at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ..aio import AsyncQueueService
from ..models import Models
from ..types import ArchivedInfo, MessageInfo

__all__ = ["archived", "held_by", "live"]

_PAGE = 1000


async def live(service: AsyncQueueService, **criteria: Any) -> AsyncIterator[MessageInfo]:
    """Yield live messages by id; the criteria are those of ``messages.find``."""
    after = 0
    while page := await service.messages.find(after=after, limit=_PAGE, **criteria):
        for message in page:
            yield message
        after = page[-1].id


async def archived(service: AsyncQueueService, **criteria: Any) -> AsyncIterator[ArchivedInfo]:
    """Yield archived messages by id; the criteria are those of ``archived.find``."""
    after = 0
    while page := await service.archived.find(after=after, limit=_PAGE, **criteria):
        for message in page:
            yield message
        after = page[-1].id


async def held_by(
    service: AsyncQueueService, models: Models, worker_id: int, queue: str | None = None
) -> list[MessageInfo]:
    """Return what a worker holds under leases that have not run out."""
    mine = models.message.consumer_worker_id == worker_id
    found = live(service, queue=queue, state="leased", where=mine)
    return [message async for message in found]

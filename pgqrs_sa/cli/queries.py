"""Criteria for what the commands ask of the service. Imported when a command needs one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ..models import ArchivedMessage, Message, Queue, Worker
from ..service import QueueService
from ..states import now as clock
from ..types import Delivery, MessageInfo

__all__ = [
    "Settled",
    "count_live",
    "count_old_workers",
    "delivery",
    "enqueued_between",
    "held_by",
    "live",
    "now",
]


def now(session: Session) -> datetime:
    """The database's clock."""
    moment: datetime = session.scalars(sa.select(clock())).one()
    return moment


def live(session: Session, queue: str) -> tuple[int, int]:
    """How many live messages a queue has, and the highest id among them (0 if it has none)."""
    counted = (
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(Message.id), 0))
        .join(Queue, Queue.id == Message.queue_id)
        .where(Queue.queue_name == queue)
    )
    count, newest = session.execute(counted).one()
    return count, newest


def enqueued_between(service: QueueService, queue: str) -> dict[str, datetime | None]:
    """When the oldest message of a queue that nobody holds, and its newest, were enqueued."""
    unheld = [sa.not_(Message.leased)]
    oldest = service.messages.find(queue, where=unheld, limit=1, content=False)
    newest = service.messages.find(queue, limit=1, newest_first=True, content=False)
    return {
        "oldest_pending_message": oldest[0].enqueued_at if oldest else None,
        "newest_message": newest[0].enqueued_at if newest else None,
    }


def count_live(session: Session, queue: str, state: str | None) -> int:
    """How many live messages of a queue are in a state, or in any.

    Reads nothing of the archive, which a consumer's role may not.
    """
    found = sa.select(sa.func.count()).select_from(Message)
    found = found.join(Queue, Queue.id == Message.queue_id).where(Queue.queue_name == queue)
    if state is not None:
        found = found.where(getattr(Message, state))
    return session.scalars(found).one()


def held_by(worker: int) -> list[sa.ColumnExpressionArgument[bool]]:
    """Criteria of the messages that a worker holds now."""
    return [Message.consumer_worker_id == worker, Message.leased]


def count_old_workers(session: Session, older_than: timedelta) -> int:
    """How many workers a purge would delete."""
    held = sa.exists().where(Message.consumer_worker_id == Worker.id, Message.leased)
    old = sa.select(sa.func.count(Worker.id)).where(
        Worker.status == "stopped", Worker.shutdown_at < clock() - older_than, sa.not_(held)
    )
    return session.scalars(old).one()


def delivery(info: MessageInfo, token: int) -> Delivery:
    """The delivery that somebody says to hold; settling it tells whether that is so."""
    return Delivery(
        id=info.id,
        queue=info.queue,
        text=info.text,
        decoded=info.decoded,
        headers=info.headers,
        priority=info.priority,
        vt=info.vt,
        enqueued_at=info.enqueued_at,
        read_ct=info.read_ct,
        max_read_ct=info.max_read_ct,
        key=info.key,
        last_error=info.last_error,
        fencing_token=token,
        worker_id=info.worker_id,
    )


@dataclass(frozen=True, slots=True)
class Settled:
    """Some of the archive.

    Attributes:
        queue: Only of this queue.
        outcome: Only with this outcome.
        worker: Only what this worker held last.
        older_than: Only what was archived so long ago.
        by_retention: Only what its queue does not keep any longer.
        message: Only what had this id while it was live.
        up_to: Only up to this id of the archive.
    """

    queue: str | None = None
    outcome: Any = None
    worker: int | None = None
    older_than: timedelta | None = None
    by_retention: bool = False
    message: int | None = None
    up_to: int | None = None

    def criteria(self) -> list[sa.ColumnExpressionArgument[bool]]:
        """What the service does not know by itself, as criteria."""
        archived_at = ArchivedMessage.archived_at
        found: list[sa.ColumnExpressionArgument[bool]] = []
        if self.worker is not None:
            found.append(ArchivedMessage.consumer_worker_id == self.worker)
        if self.older_than is not None:
            found.append(archived_at < clock() - self.older_than)
        if self.by_retention:
            kept = Queue.retention_seconds * sa.literal(timedelta(seconds=1), sa.Interval)
            found.append(archived_at < clock() - kept)
        if self.message is not None:
            found.append(ArchivedMessage.original_msg_id == self.message)
        if self.up_to is not None:
            found.append(ArchivedMessage.id <= self.up_to)
        return found

    def count(self, service: QueueService) -> int:
        """Return how many there are."""
        return service.archived.count(self.queue, outcome=self.outcome, where=self.criteria())

    def ids(self, service: QueueService, after: int, limit: int) -> Sequence[int]:
        """Return a page of ids."""
        found = service.archived.find(
            self.queue, outcome=self.outcome, where=self.criteria(), after=after, limit=limit
        )
        return [one.id for one in found]

    def bounded(self, service: QueueService) -> Settled:
        """Return the same, without what comes later."""
        newest = service.archived.find(
            self.queue, outcome=self.outcome, where=self.criteria(), limit=1, newest_first=True
        )
        return replace(self, up_to=newest[0].id if newest else 0)

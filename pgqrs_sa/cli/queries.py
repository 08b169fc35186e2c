"""Criteria and queries of the commands. Imported when a command needs them.

A command that counts, asks and then deletes remembers the ids of what it has counted, 8 bytes each.
No bound says the same: a requeue gives a message its old id back, and a transaction that was open
at the count commits lower ids than those counted, with earlier times.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .._core.scope import Scope
from .._core.sql import health
from .._core.sql.fragments import array_bind
from .._core.states import now as clock
from ..models import ArchivedMessage, Message, Queue, Worker
from ..service import QueueService
from ..types import Delivery, MessageInfo

__all__ = [
    "Live",
    "QueueActivity",
    "Settled",
    "activity",
    "count_live",
    "delete_old_workers",
    "delivery",
    "enqueued_between",
    "held_by",
    "now",
    "old_workers",
    "still_archived",
]

_FETCHED = {"yield_per": 10_000}
"""Rows are fetched through a cursor in the server: the driver never has all of them."""


def now(session: Session) -> datetime:
    """The database's clock."""
    moment: datetime = session.scalars(sa.select(clock())).one()
    return moment


@dataclass(frozen=True, slots=True)
class Live:
    """The live messages that a queue had when they were counted.

    Attributes:
        queue: Its name.
        ids: Their ids.
        tokens: Their fencing tokens, in the same order: a message that is leased or requeued
            afterwards has another one.
    """

    queue: str
    ids: array[int]
    tokens: array[int]

    @classmethod
    def of(cls, session: Session, queue: str) -> Live:
        """Read them."""
        found = cls(queue, array("q"), array("q"))
        read = (
            sa.select(Message.id, Message.fencing_token)
            .join(Queue, Queue.id == Message.queue_id)
            .where(Queue.queue_name == queue)
            .order_by(Message.id)
        )
        for row in session.execute(read, execution_options=_FETCHED):
            found.ids.append(row.id)
            found.tokens.append(row.fencing_token)
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def purge(self, service: QueueService, part: slice) -> int:
        """Delete some of them, those that are unchanged; return how many."""
        tokens = dict(zip(self.ids[part], self.tokens[part], strict=True))
        return service.queues.purge(self.queue, tokens=tokens)

    def still_live(self, session: Session, part: slice) -> int:
        """Return how many of some of them are live."""
        live = sa.select(sa.func.count()).select_from(Message).where(_one_of(Message.id))
        return session.scalars(live, {"ids": self.ids[part].tolist()}).one()


def _one_of(column: Any) -> sa.ColumnElement[bool]:
    return sa.type_coerce(column, sa.BigInteger) == sa.func.any(array_bind("ids", sa.BigInteger))


def enqueued_between(service: QueueService, queue: str) -> dict[str, datetime | None]:
    """Return when the oldest unleased message of a queue, and its newest, were enqueued."""
    unleased = [sa.not_(Message.leased)]
    oldest = service.messages.find(queue, where=unleased, limit=1, content=False)
    newest = service.messages.find(queue, limit=1, newest_first=True, content=False)
    return {
        "oldest_pending_message": oldest[0].enqueued_at if oldest else None,
        "newest_message": newest[0].enqueued_at if newest else None,
    }


def count_live(session: Session, queue: str, state: str | None) -> int:
    """Return the number of live messages of a queue, in a state or in any.

    It does not read the archive, for which a consumer's role has no right.
    """
    found = sa.select(sa.func.count()).select_from(Message)
    found = found.join(Queue, Queue.id == Message.queue_id).where(Queue.queue_name == queue)
    if state is not None:
        found = found.where(getattr(Message, state))
    return session.scalars(found).one()


def held_by(worker: int) -> list[sa.ColumnExpressionArgument[bool]]:
    """Return the criteria of the messages that a worker holds now."""
    return [Message.consumer_worker_id == worker, Message.leased]


def old_workers(session: Session, older_than: timedelta) -> Sequence[int]:
    """Return the ids of workers that stopped longer ago than this and hold no messages."""
    return session.scalars(sa.select(Worker.id).where(*_old(older_than))).all()


def delete_old_workers(session: Session, older_than: timedelta, ids: Sequence[int]) -> int:
    """Delete those of these workers that `old_workers` would return; return how many."""
    gone = sa.delete(Worker).where(_one_of(Worker.id), *_old(older_than)).returning(Worker.id)
    return len(session.scalars(gone, {"ids": list(ids)}).all())


def _old(older_than: timedelta) -> list[sa.ColumnElement[bool]]:
    held = sa.exists().where(Message.consumer_worker_id == Worker.id, Message.leased)
    return [Worker.status == "stopped", Worker.shutdown_at < clock() - older_than, sa.not_(held)]


def delivery(info: MessageInfo, token: int) -> Delivery:
    """Return the delivery with this token; settling it fails if its lease is not the current."""
    shared = {field.name for field in fields(Delivery)} & {field.name for field in fields(info)}
    values = {name: getattr(info, name) for name in shared}
    return Delivery(**values, fencing_token=token)


@dataclass(frozen=True, slots=True)
class Settled:
    """Some of the archive.

    Attributes:
        queue: Only of this queue.
        outcome: Only with this outcome.
        worker: Only what this worker held last.
        older_than: Only what was archived longer ago than this.
        by_retention: Only what was archived longer ago than the retention of its queue.
        message: Only what had this id while it was live.
    """

    queue: str | None = None
    outcome: Any = None
    worker: int | None = None
    older_than: timedelta | None = None
    by_retention: bool = False
    message: int | None = None

    def criteria(self) -> list[sa.ColumnExpressionArgument[bool]]:
        """Return the criteria that the service has no parameter for."""
        archived_at = ArchivedMessage.archived_at
        found: list[sa.ColumnExpressionArgument[bool]] = []
        if self.worker is not None:
            found.append(ArchivedMessage.consumer_worker_id == self.worker)
        if self.older_than is not None:
            found.append(archived_at < clock() - self.older_than)
        if self.by_retention:
            failed = sa.case(
                (ArchivedMessage.outcome != "archived", Queue.failed_retention_seconds)
            )
            seconds = sa.func.coalesce(failed, Queue.retention_seconds)
            kept = seconds * sa.literal(timedelta(seconds=1), sa.Interval)
            found.append(archived_at < clock() - kept)
        if self.message is not None:
            found.append(ArchivedMessage.id == self.message)
        return found

    def count(self, service: QueueService) -> int:
        """Return how many there are."""
        return service.archived.count(self.queue, outcome=self.outcome, where=self.criteria())

    def ids(self, service: QueueService, session: Session) -> array[int]:
        """Return the ids of the archive that there are now."""
        found = sa.select(ArchivedMessage.id).join(Queue, Queue.id == ArchivedMessage.queue_id)
        if self.queue is not None:
            found = found.where(Queue.id == service.queues.get(self.queue).id)
        if self.outcome is not None:
            found = found.where(ArchivedMessage.outcome == self.outcome)
        found = found.where(*self.criteria()).order_by(ArchivedMessage.id)
        return array("q", session.scalars(found, execution_options=_FETCHED))


def still_archived(session: Session, ids: Sequence[int]) -> list[int]:
    """Return those ids that the archive has."""
    found = sa.select(ArchivedMessage.id).where(_one_of(ArchivedMessage.id))
    return list(session.scalars(found.order_by(ArchivedMessage.id), {"ids": list(ids)}))


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """The state and the rates of a queue at one moment.

    Attributes:
        queue: Its name.
        paused: Whether nothing is leased from it.
        ready: Visible, attempts left.
        leased: Held by a consumer.
        scheduled: Waiting for their time.
        exhausted: Out of attempts, not dead letters yet.
        dead: Dead letters; at least as many, if ``dead_capped``.
        dead_capped: Whether there are more dead letters than were counted: up to 10,000, and
            where there are more than 20 queues, up to 200,000 divided by their number.
        oldest_ready_age: How long the longest-waiting ready message has been visible.
        incoming: Messages enqueued each second.
        outgoing: Messages archived each second in each of the last spans, the latest last.
    """

    queue: str
    paused: bool
    ready: int
    leased: int
    scheduled: int
    exhausted: int
    dead: int
    dead_capped: bool
    oldest_ready_age: timedelta | None
    incoming: float
    outgoing: tuple[float, ...]


def activity(scope: Scope, step: timedelta) -> list[QueueActivity]:
    """Return each queue by name; nothing is remembered from one call to the next.

    Args:
        scope: The session, and the settings of the service.
        step: The span of time over which the rates are taken.
    """
    seconds = step.total_seconds()
    rows = scope.execute(health.overview(scope.tables), {"since": step}).all()
    values = {"step": step, "step_seconds": seconds}
    settled: dict[int, list[float]] = {row.id: [0.0] * health.BUCKETS for row in rows}
    arrived: dict[int, int] = {}
    for flow in scope.execute(health.outflow(scope.tables), values):
        if flow.bucket < health.BUCKETS and flow.queue_id in settled:
            settled[flow.queue_id][-1 - flow.bucket] = flow.settled / seconds
        arrived[flow.queue_id] = arrived.get(flow.queue_id, 0) + flow.arrived
    return [
        QueueActivity(
            queue=row.queue,
            paused=row.paused,
            ready=row.ready,
            leased=row.leased,
            scheduled=row.scheduled,
            exhausted=row.exhausted,
            dead=min(row.dead, row.most),
            dead_capped=row.dead > row.most,
            oldest_ready_age=row.oldest,
            incoming=(row.arrived + arrived.get(row.id, 0)) / seconds,
            outgoing=tuple(settled[row.id]),
        )
        for row in rows
    ]

"""The operations that faults happen to: how each begins, what it does, and how its truth is read.

A `support.actors.Actor` does an operation, in a transaction that it commits. ``do`` is written once
for both services: what it awaits is awaitable with `AsyncQueueService`, and plain otherwise.

Each has three readings of the tables, none of which believes what the actor says:

- ``applied``: whether the operation is committed, whole; half of one fails the test;
- ``lost``: whether something that was acknowledged is not there;
- ``doubled``: how many times too often it happened.
"""

# ruff: noqa: ARG002 - one signature for all operations

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import (
    ArchivedMessage,
    Item,
    LeaseLost,
    Message,
    Queue,
    QueueService,
    Worker,
)

from .ledger import Effect, Sent, Start

FAR = 3600
"""Seconds: a lease, or a delay, that does not end during a test."""


async def got(value: Any) -> Any:
    """Await what is awaitable."""
    return await value if inspect.isawaitable(value) else value


@dataclass
class Operation:
    """Something done once to one queue, called ``queue``."""

    queue: str
    lease: float = FAR  # of the delivery that the actor takes first

    name: ClassVar[str]
    takes: ClassVar[bool] = False  # a delivery, before it begins

    def prepare(self, session: Session) -> None:
        """Make what it needs."""
        service = QueueService(session)
        service.queues.create(self.queue)
        if self.takes:
            service.enqueue(self.queue, {"unit": 1})

    async def first(self, session: Any, service: Any) -> Any:
        """Take a delivery, in a transaction of its own that nothing happens to."""
        if not self.takes:
            return None
        (delivery,) = await got(service.dequeue(self.queue, lease=self.lease))
        session.add(Start(message_id=delivery.id, read_ct=delivery.read_ct))
        return delivery

    async def do(self, session: Any, service: Any, held: Any) -> Any:
        raise NotImplementedError

    async def done_after_all(self, session: Any, held: Any, lost: LeaseLost) -> bool:
        """Whether a lease that is lost was given up by this very operation, at an earlier try."""
        return False

    def applied(self, session: Session) -> bool:
        raise NotImplementedError

    def lost(self, session: Session, acknowledged: list[Any]) -> int:
        """Of these results, how many are not there."""
        return len(acknowledged) and not self.applied(session)

    def doubled(self, session: Session, acknowledged: list[Any]) -> int:
        raise NotImplementedError

    def between(self, session: Session) -> None:
        """What others do after it was committed, and before its actor, who missed that, retries."""

    def expire(self, session: Session) -> None:
        """Let the leases run out now."""
        past = sa.func.statement_timestamp() - sa.text("interval '1 s'")
        held = (
            self.of(Message),
            Message.leased_until.is_not(None),
            Message.consumer_worker_id.is_(None),
        )
        session.execute(sa.update(Message).where(*held).values(leased_until=past))

    # --- what they are made of ---

    def of(self, model: Any) -> Any:
        """Criterion: rows of this queue."""
        ids = sa.select(Queue.id).where(Queue.queue_name == self.queue)
        return model.queue_id.in_(ids)

    def count(self, session: Session, model: Any, *where: Any) -> int:
        statement = sa.select(sa.func.count()).select_from(model).where(*where)
        return session.scalars(statement).one()

    def message(self, session: Session) -> Any:
        return session.execute(sa.select(Message).where(self.of(Message))).scalar_one()

    def ids(self) -> Any:
        live = sa.select(Message.id).where(self.of(Message))
        return live.union(sa.select(ArchivedMessage.id).where(self.of(ArchivedMessage)))

    def effects(self, session: Session) -> int:
        return self.count(session, Effect, Effect.message_id.in_(self.ids()))


class Enqueue(Operation):
    """With a key, and a row of the application in the same transaction."""

    name = "enqueue"

    async def do(self, session, service, held):
        receipt = await got(service.enqueue(self.queue, {"unit": 1}, key="unit-1"))
        if not receipt.duplicate:
            session.add(Sent(message_id=receipt.id))
        return receipt.id

    def _rows(self, session):
        rows = self.count(session, Message, self.of(Message))
        sent = self.count(session, Sent, Sent.message_id.in_(self.ids()))
        assert rows == sent, f"{rows} message(s), but {sent} row(s) of the application"
        return rows

    def applied(self, session):
        return self._rows(session) > 0

    def doubled(self, session, acknowledged):
        return max(0, self._rows(session) - 1) + max(0, len({*acknowledged}) - 1)


class Dequeue(Operation):
    """One message, its attempt recorded with the lease."""

    name = "dequeue"

    def prepare(self, session):
        super().prepare(session)
        QueueService(session).enqueue(self.queue, {"unit": 1})

    async def do(self, session, service, held):
        taken = await got(service.dequeue(self.queue, lease=self.lease))
        session.add_all(
            Start(message_id=delivery.id, read_ct=delivery.read_ct) for delivery in taken
        )
        return [delivery.read_ct for delivery in taken]

    def _starts(self, session):
        row = self.message(session)
        found = session.scalars(
            sa.select(Start.read_ct).where(Start.message_id == row.id).order_by(Start.read_ct)
        ).all()
        assert found == list(range(1, row.read_ct + 1)), f"attempts {found}, read_ct {row.read_ct}"
        return row.read_ct

    def applied(self, session):
        return self._starts(session) > 0

    def lost(self, session, acknowledged):
        taken = [item for result in acknowledged for item in result]
        return sum(delivery > self._starts(session) for delivery in taken)

    def doubled(self, session, acknowledged):
        taken = [item for result in acknowledged for item in result]
        return len(taken) - len({*taken})


class _Settle(Operation):
    takes = True

    async def do(self, session, service, held):
        session.add(Effect(message_id=held.id, read_ct=held.read_ct))
        return await self.settle(service, held)

    async def settle(self, service, held):
        raise NotImplementedError

    def _whole(self, session, settled):
        effects = self.effects(session)
        assert (effects > 0) == settled, f"{effects} effect(s), but settled is {settled}"
        return settled

    def doubled(self, session, acknowledged):
        return max(0, self.effects(session) - 1) + max(0, len(acknowledged) - 1)


class Extend(Operation):
    """For longer than the lease was. It may be repeated, so it writes no other rows."""

    name = "extend"
    takes = True

    async def do(self, session, service, held):
        return (await got(service.extend(held, 2 * FAR))).read_ct

    def applied(self, session):
        far = sa.func.statement_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, 1.5 * FAR)
        return self.count(session, Message, self.of(Message), Message.leased_until > far) == 1

    def doubled(self, session, acknowledged):
        return max(0, len({*acknowledged}) - 1)


class Archive(_Settle):
    name = "archive"

    async def settle(self, service, held):
        await got(service.archive(held))
        return held.read_ct

    async def done_after_all(self, session, held, lost):
        statement = sa.select(ArchivedMessage.read_ct).where(
            ArchivedMessage.id == held.id, ArchivedMessage.read_ct == held.read_ct
        )
        return (await got(session.execute(statement))).first() is not None

    def applied(self, session):
        archived = self.count(session, ArchivedMessage, self.of(ArchivedMessage))
        live = self.count(session, Message, self.of(Message))
        assert (archived, live) in {(0, 1), (1, 0)}, f"{archived} archived, {live} live"
        return self._whole(session, archived == 1)


class Fail(_Settle):
    """Put back for another attempt, after a while."""

    name = "fail"

    async def settle(self, service, held):
        return (await got(service.fail(held, "broken", delay=FAR))).id

    async def done_after_all(self, session, held, lost):
        now = lost.whereabouts[held.id]
        return (now.state, now.read_ct) == ("scheduled", held.read_ct)

    def applied(self, session):
        row = self.message(session)
        failed = row.last_error is not None
        if row.read_ct == 1:
            assert failed == (row.leased_until is None), "half failed"
        return self._whole(session, failed)


class Reclaim(Operation):
    """Three messages of a worker that fell silent."""

    name = "reclaim"

    def prepare(self, session):
        super().prepare(session)
        service = QueueService(session)
        service.enqueue_many(self.queue, [1, 2, 3])
        worker = service.workers.register("silent", queues=[self.queue])
        assert len(service.dequeue(self.queue, 3, lease=FAR, worker=worker)) == 3
        long_ago = sa.func.statement_timestamp() - sa.text("interval '1 h'")
        session.execute(
            sa.update(Worker).where(Worker.id == worker.id).values(heartbeat_at=long_ago)
        )

    async def do(self, session, service, held):
        return await got(service.workers.reclaim(silent_for=60, queue=self.queue))

    def _silent(self):
        return Worker.queues.contains([self.queue]), Worker.name == "silent"

    def between(self, session: Session) -> None:
        """A live worker takes what came back: a second reclaim must leave it alone."""
        service = QueueService(session)
        worker = service.workers.register("live", queues=[self.queue])
        service.dequeue(self.queue, 1, lease=FAR, worker=worker)

    def applied(self, session):
        ids = sa.select(Worker.id).where(*self._silent())
        held = self.count(
            session, Message, self.of(Message), Message.consumer_worker_id.in_(ids),
            Message.leased_until.is_not(None),
        )  # fmt: skip
        stopped = self.count(session, Worker, *self._silent(), Worker.status == "stopped")
        assert (held, stopped) in {(3, 0), (0, 1)}, f"{held} held, {stopped} stopped"
        return stopped == 1

    def doubled(self, session, acknowledged):
        broken = self.count(
            session, Message, self.of(Message), Message.read_ct == 2, ~Message.leased
        )
        return broken + max(0, sum(acknowledged) - 3)


class Prune(Operation):
    """Four archived messages that are old, one that is not."""

    name = "prune"

    def prepare(self, session):
        super().prepare(session)
        service = QueueService(session)
        service.enqueue_many(self.queue, [Item(n) for n in range(5)])
        service.archive_many(service.dequeue(self.queue, 5))
        old = sa.func.statement_timestamp() - sa.text("interval '2 h'")
        session.execute(
            sa.update(ArchivedMessage)
            .where(
                self.of(ArchivedMessage), ArchivedMessage.payload.op("<>")(sa.text("'0'::jsonb"))
            )
            .values(archived_at=old)
        )

    async def do(self, session, service, held):
        return await got(service.archived.prune(FAR, queue=self.queue))

    def applied(self, session):
        left = self.count(session, ArchivedMessage, self.of(ArchivedMessage))
        assert left in {5, 1}, f"{left} of 5 are left"
        return left == 1

    def doubled(self, session, acknowledged):
        return max(0, sum(acknowledged) - 4)


OPERATIONS: dict[str, type[Operation]] = {
    case.name: case for case in (Enqueue, Dequeue, Extend, Archive, Fail, Reclaim, Prune)
}

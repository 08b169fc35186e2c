"""What a type checker sees of the models: the ready-made ones, and a host's own."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, assert_type

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from pgqrs_sa import (
    ArchivedMessage,
    ArchivedMessageMixin,
    Base,
    Message,
    MessageMixin,
    Models,
    Queue,
    QueueMixin,
    QueueService,
    Worker,
    WorkerMixin,
    metadata,
)

assert_type(metadata, sa.MetaData)


def instances(session: Session) -> None:
    """Attributes have the types of their columns, and hybrids those of Python."""
    message = Message(queue_name="mail", payload={"a": 1}, delay=60, priority=1)
    session.add(message)
    assert_type(message.id, int)
    assert_type(message.payload, Any)
    assert_type(message.headers, dict[str, Any] | None)
    assert_type(message.vt, datetime)
    assert_type(message.max_read_ct, int | None)
    assert_type(message.dequeued_at, datetime | None)
    assert_type(message.leased_until, datetime | None)
    assert_type(message.dedup_key, str | None)
    assert_type(message.queue_name, str | None)
    assert_type(message.state, str)
    assert_type(message.ready, bool)
    assert_type(message.scheduled, bool)
    assert_type(message.leased, bool)
    assert_type(message.exhausted, bool)
    assert_type(message.has_attempts, bool)
    message.delay = 5
    message.delay = timedelta(seconds=5)

    assert_type(session.get(Message, 1), Message | None)
    assert_type(session.get(Queue, 1), Queue | None)


def queries(session: Session) -> None:
    """In a query, a column and a hybrid have the types of what they select."""
    rows = session.execute(sa.select(Message.id, Message.vt, Message.state, Message.ready)).all()
    for row in rows:
        id_, vt, state, ready = row.tuple()
        assert_type(id_, int)
        assert_type(vt, datetime)
        assert_type(state, str)
        assert_type(ready, bool)
    sa.select(Message).where(Message.ready, Message.state == "leased").order_by(Message.state)
    sa.select(Message.state, sa.func.count()).group_by(Message.state)
    sa.select(Message).where(Message.queue_name == "mail").order_by(Message.queue_name)
    assert_type(session.scalars(sa.select(Queue.lease_seconds)).all()[0], float)
    assert_type(session.scalars(sa.select(ArchivedMessage.outcome)).one(), str)
    assert_type(session.scalars(sa.select(ArchivedMessage.original_msg_id)).one(), int)
    assert_type(session.scalars(sa.select(Worker.queues)).one(), list[str])


class Host(DeclarativeBase):
    """A host's own registry."""


class Receipts(Host):
    """A host's table with a foreign key to the ready-made message."""

    __tablename__ = "receipts"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Message.id, ondelete="SET NULL"))
    message: Mapped[Message | None] = relationship(Message)


class QueueBase(DeclarativeBase):
    """A registry for a host's own queue classes, on the shared MetaData."""

    metadata = sa.MetaData()
    __pgqrs_schema__ = "jobs"


class OwnQueue(QueueMixin, QueueBase):
    """A queue of the host's own."""


class OwnMessage(MessageMixin, QueueBase):
    """A message with one more column."""

    tenant_id: Mapped[int | None] = mapped_column(index=True)


class OwnArchived(ArchivedMessageMixin, QueueBase):
    """An archived message of the host's own."""


class OwnWorker(WorkerMixin, QueueBase):
    """A worker of the host's own."""


def own(session: Session) -> None:
    """A host's own classes serve as the ready-made ones do."""
    service = QueueService(session, models=Models(OwnQueue, OwnMessage, OwnArchived, OwnWorker))
    service.dequeue("mail", where=[OwnMessage.tenant_id == 7, OwnMessage.ready])
    assert_type(OwnMessage().tenant_id, int | None)
    assert_type(OwnMessage().state, str)
    assert_type(issubclass(Message, Base), bool)


def wrong() -> None:
    """What is wrong is an error for the checker: an ignore that is not needed is one too."""
    message = Message()
    message.delay = "5"  # type: ignore[assignment]
    message.vt = 5  # type: ignore[assignment]
    Models(Message, Queue)  # type: ignore[arg-type]

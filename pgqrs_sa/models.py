"""The four tables, as mixins and as ready-made classes.

Ready-made, on the library's own registry and `metadata`::

    from pgqrs_sa import Message, metadata

    receipt_id: Mapped[int | None] = mapped_column(ForeignKey(Message.id, ondelete="SET NULL"))

Your own classes, on your MetaData, in another schema, or with more columns::

    class QueueBase(DeclarativeBase):       # a registry of its own keeps your class names free
        metadata = Base.metadata
        __pgqrs_schema__ = "jobs"           # omit for the default schema

    class Queue(QueueMixin, QueueBase): ...
    class ArchivedMessage(ArchivedMessageMixin, QueueBase): ...
    class Worker(WorkerMixin, QueueBase): ...
    class Message(MessageMixin, QueueBase):
        tenant_id: Mapped[int | None] = mapped_column(index=True)

    QueueService(session, models=Models(Queue, Message, ArchivedMessage, Worker))

Declare more columns and indexes as attributes: a ``__table_args__`` of your own would replace the
constraints and indexes declared here. Table names are fixed, because migrations refer to them. A
column added to messages must be nullable or have a server default, since ``enqueue`` does not set
it: use ``session.add(Message(...))``. If the archive has the same column, its value is copied to
the archive, and back on a requeue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase

from ._core import orm_events as _orm_events
from .errors import InvalidArgument
from .mixins import (
    SCHEMA_VERSION,
    VERSION_COMMENT,
    ArchivedMessageMixin,
    MessageMixin,
    QueueMixin,
    WorkerMixin,
)

__all__ = [
    "READY_MADE",
    "SCHEMA_VERSION",
    "VERSION_COMMENT",
    "ArchivedMessage",
    "ArchivedMessageMixin",
    "Base",
    "Message",
    "MessageMixin",
    "Models",
    "Queue",
    "QueueMixin",
    "Worker",
    "WorkerMixin",
    "metadata",
    "models_in",
    "models_of",
    "tables_in",
]

_orm_events.listen(MessageMixin)


class Base(DeclarativeBase):
    """The registry and MetaData of the ready-made classes."""


metadata = Base.metadata
"""The MetaData of the ready-made classes: add it to your Alembic ``target_metadata``."""


class Queue(QueueMixin, Base):
    """The ready-made queue."""


class Message(MessageMixin, Base):
    """The ready-made message."""


class ArchivedMessage(ArchivedMessageMixin, Base):
    """The ready-made archived message."""


class Worker(WorkerMixin, Base):
    """The ready-made worker."""


@dataclass(frozen=True, slots=True)
class Models:
    """The four classes that a service uses: the ready-made ones, or a host's own."""

    queue: type[QueueMixin] = Queue
    message: type[MessageMixin] = Message
    archived: type[ArchivedMessageMixin] = ArchivedMessage
    worker: type[WorkerMixin] = Worker

    def __post_init__(self) -> None:
        classes = (self.queue, self.message, self.archived, self.worker)
        homes = {(id((t := sa.inspect(cls).local_table).metadata), t.schema) for cls in classes}
        if len(homes) > 1:
            names = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
            raise InvalidArgument(
                f"the four classes of Models share one MetaData and one schema, and {names} do "
                "not: declare all four of your own"
            )


READY_MADE = Models()
"""The ready-made classes, the default everywhere."""


def models_of(given: Models | None) -> Models:
    """Return a host's own classes, or the ready-made ones if it gives none."""
    return READY_MADE if given is None else given


@cache
def models_in(schema: str) -> Models:
    """Return the four classes of this release for a schema, without a host's additions.

    They have a registry and MetaData of their own.

    Args:
        schema: The schema's plain name.
    """

    class Base(DeclarativeBase):
        __pgqrs_schema__ = schema

    class Queue(QueueMixin, Base): ...

    class Message(MessageMixin, Base): ...

    class ArchivedMessage(ArchivedMessageMixin, Base): ...

    class Worker(WorkerMixin, Base): ...

    return Models(Queue, Message, ArchivedMessage, Worker)


@cache
def tables_in(schema: str) -> Mapping[str, sa.Table]:
    """Return the tables of `models_in`, by their names.

    Args:
        schema: The schema's plain name.
    """
    found = sa.inspect(models_in(schema).queue).registry.metadata.tables.values()
    return {table.name: table for table in found}

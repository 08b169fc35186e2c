"""The four tables as this release has them, without what a host has added to its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase

from .models import ArchivedMessageMixin, MessageMixin, Models, QueueMixin, WorkerMixin

__all__ = ["models_in", "tables_in"]


@cache
def models_in(schema: str) -> Models:
    """Return the four classes for a schema, on a registry and MetaData of their own.

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

"""Counting rows that refer to rows which are not there: no foreign key would keep them out."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..models import Models
from .parts import tables


@cache
def orphans(models: Models) -> Executable:
    """One row: messages and archived ones without their queue, live leases without their worker.

    A producer that is gone, or the worker in a lease that is over, is no orphan: the rows of
    workers are purged while what they did is kept.
    """
    queue, message, archived, worker = tables(models)

    def count(table: sa.Table, *criteria: ColumnElement[bool]) -> ColumnElement[int]:
        return sa.select(func.count()).select_from(table).where(*criteria).scalar_subquery()

    def no_queue(table: sa.Table) -> ColumnElement[bool]:
        return sa.not_(sa.exists().where(queue.c.id == table.c.queue_id))

    no_worker = sa.not_(sa.exists().where(worker.c.id == message.c.consumer_worker_id))
    return sa.select(
        count(message, no_queue(message)).label("messages_without_queue"),
        count(archived, no_queue(archived)).label("archived_without_queue"),
        count(
            message,
            states.leased(message.c),
            message.c.consumer_worker_id.is_not(None),
            no_worker,
        ).label("leases_without_worker"),
    )

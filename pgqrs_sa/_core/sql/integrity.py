"""Rows that refer to rows that do not exist, as there are no foreign keys to prevent them."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.sql import ColumnElement, Executable

from .. import states
from ..tables import Tables


@cache
def missing_queues(tables: Tables) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """Queue ids referenced by live and by archived messages for which no queue exists."""
    _, message, archived, _ = tables
    return (
        _without_queue(tables, _ids(message, "a")),
        _without_queue(tables, _ids(archived, "b")),
    )


def _ids(table: sa.Table, name: str) -> sa.Select[Any]:
    """The different ids of queues in a table: one look-up in an index each, not a scan."""
    rows = table.c
    first = sa.select(func.min(rows.queue_id).label("id"))
    found = first.cte(f"pgqrs_ids_{name}", recursive=True)
    following = (
        sa.select(func.min(rows.queue_id)).where(rows.queue_id > found.c.id).scalar_subquery()
    )
    found = found.union_all(sa.select(following).where(found.c.id.is_not(None)))
    return sa.select(found.c.id).where(found.c.id.is_not(None))


def _without_queue(tables: Tables, ids: Any) -> sa.Select[Any]:
    queue = tables.queue
    found = ids.subquery("found")
    there = sa.exists().where(queue.c.id == found.c.id)
    return sa.select(found.c.id).where(sa.not_(there)).order_by(found.c.id)


@cache
def orphans(tables: Tables) -> Executable:
    """One row: messages and archived ones without their queue, live leases without their worker.

    A producer that is gone, or the worker in a lease that is over, is no orphan: the rows of
    workers are purged while what they did is kept.
    """
    _, message, archived, worker = tables
    live, settled = missing_queues(tables)

    def count(table: sa.Table, *criteria: ColumnElement[bool]) -> ColumnElement[int]:
        return sa.select(func.count()).select_from(table).where(*criteria).scalar_subquery()

    no_worker = sa.not_(sa.exists().where(worker.c.id == message.c.consumer_worker_id))
    return sa.select(
        count(message, message.c.queue_id.in_(live)).label("messages_without_queue"),
        count(archived, archived.c.queue_id.in_(settled)).label("archived_without_queue"),
        count(
            message,
            states.leased(message.c),
            message.c.consumer_worker_id.is_not(None),
            no_worker,
        ).label("leases_without_worker"),
    )

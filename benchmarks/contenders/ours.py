"""What all that work on our tables have in common: the tables, and what is put into them."""

from __future__ import annotations

import json
from typing import ClassVar

import psycopg
import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from pgqrs_sa import metadata as tables

from ..work import Payload
from .base import QUEUE, Contender, Family, create_orders

__all__ = ["SHAPES", "WARM", "Ours", "items_text"]

WARM = "warm"
"""A queue for what is only slow the first time."""

_MESSAGES = (
    "INSERT INTO pgqrs_messages (queue_id, payload, vt, priority)"
    " SELECT q.id, %(payload)s, statement_timestamp() + %(ahead)s * interval '1 s', %(priority)s"
    " FROM pgqrs_queues AS q, generate_series(1, %(count)s) WHERE q.queue_name = %(queue)s"
)
_ARCHIVED = (
    "INSERT INTO pgqrs_archive (id, queue_id, payload, priority, vt, enqueued_at,"
    " read_ct, max_read_ct, dequeued_at, outcome)"
    " SELECT -n, q.id, %(payload)s, 0, t, t, 1, 5, t, 'archived'"
    " FROM pgqrs_queues AS q, generate_series(1, %(count)s) AS n, statement_timestamp() AS t"
    " WHERE q.queue_name = %(queue)s"
)
_QUEUES = "INSERT INTO pgqrs_queues (queue_name) SELECT 'q' || n FROM generate_series(1, 1000) AS n"
_SPREAD = (
    "INSERT INTO pgqrs_messages (queue_id, payload, vt, priority)"
    " SELECT q.id, %(payload)s, statement_timestamp(), 0"
    " FROM pgqrs_queues AS q, generate_series(1, %(count)s / 1000) WHERE q.queue_name LIKE 'q%%'"
)
_DAY = 86_400

SHAPES = ("empty", "ready", "scheduled", "archived", "priorities", "queues")
"""The shapes of `scenarios.shapes` that our tables can be given."""


class Ours(Contender):
    """Our tables."""

    family: ClassVar[Family] = "ours"
    packages: ClassVar[tuple[str, ...]] = ("pgqrs-sa", "sqlalchemy", "psycopg")

    def install(self) -> None:
        """See `Contender`."""
        engine = sa.create_engine(self.place.url())
        tables.create_all(engine)
        with Session(engine) as session, session.begin():
            # The entries of the last queue are at the end of an index, as those of an only queue.
            QueueService(session).queues.create(WARM)
            QueueService(session).queues.create(QUEUE)
        engine.dispose()
        create_orders(self.place)

    def fill(self, count: int, payload: Payload) -> None:
        """See `Contender`."""
        self._put(_MESSAGES, count, payload)

    def shape(self, kind: str, rows: int, payload: Payload) -> None:
        """See `Contender`; what is to be taken comes last, by its id."""
        if kind == "ready":
            self._put(_MESSAGES, rows, payload)
        elif kind == "scheduled":
            self._put(_MESSAGES, rows, payload, ahead=_DAY)
        elif kind == "archived":
            self._put(_ARCHIVED, rows, payload)
        elif kind == "priorities":
            self._put(_MESSAGES, rows, payload, ahead=_DAY, priority=-1)
            self._put(_MESSAGES, 1000, payload, priority=1)
        elif kind == "queues":
            self._put(_QUEUES, rows, payload)
            self._put(_SPREAD, rows, payload)
        self._put(_MESSAGES, 1000, payload)

    def _put(
        self, statement: str, count: int, payload: Payload, *, ahead: int = 0, priority: int = 0
    ) -> None:
        values = {
            "payload": Jsonb(payload),
            "ahead": ahead,
            "priority": priority,
            "count": count,
            "queue": QUEUE,
        }
        with psycopg.connect(self.place.conninfo, autocommit=True) as connection:
            connection.execute(statement.encode(), values)


def items_text(payload: Payload, size: int) -> tuple[str, int]:
    """Return a batch as the JSON array that our statement takes, and the size of one payload."""
    text = json.dumps(payload)
    return f"[{','.join([text] * size)}]", len(text)

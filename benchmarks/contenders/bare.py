"""A bare `Session` that executes the text of the same SQL: the price of the package itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ..work import Payload, Progress, Tally
from . import sql
from .base import ORDER, ORDERS_OF, QUEUE
from .ours import WARM, Ours, items_text

__all__ = ["Bare"]

_PREPARED = 6


def _written(numbers: Iterable[int]) -> str:
    """A list as PostgreSQL writes it: psycopg takes longer for one of Python's."""
    return f"{{{','.join(map(str, numbers))}}}"


class Bare(Ours):
    """``session.execute(text(...))``, with the JSON made and read by the standard library."""

    name = "bare"
    title = "bare Session, same SQL"
    family = "baseline"
    exact = True

    def open(self) -> None:
        """See `Contender`."""
        self._engine = sa.create_engine(self.place.url())
        self._one = sa.text(sql.enqueue_one().text)
        self._many = sa.text(sql.enqueue_many().text)
        self._lease = sa.text(sql.dequeue().text)
        self._archive = sa.text(sql.archive().text)
        for _ in range(_PREPARED):
            with Session(self._engine) as session, session.begin():
                self._enqueue(session, {}, WARM)
            self._settle(self._take(1, WARM))

    def close(self) -> None:
        """See `Contender`."""
        self._engine.dispose()

    def _enqueue(self, session: Session, payload: Payload, queue: str = QUEUE) -> None:
        text = json.dumps(payload)
        values = sql.enqueue_one().values(queue=queue, payload=text, size=len(text.encode()))
        session.execute(self._one, values).one()

    def _leased(self, session: Session, limit: int, queue: str) -> list[Any]:
        values = sql.dequeue().values(queue=queue, limit=limit)
        rows = session.execute(self._lease, values).all()
        for row in rows:
            json.loads(row.payload)
        return list(rows)

    def _take(self, limit: int, queue: str = QUEUE) -> list[Any]:
        with Session(self._engine) as session, session.begin():
            return self._leased(session, limit, queue)

    def _archived(self, session: Session, rows: list[Any]) -> None:
        values = sql.archive().values(
            ids=_written(row.id for row in rows),
            tokens=_written(row.fencing_token for row in rows),
            required=len(rows),
        )
        session.execute(self._archive, values).all()

    def _settle(self, rows: list[Any]) -> None:
        with Session(self._engine) as session, session.begin():
            self._archived(session, rows)

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                self._enqueue(session, payload)
        return Tally(count)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        with Session(self._engine) as session, session.begin():
            for _ in range(count):
                self._enqueue(session, payload)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`; the JSON of the batch is built again each time."""
        for _ in range(count):
            items = json.dumps([payload] * size)
            values = sql.enqueue_many().values(items=items, size=items_text(payload, 1)[1])
            with Session(self._engine) as session, session.begin():
                session.execute(self._many, values).all()
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        order = sa.text(ORDER)
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                session.execute(order)
                self._enqueue(session, payload)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while rows := self._take(batch):
            self._settle(rows)
            if not progress.add(len(rows)):
                return

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        order = sa.text(ORDER)
        while rows := self._take(batch):
            for row in rows:
                with Session(self._engine) as session, session.begin():
                    session.execute(order)
                    self._archived(session, [row])
                if not progress.add(1):
                    return

    def effects_together(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while rows := self._take(batch):
            with Session(self._engine) as session, session.begin():
                session.execute(sa.text(ORDERS_OF.format(len(rows))))
                self._archived(session, rows)
            if not progress.add(len(rows)):
                return

    def dequeue_times(self, count: int, batch: int) -> Tally:
        """See `Contender`."""
        times = []
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                session.connection()
                start = time.perf_counter()
                self._leased(session, batch, QUEUE)
                times.append((time.perf_counter() - start) * 1e3)
        return Tally(count * batch, {"times": times})

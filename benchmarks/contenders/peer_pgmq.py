"""pgmq, by raw psycopg, and pgmq-sqlalchemy: both on the SQL file of pgmq, without an extension."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.orm import Session

from ..place import Place
from ..work import Payload, Progress, Tally
from .base import ORDER, ORDERS_OF, POLL, QUEUE, Contender, age_ms, create_orders

__all__ = ["Pgmq", "PgmqSqlalchemy", "pgmq_sql"]

_LEASE = 30
_SEND = "SELECT * FROM pgmq.send(%s, %s)"
_SEND_BATCH = "SELECT * FROM pgmq.send_batch(%s, %s::jsonb[])"
_READ = f"SELECT msg_id, message FROM pgmq.read(%s, {_LEASE}, %s)"  # noqa: S608 - a number
_ARCHIVE = "SELECT * FROM pgmq.archive(%s, %s::bigint[])"
_PUT = (
    "INSERT INTO pgmq.{table} (vt, message)"
    " SELECT clock_timestamp() + %s * interval '1 s', %s FROM generate_series(1, %s)"
)
_DAY = 86_400


def pgmq_sql(given: str | None) -> str | None:
    """Return the file that was given, or the one that the package pgmq has in it, or None."""
    if given is not None:
        return given
    spec = importlib.util.find_spec("pgmq")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "sql" / "pgmq.sql"
    return str(file) if file.is_file() else None


def _no_sql(place: Place) -> str | None:
    if place.pgmq_sql is None:
        return "no SQL of pgmq: give --pgmq-sql FILE, or pip install pgmq"
    return None


class Pgmq(Contender):
    """Raw psycopg, one connection in autocommit."""

    name = "pgmq"
    title = "pgmq, raw psycopg"
    wakes = ("poll",)
    exact = True

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """See `Contender`."""
        return _no_sql(place) or super().missing(place)

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Return nothing: the SQL file has no version of its own."""
        return {}

    def install(self) -> None:
        """See `Contender`."""
        script = Path(str(self.place.pgmq_sql)).read_bytes()
        with psycopg.connect(self.place.conninfo, autocommit=True) as connection:
            connection.execute(script)
            connection.execute("SELECT pgmq.create(%s)", [QUEUE])
        create_orders(self.place)

    def fill(self, count: int, payload: Payload) -> None:
        """See `Contender`."""
        self._put(f"q_{QUEUE}", count, payload)

    def shape(self, kind: str, rows: int, payload: Payload) -> None:
        """See `Contender`."""
        if kind == "ready":
            self._put(f"q_{QUEUE}", rows, payload)
        elif kind == "scheduled":
            self._put(f"q_{QUEUE}", rows, payload, ahead=_DAY)
        elif kind == "archived":
            self._put(f"a_{QUEUE}", rows, payload)
        elif kind != "empty":
            raise RuntimeError("it has no priorities, and a table for each queue")
        self._put(f"q_{QUEUE}", 1000, payload)

    def _put(self, table: str, count: int, payload: Payload, *, ahead: int = 0) -> None:
        statement = _PUT.format(table=table)
        if table.startswith("a_"):
            statement = statement.replace("(vt, message)", "(msg_id, vt, message)")
            statement = statement.replace("SELECT ", "SELECT n, ") + " AS n"
        with psycopg.connect(self.place.conninfo, autocommit=True) as connection:
            connection.execute(statement.encode(), [ahead, Jsonb(payload), count])

    def open(self) -> None:
        """See `Contender`."""
        self._connection = psycopg.connect(self.place.conninfo, autocommit=True)

    def close(self) -> None:
        """See `Contender`."""
        self._connection.close()

    def _send(self, payload: Payload) -> None:
        self._connection.execute(_SEND, [QUEUE, Jsonb(payload)]).fetchone()

    def _read(self, batch: int) -> list[tuple[Any, ...]]:
        return self._connection.execute(_READ, [QUEUE, batch]).fetchall()

    def _archive(self, rows: list[tuple[Any, ...]]) -> None:
        ids = [row[0] for row in rows]
        found = self._connection.execute(_ARCHIVE, [QUEUE, ids]).fetchall()
        if len(found) != len(rows):  # others have settled them: what goes with it is rolled back
            raise RuntimeError(f"archived {len(found)} of {len(rows)}")

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._send(payload)
        return Tally(count)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        with self._connection.transaction():
            for _ in range(count):
                self._send(payload)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            values = [QUEUE, [Jsonb(payload)] * size]
            self._connection.execute(_SEND_BATCH, values).fetchall()
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            with self._connection.transaction():
                self._connection.execute(ORDER)
                self._send(payload)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while rows := self._read(batch):
            self._archive(rows)
            if not progress.add(len(rows)):
                return

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while rows := self._read(batch):
            for row in rows:
                with self._connection.transaction():
                    self._connection.execute(ORDER)
                    self._archive([row])
                if not progress.add(1):
                    return

    def effects_together(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while rows := self._read(batch):
            with self._connection.transaction():
                self._connection.execute(ORDERS_OF.format(len(rows)).encode())
                self._archive(rows)
            if not progress.add(len(rows)):
                return

    def dequeue_times(self, count: int, batch: int) -> Tally:
        """See `Contender`; its commit is part of it."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._read(batch)
            times.append((time.perf_counter() - start) * 1e3)
        return Tally(count * batch, {"times": times})

    def watch(self, count: int, wake: str, longest: float) -> Tally:
        """See `Contender`."""
        del wake
        ages: list[float] = []
        end = time.monotonic() + longest
        while len(ages) < count and time.monotonic() < end:
            rows = self._read(1)
            ages.extend(age_ms(row[1]) for row in rows)
            if rows:
                self._archive(rows)
            else:
                time.sleep(POLL)
        return Tally(len(ages), {"latency_ms": ages})


class PgmqSqlalchemy(Contender):
    """Its client in a `Session`; it cannot create the queue here, for it wants the extension.

    It takes the columns of a message by their place, which a newer pgmq has changed, so that the
    payload is not where it looks: latencies, which travel in there, are not measured.
    """

    name = "pgmq-sqlalchemy"
    title = "pgmq-sqlalchemy"
    exact = True
    packages = ("pgmq-sqlalchemy",)

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """See `Contender`."""
        return super().missing(place) or _no_sql(place)

    def install(self) -> None:
        """See `Contender`."""
        Pgmq(self.place).install()

    def fill(self, count: int, payload: Payload) -> None:
        """See `Contender`."""
        Pgmq(self.place).fill(count, payload)

    def open(self) -> None:
        """See `Contender`."""
        from pgmq_sqlalchemy import PGMQueue  # noqa: PLC0415 - a peer is not always installed

        self._engine = sa.create_engine(self.place.url())
        self._client: Any = PGMQueue(engine=self._engine)

    def close(self) -> None:
        """See `Contender`."""
        self._engine.dispose()

    def singles(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._client.send(QUEUE, payload)
        return Tally(count)

    def in_transaction(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        with Session(self._engine) as session, session.begin():
            for _ in range(count):
                self._client.send(QUEUE, payload, session=session, commit=False)
        return Tally(count)

    def batches(self, count: int, size: int, payload: Payload) -> Tally:
        """See `Contender`."""
        for _ in range(count):
            self._client.send_batch(QUEUE, [payload] * size)
        return Tally(count * size)

    def business(self, count: int, payload: Payload) -> Tally:
        """See `Contender`."""
        order = sa.text(ORDER)
        for _ in range(count):
            with Session(self._engine) as session, session.begin():
                session.execute(order)
                self._client.send(QUEUE, payload, session=session, commit=False)
        return Tally(count)

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while found := self._client.read_batch(QUEUE, batch, _LEASE):
            self._client.archive_batch(QUEUE, [row.msg_id for row in found])
            if not progress.add(len(found)):
                return

    def effects(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        order = sa.text(ORDER)
        while found := self._client.read_batch(QUEUE, batch, _LEASE):
            for row in found:
                with Session(self._engine) as session, session.begin():
                    session.execute(order)
                    self._archive(session, [row])
                if not progress.add(1):
                    return

    def effects_together(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        while found := self._client.read_batch(QUEUE, batch, _LEASE):
            with Session(self._engine) as session, session.begin():
                session.execute(sa.text(ORDERS_OF.format(len(found))))
                self._archive(session, found)
            if not progress.add(len(found)):
                return

    def _archive(self, session: Session, found: list[Any]) -> None:
        ids = [row.msg_id for row in found]
        done = self._client.archive_batch(QUEUE, ids, session=session, commit=False)
        if len(done) != len(ids):
            raise RuntimeError(f"archived {len(done)} of {len(ids)}")


class PgmqSqlalchemyChained(PgmqSqlalchemy):
    """The same with `ServiceChained`'s loop, since its methods take a session as well."""

    name = "pgmq-sqlalchemy-chained"
    title = "pgmq-sqlalchemy, archive + next read"
    only = ("cost", "drain")

    @classmethod
    def offers(cls, work: str) -> bool:
        """See `Contender`: only how it drains differs."""
        return work in ("consume", "drain", "fill")

    def consume(self, batch: int, progress: Progress) -> None:
        """See `Contender`."""
        found: list[Any] = []
        while True:
            with Session(self._engine) as session, session.begin():
                done = found
                if done:
                    self._archive(session, done)
                found = (
                    self._client.read_batch(QUEUE, batch, _LEASE, session=session, commit=False)
                    or []
                )
            if (done and not progress.add(len(done))) or not found:
                return

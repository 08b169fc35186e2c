"""Tables in which producers and consumers record what they did, and the audit of them.

Write the rows in the transactions whose fate they tell::

    session.add(Sent(...))      # with the enqueue: the message is committed if this is
    session.add(Start(...))     # when a handler begins: one for each (message, attempt)
    session.add(Effect(...))    # with the archive: the effect of the work

    audit(engine, "mail").assert_clean()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqrs_sa import ArchivedMessage, Message, Queue

_clock = sa.func.clock_timestamp()


class _Base(DeclarativeBase):
    type_annotation_map = {datetime: sa.DateTime(timezone=True), int: sa.BigInteger}  # noqa: RUF012


books = _Base.metadata


class Sent(_Base):
    """A message that a producer made; committed with it."""

    __tablename__ = "book_sent"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int]
    unit: Mapped[str | None]
    at: Mapped[datetime] = mapped_column(server_default=_clock)


class Start(_Base):
    """An attempt that began; no constraint forbids a second one of the same number."""

    __tablename__ = "book_starts"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int]
    read_ct: Mapped[int]
    by: Mapped[str | None]
    at: Mapped[datetime] = mapped_column(server_default=_clock)


class Effect(_Base):
    """What the work on a message left behind; no constraint forbids a second one."""

    __tablename__ = "book_effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int]
    read_ct: Mapped[int]
    by: Mapped[str | None]
    at: Mapped[datetime] = mapped_column(server_default=_clock)


@dataclass(frozen=True)
class Audit:
    """What became of the messages of a queue.

    Attributes:
        committed: Messages whose enqueue was committed (all there are, if nothing is in `Sent`).
        lost: Of these, how many are neither live nor in the archive.
        live: Messages that are not settled.
        leased: Of these, how many are under a lease, run out or not.
        archived: Messages that were archived as done.
        dead: Dead letters.
        other: Cancelled and discarded ones.
        effects: Rows in `Effect`.
        doubled: Messages with more than one effect, or more than once among live and archived.
        missing: Messages that were archived as done without an effect.
        stray: Effects of messages that were not archived as done.
        attempts: The sum of ``read_ct`` over all messages.
        started: Rows in `Start`.
        uncounted: Attempts that began more than once, or with a number that was never counted.
    """

    committed: int
    lost: int
    live: int
    leased: int
    archived: int
    dead: int
    other: int
    effects: int
    doubled: int
    missing: int
    stray: int
    attempts: int
    started: int
    uncounted: int

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def assert_clean(self, *, live: int = 0) -> Audit:
        """Each message has exactly one effect, or is dead; every attempt counts; none is held."""
        wanted = {
            "lost": 0, "doubled": 0, "missing": 0, "stray": 0, "uncounted": 0, "leased": 0,
            "live": live, "effects": self.archived,
        }  # fmt: skip
        wrong = {k: (getattr(self, k), v) for k, v in wanted.items() if getattr(self, k) != v}
        assert not wrong, f"(found, wanted): {wrong} in {self}"
        return self


def audit(engine: sa.Engine, queue: str = "mail", *, sent: Collection[int] = ()) -> Audit:
    """Count what became of a queue's messages, at one moment.

    Args:
        engine: On the database, directly.
        queue: The queue's name; the books are taken to be about this queue alone.
        sent: Ids that producers were told are committed, if they do not write `Sent`.
    """
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        queue_id = session.scalars(sa.select(Queue.id).where(Queue.queue_name == queue)).one()
        live = _rows(session, Message.id, Message.read_ct, Message.leased_until, of=queue_id)
        kept = _rows(
            session,
            ArchivedMessage.id,
            ArchivedMessage.read_ct,
            ArchivedMessage.outcome,
            of=queue_id,
        )
        committed = {*session.scalars(sa.select(Sent.message_id)), *sent}
        effects = session.scalars(sa.select(Effect.message_id)).all()
        starts = session.execute(sa.select(Start.message_id, Start.read_ct)).all()
    places = Counter(row[0] for row in [*live, *kept])
    attempts = {row[0]: row[1] for row in [*live, *kept]}
    done = {id_ for id_, _, outcome in kept if outcome == "archived"}
    outcomes = Counter(outcome for _, _, outcome in kept)
    work = Counter(effects)
    begun = Counter((message_id, read_ct) for message_id, read_ct in starts)
    committed = committed or set(places)
    return Audit(
        committed=len(committed),
        lost=len(committed - set(places)),
        live=len(live),
        leased=sum(held is not None for _, _, held in live),
        archived=outcomes["archived"],
        dead=outcomes["dead"],
        other=outcomes["cancelled"] + outcomes["discarded"],
        effects=len(effects),
        doubled=len({id_ for counts in (work, places) for id_, n in counts.items() if n > 1}),
        missing=len(done - set(work)),
        stray=sum(n for id_, n in work.items() if id_ not in done),
        attempts=sum(attempts.values()),
        started=len(starts),
        uncounted=sum(n > 1 or at > attempts.get(id_, 0) for (id_, at), n in begun.items()),
    )


def _rows(session: Session, *columns: Any, of: int) -> list[Any]:
    owner = columns[0].class_
    return list(session.execute(sa.select(*columns).where(owner.queue_id == of)).all())

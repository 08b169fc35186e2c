"""One worker of the history test: it does something at random, and writes down what, until told.

A thread runs `work`, and so does a process.
"""

from __future__ import annotations

import random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService

SIDE = sa.MetaData()
HISTORY = sa.Table(
    "history",
    SIDE,
    sa.Column("op", sa.Text),
    sa.Column("id", sa.BigInteger),
    sa.Column("token", sa.BigInteger),
    sa.Column("worker", sa.Text),
    sa.Column("start", sa.DateTime(timezone=True)),
    sa.Column("end", sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp()),
    sa.Column("ok", sa.Boolean),
    sa.Column("until", sa.DateTime(timezone=True)),
)
EFFECTS = sa.Table("effects", SIDE, sa.Column("id", sa.BigInteger))

DONE = ["archive", "archive", "archive", "release", "fail", "extend", "extend", "delete", "keep"]


class Actor:
    """A worker: its session, what it has leased, and a connection to write down what it did."""

    def __init__(self, url: str, name: str) -> None:
        self.engine = sa.create_engine(url, connect_args={"options": "-c lock_timeout=90s"})
        self.notes = self.engine.execution_options(isolation_level="AUTOCOMMIT").connect()
        self.session = Session(self.engine)
        self.service = QueueService(self.session)
        self.name = name
        self.worker = self.service.workers.register(name).id if random.random() < 0.5 else None
        self.session.commit()
        self.leases: list[Any] = []  # the last ones, lost or not, or never committed

    def close(self) -> None:
        self.session.close()
        self.notes.close()
        self.engine.dispose()

    def clock(self) -> Any:
        return self.notes.scalar(sa.select(sa.func.clock_timestamp()))

    def note(self, op: str, start: Any, *done: tuple[int, int, bool, Any]) -> None:
        """Write down that the session has just committed this."""
        common = {"op": op, "worker": self.name, "start": start}
        rows = [
            {"id": id_, "token": token, "ok": ok, "until": until, **common}
            for id_, token, ok, until in done
        ]
        if rows:
            self.notes.execute(sa.insert(HISTORY), rows)

    def enqueue(self) -> None:
        start = self.clock()
        receipts = self.service.enqueue_many("mail", range(random.randint(1, 3)))
        self.session.commit()
        self.note("enqueue", start, *((receipt.id, 0, True, None) for receipt in receipts))

    def lease(self) -> None:
        start = self.clock()
        length = random.choice([0.002, 0.01, 0.05, 0.5])
        found = self.service.dequeue("mail", random.randint(1, 3), lease=length, worker=self.worker)
        # Now and then nobody is to know of it: a lease that was rolled back is none.
        if random.random() < 0.2:
            self.session.rollback()
        else:
            self.session.commit()
            self.note(
                "lease", start, *((x.id, x.fencing_token, True, x.leased_until) for x in found)
            )
        self.leases = (self.leases + found)[-8:]

    def settle(self) -> None:
        """Some of what it has leased, whether it still holds that or not."""
        by_id = {item.id: item for item in random.sample(self.leases, len(self.leases))}
        chosen = [*by_id.values()][: random.randint(1, 3)]
        if not chosen:
            return
        op, start = random.choice(DONE), self.clock()
        untils: list[Any] = [None] * len(chosen)
        match op:
            case "archive":
                done = self.service.try_archive_many(chosen)
                for item, ok in zip(chosen, done, strict=True):
                    if ok:  # the work: in the same transaction
                        self.session.execute(sa.insert(EFFECTS).values(id=item.id))
            case "delete":
                chosen = chosen[:1]
                done = self.service.try_delete_many(chosen)
            case "release":
                done = self.service.try_release_many(chosen)
            case "fail":
                done = self.service.try_fail_many(chosen, "no", delay=0)
            case "extend":
                done = self.service.try_extend_many(chosen, random.choice([0.002, 0.05]))
                ends = sa.select(Message.id, Message.leased_until).where(
                    Message.id.in_([item.id for item in chosen])
                )
                new = dict(self.session.execute(ends).all())
                untils = [new.get(item.id) for item in chosen]
            case _:
                return
        # Now and then it changes its mind: nothing of this may have happened.
        if random.random() < 0.1:
            self.session.rollback()
            return
        self.session.commit()
        rows = zip(chosen, done, untils, strict=False)
        self.note(op, start, *((row.id, row.fencing_token, ok, until) for row, ok, until in rows))

    def expire(self) -> None:
        """Let somebody's lease run out."""
        start = self.clock()
        table: Any = Message.__table__
        held = (
            sa.select(table.c.id)
            .where(table.c.leased_until > sa.func.statement_timestamp())
            .order_by(sa.func.random())
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        ended = (
            sa.update(table)
            .where(table.c.id.in_(held))
            .values(leased_until=sa.func.statement_timestamp())
            .returning(table.c.id, table.c.fencing_token)
        )
        rows = self.session.execute(ended).all()
        self.session.commit()
        self.note("expire", start, *((row.id, row.fencing_token, True, None) for row in rows))


def work(url: str, name: str, steps: int, barrier: Any) -> None:
    """Do ``steps`` things, begun together with the others."""
    actor = Actor(url, name)
    try:
        barrier.wait(180)
        for _ in range(steps):
            random.choice([actor.enqueue, *[actor.lease] * 4, *[actor.settle] * 6, actor.expire])()
    finally:
        actor.close()

"""Producer and consumer loops over ``QueueService``, that keep the books.

They are what an application writes by hand today; the runtime (``Consumer``) replaces ``work``::

    sent = produce(engine, "mail", range(100), retry=True)
    done = work(engine, "mail", lease=5)

Both outlive a lost connection: they do what the README tells an application to do. A keyed enqueue
is repeated until its commit was acknowledged; an archive whose commit may have been lost is looked
up by id and attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Delivery, LeaseLost, QueueService

from .ledger import Effect, Sent, Start

_T = TypeVar("_T")

_AGAIN = {"57P01", "57P02", "57P03", "08006", "08001", "08003", "25P03"}
"""Terminated, crashed, starting up; connection failures; idle in a transaction for too long."""


def is_trouble(error: BaseException) -> bool:
    """Whether an error means that the connection, and not the statement, is at fault."""
    if isinstance(error, (OSError, TimeoutError)):
        return True
    if not isinstance(error, DBAPIError):
        return False
    # A server that is away gives psycopg neither a SQLSTATE nor an invalidated connection.
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state in _AGAIN or state is None


def outliving(
    attempt: Callable[[], _T], trouble: Callable[[BaseException], Any] | None = None
) -> _T:
    """Call until it returns, despite connection errors; report each to ``trouble``."""
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_trouble(error):
                raise
            if trouble is not None:
                trouble(error)


def produce(
    engine: sa.Engine,
    queue: str,
    units: Iterable[Any],
    *,
    trouble: Callable[[BaseException], Any] | None = None,
    told: Callable[[int], Any] | None = None,
) -> list[int]:
    """Enqueue each unit under a key until that was acknowledged; return the ids.

    Args:
        engine: Where.
        queue: Its name.
        units: What to send; the text of each is its key, too.
        trouble: Is called with each lost connection.
        told: Is called with the id of each message whose commit was acknowledged.
    """
    sent: list[int] = []
    for unit in units:

        def attempt(unit: Any = unit) -> int:
            with Session(engine) as session, session.begin():
                receipt = QueueService(session).enqueue(queue, {"unit": unit}, key=f"unit-{unit}")
                if not receipt.duplicate:
                    session.add(Sent(message_id=receipt.id, unit=str(unit)))
            return receipt.id

        sent.append(outliving(attempt, trouble))
        if told is not None:
            told(sent[-1])
    return sent


def work(
    engine: sa.Engine,
    queue: str,
    *,
    lease: float = 30,
    limit: int = 1,
    by: str | None = None,
    handle: Callable[[Session, Delivery], Any] | None = None,
    trouble: Callable[[BaseException], Any] | None = None,
    leased: Callable[[Delivery], Any] | None = None,
    settled: Callable[[Delivery], Any] | None = None,
    until: Callable[[], bool] | None = None,
) -> int:
    """Lease and settle until the queue is empty (or ``until`` is true); return how many were done.

    Args:
        engine: Where.
        queue: Its name.
        lease: Seconds.
        limit: How many at once.
        by: A name for the books.
        handle: Does the work in the transaction that archives; an error of it fails the message.
        trouble: Is called with each lost connection.
        leased: Is called with each delivery, its lease committed.
        settled: Is called with each delivery, its archive acknowledged.
        until: Is asked when there is nothing; the loop ends when it returns True.
    """
    done = 0
    while True:
        taken = outliving(lambda: _lease(engine, queue, limit, lease, by), trouble)
        if not taken and (until is None or until()):
            return done
        for delivery in taken:
            if leased is not None:
                leased(delivery)
            try:
                ours = outliving(lambda item=delivery: _settle(engine, item, by, handle), trouble)
            except LeaseLost:
                # Our own archive, whose reply was lost, or somebody else's.
                ours = outliving(lambda item=delivery: settled_by(engine, item), trouble)
            done += ours
            if ours and settled is not None:
                settled(delivery)


def _lease(
    engine: sa.Engine, queue: str, limit: int, lease: float, by: str | None
) -> list[Delivery]:
    with Session(engine) as session, session.begin():
        taken = QueueService(session).dequeue(queue, limit, lease=lease)
        session.add_all(
            Start(message_id=delivery.id, read_ct=delivery.read_ct, by=by) for delivery in taken
        )
    return taken


def _settle(
    engine: sa.Engine,
    delivery: Delivery,
    by: str | None,
    handle: Callable[[Session, Delivery], Any] | None,
) -> bool:
    """Work and archive in one transaction; return False if the work failed."""
    try:
        with Session(engine) as session, session.begin():
            if handle is not None:
                handle(session, delivery)
            session.add(Effect(message_id=delivery.id, read_ct=delivery.read_ct, by=by))
            QueueService(session).archive(delivery)
    except Exception as error:
        if isinstance(error, LeaseLost) or is_trouble(error):
            raise
        with Session(engine) as session, session.begin():
            QueueService(session).fail(delivery, error, delay=0)
        return False
    return True


def settled_by(engine: sa.Engine, delivery: Delivery) -> bool:
    """Whether this very attempt archived the message: what to ask after a lost reply."""
    ours = sa.exists().where(
        ArchivedMessage.id == delivery.id,
        ArchivedMessage.read_ct == delivery.read_ct,
        ArchivedMessage.outcome == "archived",
    )
    with Session(engine) as session:
        return bool(session.scalars(sa.select(ours)).one())

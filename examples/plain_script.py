"""A producer and a consumer in one script: what happens to a message, from enqueue to prune.

Each function opens its own sessions, as separate programs would. You can run it repeatedly::

    pip install 'pgqrs-sa[psycopg,alembic]'
    export PGQRS_DSN=postgresql://localhost/shop
    alembic upgrade head
    python examples/plain_script.py
"""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from pgqrs_sa import Delivery, Item, LeaseLost, QueueService

QUEUE = "reminders"


def produce(engine: Engine) -> None:
    """Enqueue a batch with options, then change our mind about two of them."""
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.check_schema()
        service.queues.create(QUEUE, lease=60, max_read_ct=3)  # does nothing if it exists
        service.queues.purge(QUEUE)
        receipts = service.enqueue_many(
            QUEUE,
            [
                {"to": "ada", "text": "pay the rent"},
                Item({"to": "bob", "text": "water the plants"}, priority=-1, key="bob-plants"),
                Item({"to": "cyd", "text": "call home"}, delay=timedelta(days=1)),
                Item({"to": "dan", "text": "buy milk"}, delay=3600),
                Item({"to": "eve"}, max_read_ct=1),  # has no text: its handler will fail
                Item({"to": "bob", "text": "water the plants"}, key="bob-plants"),
            ],
        )
        made = [receipt for receipt in receipts if not receipt.duplicate]
        print(f"enqueued {len(made)} reminders of {len(receipts)}: one key was there already")

    with Session(engine) as session, session.begin():
        messages = QueueService(session).messages
        cancelled = messages.cancel_where(QUEUE, payload={"to": "cyd"}, reason="moved out")
        print(f"cancelled {cancelled} for cyd")
        messages.reschedule(receipts[3].id, delay=0)
        print("rescheduled dan's: it is due now instead of in an hour")


def consume(engine: Engine) -> None:
    """Work until nothing is due."""
    while True:
        with Session(engine) as session, session.begin():
            deliveries = QueueService(session).dequeue(QUEUE, limit=2)
        # The leases are committed: a crash from here on costs an attempt, never a message.
        if not deliveries:
            return
        for delivery in deliveries:
            settle(engine, delivery)


def settle(engine: Engine, delivery: Delivery) -> None:
    """Do the work and archive in one transaction, so that rows of the work are written once."""
    try:
        with Session(engine) as session, session.begin():
            print(f"  {delivery.payload['to']}: {delivery.payload['text']}")
            QueueService(session).archive(delivery)
    except LeaseLost as lost:
        print(f"too late: {lost}")  # and rolled back, by leaving the block above
    except KeyError as error:
        with Session(engine) as session, session.begin():
            failure = QueueService(session).fail(delivery, error)
        print("dead" if failure.dead else f"again at {failure.vt}", "without", error)


def be_slow(engine: Engine) -> None:
    """Lose a lease by working for longer than it lasts: `extend` it before that happens."""
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.enqueue(QUEUE, {"to": "fay", "text": "slow down"})
        (slow,) = service.dequeue(QUEUE, lease=30)
        slow = service.extend(slow, 0.05)  # for longer, normally
    time.sleep(0.1)
    consume(engine)  # meanwhile another consumer leases it
    settle(engine, slow)


def repair(engine: Engine) -> None:
    """Give dead letters two more attempts tomorrow, when the handler is fixed."""
    with Session(engine) as session, session.begin():
        archived = QueueService(session).archived
        for dead in archived.find(QUEUE, outcome="dead"):
            print(f"dead: {dead.payload}, {dead.reason}: {dead.last_error}")
            archived.requeue(dead.id, delay=timedelta(days=1), attempts=2)


def prune(engine: Engine) -> None:
    """Empty the archive a chunk at a time, then count what is left."""
    pruned = 1
    while pruned:
        with Session(engine) as session, session.begin():
            pruned = QueueService(session).archived.prune(0, queue=QUEUE, limit=3)
        print(f"pruned {pruned}")
    with Session(engine) as session:
        left = QueueService(session).messages.metrics(QUEUE)
    print(f"left: {left.scheduled} scheduled, {left.live - left.scheduled} other")


if __name__ == "__main__":
    # An address that names no driver gets psycopg.
    url = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
    engine = create_engine(url)
    for chapter in (produce, consume, be_slow, repair, prune):
        chapter(engine)
    engine.dispose()

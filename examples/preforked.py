"""A server that loads the application before it forks: a consumer in each of its processes.

This file is a configuration of gunicorn, whose hooks start and stop the consumer together with the
web application. The parent creates the consumer and its engine; each process that works on messages
has its own connections, threads and row in the register of workers::

    pip install 'pgqrs-sa[psycopg,alembic,consumer]' gunicorn
    export PGQRS_DSN=postgresql://localhost/shop PYTHONPATH=examples
    alembic upgrade head
    gunicorn --config examples/preforked.py your.application:app

Run by itself (``python examples/preforked.py``), it forks two processes in the same way, lets them
send the receipts of some orders, and counts. Run heavy work in a separate process, with
``pgqrs worker run``: here it shares the interpreter with the requests.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from shop_models import Order
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import Consumer, QueueService

engine = create_engine(re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"]))
sessions = sessionmaker(engine)
consumer = Consumer(sessions, concurrency=2, drain_timeout=15, poll_interval=0.2)


@consumer.on("receipts")
def send_receipt(payload: dict[str, int], session: Session) -> None:
    """Note a receipt with its order."""
    session.get_one(Order, payload["order"]).receipts_sent += 1


# What gunicorn reads.

preload_app = True
workers = 2
graceful_timeout = 40
"""Seconds until gunicorn kills: more than drain_timeout and the consumer's last settlements."""


def post_fork(_server: object, _worker: object) -> None:
    """Begin to work in a process that has just been forked."""
    consumer.start()


def worker_exit(_server: object, _worker: object) -> None:
    """Let the handlers finish, before the process ends."""
    consumer.stop()


# The same without gunicorn.


def fork() -> int:
    """Fork a process that works until SIGTERM; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        post_fork(None, None)
        signal.sigwait({signal.SIGTERM})
        worker_exit(None, None)
        code = 0
    finally:
        os._exit(code)


def main(orders: int = 20) -> int:
    """Write orders, and see that each gets its receipt from one of the children."""
    with sessions.begin() as session:  # and so the pool has a connection that is the parent's
        service = QueueService(session)
        service.queues.create("receipts")
        written = [Order(customer="ada", total_cents=1) for _ in range(orders)]
        session.add_all(written)
        session.flush()
        service.enqueue_many("receipts", [{"order": item.id} for item in written])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits for sigwait()
    children = [fork() for _ in range(workers)]
    with sessions() as session:
        while QueueService(session).messages.metrics("receipts").live:
            session.rollback()
            time.sleep(0.05)
        once = select(func.count()).where(Order.receipts_sent == 1)
        print(f"{session.scalar(once)} orders have exactly one receipt")
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(f"the children ended with {codes}")
    engine.dispose()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

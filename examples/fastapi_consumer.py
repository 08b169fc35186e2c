"""The consumer of the FastAPI shop: sends the receipts of its orders.

An outbox: ``fastapi_app.py`` commits an order and a message together, and this sends the receipt.
The handler's writes and the acknowledgement of the message are one commit. If the process dies
before it, neither has happened, and the message is delivered again::

    pip install 'pgqrs-sa[psycopg,asyncio,alembic,cli,consumer]' 'fastapi>=0.121' uvicorn
    export PGQRS_DSN=postgresql://localhost/shop PYTHONPATH=examples
    pgqrs worker check fastapi_consumer:consumer
    pgqrs worker run fastapi_consumer:consumer

``deploy/`` has a systemd unit and a Kubernetes fragment for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import BaseModel
from shop_models import Order
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgqrs_sa import AsyncConsumer, DeadLetter, Delivery, Hooks, Retry, WorkerInfo


class Receipt(BaseModel):
    """The payload, as the shop enqueues it."""

    to: str


class NoSuchAddressError(Exception):
    """The mail server refuses it permanently."""


class Alive(Hooks):
    """Touch a file at each heartbeat, for a supervisor that checks its age."""

    def on_heartbeat(self, worker: WorkerInfo) -> None:
        """Touch the file."""
        if file := os.environ.get("ALIVE_FILE"):
            Path(file).write_text(f"{worker.id}\n")


async def send_mail(to: str, *, key: str) -> None:
    """Hand a mail over to the mail service, which sends it once for each key."""
    if "@" in to and to.endswith(".invalid"):
        raise NoSuchAddressError(to)
    print(f"{key} goes to {to}", flush=True)


url = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
engine = create_async_engine(url)
consumer = AsyncConsumer(
    async_sessionmaker(engine), concurrency=10, drain_timeout=60, hooks=[Alive()]
)


@consumer.on(
    "receipts",
    timeout=45,
    retry=Retry(max_attempts=8, base=5, on={NoSuchAddressError: DeadLetter("no such address")}),
)
async def send_receipt(receipt: Receipt, session: AsyncSession, delivery: Delivery) -> None:
    """Send a receipt and note it with the order."""
    # The same key at every attempt: a mail that was sent before a crash is not sent again.
    await send_mail(receipt.to, key=f"receipt-{delivery.id}")
    sent = update(Order).where(Order.receipt_id == delivery.id)
    await session.execute(sent.values(receipts_sent=Order.receipts_sent + 1))

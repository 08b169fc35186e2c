"""FastAPI: an order and the message that sends its receipt, in the transaction of the request.

The session is a dependency whose transaction spans the request and is committed before the
response leaves: a 201 means that both rows exist, an exception that neither does. While the
receipt is live, a request that repeats its ``Idempotency-Key`` finds it and writes nothing. The
orders are those of ``shop_models.py``, the tables those of its Alembic history::

    pip install 'pgqrs-sa[psycopg,asyncio,alembic]' 'fastapi>=0.121' uvicorn
    export PGQRS_DSN=postgresql://localhost/shop
    alembic upgrade head
    uvicorn --app-dir examples fastapi_app:app
    curl localhost:8000/orders -H 'Idempotency-Key: 1' --json '{"customer": "Al", "total_cents": 9}'
    curl localhost:8000/queues/receipt
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from shop_models import Order
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgqrs_sa import AsyncQueueService, InvalidArgument, QueueMetrics, QueueNotFound


class NewOrder(BaseModel):
    """What a customer sends."""

    customer: str
    total_cents: int = Field(gt=0, le=2_000_000_000)
    receipt_delay: float = 0


class Accepted(BaseModel):
    """The response; ``order`` is None when the receipt of a duplicate has just been sent."""

    order: int | None
    message: int
    duplicate: bool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the engine, refuse to start on tables of another version, and close it at the end."""
    url = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
    engine = create_async_engine(url)
    try:
        app.state.sessions = async_sessionmaker(engine)
        async with app.state.sessions.begin() as session:
            service = AsyncQueueService(session)
            await service.check_schema()
            await service.queues.create("receipts")  # does nothing if it exists
        yield
    finally:
        await engine.dispose()


async def transaction(request: Request) -> AsyncIterator[AsyncSession]:
    """Give the request a session: commit when the endpoint returns, roll back when it raises."""
    async with request.app.state.sessions.begin() as session:
        yield session


# "function" commits before the response is sent. By default the client would have its 201 first,
# and a commit that fails would come too late.
Transaction = Annotated[AsyncSession, Depends(transaction, scope="function")]
app = FastAPI(lifespan=lifespan)
CREDIT_LIMIT_CENTS = 100_000


@app.exception_handler(QueueNotFound)
async def no_such_queue(_request: Request, error: QueueNotFound) -> JSONResponse:
    """Answer with similar names."""
    return JSONResponse({"detail": str(error), "did_you_mean": error.suggestions}, 404)


@app.exception_handler(InvalidArgument)
async def invalid(_request: Request, error: InvalidArgument) -> JSONResponse:
    """Answer with the error of a delay, a key or a name: it is written for people."""
    return JSONResponse({"detail": str(error)}, 422)


@app.post("/orders", status_code=201)
async def create_order(
    new: NewOrder,
    response: Response,
    session: Transaction,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Accepted:
    """Write an order and enqueue its receipt: 201, or 200 for the order of an earlier request."""
    receipt = await AsyncQueueService(session).enqueue(
        "receipts", {"to": new.customer}, delay=new.receipt_delay, key=idempotency_key
    )
    if receipt.duplicate:
        response.status_code = 200
        there = await session.scalar(select(Order.id).where(Order.receipt_id == receipt.id))
        return Accepted(order=there, message=receipt.id, duplicate=True)
    order = Order(customer=new.customer, total_cents=new.total_cents, receipt_id=receipt.id)
    session.add(order)
    await session.flush()
    return Accepted(order=order.id, message=receipt.id, duplicate=False)


@app.post("/orders/charged", status_code=201)
async def create_charged_order(new: NewOrder, response: Response, session: Transaction) -> Accepted:
    """Do the same and charge the card: if that raises, neither order nor receipt exists."""
    accepted = await create_order(new, response, session)
    if new.total_cents > CREDIT_LIMIT_CENTS:
        raise HTTPException(402, "the card was declined")
    return accepted


@app.get("/queues/{name:path}")
async def queue_metrics(name: str, session: Transaction) -> QueueMetrics:
    """Count a queue's messages by state and outcome."""
    return await AsyncQueueService(session).messages.metrics(name)

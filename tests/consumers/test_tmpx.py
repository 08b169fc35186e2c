"""Leases: renewed while a handler works, given up when it takes too long, never left behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
import sqlalchemy as sa
from bench import Ear, effect, until
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, Delivery, HandlerTimeout, QueueService, Retry

SHORT = 1.0
"""A lease that runs out within a test, unless it is renewed: every third of it."""


@pytest.mark.parametrize("n", range(30))
def test_a_task_that_will_not_be_cancelled_has_failed_all_the_same(tasks, n):
    (id_,) = tasks.send({})
    ear = Ear()
    consumer = tasks.consumer(hooks=[ear], retry=Retry(base=1000))
    go = threading.Event()

    async def stubborn(session: AsyncSession, delivery: Delivery) -> None:
        await session.run_sync(effect, delivery)
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    consumer.consumer.on("mail", timeout=0.2)(stubborn)
    consumer.start()
    until(lambda: tasks.live()[id_].last_error, "the attempt has failed")
    go.set()
    until(lambda: not consumer.runtime.busy, "the handler has ended")
    assert consumer.stop() == 0
    assert tasks.effects() == []
    assert list(tasks.live()) == [id_]
    assert ear.names() == ["on_start", "on_retry"]



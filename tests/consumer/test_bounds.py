"""How long a consumer can pass a message over while others flow: on real clocks."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa

from support.consumers import Kit
from support.waiting import until

BOUND = 5.0
"""Seconds."""

FILL = (
    "INSERT INTO pgqrs_messages (queue_id, payload, vt)"
    " SELECT q.id, to_jsonb(n), statement_timestamp()"
    " FROM pgqrs_queues q, generate_series(1, 20000) n WHERE queue_name = 'mail'"
)
COME = (
    "INSERT INTO pgqrs_messages (queue_id, payload, priority, vt)"
    " SELECT id, to_jsonb(CAST(:payload AS text)), :priority,"
    " statement_timestamp() - interval '1 h' FROM pgqrs_queues"
)


class Leases:
    """When each lease was asked for."""

    def __init__(self, engine: Any) -> None:
        self.begun: list[float] = []
        sa.event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", self._note)

    def _note(self, _c: Any, _cur: Any, sql: str, *_rest: Any) -> None:
        if "FOR UPDATE OF m SKIP LOCKED) AS v" in sql:
            self.begun.append(time.monotonic())


@pytest.mark.parametrize("stalled", [False, True], ids=["flowing", "after_a_stall"])
def test_a_consumer_passes_nothing_over_for_longer_than_five_seconds(
    kit: Kit, stalled: bool
) -> None:
    kit.sql(FILL)
    engine = kit.app_engine()
    leases = Leases(engine)
    driver = kit.consumer(engine=engine, concurrency=1)
    handled: dict[Any, float] = {}

    @driver.on("mail", session=False)
    def work(_session: Any, delivery: Any) -> None:
        kit.wait_a_moment()
        handled.setdefault(delivery.payload, time.monotonic())

    def send(payload: str, priority: int) -> float:
        kit.sql(COME, payload=payload, priority=priority)
        return time.monotonic()

    if stalled:
        lock = kit.engine.connect()
        lock.exec_driver_sql("LOCK TABLE pgqrs_messages IN ACCESS EXCLUSIVE MODE")
        threading.Timer(1.0, lock.close).start()
    driver.start()
    until(lambda: len(handled) > 5, "messages are handled")
    late_at = send("late", 0)
    urgent_at = send("urgent", -10)
    until(lambda: {"late", "urgent"} <= handled.keys(), "both are handled")
    driver.stop()

    for payload, since in (("late", late_at), ("urgent", urgent_at)):
        before = [moment for moment in leases.begun if since < moment < handled[payload]]
        passing = before[:-1]  # the last one has found it
        if payload == "urgent":
            assert not passing
        else:
            assert not passing or passing[-1] - since <= BOUND

"""What a consumer does about queues that are declared in code."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import DeclaredQueue, InvalidArgument, QueueNotFound, QueueService, declare_queues


def names(kit: Any) -> list[str]:
    with Session(kit.engine) as session:
        return [queue.name for queue in QueueService(session).queues.list()]


def test_missing_queues_are_created_at_the_start(kit: Any) -> None:
    metadata = sa.MetaData()
    declare_queues(metadata, DeclaredQueue("posts", lease=9))
    consumer = kit.consumer(queues=metadata)
    consumer.on(DeclaredQueue("parcels", max_read_ct=2))(lambda _session, _delivery: None)
    consumer.on("posts")(lambda _session, _delivery: None)
    assert [queue.name for queue in consumer.consumer.declared_queues] == ["parcels", "posts"]
    assert consumer.run() == 0
    assert names(kit) == ["mail", "parcels", "posts"]
    assert consumer.run() == 0


def test_check_creates_nothing_and_knows_the_leases(threads: Any) -> None:
    consumer = threads.consumer(queues=[DeclaredQueue("posts", lease=9), DeclaredQueue("plain")])
    for queue in ("mail", "posts", "plain"):
        consumer.on(queue)(lambda _session, _delivery: None)
    leases = consumer.consumer.check()
    assert {queue: span.total_seconds() for queue, span in leases.items()} == {
        "mail": 30,
        "posts": 9,
        "plain": 30,
    }
    assert names(threads) == ["mail"]


def test_what_differs_is_logged_and_stays(threads: Any, caplog: pytest.LogCaptureFixture) -> None:
    consumer = threads.consumer(queues=[DeclaredQueue("mail", lease=60)])
    consumer.on("mail")(lambda _session, _delivery: None)
    for act in (consumer.consumer.check, consumer.run):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pgqrs_sa.consumer"):
            act()
        assert "queue 'mail': lease_seconds is 30.0, declared 60.0" in caplog.text
    with Session(threads.engine) as session:
        assert QueueService(session).queues.get("mail").lease_seconds == 30


def test_a_queue_that_is_not_declared_must_exist(threads: Any) -> None:
    consumer = threads.consumer(queues=[DeclaredQueue("posts")])
    consumer.on("parcels")(lambda _session, _delivery: None)
    with pytest.raises(QueueNotFound):
        consumer.run()


def test_bad_declarations_are_refused_when_the_consumer_is_made(threads: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"queues\[0\] must be a DeclaredQueue, not 'mail'"):
        threads.consumer(queues=["mail"])
    consumer = threads.consumer(queues=[DeclaredQueue("mail")])
    with pytest.raises(InvalidArgument, match="'mail' is declared twice"):
        consumer.on(DeclaredQueue("mail", lease=5))(lambda _session, _delivery: None)

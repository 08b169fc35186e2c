"""Looking ends: counts have a cap, searches have a timeout, and content may be left unread."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import (
    ArchivedMessage,
    AsyncQueueService,
    InvalidArgument,
    Message,
    PayloadError,
    QueueService,
    ReadTimeout,
)
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa.cli.queries import activity
from pgqrs_sa.models import READY_MADE

SLEEPS = sa.text("pg_sleep(30) IS NOT NULL")
SOON = timedelta(milliseconds=200)


def settle(session: Session, count: int, outcome: str, queue_id: int = 1) -> None:
    """Put ``count`` messages into the archive at once."""
    session.execute(
        sa.text(
            "INSERT INTO pgqrs_archive (id, queue_id, payload, outcome)"
            " SELECT nextval('pgqrs_messages_id_seq'), :queue_id, '1', :outcome"
            " FROM generate_series(1, :count)"
        ),
        {"count": count, "outcome": outcome, "queue_id": queue_id},
    )
    session.commit()


def looked(session: Session) -> Any:
    context = Context.of(READY_MADE, None, None, allow_autocommit=False)
    return activity(Scope(session, context), timedelta(seconds=2))[0]


# ----------------------------------------------------------------------------------- counts


def test_each_outcome_is_counted_up_to_ten_thousand(session, service):
    settle(session, 10_000, "archived")
    settle(session, 7, "dead")
    metrics = service.messages.metrics("mail")
    assert (metrics.archived, metrics.dead, metrics.capped) == (10_000, 7, frozenset())
    settle(session, 50, "archived")
    metrics = service.messages.metrics("mail")
    assert (metrics.archived, metrics.dead, metrics.capped) == (10_000, 7, {"archived"})
    assert service.messages.all_metrics() == [metrics]


@pytest.mark.parametrize("outcome", ["dead", "cancelled", "discarded"])
def test_an_outcome_beyond_the_cap_leaves_open_how_much_was_done(session, service, outcome):
    settle(session, 10_001, outcome)
    settle(session, 5, "archived")
    metrics = service.messages.metrics("mail")
    assert getattr(metrics, outcome) == 10_000
    assert metrics.archived <= 5
    assert metrics.capped == {outcome, "archived"}
    assert service.messages.all_metrics() == [metrics]
    activity_of_mail = looked(session)
    dead = outcome == "dead"
    assert (activity_of_mail.dead, activity_of_mail.dead_capped) == (10_000 if dead else 0, dead)


def test_an_archive_is_counted_to_the_end_on_request(session, service):
    settle(session, 10_050, "archived")
    settle(session, 10_002, "dead")
    settle(session, 3, "cancelled")
    exact = service.messages.metrics("mail", exact=True)
    assert (exact.archived, exact.dead, exact.cancelled) == (10_050, 10_002, 3)
    assert exact.capped == frozenset()
    assert service.messages.all_metrics(exact=True) == [exact]


def test_many_queues_share_what_is_counted(session, service):
    for n in range(39):
        service.queues.create(f"q{n}")
    settle(session, 5_001, "archived")
    settle(session, 5_000, "dead", queue_id=2)
    mail, first = (
        metrics for metrics in service.messages.all_metrics() if metrics.queue in {"mail", "q0"}
    )
    assert (mail.archived, mail.capped) == (5_000, {"archived"})
    assert (first.dead, first.archived, first.capped) == (5_000, 0, frozenset())
    assert service.messages.metrics("mail").archived == 5_001


async def test_counts_are_capped_awaited(
    async_session: AsyncSession, async_service: AsyncQueueService
):
    await async_session.run_sync(settle, 10_001, "archived")
    metrics = await async_service.messages.metrics("mail")
    assert (metrics.archived, metrics.capped) == (10_000, {"archived"})
    assert await async_service.messages.all_metrics() == [metrics]
    exact = await async_service.messages.metrics("mail", exact=True)
    assert (exact.archived, exact.capped) == (10_001, frozenset())
    assert await async_service.messages.all_metrics(exact=True) == [exact]


# ---------------------------------------------------------------------------------- content


def test_content_may_be_left_unread(session, service):
    service.enqueue("mail", {"n": 1}, headers={"h": 1}, key="k")
    service.enqueue("mail", {"n": 2})
    service.fail(service.dequeue("mail")[0], "broken", dead=True)
    for found, whole in (
        (service.messages.find("mail", content=False), service.messages.find("mail")),
        (service.archived.find(content=False), service.archived.find()),
    ):
        (seen,), (known,) = found, whole
        assert (seen.content, known.content) == (False, True)
        assert (seen.id, seen.queue, seen.vt, seen.read_ct) == (
            *(known.id, known.queue, known.vt, known.read_ct),
        )
        assert (seen.text, seen.headers, seen.key, seen.last_error) == ("", None, None, None)
        with pytest.raises(PayloadError, match="was not read"):
            _ = seen.payload
    assert seen.outcome == "dead"
    assert (seen.reason, bool(known.reason)) == (None, True)


# ---------------------------------------------------------------------------------- timeout


def test_a_search_ends_at_its_timeout_and_the_transaction_goes_on(session, service):
    session.add(Message(queue_name="mail", payload="pending"))
    service.enqueue("mail", 1)
    before = session.scalar(sa.text("SHOW statement_timeout"))
    for search in (
        lambda **options: service.messages.find(where=SLEEPS, **options),
        lambda **options: service.messages.count("mail", where=SLEEPS, **options),
    ):
        with pytest.raises(ReadTimeout, match=r"no answer within 0\.2 s") as caught:
            search(timeout=SOON)
        assert caught.value.seconds == SOON.total_seconds()
    service.fail(service.dequeue("mail")[0], "broken", dead=True)
    for archived in (service.archived.find, service.archived.count):
        with pytest.raises(ReadTimeout):
            archived(where=SLEEPS, timeout=0.2)
    assert session.scalar(sa.text("SHOW statement_timeout")) == before
    session.commit()
    assert service.messages.count() == 1
    assert service.archived.count() == 1


def test_a_search_in_time_leaves_nothing_behind(session, service):
    service.enqueue("mail", 1)
    session.commit()
    message = session.scalars(sa.select(Message)).one()
    message.payload = 2
    (found,) = service.messages.find("mail", timeout=60)
    assert found.payload == 2
    assert session.scalar(sa.text("SHOW statement_timeout")) == "0"
    session.commit()
    assert session.scalars(sa.select(Message.payload)).one() == 2


def test_a_timeout_never_lengthens_the_sessions_own(session, service):
    service.enqueue("mail", 1)
    session.commit()
    session.execute(sa.text("SET LOCAL statement_timeout = 1000"))
    with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
        service.messages.find(where=SLEEPS, timeout=3600)
    assert session.scalar(sa.text("SHOW statement_timeout")) == "1s"


@pytest.mark.parametrize("timeout", [0, -1, "soon"])
def test_a_timeout_that_is_no_time_is_refused(service, timeout):
    with pytest.raises(InvalidArgument, match="timeout"):
        service.messages.find(timeout=timeout)


@pytest.mark.parametrize("timeout", [2_147_483.648, timedelta(days=30)])
def test_a_timeout_that_postgresql_cannot_take_is_refused(session, service, timeout):
    with pytest.raises(InvalidArgument, match=r"timeout is \d+ seconds, .* at most 2147484 "):
        service.messages.find(timeout=timeout)
    assert service.messages.find("mail", timeout=timedelta(milliseconds=2**31 - 1)) == []
    assert session.is_active


def test_a_timeout_is_refused_in_autocommit(engine, service):
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        plain = QueueService(Session(connection), allow_autocommit=True)
        with pytest.raises(InvalidArgument, match="timeout needs a transaction"):
            plain.messages.find(timeout=1)


async def test_a_search_ends_at_its_timeout_awaited(
    async_session: AsyncSession, async_service: AsyncQueueService
):
    await async_service.enqueue("mail", 1)
    where = Message.id > 0
    for resource, slow in (
        (async_service.messages, Message.id.is_not(None)),
        (async_service.archived, ArchivedMessage.id.is_not(None)),
    ):
        assert len(await resource.find(where=slow, timeout=60, content=False)) <= 1
        assert await resource.count(where=slow, timeout=60) <= 1
    for search in (async_service.messages.find, async_service.messages.count):
        with pytest.raises(ReadTimeout):
            await search(where=[where, SLEEPS], timeout=SOON)
    await async_session.commit()
    assert await async_service.messages.count("mail") == 1


def test_the_error_survives_a_pickle():
    error = copy.copy(ReadTimeout(1.5))  # by the same protocol
    assert (str(error), error.seconds) == (str(ReadTimeout(1.5)), 1.5)

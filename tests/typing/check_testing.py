"""What a type checker sees of the helpers for tests."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import timedelta
from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncConsumer, Consumer, Decision, Delivery, MessageInfo, Snooze
from pgqrs_sa.testing import (
    AsyncInspector,
    Drained,
    Inspector,
    advance,
    all_enqueued,
    assert_enqueued,
    drain,
    raise_on_commit,
    refute_enqueued,
    work_one,
)


def handle(payload: int) -> Snooze | None:
    """A handler."""
    return Snooze(payload) if payload else None


async def handle_later(session: AsyncSession, delivery: Delivery) -> None:
    """A handler for asyncio."""


def plain(session: Session, consumer: Consumer, pgqrs: Inspector) -> None:
    """With a Session there are results."""
    found = assert_enqueued(session, "mail", payload__contains={"a": 1}, delay=timedelta(5))
    assert_type(found, list[MessageInfo])
    assert_type(all_enqueued(session), list[MessageInfo])
    refute_enqueued(session, "mail", key="k", priority=1)
    assert_type(drain(session, consumer, scheduled=True), Drained)
    assert_type(advance(session, 5, "mail"), int)
    assert_type(work_one(handle, 1), Decision | None)
    assert_type(work_one(consumer, 1, queue="mail", session=session), Decision | None)
    assert_type(pgqrs.assert_enqueued("mail", count=1, payload=None), list[MessageInfo])
    assert_type(pgqrs.drain(consumer), Drained)
    with raise_on_commit(session, committed=True):
        session.commit()


async def awaited(session: AsyncSession, consumer: AsyncConsumer, pgqrs: AsyncInspector) -> None:
    """With an AsyncSession they are awaited."""
    found = await assert_enqueued(session, "mail", payload__contains={"a": 1}, delay=5)
    assert_type(found, list[MessageInfo])
    assert_type(await all_enqueued(session, "mail"), list[MessageInfo])
    await refute_enqueued(session, "mail", headers__contains={"a": 1})
    assert_type(await drain(session, consumer, queues=["mail"]), Drained)
    assert_type(await advance(session, timedelta(5)), int)
    assert_type(await work_one(handle_later, 1, session=session), Decision | None)
    assert_type(await work_one(consumer, 1, session=session), Decision | None)
    assert_type(await pgqrs.all_enqueued(), list[MessageInfo])
    assert_type(await pgqrs.advance(5), int)


def wrong(session: Session, other: AsyncSession, consumer: Consumer) -> None:
    """What cannot be is seen before it runs."""
    assert_enqueued(session, "mail", paylod=1)  # type: ignore[call-overload]
    assert_enqueued(session, "mail", priority="high")  # type: ignore[call-overload]
    drain(other, consumer)  # type: ignore[call-overload]

"""Every pattern of the delayed messages guide, with the application's own sessions.

The guide's Python and Rust patterns are in ``docs/guide/delayed-messages-guide.md``. Here they are
written with `QueueService` and `AsyncQueueService`: messages are scheduled in the caller's
transaction, and acknowledged in the transaction that did the work. A moment is given as a moment
(``at=``), so that only the database's clock counts. You can run it repeatedly::

    pip install 'pgqrs-sa[psycopg,asyncio,alembic]'
    export PGQRS_DSN=postgresql://localhost/shop
    alembic upgrade head
    python examples/delayed_messages.py
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, Backoff, Delivery, Item, LeaseLost, Message, QueueService

QUEUE = "delayed"
BACKOFF = Backoff(base=60, factor=4, cap=24 * 3600, jitter=0)
"""1 min, 4 min, 16 min, 64 min; the queue's fifth and last attempt makes a dead letter."""


# Fixed and dynamic delays


def schedule_fixed_delays(service: QueueService, payload: Any) -> list[int]:
    """Schedule for 5 minutes, 1 hour, 24 hours and 7 days from now, in one statement."""
    delays = (timedelta(minutes=5), timedelta(hours=1), timedelta(hours=24), timedelta(days=7))
    receipts = service.enqueue_many(QUEUE, [Item(payload, delay=delay) for delay in delays])
    return [receipt.id for receipt in receipts]


def next_hour(now: datetime) -> datetime:
    """Return the next full hour."""
    return now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)


def next_local(now: datetime, at: time, zone: ZoneInfo) -> datetime:
    """Return the next moment at which the clocks of a time zone show ``at``.

    Days are counted on the calendar of the zone, so that 9:00 stays 9:00 when its clocks change.
    A time that is skipped that night becomes as much later as the clocks were put forward; of
    one that comes twice, the first is meant.
    """
    day = now.astimezone(zone).date()
    while True:
        moment = datetime.combine(day, at, tzinfo=zone).astimezone(UTC)
        if moment > now:
            return moment
        day += timedelta(days=1)


def schedule_for_specific_times(service: QueueService, now: datetime, zone: ZoneInfo) -> list[int]:
    """Schedule a report for the next hour, and one for 9:00 in a time zone."""
    payload = {"task": "daily_report", "type": "scheduled"}
    moments = (next_hour(now), next_local(now, time(9), zone))
    return [service.enqueue(QUEUE, payload, at=moment).id for moment in moments]


# Scheduled email


def schedule_welcome_email(service: QueueService, user_id: int, email: str) -> int:
    """Send a welcome 10 minutes after the signup, in the signup's own transaction."""
    payload = {
        "type": "scheduled_email",
        "user_id": user_id,
        "email": email,
        "template": "welcome_series_1",
    }
    # The key keeps a form that was sent twice from scheduling two.
    return service.enqueue(QUEUE, payload, delay=600, key=f"welcome-{user_id}").id


def schedule_follow_up_series(service: QueueService, user_id: int) -> list[int]:
    """Follow up after 1, 3, 7 and 14 days: all four are scheduled, or none."""
    items = [
        Item(
            {"type": "follow_up_email", "user_id": user_id, "series_day": day},
            delay=timedelta(days=day),
        )
        for day in (1, 3, 7, 14)
    ]
    return [receipt.id for receipt in service.enqueue_many(QUEUE, items)]


# Rate-limited processing


def rate_limited_enqueue(
    service: QueueService, payloads: Iterable[Any], rate_per_minute: float
) -> list[int]:
    """Spread messages so that ``rate_per_minute`` of them become visible in each minute.

    Each time is computed from the first, not from the one before: a rate that does not divide 60
    (or exceeds it) holds exactly, however many there are.
    """
    items = [
        Item(payload, delay=index * timedelta(minutes=1) / rate_per_minute)
        for index, payload in enumerate(payloads)
    ]
    return [receipt.id for receipt in service.enqueue_many(QUEUE, items)] if items else []


# Reminders


@dataclass(frozen=True)
class ReminderScheduler:
    """Reminds users at a moment, or at intervals, unless they change their mind."""

    service: QueueService

    def schedule_reminder(self, user_id: int, message: str, remind_at: datetime) -> int:
        """Remind once; a moment in the past means now."""
        payload = {
            "type": "reminder",
            "user_id": user_id,
            "message": message,
            "remind_at": remind_at.isoformat(),
        }
        return self.service.enqueue(QUEUE, payload, at=remind_at).id

    def schedule_recurring(
        self, user_id: int, message: str, interval: timedelta, occurrences: int
    ) -> list[int]:
        """Remind several times, the first time after one interval."""
        items = [
            Item(
                {
                    "type": "reminder",
                    "user_id": user_id,
                    "message": message,
                    "occurrence": n,
                    "total": occurrences,
                },
                delay=n * interval,
            )
            for n in range(1, occurrences + 1)
        ]
        return [receipt.id for receipt in self.service.enqueue_many(QUEUE, items)]

    def cancel(self, id: int) -> bool:
        """Cancel one reminder; return False when it is too late."""
        return self.service.messages.try_cancel(id, reason="cancelled by the user")

    def cancel_all(self, user_id: int) -> int:
        """Cancel everything that is scheduled for a user, without its ids; return how many."""
        return self.service.messages.cancel_where(
            QUEUE, Message.scheduled, payload={"user_id": user_id}, reason="user left"
        )


# Processing, by type of message, and retry with backoff

Handler = Callable[[AsyncSession, Delivery], Awaitable[None]]


async def handle_reminder(_session: AsyncSession, delivery: Delivery) -> None:
    """Remind. What a handler writes with the session is committed with the acknowledgement."""
    print(f"reminder for {delivery.payload['user_id']}: {delivery.payload['message']}")


async def handle_email(_session: AsyncSession, delivery: Delivery) -> None:
    """Send an email: last, because it cannot be rolled back."""
    print(f"email to {delivery.payload['email']}: {delivery.payload['template']}")


async def handle_follow_up(_session: AsyncSession, delivery: Delivery) -> None:
    """Send one email of the series."""
    print(f"follow-up to {delivery.payload['user_id']}, day {delivery.payload['series_day']}")


HANDLERS: Mapping[str, Handler] = {
    "reminder": handle_reminder,
    "scheduled_email": handle_email,
    "follow_up_email": handle_follow_up,
}


async def process_scheduled_tasks(
    engine: AsyncEngine, handlers: Mapping[str, Handler], *, idle: float = 1.0
) -> None:
    """Process visible messages until cancelled; wait ``idle`` seconds when none are left."""
    while True:
        if not await process_batch(engine, handlers):
            await asyncio.sleep(idle)


async def process_batch(engine: AsyncEngine, handlers: Mapping[str, Handler]) -> int:
    """Process what is visible now, a few at a time, and return how many there were."""
    async with AsyncSession(engine) as session, session.begin():
        deliveries = await AsyncQueueService(session).dequeue(QUEUE, limit=10, lease=120)
    # The leases are committed: a crash from here on costs an attempt, never a message.
    for delivery in deliveries:
        await process_one(engine, handlers, delivery)
    return len(deliveries)


async def process_one(
    engine: AsyncEngine, handlers: Mapping[str, Handler], delivery: Delivery
) -> None:
    """Do the work of a message and archive it, both or neither; or retry later."""
    try:
        async with AsyncSession(engine) as session, session.begin():
            service = AsyncQueueService(session)
            if (handler := handlers.get(delivery.payload.get("type"))) is None:
                await service.archive(delivery, outcome="discarded", reason="unknown type")
            else:
                await handler(session, delivery)
                await service.archive(delivery)
    except LeaseLost as lost:
        print(f"too late: {lost}")  # and rolled back: another process does it now
    except Exception as error:  # noqa: BLE001 - any error of a handler is a failed attempt
        await put_off(engine, delivery, error)


async def put_off(engine: AsyncEngine, delivery: Delivery, error: Exception) -> None:
    """Retry with longer and longer delays; after the last attempt the message is a dead letter.

    The message keeps its id, and the database counts the attempts, so that no payload has to carry
    the count.
    """
    delay = BACKOFF.delay(delivery.read_ct)
    async with AsyncSession(engine) as session, session.begin():
        await AsyncQueueService(session).try_fail(delivery, error, delay=delay)


# Monitoring


def report(service: QueueService, now: datetime) -> list[str]:
    """Print the counts of the queue, and what comes next."""
    metrics = service.messages.metrics(QUEUE)
    counts = (
        f"{metrics.ready} ready, {metrics.scheduled} scheduled, {metrics.leased} leased, "
        f"{metrics.archived} done, {metrics.dead} dead"
    )
    waiting = service.messages.find(QUEUE, state="scheduled")
    first = sorted(waiting, key=lambda item: item.vt)[:5]
    return [counts, *(f"{item.id} in {item.vt - now}: {item.payload}" for item in first)]


def schedule_everything(engine: Engine) -> Sequence[int]:
    """Schedule one of each, and cancel some."""
    now = datetime.now(UTC)
    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.check_schema()
        service.queues.create(QUEUE, max_read_ct=5)  # does nothing if it exists
        service.queues.purge(QUEUE)
        schedule_fixed_delays(service, {"type": "report"})
        schedule_for_specific_times(service, now, ZoneInfo("Europe/Berlin"))
        schedule_welcome_email(service, 7, "ada@example.org")
        schedule_follow_up_series(service, 7)
        reminders = ReminderScheduler(service)
        reminders.schedule_recurring(7, "stretch", timedelta(hours=6), 3)
        print(f"cancelled {reminders.cancel_all(7)} for user 7")
        reminders.schedule_reminder(8, "call back", now)
        due = [{"type": "reminder", "user_id": n, "message": "hello"} for n in range(3)]
        return rate_limited_enqueue(service, due, rate_per_minute=7)


async def work(url: str) -> None:
    """Do what is due now."""
    engine = create_async_engine(url)
    await process_batch(engine, HANDLERS)
    await engine.dispose()


if __name__ == "__main__":
    # An address that names no driver gets psycopg.
    address = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
    database = create_engine(address)
    schedule_everything(database)
    asyncio.run(work(address))
    with Session(database) as reading:
        print("\n".join(report(QueueService(reading), datetime.now(UTC))))
    database.dispose()

"""``examples/delayed_messages.py``: each pattern of the guide, in the package's own words."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from types import ModuleType
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueService

from .conftest import Clock, together

ROOT = Path(__file__).parents[2]
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "delayed_messages.py"
    spec = importlib.util.spec_from_file_location("delayed_messages", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["delayed_messages"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def time_passes(migrated) -> Iterator[Clock]:
    engine = sa.create_engine(migrated.url)
    yield Clock(engine)
    engine.dispose()


@pytest.fixture
def service(time_passes: Clock, example) -> Iterator[QueueService]:
    """A service whose session is committed by the tests, as a program would."""
    with Session(time_passes.engine) as session:
        service = QueueService(session)
        service.queues.create(example.QUEUE, max_read_ct=5)
        session.commit()
        service.commit = session.commit
        yield service


@pytest.fixture
async def engine(migrated) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(migrated.async_url("asyncpg"))
    yield engine
    await engine.dispose()


def test_fixed_delays(example, service, time_passes) -> None:
    ids = example.schedule_fixed_delays(service, {"type": "report"})
    service.commit()
    assert time_passes.delays() == [300, 3600, 86400, 604800]
    assert list(time_passes.waits()) == ids


def test_dynamic_delays(example, service, time_passes) -> None:
    now = datetime.now(UTC)
    hourly, nine = example.schedule_for_specific_times(service, now, BERLIN)
    service.commit()
    with Session(time_passes.engine) as session:
        moment = session.get_one(Message, hourly).vt
        assert (moment.minute, moment.second, moment.microsecond) == (0, 0, 0)
        assert timedelta(0) < moment - now <= timedelta(hours=1)
        at_nine = session.get_one(Message, nine).vt
        assert at_nine.astimezone(BERLIN).time() == time(9)
        assert timedelta(0) < at_nine - now <= timedelta(hours=25)


@pytest.mark.parametrize(
    ("now", "at", "expected"),
    [
        # An ordinary day: before and after nine.
        ("2026-06-01T06:59+00:00", time(9), "2026-06-01T07:00+00:00"),
        ("2026-06-01T07:00+00:00", time(9), "2026-06-02T07:00+00:00"),
        # The clocks are put forward on March 29: nine comes after 23 hours.
        ("2026-03-28T08:00+00:00", time(9), "2026-03-29T07:00+00:00"),
        # And back on October 25: after 25.
        ("2026-10-24T07:00+00:00", time(9), "2026-10-25T08:00+00:00"),
        # 2:30 does not exist that night: it is half an hour after what would be 2:00.
        ("2026-03-28T12:00+00:00", time(2, 30), "2026-03-29T01:30+00:00"),
        # It comes twice in the other: the first is meant, and only that one.
        ("2026-10-24T12:00+00:00", time(2, 30), "2026-10-25T00:30+00:00"),
        ("2026-10-25T00:30+00:00", time(2, 30), "2026-10-26T01:30+00:00"),
    ],
)
def test_nine_oclock_in_a_time_zone_whose_clocks_change(example, now, at, expected) -> None:
    found = example.next_local(datetime.fromisoformat(now), at, BERLIN)
    assert found == datetime.fromisoformat(expected)


def test_scheduled_email_and_follow_up_series(example, service, time_passes) -> None:
    welcome = example.schedule_welcome_email(service, 7, "ada@example.org")
    assert example.schedule_welcome_email(service, 7, "ada@example.org") == welcome
    example.schedule_follow_up_series(service, 7)
    service.commit()
    assert time_passes.delays() == [600, 86400, 259200, 604800, 1209600]
    days = [payload.get("series_day") for payload in time_passes.payloads().values()]
    assert days == [None, 1, 3, 7, 14]


@pytest.mark.parametrize("rate", [7, 13, 60, 90, 0.5])
def test_rate_limited_enqueue(example, service, time_passes, rate) -> None:
    example.rate_limited_enqueue(service, range(30), rate)
    service.commit()
    assert time_passes.delays() == pytest.approx([n * 60 / rate for n in range(30)], abs=1e-4)
    if rate >= 1:
        minute = [delay for delay in time_passes.delays() if delay < 60 - 1e-3]
        assert len(minute) == min(30, rate)


def test_reminder_scheduler(example, service, time_passes) -> None:
    reminders = example.ReminderScheduler(service)
    now = datetime.now(UTC)
    soon = reminders.schedule_reminder(7, "call back", now + timedelta(hours=2))
    past = reminders.schedule_reminder(7, "too late", now - timedelta(hours=2))
    service.commit()
    assert 7190 < time_passes.waits()[soon] <= 7200
    assert time_passes.visible(example.QUEUE) == [past]
    payload = time_passes.payloads()[soon]
    assert datetime.fromisoformat(payload["remind_at"]) == now + timedelta(hours=2)


def test_recurring_reminders(example, service, time_passes) -> None:
    example.ReminderScheduler(service).schedule_recurring(7, "stretch", timedelta(hours=6), 4)
    service.commit()
    assert time_passes.delays() == [n * 6 * 3600 for n in (1, 2, 3, 4)]
    assert [payload["occurrence"] for payload in time_passes.payloads().values()] == [1, 2, 3, 4]


def test_cancelled_reminders_never_arrive(example, service, time_passes) -> None:
    reminders = example.ReminderScheduler(service)
    later = datetime.now(UTC) + timedelta(hours=1)
    first, second = (reminders.schedule_reminder(7, text, later) for text in "ab")
    other = reminders.schedule_reminder(70, "other", later)
    service.commit()
    assert reminders.cancel(first) is True
    assert reminders.cancel(first) is False
    assert reminders.cancel_all(7) == 1
    service.commit()
    time_passes.pass_seconds(3601)
    assert time_passes.visible(example.QUEUE) == [other]
    outcomes = {
        message.original_msg_id: message.outcome for message in time_passes.archived(example.QUEUE)
    }
    assert outcomes == {first: "cancelled", second: "cancelled"}


async def test_processing_loop_by_type(example, service, time_passes, engine, capsys) -> None:
    example.schedule_welcome_email(service, 7, "ada@example.org")
    example.schedule_follow_up_series(service, 7)
    example.ReminderScheduler(service).schedule_reminder(8, "now", datetime.now(UTC))
    service.enqueue(example.QUEUE, {"type": "carrier pigeon"})
    service.commit()

    def done(count: int) -> bool:
        return len(time_passes.archived(example.QUEUE)) == count

    loop = example.process_scheduled_tasks(engine, example.HANDLERS, idle=0.05)
    await together(loop, lambda: done(2))
    assert "reminder for 8: now" in capsys.readouterr().out
    time_passes.pass_seconds(601)
    loop = example.process_scheduled_tasks(engine, example.HANDLERS, idle=0.05)
    await together(loop, lambda: done(3))
    assert "email to ada@example.org" in capsys.readouterr().out
    outcomes = [message.outcome for message in time_passes.archived(example.QUEUE)]
    assert sorted(outcomes) == ["archived", "archived", "discarded"]
    assert time_passes.metrics(example.QUEUE).scheduled == 4


async def test_retry_with_backoff(example, service, time_passes, engine) -> None:
    id_ = service.enqueue(example.QUEUE, {"type": "payment"}).id
    service.commit()

    async def decline(_session, _delivery) -> None:
        raise ValueError("declined")

    for delay in (60, 240, 960, 3840):
        assert await example.process_batch(engine, {"payment": decline}) == 1
        assert delay - 30 < time_passes.waits()[id_] <= delay
        time_passes.pass_seconds(delay - 30)
        assert await example.process_batch(engine, {"payment": decline}) == 0
        time_passes.pass_seconds(30)
    assert await example.process_batch(engine, {"payment": decline}) == 1
    (dead,) = time_passes.archived(example.QUEUE)
    assert (dead.outcome, dead.read_ct) == ("dead", 5)
    assert (dead.reason, dead.last_error) == ("attempt 5 of 5 failed", "ValueError: declined")


def test_monitoring(example, service, time_passes) -> None:
    example.schedule_follow_up_series(service, 7)
    service.enqueue(example.QUEUE, {"type": "report"})
    service.commit()
    first, *waiting = example.report(service, datetime.now(UTC))
    assert first == "1 ready, 4 scheduled, 0 leased, 0 done, 0 dead"
    assert "in 23:59:5" in waiting[0]
    assert [line.partition("series_day': ")[2][:-1] for line in waiting] == ["1", "3", "7", "14"]


def test_the_program_runs_twice(migrated) -> None:
    command = [sys.executable, "-W", "error", "examples/delayed_messages.py"]
    environment = os.environ | {"PGQRS_DSN": migrated.dsn}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert "cancelled 8 for user 7" in done.stdout
        assert "reminder for 8: call back" in done.stdout

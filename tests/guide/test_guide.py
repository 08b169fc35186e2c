"""Every Python block of the guide runs, with its import line changed and nothing else.

The guide is kept word for word in ``docs/guide``. Its blocks are taken in its order; each test
here is named after the section that it runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from .conftest import Clock, together

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "delayed-messages-guide.md"
SHA256 = "e44e1cad8a6eb76878e8393d8cacc616d584d7645555571eeab269141740e695"
FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SECTIONS = (
    "Basic Usage",
    "Dynamic Delays",
    "Scheduled Email",
    "Retry with Backoff",
    "Processing Delayed Messages",
    "Canceling Scheduled Messages",
    "Complete Example",
)

# The guide's own code calls it; Python 3.12 deprecates it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcnow\\(\\) is deprecated:DeprecationWarning"
)


def blocks() -> list[tuple[int, str]]:
    """The Python blocks, with the line on which each begins."""
    text = GUIDE.read_text()
    found = []
    for match in FENCE.finditer(text):
        code = textwrap.dedent(match[2])
        if '\\"' in code:  # the last one is written as if inside a string
            code = code.replace('\\"', '"').replace("\\\\", "\\")
        found.append((text.count("\n", 0, match.start(2)), code))
    return found


class Guide:
    """The names that the guide's blocks define, on one database."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.names: dict[str, Any] = {}

    def run(self, section: str, name: str = "guide") -> Guide:
        line, code = blocks()[SECTIONS.index(section)]
        code, imports = re.subn(
            r"^import pgqrs$", "from pgqrs_sa import pgqrs", code, flags=re.MULTILINE
        )
        assert imports == 1
        code = code.replace("postgresql://localhost/mydb", self._dsn)
        self.names["__name__"] = name
        # Padded, so that a traceback names the line of the guide.
        exec(compile("\n" * line + code, str(GUIDE), "exec", dont_inherit=True), self.names)  # noqa: S102
        return self

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture
def guide(database) -> Guide:
    return Guide(database.dsn)


def test_the_copy_of_the_guide_is_the_guide() -> None:
    assert hashlib.sha256(GUIDE.read_bytes()).hexdigest() == SHA256
    assert len(blocks()) == len(SECTIONS)


def test_basic_usage(guide: Guide, clock: Clock, capsys) -> None:
    guide.run("Basic Usage")  # installs, creates the queue, schedules: all by itself
    ((id_, wait),) = clock.waits().items()
    assert 3590 < wait <= 3600
    assert f"Scheduled reminder {id_} for 1 hour from now" in capsys.readouterr().out
    assert clock.payloads()[id_]["customer_id"] == 12345
    assert clock.metrics("reminders").scheduled == 1
    clock.pass_seconds(3590)
    assert clock.visible("reminders") == []
    clock.pass_seconds(11)
    assert clock.visible("reminders") == [id_]


def test_dynamic_delays(guide: Guide, clock: Clock, prepare) -> None:
    admin = prepare("reports")
    guide.run("Dynamic Delays")
    producer = guide.pgqrs.Producer(admin, "reports", "scheduler", 3000)
    before = datetime.now(UTC)
    asyncio.run(guide.schedule_for_specific_times(producer))

    next_hour = before.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    nine = before.replace(hour=9, minute=0, second=0, microsecond=0)
    nine += timedelta(days=1) if nine <= before else timedelta(0)
    took = (datetime.now(UTC) - before).total_seconds()
    expected = [(moment - before).total_seconds() for moment in (next_hour, nine)]
    for delay, most in zip(clock.delays(), expected, strict=True):
        assert most - took - 1 <= delay <= most  # in whole seconds, from when it was called
    assert clock.visible("reports") == []
    clock.pass_seconds(max(expected) + 2)
    assert len(clock.visible("reports")) == 2


def test_scheduled_email(guide: Guide, clock: Clock, prepare) -> None:
    admin = prepare("emails")
    guide.run("Scheduled Email")
    asyncio.run(guide.setup_user_emails(admin, 7, "ada@example.org"))
    days = [86400, 259200, 604800, 1209600]
    assert clock.delays() == [600, *days]
    welcome, *series = clock.payloads().values()
    assert welcome["type"] == "welcome_email"
    assert [item["series_day"] for item in series] == [1, 3, 7, 14]
    passed = 0
    for seen, delay in enumerate([600, *days]):
        clock.pass_seconds(delay - 60 - passed)
        assert len(clock.visible("emails")) == seen
        clock.pass_seconds(60)
        assert len(clock.visible("emails")) == seen + 1
        passed = delay


def test_retry_with_backoff(guide: Guide, clock: Clock, prepare, capsys) -> None:
    admin = prepare("payments")
    guide.run("Retry with Backoff")
    producer = guide.pgqrs.Producer(admin, "payments", "retrier", 3000)

    async def fail_until_it_gives_up() -> None:
        task = {"task": "process_payment"}
        for attempt in range(6):
            await guide.handle_failed_task(producer, task | {"attempt": attempt}, "declined")

    asyncio.run(fail_until_it_gives_up())
    # Attempts 0 to 4 wait longer and longer; a fifth is allowed, after it the task is given up.
    assert clock.delays()[:4] == [60, 240, 960, 3840]
    *retries, last = clock.payloads().values()
    assert [retry["attempt"] for retry in retries] == [1, 2, 3, 4, 5]
    assert last["type"] == "failed_permanently"
    assert clock.delays()[5] == 0
    assert "Max attempts (5) reached, giving up" in capsys.readouterr().out
    assert asyncio.run(guide.schedule_retry(producer, {}, 5)) is None
    assert len(clock.payloads()) == 6


def test_processing_delayed_messages(guide: Guide, clock: Clock, prepare, capsys) -> None:
    admin = prepare("mixed")
    guide.run("Processing Delayed Messages")
    producer = guide.pgqrs.Producer(admin, "mixed", "producer", 3000)
    consumer = guide.pgqrs.Consumer(admin, "mixed", "consumer", 3001)
    later = {"type": "reminder", "message": "later", "user_id": 1}
    broken = {"type": "retry", "original": None}  # its handler raises

    async def process() -> None:
        late = await producer.enqueue_delayed(later, delay_seconds=600)
        ids = [
            await producer.enqueue(payload)
            for payload in (
                {"type": "reminder", "message": "now", "user_id": 1},
                {"type": "scheduled_email", "email": "ada@example.org"},
                {"type": "follow_up_email", "series_day": 3},
                {"scheduled_retry": True, "attempt": 2, "original": {"type": "payment"}},
                {"type": "carrier pigeon"},
                broken,
            )
        ]
        assert late not in clock.visible("mixed")
        failed = ids[-1]

        def put_off() -> bool:
            return clock.metrics("mixed").archived == 5 and clock.waits()[failed] > 200

        def nothing_more() -> bool:
            assert clock.metrics("mixed").archived == 5
            return next(ticks) > 20

        ticks = iter(range(100))
        # It comes back after five minutes and not sooner, though its consumer lives and looks.
        with clock.puts_off(failed, 300):
            await together(guide.process_scheduled_tasks(consumer), put_off)
        clock.pass_seconds(100)
        await together(guide.process_scheduled_tasks(consumer), nothing_more)
        assert clock.visible("mixed") == []
        clock.pass_seconds(200)
        assert clock.visible("mixed") == [failed]
        (again,) = await consumer.dequeue()
        assert (again.id, again.payload, again.read_ct) == (failed, broken, 2)
        assert await consumer.archive(failed) is True
        clock.pass_seconds(300)
        done = lambda: clock.metrics("mixed").archived == 7  # noqa: E731
        await together(guide.process_scheduled_tasks(consumer), done)

    asyncio.run(process())
    out = capsys.readouterr().out
    for text in (
        "🔔 Reminder: now",
        "📧 Sending email to ada@example.org",
        "📨 Sending follow-up email (day 3)",
        "Original task: payment",
        "Unknown message type: carrier pigeon",
        "❌ Error processing message",
        "🔔 Reminder: later",
    ):
        assert text in out


def test_canceling_scheduled_messages_by_id(guide: Guide, clock: Clock, prepare, capsys) -> None:
    prepare("tasks")
    guide.run("Canceling Scheduled Messages")
    asyncio.run(guide.schedule_and_cancel_example())
    assert "✅ Cancelled scheduled message" in capsys.readouterr().out
    clock.pass_seconds(3601)
    assert clock.visible("tasks") == []  # it never arrives
    (cancelled,) = clock.archived("tasks")
    assert (cancelled.outcome, cancelled.payload["user_id"]) == ("cancelled", 123)


def test_canceling_scheduled_messages_of_a_user(
    guide: Guide, clock: Clock, prepare, capsys
) -> None:
    admin = prepare("reminders")
    guide.run("Canceling Scheduled Messages")

    async def schedule_and_cancel() -> int:
        producer = guide.pgqrs.Producer(admin, "reminders", "scheduler", 3000)
        for n in range(3):
            payload = {"type": "reminder", "user_id": 7, "n": n, "more": {"a": [1]}}
            await producer.enqueue_delayed(payload, delay_seconds=600)
        other = await producer.enqueue_delayed({"user_id": 70, "n": 7}, delay_seconds=600)
        await producer.enqueue_delayed({"nested": {"user_id": 7}}, delay_seconds=600)
        messages = await admin.get_messages()
        found = await messages.filter_by_payload({"more": {"a": [1]}, "user_id": 7})
        assert [row.payload["n"] for row in found] == [0, 1, 2]  # by containment
        await guide.cancel_user_reminders(admin, 7)
        assert await messages.filter_by_payload({"user_id": 7}) == []
        return other

    other = asyncio.run(schedule_and_cancel())
    assert "Cancelled 3 scheduled reminders for user 7" in capsys.readouterr().out
    clock.pass_seconds(601)
    assert clock.visible("reminders")[0] == other
    assert len(clock.visible("reminders")) == 2


def test_complete_example_delayed_messages_demo(guide: Guide, clock: Clock, capsys) -> None:
    guide.run("Complete Example", name="__main__")  # 15 s, as the guide says
    out = capsys.readouterr().out
    received = re.findall(r"\[ *([\d.]+)s\] Received: {'msg': '(\d+) seconds'}", out)
    assert [int(wanted) for _, wanted in received] == [5, 10, 15]
    for (_, wanted), item in zip(received, clock.archived("scheduled"), strict=True):
        assert item.payload == {"msg": f"{wanted} seconds"}
        assert item.dequeued_at - item.enqueued_at >= timedelta(seconds=int(wanted))  # not sooner
    # It looks twice a second: the last one is received about when it is due.
    assert float(received[-1][0]) < 60
    assert "All scheduled messages processed!" in out
    assert (clock.metrics("scheduled").archived, clock.metrics("scheduled").live) == (3, 0)


def test_complete_example_advanced_scheduling_demo(
    guide: Guide, clock: Clock, prepare, capsys
) -> None:
    prepare()
    for section in ("Scheduled Email", "Retry with Backoff", "Complete Example"):
        guide.run(section)
    asyncio.run(guide.advanced_scheduling_demo())
    # A minute later, cut to whole seconds by the demo's own arithmetic.
    assert clock.delays() == [86400, 259200, 604800, 1209600, 60, pytest.approx(60, abs=5)]
    assert "Scheduled time-based reminder" in capsys.readouterr().out
    assert clock.metrics("advanced_scheduling").scheduled == 6

"""Queues declared in code: created where they are missing, compared, changed on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import (
    AsyncQueueService,
    DeclaredQueue,
    InvalidArgument,
    Item,
    Message,
    NonAtomicEnqueue,
    PgqrsError,
    QueueDifference,
    QueueNotFound,
    QueueService,
    SyncedQueue,
    declare_queues,
)
from support import programs

MAIL = DeclaredQueue("mail", lease=60, max_read_ct=3)
POSTS = DeclaredQueue("posts", retention=timedelta(days=1), max_payload_bytes=2000)
PLAIN = DeclaredQueue("plain")


@contextmanager
def statements(engine: sa.Engine) -> Iterator[list[str]]:
    """The first word of each statement that is executed."""
    seen: list[str] = []

    def note(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement.split(maxsplit=1)[0])

    sa.event.listen(engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", note)


def test_missing_queues_are_created_by_one_insert(engine: sa.Engine, session: Session) -> None:
    with statements(engine) as seen:
        found = QueueService(session).queues.sync([PLAIN, POSTS, MAIL])
    assert found == [SyncedQueue(name, "created") for name in ("mail", "plain", "posts")]
    assert seen == ["SELECT", "INSERT"]
    mail, plain, posts = QueueService(session).queues.list()
    assert (mail.lease_seconds, mail.max_read_ct) == (60, 3)
    assert (mail.retention_seconds, mail.max_payload_bytes) == (None, 1_048_576)
    assert (plain.lease_seconds, plain.max_read_ct, plain.max_payload_bytes) == (30, 5, 1_048_576)
    assert (posts.retention_seconds, posts.max_payload_bytes) == (86_400, 2_000)


def test_queues_that_exist_are_only_read(engine: sa.Engine, session: Session) -> None:
    queues = QueueService(session).queues
    queues.sync([MAIL])
    with statements(engine) as seen:
        assert queues.sync([MAIL]) == [SyncedQueue("mail", "unchanged")]
        assert queues.sync([]) == []
    assert seen == ["SELECT"]


def test_what_differs_is_reported_and_changed_on_request_alone(session: Session) -> None:
    queues = QueueService(session).queues
    before = queues.create("mail", lease=60, max_read_ct=7, retention=5)
    difference = QueueDifference("max_read_ct", 3, 7)
    assert queues.sync([MAIL]) == [SyncedQueue("mail", "differs", (difference,))]
    assert queues.sync(MAIL, update=True, dry_run=True)[0].status == "differs"
    assert queues.get("mail") == before
    assert queues.sync([MAIL], update=True) == [SyncedQueue("mail", "updated", (difference,))]
    after = queues.get("mail")
    # A setting that is not declared stays as an operator has set it.
    assert (after.max_read_ct, after.lease_seconds, after.retention_seconds) == (3, 60, 5)
    assert queues.sync([MAIL], update=True) == [SyncedQueue("mail", "unchanged")]


def test_a_dry_run_creates_nothing(session: Session) -> None:
    queues = QueueService(session).queues
    assert queues.sync([MAIL], dry_run=True) == [SyncedQueue("mail", "missing")]
    assert queues.list() == []


def test_a_rollback_takes_created_queues_back(session: Session) -> None:
    QueueService(session).queues.sync([MAIL])
    session.rollback()
    assert QueueService(session).queues.list() == []


def test_queues_are_declared_on_a_metadata(session: Session) -> None:
    metadata = sa.MetaData()
    declare_queues(metadata, POSTS)
    declare_queues(metadata, MAIL, DeclaredQueue("mail", lease=timedelta(minutes=1), max_read_ct=3))
    found = QueueService(session).queues.sync(metadata)
    assert [queue.name for queue in found] == ["mail", "posts"]
    with pytest.raises(InvalidArgument, match="'mail' is declared twice"):
        declare_queues(metadata, DeclaredQueue("mail"))
    with pytest.raises(InvalidArgument, match="metadata must be a MetaData, not 7"):
        declare_queues(7, MAIL)  # type: ignore[arg-type]


def test_bad_declarations_are_refused_by_name(session: Session) -> None:
    for settings, problem in (
        ({"name": "no spaces"}, "'no spaces' is no queue name"),
        ({"name": "a", "lease": 0}, "lease must be more than 0 seconds"),
        ({"name": "a", "max_read_ct": 0}, "max_read_ct"),
        ({"name": "a", "retention": -1}, "retention must be 0 or more"),
        ({"name": "a", "max_payload_bytes": "x"}, "max_payload_bytes"),
    ):
        with pytest.raises(PgqrsError, match=problem):
            DeclaredQueue(**settings)
    queues = QueueService(session).queues
    with pytest.raises(InvalidArgument, match=r"queues\[1\] must be a DeclaredQueue, not 'posts'"):
        queues.sync([MAIL, "posts"])  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match="queues must be a list, not 'mail'"):
        queues.sync("mail")  # type: ignore[arg-type]


async def test_queues_are_synchronized_from_asyncio(async_service: AsyncQueueService) -> None:
    found = await async_service.queues.sync([MAIL, POSTS])
    assert [(queue.name, queue.status) for queue in found] == [
        ("mail", "differs"),
        ("posts", "created"),
    ]
    assert [found.status for found in await async_service.queues.sync(MAIL, update=True)] == [
        "updated"
    ]
    service = AsyncQueueService(async_service.session, create_queues=True)
    await service.enqueue("new", 1)
    assert (await service.queues.get("new")).lease_seconds == 30


STARTING = """
import random, sys
import sqlalchemy as sa
from sqlalchemy.orm import Session
from pgqrs_sa import DeclaredQueue, QueueService

queues = [DeclaredQueue(f"q{n:03}", lease=n + 1) for n in range(200)]
random.shuffle(queues)
with Session(sa.create_engine(sys.argv[1])) as session:
    session.connection()
    print("ready", flush=True)
    sys.stdin.readline()
    found = QueueService(session).queues.sync(queues)
    session.commit()
print(sum(one.status == "created" for one in found), {one.status for one in found}, flush=True)
"""


def test_eight_processes_may_start_at_once(migrated: Any, session: Session) -> None:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(programs.start("-c", STARTING, migrated.url)) for _ in range(8)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ends
    assert sum(int(out.split()[0]) for out, _ in ends) == 200
    assert not [out for out, _ in ends if "differs" in out]
    assert len(QueueService(session).queues.list()) == 200


# ------------------------------------------------------------------- creation on first enqueue


def test_an_unknown_queue_is_an_error_by_default(service: QueueService) -> None:
    with pytest.raises(QueueNotFound, match="did you mean 'mail'"):
        service.enqueue("mial", 1)
    with pytest.raises(QueueNotFound):
        service.enqueue_many("mial", [1])
    with pytest.raises(QueueNotFound):
        service.enqueue_from("mial", sa.select(sa.literal("x").label("payload")))


@pytest.mark.parametrize("payload", [1, "x" * 100_000])
def test_a_queue_is_created_by_the_first_message(session: Session, payload: object) -> None:
    service = QueueService(session, create_queues=True)
    service.enqueue("new", payload)
    session.commit()
    assert service.queues.get("new").max_read_ct == 5
    assert [found.payload for found in service.dequeue("new")] == [payload]


@pytest.mark.parametrize(
    "items", [[1, 2], [Item(1), Item(2)], [Item(1, key="a"), Item(2, key="b")], ["x" * 100_000]]
)
def test_a_queue_is_created_by_the_first_batch(session: Session, items: list[Any]) -> None:
    service = QueueService(session, create_queues=True)
    assert len(service.enqueue_many("new", items)) == len(items)
    session.commit()
    assert service.messages.count("new") == len(items)


def test_a_queue_is_created_by_the_first_query(session: Session) -> None:
    service = QueueService(session, create_queues=True)
    query = sa.select(sa.func.generate_series(1, 3).label("payload"))
    query = sa.select(sa.func.to_jsonb(query.subquery().c.payload).label("payload"))
    assert service.enqueue_from("new", query) == 3
    assert service.messages.count("new") == 3


def test_a_queue_is_created_by_the_first_message_that_is_added(session: Session) -> None:
    session.add(Message(queue_name="new", payload=1))
    with pytest.raises(QueueNotFound):
        session.flush()
    session.rollback()
    session.info["pgqrs_create_queues"] = True
    session.add_all([Message(queue_name=name, payload=1) for name in ("new", "newer", "new")])
    session.commit()
    counts = [QueueService(session).messages.count(name) for name in ("new", "newer")]
    assert counts == [2, 1]


def test_a_created_queue_rolls_back_with_its_message(session: Session) -> None:
    service = QueueService(session, create_queues=True)
    service.enqueue("new", 1)
    session.rollback()
    assert service.queues.list() == []


def test_a_refused_message_creates_no_queue(engine: sa.Engine) -> None:
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(alone) as session:
        service = QueueService(session, create_queues=True)
        for payload in (1, "x" * 100_000):
            with pytest.raises(NonAtomicEnqueue):
                service.enqueue("new", payload)
        assert service.queues.list() == []

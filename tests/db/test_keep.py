"""Which settled messages a queue keeps, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import (
    ArchivedMessage,
    Consumer,
    DeclaredQueue,
    InvalidArgument,
    Message,
    Queue,
    QueueService,
    Retry,
)
from pgqrs_sa._core.sql import archive
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.types import Keep
from tests.support.cases import each_case

OUTCOMES = ("archived", "dead", "cancelled", "discarded")
KEPT: dict[Keep, tuple[str, ...]] = {
    "all": OUTCOMES,
    "failed": ("dead", "cancelled", "discarded"),
    "nothing": (),
}


def settle_each_way(service: QueueService, queue: str) -> None:
    """Settle four messages: archived, discarded, dead and cancelled."""
    service.enqueue_many(queue, list(OUTCOMES))
    held = {delivery.payload: delivery for delivery in service.dequeue(queue, 3)}
    service.archive(held["archived"])
    service.fail(held["dead"], "no", dead=True)
    service.archive(held["cancelled"], outcome="discarded", reason="why")
    (left,) = service.messages.find(queue)
    service.messages.cancel(left.id, reason="not wanted")


def archived(session: Session) -> list[str]:
    return sorted(session.scalars(sa.select(ArchivedMessage.outcome)))


@each_case("keep", list(KEPT))
def test_a_queue_keeps_what_it_is_set_to_keep(service, session, keep: Keep):
    name = f"keeps-{keep}"
    service.queues.create(name, keep=keep)
    settle_each_way(service, name)
    found = [info.outcome for info in service.archived.find(name)]
    assert sorted(found) == sorted(KEPT[keep])
    assert service.messages.count(name) == 0


def test_queues_of_one_statement_keep_each_its_own(service, session):
    service.queues.create("rare", keep="failed")
    service.enqueue("mail", 1)
    service.enqueue("rare", 2)
    held = [*service.dequeue("mail"), *service.dequeue("rare")]
    assert service.archive_many(held) is None
    rows = session.execute(sa.select(ArchivedMessage.id, ArchivedMessage.outcome)).all()
    assert rows == [(held[0].id, "archived")]
    assert session.scalars(sa.select(Message.id)).all() == []


def test_a_lost_lease_deletes_nothing_of_a_queue_that_keeps_nothing(service, session):
    service.queues.create("rare", keep="nothing")
    service.enqueue("rare", 1)
    (former,) = service.dequeue("rare")
    service.release(former)
    (present,) = service.dequeue("rare")
    assert service.try_archive(former) is False
    assert session.scalars(sa.select(Message.id)).all() == [present.id]
    service.archive(present)
    assert session.scalars(sa.select(Message.id)).all() == []


def test_another_setting_holds_from_the_next_settlement_on(service, session):
    service.enqueue_many("mail", [1, 2])
    first, second = service.dequeue("mail", 2)
    service.archive(first)
    assert service.queues.update("mail", keep="failed").keep == "failed"
    service.archive(second)
    assert session.scalars(sa.select(ArchivedMessage.id)).all() == [first.id]


def test_a_consumer_keeps_failures_alone(engine, service, session):
    service.queues.create("rare", keep="failed")
    service.enqueue_many("rare", ["good"] * 5 + ["bad"])
    session.commit()
    consumer = Consumer(sessionmaker(engine), poll_interval=0.05)

    @consumer.on("rare", retry=Retry(max_attempts=1))
    def handle(payload: str) -> None:
        if payload == "bad":
            raise ValueError(payload)

    consumer.run(until_empty=True)
    assert archived(session) == ["dead"]
    assert session.scalars(sa.select(Message.id)).all() == []


def test_exhausted_messages_of_a_queue_that_keeps_nothing_are_deleted(service, session):
    service.queues.create("rare", keep="nothing")
    service.enqueue("rare", 1, max_read_ct=1)
    service.dequeue("rare")
    session.execute(sa.update(Message).values(leased_until=sa.func.statement_timestamp()))
    assert service.archived.bury("rare") == 1
    assert archived(session) == []


RETENTIONS: dict[str, tuple[dict[str, float | None], tuple[str, ...]]] = {
    "one for all": ({"retention": 60}, ()),
    "failures for longer": ({"retention": 60, "failed_retention": 3600}, KEPT["failed"]),
    "failures for less": ({"retention": 3600, "failed_retention": 60}, ("archived",)),
    "failures alone": ({"failed_retention": 60}, ("archived",)),
    "for ever": ({"retention": None, "failed_retention": None}, OUTCOMES),
}


@each_case("name", list(RETENTIONS))
def test_prune_follows_the_retention_of_each_outcome(service, session, name):
    settings, left = RETENTIONS[name]
    queue = name.replace(" ", "-")
    service.queues.create(queue, **settings)
    settle_each_way(service, queue)
    session.execute(
        sa.update(ArchivedMessage).values(
            archived_at=sa.func.statement_timestamp() - timedelta(seconds=600)
        )
    )
    expected = len(OUTCOMES) - len(left)
    assert service.archived.prune(queue=queue) == expected
    assert sorted(info.outcome for info in service.archived.find(queue)) == sorted(left)
    assert service.archived.prune(queue=queue) == 0


def test_a_chunk_of_prune_is_of_both_retentions_together(service, session):
    service.queues.update("mail", retention=0, failed_retention=0)
    for _ in range(3):
        settle_each_way(service, "mail")
    session.execute(
        sa.update(ArchivedMessage).values(
            archived_at=sa.func.statement_timestamp() - timedelta(seconds=1)
        )
    )
    chunks = [service.archived.prune(queue="mail", limit=5) for _ in range(4)]
    assert chunks == [5, 5, 2, 0]


@each_case("value", ["some", "", None, 1, ["all"]])
def test_no_other_value_is_sent(service, value):
    with pytest.raises(InvalidArgument, match="keep must be one of all, failed, nothing"):
        service.queues.create("other", keep=value)
    with pytest.raises(InvalidArgument, match="keep must be one of all, failed, nothing"):
        service.queues.update("mail", keep=value)


def test_declared_queues_have_the_settings_too(service):
    declared = DeclaredQueue("declared", keep="failed", failed_retention=3600)
    service.queues.sync(declared)
    info = service.queues.get("declared")
    assert (info.keep, info.retention_seconds, info.failed_retention_seconds) == (
        "failed",
        None,
        3600,
    )
    changed = DeclaredQueue("declared", keep="all")
    (synced,) = service.queues.sync(changed, dry_run=True)
    assert [str(difference) for difference in synced.differences] == [
        "keep is failed, declared all"
    ]


def test_the_table_has_no_other_value(service, session):
    with pytest.raises(sa.exc.IntegrityError, match="pgqrs_queues_keep_check"):
        session.execute(sa.update(Queue).values(keep="some"))


SETTLING: dict[str, Callable[[QueueService], object]] = {
    "service": lambda service: service.archive_many(service.dequeue("mail", 10)),
    "delete": lambda service: service.delete_many(service.dequeue("mail", 10)),
}


@each_case("name", list(SETTLING))
def test_what_is_settled_is_settled_once_whatever_is_kept(service, session, name):
    service.queues.update("mail", keep="nothing")
    service.enqueue_many("mail", list(range(10)))
    SETTLING[name](service)
    assert service.dequeue("mail", 10) == []
    assert archived(session) == []


def test_failures_are_pruned_by_their_own_index_however_many_others_there_are(service, session):
    service.queues.update("mail", failed_retention=3600)
    session.execute(
        sa.text(
            "INSERT INTO pgqrs_archive (id, queue_id, payload, outcome, archived_at)"
            " SELECT -n, (SELECT id FROM pgqrs_queues WHERE queue_name = 'mail'), '1',"
            " CASE WHEN n % 1000 = 0 THEN 'dead' ELSE 'archived' END,"
            " statement_timestamp() - interval '1 day' FROM generate_series(1, 20000) AS n"
        )
    )
    session.commit()
    session.execute(sa.text("ANALYZE pgqrs_archive"))
    statement = archive.prune_by_retention(tables_of(READY_MADE), failed=True, one_queue=False)
    compiled = statement.compile(dialect=session.get_bind().dialect)
    plan = session.connection().exec_driver_sql(
        f"EXPLAIN {compiled}", compiled.construct_params({"limit": 1000})
    )
    text = "\n".join(plan.scalars())
    assert "pgqrs_archive_not_done_idx" in text
    assert "pgqrs_archive_queue_idx" not in text
    assert service.archived.prune() == 20

"""Objects of rows that the service has removed are not given by the session any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Message, Queue, QueueService, Worker
from support.cases import each_case

EXHAUSTED = "UPDATE pgqrs_messages SET read_ct = 99, max_read_ct = 5"
SETTLING = {
    "archive": lambda service, item: service.archive(item),
    "delete": lambda service, item: service.delete(item),
    "discard": lambda service, item: service.archive(item, outcome="discarded", reason="why"),
    "dead": lambda service, item: service.fail(item, "error", dead=True),
}
REMOVING: dict[str, Callable[[QueueService, int], Any]] = {
    "requeue": lambda service, id_: service.archived.requeue(id_),
    "delete": lambda service, id_: service.archived.delete([id_]),
    "prune": lambda service, _: service.archived.prune(older_than=0),
    "delete_queue": lambda service, _: service.queues.delete("mail", force=True),
}


def loaded(session: Session, kind: Any) -> int:
    """Load the only object of a class, which the session then knows."""
    item = session.scalars(sa.select(kind)).one()
    assert session.get(kind, item.id) is item
    session.info["kept"] = item  # or the session would let go of it by itself
    return int(item.id)


@each_case("way", list(SETTLING), before="reset")
def test_of_a_message_that_was_settled(service, session, way):
    service.enqueue("mail", 1)
    (delivery,) = service.dequeue("mail")
    id_ = loaded(session, Message)
    SETTLING[way](service, delivery)
    assert session.get(Message, id_) is None


@each_case("way", ["purge", "bury", "delete"], before="reset")
def test_of_messages_that_were_purged_or_buried(service, session, way):
    service.enqueue("mail", 1)
    if way == "bury":
        session.execute(sa.text(EXHAUSTED))
    id_ = loaded(session, Message)
    if way == "delete":
        service.queues.delete("mail", force=True)
    else:
        assert getattr(service.archived if way == "bury" else service.queues, way)("mail") == 1
    assert session.get(Message, id_) is None


@each_case("way", list(REMOVING), before="reset")
def test_of_what_was_in_the_archive(service, session, way):
    service.enqueue("mail", 1)
    service.archive(*service.dequeue("mail"))
    id_ = loaded(session, ArchivedMessage)
    REMOVING[way](service, id_)
    assert session.get(ArchivedMessage, id_) is None


def test_of_a_queue_and_of_workers_that_were_removed(service, session):
    service.workers.register("a")
    worker = loaded(session, Worker)
    service.workers.stop(worker)
    assert service.workers.purge(older_than=0) == 1
    assert session.get(Worker, worker) is None
    queue = loaded(session, Queue)
    service.queues.delete("mail")
    assert session.get(Queue, queue) is None


def test_what_is_changed_is_seen_in_objects_that_are_loaded(service, session):
    id_ = service.workers.register("a").id
    worker = session.get(Worker, id_)
    assert worker.status == "ready"
    session.execute(sa.text("UPDATE pgqrs_workers SET heartbeat_at = now() - interval '1 day'"))
    assert service.workers.reclaim(silent_for=60) == 0
    assert (worker.status, worker.shutdown_at is None) == ("stopped", False)
    queue = session.scalars(sa.select(Queue)).one()
    service.queues.pause("mail")
    assert queue.paused_at is not None
    service.enqueue("mail", 1)
    message = session.scalars(sa.select(Message)).one()
    service.queues.resume("mail")
    (delivery,) = service.dequeue("mail")
    before = message.leased_until
    service.extend(delivery, lease=1000)
    assert message.leased_until > before

"""A command that counts, asks and then deletes takes what was counted, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import ArchivedMessage, Message, QueueService

from .conftest import bury


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """``asked(what)``: do something between the count and the answer, which is yes."""

    def put(meanwhile: Callable[[], object]) -> None:
        def confirmed(*_args: object, **_options: object) -> bool:
            meanwhile()
            return True

        for module in ("queues", "archive", "workers"):
            monkeypatch.setattr(f"pgqrs_sa.cli.{module}.confirmed", confirmed)

    return put


@pytest.fixture
def open_transaction(engine: sa.Engine) -> Iterator[Session]:
    """A transaction that is open at the count; a test commits it later."""
    with ExitStack() as stack:
        yield stack.enter_context(Session(engine))


def live(engine: sa.Engine) -> list[object]:
    with Session(engine) as session:
        return list(session.scalars(sa.select(Message.payload).order_by(Message.id)))


def settled(engine: sa.Engine) -> list[object]:
    with Session(engine) as session:
        return list(session.scalars(sa.select(ArchivedMessage.payload).order_by("id")))


@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_purge_spares_what_is_requeued_meanwhile(pgqrs, work, engine, asked, chunk):
    pgqrs("queue", "create", "mail")
    dead = [bury(work, "mail", f"dead {n}") for n in range(3)]
    with work() as service:
        service.enqueue_many("mail", [1, 2, 3])

    def requeued() -> None:
        with work() as service:
            service.archived.requeue_many(dead)

    asked(requeued)
    done = pgqrs.json("queue", "purge", "mail", "--chunk", chunk)
    assert (done["count"], done["kept"]) == (3, 0)
    assert live(engine) == ["dead 0", "dead 1", "dead 2"]


def test_a_purge_spares_a_counted_message_that_was_settled_and_requeued(pgqrs, work, engine, asked):
    pgqrs("queue", "create", "mail")
    with work() as service:
        service.enqueue_many("mail", [1, 2])

    def back() -> None:
        with work() as service:
            (delivery,) = service.dequeue("mail")
            service.archive(delivery)
            service.archived.requeue(service.archived.find("mail")[0].id)

    asked(back)
    done = pgqrs("queue", "purge", "mail")
    assert "1 counted message(s) stayed" in done.stderr
    assert live(engine) == [1]


@pytest.mark.parametrize("savepoint", [False, True])
def test_a_purge_spares_what_a_transaction_commits_that_was_open_at_the_count(
    pgqrs, work, engine, asked, open_transaction, savepoint
):
    pgqrs("queue", "create", "mail")
    with work() as service:
        service.enqueue_many("mail", [1, 2])
    with open_transaction.begin_nested() if savepoint else ExitStack():
        QueueService(open_transaction).enqueue("mail", "late")
    with work() as service:
        service.enqueue_many("mail", [3, 4])

    asked(open_transaction.commit)
    assert pgqrs.json("queue", "purge", "mail", "--chunk", 2)["count"] == 4
    assert live(engine) == ["late"]


def test_a_purge_reports_what_was_leased_meanwhile(pgqrs, work, engine, asked):
    pgqrs("queue", "create", "mail")
    with work() as service:
        service.enqueue_many("mail", [1, 2, 3, 4])
        (held,) = service.dequeue("mail")
        settled_later = service.dequeue("mail")

    def at_work() -> None:
        with work() as service:
            service.extend(held, 60)
            service.archive_many(settled_later)
            service.dequeue("mail")

    asked(at_work)
    done = pgqrs("queue", "purge", "mail", "--format", "json")
    assert '"count": 2' in done.stdout
    assert '"kept": 1' in done.stdout
    assert "1 counted message(s) stayed: leased or requeued since" in done.stderr
    assert live(engine) == [3]


def test_a_queue_is_not_deleted_with_what_arrived_meanwhile(pgqrs, work, engine, asked):
    pgqrs("queue", "create", "mail")
    dead = bury(work, "mail", "dead")
    bury(work, "mail", "other dead")
    with work() as service:
        service.enqueue_many("mail", [1, 2])

    def arrived() -> None:
        with work() as service:
            service.archived.requeue(dead)
            service.enqueue("mail", "new")

    asked(arrived)
    refused = pgqrs("queue", "delete", "mail", "--force", code=1)
    assert "2 live and 0 archived message(s) since they were counted" in refused.stderr
    assert "hint: " in refused.stderr
    assert live(engine) == ["dead", "new"]
    assert settled(engine) == []
    asked(lambda: None)
    assert pgqrs.json("queue", "delete", "mail", "--force")["count"] == 2
    pgqrs("queue", "get", "mail", code=3)


def three_dead_and_one_uncommitted(pgqrs, work, open_transaction) -> list[int]:
    """Make dead letters; the open transaction has made one as well, with a smaller id."""
    pgqrs("queue", "create", "mail")
    with work() as service:
        service.enqueue("mail", "late", max_read_ct=1)
        first = service.dequeue("mail")
    dead = [bury(work, "mail", n) for n in range(2)]
    QueueService(open_transaction).fail_many(first, "no")
    dead.append(bury(work, "mail", 2))
    return dead


@pytest.mark.parametrize(
    "command",
    ["archive delete mail", "archive prune --older-than 0", "dead discard --all"],
)
def test_what_is_settled_meanwhile_stays_in_the_archive(
    pgqrs, work, engine, asked, open_transaction, command
):
    dead = three_dead_and_one_uncommitted(pgqrs, work, open_transaction)

    def meanwhile() -> None:
        open_transaction.commit()
        with work() as service:
            service.archived.requeue(dead[0])
        bury(work, "mail", "later")

    asked(meanwhile)
    done = pgqrs.json(*command.split(), "--chunk", 2)
    assert done["count"] == 2
    assert settled(engine) == ["late", "later"]


def test_a_bulk_retry_takes_what_was_counted(pgqrs, work, engine, asked, open_transaction):
    dead = three_dead_and_one_uncommitted(pgqrs, work, open_transaction)

    def meanwhile() -> None:
        open_transaction.commit()
        with work() as service:
            service.archived.delete(dead[:1])
        bury(work, "mail", "later")

    asked(meanwhile)
    assert pgqrs.json("dead", "retry", "--all", "--chunk", 1)["count"] == 2
    assert settled(engine) == ["late", "later"]
    assert live(engine) == [1, 2]


@pytest.mark.parametrize("command", ["archive delete --id {id}", "dead discard {id}"])
def test_a_count_is_of_what_was_deleted(pgqrs, work, asked, command):
    pgqrs("queue", "create", "mail")
    dead = bury(work, "mail", "dead")

    def requeued() -> None:
        with work() as service:
            service.archived.requeue(dead)

    asked(requeued)
    assert pgqrs.json(*command.format(id=dead).split())["count"] == 0


def test_a_worker_that_stops_meanwhile_stays(pgqrs, work, asked):
    with work() as service:
        service.workers.stop(service.workers.register("old").id)
        running = service.workers.register("running").id

    def stopped() -> None:
        with work() as service:
            service.workers.stop(running)

    asked(stopped)
    assert pgqrs.json("worker", "purge", "--older-than", "0")["count"] == 1
    assert [worker["id"] for worker in pgqrs.json("worker", "list")] == [running]

"""A dry run changes nothing, a wrong name is not silence, and a refusal is foreseen."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from pgqrs_sa import ArchivedMessage, Message, Queue, Worker
from support.cases import each_case

DRY = [
    "dead retry {archived}",
    "dead retry --queue mail",
    "dead retry --all",
    "dead discard {archived}",
    "dead discard --queue mail",
    "archive delete mail",
    "archive delete --id {archived}",
    "archive prune --older-than 0",
    "message delete {message}",
    "queue purge mail",
    "queue delete mail --force",
    "worker purge --older-than 0",
    "worker delete {worker}",
    "install",
]


def contents(engine: sa.Engine) -> list[list[tuple]]:
    with engine.connect() as connection:
        tables = (Message, ArchivedMessage, Queue, Worker)
        return [
            [tuple(row) for row in connection.execute(sa.select(cls.__table__).order_by("id"))]
            for cls in tables
        ]


@pytest.fixture
def ids(pgqrs, engine) -> dict[str, int]:
    """The ids of a message, of an archived one and of a stopped worker."""
    pgqrs("queue", "create", "mail")
    pgqrs("message", "enqueue", "mail", "--payload", "1")
    pgqrs("message", "enqueue", "mail", "--payload", "2")
    worker = pgqrs.json("worker", "create", "w", "-q", "mail")["id"]
    pgqrs("worker", "stop", worker)
    (leased,) = pgqrs.json("message", "dequeue", "mail")
    with engine.begin() as connection:
        dead = sa.text(
            "WITH gone AS (DELETE FROM pgqrs_messages WHERE id = :id RETURNING *)"
            " INSERT INTO pgqrs_archive (id, queue_id, payload, read_ct, outcome)"
            " SELECT id, queue_id, payload, read_ct, 'dead' FROM gone RETURNING id"
        )
        archived = connection.execute(dead, {"id": leased["id"]}).scalar_one()
        message = connection.scalar(sa.select(Message.id))
    return {"archived": archived, "message": message, "worker": worker}


@each_case("command", DRY)
def test_a_dry_run_changes_nothing(pgqrs, engine, ids, command):
    before = contents(engine)
    pgqrs(*command.format(**ids).split(), "--dry-run")
    assert contents(engine) == before


@pytest.mark.parametrize("command", ["list", "health", "stats"])
def test_workers_of_a_queue_that_is_not_there_are_not_found(pgqrs, command):
    pgqrs("queue", "create", "mail")
    assert "did you mean mail?" in pgqrs("worker", command, "-q", "mial", code=3).stderr


def test_reclaim_spares_those_that_hold_nothing_unless_told_otherwise(pgqrs, engine):
    pgqrs("queue", "create", "mail")
    worker = pgqrs.json("worker", "create", "w", "-q", "mail")["id"]
    with engine.begin() as connection:
        long_ago = sa.func.now() - sa.text("interval '1 hour'")
        connection.execute(sa.update(Worker).values(heartbeat_at=long_ago))
    pgqrs("admin", "reclaim", "-q", "mail")
    assert pgqrs.json("worker", "get", worker)["status"] == "ready"
    pgqrs("admin", "reclaim", "-q", "mail", "--older-than", "60")
    assert pgqrs.json("worker", "get", worker)["status"] == "stopped"


def test_a_watch_without_a_pause_is_refused(pgqrs):
    assert "must be 0.1s or more" in pgqrs("queue", "list", "--watch", "0", code=2).stderr


def test_doctor_and_top_give_the_keys_of_the_documentation(pgqrs, engine):
    pgqrs("queue", "create", "mail")
    with engine.begin() as connection:
        connection.execute(sa.text("DROP INDEX pgqrs_archive_queue_idx"))
    found = json.loads(pgqrs("doctor", "--format", "json", code=1).stdout)
    assert list(found[0]) == ["check", "severity", "subject", "problem", "fix", "mend"]
    assert set(pgqrs.json("top", "--once")) == {"queues", "workers"}

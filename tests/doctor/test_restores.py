"""What a restore by hand leaves behind."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from pgqrs_sa import QueueService
from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.models import READY_MADE

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=False)


def fix(session, finding) -> None:
    for statement in filter(str.strip, finding.fix.split(";")):
        session.execute(sa.text(statement.replace(":", "\\:")))


def test_rows_that_came_without_their_sequence_are_found(session, service):
    session.execute(
        sa.text(
            "INSERT INTO pgqrs_messages (id, queue_id, payload)"
            " SELECT n, 1, '1' FROM generate_series(1, 5) n"
        )
    )
    (finding,) = diagnose(session, CONTEXT, only=["sequences"])
    assert "the next id is 1, and pgqrs_messages has 5 already" in finding.problem
    fix(session, finding)
    assert diagnose(session, CONTEXT, only=["sequences"]) == []
    assert service.enqueue("mail", 1).id == 6


def test_a_sequence_that_would_give_fencing_tokens_again_is_found(session, service):
    """The greatest may be that of an archived message."""
    service.enqueue_many("mail", range(3))
    first, second, _ = service.dequeue("mail", 3)
    service.archive(second)
    session.execute(sa.text("ALTER SEQUENCE pgqrs_messages_fencing_token_seq RESTART WITH 1"))
    (finding,) = diagnose(session, CONTEXT, only=["sequences"])
    assert "the next fencing token is" in finding.problem
    fix(session, finding)
    assert diagnose(session, CONTEXT, only=["sequences"]) == []
    service.release(first)
    assert service.dequeue("mail")[0].fencing_token > second.fencing_token


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("CYCLE", "tokens would repeat"),
        ("CACHE 20", "tokens would not grow"),
        ("INCREMENT BY -1", "tokens would not grow"),
        ("RENAME TO stray", "cannot find it"),
    ],
)
def test_a_sequence_of_which_the_fencing_tokens_cannot_come_is_found(session, change, problem):
    session.execute(sa.text(f"ALTER SEQUENCE pgqrs_messages_fencing_token_seq {change}"))
    (finding,) = diagnose(session, CONTEXT, only=["sequences"])
    assert problem in finding.problem
    fix(session, finding)
    assert diagnose(session, CONTEXT, only=["sequences"]) == []


def test_a_table_that_is_missing_is_named_and_made_again(session):
    session.execute(sa.text("DROP TABLE pgqrs_queues"))
    findings = diagnose(session, CONTEXT, only=["schema", "drift"])
    assert any("pgqrs_queues" in finding.subject + finding.problem for finding in findings)
    assert not any("holds no queue tables" in finding.problem for finding in findings)
    for finding in findings:
        fix(session, finding)
    for finding in diagnose(session, CONTEXT, only=["schema", "drift"]):
        fix(session, finding)
    assert diagnose(session, CONTEXT, only=["schema", "drift"]) == []
    QueueService(session).queues.create("mail")

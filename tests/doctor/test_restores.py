"""What a restore by hand leaves behind."""

from __future__ import annotations

import sqlalchemy as sa

from pgqrs_sa import QueueService
from pgqrs_sa.operations.context import Context
from pgqrs_sa.operations.doctor import diagnose

CONTEXT = Context.of(None, None, None, allow_autocommit=False)


def mend(session, finding) -> None:
    for statement in filter(str.strip, finding.mend.split(";")):
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
    mend(session, finding)
    assert diagnose(session, CONTEXT, only=["sequences"]) == []
    assert service.enqueue("mail", 1).id == 6


def test_a_table_that_is_missing_is_named_and_made_again(session):
    session.execute(sa.text("DROP TABLE pgqrs_queues"))
    findings = diagnose(session, CONTEXT, only=["schema", "drift"])
    assert any("pgqrs_queues" in one.subject + one.problem for one in findings)
    assert not any("holds no queue tables" in one.problem for one in findings)
    for finding in findings:
        mend(session, finding)
    for finding in diagnose(session, CONTEXT, only=["schema", "drift"]):
        mend(session, finding)
    assert diagnose(session, CONTEXT, only=["schema", "drift"]) == []
    QueueService(session).queues.create("mail")

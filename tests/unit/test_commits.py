"""What is noted in a session is done at its outermost commit, and forgotten at another end.

On a database in memory: nothing here is about PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message
from pgqrs_sa._core import commits
from support.cases import each_case


@pytest.fixture
def connection() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def note(session: Session, done: list[str], what: str = "done", *, strict: bool = False) -> None:
    session.execute(sa.text("SELECT 1"))
    call = partial(done.append, what)
    commits.when_committed(session, sa.inspect(Message), what, call, strict=strict)


def test_a_session_that_has_begun_the_transaction_of_its_connection_commits_it(connection):
    done: list[str] = []
    with Session(connection) as session:
        note(session, done)
        session.commit()
        assert done == ["done"]
        session.execute(sa.text("SELECT 1"))
        session.commit()
        assert done == ["done"]


@each_case("end", ["commit", "rollback"])
def test_a_session_in_a_transaction_of_the_application_waits_for_that(connection, end):
    done: list[str] = []
    outer = connection.begin()
    with Session(connection) as session:
        note(session, done)
        session.commit()
        assert done == []
    getattr(outer, end)()
    assert done == (["done"] if end == "commit" else [])
    connection.begin().commit()
    assert len(done) <= 1


@each_case("end", ["rollback", "close"])
@each_case("strict", [True, False])
def test_what_was_not_committed_is_forgotten(connection, end, strict):
    done: list[str] = []
    session = Session(connection)
    note(session, done, strict=strict)
    getattr(session, end)()
    assert commits.waiting(session, "done") is None
    session.execute(sa.text("SELECT 1"))
    session.commit()
    assert done == []
    session.close()


def test_the_end_of_a_savepoint_does_nothing_and_its_rollback_forgets_what_is_strict(connection):
    done: list[str] = []
    with Session(connection) as session:
        with session.begin_nested():
            note(session, done, "kept", strict=True)
        assert done == []
        savepoint = session.begin_nested()
        note(session, done, "loose")
        note(session, done, "strict", strict=True)
        savepoint.rollback()
        session.commit()
    assert "strict" not in done
    assert "loose" in done


def test_where_each_statement_commits_by_itself_it_is_done_at_once(connection):
    done: list[str] = []
    with Session(connection) as session:
        note(session, done)
        commits.now(session)
        assert done == ["done"]
        commits.now(session)
        assert done == ["done"]

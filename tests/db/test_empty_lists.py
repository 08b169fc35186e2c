"""Nothing is settled or enqueued of an empty list, and nothing is sent for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, DelayError, InvalidArgument, QueueService
from support.cases import each_case

CALLS: dict[str, tuple[Callable[[Any, Any], Any], object]] = {
    "enqueue_many": (lambda s, none: s.enqueue_many("mail", none), []),
    "enqueue_many to nowhere": (lambda s, none: s.enqueue_many("nowhere", none), []),
    "archive_many": (lambda s, none: s.archive_many(none), None),
    "try_archive_many": (lambda s, none: s.try_archive_many(none, reason="x"), []),
    "delete_many": (lambda s, none: s.delete_many(none), None),
    "try_delete_many": (lambda s, none: s.try_delete_many(none), []),
    "extend_many": (lambda s, none: s.extend_many(none, 60), []),
    "try_extend_many": (lambda s, none: s.try_extend_many(none, 60), []),
    "release_many": (lambda s, none: s.release_many(none), None),
    "try_release_many": (lambda s, none: s.try_release_many(none, delay=1), []),
    "fail_many": (lambda s, none: s.fail_many(none, "x"), []),
    "try_fail_many": (lambda s, none: s.try_fail_many(none, "x", dead=True), []),
    "requeue_many": (lambda s, none: s.archived.requeue_many(none), []),
    "archived.delete": (lambda s, none: s.archived.delete(none), 0),
}
calls = each_case(("call", "result"), CALLS)


@pytest.fixture
def sent(engine: sa.Engine) -> list[str]:
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    return statements


@calls
@each_case("none", {"list": [], "tuple": (), "iterator": iter(()), "set": set()})
def test_an_empty_list_needs_no_statement(engine, sent, call, result, none):
    with Session(engine) as session:
        assert call(QueueService(session, notify=True), none) == result
        assert not session.in_transaction()
    assert call(QueueService(session), none) == result  # nor a session that is open
    assert sent == []


@calls
async def test_an_empty_list_is_nothing_to_do_with_asyncio(async_engine, call, result):
    async with AsyncSession(async_engine) as session:
        assert await call(AsyncQueueService(session), []) == result
        assert not session.in_transaction()


WRONG: dict[str, tuple[Callable[[QueueService], Any], type[Exception]]] = {
    "a bad name": (lambda s: s.enqueue_many("no queue", []), InvalidArgument),
    "a bad lease": (lambda s: s.extend_many([], -1), DelayError),
    "a bad delay": (lambda s: s.release_many([], delay=-1), DelayError),
    "another bad delay": (lambda s: s.fail_many([], "x", delay=-1), DelayError),
    "a bad outcome": (lambda s: s.archive_many([], outcome="dead"), InvalidArgument),  # type: ignore[arg-type]
    "bad attempts": (lambda s: s.archived.requeue_many([], attempts=0), InvalidArgument),
}


@each_case(("call", "error"), WRONG)
def test_the_other_arguments_are_checked_all_the_same(session, sent, call, error):
    with pytest.raises(error):
        call(QueueService(session))
    assert sent == []

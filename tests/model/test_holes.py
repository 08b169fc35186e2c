"""Conditions of statements that no other test missed when they were gone: see `tests.mutation`.

Most of them only show when a statement is looked at by itself, or next to another session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Message, Models, metadata
from pgqrs_sa.statements import settle

MODELS = Models()


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """On empty tables; who waits for a lock fails."""
    engine = sa.create_engine(migrated.url, connect_args={"options": "-c lock_timeout=500ms"})
    with engine.begin() as connection:
        names = ", ".join(table.name for table in metadata.sorted_tables)
        connection.execute(sa.text(f"TRUNCATE {names} CASCADE"))
    yield engine
    engine.dispose()


def fence(deliveries: Any, **more: Any) -> dict[str, Any]:
    """The parameters of a settle of these, as many as are still held."""
    return {
        "ids": [one.id for one in deliveries],
        "read_cts": [one.read_ct for one in deliveries],
        "workers": [one.worker_id or 0 for one in deliveries],
        "required": 0,
        **more,
    }


SKIPPING: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]] = {
    "archive": (
        lambda: settle.archive(MODELS, skip_locked=True),
        lambda n: {"outcome": "archived", "reasons": [None] * n, "errors": [None] * n},
    ),
    "archive plainly": (lambda: settle.archive_plainly(MODELS), lambda _: {}),
    "delete": (lambda: settle.delete(MODELS, skip_locked=True), lambda _: {}),
    "extend": (
        lambda: settle.extend(MODELS, skip_locked=True),
        lambda _: {"lease": timedelta(minutes=1)},
    ),
    "release": (
        lambda: settle.release(MODELS, skip_locked=True),
        lambda _: {"delay": timedelta(0)},
    ),
    "fail": (
        lambda: settle.reschedule_failed(MODELS, skip_locked=True),
        lambda n: {"errors": ["no"] * n, "delays": [timedelta(0)] * n},
    ),
}


@pytest.mark.parametrize("way", SKIPPING)
def test_a_settle_that_is_to_skip_what_is_locked_settles_the_others_and_does_not_wait(
    engine, service, session, way: str
) -> None:
    build, more = SKIPPING[way]
    service.enqueue_many("mail", range(3))
    deliveries = service.dequeue("mail", 3)
    session.commit()
    locked = deliveries[1].id
    with Session(engine) as other:
        other.execute(sa.select(Message.id).where(Message.id == locked).with_for_update())
        rows = session.execute(build(), fence(deliveries, **more(3))).all()
    assert {row.id for row in rows} == {one.id for one in deliveries} - {locked}


def test_whereabouts_are_read_of_the_messages_asked_for_and_no_others(service, session) -> None:
    """A lost lease would otherwise cost a look at the whole backlog and the whole history."""
    service.enqueue_many("mail", range(6))
    service.archive_many(service.dequeue("mail", 3))
    live = [one.id for one in service.messages.find("mail")]
    settled = [one.original_msg_id for one in service.archived.find("mail")]
    asked = [live[0], settled[0], 10**9]
    rows = session.execute(settle.whereabouts(MODELS), {"ids": asked}).all()
    assert [row.id for row in rows] == [live[0], settled[0]]

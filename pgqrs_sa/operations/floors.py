"""The floors of this process: one for each engine, set of tables and queue.

A lease that the caller has not committed is not a place to go on from: what a session has leased
moves the floor only when its transaction commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from .. import routing
from ..floor import Floor, Start
from .context import Context

__all__ = ["begin", "believe", "binds", "learn"]

_LEASED = "_pq_leased"
_floors: WeakKeyDictionary[Any, dict[Any, Floor]] = WeakKeyDictionary()


def begin(session: Session, context: Context, queue: str) -> tuple[Floor, Start | None]:
    """Return the floor of a queue, and where a dequeue is to begin, or None for the beginning."""
    bind = routing.bind_of(session, context.mapper)
    engine = bind.engine if isinstance(bind, sa.Connection) else bind
    schemas = bind.get_execution_options().get("schema_translate_map") or {}
    key = (context.models, queue, *sorted(schemas.items(), key=repr))
    floor = _floors.setdefault(engine, {}).setdefault(key, Floor())
    return floor, floor.start()


def binds(start: Start | None) -> dict[str, Any]:
    """Return the parameters that say where to begin."""
    if start is None:
        return {}
    return {"floor_levels": start.levels, "floor_vts": start.vts, "floor_ids": start.ids}


def learn(
    session: Session,
    floor: Floor,
    rows: Sequence[Any],
    *,
    swept_at: float | None = None,
    full: bool = False,
) -> None:
    """Note what a dequeue took, to be believed when its transaction has committed.

    Args:
        session: Whose transaction it was.
        floor: From `begin`.
        rows: What was leased, in the order of the queue.
        swept_at: The clock before a dequeue from the beginning, or None if it was not from there.
        full: Whether it took as many as it was allowed to.
    """

    def learnt() -> None:
        if swept_at is None:
            floor.leased(rows)
        else:
            floor.swept(rows, swept_at, full=full)

    session.info.setdefault(_LEASED, []).append(learnt)


def believe(session: Session) -> None:
    """Take what a session has leased for committed, as where each statement commits by itself."""
    for one in session.info.pop(_LEASED, ()):
        one()


@event.listens_for(Session, "after_commit")
def _committed(session: Session) -> None:
    if not session.in_nested_transaction():
        believe(session)


@event.listens_for(Session, "after_rollback")
def _rolled_back(session: Session) -> None:
    session.info.pop(_LEASED, None)

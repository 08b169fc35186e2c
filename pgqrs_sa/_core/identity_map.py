"""Keep objects that a session has loaded in step with what our statements have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Row
from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key

from . import routing

__all__ = ["expire_all_deleted", "expire_deleted", "sync_loaded"]


def sync_loaded(
    session: Session, model: type[Any], rows: Iterable[Row[Any]], names: Iterable[str]
) -> None:
    """Bring loaded objects up to date with rows that a statement returned about them."""
    for row in rows if session.identity_map else ():
        if (loaded := _loaded(session, model, row.id)) is not None:
            # What the caller has changed and not flushed yet is the caller's still.
            pending = _altered(session, loaded).committed_state
            for name in names:
                if name in pending:
                    continue
                set_committed_value(loaded, name, row._mapping[name])  # noqa: SLF001


def expire_deleted(session: Session, model: type[Any], ids: Iterable[int]) -> None:
    """Expire loaded objects whose rows a statement deleted."""
    for id_ in ids if session.identity_map else ():
        if (loaded := _loaded(session, model, id_)) is not None:
            _expire(session, loaded)


def expire_all_deleted(session: Session, model: type[Any]) -> None:
    """Expire all loaded objects of a class, when a statement does not say which it deleted."""
    for loaded in list(session.identity_map.values()):
        if isinstance(loaded, model):
            _expire(session, loaded)


def _loaded(session: Session, model: type[Any], id: int) -> Any:
    token = routing.identity_token(session, sa.inspect(model))
    return session.identity_map.get(identity_key(model, id, identity_token=token))


def _expire(session: Session, loaded: Any) -> None:
    _altered(session, loaded)
    session.expire(loaded)


def _altered(session: Session, loaded: Any) -> InstanceState[Any]:
    # As an UPDATE by the ORM does: the rollback of a savepoint then takes the object back as well.
    state: InstanceState[Any] = sa.inspect(loaded)
    session._register_altered([state])  # noqa: SLF001
    return state

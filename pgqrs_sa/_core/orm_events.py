"""What calls `flush` and `commits`: listeners that come with the models.

They need the mixins alone, so that `models` can bring them whichever module of the package is
imported first, and import `flush` when there is work for it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session, SessionTransaction

from ..mixins import MessageMixin
from ..wakeup import local
from . import commits, routing

__all__: list[str] = []


@event.listens_for(Session, "before_flush")
def _before_flush(session: Session, _context: Any, _instances: Any) -> None:
    if any(isinstance(one, MessageMixin) for one in session.new):
        from . import flush  # noqa: PLC0415 - it needs the models

        flush.before_flush(session)


@event.listens_for(MessageMixin, "before_insert", propagate=True)
def _before_insert(mapper: Mapper[Any], connection: sa.Connection, target: MessageMixin) -> None:
    from . import flush  # noqa: PLC0415 - it needs the models

    flush.before_insert(mapper, connection, target)


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, _transaction: SessionTransaction, _: sa.Connection) -> None:
    if routing.TOUCHED in session.info:
        routing.watch(session)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    if routing.TOUCHED in session.info and not session.in_nested_transaction():
        routing.refuse_split(session)


@event.listens_for(Session, "after_flush")
def _after_flush(session: Session, _context: Any) -> None:
    if routing.TOUCHED in session.info:
        routing.refuse_split(session)
    if session.info.get(local.NOTIFY):
        from . import flush  # noqa: PLC0415 - it needs the models

        flush.after_flush(session)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    commits.committed(session)


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    commits.rolled_back(session)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        commits.ended(session)
        routing.ended(session)

"""What calls `flush`: listeners that come with the models, and import it when there is work.

They need the mixins alone, so that `models` can bring them whichever module of the package is
imported first.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session

from .mixins import MessageMixin

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

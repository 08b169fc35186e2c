"""What every resource has."""

from __future__ import annotations

from sqlalchemy.orm import Session

from .._core.context import Context

__all__ = ["Resource"]


class Resource:
    """Operations in one session, with the settings of the service that they belong to."""

    def __init__(self, session: Session, context: Context) -> None:
        self._session = session
        self._context = context

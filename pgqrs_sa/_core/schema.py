"""Asking the database which version of the schema it has."""

from __future__ import annotations

from sqlalchemy.orm import Session

from .. import migrations
from .context import Context

__all__ = ["check"]


def check(session: Session, context: Context) -> None:
    """Raise unless the tables are of a version that this release works with."""
    migrations.check(session, models=context.models)

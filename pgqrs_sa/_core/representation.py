"""``repr`` of our objects: short, without secrets, and without loading anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from . import sessions

__all__ = ["database_of", "loaded", "represented"]

_MOST = 60  # characters of one value


def represented(cls: type[Any], **values: object) -> str:
    """Return ``<Name key=value ...>``; what is None is left out."""
    shown = (f"{key}={_short(value)}" for key, value in values.items() if value is not None)
    return f"<{' '.join([cls.__name__, *shown])}>"


def loaded(instance: object, *names: str) -> str:
    """Return an instance of a mapped class, by those of its columns that are loaded.

    Nothing is loaded for it: a detached or expired instance shows what it has.
    """
    there: Mapping[str, Any] = instance.__dict__
    values = {name: there.get(name) for name in names}
    if "payload" in there:
        values["payload"] = _Kind(there["payload"])
    return represented(type(instance), **values)


def database_of(session: Session) -> str | None:
    """Return the database of a session and its host; None if that is not known, or not one."""
    bind: Engine | Connection | None = session.bind
    if bind is None or not sessions.is_plain(session):
        return None
    url = bind.engine.url
    host = url.host or url.query.get("host")
    return f"{url.database}@{host}" if host else url.database


class _Kind:
    """The ``repr`` of a payload: its kind and size only."""

    def __init__(self, value: object) -> None:
        size = f" of {len(value)}" if isinstance(value, Collection) else ""
        self._text = f"<{type(value).__name__}{size}>"

    def __repr__(self) -> str:
        return self._text


def _short(value: object) -> str:
    # A value of SQL, such as a vt that is not flushed yet, is nothing for people.
    if isinstance(value, datetime):
        return value.isoformat()
    text = repr(value) if isinstance(value, (int, float, str, list, tuple, _Kind)) else "..."
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"

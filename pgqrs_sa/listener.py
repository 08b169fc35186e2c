"""Hearing a NOTIFY: placeholder while being written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import sqlalchemy as sa

from .models import Models

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Listener"]


class Listener:
    """Calls a function for each notification, from a thread and a connection of its own."""

    def __init__(
        self,
        engine: sa.Engine | AsyncEngine,
        on_wake: Callable[[str | None], None],
        *,
        models: Models | None = None,
        listen_dsn: str | sa.URL | None = None,
        ping_interval: float = 15.0,
        ping_timeout: float = 5.0,
    ) -> None:
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """Whether it hears notifications now."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to listen, in a thread of its own."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop."""
        raise NotImplementedError

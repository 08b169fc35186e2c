"""What `Admin` and its table handles have in common: calls that are transactions of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..aio import AsyncQueueService
from ..settings import Settings
from .database import Database

__all__ = ["LIVE_INTERVALS", "LIVE_SECONDS", "Connected"]

LIVE_SECONDS = 60.0
"""A worker that was heard of in so many seconds counts as alive, at the least."""

LIVE_INTERVALS = 12
"""And one that was heard of in so many of its heartbeat intervals does."""


class Connected:
    """Somebody who works on a database.

    Args:
        database: Where it is.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def settings(self) -> Settings:
        """What the Config said when the Admin was made."""
        return self._database.settings

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[AsyncQueueService]:
        """One transaction, after the registrations that wait for one."""
        await self._database.register_pending()
        async with self._database.service() as service:
            yield service

    def _presumed_dead(self) -> float:
        return max(LIVE_SECONDS, LIVE_INTERVALS * self.settings.heartbeat_interval_seconds)

"""Engines of a test's own that share what SQLAlchemy works out once for a database.

SQLAlchemy keeps the statements that it has compiled, and what it has asked the server, for an
engine or its dialect. With a new engine for each test, that was two thirds of the processor time
of a test that enqueues and archives one message. These engines have the dialect of the first with
the same URL and options. Pools, connections and listeners are each engine's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

__all__ = ["new_async_engine", "new_engine"]


def new_engine(url: str, **options: Any) -> sa.Engine:
    """Do as `sqlalchemy.create_engine` does. With ``connect_args`` nothing is shared."""
    if "connect_args" in options:
        return sa.create_engine(url, **options)
    return _like(_first(url, **options))


def new_async_engine(url: str, **options: Any) -> AsyncEngine:
    """Do as `create_async_engine` does. With ``connect_args`` nothing is shared."""
    if "connect_args" in options:
        return create_async_engine(url, **options)
    return AsyncEngine(_like(_first_async(url, **options)))


@cache
def _first(url: str, **options: Any) -> sa.Engine:
    return sa.create_engine(url, **options)


@cache
def _first_async(url: str, **options: Any) -> sa.Engine:
    return create_async_engine(url, **options).sync_engine


def _like(first: sa.Engine) -> sa.Engine:
    engine = sa.Engine(first.pool.recreate(), first.dialect, first.url)
    engine._compiled_cache = first._compiled_cache
    return engine

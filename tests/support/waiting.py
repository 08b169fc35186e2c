"""Wait for a condition, never for a time: a test that does passes on a busy machine, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa

PATIENCE = 90.0
"""Seconds after which a test gives up. To wait for what happens costs nothing: be generous."""

_SHORTEST, _LONGEST = 0.002, 0.1  # seconds between two looks

T = TypeVar("T")


def until(true: Callable[[], T], what: str = "it comes true", seconds: float = PATIENCE) -> T:
    """Wait until something is true, and return it; fail when it does not become so.

    Args:
        true: Looks, and returns what it finds.
        what: What is waited for, for the error.
        seconds: After how many to fail.
    """
    for pause in _pauses(what, seconds):
        if found := true():
            return found
        time.sleep(pause)
    raise AssertionError


async def until_awaited(
    true: Callable[[], T], what: str = "it comes true", seconds: float = PATIENCE
) -> T:
    """Do as `until` does, and let the event loop run meanwhile."""
    for pause in _pauses(what, seconds):
        if found := true():
            return found
        await asyncio.sleep(pause)
    raise AssertionError


def until_blocked(engine: sa.Engine, pid: int, call: Future[Any] | None = None) -> None:
    """Wait until a server process waits for a lock.

    Args:
        engine: To look with.
        pid: The process.
        call: What runs in it: fail when that ends, as it has not waited.
    """
    waits = sa.select(sa.func.cardinality(sa.func.pg_blocking_pids(pid)) > 0)

    def blocked() -> bool:
        assert call is None or not call.done(), f"it did not wait: {call.exception()}"
        return bool(connection.execute(waits).scalar_one())

    with engine.connect() as connection:
        until(blocked, "it waits for a lock")


def _pauses(what: str, seconds: float) -> Iterator[float]:
    """Grow with the time waited: many looks would take the processor from what they wait for."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds:
        yield min(_LONGEST, _SHORTEST + waited / 20)
    raise AssertionError(f"never, in {seconds:g} s: {what}")

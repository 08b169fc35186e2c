"""Registering a process, once: also when the reply to it was lost, and it was asked for again."""

from __future__ import annotations

import time
from datetime import timedelta

from sqlalchemy.orm import Session

from .._core import workers
from .._core.context import Context
from ..types import WorkerInfo
from .connection import ConsumerConnection

__all__ = ["register_worker"]

_LONGER = 5.0  # seconds by which the database may count more of them than this process


def register_worker(
    line: ConsumerConnection, context: Context, name: str, queues: list[str], version: str | None
) -> WorkerInfo:
    """Register this start of a process, and return its row.

    Args:
        line: To the database.
        context: Of the consumer.
        name: Of the worker.
        queues: Those that it works on.
        version: Of the application.
    """
    began, tries = time.monotonic(), 0

    def once(session: Session, context: Context) -> WorkerInfo:
        nonlocal tries
        tries += 1
        return workers.register(session, context, name, queues, None, None, None, version, leased=0)

    info = line.run("the registration", context, once)
    if tries > 1:
        span = timedelta(seconds=time.monotonic() - began + _LONGER)
        line.run("a look for doubles", context, _stop_namesakes, info, span)
    return info


def _stop_namesakes(session: Session, context: Context, mine: WorkerInfo, span: timedelta) -> None:
    """Stop the rows that an attempt to register has left whose reply was lost.

    Nobody else has the process's number on this host, under its name and so shortly before.
    """
    for one in workers.everything(session, context, "ready", None):
        same = (one.name, one.hostname, one.pid, one.queues) == (
            mine.name,
            mine.hostname,
            mine.pid,
            mine.queues,
        )
        if same and one.id < mine.id and mine.started_at - one.started_at < span:
            workers.set_status(session, context, one.id, "stopped")

"""One database a file; an ear that hears what is notified, and workers that wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from pgqrs_sa._core import wakeup
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa._core.sql.wakeup import channel
from pgqrs_sa._core.wakeup import set_waiting
from pgqrs_sa.models import READY_MADE

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=False)


@pytest.fixture
def migrated(emptied: Any) -> Any:
    """See `emptied`."""
    return emptied


class Ear:
    """A connection that listens; `heard` returns all that was committed before the call."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        # Not the same: the first releases of psycopg 3.2 lose what comes with a reply.
        self._mouth = psycopg.connect(dsn, autocommit=True)
        self.listen_to(None)

    def listen_to(self, schema: str | None) -> None:
        self._name = channel(schema)
        self._connection.execute("UNLISTEN *")
        self._connection.execute(f"LISTEN {self._name}")

    def heard(self) -> list[str]:
        # Notifications come in the order of the commits: after our own there is nothing left.
        self._mouth.execute(f"NOTIFY {self._name}, '(end)'")
        payloads: list[str] = []
        for notification in self._connection.notifies(timeout=60):
            if notification.payload == "(end)":
                return payloads
            payloads.append(notification.payload)
        raise AssertionError(f"not even our own notification was heard, only {payloads}")

    def close(self) -> None:
        self._mouth.close()
        self._connection.close()


@pytest.fixture
def ear(migrated: Any) -> Iterator[Ear]:
    ear = Ear(migrated.direct.dsn)  # LISTEN does not go through PgBouncer
    yield ear
    ear.close()


@pytest.fixture
def waits(engine: sa.Engine) -> Callable[..., int]:
    """Return a function that registers a worker which waits for messages of these queues."""

    def wait(*queues: str, span: timedelta | None = timedelta(minutes=1)) -> int:
        with Session(engine) as session, session.begin():
            worker = QueueService(session).workers.register("w", queues=queues)
            set_waiting(Scope(session, CONTEXT), worker.id, span)
        return worker.id

    return wait


@dataclass
class Woken:
    """What a subscriber got since it was asked the last time."""

    names: list[str] = field(default_factory=list)

    def take(self) -> list[str]:
        taken = list(self.names)
        self.names.clear()
        return taken


@pytest.fixture
def woken() -> Iterator[Woken]:
    woken = Woken()
    unsubscribe = wakeup.subscribe(woken.names.append)
    yield woken
    unsubscribe()
    assert not wakeup.subscribed()

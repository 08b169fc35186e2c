"""Consumers in processes: started, given messages, audited.

::

    with team.hire("sync", on={"lease": 2}) as worker:
        team.send({"do": "wait"})
        worker.expect("begun")
        worker.kill()
    team.finish()           # another consumer does what is left
    team.audit()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import sqlalchemy as sa
from kit.books import Audit, Sent, audit
from kit.scripts import Script
from kit.servers import Address, run_sql, until
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService

KINDS = ("sync", "psycopg", "asyncpg")
"""Threads; tasks over psycopg; tasks over asyncpg."""

CODE = """
from tests.consumers_processes.hands.worker import main
main(args, say)
"""

_QUICK = {"concurrency": 4, "poll_interval": 0.1, "heartbeat": 0.5, "housekeeping": 0.5}
_RETRY = {"max_attempts": 50, "backoff": "constant", "base": 0.05}


class Worker(Script):
    """One process with a consumer."""

    def __init__(self, name: str, **args: Any) -> None:
        super().__init__(CODE, name=name, **args)
        self.name = name

    def expect(self, word: str, timeout: float = 20) -> dict[str, Any]:
        """As a script's, with a wait that is long for a consumer."""
        return super().expect(word, timeout)

    def heard(self, word: str) -> dict[str, Any]:
        """Return what it said with a word, be it before or after what it was asked for last."""
        found = [data for said, data in self.said if said == word]
        return found[-1] if found else self.expect(word)


class Team:
    """All processes of one test, over one database.

    Args:
        address: The database, directly.
        engine: On it, for sending and for the audit.
    """

    def __init__(self, address: Address, engine: sa.Engine) -> None:
        self.address = address
        self.engine = engine
        self.workers: list[Worker] = []
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Team:  # noqa: PYI034
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def hire(
        self,
        kind: str = "sync",
        *,
        through: Address | None = None,
        until_empty: bool = False,
        consumer: dict[str, Any] | None = None,
        on: dict[str, Any] | None = None,
        retry: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        tell: Sequence[str] = (),
    ) -> Worker:
        """Start a process; it has only just begun to import when this returns.

        Args:
            kind: See `KINDS`.
            through: Where its consumer finds the database, if not directly.
            until_empty: Let it end when nothing is left.
            consumer: Settings of the consumer.
            on: Settings of the handler.
            retry: Of its `Retry`.
            engine: Of its engine.
            tell: The hooks that it is to say.
        """
        driver = "asyncpg" if kind == "asyncpg" else "psycopg"
        worker = Worker(
            f"{kind}-{next(self._numbers)}",
            kind=kind,
            url=(through or self.address).url(driver),
            beside=self.address.url(driver),
            until_empty=until_empty,
            consumer={**_QUICK, **(consumer or {})},
            on={"lease": 2, **(on or {})},
            retry={**_RETRY, **(retry or {})},
            engine=engine or {},
            tell=list(tell),
        )
        self.workers.append(worker)
        return self._stack.enter_context(worker)

    def send(self, *payloads: dict[str, Any]) -> list[int]:
        """Enqueue messages; return their ids."""
        with Session(self.engine) as session, session.begin():
            receipts = QueueService(session).enqueue_many("mail", payloads)
            ids = [one.id for one in receipts]
            session.add_all(Sent(message_id=one) for one in ids)
        return ids

    def registered(self, count: int = 1) -> None:
        """Wait until so many workers are ready."""
        ready = "SELECT count(*) FROM pgqrs_workers WHERE status = 'ready'"
        until(lambda: run_sql(self.address, ready) == [(count,)], f"{count} workers are ready")

    def settled(self, count: int, timeout: float = 30) -> None:
        """Wait until so many messages are in the archive."""
        done = "SELECT count(*) FROM pgqrs_archive"
        until(lambda: run_sql(self.address, done)[0][0] >= count, f"{count} are settled", timeout)

    def emptied(self, timeout: float = 30) -> None:
        """Wait until no message is live."""
        live = "SELECT count(*) FROM pgqrs_messages"
        until(lambda: run_sql(self.address, live) == [(0,)], "the queue is empty", timeout)

    def finish(self, kind: str = "sync", timeout: float = 30, **settings: Any) -> None:
        """Let another consumer do what is left, and end properly."""
        worker = self.hire(kind, **settings)
        self.emptied(timeout)
        self.dismiss([worker])

    def dismiss(self, workers: Iterable[Worker] | None = None, code: int = 0) -> None:
        """Let workers end properly."""
        going = list(self.workers if workers is None else workers)
        going = [one for one in going if one.process.poll() is None]
        for one in going:
            one.terminate()
        for one in going:
            ended = one.wait(20)
            assert ended == code, f"{one.name} ended with {ended}, not {code}\n{one.errors}"

    def audit(self, *, live: int = 0) -> Audit:
        """The audit of the books; and whoever ended properly has said so."""
        found = audit(self.engine).assert_clean(live=live)
        assert found.started <= found.attempts, f"more starts than attempts: {found}"
        left = {one.pid for one in self.workers if one.process.poll() in (0, 1)}
        ready = run_sql(self.address, "SELECT pid, name FROM pgqrs_workers WHERE status = 'ready'")
        assert not [name for pid, name in ready if pid in left], f"still registered: {ready}"
        return found

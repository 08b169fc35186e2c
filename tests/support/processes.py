"""Consumers in processes: started, given messages, audited.

::

    with fleet.start("sync", on={"lease": 2}) as worker:
        fleet.send({"do": "wait"})
        worker.expect("begun")
        worker.kill()
    fleet.finish()           # another consumer does what is left
    fleet.audit()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from support.ledger import Audit, Sent, audit
from support.scripts import Script
from support.servers import WAIT, Address, run_sql, until_found

KINDS = ("sync", "psycopg", "asyncpg")
"""Threads; tasks over psycopg; tasks over asyncpg."""

_QUICK = {"concurrency": 4, "poll_interval": 0.1, "heartbeat": 0.5, "housekeeping": 0.5}
_RETRY = {"max_attempts": 50, "backoff": "constant", "base": 0.05}

_PROGRAM = """
from support.consumer_program import main
main(args)
"""


def settings_of(address: Address, kind: str, **settings: Any) -> dict[str, Any]:
    """Return the arguments of the worker's program, with what is not given filled in."""
    driver = "asyncpg" if kind == "asyncpg" else "psycopg"
    given = dict(settings)
    through = given.pop("through", address)
    return {
        **given,
        "kind": kind,
        "url": through.url(driver),
        "beside": address.url(driver),
        "until_empty": given.get("until_empty", False),
        "consumer": {**_QUICK, **given.get("consumer", {})},
        "on": {"lease": 30, **given.get("on", {})},
        "retry": {**_RETRY, **given.get("retry", {})},
        "engine": given.get("engine", {}),
        "pooled": given.get("pooled", False),
        "tell": list(given.get("tell", ())),
    }


class ConsumerProcess(Script):
    """One process with a consumer."""

    def __init__(self, name: str, **args: Any) -> None:
        self.name = name
        super().__init__(_PROGRAM, name=name, **args)

    def expect(self, word: str, timeout: float = WAIT) -> dict[str, Any]:
        """As a script's, with a wait that is long for a consumer."""
        return super().expect(word, timeout)

    def heard(self, word: str) -> dict[str, Any]:
        """Return what it said with a word, be it before or after what it was asked for last."""
        found = [data for said, data in self.said if said == word]
        return found[-1] if found else self.expect(word)


class ConsumerFleet:
    """All processes of one test, over one database.

    Args:
        address: The database, directly.
        engine: On it, for sending and for the audit.
    """

    def __init__(self, address: Address, engine: sa.Engine) -> None:
        self.address = address
        self.engine = engine
        self.workers: list[ConsumerProcess] = []
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, kind: str = "sync", **settings: Any) -> ConsumerProcess:
        """Start a process; it has only just begun when this returns.

        Args:
            kind: See `KINDS`.
            settings: ``consumer``, ``on``, ``retry`` and ``engine``: keyword arguments of these;
                ``through``: where the database is found, if not directly; ``pooled``: whether
                that is PgBouncer; ``until_empty``: end when nothing is left; ``tell``: the hooks
                that it is to say.
        """
        args = settings_of(self.address, kind, **settings)
        worker = ConsumerProcess(name=f"{kind}-{next(self._numbers)}", **args)
        self.workers.append(worker)
        return self._stack.enter_context(worker)

    def send(self, *payloads: dict[str, Any]) -> list[int]:
        """Enqueue messages; return their ids."""
        with Session(self.engine) as session, session.begin():
            receipts = QueueService(session).enqueue_many("mail", payloads)
            ids = [receipt.id for receipt in receipts]
            session.add_all(Sent(message_id=id_) for id_ in ids)
        return ids

    def registered(self, count: int = 1) -> None:
        """Wait until ``count`` workers are ready."""
        ready = "SELECT count(*) FROM pgqrs_workers WHERE status = 'ready'"
        until_found(
            self.address, ready, lambda rows: rows == [(count,)], f"{count} workers are ready"
        )

    def settled(self, count: int, timeout: float = WAIT) -> None:
        """Wait until ``count`` messages are in the archive."""
        done = "SELECT count(*) FROM pgqrs_archive"
        until_found(
            self.address, done, lambda rows: rows[0][0] >= count, f"{count} are settled", timeout
        )

    def emptied(self, timeout: float = WAIT) -> None:
        """Wait until no message is live."""
        live = (
            "SELECT id, read_ct, leased_until - now(), consumer_worker_id"
            " FROM pgqrs_messages LIMIT 9"
        )
        try:
            until_found(self.address, live, lambda rows: not rows, "the queue is empty", timeout)
        except AssertionError as error:
            said = [
                f"{worker.name}: {worker.process.poll()}\n{worker.errors}"
                for worker in self.workers
            ]
            left = run_sql(self.address, live)
            raise AssertionError("\n".join([str(error), f"{left}", *said])) from None

    def finish(self, kind: str = "sync", timeout: float = WAIT, **settings: Any) -> None:
        """Let another consumer do what is left, and end properly."""
        worker = self.start(kind, **settings)
        self.emptied(timeout)
        self.shutdown([worker])

    def shutdown(self, workers: Iterable[ConsumerProcess] | None = None, code: int = 0) -> None:
        """Let workers end properly."""
        going = list(self.workers if workers is None else workers)
        going = [item for item in going if item.process.poll() is None]
        for item in going:
            item.terminate()
        for item in going:
            ended = item.wait(WAIT)
            assert ended == code, f"{item.name} ended with {ended}, not {code}\n{item.errors}"

    def audit(self, *, live: int = 0) -> Audit:
        """The audit of the books; and each process that ended properly has said so."""
        found = audit(self.engine).assert_clean(live=live)
        assert found.started <= found.attempts, f"more starts than attempts: {found}"
        left = {worker.pid for worker in self.workers if worker.process.poll() in (0, 1)}
        ready = run_sql(self.address, "SELECT pid, name FROM pgqrs_workers WHERE status = 'ready'")
        assert not [name for pid, name in ready if pid in left], f"still registered: {ready}"
        return found

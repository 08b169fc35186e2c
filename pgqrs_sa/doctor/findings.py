"""A finding of the doctor, and the thresholds above which a condition is a finding."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

__all__ = ["Finding", "Severity", "Thresholds"]

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, and how to fix it.

    Attributes:
        check: The check that found it, one of `pgqrs_sa.doctor.CHECKS`.
        severity: ``error`` when messages cannot be worked on as promised, else ``warning``.
        subject: The table, index, queue or server process that it is about.
        problem: The problem in a sentence.
        fix: The SQL or the command that fixes it, one statement a line, ready to paste.
    """

    check: str
    severity: Severity
    subject: str
    problem: str
    fix: str

    @property
    def mend(self) -> str:
        """The former name of ``fix``."""
        return self.fix


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds above which a condition is reported (exclusive).

    Attributes:
        clock_skew: Between this computer's clock and the database's.
        transaction_age: How long a transaction may hold back vacuum; prepared ones, too.
        slot_age: How many transactions a replication slot that nobody reads may hold back.
        dead_rows: Dead rows of a table that vacuum has not been at for ``vacuum_age``.
        archived_rows: Rows of the archive, as PostgreSQL estimates them, while there are queues
            without a retention.
        vacuum_age: Since the last vacuum of a table with more than ``dead_rows`` dead rows.
        lease_ahead: How far in the future a lease may end whose worker is stopped or gone.
        exhausted_age: How long a message may stay without attempts.
        paused_age: How long a queue with messages that are ready may be paused.
        ready_age: How long a message of a queue that is not paused may wait to be taken.
        worker_silence: Since the last heartbeat of a worker that is not stopped.
        notifications: The share of the server's notification queue that is in use.
        connections: The share of the connections that is in use.
        sequence: The share of its numbers that a sequence has given out.
    """

    clock_skew: timedelta = timedelta(seconds=1)
    transaction_age: timedelta = timedelta(minutes=5)
    slot_age: int = 100_000
    dead_rows: int = 10_000
    archived_rows: int = 1_000_000
    vacuum_age: timedelta = timedelta(minutes=10)
    lease_ahead: timedelta = timedelta(minutes=5)
    exhausted_age: timedelta = timedelta(minutes=10)
    paused_age: timedelta = timedelta(hours=1)
    ready_age: timedelta = timedelta(minutes=15)
    worker_silence: timedelta = timedelta(minutes=5)
    notifications: float = 0.5
    connections: float = 0.9
    sequence: float = 0.8

"""A queue with a row of every kind, so that a statement can be seen to leave the others alone.

The rows are made by SQL, with ids that say what they are; some are such as only a mistake or a
crash would leave behind. Times are days away, so that nothing changes while the tests take theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import metadata

MAIL, OTHER, PAUSED, SHORT = 1, 2, 3, 4
"""Queues: one that is worked on, a second one, one that is paused, one that takes 10 bytes."""

BUSY, SILENT, GONE, STOPPED, SUSPENDED, HOLDING, QUIET = range(1, 8)
"""Workers: one that lives and holds leases, one that holds some and has fallen silent, two that
stopped, long ago and just now, one that is suspended, silent and holds a lease in another queue,
one that stopped long ago and holds one, and one that is silent and holds nothing."""

READY, LEASED, SILENTS, LATER, SPENT, LAPSED, ELSEWHERE, SUSPENDEDS = range(1, 9)
SPENT_ELSEWHERE, NOBODYS, IN_PAUSED, LAST, LIMITED, HOLDINGS, HALF, URGENT = range(9, 17)
"""Messages; ``HALF`` has a worker but is not held, ``LIMITED`` has attempts left and a limit. What
is leased became visible before all others: a lease leaves a message at its place."""

OLD, DEAD, OLD_ELSEWHERE, LIVE_KEY, TWIN, KEPT = range(101, 107)
"""Archived messages; the key of ``LIVE_KEY`` is live, ``TWIN`` has the key of ``OLD``."""

SCENE = """
INSERT INTO pgqrs_queues (id, queue_name, max_read_ct, retention_seconds, max_payload_bytes,
                          paused_at, lease_seconds) VALUES
    (1, 'mail', 5, 3600, 1000, NULL, 30), (2, 'other', 7, 3600, 1000, NULL, 30),
    (3, 'paused', 5, NULL, 1000, now(), 30), (4, 'short', 5, NULL, 10, NULL, 30);
INSERT INTO pgqrs_workers (id, name, hostname, queues, status, heartbeat_at, shutdown_at,
                           waiting_until, leased) VALUES
    (1, 'busy', 'h', '{mail}', 'ready', now(), NULL, now() + interval '1 day', 2),
    (2, 'silent', 'h', '{mail}', 'ready', now() - interval '2 days', NULL, NULL, 1),
    (3, 'gone', 'h', '{mail}', 'stopped', now() - interval '9 days', now() - interval '9 days',
     NULL, NULL),
    (4, 'stopped', 'h', '{mail}', 'stopped', now() - interval '2 days', now(), NULL, NULL),
    (5, 'suspended', 'h', '{other}', 'suspended', now() - interval '2 days', NULL, NULL, NULL),
    (6, 'holding', 'h', '{}', 'stopped', now() - interval '9 days', now() - interval '9 days',
     NULL, NULL),
    (7, 'quiet', 'h', '{mail}', 'ready', now() - interval '2 days', NULL, NULL, 0);
INSERT INTO pgqrs_messages (id, queue_id, payload, vt, read_ct, max_read_ct, consumer_worker_id,
                            dedup_key, priority, fencing_token) VALUES
    (1, 1, '{"n": 1}', now() - interval '9 days', 0, NULL, NULL, 'live', 0, 501),
    (2, 1, '2', now() - interval '20 days', 1, 5, 1, NULL, 0, 502),
    (3, 1, '3', now() - interval '19 days', 1, 5, 2, NULL, 0, 503),
    (4, 1, '{"n": 4}', now() + interval '1 day', 0, NULL, NULL, NULL, 0, 504),
    (5, 1, '5', now() - interval '14 days', 1, 1, 2, NULL, 0, 505),
    (6, 1, '6', now() - interval '7 days', 1, 5, 1, NULL, 0, 506),
    (7, 2, '{"n": 1}', now() - interval '6 days', 0, NULL, NULL, 'live', 0, 507),
    (8, 2, '8', now() - interval '18 days', 1, 5, 5, NULL, 0, 508),
    (9, 2, '9', now() - interval '5 days', 1, 1, NULL, NULL, 0, 509),
    (10, 1, '10', now() - interval '17 days', 1, 5, NULL, NULL, 0, 510),
    (11, 3, '11', now() - interval '4 days', 0, NULL, NULL, NULL, 0, 511),
    (12, 1, '12', now() - interval '16 days', 1, 1, 1, NULL, 0, 512),
    (13, 1, '13', now() - interval '3 days', 0, 3, NULL, NULL, 0, 513),
    (14, 1, '14', now() - interval '15 days', 1, 5, 6, NULL, 0, 514),
    (15, 1, '15', now() + interval '1 day', 1, 5, 1, NULL, 0, 515),
    (16, 1, '16', now() - interval '2 days', 0, NULL, NULL, 'free', -1, 516);
UPDATE pgqrs_messages SET dequeued_at = now(), leased_until = now() + interval '1 day'
    WHERE id IN (2, 3, 8, 10, 12, 14);
UPDATE pgqrs_messages SET dequeued_at = now() - interval '9 days',
    leased_until = now() - interval '8 days' WHERE id = 5;
UPDATE pgqrs_messages SET dequeued_at = vt, leased_until = vt + interval '1 day'
    WHERE id IN (6, 9);
INSERT INTO pgqrs_archive (id, queue_id, payload, archived_at, outcome, read_ct,
                           max_read_ct, dedup_key, consumer_worker_id, dequeued_at,
                           fencing_token) VALUES
    (101, 1, '101', now() - interval '2 hours', 'archived', 1, 5, 'k', 1, now(), 601),
    (102, 1, '102', now(), 'dead', 5, 5, NULL, 1, now(), 602),
    (103, 2, '103', now() - interval '2 hours', 'archived', 1, 5, 'k', 1, now(), 603),
    (104, 1, '104', now(), 'archived', 1, 5, 'live', 1, now(), 604),
    (105, 1, '105', now(), 'archived', 1, 5, 'k', 1, now(), 605),
    (106, 3, '106', now() - interval '2 hours', 'archived', 1, 5, NULL, 1, now(), 606)
"""


def token(message: int) -> int:
    """The fencing token of a message of the scene."""
    return 500 + message


def unanswered(worker: int, **changes: Any) -> dict[str, Any]:
    """The parameters of `hand_back` for what a worker has leased in queue ``mail`` just now.

    ``since`` and ``until`` are given as spans from now.
    """
    values: dict[str, Any] = {"worker_id": worker, "queue": "mail", "lease": timedelta(days=1)}
    # Wide, as a test may run long after it was collected.
    values |= {"since": timedelta(minutes=-50), "until": timedelta(hours=9), "known": []} | changes
    now = datetime.now(UTC)
    return values | {name: now + values[name] for name in ("since", "until")}


Rows = dict[tuple[str, int], Mapping[str, Any]]


def set_up(connection: sa.Connection) -> None:
    """Empty the tables, and put the scene there."""
    names = ", ".join(table.name for table in metadata.sorted_tables)
    connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    for statement in SCENE.split(";\n"):
        connection.exec_driver_sql(statement)
    for name in ("pgqrs_queues", "pgqrs_workers", "pgqrs_messages"):
        connection.exec_driver_sql(f"ALTER TABLE {name} ALTER id RESTART WITH 1000")
    connection.exec_driver_sql("ALTER TABLE pgqrs_messages ALTER fencing_token RESTART WITH 1000")


def everything(session: Session) -> Rows:
    """Every row there is, by its table's name without ``pgqrs_`` and its id."""
    return {
        (table.name.removeprefix("pgqrs_"), row.id): row._mapping
        for table in metadata.sorted_tables
        for row in session.execute(sa.select(table))
    }


class Seen:
    """What a statement has changed in the scene.

    Attributes:
        rows: What it has returned.
        changed: The ids of the rows that are not as they were, by table.
        gone: The ids of those that are not there any more.
        new: The rows that were not there before.
        now: All rows, afterwards.
    """

    def __init__(self, session: Session, statement: Any, values: Any = None) -> None:
        before = everything(session)
        result: Any = session.execute(statement, values)
        self.rows = result.all() if result.returns_rows else []
        self.now = everything(session)
        common = before.keys() & self.now.keys()
        self.changed = _by_table(item for item in common if before[item] != self.now[item])
        self.gone = _by_table(before.keys() - self.now.keys())
        self.new = [self.now[item] for item in sorted(self.now.keys() - before.keys())]
        self._before = before

    def columns(self, table: str, id_: int) -> set[str]:
        """The columns that have another value in a row now."""
        old, new = self._before[table, id_], self.now[table, id_]
        return {name for name in new if old[name] != new[name]}


def _by_table(keys: Any) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for table, id_ in keys:
        found.setdefault(table, set()).add(id_)
    return found

"""What the queue promises, as a small model in Python: no SQL, no clock, no locks but these.

Everything is a value under a key, such as ``("live", 7)`` for message 7. What is committed is one
dict; each transaction has another with its changes, which covers it: that is READ COMMITTED. A row
that a transaction has changed or locked can be changed by no other one until it ends, and neither
can a deduplication key that it has touched be inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

QUEUES = ("mail", "post")
ATTEMPTS = 3  # of both queues
LATER = 3600.0
OUTCOMES = ("archived", "dead", "cancelled", "discarded")

NO_LEASE: dict[str, Any] = {"grant": None, "worker": None, "length": 0, "until": None}

Key = tuple[str, Any]


@dataclass(frozen=True)
class Row:
    """A live message.

    ``wait`` is how far its vt lay ahead when it was set, 0 for at once, and ``length`` how far the
    end of its lease did. Both are -1 once that time has come.
    """

    queue: str
    n: int  # its payload, which no other message has
    wait: float = 0
    priority: int = 0
    key: str | None = None
    read_ct: int = 0
    max_read_ct: int | None = None
    grant: int | None = None  # which lease holds it, running or run out
    length: float = 0
    worker: int | None = None
    error: str | None = None
    vt: datetime | None = None  # as the database chose it; None until it is read
    until: datetime | None = None  # the end of its lease, likewise

    @property
    def visible(self) -> bool:
        return self.state in {"ready", "exhausted"}

    @property
    def has_attempts(self) -> bool:
        return self.max_read_ct is None or self.read_ct < self.max_read_ct

    @property
    def state(self) -> str:
        if self.grant is not None and self.length > 0:
            return "leased"
        if self.wait > 0:
            return "scheduled"
        return "ready" if self.has_attempts else "exhausted"

    @property
    def unheld(self) -> bool:
        """Nobody holds a running lease on it."""
        return self.state != "leased"


@dataclass(frozen=True)
class Archived:
    """A settled message, under the id that it had."""

    row: Row
    outcome: str


@dataclass(frozen=True)
class Worker:
    status: str = "ready"
    silent: bool = False


@dataclass
class Transaction:
    """What one session has done since its last commit; ``saved`` is a copy for each savepoint."""

    changes: dict[Key, Any] = field(default_factory=dict)
    locks: set[Key] = field(default_factory=set)
    keys: set[tuple[str, str]] = field(default_factory=set)
    leases: list[Any] = field(default_factory=list)  # deliveries that are not committed yet
    saved: list[Transaction] = field(default_factory=list)

    def save(self) -> None:
        copy = Transaction(dict(self.changes), set(self.locks), set(self.keys), list(self.leases))
        self.saved.append(copy)

    def restore(self) -> None:
        last = self.saved.pop()
        self.changes, self.locks = last.changes, last.locks
        self.keys, self.leases = last.keys, last.leases


class ModelState:
    """The committed state, and two transactions on it."""

    def __init__(self) -> None:
        self.committed: dict[Key, Any] = {("queue", name): "open" for name in QUEUES}
        self.leases: list[Any] = []  # committed deliveries, in the hands of present or past holders
        self.uncommitted: list[Any] = []  # deliveries of leases that were rolled back: nobody's
        self.open = [Transaction(), Transaction()]
        self.grants = 0

    # --- seeing ----------------------------------------------------------------------------------

    def view(self, s: int | None) -> dict[Key, Any]:
        """What a session sees; what is committed for None."""
        changes = {} if s is None else self.open[s].changes
        seen = {**self.committed, **changes}
        return {key: value for key, value in seen.items() if value is not None}

    def all(self, s: int | None, kind: str) -> dict[int, Any]:
        return {key[1]: value for key, value in self.view(s).items() if key[0] == kind}

    def get(self, s: int | None, kind: str, id_: Any) -> Any:
        changes = {} if s is None else self.open[s].changes
        return changes[kind, id_] if (kind, id_) in changes else self.committed.get((kind, id_))

    def rows(self, s: int, fits: Callable[[Row], Any], *, skip_locked: bool = False) -> list[int]:
        """The ids of the live messages that fit, in order."""
        found = (id_ for id_, row in self.all(s, "live").items() if fits(row))
        return sorted(id_ for id_ in found if not (skip_locked and self.taken(s, "live", id_)))

    def taken(self, s: int, kind: str, id_: Any) -> bool:
        """Whether the other session has the row locked."""
        other = self.open[1 - s]
        return (kind, id_) in other.changes or (kind, id_) in other.locks

    def waits(self, s: int, kind: str, ids: Iterable[Any]) -> bool:
        return any(self.taken(s, kind, id_) for id_ in ids)

    def waits_for_key(self, s: int, queue: str, keys: Iterable[str | None]) -> bool:
        return any((queue, key) in self.open[1 - s].keys for key in keys)

    def with_key(self, s: int, queue: str, key: str | None) -> int | None:
        """The live message that has the key."""
        found = self.rows(s, lambda row: key is not None and (row.queue, row.key) == (queue, key))
        return found[0] if found else None

    def ready(self, s: int, queue: str, priority: int | None) -> list[int]:
        """What a dequeue takes, first things first."""
        found = self.rows(
            s,
            lambda row: (
                row.queue == queue and row.state == "ready" and priority in {None, row.priority}
            ),
            skip_locked=True,
        )
        return sorted(found, key=lambda id_: self._place(s, id_))

    def _place(self, s: int, id_: int) -> Any:
        row = self.get(s, "live", id_)
        return row.priority, row.vt, id_

    def metrics(self, s: int, queue: str) -> dict[str, int]:
        live = [row.state for row in self.all(s, "live").values() if row.queue == queue]
        settled = [
            entry.outcome for entry in self.all(s, "archive").values() if entry.row.queue == queue
        ]
        counts = {state: live.count(state) for state in ("ready", "scheduled", "leased")}
        counts["exhausted"] = live.count("exhausted")
        return counts | {outcome: settled.count(outcome) for outcome in OUTCOMES}

    def running(self, s: int, id_: int) -> list[int]:
        """The leases on a message that have not run out: in a session's eyes, or in flight."""
        rows = (self.get(s, "live", id_), self.open[1 - s].changes.get(("live", id_)))
        return [row.grant for row in rows if row is not None and row.state == "leased"]

    # --- changing --------------------------------------------------------------------------------

    def put(self, s: int, kind: str, id_: Any, value: Any) -> None:
        mine = self.open[s]
        for row in (self.get(s, kind, id_), value) if kind == "live" else ():
            if row is not None and row.key is not None:
                mine.keys.add((row.queue, row.key))
        mine.changes[kind, id_] = value

    def change(self, s: int, id_: int, **values: Any) -> None:
        self.put(s, "live", id_, replace(self.get(s, "live", id_), **values))

    def lock(self, s: int, kind: str, ids: Iterable[int]) -> None:
        self.open[s].locks |= {(kind, id_) for id_ in ids}

    def archive(self, s: int, id_: int, outcome: str, **values: Any) -> None:
        row = replace(self.get(s, "live", id_), **values)
        self.put(s, "live", id_, None)
        self.put(s, "archive", id_, Archived(row, outcome))

    def remove(self, s: int, kind: str, id_: int) -> None:
        """Delete on purpose: this is remembered."""
        self.put(s, kind, id_, None)
        self.put(s, "gone", id_, True)

    def lease(self, s: int, id_: int, worker: int | None) -> int:
        self.grants += 1
        row = self.get(s, "live", id_)
        limit = ATTEMPTS if row.max_read_ct is None else row.max_read_ct
        taken = {"grant": self.grants, "worker": worker, "length": LATER, "until": None}
        self.change(s, id_, read_ct=row.read_ct + 1, max_read_ct=limit, **taken)
        return self.grants

    def free(self, s: int, id_: int, **values: Any) -> None:
        """End its lease; it keeps its place."""
        self.change(s, id_, **NO_LEASE, **values)

    def move(self, s: int, id_: int, wait: float, **values: Any) -> None:
        """End its lease, if it has one, and give it another time."""
        self.free(s, id_, wait=wait, vt=None, **values)

    def bury(self, s: int, queue: str) -> list[int]:
        """Make dead letters of what is out of attempts."""
        spent = self.rows(
            s, lambda row: row.queue == queue and row.state == "exhausted", skip_locked=True
        )
        for id_ in spent:
            self.archive(s, id_, "dead")
        return spent

    def settle(self, s: int, way: str, id_: int, wait: float, error: str) -> None:
        """What the holder of a message makes of it."""
        row = self.get(s, "live", id_)
        match way:
            case "archive":
                self.archive(s, id_, "archived")
            case "discard":
                self.archive(s, id_, "discarded")
            case "delete":
                self.remove(s, "live", id_)
            case "extend":
                self.change(s, id_, length=LATER, until=None)
            case "release" if wait:
                self.move(s, id_, wait, max_read_ct=row.max_read_ct + 1)
            case "release":
                self.free(s, id_, max_read_ct=row.max_read_ct + 1)
            case "fail" if row.has_attempts:
                self.move(s, id_, wait, error=error)
            case "fail" | "bury":
                self.archive(s, id_, "dead", error=error)

    def requeue(self, s: int, id_: int, wait: float, attempts: int | None) -> None:
        row = self.get(s, "archive", id_).row
        limit = row.read_ct + (ATTEMPTS if attempts is None else attempts)
        self.put(s, "archive", id_, None)
        back = {"wait": wait, "vt": None, **NO_LEASE}
        self.put(s, "live", id_, replace(row, max_read_ct=limit, **back))

    def expire(self, id_: int) -> int | None:
        """Let its lease run out, or its delay end, and say which session has it locked."""
        holder = next((s for s in (0, 1) if self.taken(1 - s, "live", id_)), None)
        leased = self.get(holder, "live", id_).state == "leased"
        ended = {"length": -1, "until": None} if leased else {"wait": -1, "vt": None}
        if holder is not None:
            self.change(holder, id_, **ended)
        else:
            self.committed["live", id_] = replace(self.committed["live", id_], **ended)
        return holder

    # --- transactions ----------------------------------------------------------------------------

    def commit(self, s: int) -> None:
        self.committed |= self.open[s].changes
        self.leases += self.open[s].leases
        self.open[s] = Transaction()

    def rollback(self, s: int) -> None:
        self.uncommitted += self.open[s].leases
        self.open[s] = Transaction()

    def restore(self, s: int) -> None:
        """Roll back to the last savepoint."""
        before = self.open[s].leases
        self.open[s].restore()
        self.uncommitted += [lease for lease in before if lease not in self.open[s].leases]

    def learn(self, s: int | None, id_: int, **times: datetime) -> None:
        """Note the times that the database gave to a message: ``vt``, ``until``."""
        home = self.committed
        if s is not None and ("live", id_) in self.open[s].changes:
            home = self.open[s].changes
        home["live", id_] = replace(home["live", id_], **times)

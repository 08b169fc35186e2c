"""Helpers of the scenarios that measure the cost of a message.

Each measurement works twice in the same database. The first time, CPU time, WAL and pages are
measured. The second time, a proxy counts requests and commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..contenders.base import Contender
from ..executor import Assignment
from ..place import Place
from ..work import Outcome
from .base import Arguments, Bench

__all__ = ["COUNTED", "Amounts", "consumed", "metered", "per_message"]

COUNTED = 20
"""The number of calls, or batches, whose requests are counted."""


_HELD = 4  # batches that a consumer may hold when it is told to stop
_LATE = 200  # messages that it may settle until it stops: a signal takes a moment


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is consumed.

    Attributes:
        batch: The number of messages leased at a time.
        count: The number of messages whose cost is measured.
        warm: The number of batches before them.
    """

    batch: int
    count: int
    warm: int

    @property
    def counted(self) -> int:
        """The number of messages whose requests are counted."""
        return min(self.count, COUNTED * self.batch)

    @property
    def needed(self) -> int:
        """The number of messages that both times take at most."""
        return self.count + self.counted + 2 * ((self.warm + _HELD) * self.batch + _LATE)


def metered(
    bench: Bench,
    contender: type[Contender],
    place: Place,
    method: str,
    arguments: Arguments,
    counted: Arguments,
) -> tuple[Outcome, Outcome]:
    """Let one process work twice; return the outcome with the cost, and the one with the counts.

    Args:
        bench: The processes and sizes.
        contender: The contender that works.
        place: The database.
        method: ``produce_metered`` or ``consume_metered``.
        arguments: The arguments of the method.
        counted: Other arguments of the second time.
    """
    cost, wire = (
        bench.executor.run([Assignment(contender, place, method, given, opened=False)])
        for given in (
            {**arguments, "wired": False},
            {**arguments, **counted, "wired": True},
        )
    )
    return cost, wire


def consumed(
    bench: Bench,
    contender: type[Contender],
    place: Place,
    work: str,
    amounts: Amounts,
) -> tuple[Outcome, Outcome]:
    """Consume a part of a backlog of `Amounts.needed`; see `metered`."""
    arguments: dict[str, Any] = {
        "work": work,
        "batch": amounts.batch,
        "warm": amounts.warm * amounts.batch,
        "count": amounts.count,
        "longest": bench.sizes.longest,
    }
    counted = {"count": amounts.counted}
    return metered(bench, contender, place, "consume_metered", arguments, counted)


def per_message(cost: Outcome, wire: Outcome) -> dict[str, float]:
    """Return the cost of one message: microseconds of CPU time, bytes, requests and commits."""
    total = {name: value for name, (value,) in cost.series.items()}
    found = {name: total[name] / cost.count for name in ("wal", "heap", "index")}
    found |= {name: total[name] / cost.count * 1e6 for name in ("client", "server")}
    found |= {name: wire.series[name][0] / wire.count for name in ("requests", "commits")}
    return {**found, "cpu": found["client"] + found["server"]}

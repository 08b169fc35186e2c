"""What the scenarios that measure what a message costs have in common.

Everything is done twice: first CPU time, WAL and pages are measured, and then, through a proxy that
takes time itself, requests and commits are counted. Both go on where the first ended.
"""

from __future__ import annotations

from typing import Any

from ..contenders.base import Contender
from ..executor import Assignment
from ..place import Place
from ..work import Outcome
from .base import Arguments, Bench

__all__ = ["COUNTED", "consumed", "metered", "needed", "per_message"]

COUNTED = 20
"""Calls, or batches, whose requests are counted: they are always the same."""

_WARM = 6  # batches before it is measured: psycopg prepares a statement when it ran five times

_HELD = 4  # batches that a consumer may hold when it is stopped


def metered(
    bench: Bench,
    contender: type[Contender],
    place: Place,
    method: str,
    arguments: Arguments,
    counted: Arguments,
) -> tuple[Outcome, Outcome]:
    """Let one process work twice; return what it cost, and what was counted.

    Args:
        bench: What a measurement may use.
        contender: Who works.
        place: The database.
        method: ``produce_metered`` or ``consume_metered``.
        arguments: Of the method.
        counted: Arguments that differ while requests are counted.
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
    bench: Bench, contender: type[Contender], place: Place, work: str, batch: int, count: int
) -> tuple[Outcome, Outcome]:
    """See `metered`: consume so many messages, of a backlog that has as many as `needed` says."""
    arguments: dict[str, Any] = {
        "work": work,
        "batch": batch,
        "warm": _WARM * batch,
        "count": count,
        "longest": bench.sizes.longest,
    }
    counted = {"count": min(count, COUNTED * batch)}
    return metered(bench, contender, place, "consume_metered", arguments, counted)


def needed(batch: int, count: int) -> int:
    """Return how many messages `consumed` takes at most."""
    return count + min(count, COUNTED * batch) + 2 * (_WARM + _HELD) * batch


def per_message(cost: Outcome, wire: Outcome) -> dict[str, float]:
    """Return what one message cost: microseconds of CPU time, bytes, requests and commits."""
    total = {name: value for name, (value,) in cost.series.items()}
    found = {name: total[name] / cost.count for name in ("wal", "heap", "index")}
    found |= {name: total[name] / cost.count * 1e6 for name in ("client", "server")}
    found |= {name: wire.series[name][0] / wire.count for name in ("requests", "commits")}
    return {**found, "cpu": found["client"] + found["server"]}

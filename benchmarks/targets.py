"""The targets of the project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["TARGETS", "Target"]

Points = Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for a number, or for its ratio to that of another contender.

    Attributes:
        text: The target in words.
        scenario: The name of the scenario that measures it.
        ours: The name of our contender.
        limit: The limit.
        against: The names of other contenders. The ratio to the best of those that were measured
            is compared with the limit; without any, our own number is.
        points: The facts of the points at which the target applies; None: all points.
        number: The name of a further number; None: the measured value.
        baseline: The point by whose value of ours the number is divided.
        better: Whether it must be at least the limit, or at most.
    """

    text: str
    scenario: str
    ours: str
    limit: float
    against: tuple[str, ...] = ()
    points: Points | None = None
    number: str | None = None
    baseline: tuple[str, str] | None = None
    better: Literal["at least", "at most"] = "at least"

    def met_by(self, value: float) -> bool:
        """Return whether this is good enough; what is no number is not."""
        return value >= self.limit if self.better == "at least" else value <= self.limit


_OURS = {
    "service": "QueueService",
    "service-chained": "QueueService chained",
    "runtime": "Consumer",
    "runtime-batches": "Consumer with batches",
    "runtime-async-psycopg": "AsyncConsumer",
}
_CONSUMERS = ("pgqueuer", "procrastinate", "chancy", "pgqrs")
_PEERS = ("pgmq", "pgmq-sqlalchemy", *_CONSUMERS)
_EXACT = ("pgmq", "pgmq-sqlalchemy")
_WAL = {50: 0.80, 1: 0.85}
_SERVER = {50: 1.0, 1: 0.5}
_SINGLE = {"consumers": (1,), "batch": (50,)}
_NOTIFY = {"wake": ("notify",)}


def _consuming(batch: int) -> Points:
    return {"work": ("consume",), "batch": (batch,)}


TARGETS: tuple[Target, ...] = (
    *(
        Target(
            f"WAL, lease + archive of {batch}, {_OURS[ours]}: {limit:.2f} of pgmq",
            "cost",
            ours,
            limit,
            ("pgmq",),
            points=_consuming(batch),
            number="wal",
            better="at most",
        )
        for batch, limit in _WAL.items()
        for ours in ("service", "runtime")
    ),
    *(
        Target(
            f"server CPU, lease + archive of {batch}, Consumer: {limit} of pgmq",
            "cost",
            "runtime",
            limit,
            ("pgmq",),
            points=_consuming(batch),
            number="server",
            better="at most",
        )
        for batch, limit in _SERVER.items()
    ),
    *(
        Target(
            f"HOT share of leases, {_OURS[ours]}",
            "cost",
            ours,
            0.99,
            points={"work": ("consume",)},
            number="hot",
        )
        for ours in ("service", "runtime")
    ),
    Target(
        "HOT share of leases and renewals, QueueService",
        "cost",
        "service",
        0.99,
        points={"work": ("renew",)},
        number="hot",
    ),
    Target(
        "CPU, Consumer with 49 ahead: 0.5 of the best other library's",
        "cost",
        "runtime",
        0.5,
        _CONSUMERS,
        points=_consuming(50),
        better="at most",
    ),
    Target(
        "CPU, enqueue in an open transaction: 1.05 of a bare Session",
        "cost",
        "service",
        1.05,
        ("bare",),
        points={"work": ("in_transaction",)},
        better="at most",
    ),
    Target("drain 1 x 50, Consumer: raw pgmq", "drain", "runtime", 1.0, ("pgmq",), points=_SINGLE),
    Target(
        "drain 1 x 50, Consumer with batches: 1.2 x raw pgmq",
        "drain",
        "runtime-batches",
        1.2,
        ("pgmq",),
        points=_SINGLE,
    ),
    Target("drain, Consumer: 1.5 x other libraries'", "drain", "runtime", 1.5, _CONSUMERS),
    Target("batches of 1,000: 1.8 x the fastest peer", "enqueue-batch", "service", 1.8, _PEERS),
    *(
        Target(
            f"work, {_OURS[ours]}: 1.3 x the best exact peer",
            "work",
            ours,
            1.3,
            _EXACT,
            points={"work": (work,)},
        )
        for ours, work in (("runtime", "effects"), ("runtime-batches", "effects_together"))
    ),
    *(
        Target(
            f"latency with NOTIFY, {label}: first among the peers",
            "latency",
            "runtime",
            1.0,
            _PEERS,
            points=_NOTIFY,
            number=number,
            better="at most",
        )
        for label, number in (("p50", None), ("p99", "p99"))
    ),
    *(
        Target(f"snapshot held, {_OURS[ours]}: last window / first", "snapshot", ours, 0.95)
        for ours in _OURS
    ),
    Target(
        "dequeue among 1M others / alone",
        "shapes",
        "service",
        1.5,
        points={"shape": ("scheduled", "archived", "priorities")},
        baseline=("shape", "empty"),
        better="at most",
    ),
    Target("producers with wake-up / without", "wake-up", "service-notify", 0.9, ("service",)),
    Target("memory: growth in MB", "memory", "service", 20.0, better="at most"),
    Target("memory, Consumer: growth in MB", "memory", "runtime", 20.0, better="at most"),
)
"""Most are ratios within a run, because absolute numbers depend on the machine."""

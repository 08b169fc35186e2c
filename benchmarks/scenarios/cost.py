"""The cost of a message, which depends little on the disk and on the load of the machine.

Bytes, requests and commits are the same in each run. CPU time varies with the load, much less than
the time that passes. The disk, checkpoints and autovacuum would add what depends on chance, so they
take no part: fsync, full_page_writes and autovacuum are off, and all caches are warm. The number of
commits tells how often a server with fsync waits for its disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import psycopg

from ..contenders.base import Contender
from ..place import Place
from ..server import Preparation
from ..work import payload_of
from .base import Arguments, Bench, Measured, Point, Scenario, Sizes
from .metered import COUNTED, Amounts, consumed, metered, per_message

__all__ = ["Cost", "hot_share"]

_PREWARM = (
    "SELECT sum(pg_prewarm(oid)) FROM pg_class WHERE relkind IN ('r', 't', 'i') AND oid >= 16384"
)
_DISCONNECT = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
_HOT = "SELECT sum(n_tup_hot_upd), sum(n_tup_upd) FROM pg_stat_user_tables"
_WARM = (
    6  # calls or batches before it is measured: psycopg prepares a statement when it ran five times
)
_RENEWED = 10
_PRODUCED = {
    "enqueue 1": "singles",
    "enqueue 1 in an open transaction": "in_transaction",
    "enqueue 1 with a business row": "business",
}


class Cost(Scenario):
    """Client and server, with one producer or one consumer."""

    name = "cost"
    title = "Cost of a message"
    unit = "us of CPU time"
    better = "lower"
    work = ()
    headline = True
    settings: ClassVar[Mapping[str, str]] = {
        "fsync": "off",
        "full_page_writes": "off",
        "autovacuum": "off",
    }
    columns: ClassVar[Mapping[str, str]] = {
        "client": "client CPU us",
        "server": "server CPU us",
        "wal": "WAL B",
        "heap": "heap B",
        "index": "index B",
        "hot": "HOT share",
        "requests": "round trips",
        "commits": "commits",
    }

    def points(self, sizes: Sizes) -> Sequence[Point]:
        """See `Scenario`."""
        many = {f"enqueue {sizes.batch_size:,} in one call": "batches"}
        produced = [Point(label, {"work": work}) for label, work in (_PRODUCED | many).items()]
        drained = [
            Point(f"lease and archive {batch}", {"work": "consume", "batch": batch})
            for batch in sizes.takes
        ]
        renewed = Point(
            f"lease, renew and archive {_RENEWED}", {"work": "renew", "batch": _RENEWED}
        )
        return [*produced, *drained, renewed]

    def takes_part(self, contender: type[Contender], point: Point) -> bool:
        """See `Scenario`: pgbench cannot be measured after its warm-up."""
        return contender.name != "pgbench" and contender.offers(str(point.facts["work"]))

    def preparation(self, point: Point, sizes: Sizes) -> Preparation | None:
        """See `Scenario`."""
        if "batch" not in point.facts:
            return None
        count = self._amounts(point, sizes).needed
        arguments = {"count": count, "payload": payload_of(sizes.payload)}
        return Preparation(f"backlog-{count}-{sizes.payload}", "fill", arguments)

    @staticmethod
    def _amounts(point: Point, sizes: Sizes) -> Amounts:
        batch = point.number("batch")
        return Amounts(batch, min(batch * sizes.cost, sizes.cost_backlog), _WARM)

    def measure(
        self, bench: Bench, contender: type[Contender], place: Place, point: Point
    ) -> Measured:
        """See `Scenario`."""
        _prewarm(place)
        work = str(point.facts["work"])
        if "batch" in point.facts:
            amounts = self._amounts(point, bench.sizes)
            cost, wire = consumed(bench, contender, place, work, amounts)
        else:
            arguments = {"work": work, "warm_up": self._call(_WARM, work, bench.sizes)}
            calls = bench.sizes.cost
            if work == "batches":
                calls = max(1, bench.sizes.cost_backlog // bench.sizes.batch_size)
            arguments["arguments"] = self._call(calls, work, bench.sizes)
            counted = {"arguments": self._call(min(calls, COUNTED), work, bench.sizes)}
            cost, wire = metered(bench, contender, place, "produce_metered", arguments, counted)
        found = per_message(cost, wire)
        if "batch" in point.facts and (share := hot_share(place)) is not None:
            found["hot"] = share
        return Measured(found["cpu"], found)

    @staticmethod
    def _call(count: int, work: str, sizes: Sizes) -> Arguments:
        size = {"size": sizes.batch_size} if work == "batches" else {}
        return {"count": count, "payload": payload_of(sizes.payload), **size}


def _prewarm(place: Place) -> None:
    """Read all tables and indexes into shared buffers, if pg_prewarm is installed."""
    with psycopg.connect(place.conninfo, autocommit=True) as connection:
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_prewarm")
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile):
            return  # this installation has no contrib modules
        connection.execute(_PREWARM)


def hot_share(place: Place) -> float | None:
    """Return the share of HOT updates in all updates of a database, or None without updates.

    Connections report their statistics when they end, so all others are ended.
    """
    with psycopg.connect(place.conninfo, autocommit=True) as connection:
        connection.execute(_DISCONNECT)
        hot, updates = connection.execute(_HOT).fetchone() or (None, None)
    return float(hot / updates) if updates else None

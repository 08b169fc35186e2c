"""Measure what work costs: CPU time of client and server, WAL, pages, requests and commits.

The client is this process. The server is all of its processes, including background processes. The
connection of the meter itself is not counted, nor the time that this process spends on measuring.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import psutil
import psycopg

from .place import Place
from .wire import Wire
from .work import Progress, Tally

__all__ = ["CostMeter", "Meter", "MeteredProgress", "WireMeter", "metering"]

_BYTES = (
    "SELECT pg_current_wal_insert_lsn() - '0/0',"
    " coalesce(sum(pg_relation_size(oid)) FILTER (WHERE relkind <> 'i'), 0),"
    " coalesce(sum(pg_relation_size(oid)) FILTER (WHERE relkind = 'i'), 0)"
    " FROM pg_class WHERE relkind IN ('r', 't', 'i') AND oid >= 16384"
)
_PREPARED = 6  # psycopg prepares a statement when it has executed it five times
_GRACE = 10.0  # seconds in which a consumer that polls notices that it has to stop


class Meter(Protocol):
    """Measures between `start` and `stop`."""

    def start(self) -> None:
        """Begin to measure."""

    def stop(self) -> dict[str, float]:
        """Return what was spent since `start`, by name."""


class CostMeter:
    """Measures CPU time, WAL and pages; a context manager.

    Args:
        place: The database.
    """

    def __init__(self, place: Place) -> None:
        self._connection: psycopg.Connection[Any] = psycopg.connect(place.conninfo, autocommit=True)
        self._backend = self._connection.info.backend_pid
        self._server = psutil.Process(self._backend).parent()
        for _ in range(_PREPARED):
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def start(self) -> None:
        """See `Meter`."""
        self._before = self._read()
        self._seconds, self._client = time.monotonic(), time.process_time()

    def stop(self) -> dict[str, float]:
        """See `Meter`.

        Returns:
            Seconds of CPU time of ``client`` and ``server``, and ``seconds`` in all; bytes of
            ``wal`` written, and by which ``heap`` and ``index`` grew.
        """
        client, seconds = time.process_time() - self._client, time.monotonic() - self._seconds
        (sizes, processes), (sizes_before, before) = self._read(), self._before
        grown = {name: value - sizes_before[name] for name, value in sizes.items()}
        # The time of a process that has ended is lost: contenders keep their connections open.
        server = sum(used - before.get(pid, 0.0) for pid, used in processes.items())
        return {"client": client, "server": server, "seconds": seconds, **grown}

    def _read(self) -> tuple[dict[str, float], dict[int, float]]:
        """Return bytes by name, and seconds of CPU time by process."""
        row = self._connection.execute(_BYTES).fetchone() or ()
        sizes = dict(zip(("wal", "heap", "index"), map(float, row), strict=True))
        processes = [child.pid for child in self._server.children() if child.pid != self._backend]
        return sizes, {pid: used for pid in processes if (used := _cpu(pid)) is not None}


class WireMeter:
    """Counts ``requests`` and ``commits``.

    Nothing else is measured then, because the proxy works in the same process.

    Args:
        wire: The proxy that the work uses.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def start(self) -> None:
        """See `Meter`."""
        self._requests, self._commits = self._wire.requests, self._wire.commits

    def stop(self) -> dict[str, float]:
        """See `Meter`."""
        wire = self._wire
        return {
            "requests": float(wire.requests - self._requests),
            "commits": float(wire.commits - self._commits),
        }


def _cpu(pid: int) -> float | None:
    """Return the seconds of CPU time of a process with one thread, or None if it has ended."""
    try:
        # Linux counts nanoseconds here, and hundredths of a second everywhere else.
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            return None
        return float(times.user + times.system)


class MeteredProgress(Progress):
    """Measures a consumer from the end of its warm-up until it has settled ``count`` messages.

    Its start and its shutdown are not part of the measurement.

    Args:
        meter: Started after the warm-up, and stopped at the end.
        warm: The number of messages of the warm-up.
        count: The number of messages to measure.
        longest: Seconds after which the measurement ends with fewer messages.
    """

    def __init__(self, meter: Meter, warm: int, count: int, longest: float) -> None:
        super().__init__(longest)
        self._meter = meter
        self._first, self._wanted = warm, count
        self._done = 0
        self._begun: int | None = None
        self._spent: dict[str, float] | None = None
        self._measured = 0

    @property
    def left(self) -> float:
        """See `Progress`. There is time left for the message that ends the measurement."""
        return super().left + _GRACE

    def add(self, count: int) -> bool:
        """See `Progress`."""
        self._done += count
        if self._spent is not None:
            return False
        if self._begun is None:
            if self._done >= self._first:
                self._begun = self._done
                self._meter.start()
            return True
        measured = self._done - self._begun
        if measured < self._wanted and super().left > 0:
            return True
        self._spent, self._measured = self._meter.stop(), measured
        return False

    def tally(self) -> Tally:
        """Return the number of messages measured, and what was spent on them.

        Raises:
            RuntimeError: the consumer ended before the measurement did.
        """
        if self._spent is None:
            raise RuntimeError(f"ended after {self._done} messages, before it was measured")
        return Tally(self._measured, {name: [value] for name, value in self._spent.items()})


@contextmanager
def metering(place: Place, *, wired: bool) -> Iterator[tuple[Place, Meter]]:
    """Yield the place to work at, and the meter of that work.

    Args:
        place: The database.
        wired: Count requests and commits instead of measuring CPU time and bytes.
    """
    if wired:
        with Wire(place) as wire:
            yield wire.place, WireMeter(wire)
    else:
        with CostMeter(place) as meter:
            yield place, meter

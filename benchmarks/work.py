"""What a contender is told to do, and what it says about it. All of it travels by pickle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Outcome", "Payload", "Progress", "Tally", "payload_of", "resident_mb"]

Payload = dict[str, Any]

_ENVELOPE = len('{"n": 0, "body": ""}')
_EDGE = 0.05  # memory is compared from here on: what starts up is not growth


def payload_of(size: int) -> Payload:
    """Return a payload that takes about ``size`` bytes as JSON."""
    return {"n": 0, "body": "x" * max(0, size - _ENVELOPE)}


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    import psutil  # noqa: PLC0415 - the only scenario that needs it is the one about memory

    return float(psutil.Process().memory_info().rss) / 1e6


@dataclass(frozen=True, slots=True)
class Tally:
    """What one process has done.

    Attributes:
        count: Messages.
        series: What else was measured: latencies, messages per window, memory.
    """

    count: int
    series: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all processes of one measurement have done together.

    Attributes:
        count: Messages.
        seconds: From the common start to the end of the last.
        series: Their series; windows are added up, everything else is joined.
    """

    count: int
    seconds: float
    series: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.count / self.seconds


class Progress:
    """Counts what a consumer has settled, and says when to stop.

    Args:
        longest: Seconds after which it is stopped in any case.
        window: Also count for each span of this many seconds.
        memory: Also measure the memory after every ``memory`` messages; 0: never.
    """

    def __init__(self, longest: float, *, window: float = 0.0, memory: int = 0) -> None:
        self._longest = longest
        self._window = window
        self._memory = memory
        self._count = 0
        self._windows: list[float] = []
        self._resident: list[float] = []
        self._start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until it is time to stop."""
        return self._longest - (time.monotonic() - self._start)

    def add(self, count: int) -> bool:
        """Note settled messages; False when it is time to stop."""
        passed = time.monotonic() - self._start
        if self._window:
            place = int(passed / self._window)
            self._windows.extend([0.0] * (place + 1 - len(self._windows)))
            self._windows[place] += count
        if self._memory and (self._count + count) // self._memory > self._count // self._memory:
            self._resident.append(resident_mb())
        self._count += count
        return passed < self._longest

    def tally(self) -> Tally:
        """Return what was done; the last window is left out, since it was not a whole one."""
        series: dict[str, list[float]] = {}
        if self._window:
            series["windows"] = self._windows[:-1]
        if self._resident:
            early = self._resident[int(len(self._resident) * _EDGE)]
            series["growth_mb"] = [max(self._resident) - early]
        return Tally(self._count, series)

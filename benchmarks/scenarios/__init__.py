"""What is done, in the order of the report."""

from __future__ import annotations

from .base import Bench, Measured, Point, Scenario, Sizes
from .cost import Cost
from .drain import Drain, Memory, Payloads, Snapshot
from .effects import Effects
from .enqueue import Batches, Business, InTransaction, Singles, WakeUp
from .latency import Latency
from .shapes import Shapes

__all__ = ["SCENARIOS", "Bench", "Measured", "Point", "Scenario", "Sizes", "by_name"]

SCENARIOS: tuple[Scenario, ...] = (
    Cost(),
    Effects(),
    Singles(),
    InTransaction(),
    Batches(),
    Business(),
    Drain(),
    Latency(),
    Shapes(),
    Payloads(),
    Snapshot(),
    WakeUp(),
    Memory(),
)


def by_name(name: str) -> Scenario:
    """Return a scenario, or raise KeyError with the names that there are."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    if name not in known:
        raise KeyError(f"there is no scenario {name!r}; there are: {', '.join(known)}")
    return known[name]

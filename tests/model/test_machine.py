"""The promises of the queue, against random histories of two sessions: see `machine`.

``pytest -m long tests/model`` does hundreds of longer ones.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import COMMON_SITUATIONS, SELDOM_SITUATIONS, SETTLE, QueueMachine

BATCH = settings(
    # From the tenth example on, hypothesis makes most of them from earlier ones; and here fresh
    # ones find more. So there are many runs of a few examples, each with a seed of its own.
    max_examples=9,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink][
        : 1 if os.environ.get("PGQRS_TEST_SHRINK") == "no" else 2
    ],
    suppress_health_check=[*HealthCheck],
)


@pytest.fixture
def engine(migrated: Any) -> Iterator[sa.Engine]:
    """A wait for a lock that the model did not foresee fails the test."""
    engine = sa.create_engine(migrated.url, connect_args={"options": "-c lock_timeout=20s"})
    yield engine
    engine.dispose()


def histories(engine: sa.Engine, seeds: Iterable[int], steps: int) -> Counter[str]:
    """Run a batch for each seed, and return what happened in them, and how often."""
    seen: Counter[str] = Counter()
    for item in seeds:
        machine = seed(item)(lambda: QueueMachine(engine, seen))
        run_state_machine_as_test(machine, settings=settings(BATCH, stateful_step_count=steps))
    return seen


def told(seen: Counter[str], first: int) -> dict[str, Any]:
    """What is worth writing down."""
    totals = {name: seen[name] for name in ("examples", "steps", "operations")}
    rest = {what: n for what, n in sorted(seen.items()) if what not in totals}
    return {**totals, "seed": first, "seen": rest}


def never(seen: Counter[str], *situations: str) -> list[str]:
    """What a machine has not met: it says nothing about that."""
    return [situation for situation in situations if not seen[situation]]


def test_random_histories_keep_the_promises(engine: sa.Engine, note: Any) -> None:
    seen = histories(engine, range(6), steps=40)
    note(**told(seen, 0))
    assert not never(seen, *COMMON_SITUATIONS)


@pytest.mark.long
def test_hundreds_of_long_histories_keep_the_promises(engine: sa.Engine, note: Any) -> None:
    first = random.randrange(10**9)
    print(f"seeds from {first}")
    seen = histories(engine, range(first, first + 50), steps=60)
    note(**told(seen, first))
    assert seen["examples"] >= 400
    ways = [f"{way}, {how}" for way in SETTLE for how in ("strict", "or not")]
    assert not never(seen, *COMMON_SITUATIONS, *SELDOM_SITUATIONS, *ways)

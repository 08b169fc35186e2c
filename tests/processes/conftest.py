"""The kit and the worker's program on the path, a server to crash, and a team of processes.

What takes longer than seconds runs with ``pytest tests/processes -m long -n 0``, and the
big run by itself: ``python -m tests.processes.endurance``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

HERE = Path(__file__).parent
for place in (HERE, HERE.parent / "chaos"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from hands.team import Team  # noqa: E402
from kit import bouncer  # noqa: E402
from kit.proxy import Proxy  # noqa: E402
from kit.servers import Address, OwnServer, own_server  # noqa: E402

_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; run with `-m long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        *(["long"] if "long" not in config.option.markexpr else []),
        *(["pgbouncer"] if not bouncer.BINARY else []),
    ]
    out = {item for item in items if any(item.get_closest_marker(name) for name in left_out)}
    config.hook.pytest_deselected(items=[*out])
    items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session")
def own() -> Iterator[OwnServer]:
    """A server that may be crashed: never the one that other tests share."""
    with own_server() as server:
        yield server


@pytest.fixture
def address(own: OwnServer) -> Address:
    """A database of one's own on it, with the queue's tables, the books and a queue ``mail``."""
    return own.database(f"hands{next(_numbers)}")


@pytest.fixture
def engine(address: Address) -> Iterator[sa.Engine]:
    """Directly on it, for sending and for the audit."""
    engine = sa.create_engine(address.url(), poolclass=sa.NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def team(address: Address, engine: sa.Engine) -> Iterator[Team]:
    """Its processes are killed at the end, those that still run."""
    with Team(address, engine) as team:
        yield team


@pytest.fixture
def proxy(address: Address) -> Iterator[Proxy]:
    with Proxy(address.target) as proxy:
        yield proxy

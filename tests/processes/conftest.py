"""A server to crash, and a fleet of processes with consumers.

What takes longer than seconds runs with ``pytest tests/processes -m long -n 0``, and the
big run by itself: ``PYTHONPATH=tests python -m support.endurance``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from support import bouncer
from support.processes import ConsumerFleet
from support.proxy import Proxy
from support.servers import Address, OwnServer, own_server

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
    return own.database(f"processes{next(_numbers)}")


@pytest.fixture
def engine(address: Address) -> Iterator[sa.Engine]:
    """Directly on it, for sending and for the audit."""
    engine = sa.create_engine(address.url(), poolclass=sa.NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def fleet(address: Address, engine: sa.Engine) -> Iterator[ConsumerFleet]:
    """Its processes are killed at the end, those that still run."""
    with ConsumerFleet(address, engine) as fleet:
        yield fleet


@pytest.fixture
def proxy(address: Address) -> Iterator[Proxy]:
    with Proxy(address.target) as proxy:
        yield proxy

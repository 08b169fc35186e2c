"""A server to crash, and what is left out unless it is asked for.

The quick part runs with everything else. The long part (minutes)::

    pytest tests/chaos -m "long or not long" -n 0

The results are JSON lines in the folder ``PGQRS_CHAOS_RESULTS`` (default: a temporary one).

Where there is no ``pgbouncer`` (``apt-get install pgbouncer``; ``PGQRS_TEST_PGBOUNCER_BIN`` names
it elsewhere) the tests that need it are deselected, and the summary says so.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from support import bouncer
from support.results import Results, summary
from support.servers import Address, OwnServer, own_server

_numbers = itertools.count(1)
_left_out: list[str] = []
_written: list[Path] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if bouncer.BINARY:
        return
    out = [item for item in items if item.get_closest_marker("pgbouncer")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    _left_out[:] = [item.name for item in out]


@pytest.fixture(scope="session")
def own() -> Iterator[OwnServer]:
    """A server that may be crashed: never the one that other tests share."""
    with own_server() as server:
        yield server


@pytest.fixture(scope="session")
def chaos_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Open a file of results; it is printed as a table at the end of a run without xdist."""
    given = os.environ.get("PGQRS_CHAOS_RESULTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("chaos")

    def opened(title: str, **about: object) -> Results:
        results = Results(folder / f"{title}.jsonl", title, **about)
        _written.append(results.path)
        return results

    return opened


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for path in _written:
        terminalreporter.section(f"chaos: {path.stem}")
        terminalreporter.write_line(f"{path}\n{summary(path)}")
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} tests left out: there is no pgbouncer")


@pytest.fixture
def address(own: OwnServer) -> Address:
    """A database of one's own on it, with the queue's tables, the books and a queue ``mail``."""
    return own.database(f"chaos{next(_numbers)}")


@pytest.fixture
def engine(address: Address) -> Iterator[sa.Engine]:
    """Directly on it, for the audit."""
    engine = sa.create_engine(address.url(), poolclass=sa.NullPool)
    yield engine
    engine.dispose()

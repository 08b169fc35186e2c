"""One database a file, emptied before each test; and roles that really log in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa import metadata
from pgqrs_sa.grants import grants

PASSWORD = "Tr0ub4dor&3"  # noqa: S105 - of roles that live as long as a test


def empty(connection: sa.Connection) -> None:
    names = ", ".join(table.name for table in metadata.sorted_tables)
    connection.execute(sa.text(f"TRUNCATE {names}, shop_orders RESTART IDENTITY"))


@pytest.fixture
def migrated(kept: Any) -> Any:
    engine = sa.create_engine(kept.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        empty(connection)
    return kept


@pytest.fixture(scope="module")
def login(kept: Any) -> Iterator[Callable[..., sa.Engine]]:
    """Return a function that makes a role of a kind, or of several, and logs in as it.

    ``SET ROLE`` alone would not do: who has set a role may reset it.
    """
    owner = sa.create_engine(kept.url, poolclass=sa.NullPool)
    engines: dict[str, sa.Engine] = {}

    def make(*kinds: Any, more: tuple[str, ...] = ()) -> sa.Engine:
        name = "_".join(("sec", *kinds))
        if name not in engines:
            with owner.begin() as connection:
                connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
                connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
                for statement in (*(line for kind in kinds for line in grants(kind, name)), *more):
                    connection.exec_driver_sql(statement.format(name=name))
            url = sa.make_url(kept.url).set(username=name, password=PASSWORD)
            engines[name] = sa.create_engine(url)
        return engines[name]

    yield make
    for name, engine in engines.items():
        engine.dispose()
        with owner.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name} CASCADE")
            connection.exec_driver_sql(f"DROP ROLE {name}")

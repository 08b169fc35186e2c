"""One database a file, emptied before each test: making one takes longer than most tests here."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from pgqrs_sa import metadata

OF_THE_TEMPLATE = {*metadata.tables, "alembic_version", "shop_orders"}


@pytest.fixture
def migrated(kept: Any) -> Any:
    """The file's database: nothing is left of the test before, and ids begin with 1."""
    engine = sa.create_engine(kept.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
        inspector = sa.inspect(connection)
        for schema in {*inspector.get_schema_names()} - {"public", "information_schema"}:
            connection.execute(sa.schema.DropSchema(schema, cascade=True))
        for name in {*inspector.get_table_names()} - OF_THE_TEMPLATE:
            connection.execute(sa.text(f'DROP TABLE "{name}" CASCADE'))
        connection.execute(sa.text("DELETE FROM shop_orders"))
        for table in metadata.sorted_tables:
            ids = sa.func.pg_get_serial_sequence(table.name, "id")
            connection.execute(table.delete())
            connection.execute(sa.select(sa.func.setval(ids, 1, False)))
    return kept

"""The schema that a migration works in, if several are on the search path.

An application's statements find a table in the first schema of the ``search_path`` that has it.
A migration must not do that: with ``search_path = tenant, public`` it would create the tenant's
tables, but stamp, alter or drop those of ``public``. So ``schema=None`` means ``current_schema()``
here, where PostgreSQL creates tables, and every statement of a migration names it.

``current_schema()`` skips schemas that do not exist. That is right for a CREATE, but dangerous for
a DROP: existing tables are changed only if the path begins with their schema, not counting a
``"$user"`` that does not exist.
"""

from __future__ import annotations

import shlex

import sqlalchemy as sa

from .._core.sql import catalog
from .._core.tables import tables_of
from ..errors import IncompleteSchema, InvalidArgument
from ..models import Models

__all__ = [
    "KEEP_PATH",
    "NARROW_PATH",
    "RESTORE_PATH",
    "refuse_incomplete",
    "require",
    "target",
    "upgrade_command",
    "with_tables",
]

_TEMPORARY = "pg_temp_"

_FIRST = (
    "substring(regexp_replace(current_setting('search_path'), '^ *\"?[$]user\"? *(,|$)',"
    " CASE WHEN current_schema() = CURRENT_USER THEN '\"$user\",' ELSE '' END)"
    ' FROM \'^ *("(?:[^"]|"")*"|[^, ]*)\')'
)
"""The first entry of the search path, as it is written."""

_IS_FIRST = (
    f"(lower({_FIRST}) = current_schema()"
    f" OR {_FIRST} = '\"' || replace(current_schema(), '\"', '\"\"') || '\"'"
    f" OR {_FIRST} = '\"$user\"')"
)

_FIND = sa.text(f"SELECT current_schema() AS schema, {_FIRST} AS first, {_IS_FIRST} AS is_first")

# These settings last for the session, not only for the transaction: a script that runs outside a
# transaction must not return to the whole path in the middle.
KEEP_PATH = "SELECT set_config('pgqrs_sa.search_path', current_setting('search_path'), false)"
"""Save the search path."""

_STAYS = f"left(current_schema(), {len(_TEMPORARY)}) <> '{_TEMPORARY}'"

NARROW_PATH = {
    # Temporary tables would otherwise come first. Without a schema nothing can be created.
    changes_existing: (
        "SELECT set_config('search_path', CASE WHEN "
        f"{_STAYS}{f' AND {_IS_FIRST}' if changes_existing else ''}"
        " THEN quote_ident(current_schema()) || ', pg_temp' ELSE '' END, false)"
    )
    for changes_existing in (False, True)
}
"""Reduce the search path to a migration's schema. The key: whether it changes existing tables."""

RESTORE_PATH = "SELECT set_config('search_path', current_setting('pgqrs_sa.search_path'), false)"
"""Undo `NARROW_PATH`."""


def target(connection: sa.Connection, schema: str | None) -> str | None:
    """Return the schema that a migration works in, or None if the search path selects none.

    Args:
        connection: The connection; its ``schema_translate_map`` is applied.
        schema: The schema's plain name, or None for ``current_schema()``.
    """
    named = _named(connection, schema)
    return connection.scalar(sa.select(sa.func.current_schema())) if named is None else named


def require(connection: sa.Connection, schema: str | None, *, changes_existing: bool) -> str:
    """Return what `target` returns, or raise if the search path is ambiguous.

    Args:
        connection: The connection; its ``schema_translate_map`` is applied.
        schema: The schema's plain name, or None for ``current_schema()``.
        changes_existing: Refuse a search path that begins with another schema.

    Raises:
        InvalidArgument: the search path selects no schema, a temporary one, or not its first.
    """
    if (named := _named(connection, schema)) is not None:
        return named
    row = connection.execute(_FIND).one()
    if row.schema is None:
        problem = f"selects no schema: it begins with {row.first or 'nothing'}"
    elif row.schema.startswith(_TEMPORARY):
        problem = (
            "begins with a temporary schema, whose tables and messages are lost when the "
            "connection ends"
        )
    elif changes_existing and not row.is_first:
        problem = (
            f"begins with {row.first}, which does not exist or may not be used by this role: "
            f"the tables of {row.schema!r} are not changed for it"
        )
    else:
        return str(row.schema)
    raise InvalidArgument(f"the search_path {problem}; name the schema, or set another search_path")


def refuse_incomplete(connection: sa.Connection, schema: str) -> None:
    """Raise if a schema has some of the tables, but not all.

    Raises:
        IncompleteSchema: it names the missing tables.
    """
    present = set(sa.inspect(connection).get_table_names(schema=schema))
    missing = [table.name for table in tables_of(Models()) if table.name not in present]
    if 0 < len(missing) < len(tables_of(Models())):
        raise IncompleteSchema(schema, missing)


def upgrade_command(connection: sa.Connection, schema: str | None) -> str:
    """Return the shell command that creates or upgrades the tables of a database.

    It is Alembic's if the schema has a history of revisions, otherwise ``pgqrs install``.

    Args:
        connection: A connection to the database.
        schema: The schema of the tables; None follows the ``search_path``.
    """
    if connection.scalar(catalog.has_history, {"schema": schema}):
        return "alembic upgrade head"
    options = () if schema is None else ("--schema", schema)
    return shlex.join(("pgqrs", *options, "install"))


def with_tables(connection: sa.Connection) -> list[str]:
    """Return the names of the schemas that have a table of queues, in order."""
    return list(connection.scalars(catalog.schemas_with, {"name": "pgqrs_queues"}))


def _named(connection: sa.Connection, schema: str | None) -> str | None:
    mapped = connection.get_execution_options().get("schema_translate_map") or {}
    named: str | None = mapped.get(schema, schema)
    return named

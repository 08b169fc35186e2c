"""The schema of the four tables as numbered steps, and how a host's Alembic applies them.

A host's ``env.py`` lists the plugin and the library's MetaData, and takes the lock first::

    from pgqrs_sa import metadata as pgqrs_metadata
    from pgqrs_sa import migrations

    context.configure(
        connection=connection,
        target_metadata=[pgqrs_metadata, Base.metadata],
        autogenerate_plugins=["alembic.autogenerate.*", "pgqrs_sa"],
    )
    with context.begin_transaction():
        migrations.lock(context)        # several instances may start at once: one migrates
        context.run_migrations()

``alembic revision --autogenerate`` then writes into the host's own history::

    import pgqrs_sa.migrations

    def upgrade():   op.pgqrs_upgrade(from_version=0, to_version=1)
    def downgrade(): op.pgqrs_downgrade(from_version=1, to_version=0)

A later release that changes the tables makes ``alembic check`` fail until the next autogenerate
has written ``op.pgqrs_upgrade(from_version=1, to_version=2)``. Columns and indexes that the host
adds to the tables are written as ordinary operations.

=================================  ==============================================================
the models are declared            in ``context.configure``
=================================  ==============================================================
ready-made, or on the host's own   nothing more: every schema with such tables is handled;
MetaData                           ``include_schemas=True`` lets Alembic see named schemas
not in ``target_metadata``         ``pgqrs_schemas=[None, "jobs"]`` names the schemas; None is the
                                   default schema
=================================  ==============================================================

Queues that `pgqrs_sa.declare_queues` has attached to a MetaData of ``target_metadata`` are
compared, too: ``op.pgqrs_queue("mail", lease=60)`` is written for each missing queue. It creates
the queue unless it exists; ``op.pgqrs_drop_queue("mail")`` in the downgrade deletes it only if it
is empty. Queues in a plain list, for a consumer or ``service.queues.sync``, are not compared.

``schema=None`` is the connection's ``current_schema()``, the first existing schema of the
``search_path``, and needs no right to create schemas. A named schema is created if it is missing,
and never dropped, since other applications may use it. With a ``search_path`` of several schemas,
as for tenants, also set ``version_table_schema``: Alembic looks for its own table along the whole
path.

Without the plugin, plain autogenerate and ``metadata.create_all()`` create the same tables, with
the same version stamp (SQLAlchemy 2.0 cannot autogenerate the autovacuum settings of a table).
They cannot upgrade the tables: Alembic does not see a changed predicate, CHECK or setting. With
plain autogenerate, list ``pgqrs_metadata`` before a MetaData that has foreign keys to it.

The version is the comment of ``pgqrs_queues``. Nothing here imports Alembic unless the process
has imported it already: `current_version` and `check` work without it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from ..errors import SchemaVersionError
from ..models import VERSION_COMMENT, Models
from . import schemas, v0001

if TYPE_CHECKING:
    from alembic.operations import Operations

__all__ = ["LATEST", "LOCK_KEY", "OLDEST", "STEPS", "Step", "check", "current_version", "lock"]

_log = logging.getLogger(__name__)


class Step(Protocol):
    """A module with the steps to a version of the schema and back."""

    def upgrade(self, op: Operations, schema: str | None) -> None:
        """Change the tables from the previous version to this one."""

    def downgrade(self, op: Operations, schema: str | None) -> None:
        """Change the tables back to the previous version."""


STEPS: Mapping[int, Step] = {1: v0001}
"""The step that leads to each version."""

LATEST = max(STEPS)
"""The version that this release creates."""

OLDEST = 1
"""The oldest version that this release works on: a deploy may start the code before it migrates."""

LOCK_KEY = int.from_bytes(b"pgqrs_sa", "big")
"""The key of the advisory lock that migrations take. ``pg_locks`` shows it in two halves."""

_LOCK = sa.text(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
_TRY_LOCK = sa.text(f"SELECT pg_try_advisory_xact_lock({LOCK_KEY})")
_HOLDERS = sa.text(
    "SELECT format('pid %s', pid) FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND granted"
    " AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())"
    " AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = :key AND objsubid = 1"
    " ORDER BY pid"
).bindparams(sa.bindparam("key", LOCK_KEY, sa.BigInteger))

_STAMP = sa.text(
    "SELECT n.nspname AS schema, obj_description(c.oid, 'pg_class') AS comment"
    " FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE c.oid = to_regclass(coalesce(quote_ident(:schema) || '.', '') || 'pgqrs_queues')"
).bindparams(sa.bindparam("schema", type_=sa.Text))

TOO_NEW = "a newer release made it: pip install --upgrade pgqrs-sa"
"""The advice for a version that this release does not know."""


class _Executes(Protocol):
    def execute(self, statement: sa.TextClause, /) -> Any: ...


def lock(connection: _Executes) -> None:
    """Take the migration lock until the transaction ends; wait while another process migrates.

    Call it first inside ``context.begin_transaction()``: Alembic reads afterwards which revisions
    are applied, so a process that had to wait finds nothing left to do. The operations take the
    lock too, but by then Alembic has already read the revisions.

    The lock belongs to a transaction. With ``transaction_per_migration=True``, or once a revision
    leaves the transaction with ``autocommit_block()``, it covers only the first part: then let only
    one process migrate. The operations refuse to run in such a block. The isolation level must be
    PostgreSQL's default, READ COMMITTED: at the stricter levels, a process that had to wait still
    sees the database as it was before. A process that has to wait logs a warning first.

    Args:
        connection: A `sqlalchemy.Connection`, or ``alembic.context``, which also writes the
            statement to an offline (``--sql``) script.
    """
    online = _online(connection)
    if online is None:
        connection.execute(_LOCK)
    elif not online.scalar(_TRY_LOCK):
        holders = online.scalars(_HOLDERS).all()
        _log.warning("waiting for another migration to end: %s", ", ".join(holders) or "it is over")
        online.execute(_LOCK)


def _online(connection: _Executes) -> sa.Connection | None:
    """Return the connection, or None in Alembic's offline mode (``--sql``)."""
    if isinstance(connection, sa.Connection):
        return connection
    get_context = getattr(connection, "get_context", None)  # of alembic.context, and of op
    context = connection if get_context is None else get_context()
    found = None if getattr(context, "as_sql", True) else getattr(context, "connection", None)
    return found if isinstance(found, sa.Connection) else None


class Stamp(NamedTuple):
    """The version in the comment of the table ``pgqrs_queues``.

    Attributes:
        schema: The schema of the table; None if the table does not exist.
        version: The version in its comment; None if the comment has none.
    """

    schema: str | None
    version: int | None


def read_stamp(connection: sa.Connection, schema: str | None = None) -> Stamp:
    """Return the version of the tables in a schema, or of those on the ``search_path``.

    Args:
        connection: A connection.
        schema: The schema's plain name, or None to look along the ``search_path``. Operations that
            change the tables get the schema from `schemas.target` first.
    """
    row = connection.execute(_STAMP, {"schema": schema}).one_or_none()
    if row is None:
        return Stamp(None, None)
    digits = (row.comment or "").partition(VERSION_COMMENT)[2]
    return Stamp(row.schema, int(digits) if digits.isdecimal() else None)


def current_version(connection: sa.Connection, schema: str | None = None) -> int | None:
    """Return the version of the queue schema in the database, or None if it has none.

    It is the version that a migration would find. With several schemas on the ``search_path``, an
    application may work on the tables of another schema than the first: `check` is about those.

    Args:
        connection: A connection; from asyncio, ``await connection.run_sync(current_version)``.
        schema: The schema's plain name, or None for ``current_schema()``.
    """
    place = schemas.target(connection, schema)
    return None if place is None else read_stamp(connection, place).version


def check(
    bind: Session | sa.Connection, schema: str | None = None, *, models: Models | None = None
) -> None:
    """Raise unless this release works on the schema version of the database.

    Args:
        bind: A session or a connection; from asyncio, ``await session.run_sync(check)``.
        schema: The schema's plain name. Default: the schema of the models; if they have none, the
            tables are looked up along the ``search_path``, as statements find them.
        models: The host's own classes. Default: the ready-made ones.

    Raises:
        SchemaVersionError: the queue schema is missing, too old or too new. The message names the
            command to run.
    """
    queue = (models or Models()).queue
    if isinstance(bind, Session):
        bind = bind.connection(bind_arguments={"mapper": sa.inspect(queue)})
    if schema is None:
        # Where the connection sees the table: a schema_translate_map may move it.
        schema = bind.schema_for_object(sa.inspect(queue).local_table)
    stamp = read_stamp(bind, schema)
    if stamp.version is None or not OLDEST <= stamp.version <= LATEST:
        place = stamp.schema or schema
        raise SchemaVersionError(stamp.version, LATEST, place, _hint(stamp))


def _hint(stamp: Stamp) -> str:
    if stamp.version is not None and stamp.version > LATEST:
        return TOO_NEW
    if stamp.version is None and stamp.schema is not None:
        return unstamped(stamp.schema)
    return (
        "run `alembic upgrade head`, and before that `alembic revision --autogenerate` if no "
        f"revision calls op.pgqrs_upgrade(to_version={LATEST}) yet"
    )


def unstamped(schema: str) -> str:
    """Return the advice for tables without a version."""
    # A driver's style would double the percent signs of the name.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
    table = f"{dialect.identifier_preparer.quote(schema)}.pgqrs_queues"
    return (
        f"the table {table} exists without its version, which is kept in its comment and lost "
        f"by pg_dump --no-comments: COMMENT ON TABLE {table} IS '{VERSION_COMMENT}<version>'"
    )


# A host's revision imports this module for its operations, after Alembic. If Alembic is imported
# later, the entry point registers them, so a worker that only checks the version never pays for
# importing Alembic.
if sys.modules.get("alembic") is not None:
    from . import ops as _ops  # noqa: F401

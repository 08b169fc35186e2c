"""The schema of the four tables as numbered steps, and how a host's Alembic applies them.

A host's ``env.py`` lists the plugin, the library's MetaData, and takes the lock first::

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
adds to the tables stay the host's: they are written as ordinary operations.

=================================  ==============================================================
the models are declared            in ``context.configure``
=================================  ==============================================================
ready-made, or on the host's own   nothing more: every schema with such tables is taken care of;
MetaData                           ``include_schemas=True`` lets Alembic see named ones
not in ``target_metadata``         ``pgqrs_schemas=[None, "jobs"]`` names the schemas; None is the
                                   default one
=================================  ==============================================================

``schema=None`` is wherever the connection's ``search_path`` points, and needs no right to create
schemas. A named schema is created when it is missing, and never dropped: others may use it.

Without the plugin, plain autogenerate and ``metadata.create_all()`` make the same tables, with
the same version stamp (SQLAlchemy 2.0 cannot autogenerate the autovacuum settings of a table).
What they cannot do is upgrade: Alembic does not see a changed predicate, CHECK or setting. With
plain autogenerate, list ``pgqrs_metadata`` before a MetaData that has foreign keys to it.

The version is the comment of ``pgqrs_queues``. Nothing here imports Alembic, unless the process
has done so: `current_version` and `check` work without it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ..errors import SchemaVersionError
from ..models import VERSION_COMMENT, Models
from . import v0001

if TYPE_CHECKING:
    from alembic.operations import Operations

__all__ = ["LATEST", "LOCK_KEY", "OLDEST", "STEPS", "Step", "check", "current_version", "lock"]


class Step(Protocol):
    """What a step module holds: one version of the schema, forwards and backwards."""

    def upgrade(self, op: Operations, schema: str | None) -> None:
        """Make the tables of the version before into those of this one."""

    def downgrade(self, op: Operations, schema: str | None) -> None:
        """Undo it."""


STEPS: Mapping[int, Step] = {1: v0001}
"""The step that leads to each version."""

LATEST = max(STEPS)
"""The version that this release makes."""

OLDEST = 1
"""The oldest version that this release works on: deploys may run the code before the step."""

LOCK_KEY = int.from_bytes(b"pgqrs_sa", "big")
"""The key of the advisory lock that migrations take, as ``pg_locks`` shows it in two halves."""

_LOCK = sa.text(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")

_STAMP = sa.text(
    "SELECT found.id IS NOT NULL, obj_description(found.id, 'pg_class') FROM (SELECT CAST("
    "to_regclass(coalesce(quote_ident(:schema) || '.', '') || 'pgqrs_queues') AS oid) AS id)"
    " AS found"
).bindparams(sa.bindparam("schema", type_=sa.Text))

UNSTAMPED = (
    "the table pgqrs_queues is there without its version, which is kept in its comment and lost "
    f"by pg_dump --no-comments: COMMENT ON TABLE pgqrs_queues IS '{VERSION_COMMENT}<version>'"
)
"""What to do about tables whose version nobody knows."""

TOO_NEW = "a newer release made it: pip install --upgrade pgqrs-sa"
"""What to do about a version that this release does not know."""


class _Executes(Protocol):
    def execute(self, statement: sa.TextClause, /) -> Any: ...


def lock(connection: _Executes) -> None:
    """Wait until no other process migrates; the lock ends with the transaction.

    Call it first inside ``context.begin_transaction()``: Alembic reads which revisions are applied
    after that, so that whoever had to wait finds nothing left to do. The operations take the lock
    too, but what Alembic has read before them is stale by then.

    The lock belongs to a transaction. With ``transaction_per_migration=True``, or once a revision
    leaves the transaction by ``autocommit_block()``, it covers the first part only: let a single
    process migrate then. The isolation level has to be PostgreSQL's default, READ COMMITTED: under
    the stricter ones, who waited still sees the database as it was before.

    Args:
        connection: A `sqlalchemy.Connection`, or ``alembic.context``, which also writes the
            statement to an offline (``--sql``) script.
    """
    connection.execute(_LOCK)


def read_stamp(connection: sa.Connection, schema: str | None = None) -> tuple[bool, int | None]:
    """Return whether ``pgqrs_queues`` is there, and the version in its comment."""
    found, comment = connection.execute(_STAMP, {"schema": schema}).one()
    digits = (comment or "").partition(VERSION_COMMENT)[2]
    return found, int(digits) if digits.isdecimal() else None


def current_version(connection: sa.Connection, schema: str | None = None) -> int | None:
    """Return the version that the database has, or None when it has none.

    Args:
        connection: A connection; from asyncio, ``await connection.run_sync(current_version)``.
        schema: The schema's plain name, or None to follow the ``search_path``.
    """
    return read_stamp(connection, schema)[1]


def check(
    bind: Session | sa.Connection, schema: str | None = None, *, models: Models | None = None
) -> None:
    """Raise unless this release works on the version that the database has.

    Args:
        bind: A session or a connection; from asyncio, ``await session.run_sync(check)``.
        schema: The schema's plain name; by default that of the models.
        models: The host's own classes, if it has any.

    Raises:
        SchemaVersionError: There is no queue schema, or it is too old or too new. The message
            names the command to run.
    """
    queue = (models or Models()).queue
    if isinstance(bind, Session):
        bind = bind.connection(bind_arguments={"mapper": sa.inspect(queue)})
    if schema is None:
        # Where the connection sees the table: a schema_translate_map may move it.
        schema = bind.schema_for_object(sa.inspect(queue).local_table)
    found, installed = read_stamp(bind, schema)
    if installed is None or not OLDEST <= installed <= LATEST:
        raise SchemaVersionError(installed, LATEST, schema, _hint(installed, found=found))


def _hint(installed: int | None, *, found: bool) -> str:
    if installed is not None and installed > LATEST:
        return TOO_NEW
    if found and installed is None:
        return UNSTAMPED
    return (
        "run `alembic upgrade head`, and before that `alembic revision --autogenerate` if no "
        f"revision calls op.pgqrs_upgrade(to_version={LATEST}) yet"
    )


# A host's revision imports this module to have its operations, and Alembic is there by then.
# In the other order the entry point registers them as soon as anything imports Alembic, so a
# worker that only checks the version never pays for that import.
if sys.modules.get("alembic") is not None:
    from . import ops as _ops  # noqa: F401

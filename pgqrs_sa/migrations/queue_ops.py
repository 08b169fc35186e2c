"""The operations that create a declared queue in a host's revision, and take it back.

``op.pgqrs_queue("mail", lease=60)`` creates a queue if it is missing, with the settings of a
`pgqrs_sa.DeclaredQueue`; one that exists stays as it is. ``op.pgqrs_drop_queue("mail")``, its
opposite, deletes the queue only if it is empty: no message, live or archived, is lost by a
downgrade. One that holds messages stays, and a later upgrade finds it.

Autogenerate writes them for queues that `pgqrs_sa.declare_queues` has attached to a MetaData.

As `ops`, this module is imported while Alembic is half imported; `ops` itself may be so, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from sqlalchemy.dialects.postgresql import insert

from .. import schema_models
from .._core.sql.queues import LockTable, holds_nothing
from ..declared import DeclaredQueue
from ..types import Seconds
from . import ops, schemas

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["CreateQueueOp", "DropQueueOp"]

_log = logging.getLogger(__name__)


class _QueueOp(MigrateOperation):
    """An operation about one queue.

    Attributes:
        queue: The queue and its settings.
        schema: Where the tables are; None is ``current_schema()``.
    """

    def __init__(self, queue: DeclaredQueue, schema: str | None = None) -> None:
        self.queue = queue
        self.schema = schema


@Operations.register_operation("pgqrs_queue")
class CreateQueueOp(_QueueOp):
    """Create a queue if it is missing."""

    @classmethod
    def pgqrs_queue(
        cls,
        operations: Operations,
        name: str,
        *,
        lease: Seconds | None = None,
        max_read_ct: int | None = None,
        retention: Seconds | None = None,
        max_payload_bytes: int | None = None,
        schema: str | None = None,
    ) -> None:
        """Create a queue if it is missing; the settings are those of `DeclaredQueue`."""
        queue = DeclaredQueue(name, lease, max_read_ct, retention, max_payload_bytes)
        operations.invoke(cls(queue, schema))

    def reverse(self) -> DropQueueOp:
        """Return the operation that undoes this one."""
        return DropQueueOp(self.queue, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("pgqrs_queue", self.schema, self.queue.name)


@Operations.register_operation("pgqrs_drop_queue")
class DropQueueOp(_QueueOp):
    """Delete a queue if it is empty."""

    @classmethod
    def pgqrs_drop_queue(
        cls, operations: Operations, name: str, *, schema: str | None = None
    ) -> None:
        """Delete a queue if it holds no message, live or archived."""
        operations.invoke(cls(DeclaredQueue(name), schema))

    def reverse(self) -> CreateQueueOp:
        """Return the operation that undoes this one."""
        return CreateQueueOp(self.queue, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("pgqrs_drop_queue", self.schema, self.queue.name)


@Operations.implementation_for(CreateQueueOp)
def _create(operations: Operations, op: CreateQueueOp) -> None:
    with _begun(operations, op.schema) as tables:
        queue = tables["pgqrs_queues"]
        operations.execute(
            insert(queue)
            .values(queue_name=op.queue.name, **op.queue.settings())
            .on_conflict_do_nothing(index_elements=[queue.c.queue_name])
        )


@Operations.implementation_for(DropQueueOp)
def _drop(operations: Operations, op: DropQueueOp) -> None:
    with _begun(operations, op.schema) as tables:
        queue = tables["pgqrs_queues"]
        # As `Queues.delete`: no foreign key would refuse a message that is being enqueued.
        operations.execute(LockTable(tables["pgqrs_messages"]))
        operations.execute(
            sa.delete(queue).where(
                queue.c.queue_name == op.queue.name,
                holds_nothing(queue.c.id, tables["pgqrs_messages"], tables["pgqrs_archive"]),
            )
        )
        if not operations.get_context().as_sql:
            found = sa.select(queue.c.id).where(queue.c.queue_name == op.queue.name)
            if operations.get_bind().scalar(found) is not None:
                _log.warning("queue %r holds messages, and is not deleted", op.queue.name)


@contextmanager
def _begun(operations: Operations, schema: str | None) -> Iterator[dict[str, sa.Table]]:
    """Yield the tables by their names, as the statements name them."""
    if operations.get_context().as_sql:
        with ops.offline(operations, schema, changes_existing=True):
            yield _tables(schema)
        return
    connection = operations.get_bind()
    place = schemas.require(connection, schema, changes_existing=True)
    with ops.untranslated(connection):
        yield _tables(place)


def _tables(schema: str | None) -> dict[str, sa.Table]:
    # A pristine copy, without what a host has added.
    found = schema_models.tables_in("pg_temp" if schema is None else schema)
    if schema is not None:
        return dict(found)
    metadata, unnamed = sa.MetaData(), cast("Any", None)  # SQLAlchemy takes it, its types do not
    return {name: table.to_metadata(metadata, schema=unnamed) for name, table in found.items()}


@renderers.dispatch_for(CreateQueueOp)
def _render_create(context: AutogenContext, op: CreateQueueOp) -> str:
    settings = {
        "lease": op.queue.lease,
        "max_read_ct": op.queue.max_read_ct,
        "retention": op.queue.retention,
        "max_payload_bytes": op.queue.max_payload_bytes,
    }
    return _rendered(context, "pgqrs_queue", op, settings)


@renderers.dispatch_for(DropQueueOp)
def _render_drop(context: AutogenContext, op: DropQueueOp) -> str:
    return _rendered(context, "pgqrs_drop_queue", op, {})


def _rendered(context: AutogenContext, name: str, op: _QueueOp, settings: dict[str, Any]) -> str:
    context.imports.add(ops.IMPORT)
    given = {key: _plain(value) for key, value in settings.items() if value is not None}
    if op.schema is not None:
        given["schema"] = str(op.schema)
    arguments = ", ".join([repr(op.queue.name), *(f"{k}={v!r}" for k, v in given.items())])
    return f"{context.opts['alembic_module_prefix']}{name}({arguments})"


def _plain(value: Any) -> Any:
    """Return a setting as a revision can write it without an import."""
    return value.total_seconds() if isinstance(value, timedelta) else value

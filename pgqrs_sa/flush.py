"""What makes ``session.add(Message(...))`` an enqueue.

The listeners are on `MessageMixin` and so on mapped messages alone, never on ``Session`` or
``Mapper``. As the messages of a flush are about to be inserted, one SELECT finds the queues that
they name, and refuses what `enqueue` would refuse, before any of them is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, object_session

from . import arguments
from .codecs import JsonCodec
from .errors import DuplicateMessage, InvalidArgument, QueueNotFound
from .mixins import MessageMixin
from .operations.enqueue import check_size
from .statements import flush as statements

__all__: list[str] = []

_CHECKED = "_pgqrs_checked"


@event.listens_for(MessageMixin, "before_insert", propagate=True)
def _before_insert(mapper: Mapper[Any], connection: sa.Connection, target: MessageMixin) -> None:
    # The first of a flush is checked together with all others of its class.
    if target.__dict__.pop(_CHECKED, False):
        return
    session = object_session(target)
    added = [] if session is None else [one for one in session.new if type(one) is type(target)]
    _check(mapper, connection, added)
    for message in added:
        if message is not target:
            message.__dict__[_CHECKED] = True


def _check(mapper: Mapper[Any], connection: sa.Connection, added: Sequence[MessageMixin]) -> None:
    queues = _queue_table(mapper)
    rows = connection.execute(
        statements.accepts(queues),
        {
            "names": sorted({name for one in added if (name := one.queue_name) is not None}),
            "ids": sorted({one.queue_id for one in added if one.queue_id is not None}),
        },
    ).all()
    by_name = {row.queue_name: row for row in rows}
    by_id = {row.id: row for row in rows}
    for message in added:
        name = message.queue_name
        row = by_id.get(message.queue_id) if name is None else by_name.get(name)
        if row is None:
            raise _not_found(connection, queues, message)
        message.queue_id = row.id
        # Once more: a payload can be changed in place after it was assigned.
        size = len(JsonCodec().dumps(message.payload).encode())
        check_size(row.queue_name, size, row.max_payload_bytes)
    _check_keys(mapper, connection, [one for one in added if one.dedup_key is not None])


def _check_keys(
    mapper: Mapper[Any], connection: sa.Connection, keyed: Sequence[MessageMixin]
) -> None:
    """Refuse a key that is live: the INSERT would fail, and take the transaction with it."""
    if not keyed:
        return
    wanted = {(one.queue_id, one.dedup_key) for one in keyed}
    if len(wanted) < len(keyed):
        raise InvalidArgument("two messages of this flush have the same queue and dedup_key")
    messages: Any = mapper.local_table
    values = {"ids": [queue for queue, _ in wanted], "keys": [key for _, key in wanted]}
    for row in connection.execute(statements.keyed(messages), values):
        if (row.queue_id, row.dedup_key) in wanted:
            raise DuplicateMessage(row.dedup_key, row.id)


def _queue_table(mapper: Mapper[Any]) -> sa.Table:
    """The queues beside this table of messages: a message's class knows no other class."""
    table: Any = mapper.local_table
    key = "pgqrs_queues" if table.schema is None else f"{table.schema}.pgqrs_queues"
    queues: sa.Table = table.metadata.tables[key]
    return queues


def _not_found(
    connection: sa.Connection, queues: sa.Table, message: MessageMixin
) -> QueueNotFound | InvalidArgument:
    name = message.queue_name
    id_: int | None = message.queue_id
    if name is None and id_ is None:
        return InvalidArgument("a message needs a queue: Message(queue_name=..., payload=...)")
    if name is None:
        return QueueNotFound(message.queue_id)
    known = connection.execute(statements.names(queues)).scalars().all()
    return QueueNotFound(name, arguments.suggestions(name, known))

"""Listeners on ``Session`` and on messages: ``session.add(Message(...))`` is an enqueue.

When messages are about to be flushed, one SELECT finds the queues that they name, and the checks
of `enqueue` are made. That happens before the flush begins, so that a refusal costs the caller
nothing but the message: take it out with ``session.expunge(message)``, and go on.

The listeners are on every ``Session``, since there is no other hook ahead of a flush; they look at
new objects only, and leave a flush without new messages as it was. A message that another listener
adds after that is checked when its row is inserted, where a refusal costs the transaction.

The mixin of messages is a parameter of `listen`, which `pgqrs_sa.models` calls: nothing in
`pgqrs_sa._core` imports the models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session, object_session

from .. import validation
from ..codecs import JsonCodec
from ..declared import DeclaredQueue
from ..errors import DuplicateMessage, InvalidArgument, QueueNotFound
from . import sessions, states, wakeup
from .enqueue import check_size
from .sql import enqueue as statements
from .sql import queues as queue_statements
from .sql.wakeup import visible
from .tables import sibling_table

if TYPE_CHECKING:
    from ..mixins import MessageMixin

__all__ = ["ALLOW_AUTOCOMMIT", "CREATE_QUEUES", "listen"]

ALLOW_AUTOCOMMIT = "pgqrs_allow_autocommit"
"""Set this in ``session.info`` to add messages on a connection that is in AUTOCOMMIT."""

CREATE_QUEUES = "pgqrs_create_queues"
"""Set this in ``session.info`` to create queues that do not exist when messages are added."""

_CHECKED = "_pgqrs_checked"
_STRICT = JsonCodec()


def listen(mixin: type[MessageMixin]) -> None:
    """Check instances of a mixin as `enqueue` does when they are flushed.

    Args:
        mixin: The mixin of messages. Call this once for it.
    """

    @event.listens_for(Session, "before_flush")
    def before_flush(session: Session, _context: Any, _instances: Any) -> None:
        _check_new(session, mixin)

    @event.listens_for(mixin, "before_insert", propagate=True)
    def before_insert(mapper: Mapper[Any], connection: sa.Connection, target: MessageMixin) -> None:
        _check_inserted(mapper, connection, target)

    @event.listens_for(Session, "after_flush")
    def after_flush(session: Session, _context: Any) -> None:
        if sessions.TOUCHED in session.info:
            sessions.refuse_split(session)
        if session.info.get(wakeup.NOTIFY):
            _notify(session, mixin)


def _check_new(session: Session, mixin: type[MessageMixin]) -> None:
    """Check all messages that a flush is about to insert."""
    by_class: dict[type[Any], list[MessageMixin]] = {}
    for added in session.new:
        # A queue given by a relationship of the host's is known only once its row exists.
        if isinstance(added, mixin) and not _queue_comes_later(added):
            by_class.setdefault(type(added), []).append(added)
    for cls, messages in by_class.items():
        mapper = sa.inspect(cls)
        connection = sessions.connect(session, {"mapper": mapper})
        _check(mapper, connection, messages)
        for message in messages:
            message.__dict__[_CHECKED] = True


def _check_inserted(mapper: Mapper[Any], connection: sa.Connection, message: MessageMixin) -> None:
    """Check a message that did not exist when the flush began, and where each is inserted."""
    session = object_session(message)
    if session is not None and not sessions.is_plain(session):
        _refuse_elsewhere(session, mapper, connection)
    if not message.__dict__.pop(_CHECKED, False):
        _check(mapper, connection, [message])
    # The delay given to the constructor is spent: a later change of vt is about something else.
    message.__dict__.pop("_pgqrs_when", None)


def _refuse_elsewhere(session: Session, mapper: Mapper[Any], connection: sa.Connection) -> None:
    if sessions.connect(session, {"mapper": mapper}) is not connection:
        raise InvalidArgument(
            f"the shard_chooser puts a {mapper.class_.__name__} into another shard than the one in "
            "which this session executes statements about it: let it return that one"
        )


def _notify(session: Session, mixin: type[MessageMixin]) -> None:
    """Notify consumers that wait for messages that a flush has inserted."""
    by_class: dict[type[Any], list[int]] = {}
    for added in session.new:
        if isinstance(added, mixin):
            by_class.setdefault(type(added), []).append(added.id)
    for cls, ids in by_class.items():
        mapper = sa.inspect(cls)
        connection = sessions.connect(session, {"mapper": mapper})
        messages: Any = mapper.local_table
        if channel := wakeup.channel_on(connection, messages):
            queues, workers = (
                sibling_table(messages, name) for name in ("pgqrs_queues", "pgqrs_workers")
            )
            statement = visible(queues, messages, workers, notify=True, inserted=True)
            connection.execute(statement, {"ids": ids, **channel})


def _queue_comes_later(message: MessageMixin) -> bool:
    id_: int | None = message.queue_id
    if message.queue_name is not None or id_ is not None:
        return False
    mapper = sa.inspect(type(message))
    queues = _queue_table(mapper)
    return any(
        message.__dict__.get(relationship.key) is not None
        for relationship in mapper.relationships
        if relationship.mapper.local_table is queues
    )


def _check(mapper: Mapper[Any], connection: sa.Connection, added: Sequence[MessageMixin]) -> None:
    """Refuse what `enqueue` refuses, and put the ids of the queues where their names were."""
    sessions.refuse_dialect(connection)
    session = object_session(added[0])
    if session is None or not session.info.get(ALLOW_AUTOCOMMIT):
        sessions.refuse_autocommit(connection, f"session.info[{ALLOW_AUTOCOMMIT!r}] = True")
    sizes = [_checked_size(message) for message in added]
    queues = _queue_table(mapper)
    messages: Any = mapper.local_table
    names = {name for message in added if (name := message.queue_name) is not None}
    values = {
        "names": sorted(names),
        "ids": sorted({message.queue_id for message in added if message.queue_id is not None}),
    }
    accepts = statements.accepts(queues, messages)
    rows = connection.execute(accepts, values).all()
    missing = names - {row.queue_name for row in rows}
    if missing and session is not None and session.info.get(CREATE_QUEUES):
        _create(connection, queues, missing)
        rows = connection.execute(accepts, values).all()
    by_name = {row.queue_name: row for row in rows}
    by_id = {row.id: row for row in rows}
    for message, size in zip(added, sizes, strict=True):
        name = message.queue_name
        row = by_id.get(message.queue_id) if name is None else by_name.get(name)
        if row is None:
            raise _not_found(connection, queues, message)
        check_size(row.queue_name, size, row.max_payload_bytes)
        message.queue_id = row.id
        if session is not None and not message.__dict__.get("_pgqrs_when", {}).get("delay"):
            wakeup.mark_enqueued(session, row.queue_name, mapper)
    _check_keys(mapper, connection, [message for message in added if message.dedup_key is not None])


def _create(connection: sa.Connection, queues: sa.Table, names: Collection[str]) -> None:
    missing = [DeclaredQueue(name) for name in sorted(names)]
    values = queue_statements.columns_of(missing)
    connection.execute(queue_statements.create_missing(queues), values)


def _checked_size(message: MessageMixin) -> int:
    """Return how many bytes a payload takes, or raise for what `enqueue` refuses."""
    if message.queue_name is None and message.queue_id is None:
        raise InvalidArgument(
            "a message needs a queue: Message(queue_name=..., payload=...). session.merge() loses "
            "the name: use session.add(), or give queue_id"
        )
    if "payload" not in message.__dict__:
        raise InvalidArgument("a message needs a payload: Message(queue_name=..., payload=...)")
    # Checked again: both can be changed in place after they were assigned.
    size = len(_STRICT.dumps(message.payload).encode())
    validation.headers_text(message.headers)
    if isinstance(message.vt, datetime):
        expression: Any = states.never_past(message.vt)
        message.vt = expression
    return size


def _check_keys(
    mapper: Mapper[Any], connection: sa.Connection, keyed: Sequence[MessageMixin]
) -> None:
    """Refuse a key that is live: the INSERT would fail, and take the transaction with it."""
    wanted: set[tuple[int, str | None]] = set()
    for message in keyed:
        if (message.queue_id, message.dedup_key) in wanted:
            raise InvalidArgument(
                f"two messages of this flush have the key {message.dedup_key!r}: add one of them"
            )
        wanted.add((message.queue_id, message.dedup_key))
    if not wanted:
        return
    messages: Any = mapper.local_table
    values = {"ids": [queue for queue, _ in wanted], "keys": [key for _, key in wanted]}
    for row in connection.execute(statements.live_keys_by_queue_id(messages), values):
        if (row.queue_id, row.dedup_key) in wanted:
            raise DuplicateMessage(row.dedup_key, row.id)


def _queue_table(mapper: Mapper[Any]) -> sa.Table:
    messages: Any = mapper.local_table
    return sibling_table(messages, "pgqrs_queues")


def _not_found(connection: sa.Connection, queues: sa.Table, message: MessageMixin) -> QueueNotFound:
    name = message.queue_name
    if name is None:
        return QueueNotFound(message.queue_id)
    known = connection.execute(queue_statements.names(queues)).scalars().all()
    return QueueNotFound(name, validation.suggestions(name, known))

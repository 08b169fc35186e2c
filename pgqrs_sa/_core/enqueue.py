"""Enqueueing: one message, many, or the rows of a query."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import count, repeat
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql import Executable, visitors
from sqlalchemy.sql.expression import SelectBase

from .. import validation
from ..codecs import Codec, JsonCodec
from ..errors import DelayError, InvalidArgument, PayloadError, PgqrsError, safe_repr
from ..types import Item, Receipt
from . import sessions, wakeup
from .criteria import reject_reserved_binds
from .queues import create as create_queue
from .scope import Scope, encoded, queue_not_found
from .sql import enqueue as statements
from .sql import queues

__all__ = ["CHUNK_BYTES", "CHUNK_ROWS", "from_query", "many", "one"]

CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 1024 * 1024
"""The maximum of rows, and the approximate maximum of bytes, of one statement of a batch."""

_T = TypeVar("_T")

_COMMON_LIMIT = 1_048_576  # a queue's default: larger payloads are checked before the INSERT
_TRIES = 100  # a key may be freed between two statements each time: this bounds the retries
_GATHERED = 200  # rows from which on a list of them is cheaper, client and server together
_NO_OPTIONS = ",null,null,0,null,null,null]"
_NO_VALUES: dict[str, Any] = {
    "delay": timedelta(0),
    "at": None,
    "key": None,
    "priority": 0,
    "headers": None,
    "max_read_ct": None,
}


class _Encoded(NamedTuple):
    """A validated item as JSON text."""

    place: int
    text: str
    size: int
    key: str | None
    headers_size: int = 0
    delayed: bool = False

    @property
    def weight(self) -> int:
        """The approximate number of bytes that it takes in a statement."""
        return self.size + self.headers_size


def one(scope: Scope, queue: str, item: Item) -> Receipt:
    """Insert one message, or find the live message with the same key."""
    validation.validate_queue_name(queue)
    payload = encoded(scope.context.codec, item.payload)
    size = len(payload.encode())
    options = _checked_options(item) if _has_options(item) else _NO_VALUES
    key = options["key"]
    values = {
        "queue": queue,
        "payload": payload,
        "size": size,
        "producer": scope.context.worker,
        **options,
    }
    values |= (channel := wakeup.channel(scope))
    statement = statements.one(scope.tables, keyed=key is not None, notify=bool(channel))
    if size > _COMMON_LIMIT:
        check_size(queue, size, _limit(scope, queue))
    for _ in range(_TRIES):
        row = scope.execute(statement, values, atomic=True).first()
        if row is not None:
            if not options["delay"]:
                wakeup.mark_enqueued(scope.session, queue, scope.context.mapper)
            return Receipt(row.id, row.vt)
        if key is not None and (found := _live(scope, queue, [key])):
            return found[key]
        # Raises if the payload was refused. Otherwise the key's message was settled meanwhile.
        check_size(queue, size, _limit(scope, queue))
    raise _rows_vanish(queue) if key is None else _never_found(queue, key)


def many(scope: Scope, queue: str, items: Iterable[Any]) -> list[Receipt]:
    """Insert payloads or items, one statement for each chunk; return receipts in their order."""
    validation.validate_queue_name(queue)
    # All are checked before the first is sent, so that a bad item at the end inserts nothing.
    if not (listed := validation.as_list(items, "items")):
        return []
    channel = wakeup.channel(scope)
    has_items = any(issubclass(kind, Item) for kind in set(map(type, listed)))
    payloads = [_payload(item) for item in listed] if has_items else listed
    texts = _texts(scope.context.codec, payloads)
    batch = _Batch(scope, queue, list(map(len, map(str.encode, texts))), channel)
    if not has_items or not any(map(_has_options, listed)):
        batch.check_what_is_large()
        return [
            receipt
            for chunk in _chunks(texts, batch.sizes)
            for receipt in batch.insert(f"[{','.join(chunk)}]", len(chunk), plain=True)
        ]
    encoded = list(map(_encode, count(), listed, texts, batch.sizes))
    batch.check_what_is_large()
    receipts: dict[int, Receipt] = {}
    for part in _chunks_of([item for item in encoded if item.key is None]):
        delayed = all(item.delayed for item in part)
        found = batch.insert(_array(part), len(part), delayed=delayed)
        receipts |= {item.place: receipt for item, receipt in zip(part, found, strict=True)}
    # In the order of their keys, so that two batches with the same keys cannot deadlock.
    for part in _chunks_of(sorted((item for item in encoded if item.key is not None), key=_by_key)):
        receipts |= batch.insert_keyed(part)
    return [receipts[index] for index in range(len(encoded))]


def from_query(scope: Scope, queue: str, query: SelectBase) -> int:
    """Insert the rows of a query on the server; return how many."""
    validation.validate_queue_name(queue)
    _check_columns(query)
    sessions.refuse_foreign_tables(scope.session, scope.context.mapper, query)
    if scope.context.create_queues:
        _limit(scope, queue)
    channel = wakeup.channel(scope)
    statement = statements.from_select(scope.tables, query, notify=bool(channel))
    values = {"queue": queue, "producer": scope.context.worker, **channel}
    result: Any = scope.execute(statement, values, atomic=True)
    inserted: int = result.one().inserted if channel else result.rowcount
    if inserted == 0:
        limit = _limit(scope, queue)
        check_size(queue, scope.execute(statements.largest(query)).scalar_one(), limit)
    else:
        wakeup.mark_enqueued(scope.session, queue, scope.context.mapper)
    return inserted


def _payload(item: Any) -> Any:
    return item.payload if isinstance(item, Item) else item


def _texts(codec: Codec, payloads: Sequence[Any]) -> list[str]:
    """Return payloads as JSON texts, written together where that is possible."""
    if type(codec) is JsonCodec and (texts := codec.dumps_each(payloads)) is not None:
        return texts
    return [
        encoded(codec, payload, f"items[{index}].payload") for index, payload in enumerate(payloads)
    ]


def _has_options(item: Any) -> bool:
    return isinstance(item, Item) and not (
        item.delay is None
        and item.at is None
        and item.headers is None
        and item.key is None
        and item.max_read_ct is None
        and type(item.priority) is int
        and item.priority == 0
    )


def _checked_options(item: Item) -> dict[str, Any]:
    delay, at = validation.validate_delay_or_at(item.delay, item.at)
    return {
        "delay": delay,
        "at": at,
        "key": None if item.key is None else validation.validate_key(item.key),
        "priority": validation.validate_priority(item.priority),
        "headers": validation.headers_text(item.headers),
        "max_read_ct": _checked_attempts(item),
    }


def _encode(index: int, item: Any, text: str, size: int) -> _Encoded:
    if not _has_options(item):
        return _Encoded(index, f"[{text}{_NO_OPTIONS}", size, None)
    path = f"items[{index}]."
    delay, at = validation.validate_delay_or_at(item.delay, item.at, path)
    when = "null" if at is None else f'"{at.isoformat()}"'
    priority = int(validation.validate_priority(item.priority, path))
    headers = validation.headers_text(item.headers, path) or "null"
    attempts = _checked_attempts(item, path)
    key = None if item.key is None else validation.validate_key(item.key, path)
    rest = f"{json.dumps(attempts)},{json.dumps(key)}"
    whole = f"[{text},{delay.total_seconds()!r},{when},{priority},{headers},{rest}]"
    return _Encoded(index, whole, size, key, len(headers), bool(delay))


def _checked_attempts(item: Item, path: str = "") -> int | None:
    return (
        None
        if item.max_read_ct is None
        else validation.validate_max_read_ct(item.max_read_ct, path)
    )


def _by_key(item: _Encoded) -> tuple[str, int]:
    return item.key or "", item.place


def _chunks(listed: Sequence[_T], weights: Sequence[int]) -> Iterator[Sequence[_T]]:
    """Split a batch into chunks, each for one statement."""
    if not listed:
        return
    if len(listed) <= CHUNK_ROWS and sum(weights) <= CHUNK_BYTES:
        yield listed
        return
    begin = weight = 0
    for place, more in enumerate(weights):
        if place > begin and (place - begin == CHUNK_ROWS or weight + more > CHUNK_BYTES):
            yield listed[begin:place]
            begin, weight = place, 0
        weight += more
    yield listed[begin:]


def _chunks_of(encoded: Sequence[_Encoded]) -> Iterator[Sequence[_Encoded]]:
    return _chunks(encoded, [item.weight for item in encoded])


def _array(items: Iterable[_Encoded]) -> str:
    return f"[{','.join(item.text for item in items)}]"


@dataclass(frozen=True, slots=True)
class _Batch:
    """A call of `many`, whose chunks are inserted together or not at all.

    Each statement checks that the queue accepts the largest payload of the whole batch, so that
    no chunk is inserted before a later one is refused.
    """

    scope: Scope
    queue: str
    sizes: Sequence[int]
    channel: Mapping[str, str]

    @property
    def largest(self) -> int:
        return max(self.sizes)

    def check_what_is_large(self) -> None:
        """Check large payloads against the limit of the queue before the first INSERT."""
        if self.largest > _COMMON_LIMIT:
            self.check_accepted()

    def check_accepted(self) -> None:
        """Raise for the first item that the queue does not accept."""
        limit = _limit(self.scope, self.queue)
        for index, size in enumerate(self.sizes):
            check_size(self.queue, size, limit, f"items[{index}].")

    def insert(
        self, items: str, count: int, *, plain: bool = False, delayed: bool = False
    ) -> list[Receipt]:
        """Insert ``count`` items without keys, given as a JSON array."""
        gathered = count >= _GATHERED
        options = {"notify": bool(self.channel), "gathered": gathered}
        if plain:
            statement = statements.plain(self.scope.tables, **options)
        else:
            statement = statements.many(self.scope.tables, keyed=False, **options)
        for _ in range(_TRIES):
            rows = self._run(statement, items)
            if receipts := _gathered(*rows[0]) if gathered else _in_order(rows):
                break
            self.check_accepted()  # does not raise if the queue was created meanwhile
        else:
            raise _rows_vanish(self.queue)
        if len(receipts) != count:
            raise _rows_vanish(self.queue, f"{len(receipts)} of {count} messages")
        self._note(delayed=delayed)
        return receipts

    def insert_keyed(self, chunk: Sequence[_Encoded]) -> dict[int, Receipt]:
        """Insert items in the order of their keys, or find the live messages with these keys.

        A key that another transaction commits while the INSERT runs, and whose message is settled
        before it is looked up, is neither inserted nor found. It is tried again, together with all
        keys after it. If it were inserted alone, keys would be locked out of order, and a batch
        of another transaction that holds it and waits for a later key would deadlock. Each retry
        sends fewer keys, so that the other keys are not delayed for long.
        """
        statement = statements.many(self.scope.tables, keyed=True, notify=bool(self.channel))
        receipts: dict[int, Receipt] = {}
        if self.scope.context.create_queues:
            self.check_accepted()  # creates the queue before the savepoint that may be rolled back
        left, size, tries = list(chunk), len(chunk), 0
        while left:
            part = left[:size]
            found = self._all_or_none(statement, part)
            receipts |= found
            # In AUTOCOMMIT the keys found so far are committed, and stay.
            missing = [item for item in part if item.place not in found]
            left = missing + left[size:]
            size = max(1, size // 2) if missing else 2 * size
            tries = 0 if found else tries + 1
            if tries == _TRIES:
                raise _never_found(self.queue, part[0].key)
        return receipts

    def _all_or_none(self, statement: Executable, items: Sequence[_Encoded]) -> dict[int, Receipt]:
        """Return the receipts of all items, or of none if a key was neither free nor found.

        In AUTOCOMMIT, return the receipts of the other items in that case.
        """
        with self._savepoint(statement, needed=len(items) > 1) as savepoint:
            found = self._inserted_or_found(statement, items)
            if savepoint is not None and len(found) < len(items):
                savepoint.rollback()
                return {}
            return found

    @contextmanager
    def _savepoint(
        self, statement: Executable, *, needed: bool
    ) -> Iterator[sa.NestedTransaction | None]:
        """Open a savepoint in the caller's transaction, whose rollback frees the inserted keys.

        Yields None in AUTOCOMMIT, or when none is needed.
        """
        self.scope.session._autoflush()  # noqa: SLF001 - pending objects must precede the savepoint
        where = {"mapper": self.scope.context.mapper, "clause": statement}
        connection = sessions.connect(self.scope.session, where)
        if not needed or sessions.is_autocommit(connection):
            yield None
            return
        with connection.begin_nested() as savepoint:
            yield savepoint

    def _inserted_or_found(
        self, statement: Executable, items: Sequence[_Encoded]
    ) -> dict[int, Receipt]:
        """Return receipts by place, without the items whose key became free meanwhile."""
        keys = {item.key for item in items}
        fresh: dict[str | None, Receipt] = {}
        there: dict[str | None, Receipt] = {}
        for row in self._run(statement, _array(items), keys=list(keys)):
            found = there if row.duplicate else fresh
            found[row.dedup_key] = Receipt(row.id, row.vt, row.duplicate)
        if fresh:
            self._note(delayed=all(item.delayed for item in items))
        if missing := keys - fresh.keys() - there.keys():
            there |= _live(self.scope, self.queue, missing)
            if missing - there.keys():
                self.check_accepted()
        receipts: dict[int, Receipt] = {}
        for item in items:
            if item.key in there:
                receipts[item.place] = there[item.key]
            elif item.key in fresh:
                receipts[item.place] = first = fresh[item.key]
                there[item.key] = Receipt(first.id, first.vt, duplicate=True)
        return receipts

    def _run(self, statement: Executable, items: str, **more: object) -> Sequence[Any]:
        values = {
            "queue": self.queue,
            "items": items,
            "size": self.largest,
            "producer": self.scope.context.worker,
            **self.channel,
            **more,
        }
        return self.scope.execute(statement, values, atomic=True).all()

    def _note(self, *, delayed: bool) -> None:
        """Wake consumers of this process after the commit, unless all messages are delayed."""
        if not delayed:
            wakeup.mark_enqueued(self.scope.session, self.queue, self.scope.context.mapper)


def _in_order(rows: Iterable[Sequence[Any]]) -> list[Receipt]:
    """Return the receipts of rows that begin with id and vt, in the order of the items."""
    # Ids are assigned in the order of the array, so sorting by id restores that order.
    return [Receipt(row[0], row[1]) for row in sorted(rows, key=itemgetter(0))]


def _gathered(
    ids: Sequence[int] | None, vt: datetime, vts: Sequence[datetime] | None
) -> list[Receipt]:
    """Return the same of the one row of a statement that gathers them."""
    if vts is None:
        return _receipts(sorted(ids or ()), vt)
    return _in_order(zip(ids or (), vts, strict=True))


def _receipts(ids: Sequence[int], vt: datetime) -> list[Receipt]:
    """Return a receipt for each id, in half the time that the constructor takes for them.

    A frozen dataclass sets each of its fields by a call in Python. Here its slots are set in C.
    """
    receipts = list(map(object.__new__, repeat(Receipt, len(ids))))
    given: dict[str, Iterable[Any]] = {"id": ids, "vt": repeat(vt)}
    for field in fields(Receipt):
        values = given.get(field.name, repeat(field.default))
        deque(map(Receipt.__dict__[field.name].__set__, receipts, values), maxlen=0)
    return receipts


def _rows_vanish(queue: str, taken: str = f"no message in {_TRIES} tries") -> PgqrsError:
    return PgqrsError(
        f"queue {queue!r} took {taken}, though nothing stands against it: "
        "look for a trigger or a rule on pgqrs_messages"
    )


def _never_found(queue: str, key: str | None) -> PgqrsError:
    return PgqrsError(
        f"the key {key!r} of queue {queue!r} was neither free nor found in {_TRIES} tries: its "
        "messages are settled and enqueued again all the time. Try again. If nobody else uses the "
        "key, look for a trigger or a rule on pgqrs_messages"
    )


def _live(scope: Scope, queue: str, keys: Collection[str | None]) -> dict[str | None, Receipt]:
    values = {"queue": queue, "keys": list(keys)}
    rows = scope.execute(statements.live_keys(scope.tables), values)
    return {row.dedup_key: Receipt(row.id, row.vt, duplicate=True) for row in rows}


def _limit(scope: Scope, queue: str) -> int:
    """Return the size of the largest payload that a queue accepts."""
    create = scope.context.create_queues  # atomic then: AUTOCOMMIT is refused, as for a message
    found = scope.execute(queues.get(scope.tables), {"queue": queue}, atomic=create)
    row = found.one_or_none()
    if row is not None:
        return int(row.max_payload_bytes)
    if not create:
        raise queue_not_found(scope, queue)
    return create_queue(scope, queue, {}).max_payload_bytes


def check_size(queue: str, size: int, limit: int, path: str = "") -> None:
    """Raise when a payload is larger than its queue accepts."""
    if size > limit:
        raise PayloadError(
            f"{path}payload",
            f"takes {size} bytes, queue {queue!r} accepts {limit}: store the data elsewhere and "
            "send a reference, or raise max_payload_bytes of the queue",
        )


def _check_columns(query: SelectBase) -> None:
    if not isinstance(query, SelectBase):
        raise InvalidArgument(f"query must be a select(), not {safe_repr(query)}")
    reject_reserved_binds(query)
    columns = list(query.selected_columns)
    names = [column.key for column in columns]
    if any(isinstance(element, sa.UpdateBase) for element in visitors.iterate(query)):
        raise InvalidArgument("the query writes, and may be run twice: execute that part before")
    if len(names) == 1:
        return
    unknown = [name for name in names if name not in statements.SELECTABLE]
    if unknown or "payload" not in names:
        raise InvalidArgument(
            f"the query returns {names}: label its columns payload (needed) and any of "
            f"{', '.join(statements.SELECTABLE[1:])}"
        )
    at = next((column.type for column in columns if column.key == "at"), None)
    if isinstance(at, sa.DateTime) and not at.timezone:
        raise DelayError(
            "the query's column at has no time zone, so which moments it means is unknown: "
            "use a timestamptz, for example func.timezone('UTC', column)"
        )

"""Putting messages into a queue."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import SelectBase

from .. import arguments
from ..errors import InvalidArgument, PayloadError, shown
from ..statements import enqueue as statements
from ..statements import queues
from ..types import Item, Receipt
from .context import Context, queue_not_found, require_atomic, run

__all__ = ["CHUNK_BYTES", "CHUNK_ROWS", "from_query", "many", "one"]

CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 1024 * 1024
"""A batch is sent in statements of at most so many rows, and about so many bytes."""

_COMMON_LIMIT = 1_048_576  # the default of a queue: larger payloads are asked about first
_PLAIN = ",null,null,0,null,null,null]"


@dataclass(frozen=True, slots=True)
class _Encoded:
    """An item that has passed every check, as it travels."""

    text: str
    size: int
    key: str | None
    headers_size: int = 0

    @property
    def weight(self) -> int:
        """About how many bytes it takes in a statement."""
        return self.size + self.headers_size


def one(session: Session, context: Context, queue: str, item: Item) -> Receipt:
    """Insert one message, or find the live one that has its key."""
    arguments.check_queue_name(queue)
    payload = context.codec.dumps(item.payload)
    delay, at = arguments.delay_or_at(item.delay, item.at)
    key = None if item.key is None else arguments.check_key(item.key)
    size = len(payload.encode())
    values = {
        "queue": queue,
        "payload": payload,
        "size": size,
        "delay": delay,
        "at": at,
        "priority": arguments.check_priority(item.priority),
        "headers": arguments.headers_text(item.headers),
        "max_read_ct": _checked_attempts(item),
        "key": key,
        "producer": context.worker,
    }
    require_atomic(session, context)
    if size > _COMMON_LIMIT:
        _check_accepted(session, context, queue, size)
    statement = statements.one(context.models, keyed=key is not None)
    while True:
        row = run(session, context, statement, values).one_or_none()
        if row is not None:
            return Receipt(row.id, row.vt)
        if key is not None and (found := _live(session, context, queue, [key])):
            return found[key]
        # Refused for a reason that is raised here; or the key was settled this very moment.
        _check_accepted(session, context, queue, size)


def many(session: Session, context: Context, queue: str, items: Iterable[Any]) -> list[Receipt]:
    """Insert payloads or items, one statement a chunk; receipts come in the order given."""
    arguments.check_queue_name(queue)
    # All are checked before the first is sent: a bad one at the end leaves nothing behind.
    listed = arguments.nonempty(items, "items")
    encoded = [_encode(context, item, index) for index, item in enumerate(listed)]
    require_atomic(session, context)
    # Each statement asks whether the queue accepts the largest of all of them: a chunk must not
    # get in before a later one is refused.
    sizes = [item.size for item in encoded]
    if max(sizes) > _COMMON_LIMIT:
        _check_accepted(session, context, queue, sizes)
    receipts: list[Receipt] = []
    for chunk in _chunks(encoded):
        offset = len(receipts)
        given = listed[offset : offset + len(chunk)]
        receipts += _insert_chunk(session, context, queue, chunk, given, sizes)
    return receipts


def from_query(session: Session, context: Context, queue: str, query: SelectBase) -> int:
    """Insert what a query returns, without a row passing through Python; return how many."""
    arguments.check_queue_name(queue)
    _check_columns(query)
    require_atomic(session, context)
    values = {"queue": queue, "producer": context.worker}
    result: Any = run(session, context, statements.from_select(context.models, query), values)
    inserted: int = result.rowcount
    if inserted == 0:
        size = run(session, context, statements.largest(query)).scalar_one()
        _check_accepted(session, context, queue, size)
    return inserted


def _encode(context: Context, item: Any, index: int) -> _Encoded:
    path = f"items[{index}]."
    try:
        text = context.codec.dumps(item.payload if isinstance(item, Item) else item)
    except PayloadError as error:
        raise PayloadError(f"items[{index}].{error.path}", error.problem) from None
    size = len(text.encode())
    if not isinstance(item, Item):
        return _Encoded(f"[{text}{_PLAIN}", size, None)
    delay, at = arguments.delay_or_at(item.delay, item.at, path)
    key = None if item.key is None else arguments.check_key(item.key, path)
    options = (
        delay.total_seconds(),
        None if at is None else at.isoformat(),
        arguments.check_priority(item.priority, path),
    )
    headers = arguments.headers_text(item.headers, path) or "null"
    tail = f"{headers},{json.dumps(_checked_attempts(item, path))},{json.dumps(key)}"
    return _Encoded(f"[{text},{json.dumps(options)[1:-1]},{tail}]", size, key, len(headers))


def _checked_attempts(item: Item, path: str = "") -> int | None:
    return None if item.max_read_ct is None else arguments.check_max_read_ct(item.max_read_ct, path)


def _chunks(encoded: Sequence[_Encoded]) -> Iterator[list[_Encoded]]:
    chunk: list[_Encoded] = []
    weight = 0
    for item in encoded:
        if chunk and (len(chunk) == CHUNK_ROWS or weight + item.weight > CHUNK_BYTES):
            yield chunk
            chunk, weight = [], 0
        chunk.append(item)
        weight += item.weight
    yield chunk


def _insert_chunk(
    session: Session,
    context: Context,
    queue: str,
    chunk: Sequence[_Encoded],
    given: Sequence[Any],
    sizes: Sequence[int],
) -> list[Receipt]:
    keys = {item.key for item in chunk if item.key is not None}
    values = {
        "queue": queue,
        "items": f"[{','.join(item.text for item in chunk)}]",
        "size": max(sizes),
        "producer": context.worker,
    }
    rows = run(session, context, statements.many(context.models, keyed=bool(keys)), values).all()
    if not rows:
        _check_accepted(session, context, queue, sizes)
        if any(item.key is None for item in chunk):  # the queue was created this very moment
            return _insert_chunk(session, context, queue, chunk, given, sizes)
    by_key = {row.dedup_key: Receipt(row.id, row.vt) for row in rows if row.dedup_key is not None}
    # Ids are drawn in the order of the array, so that sorting them restores it.
    in_order = iter(sorted((row.id, row.vt) for row in rows if row.dedup_key is None))
    there = _live(session, context, queue, keys - by_key.keys()) if keys - by_key.keys() else {}
    receipts = []
    for item, original in zip(chunk, given, strict=True):
        if item.key is None:
            receipts.append(Receipt(*next(in_order)))
        elif (fresh := by_key.pop(item.key, None)) is not None:
            receipts.append(fresh)
            there[item.key] = Receipt(fresh.id, fresh.vt, duplicate=True)
        elif item.key in there:
            receipts.append(there[item.key])
        else:  # settled between the two statements: its key is free again
            receipts.append(one(session, context, queue, original))
    return receipts


def _live(
    session: Session, context: Context, queue: str, keys: Iterable[str]
) -> dict[str, Receipt]:
    values = {"queue": queue, "keys": sorted(keys)}
    rows = run(session, context, statements.live_keys(context.models), values)
    return {row.dedup_key: Receipt(row.id, row.vt, duplicate=True) for row in rows}


def _check_accepted(
    session: Session, context: Context, queue: str, sizes: int | Sequence[int]
) -> None:
    """Raise for the reason why a queue would not take payloads of these sizes, if there is one."""
    row = run(session, context, queues.get(context.models), {"queue": queue}).one_or_none()
    if row is None:
        raise queue_not_found(session, context, queue)
    limit = row.max_payload_bytes
    if isinstance(sizes, int):
        check_size(queue, sizes, limit)
        return
    for index, size in enumerate(sizes):
        check_size(queue, size, limit, f"items[{index}].")


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
        raise InvalidArgument(f"query must be a select(), not {shown(query)}")
    names = [column.key for column in query.selected_columns]
    if len(names) == 1:
        return
    unknown = [name for name in names if name not in statements.SELECTABLE]
    if unknown or "payload" not in names:
        raise InvalidArgument(
            f"the query returns {names}: label its columns payload (needed) and any of "
            f"{', '.join(statements.SELECTABLE[1:])}"
        )

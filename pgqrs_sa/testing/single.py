"""Calls one handler once, with a message that is in no queue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, overload

from .. import validation
from .._core.scope import Context, decoded, encoded
from ..consumer.call_transactions import forbid_commit
from ..consumer.disposition import dispositions_for_result
from ..consumer.handlers import Handler, Invocation
from ..consumer.options import ConsumerConfig
from ..consumer.signature import inspect_handler
from ..decisions import Decision, Retry
from ..errors import InvalidArgument
from ..models import READY_MADE
from ..types import Delivery
from .draining import service_of
from .sessions import SessionLike, is_async, opened, plain

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from .sessions import AsyncSessionLike

__all__ = ["work_one"]

_LEASE = timedelta(seconds=30)
_ATTEMPTS = 5


@overload
def work_one(
    handler: AsyncConsumer | Callable[..., Coroutine[Any, Any, Any]],
    payload: Any,
    *,
    queue: str | None = None,
    session: AsyncSessionLike | None = None,
    headers: Mapping[str, Any] | None = None,
    attempt: int = 1,
) -> Coroutine[Any, Any, Decision | None]: ...
@overload
def work_one(
    handler: Consumer | Callable[..., Decision | None],
    payload: Any,
    *,
    queue: str | None = None,
    session: SessionLike | None = None,
    headers: Mapping[str, Any] | None = None,
    attempt: int = 1,
) -> Decision | None: ...
def work_one(
    handler: Any,
    payload: Any,
    *,
    queue: str | None = None,
    session: Any = None,
    headers: Mapping[str, Any] | None = None,
    attempt: int = 1,
) -> Any:
    """Call one handler with a message that is not stored.

    The payload is encoded, decoded and converted to the handler's annotation, as for a real
    message. No message is stored, so a handler that settles its delivery itself needs `drain`. A
    handler that takes neither a session nor the queue's service needs no database.

    Args:
        handler: The function; or a consumer, which also knows the codec, the models and
            ``on(payload=..., batch=...)``. A handler for batches gets a batch of one.
        payload: The payload that the producer would enqueue.
        queue: The queue of the handler, if the consumer has several; for a function, the queue of
            the delivery.
        session: The session that the handler gets, in a savepoint.
        headers: The headers of the delivery.
        attempt: The number of the attempt: ``delivery.read_ct``.

    Returns:
        The decision that the handler returns, or None. For an ``async def`` handler it is awaited.

    Raises:
        PayloadError: the payload is not strict JSON, or does not fit the handler's type.
        InvalidArgument: the handler needs a session, or its result is not allowed.
        Exception: the exception of the handler, or its decision if it is raised, after its
            savepoint was rolled back. For a batch, also an exception returned for the message.
    """
    found, settings = _found(handler, queue)
    context = (
        settings.context()
        if settings
        else Context.of(READY_MADE, None, None, allow_autocommit=True)
    )
    unit = Invocation(found, (_delivery(found, context, payload, headers, attempt),))
    call = found.call
    given = _session(found, session)
    service = None if given is None else service_of(given, context, settings)
    values = call.arguments(unit.deliveries, call.payloads(unit.deliveries), given, service)
    if call.is_async:
        return _awaited(unit, values, given)
    if given is None:
        return _decision(unit, call.run(values))
    with given.begin_nested():
        with forbid_commit(plain(given), found):
            result = call.run(values)
        dispositions_for_result(unit, result)  # refused while its writes can still be rolled back
    return _decision(unit, result)


async def _awaited(unit: Invocation, values: dict[str, Any], session: Any) -> Decision | None:
    call = unit.handler.call
    if session is None:
        return _decision(unit, await call.awaited(values))
    async with session.begin_nested():
        with forbid_commit(plain(session), unit.handler):
            result = await call.awaited(values)
        dispositions_for_result(unit, result)
    return _decision(unit, result)


def _found(handler: Any, queue: str | None) -> tuple[Handler, ConsumerConfig | None]:
    if hasattr(handler, "handlers"):
        if queue is None and len(handler.handlers) != 1:
            known = ", ".join(repr(found.queue) for found in handler.handlers) or "none"
            raise InvalidArgument(f"which handler? Pass queue=..., one of: {known}")
        selected = handler.handlers[0] if queue is None else handler.handler(queue)
        return selected, handler._config  # noqa: SLF001 - one package
    call = inspect_handler(handler, many=False)
    name = "test" if queue is None else validation.validate_queue_name(queue)
    return Handler(name, call, None, 1, 0, None, Retry(), 1, 1, "commit"), None


def _session(handler: Handler, session: Any) -> Any:
    """Return the session that a handler gets, or None if it takes none."""
    if not handler.call.needs_session:
        return None
    kind = "AsyncSession" if handler.call.is_async else "Session"
    if session is None:
        raise InvalidArgument(f"{handler.name} takes a session: pass session=..., an {kind}")
    found = opened(session)
    if is_async(found) is not handler.call.is_async:
        raise InvalidArgument(
            f"{handler.name} needs session=... of the type {kind}, not {type(found).__name__}"
        )
    return found


def _delivery(
    handler: Handler,
    context: Context,
    payload: Any,
    headers: Mapping[str, Any] | None,
    attempt: int,
) -> Delivery:
    text = encoded(context.codec, payload)
    value, extra = decoded(context.codec, 1, text, validation.headers_text(headers))
    now = datetime.now(UTC)
    number = validation.validate_limit(attempt, "attempt")
    return Delivery(
        id=1,
        queue=handler.queue,
        text=text,
        decoded=value,
        headers=extra,
        priority=0,
        vt=now,
        enqueued_at=now,
        read_ct=number,
        max_read_ct=max(number, handler.retry.max_attempts or _ATTEMPTS),
        key=None,
        last_error=None if number == 1 else "an earlier attempt",
        leased_until=now + (handler.lease or _LEASE),
        fencing_token=number,
        worker_id=None,
    )


def _decision(unit: Invocation, result: Any) -> Decision | None:
    """Return a handler's decision about its one message, or raise the error that it returned."""
    dispositions_for_result(unit, result)
    if unit.handler.call.many and not isinstance(result, BaseException) and result is not None:
        values = result.values() if isinstance(result, Mapping) else result
        result = next(iter(values), None)
    if isinstance(result, BaseException) and not isinstance(result, Decision):
        raise result
    return result if isinstance(result, Decision) else None

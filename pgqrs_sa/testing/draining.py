"""Calls handlers in the transaction of a test: with all of their messages, or with one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

from sqlalchemy import util
from sqlalchemy.orm import Session

from .. import validation
from .._core.lease import dead_letter_exhausted, decodable, deliveries, in_order
from .._core.scope import Context, Scope, decoded, encoded
from .._core.sessions import expire_deleted, sync_loaded
from .._core.sql import lease as statements
from .._core.sql.fragments import MOVED
from ..consumer import store
from ..consumer.call_transactions import forbid_commit
from ..consumer.disposition import PACKAGE, Disposition, dispositions_for_result
from ..consumer.events import EventEmitter
from ..consumer.handlers import Handler, Invocation
from ..consumer.options import ConsumerConfig
from ..consumer.signature import HandlerSignature, inspect_handler
from ..consumer.store import check_database
from ..decisions import Decision, Retry
from ..errors import InvalidArgument, LeaseLost, safe_repr
from ..models import READY_MADE
from ..service import QueueService
from ..types import Delivery, Outcome
from .clock import next_due, shift
from .sessions import SessionLike, is_async, opened, perform, plain

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Unpack

    from ..consumer.base import BaseConsumer
    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from .sessions import AsyncSessionLike


__all__ = ["DrainOptions", "Drained", "chosen", "drain", "work_one"]

_DEAD_LETTER_CHUNK = 1_000
_NOT_THE_HANDLERS = (str(Path(__file__).parent), str(Path(util.__file__).parent), PACKAGE)


@dataclass(frozen=True, slots=True)
class Drained:
    """The numbers of attempts that `drain` made, by outcome.

    Attributes:
        archived: Messages that are done.
        retried: Attempts that failed or returned `RetryIn`, and will be repeated.
        dead: Dead letters, including messages that were exhausted before.
        discarded: Messages with the decision `Discard`.
        snoozed: Attempts with the decision `Snooze`.
        kept: Messages left to the handler by ``acknowledge="manual"``.
        errors: The exceptions of handlers, with their messages. Decisions are not errors.
    """

    archived: int = 0
    retried: int = 0
    dead: int = 0
    discarded: int = 0
    snoozed: int = 0
    kept: int = 0
    errors: tuple[tuple[Delivery, BaseException], ...] = field(default=())


class DrainOptions(TypedDict, total=False):
    """The options of `drain`, described there."""

    queues: Collection[str] | None
    scheduled: bool
    max_messages: int
    raise_errors: bool


@overload
def drain(session: SessionLike, consumer: Consumer, **options: Unpack[DrainOptions]) -> Drained: ...
@overload
def drain(
    session: AsyncSessionLike, consumer: AsyncConsumer, **options: Unpack[DrainOptions]
) -> Coroutine[Any, Any, Drained]: ...
def drain(
    session: Any,
    consumer: Any,
    *,
    queues: Collection[str] | None = None,
    scheduled: bool = False,
    max_messages: int = 1000,
    raise_errors: bool = True,
) -> Any:
    """Call a consumer's handlers with their messages until none is left, in this transaction.

    A handler that takes a session, or the queue's service, gets *this* session, in its own
    savepoint, which includes the acknowledgement. If it raises, its writes are rolled back, and the
    message is settled by its `Retry`. Messages that handlers enqueue are handled, too. Leases,
    attempts, decisions, payload types, batches and hooks work as in the real consumer. But handlers
    run one after the other, no lease is renewed, and no ``timeout`` ends an attempt.

    Args:
        session: The test's session; with an ``AsyncSession``, and an `AsyncConsumer`, the result
            is awaited.
        consumer: The consumer with the handlers.
        queues: Only these queues; default: all that have a handler.
        scheduled: Also handle messages that are not due yet, including retries: when nothing else
            is left, let time pass for these queues, as `advance` does, until the next is due.
        max_messages: The maximum number of attempts: more are considered an endless loop.
        raise_errors: Raise the first error of a handler after its message is settled. If false,
            continue, and return all errors.

    Returns:
        The outcomes of the messages.

    Raises:
        AssertionError: more than ``max_messages`` attempts.
        InvalidArgument: the consumer has no handler for one of ``queues``, or none at all; or
            one of consumer and session is sync, the other async.
        QueueNotFound: with similar names.
        SchemaVersionError: the tables are not of a version that this release supports.
    """
    __tracebackhide__ = True
    given = opened(session)
    handlers = chosen(consumer, queues, is_async=is_async(given))
    limits = _Limits(
        scheduled, validation.validate_limit(max_messages, "max_messages"), raise_errors
    )

    def work(session: Session) -> Drained:
        __tracebackhide__ = True
        return _Drain(session, given, consumer._config, handlers, limits).run()  # noqa: SLF001

    return perform(given, work, lambda drained: drained)


def chosen(
    consumer: BaseConsumer[Any], queues: Collection[str] | None, *, is_async: bool
) -> tuple[Handler, ...]:
    """Return the handlers to call, or raise `InvalidArgument`."""
    if not hasattr(consumer, "handlers"):
        raise InvalidArgument(
            f"a Consumer or an AsyncConsumer is needed, not {safe_repr(consumer)}"
        )
    if isinstance(queues, str):
        raise InvalidArgument(f"queues must be a list of names, not {queues!r}")
    handlers = consumer.handlers if queues is None else tuple(map(consumer.handler, queues))
    for handler in handlers:
        if handler.call.is_async is not is_async:
            session, function = ("AsyncSession", "async def")
            if handler.call.is_async is False:
                session, function = ("Session", "def")
            raise InvalidArgument(
                f"{handler.name} is a handler with {function}, which needs a test with {session}"
            )
    return handlers


@dataclass(frozen=True, slots=True)
class _Limits:
    scheduled: bool
    max_messages: int
    raise_errors: bool


class _Drain:
    """One call of `drain`. With an ``AsyncSession`` it runs in SQLAlchemy's greenlet."""

    def __init__(
        self,
        session: Session,
        given: Any,
        settings: ConsumerConfig,
        handlers: Sequence[Handler],
        limits: _Limits,
    ) -> None:
        self._scope = Scope(session, settings.context())
        self._given = given
        self._settings = settings
        self._handlers = handlers
        self._limits = limits
        self._reporter = EventEmitter(settings.hooks)
        self._counts: Counter[str] = Counter()
        self._attempts = 0
        self._errors: list[tuple[Delivery, BaseException]] = []

    def run(self) -> Drained:
        """Call handlers until no message is left."""
        __tracebackhide__ = True
        self._scope.session.flush()
        leases = check_database(self._scope, self._handlers, self._settings.queues)
        while True:
            # Each handler is called once in turn, so that no queue waits until another is empty.
            worked = False
            for handler in self._handlers:
                worked = self._run_once(handler, leases[handler.queue]) or worked
            if (
                worked
                or self._dead_letter_exhausted()
                or (self._limits.scheduled and self._advance())
            ):
                continue
            return Drained(**self._counts, errors=tuple(self._errors))

    def _run_once(self, handler: Handler, lease: timedelta) -> bool:
        """Call a handler once if it has visible messages; return whether it had."""
        __tracebackhide__ = True
        leased, undecodable = self._lease(handler, lease)
        self._record_undecodable(handler, undecodable)
        if not leased:
            return bool(undecodable)
        self._attempts += len(leased)
        if self._attempts > self._limits.max_messages:
            raise AssertionError(self._endless(leased[0]))
        unit = Invocation(handler, tuple(leased))
        self._record_errors(self._work(unit))
        return True

    def _record_undecodable(self, handler: Handler, dead: Sequence[Delivery]) -> None:
        __tracebackhide__ = True
        dispositions = [
            Disposition(delivery, "dead", reason="cannot be decoded", error=delivery.decoded)
            for delivery in dead
        ]
        for disposition in dispositions:
            self._counts["dead"] += 1
            self._reporter.settled(handler, disposition, Outcome.DEAD, None)
        self._record_errors(dispositions)

    def _lease(self, handler: Handler, lease: timedelta) -> tuple[list[Delivery], list[Delivery]]:
        # Outside the handler's savepoint: the attempt counts even if the handler fails.
        values = {
            "queue": handler.queue,
            "limit": handler.batch,
            "lease": lease,
            "worker": None,
            "attempts": handler.retry.max_attempts,
        }
        statement = statements.dequeue(self._scope.tables, by_worker=False)
        rows = in_order(self._scope.execute(statement, values))
        sync_loaded(self._scope.session, self._scope.context.models.message, rows, MOVED)
        found = deliveries(self._scope.context, handler.queue, rows, None)
        return decodable(self._scope, found)

    def _work(self, unit: Invocation) -> list[Disposition]:
        __tracebackhide__ = True
        from ..consumer import invocation  # noqa: PLC0415 - needs the extra of consumers

        self._reporter.started(unit)
        started_at = time.monotonic()
        if unit.handler.acknowledge == "first":
            self._settle(
                [Disposition(delivery, "archive") for delivery in unit.deliveries], unit, started_at
            )
        try:
            dispositions = self._call(unit)
        except Exception as error:  # noqa: BLE001 - its Retry decides about it
            # The stored and the shown traceback begin with the handler.
            dispositions = invocation.after_error(unit, _of_handler(error), stopping=False)
        self._settle(dispositions, unit, started_at)
        return dispositions

    def _call(self, unit: Invocation) -> list[Disposition]:
        from ..consumer import invocation  # noqa: PLC0415

        call = unit.handler.call
        payloads = call.payloads(unit.deliveries)
        if not call.needs_session:
            values = call.arguments(unit.deliveries, payloads, None, None)
            return invocation.after_return(unit, called(call, values))
        with self._scope.session.begin_nested():
            service = service_of(self._given, self._scope.context, self._settings)
            values = call.arguments(unit.deliveries, payloads, self._given, service)
            with forbid_commit(self._scope.session, unit.handler):
                result = called(call, values)
            if unit.handler.acknowledge == "first":
                return invocation.after_return(unit, result)
            return invocation.settle_within(self._scope, unit, result)

    def _settle(
        self, dispositions: Sequence[Disposition], unit: Invocation, started_at: float
    ) -> None:
        """Settle what the handler's savepoint has not settled, and count the outcomes."""
        due = [
            disposition
            for disposition in dispositions
            if not disposition.settled and disposition.action != "keep"
        ]
        outcomes = {
            disposition.delivery.id: disposition.outcome
            for disposition in dispositions
            if disposition.outcome is not None
        }
        outcomes |= store.apply(self._scope, due, strict=False)
        # A consumer's own session has no objects, but the session of a test may.
        expire_deleted(
            self._scope.session,
            self._scope.context.models.message,
            [disposition.delivery.id for disposition in due],
        )
        for disposition in dispositions:
            outcome = outcomes.get(disposition.delivery.id)
            if outcome is not None:
                if not isinstance(disposition.error, LeaseLost):
                    self._counts[_COUNTED.get(outcome, outcome.name.lower())] += 1
                self._reporter.settled(unit.handler, disposition, outcome, started_at)
            elif disposition.action != "keep":
                self._reporter.ended(
                    Outcome.LOST,
                    unit.handler,
                    disposition.delivery,
                    started_at,
                    error=disposition.error,
                )
            elif unit.handler.acknowledge == "manual":
                self._counts["kept"] += 1

    def _record_errors(self, dispositions: Sequence[Disposition]) -> None:
        """Record the errors of handlers; raise the first if ``raise_errors`` is set."""
        __tracebackhide__ = True
        for disposition in dispositions:
            if disposition.error is None or isinstance(disposition.error, Decision):
                continue
            self._errors.append((disposition.delivery, disposition.error))
            if self._limits.raise_errors:
                raise disposition.error

    def _dead_letter_exhausted(self) -> int:
        """Dead-letter messages whose attempts were used up elsewhere."""
        moved = sum(
            dead_letter_exhausted(self._scope, handler.queue, _DEAD_LETTER_CHUNK)
            for handler in self._handlers
        )
        self._counts["dead"] += moved
        return moved

    def _advance(self) -> bool:
        """Let time pass until the next message is due; return False if none is scheduled."""
        queues = [handler.queue for handler in self._handlers]
        wait = next_due(self._scope, queues)
        if wait is None:
            return False
        shift(self._scope, max(wait, timedelta(0)), queues)
        return True

    def _endless(self, delivery: Delivery) -> str:
        text = (
            f"drain() has worked on {self._limits.max_messages} messages, and there are more: the "
            f"next is message {delivery.id} of {delivery.queue!r}, attempt {delivery.read_ct}. "
            "Does a handler enqueue for itself, or put its message off for ever? Otherwise raise "
            "max_messages"
        )
        if self._errors:
            text += f". The last error: {safe_repr(self._errors[-1][1])}"
        return text


_COUNTED = {Outcome.RELEASED: "snoozed"}
"""The fields of `Drained` that are not called as the outcome: nothing stops in a test."""


def _of_handler(error: Exception) -> Exception:
    """Return an error without the frames between its handler and here."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_NOT_THE_HANDLERS):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)


def called(call: HandlerSignature, arguments: dict[str, Any]) -> Any:
    """Call a handler, and wait for it."""
    if not call.is_async:
        return call.run(arguments)
    from sqlalchemy.util import await_only  # noqa: PLC0415 - needs greenlet

    return await_only(call.awaited(arguments))


def service_of(session: Any, context: Context, settings: ConsumerConfig | None) -> Any:
    """Return the service that a handler gets, in the session that it gets."""
    options: dict[str, Any] = {
        "models": context.models,
        "codec": context.codec,
        "notify": settings is not None and settings.notify,
    }
    if not is_async(session):
        return QueueService(session, **options)
    from ..aio import AsyncQueueService  # noqa: PLC0415 - needs greenlet

    return AsyncQueueService(session, **options)


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

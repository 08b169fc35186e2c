"""What is to become of a delivery after its handler. Pure: no clock, no I/O."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import indent
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..decisions import DeadLetter, Decision, Discard, RetryIn, Snooze
from ..errors import InvalidArgument, InvalidResult, PgqrsError
from ..types import Delivery, Outcome
from . import results

if TYPE_CHECKING:
    from .handlers import Handler, Invocation

__all__ = [
    "PACKAGE",
    "Action",
    "Disposition",
    "disposition_for_error",
    "dispositions_for_result",
    "of_the_handler",
]

Action: TypeAlias = Literal["archive", "discard", "retry", "dead", "release", "keep"]
"""``retry`` charges the attempt and ``release`` does not; ``keep`` leaves it to the handler."""

PACKAGE = str(Path(__file__).parent)
"""Where the files of the runtime are: what errors keep is about the handler's own."""

_HEAD, _TAIL = 2_000, 5_500  # of an error's own text, and of its traceback
_MEMBERS = 20  # of an exception group


@dataclass(slots=True)  # not frozen, which takes four times as long to make
class Disposition:
    """How one delivery is settled.

    Attributes:
        delivery: Which.
        action: How.
        delay: Until the next attempt, of ``retry`` and ``release``.
        reason: Of ``discard`` and ``dead``.
        error: What the handler raised, if it did.
        outcome: What the handler's own transaction has made of it, if it was settled there.
    """

    delivery: Delivery
    action: Action
    delay: timedelta = timedelta(0)
    reason: str | None = None
    error: BaseException | None = None
    outcome: Outcome | None = None

    @property
    def settled(self) -> bool:
        """True when the handler's own transaction has done it."""
        return self.outcome is not None

    @property
    def error_text(self) -> str:
        """What is kept of the error: its type and message, then the end of its traceback."""
        error = self.error
        if error is None or isinstance(error, Decision):
            return self.reason or str(error or "")
        said = _said(error)
        if isinstance(error, PgqrsError):
            return _bounded(said, _HEAD + _TAIL)  # that is all; its traceback is ours
        head = _bounded(said, _HEAD)
        frames = "".join(
            map(_shown, traceback.extract_tb(of_the_handler(error.__traceback__), -20))
        )
        return f"{head}\n{frames[-_TAIL:]}".strip()


def disposition_for_error(
    handler: Handler, delivery: Delivery, error: BaseException
) -> Disposition:
    """Return what becomes of a delivery whose handler raised."""
    try:
        return _carried_out(delivery, handler.retry.decide(error, delivery), error)
    except Exception as broken:  # noqa: BLE001 - a function in Retry.on; the message must not hang
        return _carried_out(delivery, RetryIn(handler.retry.delay(delivery.read_ct)), broken)


def dispositions_for_result(invocation: Invocation, result: Any) -> list[Disposition]:
    """Return what becomes of the deliveries of a handler that returned: see `results`.

    Raises:
        InvalidResult: what it returned means nothing.
    """
    if result is None and invocation.handler.acknowledge == "commit":
        return [Disposition(delivery, "archive") for delivery in invocation.deliveries]
    pairs = zip(invocation.deliveries, results.read(invocation, result), strict=True)
    return [_of_one(invocation.handler, delivery, value) for delivery, value in pairs]


def _of_one(handler: Handler, delivery: Delivery, result: Any) -> Disposition:
    if isinstance(result, Decision):
        return _carried_out(delivery, result, result)
    if isinstance(result, BaseException):
        return disposition_for_error(handler, delivery, result)
    return Disposition(delivery, "archive" if handler.acknowledge == "commit" else "keep")


def _carried_out(delivery: Delivery, decision: Decision, cause: BaseException) -> Disposition:
    match decision:
        case RetryIn():
            return Disposition(delivery, "retry", delay=decision.delay, error=cause)
        case Snooze():
            return Disposition(delivery, "release", delay=decision.delay)
        case Discard():
            return Disposition(delivery, "discard", reason=decision.reason, error=cause)
        case DeadLetter():
            return Disposition(delivery, "dead", reason=decision.reason, error=cause)
        case _:
            raise InvalidArgument(
                f"{decision!r} is no decision: RetryIn, Snooze, Discard, DeadLetter, or None"
            )


def _said(error: BaseException) -> str:
    """Return the type and message of an error, and of those that it stands for."""
    said = "".join(traceback.format_exception_only(error)).strip()
    inner: tuple[BaseException, ...] = ()
    if isinstance(error, BaseExceptionGroup):
        inner = error.exceptions[:_MEMBERS]
    elif isinstance(error, InvalidResult) and error.__cause__ is not None:
        inner = (error.__cause__,)
    return "\n".join([said, *(indent(_said(member), "  ") for member in inner)])


def of_the_handler(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from where the handler begins; all of it if the error is not its."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(PACKAGE):
        inner = inner.tb_next
    return inner or trace


def _shown(frame: traceback.FrameSummary) -> str:
    # Without the marks below the line: for these `traceback` parses it, and the parser of Python
    # 3.11 may fail when another thread does that too.
    return f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {frame.line}\n'


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"

"""What a consumer tells of its work: to the log, and to hooks.

The log is the standard library's, under ``pgqrs_sa.consumer``, one line a message at DEBUG and
failures at WARNING, with ``extra`` for structured handlers: ``queue``, ``msg_id``, ``attempt``,
``worker``, ``outcome``, ``duration_ms``, ``error`` (its type) and ``delay_ms`` (until the next
attempt). No payload is ever in it, nor the text of an application's error, which may repeat it; and
no handler is installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from ..errors import HandlerTimeout, InvalidResult, LeaseLost, PgqrsError, TransactionRefused
from ..types import Delivery, Outcome, WorkerInfo
from .disposition import Disposition, of_the_handler
from .handlers import Handler, Invocation

__all__ = ["Event", "EventEmitter", "Hooks", "format_error", "format_outcome"]

log = logging.getLogger("pgqrs_sa.consumer")

_HOOKS = {
    Outcome.ARCHIVED: "on_success",
    Outcome.DISCARDED: "on_success",
    Outcome.RETRIED: "on_retry",
    Outcome.RELEASED: "on_retry",
    Outcome.DEAD: "on_dead",
    Outcome.LOST: "on_lease_lost",
}


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to one message.

    Attributes:
        delivery: Which message, and which attempt.
        outcome: An `Outcome`, or ``started`` when the handler begins.
        handler: The handler's name.
        worker: The worker's id.
        duration: Since its handler began, or None when it has not.
        error: What the handler raised, if it did.
        delay: Until the next attempt, of a retry or a snooze.
        reason: Of a dead letter, or of one that was discarded.
    """

    delivery: Delivery
    outcome: Outcome | Literal["started"]
    handler: str
    worker: int | None
    duration: timedelta | None = None
    error: BaseException | None = None
    delay: timedelta | None = None
    reason: str | None = None


class Hooks:
    """Override what you want to hear of, and give an instance to ``Consumer(hooks=[...])``.

    They are called from the consumer's threads, after the database has the outcome (`on_start`:
    before the handler begins). Be quick, and safe for threads. What a hook raises is logged.
    """

    def on_heartbeat(self, worker: WorkerInfo) -> None:
        """The consumer lives, and the database has noted it: at its start, and ever so often."""

    def on_start(self, event: Event) -> None:
        """A handler begins."""

    def on_success(self, event: Event) -> None:
        """A message is settled as its handler wanted: archived, or discarded (with a reason)."""

    def on_retry(self, event: Event) -> None:
        """An attempt failed, or put the message off: it comes again after ``delay``."""

    def on_dead(self, event: Event) -> None:
        """A message has become a dead letter."""

    def on_lease_lost(self, event: Event) -> None:
        """A lease is gone: somebody else has the message, or it was given back."""


class EventEmitter:
    """Tells the log and the hooks."""

    def __init__(self, hooks: Sequence[Hooks]) -> None:
        self._hooks = tuple(hooks)
        self.worker: int | None = None

    def is_told(self, outcome: Outcome) -> bool:
        """Return whether `settled` tells anybody of this outcome."""
        quiet = outcome is Outcome.ARCHIVED
        return not quiet or bool(self._hooks) or log.isEnabledFor(logging.DEBUG)

    def started(self, invocation: Invocation) -> None:
        """A handler begins."""
        if self._hooks:
            for delivery in invocation.deliveries:
                event = Event(delivery, "started", invocation.handler.name, self.worker)
                self._emit("on_start", event)

    def heartbeat(self, worker: WorkerInfo) -> None:
        """The consumer has registered, or given a sign of life."""
        self._emit("on_heartbeat", worker)

    def settled(
        self, handler: Handler, disposition: Disposition, outcome: Outcome, started_at: float | None
    ) -> None:
        """A disposition has been carried out, with this outcome."""
        if not self.is_told(outcome):
            return
        success = outcome in (Outcome.ARCHIVED, Outcome.DISCARDED)
        self.ended(
            outcome,
            handler,
            disposition.delivery,
            started_at,
            error=None if success else disposition.error,
            delay=disposition.delay if outcome in (Outcome.RETRIED, Outcome.RELEASED) else None,
            reason=disposition.reason,
        )

    def ended(
        self,
        outcome: Outcome,
        handler: Handler,
        delivery: Delivery,
        started_at: float | None,
        *,
        error: BaseException | None = None,
        delay: timedelta | None = None,
        reason: str | None = None,
    ) -> None:
        """A message has been settled, or lost.

        Args:
            outcome: How it ended.
            handler: Whose message it is.
            delivery: Which.
            started_at: When the handler began, by the monotonic clock.
            error: See `Event`, like what follows.
            delay: Until the next attempt.
            reason: Of a dead letter.
        """
        hook = _HOOKS[outcome]
        took = None if started_at is None else time.monotonic() - started_at
        level = logging.DEBUG if hook == "on_success" or error is None else logging.WARNING
        if hook in ("on_dead", "on_lease_lost"):
            level = logging.WARNING
        if log.isEnabledFor(level):
            log.log(
                level,
                "%s",
                format_outcome(delivery, outcome, error, delay),
                extra={
                    "queue": delivery.queue,
                    "msg_id": delivery.id,
                    "attempt": delivery.read_ct,
                    "worker": self.worker,
                    "outcome": outcome,
                    "duration_ms": None if took is None else round(took * 1000, 3),
                    "error": None if error is None else type(error).__qualname__,
                    "delay_ms": None if delay is None else round(delay.total_seconds() * 1000, 3),
                },
            )
        if self._hooks:
            span = None if took is None else timedelta(seconds=took)
            event = Event(delivery, outcome, handler.name, self.worker, span, error, delay, reason)
            self._emit(hook, event)

    def _emit(self, name: str, what: Event | WorkerInfo) -> None:
        for hooks in self._hooks:
            try:
                getattr(hooks, name)(what)
            except BaseException:
                # Any error raised here would end a thread that is working on a message.
                log.exception("%s of %r failed", name, hooks)


_OURS = (HandlerTimeout, InvalidResult, LeaseLost, TransactionRefused)
"""Errors whose text has no value of the application's in it."""

_LONGEST = 300  # characters of such a text
_MEMBERS = 5  # of an exception group


def format_outcome(
    delivery: Delivery,
    outcome: Outcome,
    error: BaseException | None = None,
    delay: timedelta | None = None,
) -> str:
    """Return one line about an attempt: which, how it ended and why, and what comes next.

    Args:
        delivery: Which message, and which attempt.
        outcome: How it ended.
        error: What the handler raised, if it did.
        delay: Until the next attempt.
    """
    most = "" if delivery.max_read_ct is None else f" of {delivery.max_read_ct}"
    ending = {
        Outcome.RETRIED: "failed",
        Outcome.DEAD: "failed, and was the last",
        Outcome.RELEASED: "was given back, and is not counted",
        Outcome.LOST: "has lost its lease",
    }.get(outcome, f"has ended: {outcome}")
    why = "" if error is None else f": {format_error(error)}"
    seconds = 0.0 if delay is None else delay.total_seconds()
    after = {
        Outcome.RETRIED: f"; the next is in {seconds:.1f} s",
        Outcome.RELEASED: f"; it comes again in {seconds:.1f} s",
        Outcome.DEAD: "; the message is a dead letter",
    }.get(outcome, "")
    return (
        f"message {delivery.id} of {delivery.queue}: "
        f"attempt {delivery.read_ct}{most} {ending}{why}{after}"
    )


def format_error(error: BaseException) -> str:
    """Return the type of an error, its SQLSTATE, and where in the handler it came from."""
    text = _named(error)
    if (state := getattr(getattr(error, "orig", None), "sqlstate", None)) is not None:
        text += f" [{state}]"
    if isinstance(error, _OURS):
        text += f": {str(error).splitlines()[0][:_LONGEST]}"
    if isinstance(error, BaseExceptionGroup):
        text += f" of {', '.join(map(_named, error.exceptions[:_MEMBERS]))}"
    trace = None if isinstance(error, PgqrsError) else of_the_handler(error.__traceback__)
    if trace is None:
        return text
    code = trace.tb_frame.f_code
    return f"{text} in {code.co_qualname} ({Path(code.co_filename).name}:{trace.tb_lineno})"


def _named(error: BaseException) -> str:
    kind = type(error)
    plain = kind.__module__ == "builtins" or kind.__module__.startswith("pgqrs_sa.")
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"

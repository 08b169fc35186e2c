"""What the log says of an attempt: enough to act on, and nothing of what the message contains.

The text of an application's error may repeat its payload, so the log has its type and the place in
the handler where it came from. The text is in ``last_error`` of the message.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from ..errors import HandlerTimeout, InvalidResult, LeaseLost, PgqrsError, TransactionRefused
from ..types import Delivery, Outcome
from .disposition import of_the_handler

__all__ = ["format_error", "format_outcome"]

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

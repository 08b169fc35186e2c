"""Settling as a consumer decides it: many deliveries, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from sqlalchemy.orm import Session

from .. import validation
from ..types import Delivery
from . import settle
from .context import Context, execute
from .sql import settle as statements

__all__ = ["Settlement", "apply"]


class Settlement(Protocol):
    """What one delivery is to become."""

    @property
    def delivery(self) -> Delivery:
        """Which."""
        ...

    @property
    def action(self) -> str:
        """``archive``, ``discard``, ``retry``, ``dead``, ``release`` or ``keep``."""
        ...

    @property
    def delay(self) -> timedelta:
        """Until the next attempt."""
        ...

    @property
    def reason(self) -> str | None:
        """Why it is given up."""
        ...

    @property
    def error_text(self) -> str:
        """What is kept of the error."""
        ...


def apply(
    session: Session, context: Context, wanted: Sequence[Settlement], *, strict: bool
) -> dict[int, str]:
    """Settle deliveries as each is wanted to be.

    Args:
        session: In whose transaction.
        context: Of the service.
        wanted: What each becomes.
        strict: All of them, or `LeaseLost`; otherwise rows that are locked are left alone.

    Returns:
        By the id of each that was settled, what it is: ``archived``, ``discarded``, ``retry``,
        ``dead`` or ``released``. What is missing is not held, or is locked.
    """
    outcome: dict[int, str] = {}
    archives = [one.delivery for one in wanted if one.action == "archive"]
    if archives:
        done = settle.archive(
            session, context, archives, "archived", None, strict, skip_locked=not strict
        )
        outcome |= _those(archives, done, "archived")
    for one in wanted:
        if (act := _ACTS.get(one.action)) is not None and (
            word := act(session, context, one, strict)
        ):
            outcome[one.delivery.id] = word
    return outcome


def _those(deliveries: Sequence[Delivery], done: Sequence[bool], word: str) -> dict[int, str]:
    return {one.id: word for one, ok in zip(deliveries, done, strict=True) if ok}


def _discard(session: Session, context: Context, one: Settlement, strict: bool) -> str | None:
    (done,) = settle.archive(
        session,
        context,
        [one.delivery],
        "discarded",
        one.reason,
        strict,
        skip_locked=not strict,
    )
    return "discarded" if done else None


def _retry(session: Session, context: Context, one: Settlement, strict: bool) -> str | None:
    limit = one.delivery.max_read_ct
    if strict or (limit is not None and one.delivery.read_ct >= limit):
        return _fail(session, context, one, strict)
    # An attempt is left. `settle.fail` makes a dead letter of what it could not put back, and
    # would do that to a row that was locked at first, and then not any more.
    error = validation.error_text(one.error_text)
    values = settle.fence([one.delivery], required=0, errors=[error], delays=[one.delay])
    statement = statements.reschedule_failed(context.tables, skip_locked=True)
    return "retry" if execute(session, context, statement, values).all() else None


def _fail(session: Session, context: Context, one: Settlement, strict: bool) -> str | None:
    (failure,) = settle.fail(
        session,
        context,
        [one.delivery],
        one.error_text,
        one.delay,
        one.reason,
        one.action == "dead",
        strict,
        skip_locked=not strict,
    )
    if failure is None:
        return None
    return "dead" if failure.dead else "retry"


def _release(session: Session, context: Context, one: Settlement, strict: bool) -> str | None:
    (done,) = settle.release(
        session, context, [one.delivery], one.delay, strict, skip_locked=not strict
    )
    return "released" if done else None


_ACTS: dict[str, Callable[[Session, Context, Settlement, bool], str | None]] = {
    "discard": _discard,
    "retry": _retry,
    "dead": _fail,
    "release": _release,
}

"""Settling the deliveries of a consumer, each by its own disposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeAlias

from .. import validation
from ..types import Delivery, Outcome
from . import settle
from .scope import Scope
from .sql import settle as statements

__all__ = ["Settlement", "apply"]

_MaybeOutcome: TypeAlias = Outcome | None
"""None of what is not held, or is locked."""


class Settlement(Protocol):
    """How one delivery is to be settled."""

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


def apply(scope: Scope, wanted: Sequence[Settlement], *, strict: bool) -> dict[int, Outcome]:
    """Settle deliveries as each is wanted to be.

    Args:
        scope: The session, and the settings of the service.
        wanted: What each becomes.
        strict: All of them, or `LeaseLost`; otherwise rows that are locked are left alone.

    Returns:
        The outcome of each that was settled, by its id. What is missing is not held, or is locked.
    """
    outcomes: dict[int, Outcome] = {}
    archives = [settlement.delivery for settlement in wanted if settlement.action == "archive"]
    if archives:
        done = settle.archive(scope, archives, "archived", None, strict, skip_locked=not strict)
        outcomes |= {
            delivery.id: Outcome.ARCHIVED
            for delivery, archived in zip(archives, done, strict=True)
            if archived
        }
    for settlement in wanted:
        if (settle_one := _BY_ACTION.get(settlement.action)) is not None and (
            outcome := settle_one(scope, settlement, strict)
        ):
            outcomes[settlement.delivery.id] = outcome
    return outcomes


def _discard(scope: Scope, settlement: Settlement, strict: bool) -> _MaybeOutcome:
    (done,) = settle.archive(
        scope,
        [settlement.delivery],
        "discarded",
        settlement.reason,
        strict,
        skip_locked=not strict,
    )
    return Outcome.DISCARDED if done else None


def _retry(scope: Scope, settlement: Settlement, strict: bool) -> _MaybeOutcome:
    limit = settlement.delivery.max_read_ct
    if strict or (limit is not None and settlement.delivery.read_ct >= limit):
        return _fail(scope, settlement, strict)
    # An attempt is left. `settle.fail` makes a dead letter of what it could not put back, and
    # would do that to a row that was locked at first, and then not any more.
    error = validation.error_text(settlement.error_text)
    values = settle.fence(
        [settlement.delivery], required=0, errors=[error], delays=[settlement.delay]
    )
    statement = statements.reschedule_failed(scope.tables, skip_locked=True)
    return Outcome.RETRIED if scope.execute(statement, values).all() else None


def _fail(scope: Scope, settlement: Settlement, strict: bool) -> _MaybeOutcome:
    (failure,) = settle.fail(
        scope,
        [settlement.delivery],
        settlement.error_text,
        settlement.delay,
        settlement.reason,
        settlement.action == "dead",
        strict,
        skip_locked=not strict,
    )
    if failure is None:
        return None
    return Outcome.DEAD if failure.dead else Outcome.RETRIED


def _release(scope: Scope, settlement: Settlement, strict: bool) -> _MaybeOutcome:
    (done,) = settle.release(
        scope, [settlement.delivery], settlement.delay, strict, skip_locked=not strict
    )
    return Outcome.RELEASED if done else None


_BY_ACTION: dict[str, Callable[[Scope, Settlement, bool], _MaybeOutcome]] = {
    "discard": _discard,
    "retry": _retry,
    "dead": _fail,
    "release": _release,
}

"""Settling the deliveries of a consumer, each by its own disposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from .. import validation
from .._core import settle
from .._core.scope import Scope
from .._core.sql import settle as statements
from ..types import Outcome
from .disposition import Disposition

__all__ = ["apply"]

_MaybeOutcome: TypeAlias = Outcome | None
"""None of what is not held, or is locked."""


def apply(scope: Scope, dispositions: Sequence[Disposition], *, strict: bool) -> dict[int, Outcome]:
    """Settle deliveries, each by its disposition.

    Args:
        scope: The session, and the settings of the service.
        dispositions: How each is settled.
        strict: All of them, or `LeaseLost`; otherwise rows that are locked are left alone.

    Returns:
        The outcome of each that was settled, by its id. What is missing is not held, or is locked.
    """
    outcomes: dict[int, Outcome] = {}
    archives = [
        disposition.delivery for disposition in dispositions if disposition.action == "archive"
    ]
    if archives:
        done = settle.archive(scope, archives, "archived", None, strict, skip_locked=not strict)
        outcomes |= {
            delivery.id: Outcome.ARCHIVED
            for delivery, archived in zip(archives, done, strict=True)
            if archived
        }
    for disposition in dispositions:
        if (settle_one := _BY_ACTION.get(disposition.action)) is not None and (
            outcome := settle_one(scope, disposition, strict)
        ):
            outcomes[disposition.delivery.id] = outcome
    return outcomes


def _discard(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (done,) = settle.archive(
        scope,
        [disposition.delivery],
        "discarded",
        disposition.reason,
        strict,
        skip_locked=not strict,
    )
    return Outcome.DISCARDED if done else None


def _retry(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    limit = disposition.delivery.max_read_ct
    if strict or (limit is not None and disposition.delivery.read_ct >= limit):
        return _fail(scope, disposition, strict)
    # An attempt is left. `settle.fail` makes a dead letter of what it could not put back, and
    # would do that to a row that was locked at first, and then not any more.
    error = validation.error_text(disposition.error_text)
    values = settle.fence(
        [disposition.delivery], required=0, errors=[error], delays=[disposition.delay]
    )
    statement = statements.reschedule_failed(scope.tables, skip_locked=True)
    return Outcome.RETRIED if scope.execute(statement, values).all() else None


def _fail(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (failure,) = settle.fail(
        scope,
        [disposition.delivery],
        disposition.error_text,
        disposition.delay,
        disposition.reason,
        disposition.action == "dead",
        strict,
        skip_locked=not strict,
    )
    if failure is None:
        return None
    return Outcome.DEAD if failure.dead else Outcome.RETRIED


def _release(scope: Scope, disposition: Disposition, strict: bool) -> _MaybeOutcome:
    (done,) = settle.release(
        scope, [disposition.delivery], disposition.delay, strict, skip_locked=not strict
    )
    return Outcome.RELEASED if done else None


_BY_ACTION: dict[str, Callable[[Scope, Disposition, bool], _MaybeOutcome]] = {
    "discard": _discard,
    "retry": _retry,
    "dead": _fail,
    "release": _release,
}

"""Settling deliveries: archive, delete, extend, release, fail.

Each function takes several deliveries. With ``strict`` it settles all of them, or raises
`LeaseLost` and changes none. Otherwise it settles those it can, and returns for each whether it
did. An empty list sends no statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from sqlalchemy.sql import Executable

from .. import validation
from ..decisions import DEFAULT_BACKOFF
from ..errors import InvalidArgument, LeaseLost, Whereabouts
from ..types import Delivery, Failure
from .scope import Scope
from .sessions import expire_deleted, sync_loaded
from .sql import settle as statements
from .sql.fragments import MOVED
from .wakeup import announce

__all__ = [
    "archive",
    "dead_letter_undecodable",
    "delete",
    "extend",
    "fail",
    "fence",
    "lease_lost",
    "release",
]


class _How(NamedTuple):
    """How to settle: all or none, and whether to skip locked rows."""

    strict: bool
    skip_locked: bool


def archive(
    scope: Scope,
    deliveries: Iterable[Delivery],
    outcome: Literal["archived", "discarded"],
    reason: str | None,
    strict: bool,
    *,
    skip_locked: bool = False,
) -> list[bool]:
    """Move messages to the archive, with the outcome archived or discarded."""
    if outcome not in ("archived", "discarded"):
        raise InvalidArgument(f"outcome must be 'archived' or 'discarded', not {outcome!r}")
    held = _checked(deliveries)
    if not held:
        return []
    how = _How(strict, skip_locked)
    if reason is None:
        return _move(scope, held, outcome, how)
    reasons, errors = [validation.error_text(reason)] * len(held), [None] * len(held)
    return _move(scope, held, outcome, how, reasons=reasons, errors=errors)


def delete(scope: Scope, deliveries: Iterable[Delivery], strict: bool) -> list[bool]:
    """Delete messages, keeping nothing."""
    held = _checked(deliveries)
    if not held:
        return []
    if len(held) == 1:
        statement, values = statements.delete_one(scope.tables), _fence_one(held[0])
    else:
        values = fence(held, required=_required(held, strict))
        statement = statements.delete(scope.tables)
    rows = scope.execute(statement, values).all()
    gone = {row.id for row in rows}
    expire_deleted(scope.session, scope.context.models.message, gone)
    return _outcome(scope, held, gone, strict)


def extend(
    scope: Scope,
    deliveries: Iterable[Delivery],
    lease: float | timedelta,
    strict: bool,
) -> list[Delivery | None]:
    """Let leases expire ``lease`` from now; return the deliveries with their new end."""
    span = validation.validate_duration(lease, "lease", positive=True)
    held = _checked(deliveries)
    if not held:
        return []
    values = fence(held, required=_required(held, strict), lease=span)
    moved = _moved(scope, statements.extend(scope.tables), values)
    _outcome(scope, held, moved, strict)
    return [
        replace(delivery, leased_until=moved[delivery.id].leased_until)
        if delivery.id in moved
        else None
        for delivery in held
    ]


def release(
    scope: Scope,
    deliveries: Iterable[Delivery],
    delay: float | timedelta,
    strict: bool,
    *,
    skip_locked: bool = False,
) -> list[bool]:
    """Release leases without charging the attempt."""
    span = validation.validate_duration(delay)
    held = _checked(deliveries)
    if not held:
        return []
    values = fence(held, required=_required(held, strict))
    if span:
        values["delay"] = span
    statement = statements.release(scope.tables, delayed=bool(span), skip_locked=skip_locked)
    moved = _moved(scope, statement, values)
    _announce(scope, moved, span)
    return _outcome(scope, held, moved, strict)


def fail(
    scope: Scope,
    deliveries: Iterable[Delivery],
    error: BaseException | str,
    delay: float | timedelta | None,
    reason: str | None,
    dead: bool,
    strict: bool,
    *,
    skip_locked: bool = False,
) -> list[Failure | None]:
    """Reschedule messages for another attempt, or dead-letter those that have none left."""
    held = _checked(deliveries)
    text = validation.error_text(error)
    wait: Callable[[Delivery], timedelta] = lambda delivery: DEFAULT_BACKOFF.delay(delivery.read_ct)  # noqa: E731
    if delay is not None:
        span = validation.validate_duration(delay)
        wait = lambda _: span  # noqa: E731
    if not held:
        return []
    moved: dict[int, Any] = {}
    if not dead:
        values = fence(
            held,
            required=_required(held, strict),
            errors=[text] * len(held),
            delays=[wait(delivery) for delivery in held],
        )
        statement = statements.reschedule_failed(scope.tables, skip_locked=skip_locked)
        moved = _moved(scope, statement, values)
        _announce(scope, moved, delay)
    # A message that was not rescheduled has no attempt left, or is no longer held: the fencing
    # condition of the next statement tells these apart.
    spent = [delivery for delivery in held if delivery.id not in moved]
    how = _How(strict, skip_locked)
    dead_lettered = _dead_letter(scope, spent, text, reason, how) if spent else set[int]()
    return [
        Failure(delivery.id, dead=False, vt=moved[delivery.id].vt)
        if delivery.id in moved
        else Failure(delivery.id, dead=True, vt=None)
        if delivery.id in dead_lettered
        else None
        for delivery in held
    ]


def dead_letter_undecodable(scope: Scope, deliveries: Sequence[Delivery]) -> set[int]:
    """Make dead letters of deliveries whose ``decoded`` holds an error; return their ids."""
    reasons = ["cannot be decoded"] * len(deliveries)
    errors = [validation.error_text(delivery.decoded) for delivery in deliveries]
    how = _How(strict=False, skip_locked=True)
    done = _move(scope, deliveries, "dead", how, reasons=reasons, errors=errors)
    return {delivery.id for delivery, ok in zip(deliveries, done, strict=True) if ok}


def _announce(
    scope: Scope,
    moved: Collection[int],
    delay: float | timedelta | None,
) -> None:
    """Wake consumers for the messages that are visible immediately."""
    if delay is not None and not delay:
        announce(scope, list(moved))


def _dead_letter(
    scope: Scope,
    spent: Sequence[Delivery],
    error: str,
    reason: str | None,
    how: _How,
) -> set[int]:
    reasons = [
        validation.error_text(reason)
        if reason is not None
        else f"attempt {delivery.read_ct} of {delivery.max_read_ct} failed"
        for delivery in spent
    ]
    errors = [error] * len(spent)
    done = _move(scope, spent, "dead", how, reasons=reasons, errors=errors)
    return {delivery.id for delivery, ok in zip(spent, done, strict=True) if ok}


def _move(
    scope: Scope,
    held: Sequence[Delivery],
    outcome: str,
    how: _How,
    **why: Sequence[str | None],
) -> list[bool]:
    if len(held) == 1 and not how.skip_locked:
        values = _fence_one(
            held[0], outcome=outcome, **{name: text for name, (text,) in why.items()}
        )
        statement = statements.archive_one(scope.tables, with_reason=bool(why))
    else:
        values = fence(held, required=_required(held, how.strict), outcome=outcome, **why)
        statement = statements.archive(
            scope.tables, with_reason=bool(why), skip_locked=how.skip_locked
        )
    rows = scope.execute(statement, values).all()
    gone = {row.id for row in rows}
    expire_deleted(scope.session, scope.context.models.message, gone)
    return _outcome(scope, held, gone, how.strict)


def _checked(deliveries: Iterable[Delivery]) -> Sequence[Delivery]:
    listed = validation.as_list(deliveries, "deliveries")
    for index, delivery in enumerate(listed):
        if not isinstance(delivery, Delivery):
            raise InvalidArgument(
                f"deliveries[{index}] must come from dequeue(), not be {delivery!r}"
            )
    counts = Counter(delivery.id for delivery in listed)
    if len(counts) < len(listed):
        (twice, _), *_ = counts.most_common(1)
        raise InvalidArgument(f"message {twice} is among the deliveries twice: settle it once")
    return listed


def _required(held: Sequence[Delivery], strict: bool) -> int:
    return len(held) if strict else 0


def fence(held: Sequence[Delivery], **values: Any) -> dict[str, Any]:
    """Return the parameters that identify the leases."""
    return {
        "ids": [delivery.id for delivery in held],
        "tokens": [delivery.fencing_token for delivery in held],
        **values,
    }


def _fence_one(held: Delivery, **values: Any) -> dict[str, Any]:
    return {"id": held.id, "token": held.fencing_token, **values}


def _moved(scope: Scope, statement: Executable, values: dict[str, Any]) -> dict[int, Any]:
    """Run an update of live messages; return their new rows by id."""
    rows = scope.execute(statement, values).all()
    sync_loaded(scope.session, scope.context.models.message, rows, MOVED)
    return {row.id: row for row in rows}


def _outcome(
    scope: Scope,
    held: Sequence[Delivery],
    settled: Collection[int],
    strict: bool,
) -> list[bool]:
    if strict and len(settled) < len(held):
        raise lease_lost(scope, held)
    return [delivery.id in settled for delivery in held]


def lease_lost(scope: Scope, held: Sequence[Delivery]) -> LeaseLost:
    """Return the error that lists the messages whose leases were lost, and where each is now."""
    fences = {delivery.id: delivery for delivery in held}
    rows = scope.execute(statements.whereabouts(scope.tables), {"ids": list(fences)})
    found = {row.id: row for row in rows}
    lost = {}
    for id_, delivery in fences.items():
        row = found.get(id_)
        if row is None:
            lost[id_] = Whereabouts(id_, "gone")
        elif not row.held or row.fencing_token != delivery.fencing_token:
            lost[id_] = Whereabouts(id_, row.state, row.read_ct, row.worker_id, row.until)
    return LeaseLost(lost or {delivery.id: Whereabouts(delivery.id, "gone") for delivery in held})

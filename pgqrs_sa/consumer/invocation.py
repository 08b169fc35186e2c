"""What happens around a handler's call, apart from waiting for it.

Shared by threads and tasks: settling in the handler's session, and reading what a call's end means.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from .._core import sessions
from .._core.scope import Scope
from ..errors import LeaseLost, Whereabouts
from ..types import Delivery
from . import results, store
from .call_transactions import CallTransaction, CallTransactions
from .disposition import Disposition, disposition_for_error, dispositions_for_result
from .handlers import Handler, Invocation
from .leases import LeaseTable
from .retrying import is_transient, sqlstate
from .sessions import AutocommitSession, refuse_autocommit
from .signature import DecodeErrors

__all__ = [
    "FORGIVEN",
    "after_error",
    "after_return",
    "begin",
    "commit_within",
    "is_fatal",
    "settle_within",
]

_CONFLICTS = ("40001", "40P01")
"""Transactions that stood in each other's way: it is nobody's fault, and all was rolled back. "The
transaction might succeed if retried", says PostgreSQL, which sees such conflicts where there are
none, too: https://www.postgresql.org/docs/current/transaction-iso.html"""
_SOON = 0.2  # seconds, at most, until the next attempt then: they should not meet again
FORGIVEN = 20
"""Attempts that may end so: a message that meets a conflict at each of them is met by no chance,
and is to become a dead letter one day. Chosen, not measured."""


class _NotBegun(Exception):
    """Trouble that passes, before the handler was called: the attempt is not charged for it."""


def _lock_messages(scope: Scope, invocation: Invocation) -> None:
    """Lock the messages, in a transaction that keeps one snapshot: see `consume.hold`."""
    try:
        store.lock_messages(scope, invocation.deliveries)
    except Exception as error:
        if is_transient(error):  # as when a renewal has come in between
            raise _NotBegun from error
        raise


def begin(
    scope: Scope,
    invocation: Invocation,
    calls: CallTransactions,
    transaction: CallTransaction,
) -> None:
    """Prepare the transaction of a handler whose commit is the acknowledgement.

    A message that the transaction could not archive after a renewal is locked first.

    Raises:
        AutocommitSession: what the handler writes would not be rolled back.
    """
    connection = sessions.connect(scope.session, {"mapper": scope.context.mapper})
    if sessions.is_autocommit(connection):
        refuse_autocommit([invocation.handler])
    transaction.use(connection)
    if calls.keep_snapshots(connection):
        transaction.locks_messages()
        _lock_messages(scope, invocation)


def commit_within(
    scope: Scope,
    invocation: Invocation,
    result: Any,
    lease_table: LeaseTable,
    transaction: CallTransaction,
) -> list[Disposition]:
    """Do as `settle_within`, unless the attempt has failed by its timeout, or was given up.

    Raises:
        LeaseLost: it has, even if the message is still locked here, and the lease valid.
    """
    if gone := lease_table.begin_commit(invocation.deliveries):
        raise LeaseLost(
            {
                delivery.id: Whereabouts(delivery.id, "given up", delivery.read_ct)
                for delivery in gone
            }
        )
    transaction.locks_messages()
    return settle_within(scope, invocation, result)


def settle_within(scope: Scope, invocation: Invocation, result: Any) -> list[Disposition]:
    """Settle in the handler's transaction what it returned; `LeaseLost` rolls everything back."""
    dispositions = dispositions_for_result(invocation, result)
    outcomes = store.apply(scope, dispositions, strict=True)
    return [
        replace(disposition, outcome=outcomes.get(disposition.delivery.id))
        for disposition in dispositions
    ]


def after_return(invocation: Invocation, result: Any) -> list[Disposition]:
    """Return what becomes of the messages of a handler without a session, which returned."""
    if invocation.handler.acknowledge == "first":
        results.read(invocation, result)  # too late to settle, but not to say that nothing has run
        return [Disposition(delivery, "keep") for delivery in invocation.deliveries]
    return dispositions_for_result(invocation, result)


def after_error(
    invocation: Invocation, error: BaseException, *, stopping: bool
) -> list[Disposition]:
    """Return what becomes of the messages of a handler that raised, and was rolled back.

    Args:
        invocation: What it worked on.
        error: What it raised; or what its COMMIT did, where the outcome is then looked up.
        stopping: True while the consumer stops, and may have caused it.
    """
    if invocation.handler.acknowledge == "first":
        return [Disposition(delivery, "keep", error=error) for delivery in invocation.deliveries]
    told_to_stop = stopping or any(delivery.lease_lost for delivery in invocation.deliveries)
    not_its_own = (KeyboardInterrupt, AutocommitSession)
    if isinstance(error, not_its_own) or (told_to_stop and not isinstance(error, Exception)):
        # Not the message's fault: somebody wants this process, or this task, to end; or the
        # sessions are such that no handler may be called.
        return [Disposition(delivery, "release", error=error) for delivery in invocation.deliveries]
    if isinstance(error, _NotBegun):
        return [
            Disposition(delivery, "release", error=error.__cause__)
            for delivery in invocation.deliveries
        ]
    if invocation.handler.call.needs_session and sqlstate(error) in _CONFLICTS:
        return [
            _of_conflict(invocation.handler, delivery, error) for delivery in invocation.deliveries
        ]
    if errors := _of_some(invocation, error):
        # The others go back at once, as if not taken.
        return [
            disposition_for_error(invocation.handler, delivery, errors[delivery.id])
            if delivery.id in errors
            else Disposition(delivery, "release", error=error)
            for delivery in invocation.deliveries
        ]
    return [
        disposition_for_error(invocation.handler, delivery, error)
        for delivery in invocation.deliveries
    ]


def _of_some(invocation: Invocation, error: BaseException) -> Mapping[int, BaseException]:
    """Return the errors of some messages of a batch, by id, where the others have no part in it."""
    if isinstance(error, DecodeErrors):
        return error.errors
    if not isinstance(error, LeaseLost):
        return {}
    # Those that seem to be lost are tried to be failed: a handler that has settled its message
    # itself, where the consumer does, holds it again after the rollback, and must not do so for
    # ever.
    return {delivery.id: error for delivery in invocation.deliveries if delivery.id in error.ids}


def _of_conflict(handler: Handler, delivery: Delivery, error: BaseException) -> Disposition:
    if delivery.read_ct > FORGIVEN:
        return disposition_for_error(handler, delivery, error)
    soon = timedelta(seconds=random.uniform(0, _SOON))  # noqa: S311 - jitter, not a secret
    return Disposition(delivery, "release", soon, error=error)


def is_fatal(error: BaseException) -> bool:
    """Return whether an error of a handler ends the consumer, once its message is settled."""
    return isinstance(error, (KeyboardInterrupt, SystemExit, AutocommitSession))

"""Helpers for the tests of an application: check its queues, and call its handlers.

Every helper works in the given session, in its transaction, and never commits. A test whose
transaction is rolled back at the end leaves nothing behind, however many handlers ran in it.
The database does the work; nothing is faked::

    def test_an_order_sends_a_receipt(session):
        place_order(session, 7)
        assert_enqueued(session, "receipts", payload__contains={"order": 7}, delay=0)
        drained = drain(session, consumer)
        assert drained.archived == 1
        assert session.get_one(Order, 7).receipts_sent == 1

With an ``AsyncSession`` the same functions are awaited. They do not need pytest; the plugin
`pgqrs_sa.pytest_plugin` offers them as a fixture.
"""

from __future__ import annotations

from .clock import advance
from .draining import Drained, drain
from .enqueued import all_enqueued, assert_enqueued, refute_enqueued
from .faults import raise_on_commit
from .inspector import AsyncInspector, Inspector
from .matching import Wanted
from .single import work_one

__all__ = [
    "AsyncInspector",
    "Drained",
    "Inspector",
    "Wanted",
    "advance",
    "all_enqueued",
    "assert_enqueued",
    "drain",
    "raise_on_commit",
    "refute_enqueued",
    "work_one",
]

"""What a consumer asks of the database about leases, with answers that are made up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from pgqrs_sa import Delivery, LeaseLost
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa.consumer import store
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.types import Outcome
from support.cases import each_case

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTEXT = Context.of(READY_MADE, None, 7, allow_autocommit=True)
SESSION: Any = None
SCOPE = Scope(SESSION, CONTEXT)


def delivery(id_: int) -> Delivery:
    return Delivery(id_, "mail", "1", {}, None, 0, NOW, NOW, 1, 5, None, None, NOW, id_, None)


def answers(monkeypatch: pytest.MonkeyPatch, *rows: list[Any]) -> list[Any]:
    """Answer statements one after the other; return the parameters that they were given."""
    asked: list[Any] = []
    left = list(rows)

    def run(_scope: Any, _statement: Any, values: Any = None) -> Any:
        asked.append(values)
        found = left.pop(0)
        return SimpleNamespace(all=lambda: found, scalar_one=lambda: found[0])

    monkeypatch.setattr(Scope, "execute", run)
    return asked


def test_leases_without_an_answer_are_looked_for_between_two_moments_of_the_server(monkeypatch):
    asked = answers(monkeypatch, [NOW], ["a", "b"], ["c"])
    moments = iter([100.0, 102.0])  # around the reading of the server's clock
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    lease = timedelta(minutes=1)
    turns = [
        store.UnansweredLease(7, "mail", lease, since=90.0, until=95.0),
        store.UnansweredLease(8, "other", lease, since=96.0, until=99.0),
    ]
    assert store.release_unanswered(SCOPE, turns, {3, 1}) == 3
    assert asked[1] == {
        "worker_id": 7,
        "queue": "mail",
        "lease": lease,
        "since": NOW - timedelta(seconds=12),
        "until": NOW - timedelta(seconds=5),
        "known": [1, 3],
    }
    assert asked[2]["since"] == NOW - timedelta(seconds=6)
    assert asked[2]["until"] == NOW - timedelta(seconds=1)


def test_messages_are_locked_all_together_or_the_lease_is_lost(monkeypatch):
    held = [delivery(1), delivery(2)]
    lost = LeaseLost({})
    monkeypatch.setattr(store.settle, "lease_lost", lambda *_: lost)
    answers(monkeypatch, ["1", "2"], ["1"])
    store.lock_messages(SCOPE, held)
    with pytest.raises(LeaseLost) as caught:
        store.lock_messages(SCOPE, held)
    assert caught.value is lost


@each_case(
    ("rows", "fate"),
    [
        ([], Outcome.LOST),
        ([(2, False, True, "archived")], Outcome.LOST),  # of another attempt
        ([(2, False, True, "dead"), (1, False, True, "archived")], Outcome.ARCHIVED),
        ([(1, True, False, "leased")], "busy"),
        ([(1, False, False, "leased")], Outcome.LOST),
        # Its release was committed, the reply was lost, and somebody has cancelled it since.
        ([(1, False, True, "cancelled")], Outcome.LOST),
    ],
)
def test_what_became_of_a_delivery_is_told_by_its_own_token(monkeypatch, rows, fate):
    made = [
        SimpleNamespace(id=1, fencing_token=token, held=held, settled=settled, state=state)
        for token, held, settled, state in rows
    ]
    answers(monkeypatch, made)
    assert store.lookup_status(SCOPE, [delivery(1)]) == {1: fate}

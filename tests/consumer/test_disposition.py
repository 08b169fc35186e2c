"""What becomes of a message, by what its handler raised or returned."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.orm import Session

from pgqrs_sa import (
    DeadLetter,
    Discard,
    HandlerTimeout,
    InvalidArgument,
    InvalidResult,
    LeaseLost,
    PayloadError,
    Retry,
    RetryIn,
    Snooze,
)
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.call_transactions import CallTransactions
from pgqrs_sa.consumer.disposition import (
    PACKAGE,
    Disposition,
    _bounded,
    disposition_for_error,
    dispositions_for_result,
    of_the_handler,
)
from pgqrs_sa.consumer.handlers import Handlers, Invocation
from pgqrs_sa.consumer.invocation import (
    FORGIVEN,
    _lock_messages,
    _NotBegun,
    after_error,
    after_return,
    commit_within,
    is_fatal,
)
from pgqrs_sa.consumer.scheduler import Scheduler
from pgqrs_sa.decisions import Decision
from pgqrs_sa.errors import Whereabouts
from support.cases import each_case
from support.handlers import delivery, handlers

SECOND = timedelta(seconds=1)


def unit(count=1, **options):
    (handler,) = handlers(options)
    return Invocation(handler, tuple(delivery(n + 1) for n in range(count)))


def raised(error):
    """An error with a traceback of its own."""
    try:
        raise error  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001
        return caught


CARRIED_OUT = [
    (RetryIn(5), "retry", 5 * SECOND, None),
    (Snooze(timedelta(minutes=1)), "release", 60 * SECOND, None),
    (Discard("why"), "discard", 0 * SECOND, "why"),
    (Discard(), "discard", 0 * SECOND, None),
    (DeadLetter("why"), "dead", 0 * SECOND, "why"),
]


@each_case(("decision", "kind", "delay", "reason"), CARRIED_OUT)
def test_a_decision_means_the_same_raised_returned_or_by_its_retry(decision, kind, delay, reason):
    invocation = unit()
    by_retry = unit(retry=Retry(on={ValueError: decision}))
    for disposition in (
        disposition_for_error(invocation.handler, invocation.deliveries[0], decision),
        *dispositions_for_result(invocation, decision),
        disposition_for_error(by_retry.handler, by_retry.deliveries[0], ValueError("x")),
        *dispositions_for_result(unit(2, batch=2), decision),
    ):
        assert (disposition.action, disposition.delay, disposition.reason) == (kind, delay, reason)


@each_case(
    ("disposition", "text"),
    [
        ({"action": "release"}, ""),
        ({"action": "dead", "reason": "why"}, "why"),
        ({"action": "dead", "reason": "why", "error": DeadLetter("other")}, "why"),
        ({"action": "retry", "error": RetryIn(5)}, "again in 5 s"),
        ({"action": "retry", "error": InvalidResult("x")}, "pgqrs_sa.errors.InvalidResult: x"),
    ],
)
def test_what_is_kept_of_an_error_is_about_the_message_alone(disposition, text):
    assert Disposition(delivery(1), **disposition).error_text == text


def test_the_exception_that_was_returned_is_kept_with_the_error_of_that():
    error = InvalidResult("x")
    error.__cause__ = ValueError("no such address")
    text = Disposition(delivery(1), "retry", error=error).error_text
    assert text.splitlines() == [
        "pgqrs_sa.errors.InvalidResult: x",
        "  ValueError: no such address",
    ]


def test_a_traceback_begins_where_the_handler_does():
    def fails():
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        Scheduler(1, 1.0, fails)._move()
    ours = caught.value.__traceback__.tb_next
    assert ours.tb_frame.f_code.co_filename.startswith(PACKAGE)
    assert of_the_handler(ours).tb_frame.f_code.co_name == "fails"
    alone = TracebackType(None, ours.tb_frame, ours.tb_lasti, ours.tb_lineno)
    assert of_the_handler(alone) is alone
    assert of_the_handler(None) is None


def test_of_other_errors_the_cause_is_not_kept():
    error = ValueError("x")
    error.__cause__ = KeyError("secret")
    assert Disposition(delivery(1), "retry", error=error).error_text == "ValueError: x"


def test_a_text_is_cut_when_it_is_longer_than_it_may_be():
    assert (_bounded("abc", 3), _bounded("abcd", 3)) == ("abc", "abc…")


def test_whatever_else_a_handler_of_single_messages_returns_is_success():
    for result in (None, 1, [], {}, "text", False):
        (disposition,) = dispositions_for_result(unit(), result)
        assert disposition.action == "archive"


def test_only_a_decision_counts_when_the_handler_acknowledges_by_itself():
    for acknowledge in ("manual", "first"):
        for result in (None, True, {"a": 1}):
            assert (
                dispositions_for_result(unit(acknowledge=acknowledge), result)[0].action == "keep"
            )
    assert dispositions_for_result(unit(acknowledge="manual"), Discard())[0].action == "discard"
    kinds = [
        disposition.action
        for disposition in dispositions_for_result(
            unit(2, batch=2, acknowledge="manual"), [None, Snooze(1)]
        )
    ]
    assert kinds == ["keep", "release"]
    assert after_return(unit(acknowledge="first"), Discard())[0].action == "keep"


def test_a_batch_may_return_a_mapping_by_delivery_or_by_id_or_a_list():
    invocation = unit(3, batch=3)
    error = ValueError("bad")
    for result in (
        {invocation.deliveries[0]: Snooze(1), 3: error},
        {1: Snooze(1), invocation.deliveries[2]: error},
        [Snooze(1), None, error],
        (Snooze(1), None, error),
    ):
        dispositions = dispositions_for_result(invocation, result)
        assert [v.delivery.id for v in dispositions] == [1, 2, 3]
        assert [v.action for v in dispositions] == ["release", "archive", "retry"]
        assert dispositions[2].error is error


@each_case(
    ("result", "said"),
    [
        ([None], "returned 1 results for 2 messages"),
        ({9: None}, r"for messages that it was not given: \[9\]"),
        ("ok", "returned a str"),
        (7, "returned a int"),
        (True, "returned a bool"),
    ],
)
def test_a_batch_that_returns_something_else_is_told_so(result, said):
    with pytest.raises(InvalidArgument, match=said):
        dispositions_for_result(unit(2, batch=2), result)


def test_a_decision_class_of_somebody_elses_is_refused_and_retried():
    class Odd(Decision):
        pass

    invocation = unit()
    disposition = disposition_for_error(invocation.handler, invocation.deliveries[0], Odd())
    assert disposition.action == "retry"
    assert isinstance(disposition.error, InvalidArgument)


def test_a_function_in_on_that_fails_does_not_hang_the_message():
    for broken in (lambda _e, _d: 1 / 0, lambda _e, _d: "soon"):
        invocation = unit(retry=Retry(base=5, jitter=0, on={ValueError: broken}))
        disposition = disposition_for_error(
            invocation.handler, invocation.deliveries[0], ValueError()
        )
        assert (disposition.action, disposition.delay) == ("retry", 5 * SECOND)
        assert isinstance(disposition.error, (ZeroDivisionError, InvalidArgument))


# ------------------------------------------------------------------------- the error's text


def test_the_text_of_an_error_begins_with_its_type_and_ends_where_it_was_raised():
    text = Disposition(delivery(1), "retry", error=raised(ValueError("no such address"))).error_text
    assert text.startswith("ValueError: no such address\n")
    assert "raise error" in text.splitlines()[2]


def test_the_text_of_an_error_is_bounded_and_keeps_both_ends():
    def deep(n):
        if n:
            return deep(n - 1)
        raise ValueError("x" * 50_000)

    try:
        deep(200)
    except ValueError as caught:
        text = Disposition(delivery(1), "retry", error=caught).error_text
    assert len(text) < 8_000
    assert text.startswith("ValueError: xxx")
    assert 'raise ValueError("x" * 50_000)' in text


def test_the_text_of_a_group_has_those_of_its_members():
    inner = ExceptionGroup("inside", [KeyError("no such key")])
    error = raised(ExceptionGroup("several", [ValueError("no such address"), inner]))
    text = Disposition(delivery(1), "retry", error=error).error_text
    assert text.splitlines()[:4] == [
        "ExceptionGroup: several (2 sub-exceptions)",
        "  ValueError: no such address",
        "  ExceptionGroup: inside (1 sub-exception)",
        "    KeyError: 'no such key'",
    ]
    many = ExceptionGroup("many", [ValueError("x" * 1_000)] * 1_000)
    assert len(Disposition(delivery(1), "retry", error=many).error_text) < 8_000


def test_an_error_whose_text_is_broken_still_has_one():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    assert "Broken" in Disposition(delivery(1), "retry", error=raised(Broken())).error_text


def test_the_text_of_ours_has_no_traceback_and_that_of_a_decision_is_what_it_says():
    timeout = HandlerTimeout("handler", 3, "File x\n" * 400 + "File where it was")
    assert Disposition(delivery(1), "retry", error=raised(timeout)).error_text.count("File x") > 300
    payload = raised(PayloadError("payload", "is bad"))
    assert Disposition(delivery(1), "retry", error=payload).error_text == (
        "pgqrs_sa.errors.PayloadError: payload is bad"
    )
    assert Disposition(delivery(1), "retry", error=RetryIn(7)).error_text == "again in 7 s"
    dead = Disposition(delivery(1), "dead", reason="hopeless", error=DeadLetter("hopeless"))
    assert dead.error_text == "hopeless"


# ----------------------------------------------------------------------- after the call


def lost(*ids):
    return LeaseLost({id_: Whereabouts(id_, "gone") for id_ in ids})


def test_a_lease_that_was_lost_puts_the_rest_of_its_batch_back_uncharged():
    dispositions = after_error(unit(3, batch=3), lost(2), stopping=False)
    # If it is not lost after all, since the handler itself had settled it, it has failed.
    assert [disposition.action for disposition in dispositions] == ["release", "retry", "release"]


def test_a_lease_lost_of_another_message_is_a_failure_like_any():
    (disposition,) = after_error(unit(), lost(99), stopping=False)
    assert disposition.action == "retry"


@each_case(
    ("error", "stopping", "kind"),
    [
        (ValueError(), False, "retry"),
        (ValueError(), True, "retry"),
        (MemoryError(), True, "retry"),
        (KeyboardInterrupt(), False, "release"),
        (SystemExit(), False, "retry"),
        (SystemExit(), True, "release"),
        (GeneratorExit(), False, "retry"),
        (GeneratorExit(), True, "release"),
    ],
    ids=repr,
)
def test_who_wants_the_process_to_end_is_not_charged_to_the_message(error, stopping, kind):
    (disposition,) = after_error(unit(), error, stopping=stopping)
    assert disposition.action == kind
    assert is_fatal(error) is isinstance(error, (KeyboardInterrupt, SystemExit))


def test_nothing_becomes_of_what_was_acknowledged_first():
    (disposition,) = after_error(unit(acknowledge="first"), ValueError(), stopping=False)
    assert disposition.action == "keep"
    assert isinstance(disposition.error, ValueError)


class Conflict(Exception):
    sqlstate = "40001"


@each_case(
    ("session", "read_ct", "kind"),
    [(True, FORGIVEN, "release"), (True, FORGIVEN + 1, "retry"), (False, 1, "retry")],
)
def test_a_conflict_of_the_handlers_transaction_is_not_charged_until_it_is_no_chance(
    session, read_ct, kind
):
    def with_session(session: Session, payload: object) -> None:
        """Never called."""

    made = Handlers(1, Retry(), asynchronous=False)
    made.add("q0", with_session if session else lambda payload: None)
    invocation = Invocation(made.get("q0"), (delivery(1, read_ct),))
    (disposition,) = after_error(invocation, Conflict(), stopping=False)
    assert disposition.action == kind
    assert kind == "retry" or disposition.delay <= timedelta(seconds=0.2)


@each_case(("lost", "kind"), [(True, "release"), (False, "retry")])
def test_a_call_that_is_cancelled_since_its_lease_was_lost_has_not_failed(lost, kind):
    invocation = unit()
    object.__setattr__(invocation.deliveries[0], "watch", lambda: lost)
    assert after_error(invocation, asyncio.CancelledError(), stopping=False)[0].action == kind


def test_a_message_may_be_given_up_without_a_reason():
    assert (str(Discard()), Discard().reason) == ("discarded", None)
    assert (str(Discard("why")), Discard("why").reason) == ("why", "why")


@each_case(
    ("level", "keeps"),
    [("READ COMMITTED", False), ("REPEATABLE READ", True), ("SERIALIZABLE", True)],
)
def test_what_keeps_a_snapshot_holds_its_messages_locked(level, keeps):
    connection = Mock(get_isolation_level=Mock(return_value=level))
    calls = CallTransactions()
    assert [calls.keep_snapshots(connection) for _ in range(2)] == [keeps, keeps]
    connection.get_isolation_level.assert_called_once_with()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConnectionError(), _NotBegun),  # passes: the attempt is not charged for it
        (LeaseLost({1: Whereabouts(1, "gone")}), LeaseLost),
        (None, None),
    ],
)
def test_a_lock_that_cannot_be_had_is_told_apart_from_a_lease_that_was_lost(
    monkeypatch, error, raised
):
    asked = []

    def hold_messages(_scope, deliveries):
        asked.append(deliveries)
        if error is not None:
            raise error

    monkeypatch.setattr(store, "lock_messages", hold_messages)
    invocation = unit(2, batch=2)
    if raised is None:
        _lock_messages(None, invocation)
    else:
        with pytest.raises(raised) as caught:
            _lock_messages(None, invocation)
        assert error in (caught.value, caught.value.__cause__)
    assert asked == [invocation.deliveries]


def test_what_was_given_up_is_not_settled_in_the_handlers_transaction():
    """Also if its lease is valid, and its message locked there."""
    item: Any = unit(2, batch=2)
    book: Any = SimpleNamespace(begin_commit=lambda deliveries: list(deliveries[1:]))
    nothing: Any = None
    with pytest.raises(LeaseLost) as lost:
        commit_within(nothing, item, None, book, nothing)
    assert lost.value.ids == (item.deliveries[1].id,)

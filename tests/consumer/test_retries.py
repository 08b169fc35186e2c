"""`Retry`: how long a failed message waits, and what its error means."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_sa import DeadLetter, Discard, InvalidArgument, Retry, RetryIn, Snooze
from support.cases import each_case
from support.handlers import delivery


def waits(retry, attempts=6):
    return [retry.delay(n).total_seconds() for n in range(1, attempts + 1)]


def test_a_wait_is_constant_grows_by_its_base_or_doubles_up_to_the_cap():
    plain = {"base": 10, "cap": 45, "jitter": 0}
    assert waits(Retry(backoff="constant", **plain)) == [10] * 6
    assert waits(Retry(backoff="linear", **plain)) == [10, 20, 30, 40, 45, 45]
    assert waits(Retry(backoff="exponential", **plain)) == [10, 20, 40, 45, 45, 45]
    assert waits(Retry(base=0)) == [0] * 6
    assert waits(Retry(base=100, cap=5, jitter=0)) == [5] * 6


@given(
    st.sampled_from(["constant", "linear", "exponential"]),
    st.floats(0, 1000),
    st.floats(0, 10_000),
    st.floats(0, 1),
    st.integers(1, 2_000_000_000),
)
def test_a_wait_stays_within_its_jitter(backoff, base, cap, jitter, attempt):
    exact = Retry(backoff=backoff, base=base, cap=cap, jitter=0).delay(attempt).total_seconds()
    wait = Retry(backoff=backoff, base=base, cap=cap, jitter=jitter).delay(attempt).total_seconds()
    assert exact <= cap + 1e-6
    assert exact * (1 - jitter) - 1e-5 <= wait <= exact * (1 + jitter) + 1e-5


def test_the_nearest_base_class_decides():
    class Mine(KeyError):
        pass

    retry = Retry(
        base=7,
        jitter=0,
        on={LookupError: Discard("lookup"), KeyError: DeadLetter("key"), OSError: Snooze(1)},
    )
    assert retry.decide(Mine(), delivery(1)).reason == "key"
    assert retry.decide(IndexError(), delivery(1)).reason == "lookup"
    assert isinstance(retry.decide(FileNotFoundError(), delivery(1)), Snooze)
    assert retry.decide(ValueError(), delivery(1)).delay == timedelta(seconds=7)
    assert retry.decide(Discard("own"), delivery(1)).reason == "own"
    assert isinstance(
        Retry(on={BaseException: DeadLetter("any")}).decide(SystemExit(), delivery(1)), DeadLetter
    )


def test_a_group_is_decided_by_its_members_if_each_of_them_is():
    def group(*errors, kind=ExceptionGroup):
        return kind("several", list(errors))

    class Mine(ExceptionGroup):
        pass

    on = {
        KeyError: DeadLetter("key"),
        OSError: Snooze(1),
        IndexError: lambda error, _delivery: Discard("function") if error.args else None,
    }
    retry = Retry(base=7, jitter=0, on=on)
    for error, decided in (
        (group(KeyError()), "key"),
        (group(KeyError(), OSError()), "key"),
        (group(group(IndexError("x")), KeyError()), "function"),
        (group(Discard("own"), kind=BaseExceptionGroup), "own"),
    ):
        assert retry.decide(error, delivery(1)).reason == decided
    for error in (
        group(KeyError(), ValueError()),
        group(ValueError(), Discard("own")),
        group(group(KeyError(), ValueError()), OSError()),
        group(IndexError()),
    ):
        assert retry.decide(error, delivery(1)).delay == timedelta(seconds=7)
    groups = Retry(base=7, jitter=0, on={ExceptionGroup: Discard("group"), KeyError: Snooze(1)})
    assert groups.decide(Mine("several", [KeyError()]), delivery(1)).reason == "group"
    every = Retry(on={Exception: Discard("any"), KeyError: DeadLetter("key")})
    assert every.decide(group(KeyError(), ValueError()), delivery(1)).reason == "key"


def test_a_function_decides_by_error_and_delivery_or_leaves_it_to_the_backoff():
    def decide(error, item):
        return RetryIn(error.args[0] * item.read_ct) if error.args else None

    retry = Retry(base=7, backoff="constant", jitter=0, on={ValueError: decide})
    assert retry.decide(ValueError(10), delivery(1, read_ct=3)).delay == timedelta(seconds=30)
    assert retry.decide(ValueError(), delivery(1, read_ct=3)).delay == timedelta(seconds=7)


@each_case(
    ("options", "said"),
    [
        ({"backoff": "quadratic"}, "'quadratic'"),
        ({"max_attempts": 0}, "max_attempts must be from 1"),
        ({"max_attempts": 2.0}, "max_attempts must be an integer"),
        ({"base": -1}, "base and cap are 0 to"),
        ({"base": "10"}, "base and cap are 0 to"),
        ({"base": None}, "base and cap are 0 to"),
        ({"cap": float("inf")}, "finite"),
        ({"cap": 10**400}, "finite"),
        ({"jitter": 1.5}, "jitter 0 to 1"),
        ({"jitter": float("nan")}, "jitter 0 to 1"),
        ({"on": [ValueError]}, "on must be a dict"),
        ({"on": {"ValueError": Discard()}}, "exception classes as keys, not 'ValueError'"),
        ({"on": {int: Discard()}}, "exception classes as keys"),
        ({"on": {ValueError: Discard}}, r"on\[ValueError\] must be RetryIn"),
        ({"on": {ValueError: "discard"}}, r"on\[ValueError\].*not 'discard'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_it_is(options, said):
    with pytest.raises(InvalidArgument, match=said):
        Retry(**options)


@each_case("decision", [RetryIn, Snooze])
def test_a_decision_takes_seconds_or_a_timedelta_and_refuses_what_is_neither(decision):
    assert decision(1.5).delay == decision(timedelta(seconds=1.5)).delay
    for wrong in (-1, "5", None, float("nan"), True):
        with pytest.raises(InvalidArgument, match="delay must be"):
            decision(wrong)

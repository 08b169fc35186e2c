"""The backoff: within its bounds for any number of attempts."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_sa import DEFAULT_BACKOFF, Backoff, InvalidArgument
from support.cases import each_case

MICROSECOND = timedelta(microseconds=1)

seconds = st.floats(0, 1e6)
factors = st.floats(1, 1e6) | st.integers(1, 100)
attempts = st.integers(1, 100) | st.integers(1, 2_147_483_647)


def exact(backoff: Backoff, attempt: int) -> float:
    """The wait before jitter, by the definition: base times factor to the power, at most cap."""
    wait = Fraction(backoff.base)
    if backoff.factor > 1 and wait:
        reached = math.log(max(backoff.cap, 1) / backoff.base) / math.log(backoff.factor)
        if attempt - 1 > reached + 1:
            return backoff.cap
        wait *= Fraction(backoff.factor) ** (attempt - 1)
    return float(min(Fraction(backoff.cap), wait))


@given(seconds, factors, seconds, st.floats(0, 1), attempts)
def test_a_wait_is_never_negative_and_never_beyond_the_cap_and_its_jitter(
    base, factor, cap, jitter, attempt
):
    wait = Backoff(base, factor, cap, jitter).delay(attempt)

    assert timedelta(0) <= wait <= timedelta(seconds=cap * (1 + jitter)) + MICROSECOND


@given(st.floats(0.001, 1e4), st.floats(1, 10), st.floats(0.001, 1e6), attempts)
def test_a_wait_is_the_base_times_the_factor_for_each_further_attempt(base, factor, cap, attempt):
    backoff = Backoff(base, factor, cap, jitter=0)

    assert backoff.delay(attempt).total_seconds() == pytest.approx(
        exact(backoff, attempt), rel=1e-6, abs=2e-6
    )


@given(seconds, factors, seconds, st.integers(1, 1000))
def test_without_jitter_no_attempt_waits_less_than_the_one_before(base, factor, cap, attempt):
    backoff = Backoff(base, factor, cap, jitter=0)

    assert backoff.delay(attempt) <= backoff.delay(attempt + 1)


@given(st.floats(1, 1e5), st.floats(0, 1), st.integers(1, 10))
def test_jitter_moves_a_wait_by_at_most_its_share(base, jitter, attempt):
    plain = Backoff(base, 2, 1e9, 0).delay(attempt)
    moved = Backoff(base, 2, 1e9, jitter).delay(attempt)

    assert abs(moved - plain) <= plain * jitter + MICROSECOND


@each_case("attempt", [1, 5, 1_000])
def test_jitter_moves_waits_both_ways_and_apart(attempt):
    plain = Backoff(jitter=0).delay(attempt)
    waits = [Backoff(jitter=0.5).delay(attempt) for _ in range(200)]

    assert min(waits) < plain < max(waits)
    assert len(set(waits)) > 150
    assert abs(sum(waits, timedelta(0)) / len(waits) - plain) < plain * 0.1


@each_case("attempt", [64, 65, 1_024, 2_147_483_647, 10**100], ids="{:.0e}".format)
@each_case("factor", [1.5, 2, 2.0, 10.0, 1e5, 1e10, 1e300])
def test_any_number_of_attempts_waits_for_the_cap_and_does_not_overflow(attempt, factor):
    assert Backoff(10.0, factor, 3_600.0, 0).delay(attempt) == timedelta(hours=1)


@each_case("factor", [1.01, 1.05, 1.1])
def test_a_gentle_factor_reaches_the_cap_too(factor):
    assert Backoff(10.0, factor, 3_600.0, 0).delay(1_000) == timedelta(hours=1)


def test_a_factor_of_one_waits_the_same_each_time():
    assert {Backoff(7, 1, 60, 0).delay(n) for n in (1, 2, 50, 10**9)} == {timedelta(seconds=7)}


def test_a_base_above_the_cap_waits_for_the_cap():
    assert Backoff(base=100, cap=5, jitter=0).delay(1) == timedelta(seconds=5)


@each_case("backoff", [Backoff(base=0), Backoff(cap=0)])
def test_a_base_or_cap_of_nothing_waits_for_nothing(backoff):
    assert backoff.delay(9) == timedelta(0)


def test_a_base_of_nothing_waits_for_nothing_after_any_number_of_attempts():
    assert Backoff(base=0).delay(10**6) == timedelta(0)


def test_the_bounds_themselves_are_allowed():
    century = 100 * 365 * 86_400.0
    largest = Backoff(base=century, cap=century, factor=sys.float_info.max, jitter=0)
    assert largest.delay(2) == timedelta(seconds=century)
    assert Backoff(base=0, cap=0, factor=1, jitter=1).delay(2) == timedelta(0)


def test_the_default_doubles_from_ten_seconds_up_to_an_hour():
    plain = Backoff(jitter=0)
    waits = [plain.delay(n).total_seconds() for n in range(1, 12)]

    assert waits == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]
    assert Backoff() == DEFAULT_BACKOFF
    assert DEFAULT_BACKOFF.jitter == 0.1


@each_case(
    "wrong",
    [
        {"base": -1},
        {"base": -0.001},
        {"base": math.nan},
        {"base": math.inf, "cap": math.inf},
        {"factor": 0.99},
        {"factor": 0},
        {"factor": -2},
        {"factor": math.nan},
        {"cap": -1},
        {"cap": math.nan},
        {"cap": math.inf},
        {"base": 1e300, "cap": 1e300},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
    ],
)
def test_a_backoff_that_cannot_be_is_refused_when_it_is_made(wrong):
    with pytest.raises(InvalidArgument) as caught:
        Backoff(**wrong)

    for name, value in wrong.items():
        assert f"{name}={value!r}" in str(caught.value)


def test_a_backoff_is_a_value():
    assert hash(Backoff()) == hash(Backoff())
    with pytest.raises(AttributeError):
        Backoff().base = 3

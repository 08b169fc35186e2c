"""The argument rules: what is refused, with the value named, and what is passed on."""

from __future__ import annotations

import enum
import math
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from types import MappingProxyType, SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_sa import DelayError, InvalidArgument, PayloadError, Worker, validation
from support.cases import each_case
from support.properties import at_least

SECOND = timedelta(seconds=1)
NEW_YORK = ZoneInfo("America/New_York")
HUGE = 10**5000  # Python refuses to print it
quick = at_least(50)


class Level(enum.IntEnum):
    HIGH = 3


class Nowhere(tzinfo):
    """A time zone that does not say where it is: such a datetime is naive."""

    def utcoffset(self, _when):
        return None


# ------------------------------------------------------------------------------- durations


@each_case(
    ("value", "problem"),
    [
        (True, "must be seconds or a timedelta, not True"),
        (False, "must be seconds or a timedelta, not False"),
        ("5", "must be seconds or a timedelta, not '5'"),
        (b"5", "must be seconds or a timedelta, not b'5'"),
        (None, "must be seconds or a timedelta, not None"),
        ([5], "must be seconds or a timedelta, not [5]"),
        (1j, "must be seconds or a timedelta, not 1j"),
        (datetime(2026, 1, 1, tzinfo=UTC), "must be seconds or a timedelta, not datetime"),
        (math.nan, "must be finite, not nan"),
        (math.inf, "must be finite, not inf"),
        (-math.inf, "must be finite, not -inf"),
        (-1, "must be 0 or more seconds, not -1"),
        (-0.5, "must be 0 or more seconds, not -0.5"),
        (-1e-9, "must be 0 or more seconds, not -1e-09"),
        (-1e300, "must be 0 or more seconds, not -1e+300"),
        (-(10**30), "must be 0 or more seconds, not -1000"),
        (-SECOND, "must be 0 or more seconds, not datetime.timedelta(days=-1"),
        (timedelta.min, "must be 0 or more seconds, not datetime.timedelta(days=-999999999)"),
        (1e12, "ends past year 9998"),
        (1e300, "=1e+300 ends past year 9998"),
        (10**30, "ends past year 9998"),
        (timedelta.max, "=datetime.timedelta(days=999999999"),
        (timedelta(days=366 * 8000), "ends past year 9998"),
    ],
)
@each_case("positive", [False, True])
@each_case("name", ["delay", "items[3].lease"])
def test_a_duration_that_cannot_be_is_refused(value, problem, positive, name):
    with pytest.raises(DelayError) as caught:
        validation.validate_duration(value, name, positive=positive)

    expected = problem.replace("0 or more", "more than 0") if positive else problem
    assert str(caught.value).startswith(name)
    assert expected in str(caught.value)
    assert caught.value.code == "PGQ-002"


@each_case(
    ("value", "span"),
    [
        (0, timedelta(0)),
        (0.0, timedelta(0)),
        (-0.0, timedelta(0)),
        (timedelta(0), timedelta(0)),
        (1e-9, timedelta(0)),
        (1, SECOND),
        (1.5, 1.5 * SECOND),
        (1e-6, timedelta(microseconds=1)),
        (Level.HIGH, 3 * SECOND),
        (timedelta(days=2, microseconds=3), timedelta(days=2, microseconds=3)),
        (86_400 * 365 * 1000, timedelta(days=365_000)),
    ],
)
def test_a_duration_is_seconds_or_a_timedelta(value, span):
    result = validation.validate_duration(value)

    assert result == span
    assert type(result) is timedelta


@each_case("value", [0, 0.0, -0.0, timedelta(0), 1e-9, 4e-7])
def test_a_duration_that_rounds_to_nothing_is_refused_where_it_must_be_positive(value):
    with pytest.raises(DelayError, match="lease must be more than 0 seconds, not"):
        validation.validate_duration(value, "lease", positive=True)


@each_case("value", [1e-6, 1, SECOND])
def test_a_duration_above_nothing_is_positive(value):
    assert validation.validate_duration(value, positive=True) > timedelta(0)


def test_a_duration_may_end_up_to_the_end_of_time_and_not_there():
    left = validation.END_OF_TIME - datetime.now(UTC)

    assert validation.validate_duration(left - 60 * SECOND) == left - 60 * SECOND
    with pytest.raises(DelayError, match="past year 9998"):
        validation.validate_duration(left + 60 * SECOND)


@quick
@given(st.floats() | st.integers(-(10**400), 10**400) | st.timedeltas())
def test_any_number_is_a_span_that_ends_in_time_or_a_delay_error(value):
    try:
        span = validation.validate_duration(value)
    except DelayError:
        return
    assert timedelta(0) <= span
    assert datetime.now(UTC) + span < validation.END_OF_TIME + SECOND


# --------------------------------------------------------------------------------- moments


@each_case(
    ("value", "problem"),
    [
        (datetime(2026, 1, 1), "naive"),  # noqa: DTZ001
        (datetime.max, "naive"),  # noqa: DTZ901
        (datetime(2026, 1, 1, tzinfo=Nowhere()), "naive"),
        (date(2026, 1, 1), "must be an aware datetime, not datetime.date(2026, 1, 1)"),
        ("2026-01-01T00:00:00Z", "must be an aware datetime, not '2026-01-01T00:00:00Z'"),
        (1_700_000_000, "must be an aware datetime, not 1700000000"),
        (None, "must be an aware datetime, not None"),
        (True, "must be an aware datetime, not True"),
        (SECOND, "must be an aware datetime, not datetime.timedelta(seconds=1)"),
        (datetime(9999, 1, 1, tzinfo=UTC), "past year 9998"),
        (datetime.max.replace(tzinfo=UTC), "past year 9998"),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=14))), "past year 9998"),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))), "years 1 to 9998"),
        (datetime.max.replace(tzinfo=NEW_YORK), "years 1 to 9998"),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=1))), "years 1 to 9998"),
        (
            datetime(9998, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-1))),
            "past year 9998",
        ),
    ],
)
@each_case("name", ["at", "items[3].at"])
def test_a_moment_that_is_not_one_is_refused(value, problem, name):
    with pytest.raises(DelayError) as caught:
        validation.validate_moment(value, name)

    assert str(caught.value).startswith(name)
    assert problem in str(caught.value)
    assert repr(value) in str(caught.value)


@each_case(
    "value",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2020, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=-14))),
        datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(9999, 1, 1, 0, 30, tzinfo=timezone(timedelta(hours=1))),
        datetime(2026, 6, 1, tzinfo=ZoneInfo("Asia/Kathmandu")),
        datetime(2026, 6, 1, tzinfo=ZoneInfo("Pacific/Kiritimati")),
        datetime(2026, 6, 1, tzinfo=ZoneInfo("Etc/GMT+12")),
        datetime(1900, 1, 1, tzinfo=ZoneInfo("Europe/Amsterdam")),  # +00:19:32
        datetime(2026, 6, 1, tzinfo=timezone(timedelta(seconds=1, microseconds=7))),
    ],
)
def test_an_aware_moment_is_the_same_moment_in_utc(value):
    result = validation.validate_moment(value)

    assert result == value
    assert result.tzinfo is UTC


@each_case(
    ("wall", "fold", "utc"),
    [
        # 2026-11-01 01:30 happens twice in New York, and 2026-03-08 02:30 not at all.
        (datetime(2026, 11, 1, 1, 30), 0, datetime(2026, 11, 1, 5, 30)),  # noqa: DTZ001
        (datetime(2026, 11, 1, 1, 30), 1, datetime(2026, 11, 1, 6, 30)),  # noqa: DTZ001
        (datetime(2026, 3, 8, 2, 30), 0, datetime(2026, 3, 8, 7, 30)),  # noqa: DTZ001
        (datetime(2026, 3, 8, 2, 30), 1, datetime(2026, 3, 8, 6, 30)),  # noqa: DTZ001
    ],
)
def test_a_moment_at_a_change_of_the_clocks_follows_its_fold(wall, fold, utc):
    value = wall.replace(tzinfo=NEW_YORK, fold=fold)

    assert validation.validate_moment(value) == utc.replace(tzinfo=UTC)


@quick
@given(st.datetimes(timezones=st.none() | st.timezones(), allow_imaginary=True))
def test_any_datetime_is_a_storable_moment_or_a_delay_error(value):
    try:
        result = validation.validate_moment(value)
    except DelayError:
        return
    assert result.tzinfo is UTC
    assert result.year <= 9998
    assert result.timestamp() == value.timestamp()


def test_a_delay_and_a_time_together_contradict_each_other():
    at = datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(DelayError) as caught:
        validation.validate_delay_or_at(0, at, "items[1].")

    assert "items[1].delay=0" in str(caught.value)
    assert repr(at) in str(caught.value)


@each_case(
    ("delay", "at", "both"),
    [
        (None, None, (timedelta(0), None)),
        (5, None, (5 * SECOND, None)),
        (None, datetime(2030, 1, 1, tzinfo=UTC), (timedelta(0), datetime(2030, 1, 1, tzinfo=UTC))),
    ],
)
def test_at_most_one_of_delay_and_time_is_given(delay, at, both):
    assert validation.validate_delay_or_at(delay, at) == both


@each_case(("delay", "at", "name"), [(-1, None, "items[7].delay"), (None, "soon", "items[7].at")])
def test_the_place_of_a_delay_or_time_is_named(delay, at, name):
    with pytest.raises(DelayError) as caught:
        validation.validate_delay_or_at(delay, at, "items[7].")

    assert str(caught.value).startswith(name)


# ----------------------------------------------------------------------------- queue names


@each_case(
    "name",
    ["mail", "a", "0", "A-z_0.9:/x", "a" * 128, "orders/eu/high", "select", "v1.2:dead", "a--"],
)
def test_a_queue_name_is_letters_digits_and_a_little_punctuation(name):
    assert validation.validate_queue_name(name) == name


@each_case(
    "name",
    [
        "",
        " ",
        "a b",
        " mail",
        "mail ",
        "mail\n",
        "mail\r\n",
        "\nmail",
        "mail\nother",
        "a" * 129,
        "-mail",
        ".mail",
        "_mail",
        "/mail",
        ":mail",
        "..",
        "größe",
        "日本",
        "mail😀",
        "maiⅼ",  # noqa: RUF001 - a Roman numeral that looks like an l
        "٣",  # a digit, but not of ASCII
        "a\0",
        "a\ud83d",
        "'; DROP TABLE pgqrs_messages; --",
        "mail'--",
        'mail"',
        "mail' OR '1'='1",
        "mail;",
        "mail\\",
        "%s",
        "%(queue)s",
        ":queue",
        "$1",
        "mail*",
        "a,b",
        "{mail}",
    ],
    ids=ascii,
)
def test_a_string_that_is_no_queue_name_is_refused_and_shown(name):
    with pytest.raises(InvalidArgument) as caught:
        validation.validate_queue_name(name)

    assert repr(name) in str(caught.value)
    assert "starting with a letter or a digit" in str(caught.value)
    str(caught.value).encode()


@each_case("name", [None, 1, b"mail", ["mail"], True, object])
def test_a_queue_name_that_is_no_string_is_refused_and_shown(name):
    with pytest.raises(InvalidArgument) as caught:
        validation.validate_queue_name(name)

    assert repr(name) in str(caught.value)


# ------------------------------------------------------------------------------------ keys


@each_case(
    "key", ["k", "k" * 255, "é" * 255, "😀" * 255, " ", "order:7", "'; --", "a\nb"], ids=ascii
)
def test_a_key_is_text_of_1_to_255_characters(key):
    assert validation.validate_key(key) == key


@each_case("key", ["", "k" * 256, None, 7, b"k", True, ["k"], 1.5])
def test_a_key_that_is_no_such_text_is_refused_and_shown(key):
    with pytest.raises(InvalidArgument, match=r"items\[2\]\.key must be a string of 1 to 255") as e:
        validation.validate_key(key, "items[2].")

    assert repr(key) in str(e.value)


@each_case(("key", "problem"), [("a\0", "NUL"), ("\ud83d", "lone surrogate")])
def test_a_key_that_cannot_be_stored_is_refused(key, problem):
    with pytest.raises(PayloadError, match=problem) as caught:
        validation.validate_key(key, "items[2].")

    assert caught.value.path == "items[2].key"


# --------------------------------------------------------------------------------- headers


@each_case(
    "value",
    [[("a", 1)], "a", 1, 1.5, True, [], (), {"a"}, object()],
    ids=lambda v: type(v).__name__,
)
def test_headers_that_are_no_dict_are_refused(value):
    with pytest.raises(PayloadError) as caught:
        validation.headers_text(value, "items[4].")

    assert str(caught.value) == f"items[4].headers must be a dict, not a {type(value).__name__}"


@each_case(
    ("value", "path"),
    [
        ({"trace": math.nan}, "headers.trace"),
        ({"a b": [{"x": {1}}]}, "headers['a b'][0].x"),
        ({1: "x"}, "headers"),
        ({"t": datetime(2026, 1, 1, tzinfo=UTC)}, "headers.t"),
        ({"t": "\0"}, "headers.t"),
    ],
)
def test_headers_with_something_that_is_not_json_are_refused_by_the_place(value, path):
    with pytest.raises(PayloadError) as caught:
        validation.headers_text(value)

    assert caught.value.path == path


@each_case("character", ["a", "é", "😀"])
def test_headers_are_at_most_64_kib_counted_in_bytes(character):
    size = len(character.encode())
    room = 65_536 - len(b'{"h":""}')
    fits = {"h": character * (room // size) + "." * (room % size)}

    assert len(validation.headers_text(fits).encode()) == 65_536
    with pytest.raises(PayloadError, match="headers takes 65537 bytes, more than 65536"):
        validation.headers_text({"h": fits["h"] + "."})


def test_headers_may_be_any_mapping_or_none_at_all():
    assert validation.headers_text(None) is None
    assert validation.headers_text({}) == "{}"
    assert validation.headers_text(MappingProxyType({"a": 1})) == '{"a":1}'


# -------------------------------------------------------------------------------- integers

INTEGERS = {
    "priority": (validation.validate_priority, -32_768, 32_767),
    "max_read_ct": (validation.validate_max_read_ct, 1, 2_147_483_647),
    "limit": (validation.validate_limit, 1, 2_147_483_647),
    "id": (validation.validate_id, 1, 9_223_372_036_854_775_807),
    "worker": (validation.validate_worker_id, 1, 9_223_372_036_854_775_807),
}
integers = each_case("name", list(INTEGERS))


@integers
def test_an_integer_may_reach_the_borders_of_its_column(name):
    check, least, most = INTEGERS[name]

    assert [check(least), check(most), check(Level.HIGH)] == [least, most, 3]


@integers
def test_an_integer_beyond_the_borders_of_its_column_is_refused_and_shown(name):
    check, least, most = INTEGERS[name]
    for value in (least - 1, most + 1, -(2**70), 2**70):
        with pytest.raises(InvalidArgument) as caught:
            check(value)
        assert str(caught.value) == f"{name} must be from {least} to {most}, not {value}"


@integers
@each_case("value", [True, False, 1.0, "1", b"1", math.nan, [1], SECOND, 1j, object()])
def test_what_is_no_integer_is_refused_and_shown(name, value):
    with pytest.raises(InvalidArgument) as caught:
        INTEGERS[name][0](value)

    assert str(caught.value) == f"{name} must be an integer, not {value!r}"


@each_case("check", [validation.validate_priority, validation.validate_max_read_ct])
def test_the_place_of_an_integer_is_named(check):
    with pytest.raises(InvalidArgument, match=r"^items\[5\]\."):
        check("x", "items[5].")


@each_case("worker", [7, Worker(id=7)])
def test_a_worker_is_given_by_its_id_or_by_its_row(worker):
    assert validation.validate_worker_id(worker) == 7


def test_what_has_an_id_but_is_no_worker_is_refused():
    with pytest.raises(InvalidArgument, match="worker must be an integer"):
        validation.validate_worker_id(SimpleNamespace(id=7))


def test_no_worker_is_no_worker():
    assert validation.validate_worker_id(None) is None


def test_a_worker_row_that_was_never_flushed_has_no_id_to_give():
    with pytest.raises(InvalidArgument, match="worker must be an integer, not None"):
        validation.validate_worker_id(Worker(name="w"))


# ------------------------------------------------------------------------------- the rest


@each_case(
    ("error", "text"),
    [
        (ValueError("no such order"), "ValueError: no such order"),
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError(), "RuntimeError: "),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        ("the printer is on fire", "the printer is on fire"),
        ("", ""),
        ("a\0b", "a\\x00b"),
        (ValueError("a\0b\ud83d"), "ValueError: a\\x00b\\ud83d"),
        ("é日😀", "é日😀"),
        (ExceptionGroup("several", [ValueError()]), "ExceptionGroup: several (1 sub-exception)"),
        (None, "None"),
        (7, "7"),
    ],
)
def test_an_error_becomes_text_that_postgresql_can_store(error, text):
    assert validation.error_text(error) == text


@each_case("character", ["x", "é", "😀", "\0", "\ud83d"], ids=ascii)
@each_case("length", [8_192, 8_193, 100_000])
def test_the_text_of_an_error_is_bounded(character, length):
    text = validation.error_text(character * length)

    assert len(text) <= 8_192 + 1
    assert text.endswith("…") == (len(validation.error_text(character)) * length > 8_192)
    text.encode()


def test_an_error_whose_text_cannot_be_made_is_still_an_error_to_keep():
    # fail() is called in an except clause: it must not die of the error that it reports.
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    assert validation.error_text(Broken()).startswith("Broken")


@each_case("values", ["abc", b"abc", {"a": 1}, "", 7, None, object(), MappingProxyType({})])
def test_what_is_no_list_is_refused_by_name(values):
    with pytest.raises(InvalidArgument, match=r"^items must be a list, not "):
        validation.as_list(values, "items")


@each_case("values", [[], (), iter(()), set(), range(0)])
def test_an_empty_list_is_a_list(values):
    assert validation.as_list(values, "items") == []


def test_a_list_may_be_any_iterable_and_is_read_once():
    assert list(validation.as_list((n for n in range(3)), "items")) == [0, 1, 2]


@each_case(("where", "several"), [(None, ()), ("c", ("c",)), (["a", "b"], ("a", "b")), ((), ())])
def test_criteria_are_one_several_or_none(where, several):
    assert validation.validate_criteria(where) == several


def test_suggestions_are_the_closest_names_best_first():
    known = ["mail", "mails", "email", "orders"]

    assert validation.suggestions("mial", known)[0] == "mail"
    assert validation.suggestions("mails", known)[0] == "mails"
    assert validation.suggestions("zzz", known) == []
    assert len(validation.suggestions("mail", ["mail1", "mail2", "mail3", "mail4"])) == 3


OVERSIZED = {
    "an integer that Python will not print, as a delay": lambda: validation.validate_duration(HUGE),
    "the same below zero": lambda: validation.validate_duration(-HUGE),
    "the same as a limit": lambda: validation.validate_limit(HUGE),
    "the same as a key": lambda: validation.validate_key(HUGE),
    "the same as the key of a header": lambda: validation.headers_text({HUGE: 1}),
    "a megabyte as a key": lambda: validation.validate_key("k" * 1_000_000),
    "a megabyte as a queue": lambda: validation.validate_queue_name("q" * 1_000_000),
    "a megabyte as a delay": lambda: validation.validate_duration("1" * 1_000_000),
    "a megabyte instead of a list": lambda: validation.as_list("x" * 1_000_000, "items"),
    "a megabyte as the key of a header": lambda: validation.headers_text({b"k" * 1_000_000: 1}),
}


@each_case("refused", OVERSIZED)
def test_a_value_that_is_far_too_large_is_refused_in_a_few_words(refused):
    with pytest.raises(InvalidArgument) as caught:
        refused()

    assert len(str(caught.value)) < 2_000

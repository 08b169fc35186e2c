"""The strict codec: what it refuses, where it says the fault is, and that the rest comes back."""

from __future__ import annotations

import collections
import copy
import datetime as dt
import decimal
import enum
import fractions
import json
import math
import pathlib
import time
import types
import uuid
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_sa import InvalidArgument, JsonCodec, PayloadError
from pgqrs_sa.codecs import MAX_DEPTH
from support.cases import each_case
from support.properties import at_least

codec = JsonCodec()
SURROGATE = "\ud83d"


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.StrEnum):
    FAST = "fast"


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


@dataclass(eq=False)
class Money:
    amount: int


class Point(NamedTuple):
    x: float
    y: float


def refusal(value: object) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        codec.dumps(value)
    return caught.value


def nested(levels: int, kind: str) -> object:
    """``levels`` containers inside each other, around a number."""
    value: object = 1
    for level in range(levels):
        as_list = kind == "list" or (kind == "mixed" and level % 2)
        value = [value] if as_list else {"k": value}
        if kind == "tuple":
            value = (next(iter(value.values())),)
    return value


BAD_LEAVES = {
    "nan": (math.nan, "is nan"),
    "infinity": (math.inf, "is inf"),
    "minus infinity": (-math.inf, "is -inf"),
    "nul": ("a\0b", "contains NUL"),
    "nul alone": ("\0", "contains NUL"),
    "high surrogate": (SURROGATE, "lone surrogate at index 0"),
    "low surrogate": ("ab\udc00", "lone surrogate at index 2"),
    "surrogates in the wrong order": ("\udc00\ud800", "lone surrogate"),
    "surrogate pair as two characters": ("\ud83d\ude00", "lone surrogate"),
    "bytes": (b"ab", "is a bytes"),
    "bytearray": (bytearray(b"ab"), "is a bytearray"),
    "memoryview": (memoryview(b"ab"), "is a memoryview"),
    "set": ({1, 2}, "sorted list"),
    "frozenset": (frozenset({1}), "sorted list"),
    "naive time that is folded": (
        dt.datetime(2026, 1, 2, fold=1),  # noqa: DTZ001
        "not come back equal",
    ),
    "nan of decimal": (decimal.Decimal("NaN"), "not come back equal"),
    "fraction": (fractions.Fraction(1, 3), "is a Fraction"),
    "complex": (1j, "is a complex"),
    "path": (pathlib.PurePosixPath("/tmp"), "is a PurePosixPath"),  # noqa: S108
    "object": (object(), "is a object"),
    "class that cannot be compared": (Money(3), "is a Money that would not come back equal"),
    "class": (int, "is a type"),
    "function": (len, "is a builtin_function_or_method"),
    "generator": ((n for n in range(3)), "is a generator"),
    "range": (range(3), "is a range"),
    "deque": (collections.deque([1]), "is a deque"),
    "mapping that is no dict": (types.MappingProxyType({"a": 1}), "dict(value)"),
    "dict view": ({}.keys(), "is a dict_keys"),
    "4301 digits": (10**4300, "more than 4300 digits"),
    "minus 4301 digits": (-(10**4300), "more than 4300 digits"),
    "5000 digits": (10**4999, "more than 4300 digits"),
}
leaves = each_case(("leaf", "problem"), BAD_LEAVES)


@leaves
def test_a_leaf_that_json_cannot_hold_is_refused_by_its_place(leaf, problem):
    error = refusal({"items": [0, 1, 2, {"price": leaf}]})

    assert error.path == "payload.items[3].price"
    assert problem in error.problem
    assert str(error) == f"{error.path} {error.problem}"


@leaves
def test_a_leaf_that_json_cannot_hold_is_refused_as_the_whole_payload(leaf, problem):
    error = refusal(leaf)

    assert error.path == "payload"
    assert problem in error.problem


def test_the_error_is_a_value_error_with_a_code():
    error = refusal({1})

    assert isinstance(error, InvalidArgument)
    assert isinstance(error, ValueError)
    assert error.code == "PGQ-003"


@each_case(
    ("value", "path"),
    [
        ({"items": [1, 2, 3, {"price": math.nan}]}, "payload.items[3].price"),
        ({"a b": {"x": math.nan}}, "payload['a b'].x"),
        ({"it's": math.nan}, 'payload["it\'s"]'),
        ({"": math.nan}, "payload['']"),
        ({"0": math.nan}, "payload['0']"),
        ({"a.b": math.nan}, "payload['a.b']"),
        ({"größe": math.nan}, "payload.größe"),
        ({"日本": [[math.nan]]}, "payload.日本[0][0]"),
        ({"line\n": math.nan}, "payload['line\\n']"),
        ([[], [1, math.nan]], "payload[1][1]"),
        ([(0, math.nan)], "payload[0][1]"),
        ({"class": math.nan}, "payload.class"),
        ({"a": "\0"}, "payload.a"),
        ({"größe": "\0"}, "payload.größe"),
        ({"größe": SURROGATE}, "payload.größe"),
        ({"a b": {"é è": "\0"}}, "payload['a b']['é è']"),
        (Point(1, math.nan), "payload[1]"),
        (collections.OrderedDict(a=collections.Counter(b=1), c={1}), "payload.c"),
        (math.nan, "payload"),
    ],
)
def test_the_path_is_written_as_one_would_write_it_in_python(value, path):
    assert refusal(value).path == path


def test_the_path_begins_with_what_the_caller_calls_the_value():
    with pytest.raises(PayloadError) as caught:
        codec.dumps({"trace": {1}}, path="items[7].headers")

    assert caught.value.path == "items[7].headers.trace"


def test_the_first_offending_value_is_the_one_that_is_named():
    assert refusal({"a": 1, "b": math.nan, "c": math.nan}).path == "payload.b"
    assert refusal([{"x": 1}, {"x": {2}}, {"x": math.inf}]).path == "payload[1].x"


@each_case(
    "key",
    [1, 0, -5, None, True, False, 1.5, math.nan, (1, 2), (), b"a", Level.HIGH, uuid.UUID(int=1)],
)
@each_case("around", {"top": lambda x: x, "inside": lambda x: [{"deep": x}]})
def test_a_key_that_is_no_string_is_refused_although_json_would_rename_it(key, around):
    error = refusal(around({"first": 1, key: 2}))

    assert error.path == ("payload" if around({}) == {} else "payload[0].deep")
    assert repr(key) in error.problem
    assert "keys must be strings" in error.problem


def test_two_keys_that_json_would_merge_are_refused():
    assert "has the key 1" in refusal({"1": "a", 1: "b"}).problem


@each_case(
    ("key", "path", "problem"),
    [
        ("a\0b", "payload['a\\x00b']", "NUL"),
        ("\0", "payload['\\x00']", "NUL"),
        ("\ud83d", "payload['\\ud83d']", "lone surrogate at index 0"),
        ("key\udfff", "payload['key\\udfff']", "lone surrogate at index 3"),
    ],
)
def test_a_key_that_cannot_be_stored_is_refused_and_shown_in_escapes(key, path, problem):
    error = refusal({"ok": 1, key: 2})

    assert error.path == path
    assert problem in error.problem
    str(error).encode()  # the message itself can be printed and logged
    assert "\0" not in str(error)


@each_case("kind", ["list", "dict", "mixed", "tuple"])
def test_nesting_of_200_is_kept_and_of_201_is_refused(kind):
    deep = nested(MAX_DEPTH, kind)

    assert MAX_DEPTH == 200
    assert json.loads(codec.dumps(deep)) == json.loads(json.dumps(deep))
    assert "nested deeper than 200 levels" in refusal(nested(MAX_DEPTH + 1, kind)).problem


@each_case("kind", ["list", "dict", "mixed", "tuple"])
@each_case("levels", [500, 5_000, 100_000])
def test_nesting_that_overflows_the_stack_is_refused_with_a_short_path(kind, levels):
    error = refusal(nested(levels, kind))

    assert "nested deeper" in error.problem
    assert error.path.startswith("payload[" if kind in ("list", "tuple") else "payload")
    assert len(str(error)) < 200


def test_breadth_and_brackets_inside_strings_are_not_depth():
    value = {"wide": [[] for _ in range(1000)], "text": "[{" * 1000}

    assert codec.loads(codec.dumps(value)) == value


@each_case("kind", [list, dict])
def test_a_value_that_contains_itself_is_refused(kind):
    loop = kind()
    if isinstance(loop, list):
        loop.append(loop)
    else:
        loop["self"] = loop

    assert "nested deeper" in refusal(loop).problem


@each_case("sign", [1, -1])
def test_an_integer_of_4300_digits_is_kept_to_the_last(sign):
    number = sign * (10**4300 - 1)

    assert codec.loads(codec.dumps({"n": number})) == {"n": number}
    assert codec.loads(codec.dumps((number,))) == [number]


@each_case("number", [2**53 + 1, 2**63, -(2**64), 10**40])
def test_an_integer_beyond_64_bits_does_not_become_a_float(number):
    back = codec.loads(codec.dumps([number]))

    assert back == [number]
    assert type(back[0]) is int


@each_case(
    "number",
    [1e308, -1e308, 1.7976931348623157e308, 5e-324, 2.2250738585072014e-308, 0.1, 1e16, -0.0, 1e22],
)
def test_a_float_comes_back_bit_for_bit(number):
    back = codec.loads(codec.dumps([number]))[0]

    assert type(back) is float
    assert back.hex() == number.hex()


@each_case("value", [None, True, False, 0, 1.5, "", "text", [], {}])
def test_a_bare_value_is_a_payload(value):
    back = codec.loads(codec.dumps(value))

    assert back == value
    assert type(back) is type(value)


@each_case(
    ("value", "back"),
    [
        ((), []),
        ((1, 2), [1, 2]),
        ({"t": (1, (2, "x"))}, {"t": [1, [2, "x"]]}),
        (Point(1, 2), [1, 2]),
        (Text("s"), "s"),
        ({Text("k"): Text("v")}, {"k": "v"}),
        (Mode.FAST, "fast"),
        ({Mode.FAST: Mode.FAST}, {"fast": "fast"}),
        (Level.HIGH, 3),
        ([Whole(7)], [7]),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, x=[1]), {"x": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
    ],
)
def test_a_subclass_of_a_json_type_is_stored_as_that_type(value, back):
    stored = codec.loads(codec.dumps(value))

    assert stored == back
    assert type(stored) is type(back)


@each_case(
    "text",
    [
        "\\u0000",
        "\\\\u0000",
        "back\\slash",
        '"quoted"',
        "\x01\x1f\x7f",
        "\u2028\u2029",
        "é 日本 😀",
        "\ufeff",
        "\uffff",
        "\U0010ffff",
        "</script>",
        "line\r\nline\ttab",
    ],
    ids=ascii,
)
def test_text_that_only_looks_odd_is_kept(text):
    value = {text: [text]}

    assert codec.loads(codec.dumps(value)) == value


def test_the_text_is_compact_and_keeps_order_and_characters():
    text = codec.dumps({"b": [1, 2.5, None, True], "a": {"ü": "é"}})

    assert text == '{"b":[1,2.5,null,true],"a":{"ü":"é"}}'


def test_the_value_given_is_not_changed():
    value = {"b": (1, [2, {"c": "x"}]), "a": None}
    before = copy.deepcopy(value)

    codec.dumps(value)

    assert value == before


@each_case("text", ["", "{", "nul", "[1,]", "{'a': 1}", "1 2", '"\\ud8"'])
def test_loads_raises_value_error_for_what_is_not_json(text):
    with pytest.raises(ValueError, match=r"."):
        codec.loads(text)


def test_a_large_payload_with_a_tuple_is_encoded_about_as_fast_as_with_a_list():
    # Only what looks odd is walked in Python, but the walk must not be ruinous: this is a
    # payload of 1 MiB, the default limit.
    value = {"ids": tuple(range(150_000))}

    begin = time.process_time()  # of the processor: others may keep it busy
    codec.dumps(value)

    assert time.process_time() - begin < 1.5


# -------------------------------------------------------------------------- for any value

strings = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | strings
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(strings, inner), max_leaves=20
)
quick = at_least(50)


@quick
@given(values)
def test_any_json_value_comes_back_as_it_was(value):
    assert codec.loads(codec.dumps(value)) == value


@quick
@given(values)
def test_any_json_value_is_written_as_text_that_postgresql_can_store(value):
    text = codec.dumps(value)

    text.encode()
    assert "\0" not in text
    json.loads(text, parse_constant=pytest.fail)


@st.composite
def planted(draw: st.DrawFn, leaf: object) -> tuple[object, str]:
    """A JSON value with ``leaf`` somewhere inside, and the path that leads there."""
    value, path = leaf, ""
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            key = draw(strings)
            others = draw(st.dictionaries(strings, scalars, max_size=3))
            value = {**others, key: value}
            path = (f".{key}" if key.isidentifier() else f"[{key!r}]") + path
        else:
            before = draw(st.lists(values, max_size=3))
            after = draw(st.lists(scalars, max_size=2))
            value = draw(st.sampled_from([list, tuple]))([*before, value, *after])
            path = f"[{len(before)}]{path}"
    return value, f"payload{path}"


@quick
@given(st.data(), st.sampled_from(list(BAD_LEAVES)))
def test_one_offending_leaf_anywhere_is_found_and_named(data, name):
    leaf, problem = BAD_LEAVES[name]
    value, path = data.draw(planted(leaf))
    error = refusal(value)

    assert error.path == path
    assert problem in error.problem


@quick
@given(st.data(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_one_key_that_is_no_string_anywhere_is_found_and_named(data, key):
    value, path = data.draw(planted({key: 1}))
    error = refusal(value)

    assert error.path == path
    assert repr(key) in error.problem


@quick
@given(st.lists(values, min_size=1, max_size=8), st.data())
def test_many_values_at_once_are_written_as_each_by_itself_or_left_to_that(values, data):
    found = codec.dumps_each(values)
    # Text that only looks odd is left to the closer look at a single one.
    assert found == [codec.dumps(value) for value in values] or "\\u0000" in json.dumps(values)
    odd = data.draw(
        st.sampled_from([float("nan"), {1: 2}, "\x00", "\ud800", (1, 2), {1}, 10**5000])
    )
    values.insert(data.draw(st.integers(0, len(values))), [odd])
    assert codec.dumps_each(values) is None


@each_case("odd", ["\0", ',"\0",', [1, "\0", 2], {"a": ["", "\0", ""]}])
def test_a_value_that_looks_like_the_end_of_one_is_left_to_a_closer_look(odd):
    assert codec.dumps_each([1, odd, 2]) is None
    assert codec.dumps_each([odd]) is None


def test_many_values_are_no_deeper_than_one_may_be():
    value = []
    for _ in range(199):
        value = [value]
    assert codec.dumps_each([value] * 3) == [codec.dumps(value)] * 3
    assert codec.dumps_each([1, [value]]) is None


@each_case(
    "odd",
    [
        collections.OrderedDict(a=1),
        [collections.Counter("a")],
        {"a": [{"b": {1: 2}}]},
        {None: 1},
        {"a": {True: 1}},
        {"a": dt.date(2026, 1, 2)},
        [Point(1, 2)],
        {"a": Money(3)},
        [math.nan],
        {"\0": 1},
        {SURROGATE: 1},
    ],
)
def test_many_values_of_which_one_is_odd_anywhere_are_left_to_a_closer_look(odd):
    for among in ([odd], [1, odd], [{"k": odd}, {"k": "v"}], [[1, odd]]):
        assert codec.dumps_each(among) is None


def test_many_values_may_have_texts_and_numbers_of_subclasses():
    values = [{Text("k"): Text("v"), Mode.FAST: Mode.FAST}, [Level.HIGH, Whole(7)], True, None]

    assert codec.dumps_each(values) == ['{"k":"v","fast":"fast"}', "[3,7]", "true", "null"]


@each_case("width", [1, 2, 3])
def test_values_that_contain_themselves_are_found_before_they_are_written(width):
    # With two or three of itself, the values of one level double or treble at each level.
    value: list[object] = []
    value += [value] * width
    mapping: dict[str, object] = {}
    mapping |= {f"k{n}": [mapping] for n in range(width)}

    for cycle in (value, mapping):
        assert codec.dumps_each([{"a": 1}, cycle]) is None
        assert "is nested deeper than" in refusal(cycle).problem


@quick
@given(st.lists(values, max_size=8))
def test_many_texts_at_once_are_read_as_each_by_itself(values):
    texts = [codec.dumps(value) for value in values]
    assert codec.loads_each(texts) == [codec.loads(text) for text in texts]


@each_case("odd", ["", "1, 2", "] [", "nope", "[" * 100_000 + "]" * 100_000])
def test_texts_of_which_one_is_odd_are_left_to_a_closer_look(odd):
    assert codec.loads_each(["1", odd, "[2]"]) is None

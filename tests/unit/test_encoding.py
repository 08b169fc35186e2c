"""What `enqueue` writes of an object, a handler annotated with its class gets back equal."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
import sys
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, make_dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Generic, Literal, NewType, Optional, TypedDict, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pgqrs_sa import InvalidArgument, JsonCodec, PayloadError
from pgqrs_sa.consumer.signature import converter
from pgqrs_sa.validation import headers_text
from support.cases import each_case
from support.properties import at_least

codec = JsonCodec()
BERLIN = ZoneInfo("Europe/Berlin")


def through(value: Any, annotation: Any = None) -> Any:
    """What a handler with this annotation, or that of the value's class, gets of a payload."""
    text = codec.dumps(value)
    json.loads(text, parse_constant=pytest.fail)
    kind = type(value) if annotation is None else annotation
    return converter(kind)(codec.loads(text))


def refusal(value: object) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        codec.dumps(value)
    return caught.value


class Colour(enum.Enum):
    RED = "red"
    PRICE = Decimal("1.10")
    PAIR = (1, 2)
    NONE = None


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Mode(enum.StrEnum):
    FAST = "fast"
    SLOW = "slow"


class Old(str, enum.Enum):  # noqa: UP042 - as before Python 3.11
    ONE = "one"


class Right(enum.Flag):
    READ = 1
    WRITE = 2
    BOTH = 3


class IntRight(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Line:
    id: uuid.UUID
    price: Decimal
    sizes: tuple[int, ...] = ()
    colour: Colour | None = None


@dataclass
class Order:
    lines: list[Line]
    by_name: dict[str, Decimal]
    placed: dt.datetime
    due: dt.date | None
    every: Optional[dt.timedelta] = None  # noqa: UP045 - this form, too
    at: dt.time = dt.time(0)
    level: Level = Level.LOW
    mode: Mode = Mode.FAST
    right: Right = Right.READ
    pair: tuple[int, uuid.UUID] | None = None
    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total = len(self.lines)


@dataclass
class Special(Order):
    why: str = ""


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)
    parent: uuid.UUID | None = None


class Address(pydantic.BaseModel):
    id: uuid.UUID
    since: dt.date
    street: str = pydantic.Field(alias="Street")


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)

    id: uuid.UUID
    born: dt.datetime
    wait: dt.timedelta
    money: Decimal
    colour: Colour
    homes: list[Address] = pydantic.Field(default_factory=list, alias="Homes")
    level: Level | None = None


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    id: uuid.UUID
    born: dt.datetime
    mode: Mode


@pydantic.dataclasses.dataclass
class Checked:
    id: uuid.UUID
    when: dt.time


class Struct(msgspec.Struct, rename="camel"):
    my_id: uuid.UUID
    my_price: Decimal
    when: dt.datetime
    wait: dt.timedelta
    level: Level = Level.LOW


class Tagged(msgspec.Struct, tag=True, frozen=True, array_like=True):
    when: dt.date
    inner: Struct | None = None


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
decimals = st.decimals(allow_nan=False) | st.sampled_from([Decimal("-0"), Decimal("1.10")])
zones = st.none() | st.sampled_from(
    [dt.UTC, BERLIN, dt.timezone(dt.timedelta(hours=-3, seconds=7))]
)
moments = st.datetimes(timezones=zones)
# Times that come twice, or not at all, are told apart below.
usual = moments.filter(
    lambda moment: moment.fold == 0 and moment.utcoffset() == moment.replace(fold=1).utcoffset()
)
clocks = st.times().map(lambda item: item.replace(fold=0))
aware = st.datetimes(timezones=st.just(dt.UTC))
fields_of_leaf = {
    uuid.UUID: st.uuids(),
    dt.date: st.dates(),
    dt.datetime: usual,
    dt.time: clocks | st.times(timezones=st.just(dt.UTC)),
    dt.timedelta: st.timedeltas(),
    Decimal: decimals,
    Colour: st.sampled_from(Colour),
    Level: st.sampled_from(Level),
    Mode: st.sampled_from(Mode),
    Old: st.sampled_from(Old),
    Right: st.sampled_from([*Right, Right(0)]),
    IntRight: st.sampled_from([*IntRight, IntRight(0), IntRight(3), IntRight(8)]),
}
lines = st.builds(
    Line,
    st.uuids(),
    decimals,
    st.lists(st.integers(), max_size=3).map(tuple),
    st.sampled_from([None, Colour.RED, Colour.PRICE, Colour.PAIR]),
)
order_fields = {
    "lines": st.lists(lines, max_size=3),
    "by_name": st.dictionaries(text, decimals, max_size=3),
    "placed": usual,
    "due": st.none() | st.dates(),
    "every": st.none() | st.timedeltas(),
    "at": clocks,
    "level": st.sampled_from(Level),
    "mode": st.sampled_from(Mode),
    "right": st.sampled_from(Right),
    "pair": st.none() | st.tuples(st.integers(), st.uuids()),
}
orders = st.builds(Order, **order_fields)
nodes = st.recursive(
    st.builds(Node, text, st.just([]), st.none() | st.uuids()),
    lambda inner: st.builds(Node, text, st.lists(inner, max_size=3), st.none() | st.uuids()),
    max_leaves=8,
)
addresses = st.builds(Address, id=st.uuids(), since=st.dates(), Street=text)
spans = st.timedeltas(dt.timedelta(days=-10_000), dt.timedelta(days=10_000))
prices = st.decimals(allow_nan=False, allow_infinity=False)
people = st.builds(
    Person,
    id=st.uuids(),
    born=aware | st.datetimes(),
    wait=spans,
    money=prices,
    colour=st.sampled_from([Colour.RED, Colour.NONE]),
    homes=st.lists(addresses, max_size=2),
    level=st.none() | st.sampled_from(Level),
)
structs = st.builds(
    Struct, st.uuids(), prices, aware | st.datetimes(), spans, st.sampled_from(Level)
)
composites = {
    Line: lines,
    Order: orders,
    Special: st.builds(Special, **order_fields, why=text),
    Node: nodes,
    Address: addresses,
    Person: people,
    Strict: st.builds(Strict, id=st.uuids(), born=aware, mode=st.sampled_from(Mode)),
    Checked: st.builds(Checked, st.uuids(), clocks),
    Struct: structs,
    Tagged: st.builds(Tagged, st.dates(), st.none() | structs),
}
everything = fields_of_leaf | composites
kinds = each_case("kind", list(everything), ids=lambda kind: kind.__name__)


@kinds
def test_an_object_comes_back_equal_from_the_annotation_of_its_class(kind):
    @given(everything[kind])
    def check(value):
        back = through(value)
        assert back == value
        assert type(back) is type(value)

    check()


@kinds
def test_an_object_comes_back_equal_from_within_what_annotations_can_say(kind):
    around: list[tuple[Any, Any]] = [
        (list[kind], lambda value: [value, value]),
        (Sequence[kind], lambda value: [value]),
        (Iterable[kind], lambda value: [value]),
        (tuple[kind, ...], lambda value: (value, value)),
        (tuple[int, kind], lambda value: (7, value)),
        (dict[str, kind], lambda value: {"a b": value}),
        (Mapping[str, list[kind]], lambda value: {"x": [value], "y": []}),
        (kind | None, lambda value: value),
        (typing.Optional[kind], lambda _: None),  # noqa: UP045
        (list[kind | None], lambda value: [value, None]),
        (Annotated[kind, "said"], lambda value: value),
        (NewType("Own", kind), lambda value: value),
        (TypedDict("Given", {"one": kind, "n": int}), lambda value: {"one": value, "n": 1}),
    ]

    @settings(max_examples=20, deadline=None)
    @given(everything[kind], st.sampled_from(around))
    def check(value, wrapped):
        annotation, wrap = wrapped
        # null is None where the annotation allows both.
        assume(value is not Colour.NONE or annotation not in (kind | None, list[kind | None]))
        assert through(wrap(value), annotation) == wrap(value)

    check()


@given(st.decimals(allow_nan=False))
def test_a_decimal_keeps_its_digits_its_sign_and_its_exponent(value):
    back = through(value)
    assert back.as_tuple() == value.as_tuple()


@given(moments)
def test_a_time_that_exists_once_comes_back_and_another_is_refused(value):
    """A time in a zone with a name that comes twice equals none with a plain offset."""
    plain = value.tzinfo is None and value.fold == 0
    twice = (
        value.tzinfo is BERLIN
        and value.utcoffset() != value.replace(fold=not value.fold).utcoffset()
    )
    if plain or (value.tzinfo is not None and not twice):
        assert through(value) == value
        assert through(value).utcoffset() == value.utcoffset()
    else:
        assert "not come back equal" in refusal({"at": value}).problem


@each_case(
    "value",
    [
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        dt.datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN),
        dt.datetime(2026, 1, 2, fold=1),  # noqa: DTZ001
        dt.time(2, 30, fold=1),
        dt.time(2, 30, tzinfo=BERLIN),
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("-NaN123"),
    ],
)
def test_what_would_not_come_back_equal_is_refused_with_its_path(value):
    error = refusal({"items": [0, 1, 2, {"price": value}]})
    assert error.path == "payload.items[3].price"


def test_a_time_that_comes_twice_can_be_sent_in_utc():
    value = dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1).astimezone(dt.UTC)
    assert through(value) == value


@dataclass
class Open:
    name: str
    what: Any = None
    parent: Line | None = None


@dataclass
class Numbers:
    number: int = 0
    numbers: list[int] = field(default_factory=list)
    share: float = 0.5
    note: str = None  # as many write it


@dataclass
class Confused:
    value: str | uuid.UUID


@dataclass(frozen=True)
class Derived(Line):
    extra: int = 0


@dataclass
class Holder:
    line: Line


@dataclass
class Seeded:
    value: int = 0
    seed: InitVar[int | None] = None

    def __post_init__(self, seed):
        self.value += seed or 0


@dataclass
class Needy:
    seed: InitVar[int]


class Aliased(pydantic.BaseModel):
    name: str = pydantic.Field(validation_alias="in", serialization_alias="out")


class Hidden(pydantic.BaseModel):
    secret: pydantic.SecretStr
    name: str = "x"


class Left(pydantic.BaseModel):
    note: str = pydantic.Field("", exclude=True)


class Kept(pydantic.BaseModel):
    names: set[str]
    data: bytes = b""

    @pydantic.computed_field
    @property
    def count(self) -> int:
        return len(self.names)


class Alike(msgspec.Struct, eq=False):
    n: int


REFUSED = {
    "a member that is null where null is none": (
        Line(uuid.uuid4(), Decimal(1), colour=Colour.NONE),
        ".colour",
    ),
    "a member that pydantic cannot read": (
        Person.model_construct(
            id=uuid.uuid4(),
            born=dt.datetime.now(dt.UTC),
            wait=dt.timedelta(1),
            money=Decimal(1),
            colour=Colour.PRICE,
            homes=[],
        ),
        "",
    ),
    "an annotation that keeps text": (Open("x", uuid.uuid4()), ".what"),
    "text that a union takes for a UUID": (Confused(str(uuid.uuid4())), ".value"),
    "text in a field of integers": (Numbers(numbers=[1, "x"]), ".numbers[1]"),
    "a flag in a field of an integer": (Numbers(number=True), ".number"),
    "null in a field that is not optional": (Numbers(number=None), ".number"),
    "a subclass in a field": (Holder(Derived(uuid.uuid4(), Decimal(1))), ".line"),
    "a tuple where a list is said": (Node("x", (Node("y"),)), ".children"),
    "what only the constructor knows": (Needy(3), ""),
    "a secret": (Hidden(secret="x"), ".secret"),  # noqa: S106
    "a field that is left out": (Left(note="x"), ".note"),
    "no way to compare": (Alike(1), ""),
    "nan in a field": (Open("x", math.nan), ".what"),
    "nul in a field": (Open("\0"), ".name"),
    "nul in a model": (Address(id=uuid.uuid4(), since=dt.date.min, Street="\0"), ".Street"),
    "a set in a field": (Open("x", {1}), ".what"),
    "a local class": (make_dataclass("Lost", [("a", "Nowhere")])(1), ""),
}


@each_case(("value", "path"), REFUSED)
def test_an_object_that_would_not_come_back_equal_is_refused_at_its_field(value, path):
    assert refusal(value).path == f"payload{path}"
    assert refusal({"a": [value]}).path == f"payload.a[0]{path}"


@each_case(
    "value",
    [
        Kept(names={"a"}, data=b"x"),
        Seeded(3),
        Open("x", [1, {"a": None}]),
        Address(id=uuid.UUID(int=1), since=dt.date.max, Street=""),
        Colour.PAIR,
        dt.timedelta.min,
        dt.timedelta.max,
        dt.datetime.min,  # noqa: DTZ901
        dt.datetime.max,  # noqa: DTZ901
        dt.date.min,
        Decimal("-0"),
        Decimal("-Infinity"),
        Decimal("1E+1000"),
        Right.READ | Right.WRITE,
    ],
)
def test_what_looks_hard_comes_back(value):
    assert through(value) == value
    assert repr(through(value)) == repr(value)


def test_a_model_whose_two_aliases_differ_is_written_by_its_names_if_it_reads_these():
    class ByName(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(populate_by_name=True)

        name: str = pydantic.Field(validation_alias="in", serialization_alias="out")

    assert through(ByName(name="x")) == ByName(name="x")
    assert refusal(Aliased(**{"in": "x"})).path == "payload"


@each_case(
    ("annotation", "value"),
    [
        (uuid.UUID | str, uuid.UUID(int=5)),
        (uuid.UUID | str, "plain"),
        (int | float | Decimal, Decimal("1.5")),
        (int | float | Decimal, 1.5),
        (int | float | Decimal, 3),
        (dt.date | dt.datetime, dt.datetime(2026, 1, 2, 3)),  # noqa: DTZ001
        (dt.date | dt.datetime, dt.date(2026, 1, 2)),
        (Line | Node, Node("x")),
        (list[uuid.UUID] | uuid.UUID | None, [uuid.UUID(int=1)]),
        (list[int] | dict[str, int], {"a": 1}),
        (bool | Decimal, True),
        (Literal["a", 1] | uuid.UUID, "a"),
        (Literal["a", 1] | uuid.UUID, uuid.UUID(int=2)),
        (Mode | int, Mode.SLOW),
        (str | uuid.UUID, uuid.UUID(int=5)),
        (str | uuid.UUID, "plain"),
        (dt.datetime | dt.date, dt.date(2026, 1, 2)),
        (dt.datetime | dt.date, dt.datetime(2026, 1, 2)),  # noqa: DTZ001
        (list[str] | list[uuid.UUID], ["plain"]),
        (list[int] | list[str], ["plain"]),
        (dict[str, int] | dict[str, list[int]], {"a": [1]}),
    ],
)
def test_a_union_gives_the_type_that_was_sent(annotation, value):
    back = through(value, annotation)
    assert back == value
    assert type(back) is type(value)


members: dict[Any, st.SearchStrategy[Any]] = {
    uuid.UUID: st.uuids(),
    dt.date: st.dates(),
    dt.datetime: usual,
    dt.time: clocks,
    dt.timedelta: st.timedeltas(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False),
    Mode: st.sampled_from(Mode),
    Line: lines,
    Node: nodes,
    # No text that another member reads: that is what a union cannot tell apart.
    str: text.map(lambda value: f"said: {value}"),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
    list[int]: st.lists(st.integers(), max_size=3),
    dict[str, uuid.UUID]: st.dictionaries(st.just("key"), st.uuids(), min_size=1),
}


@at_least(100)
@given(st.data(), st.lists(st.sampled_from(list(members)), min_size=2, max_size=6, unique=True))
def test_a_union_of_types_in_any_order_gives_the_type_that_was_sent(data, kinds):
    value = data.draw(members[data.draw(st.sampled_from(kinds))])
    for annotation, sent in (
        (typing.Union[tuple(kinds)], value),  # noqa: UP007
        (list[typing.Union[tuple(kinds)]], [value, value]),  # noqa: UP007
    ):
        back = through(sent, annotation)
        assert back == sent
        assert type(back) is type(sent)
    assert type(through(value, typing.Union[tuple(kinds)])) is type(value)  # noqa: UP007


def test_a_date_is_no_datetime():
    with pytest.raises(PayloadError, match="is '2026-01-02', a date without a time"):
        converter(dt.datetime)("2026-01-02")


class Row(TypedDict):
    number: int


@each_case(
    ("annotation", "value", "path", "problem"),
    [
        (list[int], [1, "x"], "payload[1]", "must be int, not str"),
        (list[int], [1, True], "payload[1]", "must be int, not bool"),
        (list[bool], [1], "payload[0]", "must be bool, not int"),
        (list[list[int]], [[], [1.0]], "payload[1][0]", "must be int, not float"),
        (list[str], [None], "payload[0]", "must be text, not null"),
        (list[dict[str, Any]], [[]], "payload[0]", "must be an object, not list"),
        (list[list], [{}], "payload[0]", "must be an array, not dict"),
        (dict[str, int], {"a": "x"}, "payload.a", "must be int, not str"),
        (Mapping[str, float], {"a": "x"}, "payload.a", "must be float, not str"),
        (Sequence[int], ["x"], "payload[0]", "must be int, not str"),
        (tuple[int, str], [1, 2], "payload[1]", "must be text, not int"),
        (tuple[int, ...], [1, "x"], "payload[1]", "must be int, not str"),
        (Numbers, {"number": "x"}, "payload.number", "must be int, not str"),
        (Numbers, {"number": True}, "payload.number", "must be int, not bool"),
        (list[Numbers], [{"numbers": ["x"]}], "payload[0].numbers[0]", "must be int, not str"),
        (Row, {"number": "x"}, "payload.number", "must be int, not str"),
        (list[NewType("Id", int)], ["x"], "payload[0]", "must be int, not str"),
        (list[int | None], ["x"], "payload[0]", "fits none of int, NoneType"),
        (str, 5, "payload", "must be text, not int"),
        (int, True, "payload", "must be int, not bool"),
        (float, False, "payload", "must be float, not bool"),
    ],
)
def test_plain_types_are_checked_wherever_they_stand(annotation, value, path, problem):
    with pytest.raises(PayloadError) as caught:
        converter(annotation)(value)
    assert caught.value.path == path
    assert caught.value.problem.startswith(problem)


@dataclass
class ByNumber:
    names: dict[int, str]


def test_a_dict_whose_keys_are_no_text_is_refused(subtests):
    """A handler with ``dict[int, str]`` would get text as keys: JSON has nothing else."""
    keyed = [dict[int, str], Mapping[uuid.UUID, int], dict[tuple[int, int], int]]
    for annotation in [
        *keyed,
        list[dict[int, str]],
        dict[str, dict[int, str]],
        dict[int, str] | int,
    ]:
        with (
            subtests.test(annotation=annotation),
            pytest.raises(InvalidArgument, match="the keys of a JSON object are text"),
        ):
            converter(annotation)
    with pytest.raises(PayloadError, match="the keys of a JSON object are text"):
        converter(ByNumber)({"names": {"1": "a"}})
    for key in (str, Any, object, Literal["a"], str | int, NewType("Name", str)):
        with subtests.test(key=key):
            assert converter(dict[key, int])({"a": 1}) == {"a": 1}


def test_an_integer_is_taken_for_a_float_wherever_it_stands():
    assert type(converter(float)(1)) is float
    assert [type(value) for value in converter(list[float])([1, 2.5])] == [float, float]
    assert type(converter(dict[str, float])({"a": 1})["a"]) is float
    assert type(converter(Numbers)({"share": 1}).share) is float


def test_null_is_taken_for_a_field_whose_default_is_none():
    assert through(Numbers()) == Numbers()
    assert converter(Numbers)({"note": None}).note is None
    with pytest.raises(PayloadError, match=r"payload\.note must be text, not int"):
        converter(Numbers)({"note": 5})


@dataclass
class Counted:
    inner: list[Counted]
    made: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Counted.made += 1


def test_an_object_within_others_is_read_back_once_however_deep_it_is():
    value = Counted([])
    for _ in range(50):
        value = Counted([value])
    Counted.made = 0
    codec.dumps(value)
    assert Counted.made == 51


@each_case(
    ("annotation", "value", "path"),
    [
        (list[uuid.UUID], ["0" * 32, "x"], "payload[1]"),
        (dict[str, Decimal], {"a": "1", "b": "x"}, "payload.b"),
        (Line, {"id": "0" * 32, "price": "x"}, "payload.price"),
        (Line, {"id": "0" * 32, "price": "1", "more": 1}, "payload"),
        (Line, {"id": "0" * 32}, "payload"),
        (Line, {"id": "0" * 32, "price": "1", "sizes": 3}, "payload.sizes"),
        (Order, {"lines": [{"id": 3}]}, "payload"),
        (tuple[int, int], [1], "payload"),
        (dt.datetime, "yesterday", "payload"),
        (dt.timedelta, "P", "payload"),
        (dt.timedelta, "1 day", "payload"),
        (uuid.UUID, 5, "payload"),
        (Colour, "blue", "payload"),
        (uuid.UUID | None, "x", "payload"),
        (Literal["a"], "b", "payload"),
        (dict[str, uuid.UUID], [], "payload"),
        (list[uuid.UUID], {}, "payload"),
    ],
)
def test_a_payload_that_does_not_fit_says_where(annotation, value, path):
    with pytest.raises(PayloadError) as caught:
        converter(annotation)(value)
    assert caught.value.path == path


@each_case(
    ("written", "seconds"),
    [
        ("PT0S", 0), ("P1DT0.5S", 86_400.5), ("-PT1M", -60), ("P1W", 604_800), ("PT1H2M3S", 3723),
        ("+P1D", 86_400), (90, 90), (1.5, 1.5), ("PT0,25S", 0.25),
    ],
)  # fmt: skip
def test_durations_of_others_are_read(written, seconds):
    assert converter(dt.timedelta)(written) == dt.timedelta(seconds=seconds)


@each_case(("written", "value"), [(1, "1"), (1.1, "1.1"), ("1.10", "1.10")])
def test_numbers_of_others_are_read_as_decimals(written, value):
    assert str(converter(Decimal)(written)) == value


T = TypeVar("T")


@dataclass
class Box(Generic[T]):
    value: T
    id: uuid.UUID


def test_a_generic_dataclass_is_read_as_its_class():
    box = Box(1, uuid.uuid4())
    assert through(box) == box
    assert through(box, Box[int]) == box


def test_headers_hold_plain_json_for_nobody_reads_them_by_an_annotation():
    with pytest.raises(PayloadError) as caught:
        headers_text({"id": uuid.uuid4()})
    assert caught.value.path == "headers.id"
    assert headers_text({"n": 1e22}) == '{"n":10000000000000000000000.0}'


def test_neither_pydantic_nor_msgspec_is_imported_for_plain_values():
    import subprocess

    script = (
        "import sys; from pgqrs_sa import JsonCodec; import uuid;"
        "from pgqrs_sa.consumer.signature import converter;"
        "converter(uuid.UUID)(JsonCodec().loads(JsonCodec().dumps(uuid.uuid4())));"
        "print('pydantic' in sys.modules, 'msgspec' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]

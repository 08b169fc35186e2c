"""What a handler is called with, by its annotations; and what is refused when it is registered."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, Optional
from uuid import UUID

import msgspec
import pydantic
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    AsyncQueueService,
    Consumer,
    Delivery,
    Hooks,
    InvalidArgument,
    JsonCodec,
    PayloadError,
    QueueService,
    Retry,
)
from pgqrs_sa.consumer.handlers import HandlerOptions
from pgqrs_sa.consumer.options import ConsumerOptions
from pgqrs_sa.consumer.signature import converter, inspect_handler
from support.cases import each_case
from support.handlers import delivery

if TYPE_CHECKING:
    from decimal import Decimal as NotImported


class Model(pydantic.BaseModel):
    order: int


class Struct(msgspec.Struct):
    order: int


@dataclasses.dataclass
class Address:
    city: str
    zip: str = ""


@dataclasses.dataclass
class Plain:
    order: int
    address: Address | None = None
    home: Address = dataclasses.field(default_factory=lambda: Address("here"))


@pydantic.dataclasses.dataclass
class Checked:
    order: int


class MySession(Session):
    pass


def taken(function, *, many=False, payload=None):
    call = inspect_handler(function, many=many, payload=payload)
    return dict(call.parameters)


# -------------------------------------------------------------------------------- parameters


def test_parameters_are_told_by_their_annotations():
    def handler(a: Session, b: Delivery, c: QueueService, d: Model):
        pass

    def other(d: dict[str, Any], a: MySession):
        pass

    def scoped(a: scoped_session):
        pass

    async def awaited(a: AsyncSession, b: Delivery, c: AsyncQueueService, d: Model):
        pass

    assert taken(handler) == {"a": "session", "b": "delivery", "c": "service", "d": "payload"}
    assert taken(other) == {"d": "payload", "a": "session"}
    assert taken(scoped) == {"a": "session"}
    assert taken(awaited) == taken(handler)
    assert inspect_handler(awaited, many=False).is_async
    assert not inspect_handler(handler, many=False).is_async


def test_without_annotations_names_tell():
    assert taken(lambda session, delivery, whatever: None) == {
        "session": "session",
        "delivery": "delivery",
        "whatever": "payload",
    }
    assert taken(lambda deliveries: None, many=True) == {"deliveries": "delivery"}
    assert taken(lambda: None) == {}


def test_annotations_may_be_strings_and_annotated():
    def handler(delivery: "Delivery", two: Annotated["Model", "of the shop"]):  # noqa: UP037
        pass

    assert taken(handler) == {"delivery": "delivery", "two": "payload"}


def test_a_batch_takes_lists():
    def handler(a: Session, b: list[Delivery], c: Sequence[Model]):
        pass

    def iterable(b: Iterable[Delivery], c: list):
        pass

    assert taken(handler, many=True) == {"a": "session", "b": "delivery", "c": "payload"}
    with pytest.raises(InvalidArgument, match=r"annotate c: 'list' as list\[\.\.\.\]"):
        taken(iterable, many=True)


def test_callables_of_all_kinds_are_read():
    class Instance:
        def __call__(self, session: Session, order: Model):
            pass

        def method(self, delivery: Delivery):
            pass

        async def awaited(self, delivery: Delivery):
            pass

        @staticmethod
        def static(delivery: Delivery):
            pass

    class Awaited:
        async def __call__(self, delivery: Delivery):
            pass

    def handler(mailer, session: Session, order: Model, *, retries: int = 3):
        pass

    async def waits(mailer, delivery: Delivery):
        pass

    @wraps(handler)
    def wrapped(*args, **kwargs):
        pass

    assert taken(Instance()) == {"session": "session", "order": "payload"}
    assert taken(Instance().method) == taken(Instance.static) == {"delivery": "delivery"}
    assert taken(partial(handler, "mailer")) == {"session": "session", "order": "payload"}
    bound = partial(handler, mailer="mailer")
    with pytest.raises(InvalidArgument):  # everything behind it is by name only, and mailer fits
        taken(partial(bound, order=1, session=2, nonsense=1))
    for awaited in (Instance().awaited, Awaited(), partial(waits, "mailer")):
        assert inspect_handler(awaited, many=False).is_async
    assert taken(partial(waits, "mailer")) == {"delivery": "delivery"}
    with pytest.raises(InvalidArgument, match="two parameters for the payload"):
        taken(wrapped)


def test_what_has_a_default_and_is_none_of_ours_keeps_it():
    def handler(order: Model, retries=3, client: object = None, delivery: Delivery = None):
        return (order, retries, client, delivery)

    call = inspect_handler(handler, many=False)
    item = delivery(1)
    arguments = call.arguments([item], ["order"], None, None)
    assert handler(**arguments) == ("order", 3, None, item)


def test_an_optional_parameter_is_given_what_it_is_for():
    def handler(
        a: UUID | None,
        b: Optional[Session] = None,  # noqa: UP045
        c: QueueService | None = None,
        d: Annotated[Delivery | None, "of this call"] = None,
    ):
        pass

    async def awaited(a: AsyncSession | None = None, b: AsyncQueueService | None = None):
        pass

    def many(a: list[Model] | None, b: list[Delivery] | None = None):
        pass

    assert taken(handler) == {"a": "payload", "b": "session", "c": "service", "d": "delivery"}
    assert inspect_handler(handler, many=False).convert(None) is None
    assert taken(awaited) == {"a": "session", "b": "service"}
    assert taken(many, many=True) == {"a": "payload", "b": "delivery"}


def test_an_optional_session_of_the_wrong_kind_is_refused():
    def handler(a: AsyncSession | None = None):
        pass

    with pytest.raises(InvalidArgument, match="can only be given Session"):
        taken(handler)


class SendMail:
    """A handler whose parentheses are easily forgotten."""

    def __call__(self, payload: dict[str, Any]) -> None:
        pass


class SendMailAsync:
    def __init__(self, payload: dict[str, Any]) -> None:
        self.payload = payload

    async def __call__(self, payload: dict[str, Any]) -> None:
        pass


@each_case("consumer", [Consumer(sessionmaker()), AsyncConsumer(async_sessionmaker())], ids=repr)
@each_case("handler", [SendMail, SendMailAsync, partial(SendMailAsync), Model, dict])
def test_a_class_is_no_handler(consumer, handler):
    """To call it makes an object and does no work, which would be archived as done."""
    with pytest.raises(
        InvalidArgument, match="is a class: register an instance of it, or one of its methods"
    ):
        consumer.on("mail")(handler)
    with pytest.raises(InvalidArgument, match="is a class"):
        inspect_handler(handler, many=True)


def test_a_payload_type_may_be_given_apart():
    call = inspect_handler(lambda order: order, many=False, payload=Model)
    (order,) = call.payloads([dataclasses.replace(delivery(1), decoded={"order": 7})])
    assert order == Model(order=7)


def generates(delivery: Delivery):
    yield


async def generates_too(delivery: Delivery):
    yield


def two_payloads(a: Model, b):
    pass


def takes_all(*args):
    pass


def takes_names(**kwargs):
    pass


def positional(delivery, /):
    pass


def unknown(a: NotImported):
    pass


def nonsense(a: complex):
    pass


def sets(a: set[int]):
    pass


def batch_without(a: list[Delivery]):
    pass


def wrong_session(a: AsyncSession):
    pass


def wrong_service(a: AsyncQueueService):
    pass


async def wrong_awaited(a: Session):
    pass


@each_case(
    ("function", "options", "said"),
    [
        (two_payloads, {}, "two parameters for the payload: b too"),
        (takes_all, {}, r"takes \*args"),
        (takes_names, {}, r"takes \*\*kwargs"),
        (positional, {}, "takes delivery, and is called by name"),
        (unknown, {}, "NotImported"),
        (nonsense, {}, "not <class 'complex'>"),
        (sets, {}, "a payload can be"),
        (batch_without, {}, "register it with batch="),
        (lambda a: None, {"payload": complex}, "a payload can be"),
        (lambda session: None, {"payload": Model}, "no parameter to put it in"),
        (generates, {}, "is a generator"),
        (generates_too, {}, "is a generator"),
        (wrong_session, {}, "can only be given Session"),
        (wrong_service, {}, "can only be given Session"),
        (wrong_awaited, {}, "can only be given AsyncSession"),
        ([].append, {}, "called by name|cannot be a handler"),
        ("handler", {}, "cannot be a handler|called by name"),
    ],
)
def test_what_cannot_be_called_so_is_refused_when_it_is_registered(function, options, said):
    with pytest.raises(InvalidArgument, match=said):
        inspect_handler(function, many=False, **options)


def test_a_consumer_takes_handlers_of_its_own_kind():
    async def awaited(delivery: Delivery):
        pass

    def plain(delivery: Delivery):
        pass

    with pytest.raises(InvalidArgument, match="a handler for AsyncConsumer"):
        Consumer(sessionmaker()).on("mail")(awaited)
    with pytest.raises(InvalidArgument, match="a handler for Consumer"):
        AsyncConsumer(async_sessionmaker()).on("mail")(plain)


@each_case(
    "options",
    [
        {"lease": 0},
        {"lease": -1},
        {"concurrency": 0},
        {"concurrency": 1.5},
        {"prefetch": -1},
        {"timeout": 0},
        {"retry": 3},
        {"batch": 0},
        {"weight": 0},
        {"acknowledge": "later"},
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_name(options):
    (name,) = options
    consumer = Consumer(sessionmaker())
    with pytest.raises(InvalidArgument, match=f"{name} must be"):
        consumer.on("mail", **options)(lambda payload: None)


@each_case(
    "options",
    [
        {"concurrency": 0},
        {"retry": "twice"},
        {"poll_interval": 0},
        {"drain_timeout": -1},
        {"heartbeat": 0},
        {"housekeeping": 0},
        {"name": " "},
        {"name": ""},
        {"name": 5},
        {"concurrency": "8"},
        {"poll_interval": "yes"},
        {"version": 5},
        {"models": "pgqrs"},
        {"codec": JsonCodec},
        {"codec": json.dumps},
        {"notify": "yes"},
        {"listen_dsn": 5432},
        {"hooks": [print]},
        {"hooks": Hooks()},
    ],
)
def test_a_consumers_own_settings_are_checked_as_well(options):
    ((name, value),) = options.items()
    for make in (
        lambda: Consumer(sessionmaker(), **options),
        lambda: AsyncConsumer(async_sessionmaker(), **options),
    ):
        with pytest.raises(InvalidArgument, match=f"{name} must (be|have)") as caught:
            make()
        assert repr(value)[:20] in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "maker"), [(Consumer, sessionmaker), (AsyncConsumer, async_sessionmaker)]
)
def test_an_unknown_option_is_refused_with_the_one_that_comes_close(kind, maker):
    with pytest.raises(TypeError) as caught:
        kind(maker(), concurency=8)
    message = f"{kind.__name__}() has no option 'concurency': did you mean 'concurrency'?"
    assert str(caught.value) == message
    with pytest.raises(TypeError) as caught:
        kind(maker()).on("mail", presfetch=8)
    message = f"{kind.__name__}.on() has no option 'presfetch': did you mean 'prefetch'?"
    assert str(caught.value) == message
    with pytest.raises(TypeError, match=r"no option 'q'; its options are lease, concurrency, "):
        kind(maker()).on("mail", q=8)


@pytest.mark.parametrize("kind", [Consumer, AsyncConsumer])
def test_a_signature_shows_each_option_with_its_default(kind):
    for function, options, defaults in (
        (kind, ConsumerOptions, {"concurrency": 10, "retry": None, "poll_interval": 0.5}),
        (kind.on, HandlerOptions, {"prefetch": 0, "lease": None, "acknowledge": "commit"}),
    ):
        parameters = inspect.signature(function).parameters
        shown = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert parameters["retry"].annotation == "Retry | None"
        assert shown.keys() == options.__annotations__.keys()
        assert shown.items() >= defaults.items()


def test_a_consumer_that_is_given_none_has_the_defaults():
    nothing = {"retry": None, "name": None, "version": None, "models": None, "codec": None}
    assert Consumer(sessionmaker(), **nothing)._config == Consumer(sessionmaker())._config
    assert Consumer(sessionmaker(), housekeeping=None)._config.housekeeping is None
    assert Consumer(sessionmaker(), listen_dsn="postgresql://db/shop")._config.notify
    assert not Consumer(sessionmaker(), listen_dsn=None)._config.notify


def test_a_queue_has_one_handler_and_only_known_ones_are_chosen():
    consumer = Consumer(sessionmaker(), retry=Retry(max_attempts=9), concurrency=3)
    for queue in ("a", "b", "c"):
        consumer.on(queue)(lambda payload: None)
    with pytest.raises(InvalidArgument, match="'a' has a handler already"):
        consumer.on("a")(lambda payload: None)
    with pytest.raises(InvalidArgument, match="queue name"):
        consumer.on("no name")(lambda payload: None)
    with pytest.raises(InvalidArgument, match="'d'; there are: 'a', 'b', 'c'"):
        consumer.only("d")
    consumer.only("c", "a")
    assert [handler.queue for handler in consumer.handlers] == ["c", "a"]
    assert consumer.handler("a").retry.max_attempts == 9
    assert consumer.handler("a").concurrency == 3
    with pytest.raises(InvalidArgument, match="sessionmaker"):
        Consumer("postgresql://")


# ---------------------------------------------------------------------------------- payloads


@each_case("kind", [Model, Struct, Plain, Checked])
def test_a_payload_becomes_an_instance_of_its_type_or_is_refused(kind):
    convert = converter(kind)
    assert convert({"order": 7}) == kind(order=7)
    for wrong in ({}, {"ordre": 7}, None, [], "text", 5):
        with pytest.raises(PayloadError, match="payload"):
            convert(wrong)


@each_case("kind", [Model, Struct, Checked])
def test_libraries_check_the_values_too(kind):
    with pytest.raises(PayloadError, match="does not fit the handler"):
        converter(kind)({"order": "seven"})


def test_a_dataclass_is_filled_with_those_that_its_fields_are():
    convert = converter(Plain)
    made = convert({"order": 7, "home": {"city": "Bern"}})
    assert made == Plain(7, home=Address("Bern"))
    for wrong, said in (
        ({"order": 7, "home": {}}, r"payload\.home lacks city of Address"),
        ({"order": 7, "home": []}, r"payload\.home must be an object"),
        ({"order": 7, "home": {"city": "Bern", "street": 1}}, "has not: street"),
        ({"home": {"city": "Bern"}}, "lacks order of Plain"),
    ):
        with pytest.raises(PayloadError, match=said):
            convert(wrong)


def test_an_error_of_the_class_itself_is_an_error_of_the_payload():
    @dataclasses.dataclass
    class Picky:
        n: int

        def __post_init__(self):
            raise ZeroDivisionError

    with pytest.raises(PayloadError, match="does not fit"):
        converter(Picky)({"n": 1})


@each_case(
    ("kind", "right", "wrong"),
    [
        (dict, {"a": 1}, []),
        (dict[str, int], {"a": 1}, "text"),
        (list, [1], {}),
        (list[int], [1], 5),
        (str, "text", 5),
        (int, 5, 5.5),
        (int, 0, True),
        (float, 5.5, "5.5"),
        (float, 1.0, 10**400),
        (float, 1.0, False),
        (bool, True, 1),
        (type(None), None, 0),
    ],
)
def test_plain_types_are_checked_at_the_top(kind, right, wrong):
    assert converter(kind)(right) == right
    with pytest.raises(PayloadError, match="payload"):
        converter(kind)(wrong)


def test_any_takes_anything_and_a_float_takes_whole_numbers():
    for kind in (Any, object):
        assert converter(kind)([1, None]) == [1, None]
    assert isinstance(converter(float)(5), float)

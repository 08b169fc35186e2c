"""Reads from a handler's signature, once, which arguments it is called with.

==============================================  ==================================================
annotation                                      argument
==============================================  ==================================================
``Session``, ``AsyncSession``                   a session whose commit is the acknowledgement
``QueueService``, ``AsyncQueueService``         the queue, in that session
``Delivery`` (``list[Delivery]`` in a batch)    the message under lease
a payload's type (a list of it in a batch)      the payload, checked: see `converter`
none                                            the payload; a parameter called ``session``,
                                                ``delivery`` or ``deliveries`` gets that
==============================================  ==================================================

``X | None`` means ``X``. A parameter that would be the payload keeps its default, if it has one. A
class is no handler: calling it creates an object, and does no work.
"""

from __future__ import annotations

import inspect
import logging
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy.orm import Session, scoped_session

from .. import encoding
from ..errors import InvalidArgument, PayloadError, safe_repr
from ..service import QueueService
from ..types import Delivery

__all__ = [
    "Convert",
    "DecodeErrors",
    "HandlerSignature",
    "converter",
    "end_child",
    "inspect_handler",
]

_NAMED = {"session": "session", "delivery": "delivery", "deliveries": "delivery"}


class DecodeErrors(Exception):
    """Some messages of a batch do not fit the handler's type, and it is not called.

    Attributes:
        errors: The error of each, by the message's id.
    """

    def __init__(self, errors: Mapping[int, PayloadError]) -> None:
        super().__init__(", ".join(f"message {id_}: {error}" for id_, error in errors.items()))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class HandlerSignature:
    """How to call a handler.

    Attributes:
        function: The handler.
        parameters: Its parameters: pairs of a name and ``session``, ``service``, ``delivery`` or
            ``payload``.
        convert: Converts a payload into the argument; None if the handler takes no payload.
        many: Whether it takes lists.
        is_async: Whether it must be awaited.
        needs_session: Whether it takes a session, whose commit can be the acknowledgement.
    """

    function: Callable[..., Any]
    parameters: tuple[tuple[str, str], ...]
    convert: Convert | None
    many: bool
    is_async: bool
    needs_session: bool = field(init=False)

    def __post_init__(self) -> None:
        # Stored, since it is read for each message.
        needed = any(kind in ("session", "service") for _, kind in self.parameters)
        object.__setattr__(self, "needs_session", needed)

    def arguments(
        self, deliveries: Sequence[Delivery], payloads: Sequence[Any], session: Any, service: Any
    ) -> dict[str, Any]:
        """Return the arguments for these deliveries and their converted payloads."""
        arguments: dict[str, Any] = {}
        for name, kind in self.parameters:
            if kind == "delivery":
                arguments[name] = list(deliveries) if self.many else deliveries[0]
            elif kind == "payload":
                arguments[name] = (
                    list(payloads) if self.many else (payloads[0] if payloads else None)
                )
            else:
                arguments[name] = session if kind == "session" else service
        return arguments

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call a handler of `Consumer`."""
        process = os.getpid()
        try:
            result = self.function(**arguments)
        except BaseException as error:
            end_child(process, error)
            raise
        end_child(process)
        return result

    async def awaited(self, arguments: dict[str, Any]) -> Any:
        """Call a handler of `AsyncConsumer`, and await the result if it is awaitable."""
        process = os.getpid()
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            end_child(process, error)
            raise
        end_child(process)
        return result

    def payloads(self, deliveries: Iterable[Delivery]) -> list[Any]:
        """Return the payloads, converted to the handler's type.

        Raises:
            PayloadError: the single message does not fit the type.
            DecodeErrors: some messages of a batch do not fit the type.
        """
        if self.convert is None:
            return []
        if not self.many:
            return [self.convert(delivery.payload) for delivery in deliveries]
        payloads, misfits = [], {}
        for delivery in deliveries:
            try:
                payloads.append(self.convert(delivery.payload))
            except PayloadError as error:
                misfits[delivery.id] = error
        if misfits:
            raise DecodeErrors(misfits)
        return payloads


def inspect_handler(
    function: Callable[..., Any],
    *,
    many: bool,
    payload: Any = None,
    asynchronous: bool = True,
) -> HandlerSignature:
    """Return how to call a handler, from its signature and annotations.

    Args:
        function: The handler.
        many: Whether it takes lists: ``batch=`` was given.
        payload: The payload's type, if the annotation does not name it.
        asynchronous: Whether to await a plain function that decorates an ``async def``: it may
            return the coroutine, or wait for it and return the result.

    Raises:
        InvalidArgument: a parameter has no meaning, or a type that is not supported.
    """
    name = getattr(function, "__qualname__", repr(function))
    signature, hints = _read(function, name)
    is_async = _is_async(function, asynchronous)
    parameters = []
    convert = None
    for parameter in signature.parameters.values():
        if parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
            parameter.POSITIONAL_ONLY,
        ):
            raise InvalidArgument(
                f"{name} takes {parameter}, and is called by name: give it a parameter for each "
                "thing that it needs"
            )
        hint = hints.get(parameter.name, inspect.Parameter.empty)
        kind, item = _kind(name, parameter, hint, many=many)
        if not kind:
            continue
        if kind == "payload":
            if convert is not None:
                raise InvalidArgument(
                    f"{name} has two parameters for the payload: {parameter.name} too"
                )
            convert = converter(payload if payload is not None else item)
        elif kind in ("session", "service") and _is_for_asyncio(hint) not in (None, is_async):
            wanted = "AsyncSession and AsyncQueueService" if is_async else "Session, QueueService"
            raise InvalidArgument(f"{name} takes {parameter}, and can only be given {wanted}")
        parameters.append((parameter.name, kind))
    if payload is not None and convert is None:
        raise InvalidArgument(f"{name} has payload={payload!r}, but no parameter to put it in")
    return HandlerSignature(function, tuple(parameters), convert, many, is_async)


def _read(function: Any, name: str) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return a handler's signature and its resolved annotations."""
    written = _written(function)
    if inspect.isclass(written):
        raise InvalidArgument(
            f"{written.__qualname__} is a class: register an instance of it, or one of its methods"
        )
    if inspect.isgeneratorfunction(written) or inspect.isasyncgenfunction(written):
        raise InvalidArgument(f"{name} is a generator: calling it would do nothing")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} cannot be a handler: {error}") from error
    try:
        hints = typing.get_type_hints(written)
    except (NameError, TypeError) as error:
        raise InvalidArgument(f"the annotations of {name} cannot be read: {error}") from error
    return signature, hints


def _is_async(function: Any, asynchronous: bool) -> bool:
    """Return whether to await a handler; ``asynchronous`` if only a function it wraps is async."""
    written = _written(function)
    if inspect.iscoroutinefunction(written):
        return True
    inner = written
    while (inner := getattr(inner, "__wrapped__", None)) is not None:
        if inspect.iscoroutinefunction(_written(inner)):
            return asynchronous
    return False


def _written(function: Any) -> Any:
    """Return the object with the annotations: a partial's function, an instance's ``__call__``."""
    while isinstance(function, partial):
        function = function.func
    if inspect.isroutine(function) or inspect.isclass(function) or not callable(function):
        return function
    return type(function).__call__  # an instance that can be called


def _kind(handler: str, parameter: inspect.Parameter, hint: Any, *, many: bool) -> tuple[str, Any]:
    """Return the kind of a parameter (empty if it keeps its default), and the payload's type."""
    optional = parameter.default is not parameter.empty
    if hint is inspect.Parameter.empty:
        return _NAMED.get(parameter.name, "" if optional else "payload"), Any
    wanted = _without_none(hint)
    if isinstance(wanted, type):
        if issubclass(wanted, (Session, scoped_session)) or _is_async_session(wanted):
            return "session", None
        if issubclass(wanted, QueueService) or wanted.__name__ == "AsyncQueueService":
            return "service", None
    item = hint
    if typing.get_origin(wanted) in (list, Sequence, Iterable):
        (inner,) = typing.get_args(wanted)
        if many:
            item = inner
        elif _is_delivery(inner):
            raise InvalidArgument(f"{handler} takes {parameter}: register it with batch=")
    elif many and not optional:
        raise InvalidArgument(f"{handler} is for a batch: annotate {parameter} as list[...]")
    if _is_delivery(item):
        return "delivery", None
    return "" if optional else "payload", item


def _without_none(hint: Any) -> Any:
    """Return ``X`` of ``X | None``, and any other annotation as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        if len(kinds) == 1:
            return kinds[0]
    return hint


def _is_delivery(hint: Any) -> bool:
    wanted = _without_none(hint)
    return isinstance(wanted, type) and issubclass(wanted, Delivery)


def _is_for_asyncio(hint: Any) -> bool | None:
    if hint is inspect.Parameter.empty:
        return None
    wanted = _without_none(hint)
    return wanted.__name__ == "AsyncQueueService" or _is_async_session(wanted)


def _is_async_session(hint: type[Any]) -> bool:
    # Compared by name: sqlalchemy.ext.asyncio needs greenlet, which a sync host may lack.
    return any(base.__name__ == "AsyncSession" for base in hint.__mro__)


log = logging.getLogger("pgqrs_sa.consumer")


def end_child(parent: int, error: BaseException | None = None) -> None:
    """End this process if it is a child forked in a handler.

    A forked child has only the handler's thread: nothing would settle or lease there. It must not
    commit or roll back either, since that would be sent over the parent's connection.

    Args:
        parent: The id of the process that called the handler.
        error: The exception of the handler. The exit code is that of a ``SystemExit``, otherwise 1.
    """
    if os.getpid() == parent:
        return
    code: object = 1
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
    if code != 0:
        log.critical(
            "process %d was forked in a handler of process %d, and came back from it: it ends "
            "here, since the consumer is the parent's. Call os._exit() in the child",
            os.getpid(),
            parent,
            exc_info=error,
        )
    os._exit(code if isinstance(code, int) else 1)


Convert: TypeAlias = Callable[[Any], Any]
"""Converts a decoded payload into a handler's argument; raises `PayloadError`."""


def converter(kind: Any) -> Convert:
    """Return the function that converts a payload into a handler's argument.

    Args:
        kind: A pydantic model, a msgspec struct, a dataclass, a TypedDict, ``UUID``, ``date``,
            ``datetime``, ``time``, ``timedelta``, ``Decimal``, an Enum, a list, tuple or dict of
            these, a union of them; ``str``, ``int``, ``float``, ``bool``, or Any.

    Raises:
        InvalidArgument: it is something else.
    """
    if kind is Any or kind is object:
        return lambda value: value
    read = encoding.reader(kind)
    if read is not encoding.as_it_is:
        return lambda value: encoding.read_at(read, value, "payload")
    raise InvalidArgument(
        f"a payload can be a pydantic model, a msgspec struct, a dataclass, a TypedDict, dict, "
        f"list, tuple, str, int, float, bool, UUID, date, datetime, time, timedelta, Decimal, an "
        f"Enum, a union of these or Any, not {safe_repr(kind)}"
    )

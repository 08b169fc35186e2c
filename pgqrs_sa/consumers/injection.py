"""What a handler is called with: read once from its signature, by annotation.

==============================================  ==================================================
annotation                                      argument
==============================================  ==================================================
``Session``, ``AsyncSession``                   a session whose commit is the acknowledgement
``QueueService``, ``AsyncQueueService``         the queue, in that session
``Delivery`` (``list[Delivery]`` in a batch)    the message under lease
a payload's type (a list of it in a batch)      the payload, checked: see `payloads.converter`
none                                            the payload; one called ``session``, ``delivery``
                                                or ``deliveries`` is what its name says
==============================================  ==================================================
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session, scoped_session

from ..errors import InvalidArgument
from ..service import QueueService
from ..types import Delivery
from .payloads import Convert, converter

__all__ = ["Call", "inspect_handler"]

_NAMED = {"session": "session", "delivery": "delivery", "deliveries": "delivery"}


@dataclass(frozen=True, slots=True)
class Call:
    """How to call a handler.

    Attributes:
        function: The handler.
        parameters: What it takes: pairs of a name and ``session``, ``service``, ``delivery`` or
            ``payload``.
        convert: Makes the argument of a payload, or None when it takes none.
        many: True when it takes lists.
        is_async: True when it must be awaited.
    """

    function: Callable[..., Any]
    parameters: tuple[tuple[str, str], ...]
    convert: Convert | None
    many: bool
    is_async: bool

    @property
    def needs_session(self) -> bool:
        """True when its commit can be the acknowledgement."""
        return any(kind in ("session", "service") for _, kind in self.parameters)

    def arguments(
        self, deliveries: Sequence[Delivery], payloads: Sequence[Any], session: Any, service: Any
    ) -> dict[str, Any]:
        """Return the arguments for these deliveries, whose payloads are converted already."""
        values = {
            "session": session,
            "service": service,
            "delivery": list(deliveries) if self.many else deliveries[0],
            "payload": list(payloads) if self.many else (payloads[0] if payloads else None),
        }
        return {name: values[kind] for name, kind in self.parameters}

    def payloads(self, deliveries: Iterable[Delivery]) -> list[Any]:
        """Return the payloads as the handler wants them.

        Raises:
            PayloadError: one is not JSON any more, or not what the handler's type demands.
        """
        if self.convert is None:
            return []
        return [self.convert(one.payload) for one in deliveries]


def inspect_handler(function: Callable[..., Any], *, many: bool, payload: Any = None) -> Call:
    """Read what a handler wants.

    Args:
        function: The handler.
        many: True when it takes lists: ``batch=`` was given.
        payload: The payload's type, when the annotation does not say it.

    Raises:
        InvalidArgument: a parameter is none of these.
    """
    name = getattr(function, "__qualname__", repr(function))
    try:
        hints = typing.get_type_hints(_annotated(function))
    except (NameError, TypeError) as error:
        raise InvalidArgument(f"the annotations of {name} cannot be read: {error}") from error
    parameters = []
    convert = None
    for one in inspect.signature(function).parameters.values():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise InvalidArgument(f"{name} takes *{one.name}: name what it needs instead")
        hint = hints.get(one.name, inspect.Parameter.empty)
        kind, item = _kind(name, one.name, hint, many=many)
        if kind == "unknown" and one.default is not one.empty:
            continue
        if kind in ("payload", "unknown"):
            if convert is not None:
                raise InvalidArgument(f"{name} has two parameters for the payload: {one.name} too")
            convert, kind = converter(payload if payload is not None else item), "payload"
        parameters.append((one.name, kind))
    if payload is not None and convert is None:
        raise InvalidArgument(f"{name} has payload={payload!r}, but no parameter to put it in")
    is_async = inspect.iscoroutinefunction(_annotated(function))
    return Call(function, tuple(parameters), convert, many, is_async)


def _annotated(function: Any) -> Any:
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    return type(function).__call__  # an instance that can be called


def _kind(handler: str, name: str, hint: Any, *, many: bool) -> tuple[str, Any]:
    """Return what a parameter is, and the type of one payload."""
    if hint is inspect.Parameter.empty:
        return _NAMED.get(name, "payload"), Any
    if isinstance(hint, type):
        if issubclass(hint, (Session, scoped_session)) or _is_async_session(hint):
            return "session", None
        if issubclass(hint, QueueService) or hint.__name__ == "AsyncQueueService":
            return "service", None
    item = hint
    if many:
        if typing.get_origin(hint) not in (list, Sequence, Iterable):
            raise InvalidArgument(
                f"{handler} is for a batch: annotate {name} as list[...], not {hint!r}"
            )
        (item,) = typing.get_args(hint)
    if isinstance(item, type) and issubclass(item, Delivery):
        return "delivery", None
    return "payload", item


def _is_async_session(hint: type[Any]) -> bool:
    # By name: sqlalchemy.ext.asyncio needs greenlet, which a synchronous host may lack.
    return any(one.__name__ == "AsyncSession" for one in hint.__mro__)

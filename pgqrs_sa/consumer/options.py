"""The options of a consumer: their types, defaults and validation."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from .. import validation
from .._core.scope import Context
from ..codecs import Codec
from ..decisions import Retry
from ..declared import DeclaredQueue, QueueSource, declared_in, joined
from ..errors import InvalidArgument, safe_repr
from ..models import Models, models_of
from ..types import Seconds
from .events import Hooks
from .sessions import CallContext, check_call_context

__all__ = ["CONSUMER_DEFAULTS", "ConsumerConfig", "ConsumerOptions", "takes_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


class ConsumerOptions(TypedDict, total=False):
    """The options of `Consumer` and `AsyncConsumer`; see `Consumer` for the meaning of each."""

    concurrency: int
    retry: Retry | None
    poll_interval: Seconds
    drain_timeout: Seconds
    heartbeat: Seconds
    housekeeping: Seconds | None
    name: str | None
    version: str | None
    models: Models | None
    codec: Codec | None
    notify: bool
    cursor_key: str | None
    listen_dsn: str | None
    hooks: Sequence[Hooks]
    queues: QueueSource
    call_context: CallContext | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerConfig:
    """`ConsumerOptions` with their defaults, validated; times are in seconds."""

    concurrency: int = 10
    retry: Retry = field(default_factory=Retry)
    poll_interval: float = 0.5
    drain_timeout: float = 18
    heartbeat: float = 10
    housekeeping: float | None = 60
    name: str = field(default_factory=socket.gethostname)
    version: str | None = None
    models: Models | None = None
    codec: Codec | None = None
    notify: bool = False
    cursor_key: str | None = None
    listen_dsn: str | None = None
    hooks: tuple[Hooks, ...] = ()
    queues: tuple[DeclaredQueue, ...] = ()
    call_context: CallContext | None = None

    @classmethod
    def validated(cls, **options: Unpack[ConsumerOptions]) -> ConsumerConfig:
        """Return the options with their defaults; raise `InvalidArgument` if one is not valid."""
        given: dict[str, Any] = {
            name: _VALIDATORS[name](value, name)
            for name, value in options.items()
            if value is not None or name not in _NONE_IS_DEFAULT
        }
        if "listen_dsn" in given:
            given["notify"] = True
        return cls(**given)

    def declaring(self, queue: DeclaredQueue) -> ConsumerConfig:
        """Return options with one more declared queue."""
        return replace(self, queues=joined(self.queues, (queue,)))

    def changed(
        self, concurrency: int | None, drain_timeout: Seconds | None, hooks: Sequence[Hooks]
    ) -> ConsumerConfig:
        """Return options with what is given, and more hooks."""
        new = replace(self, hooks=(*self.hooks, *_hooks(hooks, "hooks")))
        if concurrency is not None:
            limit = validation.validate_limit(concurrency, "concurrency")
            new = replace(new, concurrency=limit)
        if drain_timeout is not None:
            span = validation.validate_duration(drain_timeout, "drain_timeout")
            new = replace(new, drain_timeout=span.total_seconds())
        return new

    def context(self) -> Context:
        """Return the context of the consumer's own statements."""
        return Context.of(
            models_of(self.models),
            self.codec,
            worker=None,
            allow_autocommit=True,
            cursor_key=self.cursor_key,
        )


CONSUMER_DEFAULTS: dict[str, object] = {
    option.name: None if option.default is MISSING else option.default
    for option in fields(ConsumerConfig)
}
"""The defaults of `ConsumerOptions`; None where one is made for each consumer."""

_Validator: TypeAlias = Callable[[Any, str], Any]


def _instance(kind: type[Any]) -> _Validator:
    def validate(value: object, name: str) -> object:
        if not isinstance(value, kind):
            raise InvalidArgument(f"{name} must be of type {kind.__name__}, not {safe_repr(value)}")
        return value

    return validate


def _seconds(value: object, name: str) -> float:
    return validation.validate_duration(value, name, positive=True).total_seconds()


def _seconds_or_none(value: object, name: str) -> float | None:
    return None if value is None else _seconds(value, name)


def _seconds_or_zero(value: object, name: str) -> float:
    return validation.validate_duration(value, name).total_seconds()


def _retry(value: object, name: str) -> Retry:
    if not isinstance(value, Retry):
        raise InvalidArgument(f"{name} must be a Retry, not {safe_repr(value)}")
    return value


def _codec(value: Any, name: str) -> Codec:
    if isinstance(value, type) or not all(
        callable(getattr(value, method, None)) for method in ("dumps", "loads")
    ):
        raise InvalidArgument(
            f"{name} must have the methods dumps and loads, not {safe_repr(value)}"
        )
    codec: Codec = value
    return codec


def _hooks(value: object, name: str) -> tuple[Hooks, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(hooks, Hooks) for hooks in value):
        raise InvalidArgument(
            f"{name} must be a list of instances of Hooks, not {safe_repr(value)}"
        )
    return tuple(value)


_VALIDATORS: dict[str, _Validator] = {
    "concurrency": validation.validate_limit,
    "retry": _retry,
    "poll_interval": _seconds,
    "drain_timeout": _seconds_or_zero,
    "heartbeat": _seconds,
    "housekeeping": _seconds_or_none,
    "name": validation.validate_text,
    "version": validation.validate_text,
    "models": _instance(Models),
    "codec": _codec,
    "notify": _instance(bool),
    "cursor_key": validation.validate_text,
    "listen_dsn": _instance(str),
    "hooks": _hooks,
    "queues": declared_in,
    "call_context": check_call_context,
}

_NONE_IS_DEFAULT = frozenset(
    (
        *("retry", "name", "version", "models", "codec", "cursor_key", "listen_dsn"),
        "call_context",
    )
)
"""The options for which None means the default, which `ConsumerConfig` has."""


def takes_options(kind: Any, defaults: Mapping[str, object]) -> Callable[[_F], _F]:
    """Decorate a method whose keyword arguments are ``Unpack[kind]``.

    A name that is not an option raises `TypeError` with the option that comes close; and
    `inspect.signature`, which ``help()`` asks, shows each option with its type and default.

    Args:
        kind: A TypedDict.
        defaults: By the names of the options.
    """
    types = {
        name: getattr(annotation, "__forward_arg__", annotation)
        for name, annotation in kind.__annotations__.items()
    }

    def decorate(function: _F) -> _F:
        @wraps(function)
        def call(self: object, *args: object, **options: object) -> object:
            named = [name for name in options if name not in types and name not in positional]
            if named:
                raise TypeError(_unknown(f"{type(self).__name__}{method}()", named[0], [*types]))
            return function(self, *args, **options)

        signature = inspect.signature(function)
        method = "" if function.__name__ == "__init__" else f".{function.__name__}"
        kept = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        positional = {parameter.name for parameter in kept}
        shown = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation
            )
            for name, annotation in types.items()
        ]
        made: Any = call
        made.__signature__ = signature.replace(parameters=[*kept, *shown])
        decorated: _F = made
        return decorated

    return decorate


def _unknown(function: str, name: str, known: Sequence[str]) -> str:
    close = validation.suggestions(name, known)
    hint = f": did you mean {close[0]!r}?" if close else f"; its options are {', '.join(known)}"
    return f"{function} has no option {name!r}{hint}"

"""The options of a consumer, and the checks of the database, its sessions and its pool."""

from __future__ import annotations

import inspect
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import timedelta
from functools import wraps
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from sqlalchemy.orm import Session

from .. import migrations, validation
from .._core.scope import Context, Scope
from ..codecs import Codec, JsonCodec
from ..decisions import Retry
from ..declared import DeclaredQueue, QueueSource, declared_in, joined
from ..errors import InvalidArgument, PoolTooSmall, safe_repr
from ..models import READY_MADE, Models
from ..resources import Queues
from ..types import Seconds
from . import store
from .events import Hooks
from .handlers import Handler
from .sessions import CallContext, check_call_context

__all__ = [
    "CONSUMER_DEFAULTS",
    "AutocommitSession",
    "ConsumerConfig",
    "ConsumerOptions",
    "check_database",
    "check_pool",
    "refuse_autocommit",
    "refuse_autocommit_session",
    "takes_options",
]

log = logging.getLogger("pgqrs_sa.consumer")

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
            name: _VALIDATORS[name](value, name) for name, value in options.items()
        }
        if given.get("listen_dsn") is not None:
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
        return Context(
            self.models or READY_MADE,
            self.codec or JsonCodec(),
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


def _optional(validate: _Validator, default: Callable[[], object] = lambda: None) -> _Validator:
    return lambda value, name: default() if value is None else validate(value, name)


def _instance(kind: type[Any]) -> _Validator:
    def validate(value: object, name: str) -> object:
        if not isinstance(value, kind):
            raise InvalidArgument(f"{name} must be of type {kind.__name__}, not {safe_repr(value)}")
        return value

    return validate


def _seconds(value: object, name: str) -> float:
    return validation.validate_duration(value, name, positive=True).total_seconds()


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
    "retry": _optional(_retry, Retry),
    "poll_interval": _seconds,
    "drain_timeout": _seconds_or_zero,
    "heartbeat": _seconds,
    "housekeeping": _optional(_seconds),
    "name": _optional(validation.validate_text, socket.gethostname),
    "version": _optional(validation.validate_text),
    "models": _optional(_instance(Models)),
    "codec": _optional(_codec),
    "notify": _instance(bool),
    "cursor_key": _optional(validation.validate_text),
    "listen_dsn": _optional(_instance(str)),
    "hooks": _hooks,
    "queues": declared_in,
    "call_context": _optional(check_call_context),
}


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


def check_database(
    scope: Scope,
    handlers: Sequence[Handler],
    declared: Sequence[DeclaredQueue] = (),
    *,
    create: bool = True,
) -> dict[str, timedelta]:
    """Return how long a lease of each queue lasts, or raise for what keeps a consumer from working.

    Args:
        scope: The session, and the settings of the service.
        handlers: Those that work.
        declared: Queues to compare with those in the database.
        create: Create those that are missing.

    Raises:
        ReadOnlyDatabase: a standby.
        SchemaVersionError: the tables are not those of this release.
        QueueNotFound: with the names that come close.
    """
    if not handlers:
        raise InvalidArgument("this consumer has no handler: decorate one with @consumer.on(queue)")
    store.server_info(scope)
    migrations.check(scope.session, models=scope.context.models)
    missing = _synchronized(scope, declared, create=create)
    leases = {}
    for handler in handlers:
        if (queue := missing.get(handler.queue)) is not None:
            leases[handler.queue] = handler.lease or queue.lease_at_creation
            continue
        info = Queues(scope).get(handler.queue)
        leases[handler.queue] = handler.lease or timedelta(seconds=info.lease_seconds)
    return leases


def _synchronized(
    scope: Scope, declared: Sequence[DeclaredQueue], *, create: bool
) -> dict[str, DeclaredQueue]:
    """Create declared queues, or look for them; log what differs, and return what is missing."""
    missing = set()
    for queue in Queues(scope).sync(declared, dry_run=not create):
        if queue.status == "missing":
            missing.add(queue.name)
            log.info("queue %r does not exist: the consumer creates it when it starts", queue.name)
        elif queue.status == "created":
            log.info("queue %r was missing, and is created", queue.name)
        for difference in queue.differences:
            log.warning(
                "queue %r: %s; to change it, call queues.sync(..., update=True), or run "
                "pgqrs queue sync --update",
                queue.name,
                difference,
            )
    return {queue.name: queue for queue in declared if queue.name in missing}


class AutocommitSession(InvalidArgument):
    """A session that commits each statement by itself: the consumer ends before it is used."""


def refuse_autocommit(handlers: Sequence[Handler]) -> None:
    """Raise for a handler with a session, where the sessions' connections are in AUTOCOMMIT.

    What it writes would be there although its attempt has failed, and again after the next.
    """
    names = [handler.name for handler in handlers if handler.call.needs_session]
    if names:
        raise AutocommitSession(
            f"the sessions are in AUTOCOMMIT, and {', '.join(names)} takes a session, whose writes "
            "commit together with the end of the message: make sessionmaker and engine "
            'transactional, as with execution_options(isolation_level="READ COMMITTED")'
        )


def refuse_autocommit_session(session: Session, handlers: Sequence[Handler]) -> None:
    """Do as `refuse_autocommit` if new sessions set AUTOCOMMIT, unlike their engine.

    SQLAlchemy 2.1 has ``sessionmaker(engine, execution_options=...)``.
    """
    options: Any = getattr(session, "execution_options", {})
    if options.get("isolation_level") == "AUTOCOMMIT":
        refuse_autocommit(handlers)


def check_pool(pool: Any, needed: int, why: str) -> None:
    """Raise `PoolTooSmall` unless a pool has as many connections as are needed at a time.

    A pool without a limit, or whose limit cannot be known, is taken to be large enough.
    """
    size: Any = getattr(pool, "size", None)
    overflow: Any = getattr(pool, "_max_overflow", None)
    if size is None or overflow is None or overflow < 0:
        return
    available = int(size()) + int(overflow)
    if available < needed:
        raise PoolTooSmall(available, needed, why)

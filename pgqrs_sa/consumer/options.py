"""What a consumer is told, checked once; and what it finds in the database before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from .. import validation
from .._core import queues, schema
from .._core.context import Context
from ..codecs import Codec
from ..declared import DeclaredQueue, QueueSource, declared_in, joined
from ..errors import InvalidArgument, PoolTooSmall, safe_repr
from ..models import Models
from ..types import Seconds
from . import store
from .events import Hooks
from .handlers import Handler

__all__ = [
    "AutocommitSession",
    "ConsumerOptions",
    "check_database",
    "check_pool",
    "refuse_autocommit",
    "refuse_autocommit_session",
]

log = logging.getLogger("pgqrs_sa.consumer")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """How a consumer works; see `Consumer` for the meaning of each."""

    name: str
    concurrency: int
    poll_interval: float
    drain_timeout: float
    heartbeat: float
    housekeeping: float | None
    version: str | None
    models: Models | None
    codec: Codec | None
    notify: bool
    cursor_key: str | None
    listen_dsn: str | None
    hooks: tuple[Hooks, ...] = field(default=())
    queues: tuple[DeclaredQueue, ...] = field(default=())

    @classmethod
    def validated(
        cls,
        *,
        name: str,
        concurrency: int,
        poll_interval: Seconds,
        drain_timeout: Seconds,
        heartbeat: Seconds,
        housekeeping: Seconds | None,
        version: str | None,
        models: Models | None,
        codec: Codec | None,
        notify: bool,
        cursor_key: str | None = None,
        listen_dsn: str | None,
        hooks: Sequence[Hooks],
        queues: QueueSource = (),
    ) -> ConsumerOptions:
        """Return settings, or raise `InvalidArgument` for the first that cannot be."""

        def seconds(value: Seconds, what: str) -> float:
            return validation.validate_duration(value, what, positive=True).total_seconds()

        if cursor_key is not None:
            validation.validate_text(cursor_key, "cursor_key")
        return cls(
            name=validation.validate_text(name, "name"),
            concurrency=validation.validate_limit(concurrency, "concurrency"),
            poll_interval=seconds(poll_interval, "poll_interval"),
            drain_timeout=validation.validate_duration(
                drain_timeout, "drain_timeout"
            ).total_seconds(),
            heartbeat=seconds(heartbeat, "heartbeat"),
            housekeeping=None if housekeeping is None else seconds(housekeeping, "housekeeping"),
            version=None if version is None else validation.validate_text(version, "version"),
            models=None if models is None else _checked(models, Models, "models"),
            codec=None if codec is None else _checked_codec(codec),
            notify=_checked(notify, bool, "notify") or listen_dsn is not None,
            cursor_key=cursor_key,
            listen_dsn=None if listen_dsn is None else _checked(listen_dsn, str, "listen_dsn"),
            hooks=_checked_hooks(hooks),
            queues=declared_in(queues),
        )

    def declaring(self, queue: DeclaredQueue) -> ConsumerOptions:
        """Return settings with one more declared queue."""
        return replace(self, queues=joined(self.queues, (queue,)))

    def changed(
        self, concurrency: int | None, drain_timeout: Seconds | None, hooks: Sequence[Hooks]
    ) -> ConsumerOptions:
        """Return settings with what is given, and more hooks."""
        new = replace(self, hooks=(*self.hooks, *_checked_hooks(hooks)))
        if concurrency is not None:
            limit = validation.validate_limit(concurrency, "concurrency")
            new = replace(new, concurrency=limit)
        if drain_timeout is not None:
            span = validation.validate_duration(drain_timeout, "drain_timeout")
            new = replace(new, drain_timeout=span.total_seconds())
        return new

    def context(self, worker: int | None = None) -> Context:
        """Return the context of the consumer's own statements."""
        return Context.of(
            self.models, self.codec, worker, allow_autocommit=True, cursor_key=self.cursor_key
        )


def _checked(value: object, kind: type[_T], name: str) -> _T:
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be of type {kind.__name__}, not {safe_repr(value)}")
    return value


def _checked_codec(codec: Codec) -> Codec:
    if isinstance(codec, type) or not all(
        callable(getattr(codec, name, None)) for name in ("dumps", "loads")
    ):
        raise InvalidArgument(
            f"codec must have the methods dumps and loads, not {safe_repr(codec)}"
        )
    return codec


def _checked_hooks(hooks: Sequence[Hooks]) -> tuple[Hooks, ...]:
    if not isinstance(hooks, Sequence) or not all(isinstance(one, Hooks) for one in hooks):
        raise InvalidArgument(f"hooks must be a list of instances of Hooks, not {safe_repr(hooks)}")
    return tuple(hooks)


def check_database(
    session: Session,
    context: Context,
    handlers: Sequence[Handler],
    declared: Sequence[DeclaredQueue] = (),
    *,
    create: bool = True,
) -> dict[str, timedelta]:
    """Return how long a lease of each queue lasts, or raise for what keeps a consumer from working.

    Args:
        session: Of the consumer.
        context: Of the consumer.
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
    store.server_info(session, context)
    schema.check(session, context)
    missing = _synchronized(session, context, declared, create=create)
    leases = {}
    for handler in handlers:
        if (queue := missing.get(handler.queue)) is not None:
            leases[handler.queue] = handler.lease or queue.lease_at_creation
            continue
        info = queues.get(session, context, handler.queue)
        leases[handler.queue] = handler.lease or timedelta(seconds=info.lease_seconds)
    return leases


def _synchronized(
    session: Session, context: Context, declared: Sequence[DeclaredQueue], *, create: bool
) -> dict[str, DeclaredQueue]:
    """Create declared queues, or look for them; log what differs, and return what is missing."""
    missing = set()
    for queue in queues.sync(session, context, declared, dry_run=not create):
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
    """Do as `refuse_autocommit` if a new session is to set AUTOCOMMIT, whatever its engine is in.

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

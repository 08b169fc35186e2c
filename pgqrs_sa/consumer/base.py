"""What `Consumer` and `AsyncConsumer` share: their options, and the registration of handlers."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, Generic, TypeVar, Unpack

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .._core.representation import represented
from .._core.scope import Scope
from .._core.sessions import registry_of
from ..declared import DeclaredQueue
from ..errors import InvalidArgument
from ..types import Seconds
from .events import Hooks
from .handlers import HANDLER_DEFAULTS, Handler, HandlerOptions, Handlers
from .options import (
    CONSUMER_DEFAULTS,
    ConsumerConfig,
    ConsumerOptions,
    takes_options,
)
from .runtime import Runtime
from .sessions import (
    call_context_of,
    engine_of,
    factory_of,
    open_session,
    refuse_autocommit_session,
    sessionmaker_for,
)

__all__ = ["START_GRACE", "BaseConsumer", "Startup"]

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S")
_T = TypeVar("_T")


class BaseConsumer(ABC, Generic[_S]):
    """Handlers by queue, and how they are to be run. See `Consumer` for the options."""

    _asynchronous = False

    @takes_options(ConsumerOptions, CONSUMER_DEFAULTS)
    def __init__(self, sessionmaker: Callable[[], _S], **options: Unpack[ConsumerOptions]) -> None:
        self._pid = os.getpid()
        self._inherited: object = None
        self._sessionmaker: Any = sessionmaker_for(
            sessionmaker, type(self).__name__, asynchronous=self._asynchronous
        )
        self._new_session: Any = factory_of(sessionmaker)
        self._registry: Any = registry_of(sessionmaker)
        self._config = ConsumerConfig.validated(**options)
        self._handlers = Handlers(
            self._config.concurrency, self._config.retry, asynchronous=self._asynchronous
        )
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Make what a consumer of this kind needs to be started and stopped."""

    def __repr__(self) -> str:
        return represented(
            type(self),
            name=self._config.name,
            queues=[handler.queue for handler in self.handlers],
            concurrency=self.concurrency,
        )

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers, in the order of their registration."""
        return tuple(self._handlers.by_queue.values())

    @property
    def declared_queues(self) -> tuple[DeclaredQueue, ...]:
        """The queues that it creates when it starts, where they are missing, by name."""
        return self._config.queues

    @property
    def concurrency(self) -> int:
        """How many calls may run at the same time."""
        return self._config.concurrency

    def handler(self, queue: str) -> Handler:
        """Return the handler of a queue.

        Raises:
            InvalidArgument: there is none.
        """
        return self._handlers.get(queue)

    @takes_options(HandlerOptions, HANDLER_DEFAULTS)
    def on(
        self,
        queue: str | DeclaredQueue,
        **options: Unpack[HandlerOptions],
    ) -> Callable[[_F], _F]:
        """Register the decorated function as the handler of a queue.

        What it is called with, its annotations say: a ``Session`` (``AsyncSession``), whose
        commit writes what the handler wrote and archives the message, both or neither; a
        `Delivery`; a `QueueService` (`AsyncQueueService`) in that session; and the payload, as a
        pydantic model, a msgspec struct, a dataclass or plain JSON.

        It returns None, or a decision: `RetryIn`, `Snooze`, `Discard`, `DeadLetter`. Returned,
        a decision commits with the handler's writes; raised, it rolls them back first.

        Args:
            queue: The name of a queue that exists when the consumer starts, or a `DeclaredQueue`,
                which is created then if it is missing.
            lease: Seconds, or a timedelta. Default: the queue's ``lease_seconds``. The lease is
                renewed while the handler runs, so it only bounds how long the message of a process
                that died waits for the next attempt.
            concurrency: The maximum of calls of this handler that run at the same time. Default:
                the consumer's.
            prefetch: How many more messages to lease ahead. This saves round trips for fast
                handlers, but these messages wait here while another consumer could handle them.
                Fast handlers, which work them off in a tenth of a second, get up to twice as many.
            timeout: Seconds, or a timedelta, after which the attempt fails, and its lease is given
                up. A task is cancelled. A thread continues, but cannot commit.
            retry: How to retry a message whose handler raised. Default: the consumer's rule.
            batch: Call it with lists of up to this many messages.
            weight: Its share of the consumer when several queues have messages.
            acknowledge: ``commit``: with the handler's transaction, or after it has returned when
                it takes no session. ``first``: before it is called, at most once. ``manual``: by
                the handler itself, with its service, within the lease.
            payload: The payload's type, when no annotation says it.

        Raises:
            InvalidArgument: the handler's signature, or one of these, cannot be.
        """
        name = queue.name if isinstance(queue, DeclaredQueue) else queue
        if isinstance(queue, DeclaredQueue):
            self._config = self._config.declaring(queue)

        def register(function: _F) -> _F:
            return self._handlers.add(name, function, **options)

        return register

    def only(self, *queues: str) -> None:
        """Work on these queues alone, of those that have a handler."""
        self._handlers.only(queues)

    def configure(
        self,
        *,
        concurrency: int | None = None,
        drain_timeout: Seconds | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> None:
        """Change how it works before it starts, as ``pgqrs worker run`` does with its options.

        Args:
            concurrency: How many calls may run at the same time, also of the handlers that have no
                number of their own.
            drain_timeout: Seconds, or a timedelta, that running handlers get when it stops.
            hooks: More of them.

        Raises:
            InvalidArgument: one of these cannot be.
        """
        self._config = self._config.changed(concurrency, drain_timeout, hooks)
        if concurrency is not None:
            self._handlers.run_as_many(concurrency)

    def _engine_of_sessions(self) -> Engine:
        """Return the engine of the sessions that are made in calls."""
        context = self._config.context()
        return self._own(self._asked(lambda session: engine_of(Scope(session, context))))

    def _refuse_autocommit(self) -> None:
        """Raise if the sessions that are made in calls set AUTOCOMMIT, and a handler takes one."""
        self._asked(lambda session: refuse_autocommit_session(session, self.handlers))

    def _asked(self, ask: Callable[[Session], _T]) -> _T:
        """Return what a function finds out about a session, as one is made in a call."""

        def asked() -> _T:
            with call_context_of(self._config.call_context)():
                made = open_session(self._new_session(), asynchronous=self._asynchronous)
                with made.sync_session if self._asynchronous else made as session:
                    found = ask(session)
            return found

        return copy_context().run(asked)

    def _own(self, engine: Engine) -> Engine:
        """Return an engine whose pool belongs to this process."""
        if self._pid != os.getpid():
            # Connections that the parent process opened are the parent's: using them here as well
            # would mix up what they say (https://docs.sqlalchemy.org/en/20/core/pooling.html).
            # They are kept: asyncpg's, when collected, take their sockets from the loop that the
            # parent may be waiting in, whose epoll both processes share.
            self._inherited = engine.pool
            engine.dispose(close=False)
            self._pid = os.getpid()
        return engine

    @staticmethod
    def _refuse_twice(run: Any) -> None:
        if run is not None and not (run.runtime.forked or run.runtime.closed):
            raise InvalidArgument("this consumer works already: stop it first, or make another one")

    def _connections_needed(self) -> int:
        """How many sessions of handlers may be open at a time."""
        wanted = sum(handler.concurrency for handler in self.handlers if handler.call.needs_session)
        return min(self._config.concurrency, wanted)


START_GRACE = 4.0
"""Seconds that a start may take to end once it was given up; then its thread is left alone."""

_BY_ITSELF = 3.0
"""Seconds of these before its connection is cut. Cut while it registers, it would leave a worker
that nobody stops: the row may have been committed, and its id is not known."""


class Startup:
    """The start of a run, from now on."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._unwanted = False
        self._lock = threading.Lock()
        self._cut = threading.Timer(_BY_ITSELF, runtime.abort_start)
        self._cut.daemon = True
        threading.Thread(target=self._run, name="pgqrs-start", daemon=True).start()

    def _run(self) -> None:
        try:
            self._runtime.start()
        except BaseException as error:  # noqa: BLE001 - raised again by `began`
            self._error = error
        self._cut.cancel()
        with self._lock:
            if not self._unwanted:
                self._over.set()
                return
        if self._error is None:  # it has begun all the same, and nobody is to know of it
            self._runtime.drain()
            self._runtime.close(lambda: True)
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of it, for so long; return whether that has come."""
        return self._over.wait(seconds)

    @property
    def aborted(self) -> bool:
        """Whether it was given up."""
        return self._runtime.aborted

    def abort(self) -> None:
        """Let it end soon, without a run, unless that has begun already."""
        with self._lock:
            first = not (self._unwanted or self._over.is_set())
            self._unwanted = self._unwanted or first
        self._runtime.abort()
        if first:
            self._cut.start()

    def began(self) -> bool:
        """Return whether there is a run, or raise what has prevented it.

        False after `abort`, unless the run had begun by then. One that begins later ends itself.
        """
        if self._unwanted:
            return False
        if self._error is not None and not self._runtime.aborted:
            raise self._error
        return self._error is None

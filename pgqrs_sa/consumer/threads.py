"""`Consumer`: handlers in threads, each with a session of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .._core.scope import Scope
from ..service import QueueService
from . import stacks
from .base import START_GRACE, BaseConsumer, Startup
from .call_transactions import forbid_commit
from .connection import SyncConnector
from .disposition import Disposition
from .handlers import Invocation
from .invocation import after_error, after_return, begin, commit_within, is_fatal
from .leases import Lease
from .options import check_pool
from .runtime import RunResult, Runtime
from .sessions import (
    CallContext,
    call_context_of,
    check_scopes,
    refuse_elsewhere,
    refuse_suppression,
)
from .state import ConsumerState

__all__ = ["Consumer"]

_OWN_CONNECTIONS = 2  # for leasing and settling, and for renewing


class Consumer(BaseConsumer[Session]):
    """Calls handlers with messages, in threads; a handler's commit is the acknowledgement.

    ::

        consumer = Consumer(sessionmaker(engine))

        @consumer.on("receipts", timeout=120)
        def send_receipt(session: Session, order: Order, delivery: Delivery) -> None:
            session.add(Receipt(order=order.id))

        consumer.run()

    Args:
        sessionmaker: Makes a session for each call of a handler. Its engine also gives the two
            connections that the consumer itself works on.
        concurrency: How many calls may run at the same time.
        retry: What becomes of messages whose handler raised, unless the handler says otherwise.
        poll_interval: Seconds, or a timedelta, between two looks at an idle queue at the most.
        drain_timeout: Seconds, or a timedelta, that running handlers get when the consumer stops;
            then their messages are given back, uncharged, and they cannot commit any more. That
            takes up to 11 seconds more when the database does not answer.
        heartbeat: Seconds, or a timedelta, between two signs of life in the register of workers.
        housekeeping: Seconds, or a timedelta, between two rounds of taking back what dead workers
            hold, burying exhausted messages, and pruning the archive; None for none. It only makes
            things quicker: nothing that is promised depends on it.
        name: In the register of workers; the host's name unless given.
        version: Of the application, in the register of workers.
        models: A host's own classes; the ready-made ones unless given.
        codec: Turns JSON text into payloads; strict standard JSON unless given.
        notify: Wait for notifications too (LISTEN), on a connection of its own, not of the pool.
            Producers send them when they were made with ``notify=True``.
        listen_dsn: Where to listen, if that is not where the engine connects to: a pooler in
            transaction mode delivers no notifications. A URL or libpq's keywords, with one host
            or several. Implies ``notify``.
        cursor_key: Any name, where row-level security is active for the consumer's role: see
            `QueueService`.
        hooks: Hear of what happens to messages.
        queues: `DeclaredQueue` objects, or a MetaData with `declare_queues`. Those that are missing
            are created by one statement when the consumer starts. A setting that differs is logged
            as a warning, and is not changed.
        call_context: A function without arguments that returns a context manager, such as
            ``app.app_context`` of Flask. Each call of a handler is made in it, with its session.
            Where a consumer starts in an application context of Flask, each call gets an
            application context of its own without it.
    """

    def _prepare(self) -> None:
        self._run: ThreadExecutor | None = None
        self._outcome = RunResult()
        self._ending = threading.Lock()
        self._stop = threading.Event()
        self._signals = 0  # no Event: a signal may come while its lock is held

    def check(self) -> dict[str, timedelta]:
        """Raise for whatever would keep this consumer from working.

        A declared queue that is missing is no problem, and is not created here. A declared setting
        that differs from the database is logged as a warning.

        Returns:
            How long a lease lasts, by queue.

        Raises:
            InvalidArgument: no handler, no engine to take connections from, or a registry of
                sessions whose scope is not that of a call.
            PoolTooSmall: with both numbers.
            ReadOnlyDatabase, SchemaVersionError, QueueNotFound: what is wrong with the database.
        """
        check_scopes(self._registry, self._config.call_context)
        engine = self._engine()
        self._check_pool(engine)
        return self._make_run(engine, until_empty=False).runtime.check()

    def run(self, *, until_empty: bool = False) -> int:
        """Work until told to stop: by `stop`, SIGTERM or SIGINT.

        The first signal ends the leasing, and waits for the handlers that run; the second gives
        their messages back at once. Signals are only heeded in the main thread.

        Args:
            until_empty: Return as soon as nothing is visible in any of the queues.

        Returns:
            The exit code: 0 when every handler had ended, 1 when some were given up.

        Raises:
            PgqrsError: see `check`.
            KeyboardInterrupt, SystemExit: a handler raised it; its lease is not left behind.
        """
        self._signals = 0
        with _Signals(self._on_signal):
            self.start(until_empty=until_empty)
            look = 0.02 if until_empty else 0.1
            while (run := self._run) and not (self._stop.wait(look) or self._signals):
                if run.runtime.over or run.failure is not None:
                    break
            return self._end()

    def start(self, *, until_empty: bool = False) -> None:
        """Begin to work in the background, as in a web application's process.

        Raises:
            InvalidArgument: it works already.
            PgqrsError: see `check`.
        """
        self._refuse_twice(self._run)
        self._stop.clear()
        check_scopes(self._registry, self._config.call_context)
        engine = self._engine()
        self._check_pool(engine)
        run = self._make_run(engine, until_empty=until_empty)
        if self._begun(run):
            run.start(
                min(self._config.concurrency, sum(handler.concurrency for handler in self.handlers))
            )
            self._run = run

    def _begun(self, run: ThreadExecutor) -> bool:
        """Start a run; False when told to stop before that was done."""
        start = Startup(run.runtime)
        try:
            while not (start.wait(0.05) or self._signals or self._stop.is_set()):
                pass
        except BaseException:
            start.abort()
            if start.began():
                self._run_ended(run)
            else:
                start.wait(START_GRACE)  # the process may end now, and the start has to end before
            raise
        if not start.wait(0):
            start.abort()
            start.wait(START_GRACE)
        return start.began()

    def stop(self) -> int:
        """Lease no more, wait for the handlers that run, and end.

        A handler or a hook that calls this does not wait, since that would be for itself: `run`
        returns soon afterwards; after `start`, somebody else has to stop the consumer still.

        Returns:
            As `run`.
        """
        self._stop.set()
        run, here = self._run, threading.current_thread()
        if run is not None and (run.is_of(here) or run.runtime.is_of(here)):
            run.runtime.drain()
            return 0
        return self._end()

    def dispose(self) -> None:
        """Close the pool of its engine, at the end of a process that needs it no more."""
        self._engine().dispose()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        self.stop()

    def _engine(self) -> Engine:
        return self._engine_of_sessions()

    def _check_pool(self, engine: Engine) -> None:
        needed = self._connections_needed()
        why = f"{needed} for handlers that run at the same time, {_OWN_CONNECTIONS} of its own"
        check_pool(engine.pool, needed + _OWN_CONNECTIONS, why)

    def _make_run(self, engine: Engine, *, until_empty: bool) -> ThreadExecutor:
        self._refuse_autocommit()
        executor = ThreadExecutor(
            self._sessionmaker, engine, call_context_of(self._config.call_context)
        )
        state = ConsumerState(
            self._config, self.handlers, executor, until_empty=until_empty, grace=0.0
        )
        executor.runtime = Runtime(state)
        return executor

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    @property
    def _stop_at_once(self) -> bool:
        """True after the second request to stop, if it is a signal."""
        return self._signals > (0 if self._stop.is_set() else 1)

    def _end(self) -> int:
        with self._ending:  # `run` waits for it too when `stop` is called in another thread
            if self._run is not None and not self._run.runtime.forked:
                self._outcome = self._run_ended(self._run)
            self._run = None
        return self._outcome.code()

    def _run_ended(self, run: ThreadExecutor) -> RunResult:
        runtime = run.runtime
        runtime.drain()
        end = time.monotonic() + self._config.drain_timeout
        while time.monotonic() < end and not self._stop_at_once and not runtime.fatal:
            if runtime.wait_idle(min(0.1, end - time.monotonic())):
                break
        clean = runtime.close(lambda: self._stop_at_once)
        run.shutdown()
        return RunResult(clean, run.failure or runtime.fatal)


class _Signals:
    """Handle SIGTERM and SIGINT while a block runs in the main thread."""

    def __init__(self, handle: Callable[[int, FrameType | None], None]) -> None:
        self._handle = handle
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        # A function: signal.signal() makes the repr() of what a method is bound to.
        def handle(number: int, frame: FrameType | None) -> None:
            self._handle(number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, handle)

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not installed from Python
                signal.signal(number, handler)


class ThreadExecutor:
    """Threads that call handlers. They are daemons: one that hangs does not keep the process."""

    def __init__(
        self, sessionmaker: Callable[[], Session], engine: Engine, call_context: CallContext
    ) -> None:
        self._sessionmaker = sessionmaker
        self.engine = engine
        self.connector = partial(SyncConnector, engine)
        self._call_context = call_context
        self._context = copy_context()  # of whoever starts the consumer: each call gets a copy
        self._work_ready = threading.Condition()
        self._begun = 0
        self._idle = 0
        self._shutting_down = False
        self._threads: list[threading.Thread] = []
        self.runtime: Runtime
        self.failure: BaseException | None = None

    def start(self, count: int) -> None:
        """Start the threads."""
        for number in range(count):
            thread = threading.Thread(
                target=self._worker, name=f"pgqrs-handler-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self.submit(count)  # the dispatcher may have been quicker

    def shutdown(self) -> None:
        """Let the threads end, once each has finished what it does."""
        self._shutting_down = True
        self.submit(len(self._threads))
        for thread in self._threads:
            thread.join(0.5 if self.runtime.busy == 0 else 0.0)

    def is_of(self, thread: threading.Thread) -> bool:
        """Return whether a thread is one of these, in which handlers are called."""
        return thread in self._threads

    def submit(self, count: int) -> None:
        """See `Executor`: a free thread wakes, and works until there is nothing to start."""
        with self._work_ready:
            self._begun += 1
            # One that has leased for itself does not wait.
            self._work_ready.notify(count - self.is_of(threading.current_thread()))

    def wake(self) -> bool:
        """See `Executor`."""
        with self._work_ready:
            if self._idle:
                self._begun += 1
                self._work_ready.notify()
            return self._idle > 0

    def silent_for(self) -> float:
        """See `Executor`: a thread always answers."""
        return 0.0

    @property
    def is_dead(self) -> bool:
        """See `Executor`."""
        return False

    def abandon(self, leases: Sequence[Lease]) -> None:
        """See `Executor`: a thread cannot be stopped, but it can ask ``delivery.lease_lost``."""

    def stack(self, lease: Lease) -> str | None:
        """See `Executor`."""
        stack = stacks.of_thread(lease.thread)
        return None if lease.settling else stack  # its thread may be with another message by now

    def _worker(self) -> None:
        seen = 0
        while not self._shutting_down:
            with self._work_ready:
                self._idle += 1
                self._work_ready.wait_for(lambda seen=seen: self._begun != seen)  # type: ignore[misc]
                self._idle -= 1
                seen = self._begun
            while (
                not self._shutting_down
                and (invocation := self.runtime.next_invocation()) is not None
            ):
                dispositions = self._context.copy().run(self._run, invocation)
                self.runtime.finished(invocation, dispositions, quiet=True)

    def _run(self, invocation: Invocation) -> list[Disposition]:
        try:
            with self._call_context():
                return self._invoke(invocation)
            refuse_suppression()
        except BaseException as error:  # noqa: BLE001 - whatever it is, no lease is left behind
            dispositions = after_error(invocation, error, stopping=self.runtime.stopping)
            if is_fatal(error):
                self.failure = self.failure or error
                self.runtime.drain()  # or it would be leased again at once
            return dispositions

    def _invoke(self, invocation: Invocation) -> list[Disposition]:
        call = invocation.handler.call
        if call.needs_session:
            return self._invoke_in_session(invocation)
        payloads = call.payloads(invocation.deliveries)
        arguments = call.arguments(invocation.deliveries, payloads, None, None)
        return after_return(invocation, call.run(arguments))

    def _invoke_in_session(self, invocation: Invocation) -> list[Disposition]:
        call, context = invocation.handler.call, self.runtime.state.context
        payloads = call.payloads(invocation.deliveries)
        settings = self.runtime.state.config
        calls = self.runtime.state.call_transactions
        with (
            calls.transaction(invocation) as transaction,
            self._sessionmaker() as session,
            session.begin(),
        ):
            scope = Scope(session, context)
            refuse_elsewhere(scope, self.engine)
            if invocation.handler.acknowledge == "commit":
                begin(scope, invocation, calls, transaction)
            service = QueueService(
                session,
                models=context.models,
                codec=context.codec,
                worker=context.worker,
                notify=settings.notify,
            )
            with forbid_commit(session, invocation.handler):
                result = call.run(call.arguments(invocation.deliveries, payloads, session, service))
            if invocation.handler.acknowledge == "first":
                return after_return(invocation, result)
            lease_table = self.runtime.state.lease_table
            return commit_within(scope, invocation, result, lease_table, transaction)

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
from .runtime import RunResult, Runtime
from .sessions import (
    CallContext,
    call_context_of,
    check_pool,
    check_scopes,
    refuse_elsewhere,
    refuse_suppression,
)
from .state import ConsumerState

__all__ = ["Consumer"]

_OWN_CONNECTIONS = 2  # for leasing and settling, and for renewing


class Consumer(BaseConsumer[Session]):
    """Calls handlers with messages, in threads. A handler's commit is the acknowledgement.

    ::

        consumer = Consumer(sessionmaker(engine))

        @consumer.on("receipts", timeout=120)
        def send_receipt(session: Session, order: Order, delivery: Delivery) -> None:
            session.add(Receipt(order=order.id))

        consumer.run()

    Args:
        sessionmaker: Makes a session for each call of a handler. Its engine also provides the two
            connections of the consumer itself.
        concurrency: The maximum of calls that run at the same time.
        retry: How to retry messages whose handler raised, unless the handler has its own rule.
        poll_interval: The longest pause between two polls of an idle queue: seconds, or a
            timedelta.
        drain_timeout: The time that running handlers get when the consumer stops: seconds, or a
            timedelta. After it their messages are released, uncharged, and they cannot commit. If
            the database does not answer, this takes up to 11 seconds more.
        heartbeat: The interval of the heartbeat of its worker: seconds, or a timedelta.
        housekeeping: The interval of the housekeeping, which releases the messages of dead workers,
            dead-letters exhausted messages and prunes the archive: seconds, or a timedelta; None
            for none. It only makes things faster: no promise depends on it.
        name: The name of its worker. Default: the host's name.
        version: The application's version, stored with its worker.
        models: The host's own classes. Default: the ready-made ones.
        codec: Decodes JSON text into payloads. Default: strict standard JSON.
        notify: Also wait for notifications (LISTEN), on a separate connection outside the pool.
            Producers send them if they were created with ``notify=True``.
        listen_dsn: Where to listen, if the engine connects to a pooler in transaction mode, which
            delivers no notifications. A URL or libpq's keywords, with one host or several. Implies
            ``notify``.
        cursor_key: Any name, if row-level security is active for the consumer's role: see
            `QueueService`.
        hooks: Functions that are called on events of messages and workers.
        queues: `DeclaredQueue` objects, or a MetaData with `declare_queues`. Missing queues are
            created by one statement when the consumer starts. A setting that differs is logged as
            a warning, and not changed.
        call_context: A function without arguments that returns a context manager, such as Flask's
            ``app.app_context``. Each handler is called in it, with its session. A consumer that
            starts in an application context of Flask gives each call a new one by default.
    """

    def _prepare(self) -> None:
        self._run: ThreadExecutor | None = None
        self._outcome = RunResult()
        self._ending = threading.Lock()
        self._stop = threading.Event()
        self._signals = 0  # no Event: a signal may come while its lock is held

    def check(self) -> dict[str, timedelta]:
        """Check that this consumer can start, and raise if not.

        A declared queue that is missing is accepted, and not created here. A declared setting that
        differs from the database is logged as a warning.

        Returns:
            The length of a lease, by queue.

        Raises:
            InvalidArgument: no handler is registered, the sessionmaker has no engine, or a
                registry of sessions would share sessions between calls.
            PoolTooSmall: the pool has fewer connections than the consumer needs.
            ReadOnlyDatabase, SchemaVersionError, QueueNotFound: the database is not usable.
        """
        check_scopes(self._registry, self._config.call_context)
        engine = self._engine()
        self._check_pool(engine)
        return self._make_run(engine, until_empty=False).runtime.check()

    def run(self, *, until_empty: bool = False) -> int:
        """Run until stopped by `stop`, SIGTERM or SIGINT.

        After the first signal it stops leasing, and waits for the running handlers. After the
        second it releases their messages immediately. Signals are handled in the main thread only.

        Args:
            until_empty: Return as soon as no message is visible in any of the queues.

        Returns:
            The exit code: 0 if every handler had ended, 1 if some were abandoned.

        Raises:
            PgqrsError: see `check`.
            KeyboardInterrupt, SystemExit: a handler raised it; its message was released.
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
        """Start in the background, for example in the process of a web application.

        Raises:
            InvalidArgument: it is running already.
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
        """Start a run; return False if it was stopped before it had started."""
        start = Startup(run.runtime)
        try:
            while not (start.wait(0.05) or self._signals or self._stop.is_set()):
                pass
        except BaseException:
            start.abort()
            if start.began():
                self._run_ended(run)
            else:
                start.wait(START_GRACE)  # the process may end next: the start must end before that
            raise
        if not start.wait(0):
            start.abort()
            start.wait(START_GRACE)
        return start.began()

    def stop(self) -> int:
        """Stop leasing, wait for the running handlers, and end.

        When a handler or a hook calls this, it returns immediately, since it would wait for itself.
        `run` then returns soon. After `start`, another thread must still call `stop`.

        Returns:
            The same as `run`.
        """
        self._stop.set()
        run, here = self._run, threading.current_thread()
        if run is not None and (run.is_of(here) or run.runtime.is_of(here)):
            run.runtime.drain()
            return 0
        return self._end()

    def dispose(self) -> None:
        """Close the pool of its engine, at the end of a process."""
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
        """Return whether a second request to stop arrived, as a signal."""
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
    """Handles SIGTERM and SIGINT during a block in the main thread."""

    def __init__(self, handle: Callable[[int, FrameType | None], None]) -> None:
        self._handle = handle
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        # A function, not a method: signal.signal() calls repr() on a method's instance.
        def handle(number: int, frame: FrameType | None) -> None:
            self._handle(number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, handle)

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not installed from Python
                signal.signal(number, handler)


class ThreadExecutor:
    """Daemon threads that call handlers: one that hangs does not keep the process alive."""

    leads = True

    def __init__(
        self, sessionmaker: Callable[[], Session], engine: Engine, call_context: CallContext
    ) -> None:
        self._sessionmaker = sessionmaker
        self.engine = engine
        self.connector = partial(SyncConnector, engine)
        self._call_context = call_context
        self._context = copy_context()  # of the caller of run() or start(); each call gets a copy
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
        self.submit(count)  # the dispatcher may have leased before the threads existed

    def shutdown(self) -> None:
        """Let each thread end after its current call."""
        self._shutting_down = True
        self.submit(len(self._threads))
        for thread in self._threads:
            thread.join(0.5 if self.runtime.busy == 0 else 0.0)

    def is_of(self, thread: threading.Thread) -> bool:
        """Return whether a thread is one of these."""
        return thread in self._threads

    def submit(self, count: int) -> None:
        """See `Executor`: an idle thread wakes, and works until nothing is left to start."""
        with self._work_ready:
            self._begun += 1
            # A thread that has leased for itself is not waiting.
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
        return None if lease.settling else stack  # its thread may work on another message now

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
        except BaseException as error:  # noqa: BLE001 - no error may leave a lease behind
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

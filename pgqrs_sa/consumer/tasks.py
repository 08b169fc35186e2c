"""`AsyncConsumer`: handlers as tasks of one event loop, each with its own session.

Leasing, settling and renewing happen in threads with their own event loops: a handler that blocks
the application's loop loses no lease, and a cancelled task leaves none behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from .._core.scope import Scope
from ..aio import AsyncQueueService
from ..errors import HandlerTimeout
from . import stacks
from .base import START_GRACE, BaseConsumer, Startup
from .call_transactions import CallTransaction, forbid_commit
from .connection import AsyncConnector
from .disposition import Disposition
from .handlers import Invocation
from .invocation import FORGIVEN, after_error, after_return, begin, commit_within, is_fatal
from .leases import Lease
from .runtime import RunResult, Runtime
from .sessions import (
    CallContext,
    call_context_of,
    check_pool,
    check_scopes_of_tasks,
    refuse_elsewhere,
    refuse_suppression,
)
from .state import ConsumerState

__all__ = ["AsyncConsumer"]

_GRACE = 1.0  # seconds for a task to end after its timeout has cancelled it
_CANCELLED = 2.0  # seconds for cancelled tasks to end when the consumer stops


class AsyncConsumer(BaseConsumer[AsyncSession]):
    """Calls handlers with messages, as tasks. A handler's commit is the acknowledgement.

    ::

        consumer = AsyncConsumer(async_sessionmaker(engine))

        @consumer.on("receipts", timeout=120)
        async def send_receipt(session: AsyncSession, order: Order, delivery: Delivery) -> None:
            session.add(Receipt(order=order.id))

        await consumer.run()

    It takes the arguments of `Consumer`. Only handlers use the engine's pool: the consumer itself
    opens two more connections in the same way, outside the pool.
    """

    _asynchronous = True

    def _prepare(self) -> None:
        self._run: TaskExecutor | None = None
        self._ending: asyncio.Task[RunResult] | None = None
        self._outcome = RunResult()
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    async def check(self) -> dict[str, timedelta]:
        """See `Consumer.check`."""
        run = await self._make_run(until_empty=False)
        return await asyncio.to_thread(run.runtime.check)

    async def run(self, *, until_empty: bool = False) -> int:
        """See `Consumer.run`; cancelling it releases the messages of running handlers."""
        with _signals(self._on_signal):
            await self.start(until_empty=until_empty)
            try:
                while (run := self._run) and not self._stop.is_set():
                    if run.runtime.over or run.failure is not None:
                        break
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stop.wait(), 0.02 if until_empty else 0.1)
            except asyncio.CancelledError:
                await self._abort()
                raise
            return await self._end()

    async def start(self, *, until_empty: bool = False) -> None:
        """See `Consumer.start`."""
        self._refuse_twice(self._run)
        self._stop, self._now = asyncio.Event(), asyncio.Event()  # of this loop
        run = await self._make_run(until_empty=until_empty)
        start = Startup(run.runtime)
        # Started threads must be ended even if this task is cancelled.
        begun = asyncio.ensure_future(self._begun(start))
        cancelled = await _done(begun, start.abort)
        if not cancelled:
            self._run = run if begun.result() else None
            return
        if begun.exception() is None and begun.result():
            self._run = run
            await self._abort()
        raise asyncio.CancelledError

    async def _begun(self, start: Startup) -> bool:
        """Wait for a start; return False if it was stopped before it had started."""
        until = math.inf
        while not start.wait(0) and time.monotonic() < until:
            await asyncio.sleep(0.01)
            if until == math.inf and (self._stop.is_set() or start.aborted):
                start.abort()
                until = time.monotonic() + START_GRACE
        return start.began()

    async def stop(self) -> int:
        """See `Consumer.stop`."""
        self._stop.set()
        run = self._run
        if run is not None and asyncio.current_task() in run.running:
            run.runtime.drain()
            return 0
        return await self._end()

    async def dispose(self) -> None:
        """See `Consumer.dispose`."""
        await self._engine().dispose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        await self.stop()

    def _engine(self) -> AsyncEngine:
        return AsyncEngine(self._engine_of_sessions())

    async def _make_run(self, *, until_empty: bool) -> TaskExecutor:
        await check_scopes_of_tasks(self._registry, self._config.call_context)
        engine = self._engine()
        self._refuse_autocommit()
        needed = self._connections_needed()
        check_pool(engine.pool, needed, "one for each handler that runs at the same time")
        executor = TaskExecutor(
            self._sessionmaker,
            engine,
            asyncio.get_running_loop(),
            call_context_of(self._config.call_context),
        )
        state = ConsumerState(
            self._config, self.handlers, executor, until_empty=until_empty, grace=_GRACE
        )
        executor.runtime = Runtime(state)
        return executor

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._now.set()
        self._stop.set()

    async def _abort(self) -> None:
        """End immediately; the waiting task is cancelled already."""
        self._now.set()
        with contextlib.suppress(Exception):
            await self._end()

    async def _end(self) -> int:
        run = self._run
        if run is None or run.runtime.forked:
            return self._outcome.code()
        # One task for `run` and `stop`, which is not cancelled with either of them.
        ending = self._ending
        if ending is None or ending.get_loop() is not asyncio.get_running_loop():
            ending = self._ending = asyncio.ensure_future(self._run_ended(run))
        cancelled = await _done(ending, self._now.set)
        self._run, self._ending, self._outcome = None, None, ending.result()
        if cancelled:
            raise asyncio.CancelledError
        return self._outcome.code()

    async def _run_ended(self, run: TaskExecutor) -> RunResult:
        runtime = run.runtime
        runtime.drain()
        finished = await self._wait_for_run(run, self._config.drain_timeout)
        if not finished:
            await run.cancel_all(_CANCELLED)
        clean = await asyncio.to_thread(runtime.close, self._now.is_set)
        return RunResult(clean and finished, run.failure or runtime.fatal)

    async def _wait_for_run(self, run: TaskExecutor, seconds: float) -> bool:
        """Wait for the running handlers until ``_now`` is set; return whether all ended."""
        end = time.monotonic() + seconds
        hurry = asyncio.ensure_future(self._now.wait())
        while not (run.runtime.idle or run.runtime.fatal or hurry.done()):
            if (left := end - time.monotonic()) <= 0:
                break
            await asyncio.wait(
                {hurry, *run.here()},
                timeout=min(left, 0.05),
                return_when=asyncio.FIRST_COMPLETED,
            )
        hurry.cancel()
        return run.runtime.idle or not run.running


@contextlib.contextmanager
def _signals(handle: Callable[[], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT in the running loop, if it is in the main thread."""
    before: dict[signal.Signals, Any] = {}
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            was = signal.getsignal(number)
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, handle)
                before[number] = was
    try:
        yield
    finally:
        for number, earlier in before.items():
            loop.remove_signal_handler(number)
            if earlier is not None:  # asyncio.run() installs one for SIGINT
                signal.signal(number, earlier)


async def _done(task: asyncio.Future[Any], on_cancel: Callable[[], None]) -> bool:
    """Wait until a task is done, even if this wait is cancelled; return whether that happened."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
            on_cancel()
    return cancelled


class TaskExecutor:
    """Tasks that call handlers, in the application's loop."""

    leads = False  # the application's loop does not wait for a lease

    def __init__(
        self,
        sessionmaker: Callable[[], AsyncSession],
        engine: AsyncEngine,
        loop: asyncio.AbstractEventLoop,
        call_context: CallContext,
    ) -> None:
        self._sessionmaker = sessionmaker
        self._call_context = call_context
        self.engine = engine
        self.connector = partial(AsyncConnector, engine)
        self._loop = loop
        self._context = copy_context()  # of the caller of run() or start(); each call gets a copy
        self._by_attempt: dict[tuple[int, int], asyncio.Task[bool]] = {}
        self.runtime: Runtime
        self.running: set[asyncio.Task[bool]] = set()
        self.failure: BaseException | None = None
        self._asked_at: float | None = None  # when the loop was asked for a sign of life

    def submit(self, count: int) -> None:
        """See `Executor`. Called from the dispatcher's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: `silent_for` says so
            self._loop.call_soon_threadsafe(self._submit, count)

    def _submit(self, count: int) -> None:
        # A task for each call that may run. Those that end start others: see `_work`.
        for _ in range(min(count, self.runtime.slots - len(self.running))):
            self._start()

    def _start(self) -> None:
        task = self._loop.create_task(self._work(), context=self._context.copy())
        self.running.add(task)
        task.add_done_callback(self._ended)

    def wake(self) -> bool:
        """See `Executor`: the application's loop does not wait for a lease."""
        return False

    def silent_for(self) -> float:
        """See `Executor`: the time since the loop was asked, until it runs the callback."""
        now, asked_at = time.monotonic(), self._asked_at
        if asked_at is None:
            asked_at = self._asked_at = now
            with contextlib.suppress(RuntimeError):  # the loop is closed, and will not answer
                self._loop.call_soon_threadsafe(self._answer)
        return math.inf if self._loop.is_closed() else now - asked_at

    def _answer(self) -> None:
        self._asked_at = None

    @property
    def is_dead(self) -> bool:
        """See `Executor`: a blocked loop counts as running."""
        return not self._loop.is_running()

    def here(self) -> set[asyncio.Task[bool]]:
        """Return the running tasks if this is called in their loop, which can wait for them."""
        return set(self.running) if self._loop is asyncio.get_running_loop() else set()

    def abandon(self, leases: Sequence[Lease]) -> None:
        """See `Executor`: cancel the tasks, from any thread."""

        def cancel() -> None:
            for lease in leases:
                task = self._by_attempt.get((lease.delivery.id, lease.delivery.read_ct))
                if task is not None:
                    task.cancel()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(cancel)

    def stack(self, lease: Lease) -> str | None:
        """See `Executor`."""
        task = self._by_attempt.get((lease.delivery.id, lease.delivery.read_ct))
        return None if task is None else stacks.of_task(task, lease.thread)

    async def cancel_all(self, seconds: float) -> None:
        """Cancel the running tasks, and wait up to ``seconds`` for them to end."""
        tasks = self.here()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def _work(self) -> bool:
        """Run the next invocation that may start, if there is one.

        Returns:
            Whether another task is to be started in its place.
        """
        # Claimed here, not when the task is created: the loop may be blocked between the two.
        invocation = self.runtime.next_ready_invocation()
        if invocation is None:
            return False
        attempts = [(delivery.id, delivery.read_ct) for delivery in invocation.deliveries]
        if (task := asyncio.current_task()) is not None:
            task.set_name(f"pgqrs-{invocation.handler.name}")
            self._by_attempt.update(dict.fromkeys(attempts, task))
        try:
            self.runtime.finished(invocation, await self._run(invocation))
        finally:
            for attempt in attempts:
                self._by_attempt.pop(attempt, None)
        if not self.runtime.waiting:
            return True
        self._start()  # now: the callback of this task takes a turn of the loop
        return False

    def _ended(self, task: asyncio.Task[bool]) -> None:
        self.running.discard(task)
        # A task is only cancelled before its first step: afterwards it returns a result.
        if (task.cancelled() or task.result()) and self.runtime.waiting:
            self._submit(1)

    async def _run(self, invocation: Invocation) -> list[Disposition]:
        limit = invocation.handler.timeout
        try:
            if limit is None:
                with self._call_context():
                    return await self._invoke(invocation)
                refuse_suppression()
        except BaseException as error:  # noqa: BLE001 - see `_run_within`
            return self._after(invocation, error)
        return await self._run_within(limit.total_seconds(), invocation)

    async def _run_within(self, seconds: float, invocation: Invocation) -> list[Disposition]:
        """Run an invocation with a timeout."""
        clock = asyncio.timeout(seconds)
        try:
            async with clock:
                try:
                    with self._call_context():
                        return await self._invoke(invocation)
                    refuse_suppression()
                except TimeoutError as error:
                    raise _Raised(error) from error  # the handler's own, not the clock's
        except _Raised as raised:
            return self._after(invocation, raised.error)
        except TimeoutError as error:
            if clock.expired():
                cause = error.__cause__  # the CancelledError, which was raised where it waited
                where = None if cause is None else stacks.of_traceback(cause.__traceback__)
                late = HandlerTimeout(invocation.handler.name, seconds, where)
                late.__cause__ = cause
                return self._after(invocation, late)
            return self._after(invocation, error)
        except BaseException as error:  # noqa: BLE001 - no error may leave a lease behind
            return self._after(invocation, error)

    def _after(self, invocation: Invocation, error: BaseException) -> list[Disposition]:
        stopping = self.runtime.stopping or _cancelled_by_others(invocation, error)
        dispositions = after_error(invocation, error, stopping=stopping)
        if is_fatal(error):
            self.failure = self.failure or error
            self.runtime.drain()  # or it would be leased again at once
        return dispositions

    async def _invoke(self, invocation: Invocation) -> list[Disposition]:
        call = invocation.handler.call
        payloads = call.payloads(invocation.deliveries)
        if call.needs_session:
            return await self._invoke_in_session(invocation, payloads)
        result = await call.awaited(call.arguments(invocation.deliveries, payloads, None, None))
        return after_return(invocation, result)

    async def _invoke_in_session(
        self, invocation: Invocation, payloads: list[Any]
    ) -> list[Disposition]:
        with self.runtime.state.call_transactions.transaction(invocation) as transaction:
            async with self._sessionmaker() as session, session.begin():
                return await self._invoke_in_transaction(invocation, payloads, session, transaction)

    async def _invoke_in_transaction(
        self,
        invocation: Invocation,
        payloads: list[Any],
        session: AsyncSession,
        transaction: CallTransaction,
    ) -> list[Disposition]:
        call, context = invocation.handler.call, self.runtime.state.context
        scope = Scope(session.sync_session, context)
        refuse_elsewhere(scope, self.engine.sync_engine)
        if invocation.handler.acknowledge == "commit":
            calls = self.runtime.state.call_transactions
            await session.run_sync(lambda _: begin(scope, invocation, calls, transaction))
        service = AsyncQueueService(
            session,
            models=context.models,
            codec=context.codec,
            worker=context.worker,
            notify=self.runtime.state.config.notify,
        )
        arguments = call.arguments(invocation.deliveries, payloads, session, service)
        with forbid_commit(session.sync_session, invocation.handler):
            result = await call.awaited(arguments)
        if invocation.handler.acknowledge == "first":
            return after_return(invocation, result)
        lease_table = self.runtime.state.lease_table
        return await session.run_sync(
            lambda _: commit_within(scope, invocation, result, lease_table, transaction)
        )


def _cancelled_by_others(invocation: Invocation, error: BaseException) -> bool:
    """Return whether a task was cancelled from outside, as all are when a loop ends.

    Only for the first attempts: a handler that cancels its own task looks the same, and must be
    charged at some point.
    """
    task = asyncio.current_task()
    asked = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
    return bool(asked) and all(delivery.read_ct <= FORGIVEN for delivery in invocation.deliveries)


class _Raised(Exception):
    """Wraps a TimeoutError that the handler itself raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

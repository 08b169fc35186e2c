"""One run of a consumer: its threads, from the first check to the last settlement.

It is the same for threads and for asyncio. Only the executor differs: how it starts the call of a
handler, and how it tells a running one to stop.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from .._core import wakeup
from ..errors import EventLoopLost
from ..resources.workers import set_status
from ..types import Outcome
from .connection import ConsumerConnection
from .dispatcher import Dispatcher
from .disposition import Disposition
from .handlers import Invocation
from .renewer import LeaseRenewer, register_worker
from .retrying import is_transient
from .scheduler import Scheduler
from .sessions import refuse_autocommit
from .state import ConsumerState
from .store import check_database

if TYPE_CHECKING:
    from ..wakeup import Listener

__all__ = ["RunQueue", "RunResult", "Runtime", "StartAborted"]

log = logging.getLogger("pgqrs_sa.consumer")

SETTLE_TIMEOUT = 5.0
"""Seconds for the last settlements, after all handlers have ended or were abandoned."""

LOOP_SILENCE = 2.0
"""Seconds without an answer of the event loop after which nothing more is leased for it."""

JOIN_TIMEOUT = 1.0
"""Seconds for writes that may be skipped when a process ends, and for each way to end a thread.

With `SETTLE_TIMEOUT` these are at most 11 seconds, as documented in docs/reference/consumers.md."""


class StartAborted(Exception):
    """The run was stopped before it had started."""


class RunResult(NamedTuple):
    """The result of a run."""

    clean: bool = True
    failure: BaseException | None = None

    def code(self) -> int:
        """Return the exit code, or raise the error that ended the run."""
        if self.failure is not None:
            raise self.failure
        return 0 if self.clean else 1


@dataclass(slots=True)
class RunQueue:
    """Leased invocations that have not started, in order, within each handler's concurrency."""

    slots: int
    _waiting: deque[Invocation] = field(default_factory=deque)
    _running: Counter[str] = field(default_factory=Counter)
    _calls: int = 0

    def add(self, invocations: Iterable[Invocation]) -> None:
        """Append leased invocations."""
        self._waiting.extend(invocations)

    def take(self) -> Invocation | None:
        """Remove and return the first that may run now, counted as running; None if none may."""
        if self._calls >= self.slots:
            return None
        running = self._running
        for place, invocation in enumerate(self._waiting):
            if running[invocation.handler.queue] < invocation.handler.concurrency:
                del self._waiting[place]
                running[invocation.handler.queue] += 1
                self._calls += 1
                return invocation
        return None

    def finished(self, invocation: Invocation) -> None:
        """Record that a call has ended."""
        self._running[invocation.handler.queue] -= 1
        self._calls -= 1

    @property
    def waiting(self) -> int:
        """The number of invocations that have not started."""
        return len(self._waiting)

    def clear(self) -> list[Invocation]:
        """Remove and return all invocations that have not started."""
        left = list(self._waiting)
        self._waiting.clear()
        return left


class Runtime:
    """One run: created, checked, started and stopped once.

    Args:
        state: The state that its threads share.
    """

    def __init__(self, state: ConsumerState) -> None:
        self.state = state
        self._executor = state.executor
        self._pid = os.getpid()
        self._run_queue = RunQueue(state.config.concurrency)
        self._running: dict[int, Invocation] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stop_waiting = threading.Event()  # set: an unreachable database is not waited for
        self._draining = False
        self._paused = False
        self._loop_lost: EventLoopLost | None = None
        self._closing = threading.Lock()
        self._clean: bool | None = None
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._cleanup: list[Callable[[], None]] = []
        self._starting: ConsumerConnection | None = None
        # Added to the length of the consumer's own leases. A handler may lease from the same queue
        # with the same worker and length while the reply to a lease of the consumer is lost: then
        # `release_unanswered` tells the consumer's leases from the handler's by their exact length.
        self._lease_jitter = timedelta(microseconds=random.randint(1, 999))  # noqa: S311 - no secret

    # ---------------------------------------------------------------------------- starting

    def check(self, *, create: bool = False) -> dict[str, timedelta]:
        """Check the database; return the lease lengths of the queues. Raises as `check_database`.

        Args:
            create: Create the declared queues that are missing.
        """
        state = self.state
        connection = self._starting = self._connect()
        try:
            leases = connection.run_once(
                state.context, check_database, state.handlers, state.config.queues, create=create
            )
            if connection.is_autocommit:
                refuse_autocommit(state.handlers)
            return leases
        finally:
            connection.close()

    def start(self) -> None:
        """Check, register, and start leasing."""
        state = self.state
        leases = self.check(create=True)
        state.lease_lengths = {
            queue: length + self._lease_jitter for queue, length in leases.items()
        }
        state.shortest_lease = min(length.total_seconds() for length in leases.values())
        listener = self._listener()
        if self._stop_waiting.is_set():  # told to stop meanwhile: there is nothing to undo yet
            raise StartAborted
        connection = self._starting = self._connect()
        try:
            worker = register_worker(connection, state)
            if self._stop_waiting.is_set():  # told to stop meanwhile
                connection.run_once(state.context, set_status, worker.id, "stopped")
                raise StartAborted
        finally:
            connection.close()
        scheduler = Scheduler(state.config.concurrency, state.config.poll_interval)
        scheduler.add_handlers(state.handlers)
        self._dispatcher_connection, self._renewer_connection = self._connect(), self._connect()
        self.dispatcher = Dispatcher(self._dispatcher_connection, state, scheduler, self)
        self.renewer = LeaseRenewer(self._renewer_connection, state, self.dispatcher)
        self._cleanup.append(wakeup.subscribe(self.dispatcher.wake))
        if listener is not None:
            listener.start()
            self._cleanup.append(listener.stop)
        work = {
            "dispatcher": self.dispatcher.run,
            "renewer": self.renewer.run,
            "watch": self._watch,
        }
        for what, run in work.items():
            thread = threading.Thread(target=run, name=f"pgqrs-{what}", daemon=True)
            thread.start()
            self._threads.append(thread)
        state.events.heartbeat(worker)

    def _watch(self) -> None:
        # In a separate thread, as the caller of start() goes on with other work.
        while not self._closed.wait(min(0.5, self.state.shortest_lease / 6)):
            for connection in (self._dispatcher_connection, self._renewer_connection):
                connection.abort_if_stuck()
            self._check_executor()
            if unbegun := self.state.lease_table.unstarted(time.monotonic()):
                self._release_unstarted(unbegun)
            if self.fatal is not None:
                self._shut_down()

    def _check_executor(self) -> None:
        """Release messages and stop leasing while handlers cannot be called."""
        silent, shortest = self._executor.silent_for(), self.state.shortest_lease
        if silent > shortest and self._executor.is_dead and self._loop_lost is None:
            what = "is closed" if silent == math.inf else f"has not run for {silent:.1f} s"
            self._loop_lost = EventLoopLost(
                f"the event loop that calls the handlers {what}: the consumer ends, and gives back "
                f"what it holds (await consumer.stop() before the loop ends)"
            )
            log.error("%s", self._loop_lost, extra={"worker": self.state.context.worker})
        paused = silent > min(LOOP_SILENCE, shortest / 2)
        if paused != self._paused and not self._draining:
            self._pause(paused=paused)

    def _pause(self, *, paused: bool) -> None:
        """Pause or resume leasing; on a pause, release the messages that have not started."""
        with self._lock:
            self._paused = paused
        self.dispatcher.pause(paused=paused)
        if paused:
            log.warning(
                "the event loop is blocked, or does not run: nothing is leased until it answers",
                extra={"worker": self.state.context.worker},
            )
            self._release_unstarted()
        else:
            log.info("the event loop answers again", extra={"worker": self.state.context.worker})

    def _shut_down(self) -> None:
        """End a run that cannot continue, since its caller may not be waiting for it."""
        if self._closing.locked():
            return  # another thread does it
        if self._loop_lost is not None:
            self._executor.abandon(self.state.lease_table.all())  # in case the loop runs again
        self.drain()
        self.close(lambda: False)

    def _connect(self) -> ConsumerConnection:
        # A call that takes as long as the shortest lease would let all leases expire.
        return ConsumerConnection(
            self._executor.connector(),
            self._stop_waiting,
            deadline=max(2.0, min(self.state.shortest_lease / 3, 15.0)),
        )

    def _listener(self) -> Listener | None:
        """Return the listener for notifications, or None if they are off."""
        config = self.state.config
        if not config.notify:
            return None
        from ..wakeup import Listener  # noqa: PLC0415 - only who asked for it pays for it

        models, dsn = config.context().models, config.listen_dsn
        return Listener(self._executor.engine, self._wake, models=models, listen_dsn=dsn)

    # ----------------------------------------------------------------------------- working

    def _wake(self, queue: str | None) -> None:
        self.dispatcher.wake(queue)

    def accept(self, invocations: Sequence[Invocation]) -> None:
        """Start these invocations as soon as they may run."""
        with self._lock:
            # Messages leased while the consumer was stopping are released, except those that are
            # acknowledged already, which would be lost.
            stopped = self._draining or self._paused
            late, wanted = [], invocations
            if stopped:
                late = [item for item in invocations if item.handler.acknowledge != "first"]
                wanted = [item for item in invocations if item.handler.acknowledge == "first"]
            self._run_queue.add(wanted)
        self._release(late)
        if wanted:
            self._executor.submit(len(wanted))

    def _release_unstarted(self, ids: Collection[int] | None = None) -> None:
        """Release messages that have not started and are not acknowledged.

        Args:
            ids: The ids of the messages; None for all.
        """
        back: list[Invocation] = []
        rest: list[Invocation] = []
        with self._lock:
            for invocation in self._run_queue.clear():
                asked = ids is None or any(delivery.id in ids for delivery in invocation.deliveries)
                returns = asked and invocation.handler.acknowledge != "first"
                (back if returns else rest).append(invocation)
            self._run_queue.add(rest)
        self._release(back)

    def _release(self, unstarted: Sequence[Invocation]) -> None:
        for invocation in unstarted:
            releases = [Disposition(delivery, "release") for delivery in invocation.deliveries]
            self.dispatcher.finished(invocation, releases, quiet=False)

    def next_invocation(self) -> Invocation | None:
        """Return the next invocation to start, or None; it may wait for a lease first."""
        while (invocation := self.dispatcher.lead_or_claim(self._claim)) is not None:
            if self._mark_started(invocation):
                return invocation
        return None

    def next_ready_invocation(self) -> Invocation | None:
        """Return the next invocation to start, without leasing; None if none may start."""
        while (invocation := self._claim()) is not None:
            if self._mark_started(invocation):
                return invocation
        return None

    def _claim(self) -> Invocation | None:
        """Claim and return the next invocation that may start, or None."""
        with self._lock:
            invocation = self._run_queue.take()
            if invocation is not None:
                self._running[invocation.number] = invocation
        return invocation

    def _mark_started(self, invocation: Invocation) -> bool:
        """Record the start of a call and of its timeout; return False if its lease is lost."""
        if invocation.handler.acknowledge == "first" or self.state.lease_table.mark_started(
            invocation.deliveries, threading.get_ident()
        ):
            self.state.events.started(invocation)
            return True
        # Its lease expired while it waited in this process: its new holder does the work.
        self.finished(
            invocation, [Disposition(delivery, "release") for delivery in invocation.deliveries]
        )
        return False

    def finished(
        self, invocation: Invocation, dispositions: Sequence[Disposition], *, quiet: bool = False
    ) -> None:
        """Record how a call ended, and settle the messages that its own transaction has not.

        Args:
            invocation: The invocation.
            dispositions: How each of its messages is settled.
            quiet: The caller calls `next_invocation` next, so no other thread has to be woken.
        """
        self.state.lease_table.mark_settling(invocation.deliveries)
        left: list[Disposition] = []
        for disposition in dispositions:
            if disposition.outcome is None and disposition.action != "keep":
                left.append(disposition)
            else:
                self._report(invocation, disposition)
        self.dispatcher.finished(invocation, left, quiet=quiet)
        with self._lock:
            self._running.pop(invocation.number, None)
            self._run_queue.finished(invocation)
            if self._draining and not self._running:
                self._idle.notify_all()

    def _report(self, invocation: Invocation, disposition: Disposition) -> None:
        if disposition.outcome is not None:
            for held in self.state.lease_table.remove([disposition.delivery]):
                self.state.events.settled(
                    invocation.handler, disposition, disposition.outcome, held.started_at
                )
        elif invocation.handler.acknowledge == "manual":
            self.state.lease_table.hand_over([disposition.delivery])
        elif disposition.error is None:
            self.state.events.settled(invocation.handler, disposition, Outcome.ARCHIVED, None)
        else:
            log.warning(
                "message %d of %s failed after its acknowledgement: %s",
                disposition.delivery.id,
                disposition.delivery.queue,
                type(disposition.error).__name__,
                exc_info=disposition.error,
                extra={
                    "queue": disposition.delivery.queue,
                    "msg_id": disposition.delivery.id,
                    "attempt": disposition.delivery.read_ct,
                    "worker": self.state.events.worker,
                },
            )

    # ---------------------------------------------------------------------------- stopping

    @property
    def fatal(self) -> BaseException | None:
        """The error that ends the run, or None."""
        if self._loop_lost is not None:
            return self._loop_lost
        return None if self._unreachable else self.dispatcher.fatal or self.renewer.fatal

    @property
    def _unreachable(self) -> bool:
        """True when the last settlements failed: the leases then expire."""
        errors = [case for case in (self.dispatcher.fatal, self.renewer.fatal) if case is not None]
        return self._stop_waiting.is_set() and all(map(is_transient, errors))

    @property
    def stopping(self) -> bool:
        """True once it has stopped leasing."""
        return self._draining

    @property
    def over(self) -> bool:
        """True when it has drained, or failed."""
        ended = self.dispatcher.ended.is_set() or self.renewer.fatal is not None
        return ended or self._loop_lost is not None

    @property
    def closed(self) -> bool:
        """True when it has ended, by itself or by a stop."""
        return self._clean is not None

    @property
    def waiting(self) -> bool:
        """True when leased messages have not started."""
        return self._run_queue.waiting > 0

    @property
    def slots(self) -> int:
        """How many calls may run at the same time."""
        return self._run_queue.slots

    @property
    def busy(self) -> int:
        """The number of running calls."""
        return len(self._running)

    def drain(self) -> None:
        """Stop leasing, and release the messages that have not started."""
        if self._draining:
            return
        self._draining = True
        self.dispatcher.stop_leasing()
        self._release_unstarted()

    @property
    def idle(self) -> bool:
        """True when it no longer leases, and no call is running or waiting to start."""
        return self.dispatcher.stopped_leasing.is_set() and not (
            self._running or self._run_queue.waiting
        )

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no call is running; return False if some still are after ``seconds``."""
        end = time.monotonic() + seconds
        self.dispatcher.stopped_leasing.wait(max(0.0, seconds))
        with self._idle:
            return self._idle.wait_for(lambda: self.idle, max(0.0, end - time.monotonic()))

    @property
    def aborted(self) -> bool:
        """True once the run no longer waits for an unreachable database."""
        return self._stop_waiting.is_set()

    def abort(self) -> None:
        """Stop waiting for an unreachable database; a run that is starting then raises."""
        self._stop_waiting.set()

    def abort_start(self) -> None:
        """Abort the database call of a run that is starting."""
        if self._starting is not None:
            self._starting.abort()

    def close(self, hurried: Callable[[], bool]) -> bool:
        """Settle what is left, release unfinished leases uncharged, and end the threads.

        Args:
            hurried: Returns whether to stop waiting for an unreachable database.

        Returns:
            True if every call had ended.
        """
        with self._closing:
            if self._clean is None:
                self._clean = self._close(hurried)
        if threading.current_thread() is not self._threads[2]:
            self._threads[2].join()
        return self._clean

    def _close(self, hurried: Callable[[], bool]) -> bool:
        for cleanup in self._cleanup:
            cleanup()
        with self._lock:
            unfinished = list(self._running.values())
        for invocation in unfinished:
            held = self.state.lease_table.abandon(invocation.deliveries)
            self.dispatcher.settle(
                invocation.handler, [Disposition(delivery, "release") for delivery in held]
            )
        self.dispatcher.close()
        self._join(self._threads[0], lambda: self.dispatcher.unsettled > 0 and not hurried())
        self.renewer.close()
        self._join(self._threads[1], lambda: False)
        self._closed.set()
        return not (unfinished or self.dispatcher.unsettled)

    def _join(self, thread: threading.Thread, patient: Callable[[], bool]) -> None:
        began = time.monotonic()
        while thread.is_alive():
            thread.join(0.05)
            if time.monotonic() - began > (SETTLE_TIMEOUT if patient() else JOIN_TIMEOUT):
                break
        if thread.is_alive():
            self._stop_waiting.set()
            thread.join(JOIN_TIMEOUT)
        if thread.is_alive():
            for connection in (self._dispatcher_connection, self._renewer_connection):
                connection.abort()
            thread.join(JOIN_TIMEOUT)
        if thread.is_alive():
            log.warning("%s hangs: its leases run out by themselves", thread.name)

    def is_of(self, thread: threading.Thread) -> bool:
        """Return whether a thread belongs to this run, and so may be calling a hook."""
        return thread in self._threads

    @property
    def forked(self) -> bool:
        """True in a forked child of the process that started this run: its threads do not exist."""
        return os.getpid() != self._pid

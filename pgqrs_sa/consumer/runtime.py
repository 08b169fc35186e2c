"""One run of a consumer: its threads, from the first check to the last settlement.

The same for threads and for asyncio. What differs is the crew: how a call of a handler is begun,
and how one that is running is told to stop.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple, Protocol

from .._core import workers
from ..errors import EventLoopLost
from ..types import WorkerInfo
from ..wakeup import local
from .call_transactions import Calls
from .connection import Line, Plug
from .dispatcher import Desk
from .disposition import Verdict
from .events import Reporter
from .handlers import Handler, Unit
from .leases import Book, Held
from .options import Settings, check_database, refuse_autocommit
from .registration import register
from .renewer import Keeper
from .retrying import transient
from .scheduler import Ready, Schedule

__all__ = ["Crew", "GivenUp", "Outcome", "Runtime", "Waker"]

log = logging.getLogger("pgqrs_sa.consumer")

_LAST_WORDS = 5.0
"""Seconds that the last settlements may take once all handlers are done or given up."""

_UNANSWERED = 2.0
"""Seconds for which an event loop may be silent before nothing more is leased for it."""

_GOODBYE = 1.0
"""Seconds for what need not be said before a process ends, and for each way of ending a thread.

With the last words that makes 11 seconds at the most: docs/reference/consumers.md says so."""


class GivenUp(Exception):
    """A run was told to stop before it had begun."""


class Crew(Protocol):
    """Who calls the handlers."""

    def begin(self, count: int) -> None:
        """So much may be started: ask `Runtime.next_unit` until it returns None.

        Where that must not wait: `Runtime.next_ready`.
        """

    def wake(self) -> bool:
        """Have a thread that has nothing to do ask `Runtime.next_unit`; False if there is none."""
        ...

    def silent_for(self) -> float:
        """Return for how many seconds no call can have begun; infinity when none ever will."""
        ...

    @property
    def gone(self) -> bool:
        """Whether no call goes on either, while it is silent."""
        ...

    def abandon(self, held: Sequence[Held]) -> None:
        """Tell the handlers of these messages to stop, if they can be told."""

    def stack(self, held: Held) -> str | None:
        """Return where the handler of a message is just now, or None if that is not known."""
        ...


class Waker(Protocol):
    """What tells of notifications: see `pgqrs_sa.wakeup.listener`."""

    def start(self) -> None:
        """Begin to listen."""

    def stop(self) -> None:
        """Stop listening."""


class Outcome(NamedTuple):
    """How a run ended."""

    clean: bool = True
    failure: BaseException | None = None

    def code(self) -> int:
        """Return the exit code, or raise what has ended the run."""
        if self.failure is not None:
            raise self.failure
        return 0 if self.clean else 1


class Runtime:
    """One run: made, checked and started, then stopped, once.

    Args:
        settings: Of the consumer.
        handlers: Those that work.
        crew: Who calls them.
        plug: Makes a connection for one of the threads here.
        listener: Makes what calls back when a notification comes, or None.
        until_empty: End when nothing is left to lease.
        grace: Seconds that the crew needs for ending a call by itself when its time is over.
    """

    def __init__(
        self,
        settings: Settings,
        handlers: Sequence[Handler],
        crew: Crew,
        plug: Callable[[], Plug],
        *,
        listener: Callable[[Callable[[str | None], None]], Waker] | None,
        until_empty: bool,
        grace: float,
    ) -> None:
        self.settings = settings
        self._handlers = tuple(handlers)
        self._crew = crew
        self._plug = plug
        self._make_listener = listener
        self._until_empty = until_empty
        self._grace = grace
        self._pid = os.getpid()
        self._ready = Ready(settings.concurrency)
        self._running: dict[int, Unit] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._hurry = threading.Event()  # no more waiting for a database that is not there
        self._draining = False
        self._paused = False
        self._lost: EventLoopLost | None = None
        self._closing = threading.Lock()
        self._clean: bool | None = None
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._cleanup: list[Callable[[], None]] = []
        self.context = settings.context()
        self.book = Book()
        self.calls = Calls()
        self.reporter = Reporter(settings.hooks)
        self.worker: WorkerInfo | None = None
        self._shortest = min((h.lease.total_seconds() for h in handlers if h.lease), default=30.0)
        self._starting: Line | None = None
        # Added to the leases that the consumer asks for. A handler may lease from the same queue,
        # by the same worker and for as long, while the reply to such a lease is lost: by its exact
        # length `hand_back` then knows which was not the handler's.
        self._mark = timedelta(microseconds=random.randint(1, 999))  # noqa: S311 - no secret

    # ---------------------------------------------------------------------------- starting

    def check(self, *, create: bool = False) -> dict[str, timedelta]:
        """Look at the database; return the leases of the queues. Raises as `check_database`.

        Args:
            create: Create the declared queues that are missing.
        """
        line = self._starting = self._line()
        try:
            leases = line.once(
                self.context, check_database, self._handlers, self.settings.queues, create=create
            )
            if line.commits_by_itself:
                refuse_autocommit(self._handlers)
            return leases
        finally:
            line.close()

    def start(self) -> None:
        """Check, register, and begin to lease."""
        leases = self.check(create=True)
        self._shortest = min(one.total_seconds() for one in leases.values())
        waker = self._make_listener(self._nudge) if self._make_listener else None
        if self._hurry.is_set():  # told to stop meanwhile: there is nothing to undo yet
            raise GivenUp
        line = self._starting = self._line()
        try:
            worker = self._register(line)
            if self._hurry.is_set():  # told to stop meanwhile
                line.once(self.context, workers.set_status, worker.id, "stopped")
                raise GivenUp
        finally:
            line.close()
        schedule = Schedule(self.settings.concurrency, self.settings.poll_interval)
        schedule.work_on(self._handlers)
        self._desk_line, self._keeper_line = self._line(), self._line()
        self.keeper = Keeper(
            self._keeper_line,
            lambda: self.context,
            self.book,
            self.reporter,
            lambda: self._register(self._keeper_line),
            lambda held, verdict: self.desk.settle(held.handler, [verdict]),
            self._crew.abandon,
            self._crew.stack,
            queues=list(leases),
            heartbeat=self.settings.heartbeat,
            grace=self._grace,
            housekeeping=self.settings.housekeeping,
            silent_for=max(60.0, 6 * self.settings.heartbeat),
            longest_rest=min(1.0, self._shortest / 6),
        )
        self.desk = Desk(
            self._desk_line,
            lambda: self.context,
            self.book,
            schedule,
            {queue: lease + self._mark for queue, lease in leases.items()},
            self.reporter,
            self._begin,
            self.keeper.lose,
            self._crew.wake,
            self.calls.end,
            until_empty=self._until_empty,
            listening=self._make_listener is not None,
        )
        self._cleanup.append(local.subscribe(self.desk.nudge))
        if waker is not None:
            waker.start()
            self._cleanup.append(waker.stop)
        work = {"desk": self.desk.run, "keeper": self.keeper.run, "watch": self._keep_watch}
        for what, run in work.items():
            thread = threading.Thread(target=run, name=f"pgqrs-{what}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self.reporter.lives(worker)

    def _keep_watch(self) -> None:
        # In a thread of its own: who has started the consumer may do something else meanwhile.
        while not self._closed.wait(min(0.5, self._shortest / 6)):
            for line in (self._desk_line, self._keeper_line):
                line.watch()
            self._watch_crew()
            if unbegun := self.book.unbegun(time.monotonic()):
                self._return_waiting(unbegun)
            if self.fatal is not None:
                self._end_by_itself()

    def _watch_crew(self) -> None:
        """Hold no message for handlers that cannot be called."""
        silent = self._crew.silent_for()
        if silent > self._shortest and self._crew.gone and self._lost is None:
            what = "is closed" if silent == math.inf else f"has not run for {silent:.1f} s"
            self._lost = EventLoopLost(
                f"the event loop that calls the handlers {what}: the consumer ends, and gives back "
                f"what it holds (await consumer.stop() before the loop ends)"
            )
            log.error("%s", self._lost, extra={"worker": self.context.worker})
        paused = silent > min(_UNANSWERED, self._shortest / 2)
        if paused != self._paused and not self._draining:
            self._pause(paused=paused)

    def _pause(self, *, paused: bool) -> None:
        """Lease nothing while no handler can be called, and give back what is not begun."""
        with self._lock:
            self._paused = paused
        self.desk.pause(paused=paused)
        if paused:
            log.warning(
                "the event loop is blocked, or does not run: nothing is leased until it answers",
                extra={"worker": self.context.worker},
            )
            self._return_waiting()
        else:
            log.info("the event loop answers again", extra={"worker": self.context.worker})

    def _end_by_itself(self) -> None:
        """End a run that cannot go on, as whoever has started it may not wait for that."""
        if self._closing.locked():
            return  # somebody does that
        if self._lost is not None:
            self._crew.abandon(self.book.all())  # should the loop run again
        self.drain()
        self.close(lambda: False)

    def _line(self) -> Line:
        # A call that takes as long as a short lease would let all of them run out.
        return Line(self._plug(), self._hurry, deadline=max(2.0, min(self._shortest / 3, 15.0)))

    def _register(self, line: Line) -> WorkerInfo:
        """Register this start, or this consumer anew after it was taken for dead."""
        queues = [one.queue for one in self._handlers]
        name, version = self.settings.name, self.settings.version
        self.worker = register(line, self.context, name, queues, version)
        self.context = replace(self.context, worker=self.worker.id)
        self.reporter.worker = self.worker.id
        return self.worker

    # ----------------------------------------------------------------------------- working

    def _nudge(self, queue: str | None) -> None:
        self.desk.nudge(queue)

    def _begin(self, units: Sequence[Unit]) -> None:
        with self._lock:
            # What was leased while the consumer was told to stop goes back; what is acknowledged
            # already would be lost with that.
            stopped = self._draining or self._paused
            late = [one for one in units if stopped and one.handler.acknowledge != "first"]
            wanted = [one for one in units if one not in late] if late else units
            self._ready.add(wanted)
        self._give_back(late)
        if wanted:
            self._crew.begin(len(wanted))

    def _return_waiting(self, ids: Collection[int] | None = None) -> None:
        """Give back what has not been started, unless it is acknowledged already.

        Args:
            ids: Of the messages; None for all.
        """
        back: list[Unit] = []
        rest: list[Unit] = []
        with self._lock:
            for unit in self._ready.clear():
                asked = ids is None or any(one.id in ids for one in unit.deliveries)
                returns = asked and unit.handler.acknowledge != "first"
                (back if returns else rest).append(unit)
            self._ready.add(rest)
        self._give_back(back)

    def _give_back(self, unstarted: Sequence[Unit]) -> None:
        for unit in unstarted:
            releases = [Verdict(one, "release") for one in unit.deliveries]
            self.desk.finished(unit, releases, quietly=False)

    def next_unit(self) -> Unit | None:
        """Return what may be started now, for a caller that can wait: it may lease that first."""
        while (unit := self.desk.help(self._claimed)) is not None:
            if self._begun(unit):
                return unit
        return None

    def next_ready(self) -> Unit | None:
        """Return what may be started now, if it has been leased already."""
        while (unit := self._claimed()) is not None:
            if self._begun(unit):
                return unit
        return None

    def _claimed(self) -> Unit | None:
        """Return what may be started, which is then the caller's."""
        with self._lock:
            unit = self._ready.take()
            if unit is not None:
                self._running[unit.number] = unit
        return unit

    def _begun(self, unit: Unit) -> bool:
        """Note that a call begins, and its timeout; False if its lease is not held any more."""
        if unit.handler.acknowledge == "first" or self.book.start(
            unit.deliveries, threading.get_ident()
        ):
            self.reporter.started(unit)
            return True
        # Waited for too long in this process: whoever has it now does the work.
        self.finished(unit, [Verdict(one, "release") for one in unit.deliveries])
        return False

    def finished(self, unit: Unit, verdicts: Sequence[Verdict], *, quietly: bool = False) -> None:
        """Note how a call ended, and settle what its own transaction has not.

        Args:
            unit: What it worked on.
            verdicts: What becomes of each message.
            quietly: The caller asks for `next_unit` now, so that nobody has to be woken.
        """
        self.book.settling(unit.deliveries)
        for one in verdicts:
            if one.settled or one.kind == "keep":
                self._report(unit, one)
        left = [v for v in verdicts if not (v.settled or v.kind == "keep")]
        self.desk.finished(unit, left, quietly=quietly)
        with self._lock:
            self._running.pop(unit.number, None)
            self._ready.finished(unit)
            if self._draining and not self._running:
                self._idle.notify_all()

    def _report(self, unit: Unit, verdict: Verdict) -> None:
        if verdict.settled:
            for held in self.book.remove([verdict.delivery]):
                self.reporter.settled(unit.handler, verdict, verdict.word, held.started_at)
        elif unit.handler.acknowledge == "manual":
            self.book.leave([verdict.delivery])
        elif verdict.error is None:
            self.reporter.settled(unit.handler, verdict, "archived", None)
        else:
            log.warning(
                "message %d of %s failed after its acknowledgement: %s",
                verdict.delivery.id,
                verdict.delivery.queue,
                type(verdict.error).__name__,
                exc_info=verdict.error,
                extra={
                    "queue": verdict.delivery.queue,
                    "msg_id": verdict.delivery.id,
                    "attempt": verdict.delivery.read_ct,
                    "worker": self.reporter.worker,
                },
            )

    # ---------------------------------------------------------------------------- stopping

    @property
    def fatal(self) -> BaseException | None:
        """An error that ends the run, if there is one."""
        if self._lost is not None:
            return self._lost
        return None if self._unreachable else self.desk.fatal or self.keeper.fatal

    @property
    def _unreachable(self) -> bool:
        """True when the last words could not be said: the leases run out by themselves."""
        errors = [one for one in (self.desk.fatal, self.keeper.fatal) if one is not None]
        return self._hurry.is_set() and all(map(transient, errors))

    @property
    def stopping(self) -> bool:
        """True once it leases no more."""
        return self._draining

    @property
    def over(self) -> bool:
        """True when there is nothing left to wait for: drained, or broken."""
        ended = self.desk.ended.is_set() or self.keeper.fatal is not None
        return ended or self._lost is not None

    @property
    def closed(self) -> bool:
        """True when it has ended, by itself or because it was stopped."""
        return self._clean is not None

    @property
    def waiting(self) -> bool:
        """True when something is leased that has not been started."""
        return self._ready.waiting > 0

    @property
    def busy(self) -> int:
        """How many calls are running."""
        return len(self._running)

    def drain(self) -> None:
        """Lease no more, and give back what has not been started."""
        if self._draining:
            return
        self._draining = True
        self.desk.stop_leasing()
        self._return_waiting()

    @property
    def idle(self) -> bool:
        """True when nothing runs, and nothing will, once it drains."""
        return self.desk.resting.is_set() and not (self._running or self._ready.waiting)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no call is running; False when some are, after so many seconds."""
        end = time.monotonic() + seconds
        self.desk.resting.wait(max(0.0, seconds))
        with self._idle:
            return self._idle.wait_for(lambda: self.idle, max(0.0, end - time.monotonic()))

    @property
    def given_up(self) -> bool:
        """True once no database is waited for any more."""
        return self._hurry.is_set()

    def give_up(self) -> None:
        """Wait for no database any more: of a run that starts, which then raises."""
        self._hurry.set()

    def cut_start(self) -> None:
        """End a call of a run that starts, because the database does not answer."""
        if self._starting is not None:
            self._starting.cut()

    def close(self, hurried: Callable[[], bool]) -> bool:
        """Settle what is left, hand unfinished leases back uncharged, and end the threads.

        Args:
            hurried: Asks whether there is no more time to wait for a database that is away.

        Returns:
            True when every call had ended.
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
        for unit in unfinished:
            held = self.book.give_up(unit.deliveries)
            self.desk.settle(unit.handler, [Verdict(delivery, "release") for delivery in held])
        self.desk.close()
        self._join(self._threads[0], lambda: self.desk.left > 0 and not hurried())
        self.keeper.close()
        self._join(self._threads[1], lambda: False)
        self._closed.set()
        return not (unfinished or self.desk.left)

    def _join(self, thread: threading.Thread, patient: Callable[[], bool]) -> None:
        began = time.monotonic()
        while thread.is_alive():
            thread.join(0.05)
            if time.monotonic() - began > (_LAST_WORDS if patient() else _GOODBYE):
                break
        if thread.is_alive():
            self._hurry.set()
            thread.join(_GOODBYE)
        if thread.is_alive():
            for line in (self._desk_line, self._keeper_line):
                line.cut()
            thread.join(_GOODBYE)
        if thread.is_alive():
            log.warning("%s hangs: its leases run out by themselves", thread.name)

    def is_of(self, thread: threading.Thread) -> bool:
        """Return whether a thread is one of this run's own, in which hooks are called."""
        return thread in self._threads

    @property
    def forked(self) -> bool:
        """True in a child of the process that started this run: nothing of it is alive here."""
        return os.getpid() != self._pid

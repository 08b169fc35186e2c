"""Leader/followers: one thread at a time talks to the database; no other is woken without need.

The dispatcher has a thread of its own, but a handler's thread that has nothing to do takes the
lead itself, and goes on with what it has leased there: to wake another one, and be woken by it,
takes as long as the statement does. (Leaders and followers: Schmidt and others, Pattern-Oriented
Software Architecture 2, 2000.) The dispatcher's own thread does what is left: what comes while all
handlers are busy, and the waiting when there is nothing to do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .handlers import Invocation
from .state import Executor

__all__ = ["LINGER", "REPLY_LINGER", "LeaderFollower", "Rounds"]

LINGER = 0.005
"""Seconds for which what is done waits for the next lease, to share its commit."""

REPLY_LINGER = 0.05
"""Seconds after which a reply is read that no handler's thread has come for.

Handlers were quick when the statement was sent. The dispatcher's own thread, when it came after
5 ms, was in their way: 15,200 messages a second instead of 22,000, and 35 us of the client's CPU
for each instead of 26 (on a busy machine).
"""

_CLAIM_INTERVAL = 0.1  # seconds between two claims of a thread that waits to lead


class Rounds(Protocol):
    """The work that is done in rounds."""

    @property
    def in_flight_since(self) -> float | None:
        """When a statement was sent whose reply the next round reads first, or None."""
        ...

    def run_round(self, *, by_handler: bool) -> float:
        """Run and remove the leader's tasks, then do one thing, if there is one.

        Args:
            by_handler: A handler's thread leads. It may leave a statement in flight, and call
                handlers meanwhile.

        Returns:
            For how many seconds there is nothing to do then, or 0.0 to be called again.
        """
        ...

    def idle_time(self) -> float:
        """Return for how many seconds there is nothing to do, and do nothing."""
        ...

    def fail(self, error: BaseException) -> None:
        """Note the error of a round, which was the last one."""


class LeaderFollower:
    """One thread at a time does rounds; the others submit tasks for the next.

    Args:
        work: The rounds.
        executor: Its idle threads are woken.
        stop_waiting: Set when handler threads must stop waiting to lead.

    Attributes:
        tasks: What was submitted. Each round runs and removes them first.
    """

    def __init__(
        self,
        work: Rounds,
        executor: Executor,
        stop_waiting: threading.Event,
    ) -> None:
        self._work = work
        self._executor = executor
        self._stop_waiting = stop_waiting
        self._leading = threading.Lock()
        self.tasks: deque[Callable[[], None]] = deque()
        self._oldest_task_at = 0.0  # when the first of the tasks was submitted
        self._has_tasks = threading.Event()  # there is a task
        self._woken = threading.Event()  # only the dispatcher's own thread will run it
        self._asleep_until = 0.0
        self._stopped = False

    # ------------------------------------------------------------------- from any thread

    def submit(self, task: Callable[[], None], *, quiet: bool = False) -> None:
        """Run a task in the next round, in the thread that leads then.

        Args:
            task: The task; it must be quick.
            quiet: Wake nobody, since the caller goes on to `try_lead`.
        """
        if not self.tasks:
            self._oldest_task_at = time.monotonic()
        self.tasks.append(task)
        if not quiet:
            self.wake()

    def submit_later(self, task: Callable[[], None]) -> None:
        """Run a task in the next round, which begins within `LINGER`."""
        self.submit(task, quiet=True)
        if not self._has_tasks.is_set():
            self._has_tasks.set()

    def submit_now(self, task: Callable[[], None]) -> None:
        """Run a task at once, in an idle thread that can go on with what it leases."""
        self.submit(task, quiet=True)
        if not self._executor.wake():
            self.wake()

    def wake(self) -> None:
        """Make the dispatcher's own thread do a round at once."""
        if not self._woken.is_set():  # else it is still to be cleared, before the tasks run
            self._woken.set()
            self._has_tasks.set()

    def try_lead(self, claim: Callable[[], Invocation | None]) -> Invocation | None:
        """Return what a handler's thread may start, after a round of its own if need be.

        Args:
            claim: Returns what may be started, if there is something; without delay.
        """
        invocation = claim() or self._lead(claim)
        # What is left here comes next when the thread is back: see to it if that takes long.
        if not self._has_tasks.is_set() and (self.tasks or self._work.in_flight_since is not None):
            self._has_tasks.set()
        return invocation

    def _lead(self, claim: Callable[[], Invocation | None]) -> Invocation | None:
        while not self._leading.acquire(timeout=_CLAIM_INTERVAL):
            # The leader may be waiting for the database, and may have leased before that.
            if (invocation := claim()) is not None or self._stop_waiting.is_set():
                return invocation
        try:
            if self._stopped:
                return None
            if (invocation := claim()) is not None:
                return invocation
            return self._lead_rounds(claim)
        finally:
            self._leading.release()

    def _lead_rounds(self, claim: Callable[[], Invocation | None]) -> Invocation | None:
        """Do rounds until something may be started, or nothing can be leased."""
        while True:
            rest = self._run_round(by_handler=True)
            invocation = claim()
            if self._work.in_flight_since is not None and not self._stopped:
                if invocation is None:
                    continue  # with nothing to do meanwhile, wait for the reply
                return invocation
            rest = rest or self._work.idle_time()
            if self._stopped or time.monotonic() + rest < self._asleep_until:
                self.wake()
            return invocation

    # ------------------------------------------------------------ from the dispatcher's own thread

    def run(self) -> None:
        """Do rounds until it is over: those that no thread of a handler comes for."""
        while True:
            with self._leading:
                if self._stopped:
                    return
                # Only here: the event is for this thread, even if another one leads before it.
                self._woken.clear()
                rest = self._run_round(by_handler=False)
                self._asleep_until = time.monotonic() + rest
            if not self._stopped:
                self._sleep()

    def _sleep(self) -> None:
        """Wait until there is something to do that no handler's thread comes for.

        Those that are quick come back soon, and lease then as well: to be in their way, for the
        interpreter or the lead, would cost more than it helps (measured: up to half of the rate).
        """
        while True:
            self._has_tasks.clear()  # before the looks: what comes after them sets it again
            now = time.monotonic()
            sent_at = self._work.in_flight_since
            # With a statement in flight, the first thing to do would be to wait for its reply.
            if self._woken.is_set() or (sent_at is None and now >= self._asleep_until):
                return
            if sent_at is not None:
                due_at = sent_at + REPLY_LINGER
            elif self.tasks:
                due_at = self._oldest_task_at + LINGER
            else:
                self._has_tasks.wait(self._asleep_until - now)
                continue
            if (spare := due_at - now) > 0:
                self._woken.wait(spare)
            else:
                return

    # ------------------------------------------------------------------------ in a round

    def stop(self) -> None:
        """Let this round be the last."""
        self._stopped = True

    def _run_round(self, *, by_handler: bool) -> float:
        try:
            return self._work.run_round(by_handler=by_handler)
        except BaseException as error:  # noqa: BLE001 - it is kept
            self._stopped = True
            self._work.fail(error)
            return 0.0

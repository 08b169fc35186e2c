"""Where messages are leased and settled, on one connection: in the thread that has the seat.

Handlers end at any time; here all that is over is settled together with the next lease, in one
statement where that is an archive: one round trip and one commit, however many they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from .._core import settlements
from .._core.context import Context
from .._core.lease import explain_nothing
from ..errors import QueueNotFound
from ..types import Delivery
from ..wakeup import notify
from . import store
from .connection import Line
from .disposition import Verdict
from .events import Reporter
from .handlers import Handler, Unit
from .leader import LINGER, Seat
from .leases import Book, Held
from .retrying import transient
from .scheduler import Look, Schedule, Take, units

__all__ = ["Desk"]

log = logging.getLogger("pgqrs_sa.consumer")

_BUSY_AGAIN = 0.2  # seconds until a row that was locked is tried again
_EXPLAIN_EVERY = 1.0  # seconds between two rounds of making dead letters in a queue
_LONGEST_DELAY = 1.0  # seconds until a settlement that could not be carried out is looked at again
_LONGEST_REST = 60.0  # seconds
_IDLE_AFTER = 0.05  # seconds without a message, after which notifications are asked for


@dataclass(slots=True)
class _Waiting:
    """A verdict that could not be carried out yet, and when it is tried again."""

    verdict: Verdict
    handler: Handler
    not_before: float = 0.0
    alone_at: float = 0.0  # from when it is settled even if nothing is leased
    busy: bool = False  # whether its row was locked


class Desk:
    """Leases for the handlers, and settles what they decided.

    Args:
        line: Its connection.
        context: Returns the context, whose worker changes when it had to register again.
        book: The leases held.
        schedule: What to lease, used by this thread alone.
        leases: How long a lease of each queue lasts.
        reporter: Hears of what was settled.
        begin: Takes in what was leased.
        lost: Hears of leases that are gone.
        wake: Has a thread of a handler that has nothing to do come for `help`; False if none can.
        end_call: Ends the connection of a message's call that goes on, if it keeps that locked.
        until_empty: Stop when nothing is left.
        listening: Ask producers for notifications when idle.
    """

    def __init__(
        self,
        line: Line,
        context: Callable[[], Context],
        book: Book,
        schedule: Schedule,
        leases: dict[str, timedelta],
        reporter: Reporter,
        begin: Callable[[Sequence[Unit]], None],
        lost: Callable[[Sequence[Held]], None],
        wake: Callable[[], bool],
        end_call: Callable[[Delivery], None],
        *,
        until_empty: bool,
        listening: bool,
    ) -> None:
        self._line = line
        self._context = context
        self._book = book
        self._schedule = schedule
        self._leases = leases
        self._reporter = reporter
        self._begin = begin
        self._lost = lost
        self._end_call = end_call
        self._until_empty = until_empty
        self._listening = listening
        self._verdicts: dict[int, _Waiting] = {}
        self._mode: Literal["leasing", "draining", "closing"] = "leasing"
        self._paused = False
        self._leaving = threading.Event()  # no lease is worth waiting for any more
        self._seat = Seat(self._round, self._rest, self._break, wake, self._leaving)
        self._explained_at: dict[str, float] = {}
        self._waiting_until = 0.0
        self._asked: tuple[str, timedelta, float] | None = None  # a lease that is on its way
        self._unanswered: list[store.Unanswered] = []
        self.resting = threading.Event()
        self.ended = threading.Event()
        self.empty = False
        self.fatal: BaseException | None = None
        line.on_trouble = self._trouble

    # ------------------------------------------------------------ called from other threads

    def finished(self, unit: Unit, verdicts: Sequence[Verdict], *, quietly: bool) -> None:
        """A call has ended; what is not settled yet is settled here.

        Args:
            unit: What it worked on.
            verdicts: What becomes of each message.
            quietly: Wake nobody; the caller goes on to `help`.
        """
        now = time.monotonic()

        def note() -> None:
            self._schedule.finished(unit.handler.queue, len(unit.deliveries))
            self._add(unit.handler, verdicts, now)

        self._seat.leave(note, quietly=quietly)

    def help(self, look: Callable[[], Unit | None]) -> Unit | None:
        """Return what a handler's thread may start, after leasing that in it if need be.

        Args:
            look: Returns what may be started, if there is something; without delay.
        """
        return self._seat.help(look)

    def settle(self, handler: Handler, verdicts: Sequence[Verdict]) -> None:
        """Settle deliveries whose call goes on: it took too long, or all stops."""
        now = time.monotonic()
        self._seat.leave(lambda: self._add(handler, verdicts, now))

    def nudge(self, queue: str | None) -> None:
        """There may be something in a queue (or in any)."""
        self._seat.call(lambda: self._schedule.nudge(queue))

    def pause(self, *, paused: bool) -> None:
        """Lease nothing while paused; go on settling."""
        self._paused = paused
        self._seat.alarm()

    def stop_leasing(self) -> None:
        """Lease no more; go on settling."""
        self._mode = "draining" if self._mode == "leasing" else self._mode
        self._leaving.set()
        self._seat.alarm()

    def close(self) -> None:
        """End when everything is settled."""
        self._mode = "closing"
        self._seat.alarm()

    def _trouble(self) -> None:
        """A call has failed: if it was to lease, it may have done so."""
        worker = self._context().worker
        if self._asked is not None and worker is not None:
            queue, lease, since = self._asked
            now = time.monotonic()
            self._unanswered.append(store.Unanswered(worker, queue, lease, since, now))
            self._asked = (queue, lease, now)  # from when it is tried again

    # ---------------------------------------------------------------------- its own thread

    def run(self) -> None:
        """Work until closed; an error that does not pass is kept in ``fatal``."""
        self._seat.occupy()
        self._line.close()
        self.resting.set()
        self.ended.set()

    def _break(self, error: BaseException) -> None:
        self.fatal = error  # whoever runs the consumer raises it; if nobody waits, it is here
        self._line.lament(error, self._context().worker)

    # ------------------------------------------------------------------------ in the seat

    def _round(self) -> float:
        """Do one thing, if there is one; return for how many seconds there is nothing to do."""
        mode = self._mode  # before the notes: what they say when it closes counts
        self._seat.read()
        if mode != "leasing":
            self.resting.set()
        if mode == "closing" and not (self._verdicts or self._unanswered):
            self._seat.end()
            return 0.0
        rest = self._step_on()
        if mode == "closing" and self._line.hurried:
            self._seat.end()
        return rest

    @property
    def left(self) -> int:
        """How many messages are not settled; at the end, their leases run out."""
        return len(self._verdicts) + len(self._seat)

    def _step_on(self) -> float:
        try:
            return self._step()
        except Exception as error:
            # Told to stop while the database was away: it is no use to wait for a lease then.
            if self._line.hurried or not (self._leaving.is_set() and transient(error)):
                raise
            return 0.0

    @property
    def _leases_now(self) -> bool:
        return self._mode == "leasing" and not self._paused

    def _step(self) -> float:
        now = time.monotonic()
        due = [one for one in self._verdicts.values() if one.not_before <= now]
        if self._leases_now:
            if self._needs_no_notifications(now):
                self._waiting(None)
                return 0.0
            step = self._schedule.next(now)
            if isinstance(step, Look):
                self._look(step.queues)
                step = self._schedule.next(now)
            if isinstance(step, Take):
                self._turn(step, due)
                return 0.0
            if self._until_empty and self._schedule.drained and not self._verdicts:
                self._drained(now)
                return 0.0
        if self._is_ripe(due, now):
            self._settle(due)
        elif self._unanswered:
            self._hand_back(self._line.stopping)
        elif not self._ask_for_notifications(now):
            return self._rest()
        return 0.0

    def _rest(self) -> float:
        """For how many seconds there is nothing to do, unless there are news."""
        now = time.monotonic()
        moments = [max(one.not_before, one.alone_at) for one in self._verdicts.values()]
        rest = _LONGEST_DELAY if moments else _LONGEST_REST
        if self._leases_now:
            rest = 0.0 if self._needs_no_notifications(now) else self._schedule.rest(now)
        return max(0.0, min(rest, *(one - now for one in moments))) if moments else rest

    def _drained(self, now: float) -> None:
        """End, as there is nothing left, unless somebody had it locked just then."""
        queues = self._schedule.queues
        if self._line.call("a look", self._context(), store.look, queues).ready:
            self._schedule.look_again(now)
            return
        self.empty = True
        self._mode = "draining"
        self.ended.set()

    def _is_ripe(self, due: Sequence[_Waiting], now: float) -> bool:
        """Whether to settle now, without a lease to share the commit with."""
        if self._leases_now and self._schedule.in_hand:
            return any(one.alone_at <= now for one in due)
        return bool(due)

    def _turn(self, take: Take, due: Sequence[_Waiting]) -> None:
        """Acknowledge what is done, and lease."""
        done: list[_Waiting] = []
        others: list[_Waiting] = []
        for one in due:
            (done if self._may_join(one.verdict) else others).append(one)
        if others:
            self._settle(others)
        handler = take.handler
        lease = self._leases[handler.queue]
        asked_at = time.monotonic()
        self._asked = (handler.queue, lease, asked_at)
        try:
            turn = self._line.call_until(
                self._leaving,
                "a lease",
                self._context(),
                store.turn,
                [one.verdict.delivery for one in done],
                handler.queue,
                take.limit,
                lease,
                handler.retry.max_attempts,
            )
        finally:
            self._asked = None
        if replaced := self._book.replaced(turn.leased):
            self._lost(replaced)
        leased = self._book.enter(handler, turn.leased, lease, asked_at)
        self._schedule.took(handler.queue, take.limit, len(leased), time.monotonic())
        if done:
            self._settled(done, dict.fromkeys(turn.settled, "archived"))
        if turn.undecodable:
            self._report_undecodable(handler, turn.undecodable)
        if leased:
            self._start(handler, leased)
        if self._unanswered:
            self._hand_back(self._leaving)

    def _report_undecodable(self, handler: Handler, dead: Sequence[Delivery]) -> None:
        for delivery in dead:
            verdict = Verdict(delivery, "dead", reason="cannot be decoded", error=delivery.decoded)
            self._reporter.settled(handler, verdict, "dead", None)
        self._schedule.nudge(handler.queue)  # they took the places of others: lease again at once

    def _hand_back(self, stopping: threading.Event) -> None:
        """Give back leases whose reply was lost."""
        turns, known = list(self._unanswered), self._book.tokens()
        self._line.call_until(
            stopping, "a look for strays", self._context(), store.hand_back, turns, known
        )
        self._unanswered.clear()

    def _may_join(self, verdict: Verdict) -> bool:
        """Whether it can be archived by the statement that leases.

        A lease that may have run out could be taken again by that very statement.
        """
        held = self._book.get(verdict.delivery)
        return verdict.kind == "archive" and held is not None and not held.is_lost()

    def _start(self, handler: Handler, leased: list[Delivery]) -> None:
        if handler.acknowledge == "first":
            leased = self._acknowledged(handler, leased)
        self._begin(units(handler, leased))

    def _acknowledged(self, handler: Handler, leased: list[Delivery]) -> list[Delivery]:
        """Archive before the handler is called; return what could be archived."""
        verdicts = [Verdict(one, "archive") for one in leased]
        done: set[int] = {*self._apply(verdicts, self._line.stopping)}
        lost = [one for one in leased if one.id not in done]
        if lost:
            known = self._line.call("a look", self._context(), store.fates, lost)
            done |= {one for one, fate in known.items() if fate == "archived"}
            lost = [one for one in lost if one.id not in done]
        self._book.remove(leased)
        self._schedule.finished(handler.queue, len(lost))
        return [one for one in leased if one.id in done]

    def _look(self, queues: Sequence[str]) -> None:
        """Ask which of the queues that had nothing have something now, in one statement."""
        asked_at = time.monotonic()
        found = self._line.call_until(self._leaving, "a look", self._context(), store.look, queues)
        self._schedule.looked(queues, found.ready, asked_at)
        for queue in sorted(found.missing | found.exhausted):
            self._explain(queue, asked_at)

    def _explain(self, queue: str, now: float) -> None:
        """Make dead letters of exhausted messages, and drop a queue that is gone."""
        if now - self._explained_at.get(queue, 0.0) < _EXPLAIN_EVERY:
            return
        self._explained_at[queue] = now
        try:
            self._line.call_until(
                self._leaving, "a look", self._context(), explain_nothing, queue, None
            )
        except QueueNotFound as gone:
            log.error("%s", gone, extra={"queue": queue, "worker": self._context().worker})  # noqa: TRY400
            self._schedule.drop(queue)
            if not self._schedule.queues:
                raise

    def _ask_for_notifications(self, now: float) -> bool:
        """Say that we wait, once idle; True when that is news, and one more look is due."""
        if not (self._listening and self._leases_now) or now < self._waiting_until:
            return False
        if self._schedule.idle_for(now) < _IDLE_AFTER:
            return False
        span = timedelta(seconds=max(10.0, 4 * self._schedule.poll_interval))
        self._waiting(span)
        self._waiting_until = now + span.total_seconds() / 2
        # What was enqueued before this was known has sent no notification.
        self._schedule.nudge(None)
        return True

    def _needs_no_notifications(self, now: float) -> bool:
        """Whether producers send them for nothing, as there is work again.

        That is said in a round of its own, after the handlers have begun.
        """
        return bool(self._waiting_until) and not self._schedule.idle_for(now)

    def _waiting(self, span: timedelta | None) -> None:
        context = self._context()
        self._waiting_until = 0.0
        if context.worker is not None:
            self._line.call_until(
                self._leaving, "a note", context, notify.set_waiting, context.worker, span
            )

    # --------------------------------------------------------------------------- settling

    def _add(self, handler: Handler, verdicts: Sequence[Verdict], since: float) -> None:
        """Take in verdicts, one for each message, which were reached then.

        One that took too long is settled before its handler returns; and a message may be leased
        here again while the handler of an attempt that was lost goes on. The newest attempt
        counts, and what was decided about it first.
        """
        # With a store ahead, the others of it are soon done as well.
        alone_at = since + LINGER if handler.prefetch else 0.0
        for one in verdicts:
            known = self._verdicts.get(one.delivery.id)
            token = one.delivery.fencing_token
            if known is None or known.verdict.delivery.fencing_token < token:
                self._verdicts[one.delivery.id] = _Waiting(one, handler, alone_at=alone_at)

    def _apply(self, verdicts: Sequence[Verdict], until: threading.Event) -> dict[int, str]:
        return self._line.call_until(
            until, "a settlement", self._context(), settlements.apply, verdicts, strict=False
        )

    def _settle(self, due: Sequence[_Waiting]) -> None:
        # Whoever stops waits for this thread to rest, as a lease may be on its way. If it waited
        # for a database that is away, the end would take as long as running handlers may.
        until = self._line.stopping if self.resting.is_set() else self._leaving
        self._settled(due, self._apply([one.verdict for one in due], until))

    def _settled(self, tried: Sequence[_Waiting], outcome: Mapping[int, str]) -> None:
        """Take note of what was settled, and of what became of the rest."""
        missing = [one for one in tried if one.verdict.delivery.id not in outcome]
        if missing:
            outcome = {**outcome, **self._looked_up(missing)}
        told: list[_Waiting] = []
        for one in tried:
            id_ = one.verdict.delivery.id
            word = outcome[id_]
            if word == "busy":
                self._wait_for_lock(one)
                continue
            self._verdicts.pop(id_, None)
            if word == "lost":
                self._lose(one)
            else:
                told.append(one)
        self._report(told, outcome)

    def _wait_for_lock(self, waiting: _Waiting) -> None:
        """Try again soon; not for ever, if it is the message's own call that keeps it locked.

        Such a call took too long, or was given up. Its COMMIT may be on its way: hence not at once.
        """
        waiting.not_before = time.monotonic() + _BUSY_AGAIN
        if waiting.busy:
            self._end_call(waiting.verdict.delivery)
        waiting.busy = True

    def _looked_up(self, missing: Sequence[_Waiting]) -> Mapping[int, str]:
        deliveries = [one.verdict.delivery for one in missing]
        return self._line.call("a look", self._context(), store.fates, deliveries)

    def _report(self, settled: Sequence[_Waiting], words: Mapping[int, str]) -> None:
        known = self._book.remove([one.verdict.delivery for one in settled])
        by_id = {one.delivery.id: one for one in known}
        for one in settled:
            if (held := by_id.get(one.verdict.delivery.id)) is not None:
                held.lost = True  # if it took too long, its handler is running still, and may ask
                word = words[one.verdict.delivery.id]
                self._reporter.settled(one.handler, one.verdict, word, held.started_at)

    def _lose(self, one: _Waiting) -> None:
        held = self._book.lose([one.verdict.delivery])
        if not held:
            return  # it was told already: the keeper saw it first, or the handler took too long
        self._reporter.ended(
            "on_lease_lost",
            "lease lost",
            one.handler,
            one.verdict.delivery,
            held[0].started_at,
            error=one.verdict.error,
        )

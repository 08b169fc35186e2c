"""The dispatcher leases and settles messages, on one connection, in the thread that leads.

Handlers end at any time; here all that is over is settled together with the next lease, in one
statement where that is an archive: one round trip and one commit, however many they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

from .._core import wakeup
from .._core.lease import explain_nothing
from ..errors import QueueNotFound
from ..types import Delivery, Outcome
from . import store
from .connection import ConsumerConnection, Sent
from .disposition import Disposition
from .handlers import Handler, Invocation, invocations
from .leader import LINGER, LeaderFollower
from .retrying import is_transient, sqlstate
from .scheduler import CheckQueues, Fetch, Scheduler
from .state import ConsumerState

__all__ = ["Acceptor", "Dispatcher"]

log = logging.getLogger("pgqrs_sa.consumer")

_LOCK_RETRY = 0.2  # seconds until a row that was locked is tried again
_LOOK = 1_000
"""At how many visible messages of each priority a queue is searched for exhausted ones."""
_EXPLAIN_INTERVAL = 1.0  # seconds between two rounds of making dead letters in a queue
_MAX_RETRY_DELAY = 1.0  # seconds until a settlement that failed is tried again
_MAX_IDLE = 60.0  # seconds
_IDLE_AFTER = 0.05  # seconds without a message, after which notifications are asked for


@dataclass(slots=True)
class _PendingSettlement:
    """A disposition that could not be carried out yet, and when it is tried again."""

    disposition: Disposition
    handler: Handler
    not_before: float = 0.0
    settle_by: float = 0.0  # from when it is settled even if nothing is leased
    busy: bool = False  # whether its row was locked


@dataclass(slots=True)
class _LeaseRequest:
    """What a statement leases and archives, from its sending to its reply.

    Attributes:
        handler: Whose messages it leases.
        limit: How many at most.
        lease: For how long.
        done: What it archives.
        asked_at: The monotonic clock before it was sent.
        since: The monotonic clock before the present attempt, when it is repeated.
    """

    handler: Handler
    limit: int
    lease: timedelta
    done: list[_PendingSettlement]
    asked_at: float
    since: float

    def arguments(self) -> tuple[list[Delivery], str, int, timedelta, int | None]:
        """Return the arguments of `store.SettleAndLease`."""
        deliveries = [pending.disposition.delivery for pending in self.done]
        attempts = self.handler.retry.max_attempts
        return deliveries, self.handler.queue, self.limit, self.lease, attempts


class Acceptor(Protocol):
    """Takes in what was leased."""

    @property
    def waiting(self) -> bool:
        """True when something is leased that has not been started."""
        ...

    def accept(self, invocations: Sequence[Invocation]) -> None:
        """Start these invocations as soon as they may run."""


class Dispatcher:
    """Leases for the handlers, and settles what they decided.

    Args:
        connection: Its connection.
        state: Of the run.
        scheduler: What to lease; only the thread that leads uses it.
        runtime: Starts what was leased.

    Attributes:
        lead_or_claim: Returns what a handler's thread may start, after leasing that in it if need
            be: see `LeaderFollower.try_lead`.
    """

    def __init__(
        self,
        connection: ConsumerConnection,
        state: ConsumerState,
        scheduler: Scheduler,
        runtime: Acceptor,
    ) -> None:
        self._connection = connection
        self._state = state
        self._lease_table = state.lease_table
        self._events = state.events
        self._scheduler = scheduler
        self._runtime = runtime
        self._until_empty = state.until_empty
        self._listening = state.config.notify
        self._pending: dict[int, _PendingSettlement] = {}
        self._mode: Literal["leasing", "draining", "closing"] = "leasing"
        self._paused = False
        self._stop_waiting = threading.Event()  # no lease is worth waiting for any more
        self._leader = LeaderFollower(self, state.executor, self._stop_waiting)
        self.lead_or_claim = self._leader.try_lead
        self._explained_at: dict[str, float] = {}
        self._waiting_until = 0.0
        self._request: _LeaseRequest | None = None  # without a reply yet
        self._sent: Sent[store.SettledAndLeased] | None = None  # its reply is to be read
        self.in_flight_since: float | None = None  # see `Rounds`; asked for each message
        self._finishes_left = 0  # until more may be leased
        self._unanswered: list[store.UnansweredLease] = []
        self.stopped_leasing = threading.Event()
        self.ended = threading.Event()
        self.empty = False
        self.fatal: BaseException | None = None
        connection.on_failure = self._on_failure

    # ------------------------------------------------------------ called from other threads

    def finished(
        self, invocation: Invocation, dispositions: Sequence[Disposition], *, quiet: bool
    ) -> None:
        """A call has ended; what is not settled yet is settled here.

        Args:
            invocation: What it worked on.
            dispositions: What becomes of each message.
            quiet: Wake nobody; the caller goes on to `lead_or_claim`.
        """
        now = time.monotonic()

        def note() -> None:
            self._scheduler.finished(invocation.handler.queue, len(invocation.deliveries))
            self._add_pending(invocation.handler, dispositions, now)

        self._finishes_left -= len(invocation.deliveries)
        if not quiet and self._finishes_left > 0 and invocation.handler.prefetch:
            self._leader.submit_later(note)  # it shares the commit of the next lease
        else:
            self._leader.submit(note, quiet=quiet)

    def settle(self, handler: Handler, dispositions: Sequence[Disposition]) -> None:
        """Settle deliveries whose call goes on: it took too long, or all stops."""
        now = time.monotonic()
        self._leader.submit(lambda: self._add_pending(handler, dispositions, now))

    def wake(self, queue: str | None) -> None:
        """There may be something in a queue (or in any)."""
        self._leader.submit_now(lambda: self._scheduler.wake(queue))

    def pause(self, *, paused: bool) -> None:
        """Lease nothing while paused; go on settling."""
        self._paused = paused
        self._leader.wake()

    def stop_leasing(self) -> None:
        """Lease no more; go on settling."""
        self._mode = "draining" if self._mode == "leasing" else self._mode
        self._stop_waiting.set()
        self._leader.wake()

    def close(self) -> None:
        """End when everything is settled."""
        self._mode = "closing"
        self._leader.wake()

    def _on_failure(self) -> None:
        """Note a call that failed: if it was to lease, it may have done so."""
        worker, request = self._state.context.worker, self._request
        if request is not None and worker is not None:
            queue, lease, now = request.handler.queue, request.lease, time.monotonic()
            self._unanswered.append(store.UnansweredLease(worker, queue, lease, request.since, now))
            request.since = now  # from when it is tried again

    # ---------------------------------------------------------------------- its own thread

    def run(self) -> None:
        """Work until closed; an error that does not pass is kept in ``fatal``."""
        self._leader.run()
        self._connection.close()
        self.stopped_leasing.set()
        self.ended.set()

    def fail(self, error: BaseException) -> None:
        """See `Rounds`."""
        self.fatal = error  # raised by the thread that runs the consumer, if one waits
        self._connection.log_failure(error, self._state.context.worker)

    # ---------------------------------------------------------------------- while leading

    def run_round(self, *, by_handler: bool = False) -> float:
        """See `Rounds`."""
        self._receive()
        mode = self._mode  # before the tasks: those that are left when it closes count
        tasks = self._leader.tasks
        while tasks:
            tasks.popleft()()
        if mode != "leasing":
            self.stopped_leasing.set()
        if mode == "closing" and not (self._pending or self._unanswered):
            self._leader.stop()
            return 0.0
        rest = self._try_step(by_handler=by_handler)
        if not self._state.executor.leads:
            self._finishes_left = self._scheduler.finishes_until_lease()
        if mode == "closing" and self._connection.stop_requested:
            self._leader.stop()
        return rest

    @property
    def unsettled(self) -> int:
        """How many messages are not settled; at the end, their leases run out."""
        return len(self._pending) + len(self._leader.tasks)

    def _try_step(self, *, by_handler: bool) -> float:
        try:
            return self._step(by_handler=by_handler)
        except Exception as error:
            # Told to stop while the database was away: it is no use to wait for a lease then.
            if self._connection.stop_requested or not (
                self._stop_waiting.is_set() and is_transient(error)
            ):
                raise
            return 0.0

    @property
    def _leases_now(self) -> bool:
        return self._mode == "leasing" and not self._paused

    def _step(self, *, by_handler: bool) -> float:
        now = time.monotonic()
        due = self._due(now)
        if self._leases_now:
            if self._needs_no_notifications(now):
                self._advertise_waiting(None)
                return 0.0
            if self._lease_next(due, now, by_handler=by_handler):
                return 0.0
            if self._until_empty and self._scheduler.drained and not self._pending:
                self._drained(now)
                return 0.0
        if self._is_due(due, now):
            self._settle(due)
        elif self._unanswered:
            self._release_unanswered(self._connection.stopping)
        elif not self._ask_for_notifications(now):
            return self.idle_time()
        return 0.0

    def _lease_next(
        self, due: Sequence[_PendingSettlement], now: float, *, by_handler: bool
    ) -> bool:
        """Lease what may be leased now, and one more store ahead; return whether there was any."""
        step = self._scheduler.next(now)
        if isinstance(step, CheckQueues):
            self._check_queues(step.queues)
            step = self._scheduler.next(now)
        leases = isinstance(step, Fetch)
        if isinstance(step, Fetch):
            self._lease(step, due, by_handler=by_handler)
            now = time.monotonic()
            due = self._due(now)
        if (ahead := self._ahead(due, now, by_handler=by_handler)) is not None:
            self._lease(ahead, due, by_handler=by_handler)
        return leases or ahead is not None

    def _ahead(
        self, due: Sequence[_PendingSettlement], now: float, *, by_handler: bool
    ) -> Fetch | None:
        """Return what to lease while handlers work, if they need not wait for that."""
        if self._sent is not None:
            return None
        if by_handler and not self._connection.can_send:
            return None
        if not by_handler and self._state.executor.leads and not self._is_due(due, now):
            return None  # a handler's thread will come, and does not wait for it either
        return self._scheduler.ahead(now)

    def _due(self, now: float) -> list[_PendingSettlement]:
        return [pending for pending in self._pending.values() if pending.not_before <= now]

    def idle_time(self) -> float:
        """See `Rounds`."""
        now = time.monotonic()
        moments = [max(pending.not_before, pending.settle_by) for pending in self._pending.values()]
        rest = _MAX_RETRY_DELAY if moments else _MAX_IDLE
        if self._leases_now:
            rest = 0.0 if self._needs_no_notifications(now) else self._scheduler.idle_time(now)
        return max(0.0, min(rest, *(moment - now for moment in moments))) if moments else rest

    def _drained(self, now: float) -> None:
        """End, as there is nothing left, unless somebody had it locked just then."""
        queues = self._scheduler.queues
        found = self._connection.run("a look", self._state.context, store.check_queues, queues)
        if found.ready:
            self._scheduler.check_again(now)
            return
        # Runs that are started now and then may always find some messages first, and never look.
        for queue in sorted(found.exhausted):
            self._explain_empty(queue, now)
        self.empty = True
        self._mode = "draining"
        self.ended.set()

    def _is_due(self, due: Sequence[_PendingSettlement], now: float) -> bool:
        """Whether to settle now, without a lease to share the commit with."""
        if due and self._leases_now and self._scheduler.in_hand:
            return any(pending.settle_by <= now for pending in due)
        return bool(due)

    def _lease(self, step: Fetch, due: Sequence[_PendingSettlement], *, by_handler: bool) -> None:
        """Acknowledge what is done, and lease, in one statement.

        A handler's thread does not wait for it if there is something to start meanwhile: its next
        round reads the reply, or one of the dispatcher's own thread.
        """
        request = self._request = self._request_for(step, due)
        if by_handler and self._runtime.waiting and self._connection.can_send:
            self._send(request)
            return
        try:
            found = self._connection.exchange_until(
                self._stop_waiting,
                "a lease",
                self._state.context,
                store.SettleAndLease,
                *request.arguments(),
            )
        finally:
            self._request = None
        self._take_in(request, found)

    def _request_for(self, step: Fetch, due: Sequence[_PendingSettlement]) -> _LeaseRequest:
        """Return what to ask for, once everything is settled that is not archived with it."""
        done: list[_PendingSettlement] = []
        others: list[_PendingSettlement] = []
        for pending in due:
            together = self._can_settle_with_lease(pending.disposition)
            (done if together else others).append(pending)
        if others:
            self._settle(others)
        lease, now = self._state.lease_lengths[step.handler.queue], time.monotonic()
        return _LeaseRequest(step.handler, step.limit, lease, done, now, now)

    def _can_settle_with_lease(self, disposition: Disposition) -> bool:
        """Whether it can be archived by the statement that leases.

        A lease that may have run out could be taken again by that very statement.
        """
        lease = self._lease_table.get(disposition.delivery)
        return disposition.action == "archive" and lease is not None and not lease.is_lost()

    def _send(self, request: _LeaseRequest) -> None:
        try:
            self._sent = self._connection.send(
                self._state.context, store.SettleAndLease, *request.arguments()
            )
            self.in_flight_since = request.asked_at
        except Exception as error:  # noqa: BLE001 - see there
            self._request = None
            self._after_lost_reply(error)

    def _receive(self) -> None:
        """Read the reply to the statement that is in flight, if there is one."""
        sent, self._sent, self.in_flight_since = self._sent, None, None
        request = self._request
        if sent is None or request is None:
            return
        try:
            found = self._connection.receive(sent)
        except Exception as error:  # noqa: BLE001 - see there
            self._after_lost_reply(error)
            return
        finally:
            self._request = None
        self._take_in(request, found)

    def _after_lost_reply(self, error: Exception) -> None:
        """Go on after an error that passes: the next statement connects again, and waits for that.

        What the lost statement has archived is then found in the archive, and what it has leased is
        given back: see `_on_failure`.
        """
        if not is_transient(error):
            raise error
        log.warning(
            "a lease failed, and its reply is lost: %s",
            type(error).__name__,
            extra={"worker": self._state.context.worker, "sqlstate": sqlstate(error)},
        )

    def _take_in(self, request: _LeaseRequest, found: store.SettledAndLeased) -> None:
        """Note what a statement has archived and leased, and start that."""
        handler = request.handler
        if replaced := self._lease_table.replaced(found.leased):
            self._state.mark_lost(replaced)
        leased = self._lease_table.add(handler, found.leased, request.lease, request.asked_at)
        now = time.monotonic()
        self._scheduler.record_fetch(handler.queue, request.limit, len(leased), now)
        if request.done:
            self._record_settled(request.done, dict.fromkeys(found.settled, Outcome.ARCHIVED))
        if found.undecodable:
            self._report_undecodable(handler, found.undecodable)
        if leased:
            self._start(handler, leased)
        if self._unanswered:
            self._release_unanswered(self._stop_waiting)

    def _report_undecodable(self, handler: Handler, dead: Sequence[Delivery]) -> None:
        for delivery in dead:
            disposition = Disposition(
                delivery, "dead", reason="cannot be decoded", error=delivery.decoded
            )
            self._events.settled(handler, disposition, Outcome.DEAD, None)
        self._scheduler.wake(handler.queue)  # they took the places of others: lease again at once

    def _release_unanswered(self, stopping: threading.Event) -> None:
        """Give back leases whose reply was lost."""
        turns, known = list(self._unanswered), self._lease_table.tokens()
        self._connection.run_until(
            stopping,
            "a look for strays",
            self._state.context,
            store.release_unanswered,
            turns,
            known,
        )
        self._unanswered.clear()

    def _start(self, handler: Handler, leased: list[Delivery]) -> None:
        if handler.acknowledge == "first":
            leased = self._acknowledged(handler, leased)
        self._runtime.accept(invocations(handler, leased))

    def _acknowledged(self, handler: Handler, leased: list[Delivery]) -> list[Delivery]:
        """Archive before the handler is called; return what could be archived."""
        dispositions = [Disposition(delivery, "archive") for delivery in leased]
        done: set[int] = {*self._apply(dispositions, self._connection.stopping)}
        lost = [delivery for delivery in leased if delivery.id not in done]
        if lost:
            known = self._connection.run("a look", self._state.context, store.lookup_status, lost)
            done |= {id_ for id_, status in known.items() if status is Outcome.ARCHIVED}
            lost = [delivery for delivery in lost if delivery.id not in done]
        self._lease_table.remove(leased)
        self._scheduler.finished(handler.queue, len(lost))
        return [delivery for delivery in leased if delivery.id in done]

    def _check_queues(self, queues: Sequence[str]) -> None:
        """Ask which of the queues that had nothing have something now, in one statement."""
        asked_at = time.monotonic()
        found = self._connection.run_until(
            self._stop_waiting, "a look", self._state.context, store.check_queues, queues
        )
        self._scheduler.record_check(queues, found.ready, asked_at)
        for queue in sorted(found.missing | found.exhausted):
            self._explain_empty(queue, asked_at)

    def _explain_empty(self, queue: str, now: float) -> None:
        """Make dead letters of exhausted messages, and drop a queue that is gone."""
        if now - self._explained_at.get(queue, 0.0) < _EXPLAIN_INTERVAL:
            return
        self._explained_at[queue] = now
        try:
            more = self._connection.run_until(
                self._stop_waiting,
                "a look",
                self._state.context,
                explain_nothing,
                queue,
                None,
                _LOOK,
            )
        except QueueNotFound as gone:
            log.error("%s", gone, extra={"queue": queue, "worker": self._state.context.worker})  # noqa: TRY400
            self._scheduler.remove(queue)
            if not self._scheduler.queues:
                raise
        else:
            if more:  # go on in the next round: a run until empty does not end before them
                del self._explained_at[queue]

    def _ask_for_notifications(self, now: float) -> bool:
        """Advertise that this worker waits, once idle; return True if it must look once more."""
        if not (self._listening and self._leases_now) or now < self._waiting_until:
            return False
        if self._scheduler.idle_for(now) < _IDLE_AFTER:
            return False
        span = timedelta(seconds=max(10.0, 4 * self._scheduler.poll_interval))
        self._advertise_waiting(span)
        self._waiting_until = now + span.total_seconds() / 2
        # What was enqueued before this was known has sent no notification.
        self._scheduler.wake(None)
        return True

    def _needs_no_notifications(self, now: float) -> bool:
        """Whether producers send them for nothing, as there is work again.

        That is said in a round of its own, after the handlers have begun.
        """
        return bool(self._waiting_until) and not self._scheduler.idle_for(now)

    def _advertise_waiting(self, span: timedelta | None) -> None:
        context = self._state.context
        self._waiting_until = 0.0
        if context.worker is not None:
            self._connection.run_until(
                self._stop_waiting, "a note", context, wakeup.set_waiting, context.worker, span
            )

    # --------------------------------------------------------------------------- settling

    def _add_pending(
        self, handler: Handler, dispositions: Sequence[Disposition], since: float
    ) -> None:
        """Take in dispositions, one for each message, which were reached then.

        One that took too long is settled before its handler returns; and a message may be leased
        here again while the handler of an attempt that was lost goes on. The newest attempt
        counts, and what was decided about it first.
        """
        # With a store ahead, the others of it are soon done as well.
        alone_at = since + LINGER if handler.prefetch else 0.0
        for disposition in dispositions:
            id_, token = disposition.delivery.id, disposition.delivery.fencing_token
            known = self._pending.get(id_)
            if known is None or known.disposition.delivery.fencing_token < token:
                self._pending[id_] = _PendingSettlement(disposition, handler, settle_by=alone_at)

    def _apply(
        self, dispositions: Sequence[Disposition], until: threading.Event
    ) -> dict[int, Outcome]:
        return self._connection.run_until(
            until,
            "a settlement",
            self._state.context,
            store.apply,
            dispositions,
            strict=False,
        )

    def _settle(self, due: Sequence[_PendingSettlement]) -> None:
        # A stop waits until this thread leases no more, as a lease may be on its way. If it waited
        # for a database that is away, the end would take as long as running handlers may.
        until = self._connection.stopping if self.stopped_leasing.is_set() else self._stop_waiting
        self._record_settled(due, self._apply([pending.disposition for pending in due], until))

    def _record_settled(
        self, tried: Sequence[_PendingSettlement], outcomes: Mapping[int, Outcome]
    ) -> None:
        """Take note of what was settled, and of what became of the rest."""
        missing = [pending for pending in tried if pending.disposition.delivery.id not in outcomes]
        known: dict[int, store.SettledStatus] = {**outcomes}
        if missing:
            known |= self._lookup_missing(missing)
        settled: list[tuple[_PendingSettlement, Outcome]] = []
        for pending in tried:
            id_ = pending.disposition.delivery.id
            status = known[id_]
            if status == "busy":
                self._retry_locked(pending)
                continue
            self._pending.pop(id_, None)
            if status is Outcome.LOST:
                self._mark_lost(pending)
            else:
                settled.append((pending, status))
        self._report(settled)

    def _retry_locked(self, waiting: _PendingSettlement) -> None:
        """Try again soon; not for ever, if it is the message's own call that keeps it locked.

        Such a call took too long, or was given up. Its COMMIT may be on its way: hence not at once.
        """
        waiting.not_before = time.monotonic() + _LOCK_RETRY
        if waiting.busy:
            self._state.call_transactions.end(waiting.disposition.delivery)
        waiting.busy = True

    def _lookup_missing(
        self, missing: Sequence[_PendingSettlement]
    ) -> Mapping[int, store.SettledStatus]:
        deliveries = [pending.disposition.delivery for pending in missing]
        return self._connection.run("a look", self._state.context, store.lookup_status, deliveries)

    def _report(self, settled: Sequence[tuple[_PendingSettlement, Outcome]]) -> None:
        # Lost: if it took too long, its handler still runs, and may ask.
        gone = self._lease_table.mark_lost([done.disposition.delivery for done, _ in settled])
        told = [pair for pair in settled if self._events.is_told(pair[1])]
        by_id = {lease.delivery.id: lease for lease in gone} if told else {}
        for done, outcome in told:
            if (lease := by_id.get(done.disposition.delivery.id)) is not None:
                self._events.settled(done.handler, done.disposition, outcome, lease.started_at)

    def _mark_lost(self, pending: _PendingSettlement) -> None:
        leases = self._lease_table.mark_lost([pending.disposition.delivery])
        if not leases:
            return  # it was told already: the renewer saw it first, or the handler took too long
        self._events.ended(
            Outcome.LOST,
            pending.handler,
            pending.disposition.delivery,
            leases[0].started_at,
            error=pending.disposition.error,
        )

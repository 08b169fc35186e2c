"""The thread that renews leases, ends attempts after their timeout, and runs the maintenance.

The maintenance is the heartbeat of the consumer's worker, and the housekeeping.

The thread has its own connection and never waits for a lock, so that neither a long statement of
another thread nor a handler that has locked its message delays the renewal of the other leases.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from .._core.lease import dead_letter_exhausted
from .._core.scope import Scope
from ..errors import HandlerTimeout, QueueNotFound, WorkerNotFound, WorkerNotReady
from ..resources import Archived, Workers
from ..resources.workers import heartbeat, register, set_status
from ..types import Outcome, WorkerInfo
from . import store
from .connection import ConsumerConnection
from .dispatcher import Dispatcher
from .disposition import disposition_for_error
from .leases import Lease
from .retrying import is_transient, sqlstate, without_parameters
from .state import ConsumerState

__all__ = ["LeaseRenewer", "Maintenance", "register_worker"]

log = logging.getLogger("pgqrs_sa.consumer")

_MIN_IDLE = 0.02  # seconds
_LATER = 0.5  # seconds until a lease whose row was locked is tried again


class LeaseRenewer:
    """Renews the leases, and ends attempts after their timeout.

    Args:
        connection: Its connection.
        state: The state of the run.
        dispatcher: Settles the deliveries whose handlers exceeded their timeout.
    """

    def __init__(
        self, connection: ConsumerConnection, state: ConsumerState, dispatcher: Dispatcher
    ) -> None:
        self._connection = connection
        self._state = state
        self._lease_table = state.lease_table
        self._dispatcher = dispatcher
        self._maintenance = Maintenance(connection, state)
        # The maximum of seconds until new leases are noticed.
        self._max_idle = min(1.0, state.shortest_lease / 6)
        self._closed = threading.Event()
        self.fatal: BaseException | None = None

    def close(self) -> None:
        """Stop after the current step."""
        self._closed.set()

    def run(self) -> None:
        """Work until closed; store a permanent error in ``fatal``."""
        try:
            while not self._closed.wait(self._idle_time()):
                self._renew()
                self._end_overdue()
                self._maintenance.send_heartbeat()
                self._maintenance.run_jobs()
        except BaseException as error:  # noqa: BLE001 - it is stored
            self.fatal = error  # raised by run(); logged too, since start() has no caller waiting
            self._connection.log_failure(error, self._state.context.worker)
        finally:
            self._maintenance.mark_stopped()
            self._connection.close()

    def _idle_time(self) -> float:
        moments = [self._lease_table.next_renewal(), self._maintenance.heartbeat_at]
        rest = min(min(moments) - time.monotonic(), self._max_idle)
        return max(_MIN_IDLE, rest)

    def _renew(self) -> None:
        by_span: dict[float, list[Lease]] = {}
        for lease in self._lease_table.due(time.monotonic()):
            by_span.setdefault(lease.length, []).append(lease)
        for span, group in by_span.items():
            self._renew_group(span, group)

    def _renew_group(self, span: float, group: Sequence[Lease]) -> None:
        deliveries = [member.delivery for member in group]
        asked_at = time.monotonic()
        kept = self._connection.run(
            "a renewal", self._state.context, store.renew, deliveries, timedelta(seconds=span)
        )
        self._lease_table.mark_renewed(
            [member for member in group if member.delivery.id in kept], asked_at
        )
        missing = [delivery for delivery in deliveries if delivery.id not in kept]
        if not missing:
            return
        known = self._connection.run("a look", self._state.context, store.lookup_status, missing)
        for lease in group:
            lease.renew_at = time.monotonic() + min(_LATER, span / 6)
            if known.get(lease.delivery.id) == "busy":
                # Locked, usually by its own handler: nobody else can lease it meanwhile.
                lease.expires_at = max(lease.expires_at, time.monotonic() + 2 * _LATER)
        # A lease that is being settled is reported by the code that settles it. A handler may also
        # have archived its message itself, and not have returned yet.
        self._state.mark_lost(
            [
                member
                for member in group
                if known.get(member.delivery.id) in (Outcome.LOST, Outcome.DEAD)
                and not (member.settling or member.timed_out)
            ]
        )

    def _end_overdue(self) -> None:
        for lease in self._lease_table.overdue(time.monotonic() - self._state.grace):
            limit = lease.handler.timeout or timedelta(0)
            error = HandlerTimeout(
                lease.handler.name, limit.total_seconds(), self._state.executor.stack(lease)
            )
            log.error(
                "%s", error, extra={"msg_id": lease.delivery.id, "queue": lease.handler.queue}
            )
            disposition = disposition_for_error(lease.handler, lease.delivery, error)
            self._dispatcher.settle(lease.handler, [disposition])
            self._state.executor.abandon([lease])


log = logging.getLogger("pgqrs_sa.consumer")

_CHUNK = 1_000  # rows that one transaction of housekeeping moves or deletes at most
_LOOK = 10_000  # visible messages of each priority that it searches for exhausted ones
_JOB_SECONDS = 0.2  # after which the rest waits until the renewals that are due are done
_WORKERS_KEPT = timedelta(days=7)
_MIN_SILENCE = 60.0  # seconds without a heartbeat before another worker is considered dead
_DENIED = "42501"


class Maintenance:
    """Sends the heartbeat of a consumer, and does its housekeeping.

    Args:
        connection: The renewer's connection: this works in the renewer's thread.
        state: The state of the run.
    """

    def __init__(self, connection: ConsumerConnection, state: ConsumerState) -> None:
        self._connection = connection
        self._state = state
        self._status = "ready"
        now = time.monotonic()
        self.heartbeat_at = now + state.config.heartbeat
        # The first round is spread, so that the consumers of a deployment do not all run at once.
        self._maintenance_at = now + (state.config.housekeeping or 0.0) * (id(self) % 97) / 97

    def send_heartbeat(self) -> None:
        """Send the heartbeat if it is due; register again if another worker declared us dead."""
        now = time.monotonic()
        worker = self._state.context.worker
        if now < self.heartbeat_at or worker is None:
            return
        self.heartbeat_at = now + self._state.config.heartbeat
        try:
            info = self._connection.run(
                "a heartbeat",
                self._state.context,
                heartbeat,
                worker,
                len(self._state.lease_table.tokens()),
            )
        except (WorkerNotReady, WorkerNotFound) as error:
            log.warning("taken for dead: %s", error, extra={"worker": worker})
            self._state.mark_lost(self._state.lease_table.all())
            info = register_worker(self._connection, self._state)
        self._state.events.heartbeat(info)
        if info.status != self._status:
            self._status = info.status
            log.info("worker %d is %s", worker, info.status, extra={"worker": worker})

    def run_jobs(self) -> None:
        """Run the housekeeping if it is due."""
        now, housekeeping = time.monotonic(), self._state.config.housekeeping
        if housekeeping is None or now < self._maintenance_at:
            return
        self._maintenance_at = now + housekeeping
        for job in (self._reclaim, self._dead_letter_exhausted, self._prune, self._purge_workers):
            while self._run(job):
                if time.monotonic() > now + _JOB_SECONDS:
                    self._maintenance_at = now  # go on after the renewals that are due
                    break

    def _run(self, job: Callable[[Scope], bool]) -> bool:
        """Run a job; return whether it has more to do.

        Each has its own transaction: the role of a consumer may only be allowed the first two.
        """
        try:
            return bool(self._connection.transaction(self._state.context, job))
        except Exception as error:
            if not (is_transient(error) or sqlstate(error) == _DENIED):
                name = type(error).__name__
                log.warning("tidying up failed: %s", name, exc_info=without_parameters(error))
            else:
                log.info("tidying up was not possible: %s", type(error).__name__)
            return False

    def _reclaim(self, scope: Scope) -> bool:
        if store.try_housekeeping_lock(scope):
            silence = max(_MIN_SILENCE, 6 * self._state.config.heartbeat)
            Workers(scope).reclaim(silent_for=silence)
        return False

    def _dead_letter_exhausted(self, scope: Scope) -> bool:
        more = False
        if store.try_housekeeping_lock(scope):
            for queue in self._state.lease_lengths:
                with contextlib.suppress(QueueNotFound):  # the dispatcher says so
                    more |= dead_letter_exhausted(scope, queue, _CHUNK, _LOOK) == _CHUNK
        return more

    def _prune(self, scope: Scope) -> bool:
        return store.try_housekeeping_lock(scope) and Archived(scope).prune(limit=_CHUNK) == _CHUNK

    def _purge_workers(self, scope: Scope) -> bool:
        if store.try_housekeeping_lock(scope):
            Workers(scope).purge(older_than=_WORKERS_KEPT)
        return False

    def mark_stopped(self) -> None:
        """Set the status of this consumer's worker to stopped."""
        worker = self._state.context.worker
        # Two tries: the connection may have been lost since its last use.
        for _ in range(2 if worker is not None else 0):
            try:
                self._connection.run_once(self._state.context, set_status, worker or 0, "stopped")
                break
            except Exception as error:  # noqa: BLE001 - its heartbeat then stops, as after a crash
                log.info("worker %d was not noted as stopped: %s", worker, type(error).__name__)


def register_worker(connection: ConsumerConnection, state: ConsumerState) -> WorkerInfo:
    """Register this process as a worker, or register it again after it was declared dead.

    One row remains, even if a reply was lost and the registration was repeated. An INSERT whose
    reply was lost is rolled back with its transaction. If the reply to the COMMIT was lost, the id
    is known already. Another process may have the same name, host and process id, as containers
    do, so a row is never recognized by these.
    """
    context, name, version = state.context, state.config.name, state.config.version
    queues = [handler.queue for handler in state.handlers]
    inserted: list[int] = []

    def once(scope: Scope) -> WorkerInfo:
        for worker in inserted:
            with contextlib.suppress(WorkerNotFound):
                return Workers(scope).get(worker)
        info = register(scope, name, queues, None, None, None, version, leased=0)
        inserted.append(info.id)
        return info

    info = connection.run_transaction("the registration", context, once)
    state.registered(info)
    return info

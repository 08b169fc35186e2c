"""The thread that keeps what is held: renewals, timeouts, the heartbeat, and tidying up.

It has a connection of its own and waits for nobody's lock, so that neither a long statement of
the other thread nor a handler that holds its message locked delays the renewal of the others.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from sqlalchemy.orm import Session

from .._core import archive, workers
from .._core.context import Context
from ..errors import HandlerTimeout, QueueNotFound, WorkerNotFound, WorkerNotReady
from ..types import Outcome, WorkerInfo
from . import store
from .connection import ConsumerConnection
from .disposition import Disposition, disposition_for_error
from .events import EventEmitter
from .leases import Lease, LeaseTable
from .retrying import is_transient, sqlstate, without_parameters

__all__ = ["LeaseRenewer"]

log = logging.getLogger("pgqrs_sa.consumer")

_MIN_IDLE = 0.02  # seconds
_LATER = 0.5  # seconds until a lease whose row was locked is tried again
_CHUNK = 1_000  # rows of the archive that one round of tidying deletes at most
_WORKERS_KEPT = timedelta(days=7)
_DENIED = "42501"


class LeaseRenewer:
    """Renews leases, and tells the database that this consumer lives.

    Args:
        line: Its connection.
        context: Returns the context.
        book: The leases held.
        reporter: Hears of leases that are lost.
        register: Registers this consumer anew, after it was taken for dead.
        time_out: Settles a delivery whose handler took too long.
        abandon: Tells a handler that is running to stop, if that is possible.
        stack: Says where a handler is that is running, if that is known.
        heartbeat: Seconds between two signs of life.
        grace: Seconds that a handler may stop by itself in, once its time is over.
        housekeeping: Seconds between two rounds of tidying up, or None for none.
        silent_for: How long another worker may be silent before it is taken for dead.
        longest_rest: Seconds after which new leases are looked at.
    """

    def __init__(
        self,
        connection: ConsumerConnection,
        context: Callable[[], Context],
        lease_table: LeaseTable,
        events: EventEmitter,
        register: Callable[[], WorkerInfo],
        time_out: Callable[[Lease, Disposition], None],
        abandon: Callable[[Sequence[Lease]], None],
        stack: Callable[[Lease], str | None],
        *,
        queues: Sequence[str],
        heartbeat: float,
        grace: float,
        housekeeping: float | None,
        silent_for: float,
        max_idle: float = 1.0,
    ) -> None:
        self._connection = connection
        self._context = context
        self._lease_table = lease_table
        self._events = events
        self._register = register
        self._time_out = time_out
        self._abandon = abandon
        self._stack = stack
        self._queues = queues
        self._heartbeat = heartbeat
        self._grace = grace
        self._housekeeping = housekeeping
        self._silent_for = silent_for
        self._max_idle = max_idle
        self._closed = threading.Event()
        self._status = "ready"
        now = time.monotonic()
        self._heartbeat_at = now + heartbeat
        # The first round comes soon, but not from all consumers of a deployment at once.
        self._maintenance_at = now + (housekeeping or 0.0) * (id(self) % 97) / 97
        self.fatal: BaseException | None = None

    def close(self) -> None:
        """End after the present step."""
        self._closed.set()

    def run(self) -> None:
        """Keep until closed."""
        try:
            while not self._closed.wait(self._idle_time()):
                self._renew()
                self._end_overdue()
                self._send_heartbeat()
                self._run_maintenance()
        except BaseException as error:  # noqa: BLE001 - it is kept
            self.fatal = error  # whoever runs the consumer raises it; if nobody waits, it is here
            self._connection.log_failure(error, self._context().worker)
        finally:
            self._mark_stopped()

    def _idle_time(self) -> float:
        moments = [self._lease_table.next_renewal(), self._heartbeat_at]
        rest = min(min(moments) - time.monotonic(), self._max_idle)
        return max(_MIN_IDLE, rest)

    def _renew(self) -> None:
        by_span: dict[float, list[Lease]] = {}
        for held in self._lease_table.due(time.monotonic()):
            by_span.setdefault(held.length, []).append(held)
        for span, group in by_span.items():
            self._renew_group(span, group)

    def _renew_group(self, span: float, group: Sequence[Lease]) -> None:
        deliveries = [one.delivery for one in group]
        asked_at = time.monotonic()
        kept = self._connection.run(
            "a renewal", self._context(), store.renew, deliveries, timedelta(seconds=span)
        )
        self._lease_table.mark_renewed([one for one in group if one.delivery.id in kept], asked_at)
        missing = [one for one in deliveries if one.id not in kept]
        if not missing:
            return
        known = self._connection.run("a look", self._context(), store.lookup_status, missing)
        for held in group:
            held.renew_at = time.monotonic() + min(_LATER, span / 6)
            if known.get(held.delivery.id) == "busy":
                # Locked, by its own handler as a rule: nobody can take it while that lasts.
                held.expires_at = max(held.expires_at, time.monotonic() + 2 * _LATER)
        # Of what is being settled, whoever does that tells. A handler may also have archived its
        # message by itself, and not have returned yet.
        self.mark_lost(
            [
                one
                for one in group
                if known.get(one.delivery.id) in (Outcome.LOST, Outcome.DEAD)
                and not (one.settling or one.timed_out)
            ]
        )

    def mark_lost(self, gone: Sequence[Lease]) -> None:
        """Note that leases are gone, and tell their handlers."""
        lost = self._lease_table.mark_lost([one.delivery for one in gone])
        if lost:
            self._abandon(lost)
        for one in lost:
            self._events.ended(Outcome.LOST, one.handler, one.delivery, one.started_at)

    def _end_overdue(self) -> None:
        for held in self._lease_table.overdue(time.monotonic() - self._grace):
            limit = held.handler.timeout or timedelta(0)
            error = HandlerTimeout(held.handler.name, limit.total_seconds(), self._stack(held))
            log.error("%s", error, extra={"msg_id": held.delivery.id, "queue": held.handler.queue})
            self._time_out(held, disposition_for_error(held.handler, held.delivery, error))
            self._abandon([held])

    def _send_heartbeat(self) -> None:
        now = time.monotonic()
        worker = self._context().worker
        if now < self._heartbeat_at or worker is None:
            return
        self._heartbeat_at = now + self._heartbeat
        try:
            info = self._connection.run(
                "a heartbeat",
                self._context(),
                workers.heartbeat,
                worker,
                len(self._lease_table.tokens()),
            )
        except (WorkerNotReady, WorkerNotFound) as error:
            log.warning("taken for dead: %s", error, extra={"worker": worker})
            self.mark_lost(self._lease_table.all())
            info = self._register()
        self._events.heartbeat(info)
        if info.status != self._status:
            self._status = info.status
            log.info("worker %d is %s", worker, info.status, extra={"worker": worker})

    def _run_maintenance(self) -> None:
        now = time.monotonic()
        if self._housekeeping is None or now < self._maintenance_at:
            return
        self._maintenance_at = now + self._housekeeping
        # Each in a transaction of its own: a consumer's role may do the first two alone.
        for job in (self._reclaim, self._dead_letter_exhausted, self._prune, self._purge_workers):
            try:
                self._connection.transaction(self._context(), job)
            except Exception as error:
                if not (is_transient(error) or sqlstate(error) == _DENIED):
                    name = type(error).__name__
                    log.warning("tidying up failed: %s", name, exc_info=without_parameters(error))
                else:
                    log.info("tidying up was not possible: %s", type(error).__name__)

    def _reclaim(self, session: Session, context: Context) -> None:
        if store.try_housekeeping_lock(session, context):
            workers.reclaim(session, context, self._silent_for, None, holding=False)

    def _dead_letter_exhausted(self, session: Session, context: Context) -> None:
        if store.try_housekeeping_lock(session, context):
            for queue in self._queues:
                with contextlib.suppress(QueueNotFound):  # the dispatcher says so
                    archive.dead_letter_exhausted(session, context, queue, _CHUNK)

    def _prune(self, session: Session, context: Context) -> None:
        if store.try_housekeeping_lock(session, context):
            archive.prune(session, context, None, None, _CHUNK)

    def _purge_workers(self, session: Session, context: Context) -> None:
        if store.try_housekeeping_lock(session, context):
            workers.purge(session, context, _WORKERS_KEPT)

    def _mark_stopped(self) -> None:
        worker = self._context().worker
        # Twice: the connection may have been lost since it was last used.
        for _ in range(2 if worker is not None else 0):
            try:
                self._connection.run_once(
                    self._context(), workers.set_status, worker or 0, "stopped"
                )
                break
            except Exception as error:  # noqa: BLE001 - the row then shows its silence
                log.info("worker %d was not noted as stopped: %s", worker, type(error).__name__)
        self._connection.close()

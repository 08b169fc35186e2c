"""The thread that renews leases, ends the attempts that take too long, and runs the maintenance.

It has a connection of its own and waits for nobody's lock, so that neither a long statement of
the other thread nor a handler that holds its message locked delays the renewal of the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from ..errors import HandlerTimeout
from ..types import Outcome
from . import store
from .connection import ConsumerConnection
from .dispatcher import Dispatcher
from .disposition import disposition_for_error
from .leases import Lease
from .maintenance import Maintenance
from .state import ConsumerState

__all__ = ["LeaseRenewer"]

log = logging.getLogger("pgqrs_sa.consumer")

_MIN_IDLE = 0.02  # seconds
_LATER = 0.5  # seconds until a lease whose row was locked is tried again


class LeaseRenewer:
    """Renews the leases, and ends the attempts that take too long.

    Args:
        connection: Its connection.
        state: Of the run.
        dispatcher: Settles the deliveries whose handlers took too long.
    """

    def __init__(
        self, connection: ConsumerConnection, state: ConsumerState, dispatcher: Dispatcher
    ) -> None:
        self._connection = connection
        self._state = state
        self._lease_table = state.lease_table
        self._dispatcher = dispatcher
        self._maintenance = Maintenance(connection, state)
        # New leases are looked at after so many seconds.
        self._max_idle = min(1.0, state.shortest_lease / 6)
        self._closed = threading.Event()
        self.fatal: BaseException | None = None

    def close(self) -> None:
        """End after the present step."""
        self._closed.set()

    def run(self) -> None:
        """Work until closed; an error that does not pass is kept in ``fatal``."""
        try:
            while not self._closed.wait(self._idle_time()):
                self._renew()
                self._end_overdue()
                self._maintenance.send_heartbeat()
                self._maintenance.run_jobs()
        except BaseException as error:  # noqa: BLE001 - it is kept
            self.fatal = error  # whoever runs the consumer raises it; if nobody waits, it is here
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
                # Locked, by its own handler as a rule: nobody can take it while that lasts.
                lease.expires_at = max(lease.expires_at, time.monotonic() + 2 * _LATER)
        # Of what is being settled, whoever does that tells. A handler may also have archived its
        # message by itself, and not have returned yet.
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

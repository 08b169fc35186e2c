"""The state that the threads of one run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

from .._core.scope import Context
from ..types import Outcome, WorkerInfo
from .call_transactions import CallTransactions
from .connection import Connector
from .events import EventEmitter
from .handlers import Handler
from .leases import Lease, LeaseTable
from .options import ConsumerConfig

__all__ = ["ConsumerState", "Executor"]


class Executor(Protocol):
    """Calls the handlers, in threads or in tasks."""

    @property
    def engine(self) -> Any:
        """The application's engine: an ``Engine`` or an ``AsyncEngine``."""
        ...

    @property
    def leads(self) -> bool:
        """Whether the threads of handlers lease for themselves: see `leader`."""
        ...

    def connector(self) -> Connector:
        """Return a connector for one of the run's own threads."""
        ...

    def submit(self, count: int) -> None:
        """Start up to ``count`` invocations, which `Runtime.next_invocation` returns.

        An executor that must not wait asks `Runtime.next_ready_invocation`.
        """

    def wake(self) -> bool:
        """Wake an idle thread to ask `Runtime.next_invocation`; return False if none is idle."""
        ...

    def silent_for(self) -> float:
        """Return for how many seconds no call can have begun; infinity when none ever will."""
        ...

    @property
    def is_dead(self) -> bool:
        """Whether no call goes on either, while it is silent."""
        ...

    def abandon(self, leases: Sequence[Lease]) -> None:
        """Tell the handlers of these messages to stop, if they can be told."""

    def stack(self, lease: Lease) -> str | None:
        """Return where the handler of a message is at this moment, or None if it is not known."""
        ...


class ConsumerState:
    """The state that the runtime, the dispatcher, the renewer and the maintenance share.

    =====================  ========================================================================
    attribute              who writes it
    =====================  ========================================================================
    ``config``,            nobody: they are those that the run was made with
    ``handlers``,
    ``executor``,
    ``until_empty``,
    ``grace``
    ``lease_lengths``,     the thread that starts the run, before it starts the others
    ``shortest_lease``
    ``worker``,            `registered`: the thread that starts the run; later the renewer's, when
    ``context``            the consumer was taken for dead and has registered again
    ``lease_table``        all, with its lock: the dispatcher adds, the renewer renews, and who
                           settles a message or loses its lease removes
    ``call_transactions``  each call, its own entry
    ``events``             nobody, apart from the worker's id: see ``worker``
    =====================  ========================================================================

    Args:
        config: Of the consumer.
        handlers: Those that work.
        executor: Calls them.
        until_empty: End when nothing is left to lease.
        grace: Seconds that the executor needs to end a call by itself after its timeout.
    """

    def __init__(
        self,
        config: ConsumerConfig,
        handlers: Sequence[Handler],
        executor: Executor,
        *,
        until_empty: bool,
        grace: float,
    ) -> None:
        self.config = config
        self.handlers = tuple(handlers)
        self.executor = executor
        self.until_empty = until_empty
        self.grace = grace
        self.lease_lengths: dict[str, timedelta] = {}
        self.shortest_lease = min(
            (handler.lease.total_seconds() for handler in handlers if handler.lease), default=30.0
        )
        self.worker: WorkerInfo | None = None
        self.context: Context = config.context()
        self.lease_table = LeaseTable()
        self.call_transactions = CallTransactions()
        self.events = EventEmitter(config.hooks)

    def registered(self, worker: WorkerInfo) -> None:
        """Note the worker that this consumer is from now on."""
        self.worker = worker
        self.context = replace(self.context, worker=worker.id)
        self.events.worker = worker.id

    def mark_lost(self, leases: Sequence[Lease]) -> None:
        """Note that leases are gone, and tell their handlers and the hooks."""
        lost = self.lease_table.mark_lost([lease.delivery for lease in leases])
        if lost:
            self.executor.abandon(lost)
        for lease in lost:
            self.events.ended(Outcome.LOST, lease.handler, lease.delivery, lease.started_at)

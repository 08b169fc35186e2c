"""What a registered worker can say and be told: heartbeat, status, suspend, resume, shutdown."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, suppress

from ..aio import AsyncQueueService
from ..errors import WorkerNotReady
from ..models import Models
from ..types import Seconds
from . import paging
from .connected import Connected
from .errors import InvalidStateTransition, WorkerHasPendingMessages
from .types import WorkerStatus

__all__ = ["Lifecycle", "change"]


class Lifecycle(Connected, ABC):
    """A row in the register of workers: ready and suspended by turns, then stopped."""

    _heard_of_at = 0.0

    @property
    @abstractmethod
    def worker_id(self) -> int | None:
        """The id of the worker's row; None before the first awaited call has registered it."""

    @abstractmethod
    def _working(self) -> AbstractAsyncContextManager[tuple[AsyncQueueService, int]]:
        """One transaction of this worker, registered, with its id."""

    async def heartbeat(self) -> None:
        """Say that this worker lives. Its other calls say so too, when it is time.

        Raises:
            WorkerNotReady: It was stopped, by itself or for its silence.
        """
        async with self._working() as (service, id_):
            await service.workers.heartbeat(id_)

    async def _heard_of(self, service: AsyncQueueService, id: int) -> None:
        """Let a call say that this worker lives, unless another has said so just now."""
        interval = self._database.settings.heartbeat_interval_seconds
        if time.monotonic() - self._heard_of_at < interval:
            return
        self._heard_of_at = time.monotonic()  # before it is: calls at the same time need not
        # One that was stopped learns that when it asks for messages; what it holds it may settle.
        with suppress(WorkerNotReady):
            await service.workers.heartbeat(id)

    async def is_healthy(self, max_age: Seconds = 60) -> bool:
        """Return whether it is not stopped, and was heard of in the last ``max_age`` seconds."""
        async with self._working() as (service, id_):
            known = await service.workers.health(silent_for=max_age)
            return any(one.healthy for one in known if one.worker.id == id_)

    async def status(self) -> WorkerStatus:
        """Return what the register says that this worker is doing."""
        async with self._working() as (service, id_):
            return WorkerStatus((await service.workers.get(id_)).status)

    async def suspend(self) -> None:
        """Take no more messages until `resume`.

        Raises:
            InvalidStateTransition: It is not ready.
        """
        async with self._working() as (service, id_):
            await change(service, self._database.models, id_, WorkerStatus.Suspended)

    async def resume(self) -> None:
        """Take messages again.

        Raises:
            InvalidStateTransition: It is not suspended.
        """
        async with self._working() as (service, id_):
            await change(service, self._database.models, id_, WorkerStatus.Ready)

    async def shutdown(self) -> None:
        """Stop for good. Leaving ``async with`` does it from any state, and gives leases back.

        Raises:
            InvalidStateTransition: It is not suspended.
            WorkerHasPendingMessages: It still holds messages.
        """
        async with self._working() as (service, id_):
            await change(service, self._database.models, id_, WorkerStatus.Stopped)


_ORIGINS = {
    WorkerStatus.Suspended: WorkerStatus.Ready,
    WorkerStatus.Ready: WorkerStatus.Suspended,
    WorkerStatus.Stopped: WorkerStatus.Suspended,
}


async def change(service: AsyncQueueService, models: Models, id: int, target: WorkerStatus) -> None:
    """Move a worker to another state, by the one way that leads there."""
    origin = (await service.workers.get(id)).status
    if origin != _ORIGINS[target]:
        raise InvalidStateTransition(origin, target)
    match target:
        case WorkerStatus.Suspended:
            await service.workers.suspend(id)
        case WorkerStatus.Ready:
            await service.workers.resume(id)
        case WorkerStatus.Stopped:
            if held := await paging.held_by(service, models, id):
                raise WorkerHasPendingMessages(id, [message.id for message in held])
            await service.workers.stop(id)

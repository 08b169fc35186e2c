"""`Admin`: the tables, the queues, the dead letters and everybody's workers."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .. import migrations
from .._core import states
from .._core.scope import Context, Scope
from .._core.tables import tables_of
from ..aio import AsyncQueueService
from ..doctor.catalog import installed
from ..errors import MessageNotFound as CoreMessageNotFound
from ..errors import QueueNotFound as CoreQueueNotFound
from ..errors import SchemaVersionError, WorkerNotReady
from ..migrations import schemas
from ..models import Models
from ..service import QueueService
from ..types import Seconds
from .config import Config
from .database import Connected, Database
from .errors import (
    InvalidDsn,
    InvalidStateTransition,
    InvalidWorkerType,
    NotIntact,
    NotRegistered,
    QueueExists,
    QueueInUse,
    SchemaNotOurs,
    WorkerHasPendingMessages,
)
from .tables import (
    CHUNK,
    Archive,
    Messages,
    Queues,
    Workers,
    found_by,
    held_by,
    queue_ids,
)
from .types import (
    QueueInfo,
    QueueMessage,
    QueueMetrics,
    SystemStats,
    WorkerHealthStats,
    WorkerInfo,
    WorkerStats,
    WorkerStatus,
)

__all__ = ["Admin", "RegisteredWorker", "replay"]

_Table = TypeVar("_Table")

LIVE_SECONDS = 60.0
"""A worker with a heartbeat in the last 60 seconds counts as alive, at the least."""

LIVE_INTERVALS = 12
"""A worker with a heartbeat in the last 12 heartbeat intervals counts as alive too."""


class RegisteredWorker(Connected, ABC):
    """A row in the register of workers: ready or suspended, and at the end stopped."""

    _heartbeat_at = 0.0

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    @abstractmethod
    async def close(self) -> None:
        """Stop this worker, and close the connections that belong to it."""

    @property
    @abstractmethod
    def worker_id(self) -> int | None:
        """The id of the worker's row; None before the first awaited call has registered it."""

    @abstractmethod
    def _working(self) -> AbstractAsyncContextManager[tuple[AsyncQueueService, int]]:
        """Open a transaction of this worker, registered, with its id."""

    async def heartbeat(self) -> None:
        """Record a heartbeat. The other calls do so too, once an interval.

        Raises:
            WorkerNotReady: It was stopped, by itself or for its silence.
        """
        async with self._working() as (service, id_):
            await service.workers.heartbeat(id_)

    async def _heartbeat_if_due(self, service: AsyncQueueService, id: int) -> None:
        """Record a heartbeat, unless another call did within the interval."""
        interval = self._database.settings.heartbeat_interval_seconds
        if time.monotonic() - self._heartbeat_at < interval:
            return
        self._heartbeat_at = time.monotonic()  # first: concurrent calls need not do it again
        # A stopped worker is told so when it dequeues; it may still settle what it holds.
        with suppress(WorkerNotReady):
            await service.workers.heartbeat(id)

    async def is_healthy(self, max_age: Seconds = 60) -> bool:
        """Return whether it is not stopped, and had a heartbeat in the last ``max_age`` seconds."""
        async with self._working() as (service, id_):
            known = await service.workers.health(silent_for=max_age)
            return any(health.healthy for health in known if health.worker.id == id_)

    async def status(self) -> WorkerStatus:
        """Return this worker's status in the register."""
        async with self._working() as (service, id_):
            return WorkerStatus((await service.workers.get(id_)).status)

    async def suspend(self) -> None:
        """Take no more messages until `resume`.

        Raises:
            InvalidStateTransition: It is not ready.
        """
        async with self._working() as (service, id_):
            await _change_status(service, self._database.models, id_, WorkerStatus.Suspended)

    async def resume(self) -> None:
        """Take messages again.

        Raises:
            InvalidStateTransition: It is not suspended.
        """
        async with self._working() as (service, id_):
            await _change_status(service, self._database.models, id_, WorkerStatus.Ready)

    async def shutdown(self) -> None:
        """Stop for good. Leaving ``async with`` does it from any state, and gives leases back.

        Raises:
            InvalidStateTransition: It is not suspended.
            WorkerHasPendingMessages: It still holds messages.
        """
        async with self._working() as (service, id_):
            await _change_status(service, self._database.models, id_, WorkerStatus.Stopped)


_ORIGINS = {
    WorkerStatus.Suspended: WorkerStatus.Ready,
    WorkerStatus.Ready: WorkerStatus.Suspended,
    WorkerStatus.Stopped: WorkerStatus.Suspended,
}


async def _change_status(
    service: AsyncQueueService, models: Models, id: int, target: WorkerStatus
) -> None:
    """Move a worker to another state, from the only state that leads there."""
    origin = (await service.workers.get(id)).status
    if origin != _ORIGINS[target]:
        raise InvalidStateTransition(origin, target)
    match target:
        case WorkerStatus.Suspended:
            await service.workers.suspend(id)
        case WorkerStatus.Ready:
            await service.workers.resume(id)
        case WorkerStatus.Stopped:
            if held := await held_by(service, models, id):
                raise WorkerHasPendingMessages(id, [message.id for message in held])
            await service.workers.stop(id)


class Admin(RegisteredWorker):
    """The operations that are not about a single message; see `Producer` and `Consumer`.

    Nothing connects before the first awaited call. Each call is one transaction of its own, and
    is committed when it returns. Leaving ``async with`` stops its worker, if it registered one,
    and closes the connections; without, they are closed when the event loop ends.

    Args:
        dsn: A PostgreSQL URL, or a `Config`. Psycopg is the driver unless it names asyncpg.
        schema: The schema of the tables; default: the Config's.
    """

    def __init__(self, dsn: str | Config, schema: str | None = None) -> None:
        if isinstance(dsn, Config):
            config = dsn
        elif isinstance(dsn, str):
            config = Config(dsn)
        else:
            raise InvalidDsn(f"Admin takes a DSN or a Config, not a {type(dsn).__name__}")
        if schema is not None:
            config = Config(config.settings, schema)
        super().__init__(Database(config.settings))
        self._worker_id: int | None = None

    def __repr__(self) -> str:
        return f"Admin({self._database.settings!r})"

    async def __aenter__(self) -> Self:
        return self

    async def close(self) -> None:
        """Stop this Admin's worker, if any, and close the connections of this event loop."""
        try:
            if self._worker_id is not None:
                async with self._database.service() as service:
                    await service.workers.stop(self._worker_id)
        finally:
            await self._database.close()

    # A worker of its own

    @property
    def worker_id(self) -> int | None:
        """The id that `register` gave it, or None."""
        return self._worker_id

    async def register(self, hostname: str, port: int) -> WorkerInfo:
        """Register this Admin as a worker that works on no queue, for people to see.

        Registering again is another start, under another id.
        """
        async with self._service() as service:
            info = await service.workers.register(
                "admin", hostname=hostname, port=port, pid=os.getpid()
            )
        self._worker_id = info.id
        return WorkerInfo.of({}, info)

    async def delete_self(self) -> None:
        """Stop this Admin's worker and delete its row."""
        async with self._service() as service:
            await service.workers.stop(self._own_id())
            await service.workers.delete(self._own_id())
        self._worker_id = None

    def _live_seconds(self) -> float:
        """Return the longest silence of a worker that counts as alive."""
        return max(LIVE_SECONDS, LIVE_INTERVALS * self.settings.heartbeat_interval_seconds)

    def _own_id(self) -> int:
        if self._worker_id is None:
            raise NotRegistered
        return self._worker_id

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[AsyncQueueService]:
        async with super()._service() as service:
            if self._worker_id is not None:
                await self._heartbeat_if_due(service, self._worker_id)
            yield service

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[tuple[AsyncQueueService, int]]:
        async with self._service() as service:
            yield service, self._own_id()

    # The tables

    async def install(self) -> None:
        """Create the tables, or upgrade them to this release's version, if they need it.

        These are the steps of a host's migration. Where the tables belong to a host's Alembic
        history, their version is checked instead: it is for that history to change them.

        Raises:
            SchemaNotOurs: A host's Alembic history has to create or upgrade them.
            SchemaVersionError: A newer release made them.
        """
        settings, models = self.settings, self._database.models
        async with self._database.connection() as connection:
            await connection.run_sync(_install, settings.schema, models)
        await self._database.register_pending()

    async def uninstall(self) -> None:
        """Drop the tables and all that they hold; do nothing if there are none.

        Raises:
            SchemaNotOurs: They belong to a host's Alembic history.
        """
        self._database.pending.clear()
        async with self._database.connection() as connection:
            await connection.run_sync(_uninstall, self.settings.schema)

    async def verify(self) -> None:
        """Raise unless the tables exist, have the right version, and are consistent.

        Raises:
            SchemaVersionError: There is no queue schema, or it is too old or too new.
            NotIntact: Tables are missing, or rows refer to missing rows.
        """
        await self._database.register_pending()
        async with self._database.session() as session:
            await session.run_sync(_verify, self.settings.schema, self._database.models)

    # Queues

    async def create_queue(self, name: str) -> QueueInfo:
        """Create a queue whose messages get ``max_read_ct`` attempts.

        Raises:
            QueueExists: A queue of this name exists.
        """
        async with self._database.service() as service:
            try:
                await service.queues.get(name)
            except CoreQueueNotFound:
                limit = self.settings.max_read_ct
                info = QueueInfo.of(await service.queues.create(name, max_read_ct=limit))
            else:
                raise QueueExists(name)
        await self._database.register_pending()  # after the queue, which they may need
        return info

    async def get_queue(self, name: str) -> QueueInfo:
        """Return a queue, or raise `QueueNotFound` with similar names."""
        async with self._service() as service:
            return QueueInfo.of(await service.queues.get(name))

    async def delete_queue(self, name: str, *, force: bool = False) -> None:
        """Delete a queue.

        Args:
            name: The queue.
            force: Delete its messages and its archive first, 1,000 rows a transaction.

        Raises:
            QueueInUse: Workers with a recent heartbeat work on it.
            QueueNotEmpty: It holds messages, or history, and ``force`` is False.
        """
        async with self._service() as service:
            await service.queues.get(name)
            known = await service.workers.health(silent_for=self._live_seconds())
            users = [
                health.worker.id
                for health in known
                if health.healthy and name in health.worker.queues
            ]
            if users:
                raise QueueInUse(name, users)
            if not force:
                await service.queues.delete(name)
                return
        await self.purge_queue(name)
        await Archive(self._database).purge(name)
        async with self._service() as service:
            await service.queues.delete(name, force=True)

    async def purge_queue(self, name: str) -> int:
        """Delete the live messages of a queue, leased ones too, and return how many.

        Its archive and its workers stay, and so do messages enqueued after the call began. Each
        1,000 are a transaction. Messages that are requeued meanwhile, or committed by a
        transaction that was open at the beginning, may be deleted as well.
        """
        async with self._service() as service:
            await service.queues.get(name)
            newest = await service.messages.find(name, limit=1, newest_first=True)
        total = 0
        while newest:
            async with self._service() as service:
                purged = await service.queues.purge(name, limit=CHUNK, up_to=newest[0].id)
            total += purged
            if purged < CHUNK:
                break
        return total

    async def _table(self, kind: Callable[[Database], _Table]) -> _Table:
        await self._database.register_pending()
        return kind(self._database)

    async def get_queues(self) -> Queues:
        """Return the table of queues."""
        return await self._table(Queues)

    async def get_messages(self) -> Messages:
        """Return the table of live messages, of all queues."""
        return await self._table(Messages)

    async def get_archive(self) -> Archive:
        """Return the table of settled messages, of all queues."""
        return await self._table(Archive)

    async def get_workers(self) -> Workers:
        """Return the register of workers."""
        return await self._table(Workers)

    # Dead letters, and the workers of others

    async def reclaim_messages(
        self, queue_name: str, older_than_seconds: Seconds | None = None
    ) -> int:
        """Stop the silent workers of a queue, and make the messages that they hold visible.

        It only shortens the wait: the messages of a dead worker become visible when their leases
        expire. Attempts stay counted, and a late settle of such a worker changes nothing.

        Args:
            queue_name: The queue.
            older_than_seconds: The silence beyond which a worker counts as dead. Default: 60
                seconds or 12 heartbeat intervals, whichever is longer, and then only workers that
                hold messages count, because an idle producer sends no heartbeat. A consumer sends
                one with its calls and, while it holds messages, from a task of its own; so
                only a consumer that blocks the event loop for that long is considered dead.

        Returns:
            How many messages were made visible.
        """
        silence = self._live_seconds() if older_than_seconds is None else older_than_seconds
        async with self._service() as service:
            await service.queues.get(queue_name)
            return await service.workers.reclaim(
                silent_for=silence, queue=queue_name, holding=older_than_seconds is None
            )

    async def dlq(self) -> list[int]:
        """Move exhausted messages, whose leases have expired, to the archive as dead letters.

        Returns:
            The ids of the messages that were in that state when the call began. `replay_dlq`
            takes the archive's id: `Archive.list_dlq_messages` has both.
        """
        async with self._service() as service:
            queues = [queue.name for queue in await service.queues.list()]
        moved: list[int] = []
        for queue in queues:
            moved += await self._dead_letter_exhausted(queue)
        return moved

    async def _dead_letter_exhausted(self, queue: str) -> list[int]:
        archived_id = self._database.models.archived.id
        async with self._service() as service:
            exhausted = found_by(service.messages.find, queue=queue, state="exhausted")
            ids = [message.id async for message in exhausted]
        for _ in range(0, len(ids), CHUNK):
            async with self._service() as service:
                await service.archived.bury(queue, limit=CHUNK)
        moved: list[int] = []
        for start in range(0, len(ids), CHUNK):
            where = archived_id.in_(ids[start : start + CHUNK])
            async with self._service() as service:
                find = service.archived.find
                dead = found_by(find, queue=queue, outcome="dead", where=where)
                moved += [message.id async for message in dead]
        return moved

    async def replay_dlq(self, archived_id: int) -> QueueMessage | None:
        """Requeue a dead letter with its attempts reset, under its original id.

        Returns:
            The message, visible now; None when no dead letter has this archive id.
        """
        async with self._service() as service:
            return await replay(service, archived_id)

    async def get_worker_messages(self, worker_id: int) -> list[QueueMessage]:
        """Return the messages that a worker holds."""
        async with self._service() as service:
            await service.workers.get(worker_id)
            ids = await queue_ids(service)
            held = await held_by(service, self._database.models, worker_id)
            return [QueueMessage.of(ids[message.queue], message) for message in held]

    async def release_worker_messages(self, worker_id: int) -> int:
        """Make the messages that a worker holds visible at once, and return how many.

        Raises:
            InvalidWorkerType: It is an admin's worker, which works on no queue.
        """
        async with self._service() as service:
            if not (await service.workers.get(worker_id)).queues:
                raise InvalidWorkerType(worker_id)
            return await service.workers.release_leases(worker_id)

    async def purge_old_workers(self, older_than: Seconds) -> int:
        """Delete the rows of workers that stopped longer ago than this and hold no messages."""
        async with self._service() as service:
            return await service.workers.purge(older_than=older_than)

    async def delete_worker(self, worker_id: int) -> None:
        """Delete the row of a worker that is stopped.

        Raises:
            WorkerInUse: It is not stopped, or still holds messages.
        """
        async with self._service() as service:
            await service.workers.delete(worker_id)

    # Counts: these lock and change nothing

    async def queue_metrics(self, name: str) -> QueueMetrics:
        """Count the messages of a queue by state; see `pgqrs_sa.QueueMetrics` for the states."""
        unleased = [sa.not_(states.leased(self._database.models.message))]
        async with self._service() as service:
            counts = await service.messages.metrics(name)
            find = service.messages.find
            oldest = await find(name, where=unleased, limit=1, content=False)
            newest = await find(name, limit=1, newest_first=True, content=False)
        return QueueMetrics.of(
            counts,
            oldest_pending_message=oldest[0].enqueued_at if oldest else None,
            newest_message=newest[0].enqueued_at if newest else None,
        )

    async def all_queues_metrics(self) -> list[QueueMetrics]:
        """Count the messages of each queue by state, ordered by the queue's name."""
        async with self._service() as service:
            return [QueueMetrics.of(counts) for counts in await service.messages.all_metrics()]

    async def system_stats(self) -> SystemStats:
        """Count everything; the archive as in `QueueMetrics`, each outcome up to a cap."""
        async with self._service() as service:
            metrics = await service.messages.all_metrics()
            workers = await service.workers.list()
        async with self._database.connection() as connection:
            stamp = await connection.run_sync(migrations.read_stamp, self.settings.schema)
        return SystemStats.of(metrics, workers, stamp.version)

    async def worker_health_stats(
        self,
        timeout: Seconds = 60,  # noqa: ASYNC109 - pgqrs' name for a silence
        group_by_queue: bool = False,  # noqa: FBT002 - pgqrs takes it by position
    ) -> list[WorkerHealthStats]:
        """Count the workers by state, and those without a heartbeat for ``timeout`` seconds."""
        async with self._service() as service:
            workers = await service.workers.list()
            health = await service.workers.health(silent_for=timeout)
        return WorkerHealthStats.all_of(workers, health, by_queue=group_by_queue)

    async def worker_stats(self, queue: str) -> WorkerStats:
        """Count the workers of a queue by state, and the messages that they hold."""
        async with self._service() as service:
            metrics = await service.messages.metrics(queue)
            workers = await service.workers.list(queue=queue)
            health = await service.workers.health()
        return WorkerStats.of(metrics, workers, health)


async def replay(
    service: AsyncQueueService, archived_id: int, queue: str | None = None
) -> QueueMessage | None:
    """Requeue a dead letter, of ``queue`` if that is given; return None if none has this id."""
    try:
        letter = await service.archived.get(archived_id)
    except CoreMessageNotFound:
        return None
    if letter.outcome != "dead" or queue not in (None, letter.queue):
        return None
    receipt = await service.archived.requeue(archived_id)
    queue_id = (await service.queues.get(letter.queue)).id
    return QueueMessage.of(queue_id, await service.messages.get(receipt.id))


def _install(connection: sa.Connection, schema: str | None, models: Models) -> None:
    """Create or upgrade the tables; only check them if a host's Alembic history owns them."""
    # Alembic is slow to import, and an extra: only install and uninstall need it.
    from ..migrations import install as steps  # noqa: PLC0415

    try:
        steps.install(connection, schema)
    except steps.HostHistory as refusal:
        try:
            migrations.check(connection, schemas.target(connection, schema), models=models)
        except SchemaVersionError:
            raise SchemaNotOurs(str(refusal)) from refusal


def _uninstall(connection: sa.Connection, schema: str | None) -> None:
    from ..migrations import install as steps  # noqa: PLC0415

    try:
        steps.uninstall(connection, schema)
    except steps.HostHistory as refusal:
        raise SchemaNotOurs(str(refusal)) from refusal


def _verify(session: Session, schema: str | None, models: Models) -> None:
    migrations.check(session.connection(), schema, models=models)
    context = Context.of(models, None, None, allow_autocommit=False)
    existing = installed(Scope(session, context), schema)
    if missing := [table.name for table in tables_of(models) if table.name not in existing]:
        raise NotIntact({f"missing table {name}": 1 for name in missing})
    counts = QueueService(session, models=models).orphans()
    if findings := {kind: count for kind, count in counts.items() if count}:
        raise NotIntact(findings)

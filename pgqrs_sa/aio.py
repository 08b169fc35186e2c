"""The queue, inside an ``AsyncSession``: `QueueService`, awaited.

Each method here is the synchronous method of the same name, which `awaited` runs through
``AsyncSession.run_sync``: flushes, binds and session events are those of the application, with any
async driver. Its parameters, results and errors are documented there, and its signature is what
``help()``, ``inspect.signature()`` and type checkers show here.

Needs greenlet, as SQLAlchemy's own asyncio extension does: ``pip install 'pgqrs-sa[asyncio]'``.

A task that is cancelled in the middle of a statement leaves its session in need of a rollback, as
any statement would; close the session, and a lease that was just being taken is not.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

from . import extras, resources
from ._core.sessions import asynchronous
from .codecs import Codec
from .models import Models
from .service import QueueService

__all__ = [
    "AsyncArchived",
    "AsyncMessages",
    "AsyncQueueService",
    "AsyncQueues",
    "AsyncWorkers",
    "Awaited",
    "awaited",
]

extras.require("AsyncQueueService")  # SQLAlchemy 2.0 finds out only when it is used

_P = ParamSpec("_P")
_S = TypeVar("_S")
_T = TypeVar("_T")


class Awaited(Generic[_S]):
    """A synchronous object whose methods are awaited in an ``AsyncSession``.

    Args:
        session: The session.
        sync: The object that works in ``session.sync_session``.
    """

    def __init__(self, session: AsyncSession, sync: _S) -> None:
        self._session = session
        self._sync = sync


def awaited(
    method: Callable[Concatenate[_S, _P], _T],
) -> Callable[Concatenate[Awaited[_S], _P], Coroutine[Any, Any, _T]]:
    """Return a method of an `Awaited` that runs a method of its synchronous object.

    The name, the documentation and the signature are those of ``method``.
    """

    @wraps(method)
    async def call(self: Awaited[_S], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._session.run_sync(lambda _: method(self._sync, *args, **kwargs))

    call.__module__ = __name__
    call.__qualname__ = f"Async{method.__qualname__}"
    return call


class AsyncQueues(Awaited[resources.Queues]):
    """`pgqrs_sa.resources.Queues`, awaited: each method is documented there."""

    create = awaited(resources.Queues.create)
    sync = awaited(resources.Queues.sync)
    get = awaited(resources.Queues.get)
    list = awaited(resources.Queues.list)
    update = awaited(resources.Queues.update)
    pause = awaited(resources.Queues.pause)
    resume = awaited(resources.Queues.resume)
    purge = awaited(resources.Queues.purge)
    delete = awaited(resources.Queues.delete)


class AsyncMessages(Awaited[resources.Messages]):
    """`pgqrs_sa.resources.Messages`, awaited: each method is documented there."""

    get = awaited(resources.Messages.get)
    peek = awaited(resources.Messages.peek)
    find = awaited(resources.Messages.find)
    count = awaited(resources.Messages.count)
    metrics = awaited(resources.Messages.metrics)
    all_metrics = awaited(resources.Messages.all_metrics)
    cancel = awaited(resources.Messages.cancel)
    try_cancel = awaited(resources.Messages.try_cancel)
    cancel_where = awaited(resources.Messages.cancel_where)
    reschedule = awaited(resources.Messages.reschedule)


class AsyncArchived(Awaited[resources.Archived]):
    """`pgqrs_sa.resources.Archived`, awaited: each method is documented there."""

    get = awaited(resources.Archived.get)
    find = awaited(resources.Archived.find)
    count = awaited(resources.Archived.count)
    bury = awaited(resources.Archived.bury)
    requeue = awaited(resources.Archived.requeue)
    requeue_many = awaited(resources.Archived.requeue_many)
    delete = awaited(resources.Archived.delete)
    prune = awaited(resources.Archived.prune)


class AsyncWorkers(Awaited[resources.Workers]):
    """`pgqrs_sa.resources.Workers`, awaited: each method is documented there."""

    register = awaited(resources.Workers.register)
    get = awaited(resources.Workers.get)
    list = awaited(resources.Workers.list)
    heartbeat = awaited(resources.Workers.heartbeat)
    suspend = awaited(resources.Workers.suspend)
    resume = awaited(resources.Workers.resume)
    stop = awaited(resources.Workers.stop)
    health = awaited(resources.Workers.health)
    reclaim = awaited(resources.Workers.reclaim)
    release_leases = awaited(resources.Workers.release_leases)
    delete = awaited(resources.Workers.delete)
    purge = awaited(resources.Workers.purge)


class AsyncQueueService(Awaited[QueueService]):
    """`QueueService` for an ``AsyncSession``: the same methods, awaited, with the same parameters.

    Raises:
        InvalidArgument: ``session`` is something else, or not bound to PostgreSQL.
    """

    def __init__(
        self,
        session: AsyncSession | async_scoped_session[Any],
        *,
        models: Models | None = None,
        codec: Codec | None = None,
        worker: object = None,
        allow_autocommit: bool = False,
        notify: bool = False,
        cursor_key: str | None = None,
        create_queues: bool = False,
    ) -> None:
        current = asynchronous(session)
        service = QueueService(
            current.sync_session,
            models=models,
            codec=codec,
            worker=worker,
            allow_autocommit=allow_autocommit,
            notify=notify,
            cursor_key=cursor_key,
            create_queues=create_queues,
        )
        super().__init__(current, service)

    def __repr__(self) -> str:
        return self._sync._scope.represented(type(self))  # noqa: SLF001 - made together

    @property
    def session(self) -> AsyncSession:
        """The session; of a registry, the one that was current when the service was made."""
        return self._session

    @property
    def queues(self) -> AsyncQueues:
        """See `QueueService.queues`."""
        return AsyncQueues(self._session, self._sync.queues)

    @property
    def messages(self) -> AsyncMessages:
        """See `QueueService.messages`."""
        return AsyncMessages(self._session, self._sync.messages)

    @property
    def archived(self) -> AsyncArchived:
        """See `QueueService.archived`."""
        return AsyncArchived(self._session, self._sync.archived)

    @property
    def workers(self) -> AsyncWorkers:
        """See `QueueService.workers`."""
        return AsyncWorkers(self._session, self._sync.workers)

    check_schema = awaited(QueueService.check_schema)
    orphans = awaited(QueueService.orphans)
    enqueue = awaited(QueueService.enqueue)
    enqueue_many = awaited(QueueService.enqueue_many)
    enqueue_from = awaited(QueueService.enqueue_from)
    dequeue = awaited(QueueService.dequeue)
    archive = awaited(QueueService.archive)
    archive_many = awaited(QueueService.archive_many)
    try_archive = awaited(QueueService.try_archive)
    try_archive_many = awaited(QueueService.try_archive_many)
    delete = awaited(QueueService.delete)
    delete_many = awaited(QueueService.delete_many)
    try_delete = awaited(QueueService.try_delete)
    try_delete_many = awaited(QueueService.try_delete_many)
    extend = awaited(QueueService.extend)
    extend_many = awaited(QueueService.extend_many)
    try_extend = awaited(QueueService.try_extend)
    try_extend_many = awaited(QueueService.try_extend_many)
    release = awaited(QueueService.release)
    release_many = awaited(QueueService.release_many)
    try_release = awaited(QueueService.try_release)
    try_release_many = awaited(QueueService.try_release_many)
    fail = awaited(QueueService.fail)
    fail_many = awaited(QueueService.fail_many)
    try_fail = awaited(QueueService.try_fail)
    try_fail_many = awaited(QueueService.try_fail_many)

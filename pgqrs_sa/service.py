"""The queue, inside a session.

``QueueService(session)`` enqueues, leases and settles with the caller's session: in its
transaction, on its connection, after its pending flush. It never commits, rolls back, opens a
connection or catches an error of the database. It keeps no state: build one for each call::

    with Session(engine) as session, session.begin():
        session.add(Order(id=7))
        QueueService(session).enqueue("receipts", {"order": 7}, delay=5)

    with Session(engine) as session, session.begin():
        deliveries = QueueService(session).dequeue("receipts", limit=10)
    # The lease is committed: only now begin the work.
    for delivery in deliveries:
        with Session(engine) as session, session.begin():
            session.add(Sent(order=delivery.payload["order"]))
            QueueService(session).archive(delivery)     # LeaseLost rolls both back

Commit a lease before working on it: a transaction kept open while working keeps the rows locked,
and a crash would take the count of the attempt back. More is in ``service.queues`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.sql.expression import SelectBase

from . import migrations, resources
from ._core import enqueue, settle
from ._core import lease as lease_operations
from ._core.criteria import Criteria
from ._core.scope import Context, Scope
from ._core.sessions import synchronous
from ._core.sql import health
from .codecs import Codec
from .models import Models, models_of
from .types import Delivery, Failure, Item, Receipt, Seconds

__all__ = ["QueueService"]


class QueueService:
    """Enqueue, lease and settle in the caller's transaction.

    Args:
        session: Whose transaction everything here belongs to. Of a ``scoped_session``, such as
            Flask-SQLAlchemy's ``db.session``, it is the session that is current now: build a
            service for each request or task, as the registry does.
        models: The host's own classes. Default: the ready-made ones.
        codec: Converts payloads to JSON text and back. Default: strict standard JSON.
        worker: A registered worker (or its id), recorded as the producer of what is enqueued and
            the holder of what is leased here.
        allow_autocommit: Enqueue even on an AUTOCOMMIT connection, where a rollback would not
            take the message back.
        notify: Wake a consumer that waits, by NOTIFY. ``session.info["pgqrs_notify"] = True`` does
            it for all that the session enqueues, ``session.add(Message(...))`` included.
        cursor_key: Give each tenant a key of its own where row-level security is active for
            `dequeue`. A process remembers how far it has come in a queue, for each engine and key;
            without a key it remembers nothing then, and reads the queue from its beginning.
        create_queues: Create a queue that does not exist, with the table's defaults, when something
            is enqueued there; without it that is an error. Of this service's ``enqueue``,
            ``enqueue_many`` and ``enqueue_from``. ``session.info["pgqrs_create_queues"] = True``
            does it for ``session.add(Message(queue_name=...))``. The queue is part of the
            transaction: another one that creates it waits for the commit. Two that create the same
            queues in opposite order deadlock, and PostgreSQL ends one of them.

    Raises:
        InvalidArgument: ``session`` is something else, or not bound to PostgreSQL.
    """

    def __init__(
        self,
        session: Session | scoped_session[Any],
        *,
        models: Models | None = None,
        codec: Codec | None = None,
        worker: object = None,
        allow_autocommit: bool = False,
        notify: bool = False,
        cursor_key: str | None = None,
        create_queues: bool = False,
    ) -> None:
        current = synchronous(session)
        context = Context.of(
            models_of(models),
            codec,
            worker,
            allow_autocommit,
            notify=notify,
            cursor_key=cursor_key,
            create_queues=create_queues,
        )
        self._scope = Scope(current, context)

    def __repr__(self) -> str:
        return self._scope.represented(type(self))

    @property
    def session(self) -> Session:
        """The session; of a registry, the one that was current when the service was made."""
        return self._scope.session

    @property
    def queues(self) -> resources.Queues:
        """The queues themselves: create, pause, purge and so on."""
        return resources.Queues(self._scope)

    @property
    def messages(self) -> resources.Messages:
        """Messages that nobody needs a lease for: look, count, cancel, reschedule."""
        return resources.Messages(self._scope)

    @property
    def archived(self) -> resources.Archived:
        """What became of messages: browse, requeue, prune."""
        return resources.Archived(self._scope)

    @property
    def workers(self) -> resources.Workers:
        """The register of processes."""
        return resources.Workers(self._scope)

    def check_schema(self) -> None:
        """Raise unless the database's queue schema is the one that this release needs.

        Raises:
            SchemaVersionError: with the command that fixes it.
        """
        migrations.check(self._scope.session, models=self._scope.context.models)

    def orphans(self) -> dict[str, int]:
        """Count rows that refer to rows which are not there; in a sound database all are 0.

        Returns:
            ``messages_without_queue``, ``archived_without_queue`` and ``leases_without_worker``.
        """
        row = self._scope.execute(health.orphans(self._scope.tables)).one()
        return {name: int(count) for name, count in row._mapping.items()}  # noqa: SLF001

    def enqueue(
        self,
        queue: str,
        payload: Any,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
        priority: int = 0,
        headers: Mapping[str, Any] | None = None,
        key: str | None = None,
        max_read_ct: int | None = None,
    ) -> Receipt:
        """Put a message into a queue, visible to others when the caller commits.

        Args:
            queue: The name of a queue that exists.
            payload: Any strict JSON value; or objects that a handler's annotation reads back, see
                `pgqrs_sa.encoding`.
            delay: Seconds, or a timedelta, until it becomes visible.
            at: An aware datetime at which it becomes visible; one that has passed means now.
            priority: Lower goes first.
            headers: A dict stored with the payload, for tracing and routing.
            key: With a live message of the queue under this key, no second one is made. It is
                free again once that is settled: for longer, keep a unique column of your own.
            max_read_ct: Attempts before it is dead. Default: the queue's limit.

        Returns:
            Its id and time. If a live message has the key: those of that message, with
            ``duplicate=True``.

        Raises:
            QueueNotFound: with the names that come close.
            PayloadError: not strict JSON, or larger than the queue accepts.
            DelayError, InvalidArgument: for what else cannot be.
            NonAtomicEnqueue: the connection is in AUTOCOMMIT.
        """
        item = Item(payload, delay, at, priority, headers, key, max_read_ct)
        return enqueue.one(self._scope, queue, item)

    def enqueue_many(self, queue: str, items: Iterable[Any]) -> list[Receipt]:
        """Put many messages into a queue, one statement for each few thousand.

        Args:
            queue: The name of a queue that exists.
            items: Payloads, or `Item` values with options of their own, or both. Ids rise in
                their order; those with a key come after, in the order of the keys, so that two
                batches with the same keys cannot deadlock.

        Returns:
            The receipts in the order of the items. For an empty list it returns an empty list, and
            sends no statement, not even to check that the queue exists. The same applies to all
            methods that end in ``_many``.

        Raises:
            InvalidArgument: like every error here, one item is wrong. Its place is named, and
                nothing was sent.
        """
        return enqueue.many(self._scope, queue, items)

    def enqueue_from(self, queue: str, query: SelectBase) -> int:
        """Put a message into a queue for each row of a query, as INSERT … SELECT.

        Args:
            queue: The name of a queue that exists.
            query: A SELECT of one column, the payload; or of columns labelled ``payload`` and
                any of ``delay`` (an interval, or seconds), ``at``, ``priority``, ``headers``,
                ``key``, ``max_read_ct``. What is not JSON becomes JSON as ``to_jsonb`` does it.

        Returns:
            How many messages were made; rows whose key is live already make none.
        """
        return enqueue.from_query(self._scope, queue, query)

    def dequeue(
        self,
        queue: str,
        limit: int = 1,
        *,
        lease: Seconds | None = None,
        worker: object = None,
        where: Criteria = None,
    ) -> list[Delivery]:
        """Lease up to ``limit`` visible messages and count the attempt.

        Args:
            queue: The name of a queue.
            limit: How many at most, 1 or more.
            lease: The length of the lease from the start of the statement: seconds, or a
                timedelta. Default: the queue's ``lease_seconds``.
            worker: The registered worker (or its id) that leases. Default: the service's.
            where: Criteria on the message class, all of which must hold.

        Returns:
            The deliveries in queue order: by priority, then by the time they became visible, then
            by id. None when nothing is visible, or the queue is paused. A dequeue that finds
            nothing also makes dead letters of messages whose attempts are used up, and whose
            last holder never settled them; so does `Archived.bury`.
            A message that cannot be decoded becomes a dead letter instead of a delivery, in this
            transaction. If there are only such messages, up to 100 leases are tried for others.

        Raises:
            QueueNotFound, WorkerNotFound, WorkerNotReady.
        """
        return lease_operations.dequeue(self._scope, queue, limit, lease, worker, where)

    def archive(
        self,
        delivery: Delivery,
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> None:
        """Settle a delivery and keep the message in the archive.

        Args:
            delivery: What `dequeue` gave.
            outcome: ``discarded`` for a message that is given up on purpose.
            reason: Kept with it.

        Raises:
            LeaseLost: somebody else holds or has settled it; nothing was changed.
        """
        self.archive_many([delivery], outcome=outcome, reason=reason)

    def archive_many(
        self,
        deliveries: Iterable[Delivery],
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> None:
        """Archive all of these deliveries, or none: see `archive`."""
        settle.archive(self._scope, deliveries, outcome, reason, strict=True)

    def try_archive(
        self,
        delivery: Delivery,
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> bool:
        """Archive, and return whether the lease was still held: see `archive`."""
        return self.try_archive_many([delivery], outcome=outcome, reason=reason)[0]

    def try_archive_many(
        self,
        deliveries: Iterable[Delivery],
        *,
        outcome: Literal["archived", "discarded"] = "archived",
        reason: str | None = None,
    ) -> list[bool]:
        """Archive those that are still held, and say of each whether it was."""
        return settle.archive(self._scope, deliveries, outcome, reason, strict=False)

    def delete(self, delivery: Delivery) -> None:
        """Settle a delivery and keep nothing of it.

        Raises:
            LeaseLost: somebody else holds or has settled it; nothing was changed.
        """
        self.delete_many([delivery])

    def delete_many(self, deliveries: Iterable[Delivery]) -> None:
        """Delete all of these deliveries, or none: see `delete`."""
        settle.delete(self._scope, deliveries, strict=True)

    def try_delete(self, delivery: Delivery) -> bool:
        """Delete, and return whether the lease was still held."""
        return self.try_delete_many([delivery])[0]

    def try_delete_many(self, deliveries: Iterable[Delivery]) -> list[bool]:
        """Delete those that are still held, and say of each whether it was."""
        return settle.delete(self._scope, deliveries, strict=False)

    def extend(self, delivery: Delivery, lease: Seconds) -> Delivery:
        """Keep a delivery for longer.

        Args:
            delivery: What `dequeue` gave, or an earlier `extend`.
            lease: Seconds, or a timedelta, from now (not from the old end).

        Returns:
            The delivery with its new ``vt``; the old one settles as well as it.

        Raises:
            LeaseLost: somebody else holds or has settled it; nothing was changed.
        """
        return self.extend_many([delivery], lease)[0]

    def extend_many(self, deliveries: Iterable[Delivery], lease: Seconds) -> list[Delivery]:
        """Extend all of these deliveries, or none: see `extend`."""
        kept = settle.extend(self._scope, deliveries, lease, strict=True)
        return [delivery for delivery in kept if delivery is not None]

    def try_extend(self, delivery: Delivery, lease: Seconds) -> bool:
        """Extend, and return whether the lease was still held."""
        return self.try_extend_many([delivery], lease)[0]

    def try_extend_many(self, deliveries: Iterable[Delivery], lease: Seconds) -> list[bool]:
        """Extend those that are still held, and say of each whether it was."""
        kept = settle.extend(self._scope, deliveries, lease, strict=False)
        return [delivery is not None for delivery in kept]

    def release(self, delivery: Delivery, *, delay: Seconds = 0) -> None:
        """Give a delivery back, without charging the attempt.

        Args:
            delivery: What `dequeue` gave.
            delay: Seconds, or a timedelta, until it is visible again.

        Raises:
            LeaseLost: somebody else holds or has settled it; nothing was changed.
        """
        self.release_many([delivery], delay=delay)

    def release_many(self, deliveries: Iterable[Delivery], *, delay: Seconds = 0) -> None:
        """Release all of these deliveries, or none: see `release`."""
        settle.release(self._scope, deliveries, delay, strict=True)

    def try_release(self, delivery: Delivery, *, delay: Seconds = 0) -> bool:
        """Release, and return whether the lease was still held."""
        return self.try_release_many([delivery], delay=delay)[0]

    def try_release_many(self, deliveries: Iterable[Delivery], *, delay: Seconds = 0) -> list[bool]:
        """Release those that are still held, and say of each whether it was."""
        return settle.release(self._scope, deliveries, delay, strict=False)

    def fail(
        self,
        delivery: Delivery,
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> Failure:
        """Settle a delivery that went wrong: try it again later, or bury it.

        Args:
            delivery: What `dequeue` gave.
            error: Kept as the message's ``last_error``, at most 8192 characters of it.
            delay: Seconds, or a timedelta, until the next attempt. Default: `DEFAULT_BACKOFF` for
                the number of attempts.
            reason: Why it is dead, if it is. Default: that its attempts are used up.
            dead: Make it a dead letter even if attempts are left.

        Returns:
            Whether it is dead, and otherwise when it is tried again.

        Raises:
            LeaseLost: somebody else holds or has settled it; nothing was changed.
        """
        return self.fail_many([delivery], error, delay=delay, reason=reason, dead=dead)[0]

    def fail_many(
        self,
        deliveries: Iterable[Delivery],
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> list[Failure]:
        """Fail all of these deliveries, or none: see `fail`."""
        done = settle.fail(self._scope, deliveries, error, delay, reason, dead, strict=True)
        return [delivery for delivery in done if delivery is not None]

    def try_fail(
        self,
        delivery: Delivery,
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> bool:
        """Fail, and return whether the lease was still held."""
        return self.try_fail_many([delivery], error, delay=delay, reason=reason, dead=dead)[0]

    def try_fail_many(
        self,
        deliveries: Iterable[Delivery],
        error: BaseException | str,
        *,
        delay: Seconds | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> list[bool]:
        """Fail those that are still held, and say of each whether it was."""
        done = settle.fail(self._scope, deliveries, error, delay, reason, dead, strict=False)
        return [delivery is not None for delivery in done]

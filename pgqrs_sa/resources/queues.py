"""`service.queues`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from .. import validation
from .._core import wakeup
from .._core.queues import binds, create, execute_on, get, info
from .._core.scope import Resource, Scope
from .._core.sessions import expire_all_deleted, expire_deleted
from .._core.sql import queues as statements
from ..declared import DeclaredQueue, QueueSource, declared_in
from ..errors import InvalidArgument, PgqrsError, QueueNotEmpty
from ..types import QueueDifference, QueueInfo, QueueSettings, SyncedQueue

__all__ = ["Queues"]

_TRIES = 3
"""A queue that is neither created nor found was deleted in between, or is hidden from this role."""


class Queues(Resource):
    """The queues themselves."""

    def create(self, name: str, **settings: Unpack[QueueSettings]) -> QueueInfo:
        """Create a queue, or return the one that has the name already, as it is.

        Args:
            name: 1 to 128 of ``A-Z a-z 0-9 . _ : / -``, starting with a letter or a digit.
            settings: See `QueueSettings`; the table's default for those that are not given.
        """
        validation.validate_queue_name(name)
        return create(self._scope, name, validation.validate_queue_settings(settings))

    def sync(
        self, declared: QueueSource, *, update: bool = False, dry_run: bool = False
    ) -> builtins.list[SyncedQueue]:
        """Create the declared queues that are missing. Others stay as they are.

        One SELECT looks for them. If some are missing, one INSERT creates these, in the order of
        their names: any number of processes may do so at once. Call it when an application starts,
        in a transaction of its own: until that ends, another process that creates one of the same
        queues waits for it.

        Args:
            declared: A `DeclaredQueue`, a list of them, or a MetaData with `declare_queues`.
            update: Change the settings that differ from the declared ones, as `update` does.
            dry_run: Change nothing, and report what would be done.

        Returns:
            A `SyncedQueue` for each of them, by name.

        Raises:
            InvalidArgument: something else is in the list, or two of one name differ.
        """
        wanted = declared_in(declared)
        found = _found(self._scope, wanted)
        missing = [queue for queue in wanted if queue.name not in found]
        if missing and not dry_run:
            found |= _create_missing(self._scope, missing)
        return [
            _compared(self._scope, queue, found[queue.name], update=update and not dry_run)
            if queue.name in found
            else SyncedQueue(queue.name, "missing" if dry_run else "created")
            for queue in wanted
        ]

    def get(self, name: str) -> QueueInfo:
        """Return a queue, or raise `QueueNotFound`."""
        return get(self._scope, name)

    def list(self) -> builtins.list[QueueInfo]:
        """Return all queues by name."""
        rows = self._scope.execute(statements.everything(self._scope.tables))
        return [info(row) for row in rows]

    def update(self, name: str, **settings: Unpack[QueueSettings]) -> QueueInfo:
        """Change the settings that are given; see `QueueSettings`.

        A new ``max_read_ct`` holds for messages that were never leased yet.
        """
        given = validation.validate_queue_settings(settings)
        if not given:
            raise InvalidArgument("update needs at least one setting to change")
        validation.validate_queue_name(name)
        statement = statements.update(self._scope.tables, tuple(given))
        return execute_on(self._scope, statement, name, binds(name, given))

    def pause(self, name: str) -> QueueInfo:
        """Let nothing be leased until `resume`. Enqueueing and settling go on."""
        return execute_on(self._scope, statements.pause(self._scope.tables), name)

    def resume(self, name: str) -> QueueInfo:
        """Let messages be leased again."""
        scope = self._scope
        found = execute_on(scope, statements.resume(scope.tables), name)
        wakeup.mark_enqueued(scope.session, name, scope.context.mapper)
        return found

    def purge(
        self,
        name: str,
        *,
        limit: int | None = None,
        up_to: int | None = None,
        tokens: Mapping[int, int] | None = None,
    ) -> int:
        """Delete the live messages of a queue, held ones too; keep its archive and workers.

        Args:
            name: The queue.
            limit: Delete at most this many, the oldest first. Of a large queue, delete a few
                thousand at a time and commit in between.
            up_to: Delete only messages up to this id (default: all). Messages with such an id can
                still arrive: a requeue gives a message its old id back, and a transaction that is
                open now commits the ids that it has drawn already.
            tokens: Delete only these messages: the ``fencing_token`` of each by its id, as read
                before, in this transaction or another one. A message that has been leased or
                requeued since then has another token, and stays. So does everything that was not
                read. Takes neither ``limit`` nor ``up_to``: pass some thousands at a time.

        Returns:
            How many were deleted.

        Raises:
            QueueNotFound: there is no such queue.
            InvalidArgument: ``tokens`` is no mapping of ids to tokens, or is given with ``limit``
                or ``up_to``.
        """
        scope = self._scope
        values: dict[str, Any] = {"queue": name}
        if tokens is None:
            statement = statements.purge(scope.tables)
            values["limit"] = None if limit is None else validation.validate_limit(limit)
            values["up_to"] = None if up_to is None else validation.validate_id(up_to)
        else:
            if limit is not None or up_to is not None:
                raise InvalidArgument(
                    "tokens name the messages: give neither limit nor up_to with them"
                )
            statement = statements.purge_unchanged(scope.tables)
            values |= _read(tokens)
        get(scope, name)
        result: Any = scope.execute(statement, values)
        expire_all_deleted(scope.session, scope.context.models.message)
        return int(result.rowcount)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a queue. Commit at once: from its lock to the commit, every queue waits.

        A SHARE lock on the table of messages waits for all open transactions that have written
        to it. Until your commit it holds up every enqueue, lease, renewal and settlement, in any
        queue. So empty a large queue first, with `purge` and `Archive.prune` in transactions of
        their own, as `pgqrs queue delete --force` does, and set ``lock_timeout`` where writers
        stay open for long.

        A transaction in REPEATABLE READ or SERIALIZABLE whose snapshot still has the queue can
        enqueue into it afterwards; `pgqrs doctor` finds such a message.

        Args:
            name: The queue.
            force: Delete its live and archived messages with it.

        Raises:
            QueueNotEmpty: it holds messages, or history, and ``force`` is not given.
        """
        scope = self._scope
        get(scope, name)
        if not force:
            self._refuse_unless_empty(name)
        # Before anything is deleted: an enqueue that waits for a key which this transaction has
        # freed keeps its lock on the table, and the two would deadlock.
        scope.execute(statements.lock_messages(scope.tables))
        values = {"queue": name}
        if not force:
            self._refuse_unless_empty(name)  # sees what was being enqueued before the lock
        elif not scope.execute(statements.is_empty(scope.tables), values).scalar_one():
            self.purge(name)
            scope.execute(statements.delete_history(scope.tables), values)
            expire_all_deleted(scope.session, scope.context.models.archived)
        gone = scope.execute(statements.delete(scope.tables), values).scalars().all()
        expire_deleted(scope.session, scope.context.models.queue, gone)

    def _refuse_unless_empty(self, name: str) -> None:
        scope, values = self._scope, {"queue": name}
        if not scope.execute(statements.is_empty(scope.tables), values).scalar_one():
            held = scope.execute(statements.contents(scope.tables), values).one()
            raise QueueNotEmpty(name, held.messages, held.archived)


def _found(scope: Scope, declared: Sequence[DeclaredQueue]) -> dict[str, QueueInfo]:
    """Return those that exist. They need no INSERT, which needs a right of its own."""
    if not declared:
        return {}
    names = [queue.name for queue in declared]
    rows = scope.execute(statements.named(scope.tables), {"names": names})
    return {row.queue_name: info(row) for row in rows}


def _create_missing(scope: Scope, missing: Sequence[DeclaredQueue]) -> dict[str, QueueInfo]:
    """Create queues; return those that another process has created meanwhile."""
    statement = statements.create_missing(scope.tables.queue)
    found: dict[str, QueueInfo] = {}
    left = list(missing)
    for _ in range(_TRIES):
        created = scope.execute(statement, statements.columns_of(left)).scalars().all()
        left = [queue for queue in left if queue.name not in created]
        if not left:
            return found
        found |= _found(scope, left)
        left = [queue for queue in left if queue.name not in found]
        if not left:
            return found
    raise PgqrsError(
        f"the queue {left[0].name!r} can neither be created nor found: look for a row-level "
        "security policy on pgqrs_queues"
    )


def _compared(
    scope: Scope,
    declared: DeclaredQueue,
    found: QueueInfo,
    *,
    update: bool,
) -> SyncedQueue:
    differences = tuple(
        QueueDifference(setting, value, getattr(found, setting))
        for setting, value in declared.settings().items()
        if getattr(found, setting) != value
    )
    if not differences:
        return SyncedQueue(declared.name, "unchanged")
    if update:
        changed = {difference.setting: difference.declared for difference in differences}
        statement = statements.update(scope.tables, tuple(changed))
        execute_on(scope, statement, declared.name, binds(declared.name, changed))
    return SyncedQueue(declared.name, "updated" if update else "differs", differences)


def _read(tokens: object) -> dict[str, list[int]]:
    if not isinstance(tokens, Mapping):
        raise InvalidArgument(
            f"tokens must be a mapping of ids to fencing tokens, not a {type(tokens).__name__}"
        )
    return {
        "ids": [validation.validate_id(id_) for id_ in tokens],
        "tokens": [validation.validate_id(token, "token") for token in tokens.values()],
    }

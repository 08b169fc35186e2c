"""The rights that each kind of application needs, as GRANT statements, and none besides.

They are not a list to be kept in step by hand: each kind names the statements that it executes,
and what those read, insert, update and delete is read off them, column by column. A statement
that changes takes its grants along, and so do the columns that a host has added.

==============  =================================================================================
``producer``    enqueues, in every way, ``session.add`` included; sees no payload, not even its own,
                but the keys of all live messages
``consumer``    leases and settles, buries, prunes nothing; is registered and reclaims; it cannot
                enqueue, change payloads or queues, nor read what is archived; it can delete any
                live message, and stop any worker
``dashboard``   counts, and lists by ``find(content=False)``: no payloads, headers, keys or errors;
                also for the doctor, together with ``pg_read_all_stats``
``operator``    everything that the service offers, and no DDL
``migrator``    makes the tables, and owns them
==============  =================================================================================

The ids need no rights on their sequences. The fencing token does: a lease draws it by the name of
its sequence. Nothing here needs more than one role a kind of process; a process that is two of them
gets both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import next_value

from ._core.sql import (
    archive,
    enqueue,
    health,
    lease,
    queries,
    queues,
    settle,
    wakeup,
    workers,
)
from ._core.tables import Tables, tables_of
from .errors import InvalidArgument
from .models import Models, models_of

__all__ = ["ROLES", "RoleKind", "grants"]

RoleKind: TypeAlias = Literal["producer", "consumer", "dashboard", "operator", "migrator"]

ROLES: tuple[RoleKind, ...] = get_args(RoleKind)
"""The kinds, as `grants` takes them."""

_PRIVATE = {"payload", "headers", "dedup_key", "last_error", "reason"}
_VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_WHOLE = frozenset({"*"})

_Rights: TypeAlias = dict[sa.Table, dict[str, set[str]]]

# Not a driver's, whose style would double the percent signs of names.
_preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]


def grants(
    role_kind: RoleKind,
    grantee: str,
    schema: str | None = None,
    models: Models | None = None,
) -> list[str]:
    """Return the statements that let a role do what its kind needs.

    Args:
        role_kind: ``producer``, ``consumer``, ``dashboard``, ``operator`` or ``migrator``.
        grantee: The name of the role, which must exist.
        schema: The schema of the tables. Default: that of the models; if they have none, the
            search path of the role that runs the statements decides.
        models: The host's own classes, if it has any.

    Raises:
        InvalidArgument: there is no such kind.
    """
    if role_kind not in ROLES:
        raise InvalidArgument(f"no kind of role is called {role_kind!r}: {', '.join(ROLES)}")
    tables = tables_of(models_of(models))
    place = schema or tables.queue.schema
    to = f"TO {_preparer.quote(grantee)}"
    if role_kind == "migrator":
        where = "public" if place is None else place
        return [f"GRANT USAGE, CREATE ON SCHEMA {_preparer.quote(where)} {to};"]
    usage = [] if place is None else [f"GRANT USAGE ON SCHEMA {_preparer.quote(place)} {to};"]
    elements = [
        element for statement in _STATEMENTS[role_kind](tables) for element in _elements(statement)
    ]
    rights = _rights(elements)
    listed = [(table, rights[table]) for table in tables if table in rights]
    drawn = {element.sequence.name for element in elements if isinstance(element, next_value)}
    return [
        *usage,
        *(
            f"GRANT {_listed(verbs)} ON TABLE {_name(table.name, place)} {to};"
            for table, verbs in listed
        ),
        *(f"GRANT USAGE ON SEQUENCE {_name(name, place)} {to};" for name in sorted(drawn)),
    ]


def _name(relation: str, schema: str | None) -> str:
    name = _preparer.quote(relation)
    return name if schema is None else f"{_preparer.quote(schema)}.{name}"


def _listed(verbs: Mapping[str, set[str]]) -> str:
    found = []
    for verb in _VERBS:
        if columns := verbs.get(verb):
            names = ", ".join(_preparer.quote(name) for name in sorted(columns))
            found.append(verb if columns == _WHOLE else f"{verb} ({names})")
    return ", ".join(found)


def _rights(elements: Iterable[Any]) -> _Rights:
    """Return which columns of which tables some statements touch, by what they do to them."""
    rights: _Rights = defaultdict(lambda: defaultdict(set))
    for element in elements:
        table = _table(getattr(element, "table", None))
        if table is None:
            continue
        if isinstance(element, sa.Column):
            rights[table]["SELECT"].add(element.name)
        elif isinstance(element, sa.Insert):
            rights[table]["INSERT"] |= _written(element)
        elif isinstance(element, sa.Update):
            rights[table]["UPDATE"] |= _written(element)
        elif isinstance(element, sa.Delete):
            rights[table]["DELETE"] |= _WHOLE
    return rights


def _table(source: Any) -> sa.Table | None:
    """Return a table, which may go by another name in a statement; None for what is none."""
    if isinstance(source, sa.Alias):
        source = source.element
    return source if isinstance(source, sa.Table) else None


def _written(statement: Any) -> set[str]:
    """Return the columns that an INSERT or UPDATE names."""
    given = statement._values or {}  # noqa: SLF001 - nothing public tells them
    names = getattr(statement, "_select_names", None) or ()
    return {getattr(column, "name", column) for column in (*given, *names)}


def _elements(statement: Any) -> Iterator[Any]:
    """Yield all elements of a statement, including those that it refers to."""
    waiting, seen = [statement], {id(statement)}
    while waiting:
        root = waiting.pop()
        yield root
        for element in visitors.iterate(root):
            yield element
            yield from _unvisited(element)
            # A column of a CTE says where it comes from, but the visitor does not go there.
            source = getattr(element, "table", None)
            if source is not None and id(source) not in seen:
                seen.add(id(source))
                waiting.append(source)


def _unvisited(element: Any) -> Iterator[Any]:
    """Yield the columns that a visitor is not shown."""
    conflict = getattr(element, "_post_values_clause", None)
    yield from getattr(conflict, "inferred_target_elements", None) or ()


def _adds(tables: Tables) -> Iterator[Any]:
    """Yield what ``session.add(Message(...))`` executes.

    An INSERT of the mapper names each column that has no default of the server, but for
    ``leased_until``, which a producer may not set; it fetches the others.
    """
    queue, message, _, worker = tables
    plain = {c.name: None for c in message.c if c.server_default is None or c.name in _GIVEN}
    del plain["leased_until"]
    fetched = [column for column in message.c if column.server_default is not None]
    yield sa.insert(message).values(plain).returning(*fetched)
    yield from (enqueue.accepts(queue, message), enqueue.live_keys_by_queue_id(message))
    yield wakeup.visible(queue, message, worker, notify=True, inserted=True)


_GIVEN = {"priority", "vt"}


def _producer(tables: Tables) -> Iterator[Any]:
    for keyed in (False, True):
        yield enqueue.one(tables, keyed=keyed, notify=True)
        yield enqueue.many(tables, keyed=keyed, notify=True)
    yield enqueue.plain(tables, notify=True)
    yield from (enqueue.live_keys(tables), queues.get(tables), queues.names(tables.queue))
    yield from _adds(tables)


def _consumer(tables: Tables) -> Iterator[Any]:
    for by_worker in (False, True):
        yield lease.dequeue(tables, by_worker=by_worker)
    # Criteria of a dequeue may be on any column, and an EXISTS about a worker is on all of them.
    yield sa.select(*tables.message.c, *tables.worker.c)
    for builder in (
        settle.archive,
        settle.delete,
        settle.extend,
        partial(settle.release, delayed=True),
        settle.reschedule_failed,
        settle.whereabouts,
        archive.dead_letter_exhausted,
        queues.get,
        wakeup.waiting,
        *_REGISTER,
    ):
        yield builder(tables)
    yield queues.names(tables.queue)
    yield from (workers.set_status(tables, status) for status in ("suspended", "stopped"))


_REGISTER: tuple[Any, ...] = (
    workers.register,
    workers.get,
    workers.heartbeat,
    workers.health,
    partial(workers.stop_silent, in_queue=True, holding=True),
    workers.release_leases,
)


def _dashboard(tables: Tables) -> Iterator[Any]:
    queue, message, archived, worker = tables
    yield sa.select(*queue.c, *worker.c)
    for table in (message, archived):
        yield sa.select(*(column for column in table.c if column.name not in _PRIVATE))
    yield queries.metrics(tables, one_queue=False)
    yield from (health.backlog(tables), health.overview(tables), health.outflow(tables))


def _operator(tables: Tables) -> Iterator[Any]:
    """Yield statements that do all to all: an operator may use the whole service."""
    yield from _producer(tables)
    yield from _consumer(tables)
    for table in tables:
        yield sa.select(*table.c)
        yield sa.delete(table)
    settings = queues.SETTINGS
    yield from (queues.create(tables, settings), queues.update(tables, settings))
    yield from (queues.pause(tables), queues.resume(tables), archive.requeue(tables))
    # A requeue and a prune lock rows of the archive, for which one column's right is enough.
    yield sa.update(tables.archived).values(reason=None)
    # A queue is deleted while the table of messages is locked, which DELETE is enough for.
    yield sa.insert(tables.message).values({"id": 0, "enqueued_at": None, "read_ct": 0})


_STATEMENTS: Mapping[str, Any] = {
    "producer": _producer,
    "consumer": _consumer,
    "dashboard": _dashboard,
    "operator": _operator,
}

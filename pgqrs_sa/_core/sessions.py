"""The caller's session: unwrapped, connected, watched, and its objects kept in step.

A statement goes to the database of the session that has our tables, and a session may have several.

A lease, its settlement and the rows that belong to it must be in one database. A session with one
bind has no choice, and `is_plain` is all that it pays for. For the others:

- A ``ShardedSession`` is asked for the shards of each statement, and refused unless it names the
  same one for every statement.
- A transaction that has written the queue's tables in one database and anything in another is not
  atomic. It is refused before it commits: see `refuse_split`. Listeners of the host may still write
  after ours, so the last look is taken as the first of its connections commits: see `_watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Result, Row, event
from sqlalchemy.engine.base import NestedTransaction
from sqlalchemy.orm import InstanceState, Mapper, ORMExecuteState, Session, SessionTransaction
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key
from sqlalchemy.sql import Executable, visitors
from sqlalchemy.sql.expression import SelectBase
from sqlalchemy.util import immutabledict

from .. import dsns
from ..errors import InvalidArgument, NonAtomicEnqueue, SplitTransaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = [
    "ALLOW_SPLIT",
    "TOUCHED",
    "asynchronous",
    "bind_of",
    "connect",
    "execute",
    "expire_all_deleted",
    "expire_deleted",
    "flush_and_connect",
    "identity_token",
    "is_autocommit",
    "is_plain",
    "refuse_autocommit",
    "refuse_dialect",
    "refuse_foreign_tables",
    "refuse_split",
    "registry_of",
    "sync_loaded",
    "synchronous",
]

ALLOW_SPLIT = "pgqrs_allow_split"
"""Set this in ``session.info`` to commit messages in one database and rows in another."""

TOUCHED = "_pgqrs_touched"
"""Where ``session.info`` has the connections that the queue was used on, of this transaction."""

_WATCHED = "_pgqrs_watched"
"""Where ``session.info`` has what listens to the connections of this transaction."""

_BINDS = "binds" if hasattr(Session(), "binds") else "_Session__binds"  # before SQLAlchemy 2.1
_HAS_WRITTEN = sa.select(sa.func.pg_current_xact_id_if_assigned().is_not(None))


def is_plain(session: Session) -> bool:
    """Return whether all that a session does goes to its one bind."""
    return type(session).get_bind is Session.get_bind and not getattr(session, _BINDS)


def connect(session: Session, where: dict[str, Any], values: Any = None) -> Connection:
    """Return the connection of a session for a statement about our tables, in its transaction.

    Args:
        session: Any session.
        where: The bind arguments, with the mapper of the messages. The shard is added to them, and
            for a SELECT that writes in a CTE ``clause`` becomes what it writes.
        values: The parameters of the statement.

    Raises:
        InvalidArgument: it would run in several shards, or not on PostgreSQL.
    """
    if is_plain(session):
        return session.connection(bind_arguments=where)
    if isinstance(where.get("clause"), SelectBase):
        where["clause"] = _write_in(where["clause"])
    _add_shard(session, where, values)
    connection = session.connection(bind_arguments=where)
    refuse_dialect(connection)
    session.info.setdefault(TOUCHED, set()).add(connection)
    _watch(session)
    return connection


def flush_and_connect(
    session: Session, mapper: Mapper[Any], statement: Executable, values: Any
) -> tuple[Connection, dict[str, Any]]:
    """Flush what is pending; return the connection for a statement, and how it is got.

    The second is what ``bind_arguments`` takes.
    """
    # SQLAlchemy 2.0 flushes only before statements about mapped classes, 2.1 before all.
    session._autoflush()  # noqa: SLF001
    where = {"mapper": mapper, "clause": statement}
    return connect(session, where, values), where


def execute(
    session: Session,
    mapper: Mapper[Any],
    statement: Executable,
    values: Any = None,
    *,
    atomic_unless: str | None = None,
) -> Result[Any]:
    """Execute a statement about our tables in a session, after its pending flush.

    Args:
        session: Any session.
        mapper: Of the messages.
        statement: What to execute.
        values: Its parameters.
        atomic_unless: How the caller can allow a connection that commits each statement by itself.
            Such a connection is allowed if this is None.

    Raises:
        NonAtomicEnqueue: a rollback would not take it back.
    """
    connection, where = flush_and_connect(session, mapper, statement, values)
    if atomic_unless is not None:
        refuse_autocommit(connection, atomic_unless)
    if _is_customized(session):
        return session.execute(statement, values, bind_arguments=where)
    # The same as Session.execute() for a statement of Core, at two thirds of its cost.
    return connection.execute(statement, values)


def _is_customized(session: Session) -> bool:
    """Whether the application hooks or overrides ``Session.execute()``."""
    return bool(
        session.dispatch.do_orm_execute
        or getattr(session, "execution_options", None)  # since SQLAlchemy 2.1
        or type(session).execute is not Session.execute
    )


def _write_in(statement: SelectBase) -> sa.UpdateBase | SelectBase:
    """Return the INSERT, UPDATE or DELETE in a statement, or else the statement."""
    written = (part for part in visitors.iterate(statement) if isinstance(part, sa.UpdateBase))
    return next(written, statement)


def bind_of(session: Session, mapper: Mapper[Any]) -> Engine | Connection:
    """Return the bind that a session has for our tables.

    Raises:
        InvalidArgument: it has several shards for them.
    """
    where: dict[str, Any] = {"mapper": mapper}
    if not is_plain(session):
        _add_shard(session, where)
    return session.get_bind(**where)


def identity_token(session: Session, mapper: Mapper[Any]) -> Any:
    """Return what the identity of a loaded object says about its shard; None without shards."""
    where: dict[str, Any] = {"mapper": mapper}
    if not is_plain(session):
        _add_shard(session, where)
    return where.get("shard_id")


def _is_sharded(session: Session) -> bool:
    # By its attribute: a host without shards need not import that module.
    return hasattr(session, "execute_chooser")


def _add_shard(session: Any, where: dict[str, Any], values: Any = None) -> None:
    if not _is_sharded(session):
        return
    mapper: Mapper[Any] = where["mapper"]
    asked: Any = where.get("clause", sa.select(mapper.local_table))
    state = ORMExecuteState(session, asked, values, immutabledict(), where, None, [])
    shards = sorted({*session.execute_chooser(state)}, key=repr)
    if len(shards) != 1:
        raise InvalidArgument(
            f"this ShardedSession runs a statement about {mapper.local_table} in {len(shards)} "
            f"shards ({', '.join(map(repr, shards))}): a queue is in one database. Use "
            "Session(engine) of one shard, or an execute_chooser that returns one shard for the "
            "tables of the queue"
        )
    where["shard_id"] = shards[0]


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, _transaction: SessionTransaction, _: Connection) -> None:
    if TOUCHED in session.info:
        _watch(session)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    if TOUCHED in session.info and not session.in_nested_transaction():
        refuse_split(session)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Forget the connections of a transaction that is over."""
    if transaction.parent is not None:
        return
    session.info.pop(TOUCHED, None)
    watched: dict[Connection, Callable[[Connection], None]] = session.info.pop(_WATCHED, {})
    for connection, committing in watched.items():  # a connection of the host's may live on
        event.remove(connection, "commit", committing)


def refuse_dialect(bind: Engine | Connection) -> None:
    """Raise for a database that is not PostgreSQL."""
    if bind.dialect.name != "postgresql":
        raise InvalidArgument(
            f"the queue needs PostgreSQL, and this session is bound to {bind.dialect.name}: pass "
            "a session of an engine like create_engine('postgresql+psycopg://...')"
        )


def refuse_split(session: Session) -> None:
    """Raise if a transaction has written the queue's tables here, and something elsewhere.

    A two-phase transaction is atomic in all of its databases. A connection whose transaction the
    caller began is the caller's to commit, and is not looked at.
    """
    transaction = session.get_transaction()
    if transaction is None or session.twophase or session.info.get(ALLOW_SPLIT):
        return
    held = _held(transaction)
    ours = held & session.info[TOUCHED]
    if len(held) < 2 or not any(map(_has_written, ours)):  # noqa: PLR2004
        return
    written = [connection for connection in held if _has_written(connection)]
    if len(written) > 1:
        raise SplitTransaction(
            sorted(map(_place, ours.intersection(written))),
            sorted(map(_place, set(written) - ours)),
        )


def _held(transaction: SessionTransaction) -> set[Connection]:
    """Return the connections that a transaction commits."""
    return {
        connection
        for connection, begun, commits, _ in transaction._connections.values()  # noqa: SLF001
        if commits and not isinstance(begun, NestedTransaction)
    }


def _watch(session: Session) -> None:
    """Look at a transaction for the last time as the first of its connections commits.

    Until then nothing is committed, and no event of the session comes any more in which a host
    could write. Only sessions of several binds that have used the queue are watched.
    """
    transaction = session.get_transaction()
    if transaction is None:
        return
    watched: dict[Connection, Callable[[Connection], None]]
    watched = session.info.setdefault(_WATCHED, {})

    def committing(_connection: Connection) -> None:
        if TOUCHED in session.info:
            refuse_split(session)
            # Once: the other connections have no transaction to look at after the first commit.
            del session.info[TOUCHED]

    for connection in _held(transaction) - watched.keys():
        watched[connection] = committing
        event.listen(connection, "commit", committing)


def _has_written(connection: Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return True  # there is no telling
    return bool(connection.execute(_HAS_WRITTEN).scalar())


def _place(connection: Connection) -> str:
    return dsns.shown(connection.engine.url)


def refuse_foreign_tables(session: Session, mapper: Mapper[Any], query: Any) -> None:
    """Raise if a query reads a table for which a session has another bind than for ours."""
    if is_plain(session) or _is_sharded(session):
        return
    binds: Mapping[Any, Any] = getattr(session, _BINDS)
    # As the statement that it becomes a part of: a host may send what writes to another server.
    write = sa.insert(mapper.class_)
    ours = session.get_bind(mapper=mapper, clause=write)
    for element in visitors.iterate(query):
        theirs = None
        if (read := element._annotations.get("parentmapper")) is not None:  # noqa: SLF001
            theirs = session.get_bind(mapper=read, clause=write)
        elif isinstance(element, sa.Table):
            read, theirs = element, binds.get(element)
        if theirs is not None and theirs.engine is not ours.engine:
            raise InvalidArgument(
                f"the query reads {read}, and this session has another bind for it than for "
                f"{mapper.local_table}: read the rows first, and pass them to enqueue_many()"
            )


def is_autocommit(connection: Connection) -> bool:
    """Return whether a connection commits each statement by itself."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def refuse_autocommit(connection: Connection, unless: str) -> None:
    """Raise when a connection commits each statement by itself."""
    if is_autocommit(connection):
        raise NonAtomicEnqueue(unless)


def sync_loaded(
    session: Session, model: type[Any], rows: Iterable[Row[Any]], names: Iterable[str]
) -> None:
    """Bring loaded objects up to date with rows that a statement returned about them."""
    for row in rows if session.identity_map else ():
        if (loaded := _loaded(session, model, row.id)) is not None:
            # What the caller has changed and not flushed yet is the caller's still.
            pending = _altered(session, loaded).committed_state
            for name in names:
                if name in pending:
                    continue
                set_committed_value(loaded, name, row._mapping[name])  # noqa: SLF001


def expire_deleted(session: Session, model: type[Any], ids: Iterable[int]) -> None:
    """Expire loaded objects whose rows a statement deleted."""
    for id_ in ids if session.identity_map else ():
        if (loaded := _loaded(session, model, id_)) is not None:
            _expire(session, loaded)


def expire_all_deleted(session: Session, model: type[Any]) -> None:
    """Expire all loaded objects of a class, when a statement does not say which it deleted."""
    for loaded in list(session.identity_map.values()):
        if isinstance(loaded, model):
            _expire(session, loaded)


def _loaded(session: Session, model: type[Any], id: int) -> Any:
    token = identity_token(session, sa.inspect(model))
    return session.identity_map.get(identity_key(model, id, identity_token=token))


def _expire(session: Session, loaded: Any) -> None:
    _altered(session, loaded)
    session.expire(loaded)


def _altered(session: Session, loaded: Any) -> InstanceState[Any]:
    # As an UPDATE by the ORM does: the rollback of a savepoint then takes the object back as well.
    state: InstanceState[Any] = sa.inspect(loaded)
    session._register_altered([state])  # noqa: SLF001
    return state


def synchronous(given: object) -> Session:
    """Return the ``Session`` itself: of a registry, the current one of the scope.

    Raises:
        InvalidArgument: it is something else, or not bound to PostgreSQL.
    """
    session = _current(given)
    if not isinstance(session, Session):
        raise InvalidArgument(_refusal(session, "QueueService", "Session"))
    return _on_postgresql(session)


def asynchronous(given: object) -> AsyncSession:
    """Return the ``AsyncSession`` itself: of a registry, the current one of the scope.

    Raises:
        InvalidArgument: it is something else, or not bound to PostgreSQL.
    """
    session: Any = _current(given)
    inner = getattr(session, "sync_session", None)
    if not isinstance(inner, Session):
        raise InvalidArgument(_refusal(session, "AsyncQueueService", "AsyncSession"))
    _on_postgresql(inner)
    found: AsyncSession = session
    return found


def registry_of(given: Any) -> Any:
    """Return a ``scoped_session`` or ``async_scoped_session``; None for anything else."""
    # Not by its class: that of asyncio needs greenlet.
    is_registry = callable(getattr(given, "registry", None)) and hasattr(given, "session_factory")
    return given if is_registry else None


def _current(given: Any) -> object:
    if isinstance(given, Session) or (registry := registry_of(given)) is None:
        return given
    return registry()


def _on_postgresql(session: Session) -> Session:
    if session.bind is not None and is_plain(session):
        refuse_dialect(session.bind)
    return session


def _refusal(given: object, service: str, wanted: str) -> str:
    kind = type(given).__name__
    made = f"{service}({wanted}(engine))"
    if isinstance(given, Session):
        better = "use QueueService, or pass an AsyncSession"
    elif hasattr(given, "sync_session"):
        better = "use AsyncQueueService, or pass a Session"
    elif isinstance(given, (Engine, Connection)) or kind in ("AsyncEngine", "AsyncConnection"):
        better = f"pass a session on it: {made}"
    elif isinstance(given, type) or callable(given):
        kind = given.__name__ if isinstance(given, type) else kind
        better = f"call it, and pass the session that it makes: {service}({kind}())"
        if kind.endswith("sessionmaker"):
            better = "call it, and pass the session that it makes"
    else:
        better = f"pass the session whose transaction is to have the messages: {made}"
    return f"{service} needs {_article(wanted)} {wanted}, not {_article(kind)} {kind}: {better}"


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOaeio" else "a"

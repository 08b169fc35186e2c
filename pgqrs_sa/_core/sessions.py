"""The caller's session: how to unwrap, connect and watch it, and keep its objects up to date.

A session may have several databases. A statement goes to the one that has our tables. A lease, its
settlement and the rows that belong to it must be in one database. A session with one bind always
fulfils that, and only pays for `is_plain`. For other sessions:

- A ``ShardedSession`` is asked for the shards of each statement, and refused unless it names the
  same single shard for every statement.
- A transaction that has written the queue's tables in one database and anything in another is not
  atomic. It is refused before it commits: see `refuse_split`. The host's listeners may still write
  after ours, so the last check runs as the first of its connections commits: see `_watch`.
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
    "is_customized",
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
"""Set this key of ``session.info`` to commit messages in one database and rows in another."""

TOUCHED = "_pgqrs_touched"
"""The key of ``session.info`` for the connections of this transaction that used the queue."""

_WATCHED = "_pgqrs_watched"
"""The key of ``session.info`` for the commit listeners of this transaction's connections."""

_BINDS = "binds" if hasattr(Session(), "binds") else "_Session__binds"  # before SQLAlchemy 2.1
_HAS_WRITTEN = sa.select(sa.func.pg_current_xact_id_if_assigned().is_not(None))


def is_plain(session: Session) -> bool:
    """Return whether everything a session does goes to its one bind."""
    return type(session).get_bind is Session.get_bind and not getattr(session, _BINDS)


def connect(session: Session, where: dict[str, Any], values: Any = None) -> Connection:
    """Return the connection of a session for a statement about our tables, in its transaction.

    Args:
        session: Any session.
        where: The bind arguments, with the mapper of the messages. The shard is added to them. For
            a SELECT that writes in a CTE, ``clause`` is replaced by that INSERT, UPDATE or DELETE.
        values: The parameters of the statement.

    Raises:
        InvalidArgument: the statement would run in several shards, or not on PostgreSQL.
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
    """Flush pending changes; return the connection for a statement, and its ``bind_arguments``."""
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
    """Flush pending changes, then execute a statement about our tables in a session.

    Args:
        session: Any session.
        mapper: The mapper of the messages.
        statement: The statement.
        values: Its parameters.
        atomic_unless: Refuse a connection in AUTOCOMMIT, and name this option as the way to allow
            it. None allows it.

    Raises:
        NonAtomicEnqueue: the connection is in AUTOCOMMIT, so a rollback would not undo it.
    """
    connection, where = flush_and_connect(session, mapper, statement, values)
    if atomic_unless is not None:
        refuse_autocommit(connection, atomic_unless)
    if is_customized(session):
        return session.execute(statement, values, bind_arguments=where)
    # The same as Session.execute() for a statement of Core, at two thirds of its cost.
    return connection.execute(statement, values)


def is_customized(session: Session) -> bool:
    """Return whether the application hooks or overrides ``Session.execute()``."""
    return bool(
        session.dispatch.do_orm_execute
        or getattr(session, "execution_options", None)  # since SQLAlchemy 2.1
        or type(session).execute is not Session.execute
    )


def _write_in(statement: SelectBase) -> sa.UpdateBase | SelectBase:
    """Return the INSERT, UPDATE or DELETE within a statement, or the statement itself."""
    written = (part for part in visitors.iterate(statement) if isinstance(part, sa.UpdateBase))
    return next(written, statement)


def bind_of(session: Session, mapper: Mapper[Any]) -> Engine | Connection:
    """Return the bind of a session for our tables.

    Raises:
        InvalidArgument: the session has several shards for them.
    """
    where: dict[str, Any] = {"mapper": mapper}
    if not is_plain(session):
        _add_shard(session, where)
    return session.get_bind(**where)


def identity_token(session: Session, mapper: Mapper[Any]) -> Any:
    """Return the identity token of loaded objects, which names their shard; None without shards."""
    where: dict[str, Any] = {"mapper": mapper}
    if not is_plain(session):
        _add_shard(session, where)
    return where.get("shard_id")


def _is_sharded(session: Session) -> bool:
    # Told by its attribute, so that a host without shards need not import that module.
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
    """Stop tracking the connections of a transaction that has ended."""
    if transaction.parent is not None:
        return
    session.info.pop(TOUCHED, None)
    watched: dict[Connection, Callable[[Connection], None]] = session.info.pop(_WATCHED, {})
    for connection, committing in watched.items():  # the host's connection may stay in use
        event.remove(connection, "commit", committing)


def refuse_dialect(bind: Engine | Connection) -> None:
    """Raise if a bind is not PostgreSQL."""
    if bind.dialect.name != "postgresql":
        raise InvalidArgument(
            f"the queue needs PostgreSQL, and this session is bound to {bind.dialect.name}: pass "
            "a session of an engine like create_engine('postgresql+psycopg://...')"
        )


def refuse_split(session: Session) -> None:
    """Raise if a transaction has written the queue's tables, and rows in another database.

    A two-phase transaction is atomic across its databases. A connection whose transaction the
    caller began is committed by the caller, and not checked.
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
    """Check a transaction once more as the first of its connections commits.

    At that moment nothing is committed yet, and the session has no later event in which the host
    could write. Only sessions with several binds that have used the queue are watched.
    """
    transaction = session.get_transaction()
    if transaction is None:
        return
    watched: dict[Connection, Callable[[Connection], None]]
    watched = session.info.setdefault(_WATCHED, {})

    def committing(_connection: Connection) -> None:
        if TOUCHED in session.info:
            refuse_split(session)
            # Only once: after the first commit the transaction cannot be checked any more.
            del session.info[TOUCHED]

    for connection in _held(transaction) - watched.keys():
        watched[connection] = committing
        event.listen(connection, "commit", committing)


def _has_written(connection: Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return True  # cannot be determined
    return bool(connection.execute(_HAS_WRITTEN).scalar())


def _place(connection: Connection) -> str:
    return dsns.shown(connection.engine.url)


def refuse_foreign_tables(session: Session, mapper: Mapper[Any], query: Any) -> None:
    """Raise if a query reads a table that the session binds to another database than ours."""
    if is_plain(session) or _is_sharded(session):
        return
    binds: Mapping[Any, Any] = getattr(session, _BINDS)
    # The query becomes part of an INSERT, and a host may send writes to another server.
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
    """Return whether a connection is in AUTOCOMMIT."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def refuse_autocommit(connection: Connection, unless: str) -> None:
    """Raise if a connection is in AUTOCOMMIT."""
    if is_autocommit(connection):
        raise NonAtomicEnqueue(unless)


def sync_loaded(
    session: Session, model: type[Any], rows: Iterable[Row[Any]], names: Iterable[str]
) -> None:
    """Update loaded objects with the rows that a statement returned for them."""
    for row in rows if session.identity_map else ():
        if (loaded := _loaded(session, model, row.id)) is not None:
            # Attributes that the caller has changed and not flushed stay as they are.
            pending = _altered(session, loaded).committed_state
            for name in names:
                if name in pending:
                    continue
                set_committed_value(loaded, name, row._mapping[name])  # noqa: SLF001


def expire_deleted(session: Session, model: type[Any], ids: Iterable[int]) -> None:
    """Expire the loaded objects whose rows a statement deleted."""
    for id_ in ids if session.identity_map else ():
        if (loaded := _loaded(session, model, id_)) is not None:
            _expire(session, loaded)


def expire_all_deleted(session: Session, model: type[Any]) -> None:
    """Expire all loaded objects of a class, after a statement that does not say what it deleted."""
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
    # The ORM does this for its own UPDATEs: the rollback of a savepoint then restores the object.
    state: InstanceState[Any] = sa.inspect(loaded)
    session._register_altered([state])  # noqa: SLF001
    return state


def synchronous(given: object) -> Session:
    """Return a ``Session``; for a registry, the current session of its scope.

    Raises:
        InvalidArgument: it is neither, or not bound to PostgreSQL.
    """
    session = _current(given)
    if not isinstance(session, Session):
        raise InvalidArgument(_refusal(session, "QueueService", "Session"))
    return _on_postgresql(session)


def asynchronous(given: object) -> AsyncSession:
    """Return an ``AsyncSession``; for a registry, the current session of its scope.

    Raises:
        InvalidArgument: it is neither, or not bound to PostgreSQL.
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
    # Not told by its class: importing the asyncio one needs greenlet.
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

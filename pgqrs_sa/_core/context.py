"""The settings of a service, and what several operations need: execution, criteria, codecs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Result, Row
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key
from sqlalchemy.sql import ClauseElement, Executable, visitors
from sqlalchemy.sql.selectable import AliasedReturnsRows

from .. import validation
from ..codecs import Codec, JsonCodec, check_json
from ..errors import InvalidArgument, NonAtomicEnqueue, PayloadError, QueueNotFound, safe_repr
from . import routing
from .representation import database_of, represented
from .sql import queues
from .tables import Tables, tables_of

if TYPE_CHECKING:
    from ..models import Models

__all__ = [
    "Context",
    "connect",
    "criteria_on",
    "decode_all",
    "decoded",
    "encoded",
    "execute",
    "expire_all_deleted",
    "expire_deleted",
    "queue_not_found",
    "refuse_autocommit",
    "reject_reserved_binds",
    "sync_loaded",
]


_STRICT = JsonCodec()


@dataclass(frozen=True, slots=True)
class Context:
    """The settings of a service, handed to every operation.

    Attributes:
        models: The four classes.
        codec: Turns payloads into JSON text and back.
        worker: The registered worker that enqueues and leases, or None.
        allow_autocommit: Enqueue even where a rollback would not take it back.
        notify: Send a NOTIFY to consumers that wait.
        cursor_key: Tells apart sessions of one engine that see different messages.
        create_queues: Create a queue that does not exist when something is enqueued there.
        tables: The tables of the four classes, which the statements are about.
    """

    models: Models
    codec: Codec
    worker: int | None
    allow_autocommit: bool
    notify: bool = False
    cursor_key: str | None = None
    create_queues: bool = False
    tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", tables_of(self.models))

    @property
    def mapper(self) -> Mapper[Any]:
        """The mapper of messages: a session with several binds finds the right bind by it."""
        return _mapper(self.models)

    def represented(self, cls: type[Any], session: Session) -> str:
        """Return how a service with these settings is shown."""
        return represented(
            cls,
            database=database_of(session),
            worker=self.worker,
            allow_autocommit=self.allow_autocommit or None,
            notify=self.notify or None,
            create_queues=self.create_queues or None,
        )

    @classmethod
    def of(
        cls,
        models: Models,
        codec: Codec | None,
        worker: object,
        allow_autocommit: bool,
        *,
        notify: bool = False,
        cursor_key: str | None = None,
        create_queues: bool = False,
    ) -> Context:
        """Return the settings of a service, with defaults for those that are None."""
        return cls(
            models,
            codec or _STRICT,
            validation.validate_worker_id(worker),
            allow_autocommit,
            notify,
            None if cursor_key is None else validation.validate_text(cursor_key, "cursor_key"),
            create_queues,
        )


@cache
def _mapper(models: Models) -> Mapper[Any]:
    mapper: Mapper[Any] = sa.inspect(models.message)
    return mapper


def refuse_autocommit(connection: sa.Connection, unless: str) -> None:
    """Raise when a connection commits each statement by itself."""
    if routing.is_autocommit(connection):
        raise NonAtomicEnqueue(unless)


_OUR_BINDS = frozenset(
    (
        *("after", "contains", "cursor", "lease", "limit", "producer", "queue", "queue_id"),
        *("reason", "size", "worker"),
    )
)


def reject_reserved_binds(*expressions: Any) -> None:
    """Refuse the caller's bind parameters if they have reserved names."""
    for expression in expressions:
        for element in visitors.iterate(expression):
            if not isinstance(element, sa.BindParameter) or element.unique:
                continue
            if element.key in _OUR_BINDS:
                raise InvalidArgument(
                    f"bindparam({element.key!r}) has a name that pgqrs_sa uses itself: rename it"
                )


def criteria_on(where: Any, table: sa.Table, *joined: sa.Table) -> tuple[Any, ...]:
    """Return criteria as a tuple, in a form that never multiplies rows.

    Criteria that join the messages to another table become an EXISTS. Those that only name
    another table are refused: each message would match as soon as one row of that table does,
    and be leased or cancelled for it.
    """
    criteria = validation.validate_criteria(where)
    if not criteria:
        return ()
    for criterion in criteria:
        # A bool is a comparison that Python has made: of each message, or of none.
        if not hasattr(criterion, "__clause_element__") and not isinstance(
            criterion, ClauseElement
        ):
            raise InvalidArgument(
                f"where must be criteria of SQLAlchemy, not {safe_repr(criterion)}: compare "
                "columns of the model, as in Message.priority > 0"
            )
    try:
        froms = sa.select(table.c.id).where(*criteria).get_final_froms()
    except ArgumentError as error:
        raise InvalidArgument(f"where must be criteria of SQLAlchemy: {error}") from None
    reject_reserved_binds(*criteria)
    others = set(froms) - {table, *joined}
    if stray := others - _linked(criteria, table):
        names = ", ".join(sorted(map(_named, stray)))
        raise InvalidArgument(
            f"where speaks of {names} without joining it to {table}: "
            "add the criterion that does, or use exists() or in_(select(...))"
        )
    if not others:
        return criteria
    return (sa.exists(sa.select(sa.literal(1)).where(*criteria).correlate(table, *joined)),)


def _named(source: Any) -> str:
    """Return what to call a FROM: SQLAlchemy shows nothing for an alias or a subquery."""
    if not isinstance(source, AliasedReturnsRows):
        return str(source)
    is_table = isinstance(source.element, sa.TableClause)
    of = f"an alias of {source.element}" if is_table else "a subquery"
    is_anonymous = source.description != source.name
    return of if is_anonymous else f"{source.name} ({of})"


def _linked(criteria: Sequence[Any], table: sa.Table) -> set[Any]:
    """Return the tables that comparisons tie to ``table``, directly or through each other."""
    ties = []
    for criterion in criteria:
        for element in visitors.iterate(criterion):
            if isinstance(element, sa.BinaryExpression):
                parts = visitors.iterate(element)
                columns = (part for part in parts if isinstance(part, sa.ColumnClause))
                ties.append({column.table for column in columns})
    linked: set[Any] = {table}
    for _ in ties:
        linked |= {found for tie in ties if tie & linked for found in tie}
    return linked


def queue_not_found(session: Session, context: Context, queue: str) -> QueueNotFound:
    """Return the error for a queue that does not exist, with the names that come close."""
    known: Sequence[str] = (
        execute(session, context, queues.names(context.tables.queue)).scalars().all()
    )
    return QueueNotFound(queue, validation.suggestions(queue, known))


def decoded(codec: Codec, id: int, text: str, headers: str | None) -> tuple[Any, Any]:
    """Return payload and headers as values, or the error in the payload's place."""
    try:
        return codec.loads(text), None if headers is None else _STRICT.loads(headers)
    except Exception as error:  # noqa: BLE001 - a host's codec may raise anything
        problem = f"of message {id} cannot be decoded: {validation.error_text(error)}"
        failure = PayloadError("payload", problem)
        failure.__cause__ = error
        return failure, None


def encoded(codec: Codec, value: Any, path: str = "payload") -> str:
    """Return a payload as JSON text, whatever the codec does.

    Args:
        codec: The service's.
        value: The payload.
        path: What to call it in an error.

    Raises:
        PayloadError: the codec refuses the value, raises something else, or returns no JSON.
    """
    if type(codec) is JsonCodec:
        return codec.dumps(value, path=path)
    try:
        text = codec.dumps(value)
    except PayloadError as error:
        # A codec calls the value "payload"; a batch says which.
        where = path + error.path.removeprefix("payload")
        raise PayloadError(where, error.problem) from error
    except Exception as error:
        raise PayloadError(path, f"cannot be encoded: {validation.error_text(error)}") from error
    check_json(text, path)
    return text


def decode_all(codec: Codec, rows: Sequence[Any]) -> Sequence[tuple[Any, Any]]:
    """Return what `decoded` does, of rows that begin with id, payload and headers."""
    if type(codec) is JsonCodec and not any(row[2] for row in rows):
        values = codec.loads_each([row[1] for row in rows])
        if values is not None:
            return [(value, None) for value in values]
    return [decoded(codec, *row[:3]) for row in rows]


def execute(
    session: Session,
    context: Context,
    statement: Executable,
    values: Any = None,
    *,
    atomic: bool = False,
) -> Result[Any]:
    """Execute a statement about our tables in the caller's session, after its pending flush.

    With ``atomic`` it is refused where a rollback would not take it back.
    """
    connection, where = connect(session, context, statement, values)
    if atomic and not context.allow_autocommit:
        refuse_autocommit(connection, "QueueService(session, allow_autocommit=True)")
    if _session_is_customized(session):
        return session.execute(statement, values, bind_arguments=where)
    # The same as Session.execute() for a statement of Core, at two thirds of its cost.
    return connection.execute(statement, values)


def connect(
    session: Session, context: Context, statement: Executable, values: Any
) -> tuple[sa.Connection, dict[str, Any]]:
    """Flush a session; return its connection for a statement, and the bind arguments.

    `Session.execute` takes the second as ``bind_arguments``.
    """
    # SQLAlchemy 2.0 flushes only before statements about mapped classes, 2.1 before all of them.
    session._autoflush()  # noqa: SLF001
    where = {"mapper": context.mapper, "clause": statement}
    return routing.connect(session, where, values), where


def _session_is_customized(session: Session) -> bool:
    """Whether the application hooks or overrides ``Session.execute()``."""
    return bool(
        session.dispatch.do_orm_execute
        or getattr(session, "execution_options", None)  # since SQLAlchemy 2.1
        or type(session).execute is not Session.execute
    )


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
    token = routing.identity_token(session, sa.inspect(model))
    return session.identity_map.get(identity_key(model, id, identity_token=token))


def _expire(session: Session, loaded: Any) -> None:
    _altered(session, loaded)
    session.expire(loaded)


def _altered(session: Session, loaded: Any) -> InstanceState[Any]:
    # As an UPDATE by the ORM does: the rollback of a savepoint then takes the object back as well.
    state: InstanceState[Any] = sa.inspect(loaded)
    session._register_altered([state])  # noqa: SLF001
    return state

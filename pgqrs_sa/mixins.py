"""The columns, constraints and indexes of the four tables, for any registry: see `models`.

Four choices come from measurements. The message tables have no foreign keys: one halves the rate
of batch inserts. No index, and no predicate of one, names a column that a lease writes, and pages
are less than half filled: a lease is a heap-only update, which writes no index entry. An archived
message keeps its id. ``max_read_ct`` may be NULL until the first lease: the queue's limit applies
then, however the row was inserted.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.hybrid import Comparator, hybrid_property
from sqlalchemy.orm import Mapped, declared_attr, mapped_column, validates
from sqlalchemy.schema import conv
from sqlalchemy.sql import ColumnElement

from . import validation
from ._core import states
from ._core.representation import loaded
from ._core.tables import sibling_table
from .codecs import JsonCodec
from .errors import InvalidArgument, PayloadError, safe_repr

__all__ = [
    "SCHEMA_VERSION",
    "VERSION_COMMENT",
    "ArchivedMessageMixin",
    "Headers",
    "MessageMixin",
    "Payload",
    "QueueMixin",
    "WorkerMixin",
]

SCHEMA_VERSION = 1
"""The version of the tables below; `pgqrs_sa.migrations` has a step for each."""

VERSION_COMMENT = "pgqrs_sa:schema="
"""The prefix of the comment on ``pgqrs_queues`` that stores the version."""

_timestamp = sa.DateTime(timezone=True)
_clock = func.statement_timestamp()
_identity = sa.Identity(always=False)
_range = "{0} >= '1970-01-01 00:00:00+00' AND {0} < '9999-01-01 00:00:00+00'"
_queue_name_rule = f"queue_name ~ '{validation.QUEUE_NAME_PATTERN}'"
_strict = JsonCodec()
_T = TypeVar("_T")

_STORAGE = {
    # Room for the second version of each row, which a lease writes into the same page, and which is
    # up to 32 bytes longer: with 50 one lease in 20 had no room where messages differ in size.
    "fillfactor": "45",
    # Each message leaves two dead rows, and a dequeue reads past those that are not vacuumed yet.
    # The server's default waits until they are a fifth of the table, which is far too late.
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "1000",
    "autovacuum_analyze_scale_factor": "0.05",
    "autovacuum_analyze_threshold": "1000",
}


def _check(body: str, name: str) -> sa.CheckConstraint:
    # conv() marks the name as final: a naming convention of the host must not prefix it again.
    return sa.CheckConstraint(body, name=conv(name))


def _storage(parameters: dict[str, str]) -> dict[str, Any]:
    """Return the table options that make ``CREATE TABLE`` set the storage parameters."""
    if sa.__version__ >= "2.1":
        return {"postgresql_with": parameters}
    listed = ", ".join(f"{name} = {value}" for name, value in parameters.items())

    def after_create(table: sa.Table, connection: sa.Connection, **_: Any) -> None:
        name = connection.dialect.identifier_preparer.format_table(
            table, name=None, use_schema=False
        )
        if schema := connection.schema_for_object(table):
            name = f"{connection.dialect.identifier_preparer.quote(schema)}.{name}"
        connection.execute(sa.text(f"ALTER TABLE {name} SET ({listed})".replace(":", "\\:")))

    return {"listeners": [("after_create", after_create)]}


def _options(cls: object, comment: str, **options: Any) -> dict[str, Any]:
    schema = getattr(cls, "__pgqrs_schema__", None)
    return {"schema": schema, "comment": comment, "info": {"pgqrs_sa": True}, **options}


_OPTION_CHECKS: dict[str, Callable[[Any], object]] = {
    "headers": validation.headers_text,
    "priority": validation.validate_priority,
    "max_read_ct": validation.validate_max_read_ct,
    "dedup_key": validation.validate_key,
    "vt": partial(validation.row_time, name="vt"),
    "leased_until": partial(validation.row_time, name="leased_until"),
}


class QueueMixin:
    """A queue: its name, and the defaults of its messages."""

    __tablename__ = "pgqrs_queues"

    id: Mapped[int] = mapped_column(sa.BigInteger, _identity)
    queue_name: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock)
    lease_seconds: Mapped[float] = mapped_column(
        sa.Double, server_default=sa.text("30"), nullable=False
    )
    max_read_ct: Mapped[int] = mapped_column(
        sa.Integer, server_default=sa.text("5"), nullable=False
    )
    keep: Mapped[str] = mapped_column(sa.Text, server_default=sa.text("'all'"))
    retention_seconds: Mapped[float | None] = mapped_column(sa.Double)
    failed_retention_seconds: Mapped[float | None] = mapped_column(sa.Double)
    max_payload_bytes: Mapped[int] = mapped_column(
        sa.Integer, server_default=sa.text("1048576"), nullable=False
    )
    paused_at: Mapped[datetime | None] = mapped_column(_timestamp)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        return (
            sa.PrimaryKeyConstraint("id", name=conv("pgqrs_queues_pkey")),
            sa.UniqueConstraint("queue_name", name=conv("pgqrs_queues_queue_name_key")),
            _check(_queue_name_rule, "pgqrs_queues_queue_name_check"),
            _check("lease_seconds > 0", "pgqrs_queues_lease_seconds_check"),
            _check("max_read_ct >= 1", "pgqrs_queues_max_read_ct_check"),
            _check("keep IN ('all', 'failed', 'nothing')", "pgqrs_queues_keep_check"),
            _check("retention_seconds >= 0", "pgqrs_queues_retention_seconds_check"),
            _check("failed_retention_seconds >= 0", "pgqrs_queues_failed_retention_seconds_check"),
            _check("max_payload_bytes >= 1", "pgqrs_queues_max_payload_bytes_check"),
            sa.Index(
                conv("pgqrs_queues_keep_idx"), "id", postgresql_where=sa.text("keep <> 'all'")
            ),
            _options(cls, f"{VERSION_COMMENT}{SCHEMA_VERSION}"),
        )

    def __repr__(self) -> str:
        return loaded(self, "id", "queue_name", "paused_at")


class Payload(sa.types.TypeDecorator[Any]):
    """JSONB written with the codec of `enqueue`, not with the engine's JSON serializer.

    So a Core INSERT or an ORM bulk INSERT accepts and refuses the same values as `enqueue`.
    """

    impl = JSONB
    cache_ok = True
    should_evaluate_none = True  # None is a payload: null

    def __init__(self) -> None:
        super().__init__()
        # Alembic renders a type in a revision as its module and its repr. A revision outlives
        # this class, so it names the PostgreSQL type instead.
        self.__module__ = "sa.dialects.postgresql"

    def __repr__(self) -> str:
        """Return the type as a revision contains it, for hosts without the Alembic plugin."""
        return "JSONB()"

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return the function that encodes a payload as JSON text."""
        return _payload_text

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        """Return the type that JSONB chooses: operands such as keys and indexes are no payloads."""
        return self.impl_instance.coerce_compared_value(op, value)


class Headers(Payload):
    """JSONB for headers, like `Payload`: a dict of bounded size, or None for SQL's NULL."""

    cache_ok = True
    should_evaluate_none = False

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return the function that encodes headers as JSON text."""
        return _headers_text


class _RefusedPayload(PayloadError, sa_exc.DontWrapMixin):
    """A `PayloadError` about a statement's parameters, which SQLAlchemy does not wrap."""


def _payload_text(value: Any) -> str | None:
    if isinstance(value, sa.Null):
        return None
    return _refusing(_strict.dumps, None if value is JSONB.NULL else value)


def _headers_text(value: Any) -> str | None:
    return _refusing(validation.headers_text, None if isinstance(value, sa.Null) else value)


def _refusing(dumps: Callable[[Any], _T], value: Any) -> _T:
    try:
        return dumps(value)
    except PayloadError as error:
        raise _RefusedPayload(error.path, error.problem) from error


class _NoQueue(InvalidArgument, sa_exc.DontWrapMixin):
    """An `InvalidArgument` raised while an INSERT is compiled, which SQLAlchemy does not wrap."""


def _no_queue() -> int:
    """Raise for an INSERT that gives no queue, before it is sent."""
    raise _NoQueue(
        "this INSERT has no queue_id, and bulk operations do not know queue_name: use "
        "service.enqueue_many(queue, payloads) or session.add_all(messages), or give queue_id"
    )


def _refused_in_bulk(name: str) -> Callable[[Any], None]:
    """Return SQLAlchemy's hook for an attribute in the mappings of a bulk INSERT (since 2.1)."""

    def refuse(mapping: Any) -> None:
        if mapping[name] is not None:
            raise InvalidArgument(
                f"bulk operations do not know {name}: use service.enqueue_many(queue, items) or "
                "session.add_all(messages), or give queue_id and vt"
            )

    return refuse


class _QueueName(Comparator[str | None]):
    """The name of a message's queue as a SQL expression, built only when it is used.

    Every constructor of a message calls ``hasattr(Message, "queue_name")``, which builds nothing.
    """

    def __init__(self, message: Any) -> None:
        super().__init__(message)
        self._message = message

    def __clause_element__(self) -> ColumnElement[str | None]:
        """Return a scalar subquery on the queue of the message.

        The CASE refers to the message outside the subquery. Otherwise the table of messages would
        be missing from the FROM of a SELECT, and the subquery would range over every message.
        """
        mapper = sa.inspect(self._message).mapper
        queue = sibling_table(mapper.local_table, "pgqrs_queues").alias("pgqrs_queue_of_message")
        name = (
            sa.select(queue.c.queue_name)
            .where(queue.c.id == self._message.queue_id)
            .correlate_except(queue)
            .scalar_subquery()
        )
        return sa.case((self._message.queue_id.is_not(None), name))

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
        """Compare the subquery."""
        return op(self.__clause_element__(), *other, **kwargs)

    def _bulk_update_tuples(self, value: Any) -> Any:
        # SQLAlchemy's hook for the columns that an UPDATE or INSERT sets.
        raise InvalidArgument(
            f"queue_name={safe_repr(value)} is for a message that is not flushed yet: set queue_id"
        )

    def _bulk_dml_setter(self, key: str) -> Any:
        return _refused_in_bulk(key)


class _WriteOnly(Comparator[Any]):
    """A write-only attribute: any use in a SQL expression is refused."""

    def __init__(self, name: str) -> None:
        super().__init__(sa.null())
        self._name = name

    def __clause_element__(self) -> Any:
        raise InvalidArgument(f"{self._name} only sets vt, and cannot be read: use vt")

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
        """Refuse a comparison."""
        return op(self.__clause_element__(), *other, **kwargs)

    def _bulk_dml_setter(self, key: str) -> Any:
        return _refused_in_bulk(key)


class _ContentMixin:
    """The columns that a message and its archived copy share, but for the id."""

    queue_id: Mapped[int] = mapped_column(sa.BigInteger, insert_default=_no_queue)
    payload: Mapped[Any] = mapped_column(Payload, nullable=False)
    headers: Mapped[dict[str, Any] | None] = mapped_column(Headers)
    priority: Mapped[int] = mapped_column(sa.SmallInteger, server_default=sa.text("0"))
    vt: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock)
    enqueued_at: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock)
    read_ct: Mapped[int] = mapped_column(sa.Integer, server_default=sa.text("0"))
    max_read_ct: Mapped[int | None] = mapped_column(sa.Integer)
    dequeued_at: Mapped[datetime | None] = mapped_column(_timestamp)
    producer_worker_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    consumer_worker_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    dedup_key: Mapped[str | None] = mapped_column(sa.Text)
    last_error: Mapped[str | None] = mapped_column(sa.Text)


def _in_state(condition: Callable[[Any], ColumnElement[bool]]) -> hybrid_property[bool]:
    """Return a hybrid for a state: compares `state` on an instance, is the condition in SQL."""
    name = condition.__name__

    def in_state(message: Any) -> bool:
        return bool(message.state == name)

    in_state.__name__ = name
    return hybrid_property(in_state, expr=condition)


class MessageMixin(_ContentMixin):
    """A live message: scheduled, ready, leased, or exhausted.

    ``session.add(Message(queue_name="mail", payload={...}, delay=60))`` does the same as
    ``enqueue``. Arguments are checked when they are assigned, the queue when the row is flushed.
    ``queue_name`` sets ``queue_id``; ``delay`` and ``at`` set ``vt``. Only a key that another
    transaction enqueues at the same time fails later, in the INSERT.

    The classes are plain declarative classes. If your base is a ``MappedAsDataclass``, give the
    mixins a separate base.

    The states are hybrids. In SQL they use the database's clock: base decisions on these. On an
    instance they use this computer's clock, and are for display.
    """

    __tablename__ = "pgqrs_messages"

    id: Mapped[int] = mapped_column(sa.BigInteger, _identity, sort_order=-1)
    # The end of the latest lease; NULL once a lease was given up. With a type that evaluates None
    # an INSERT names it only if it was set, which a producer has no right to.
    leased_until: Mapped[datetime | None] = mapped_column(_timestamp.evaluates_none(), sort_order=1)
    # Assigned by the INSERT and replaced by each lease; kept when a lease ends.
    fencing_token: Mapped[int] = mapped_column(sa.BigInteger, _identity, sort_order=1)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        return (
            sa.PrimaryKeyConstraint("id", name=conv("pgqrs_messages_pkey")),
            _check(_range.format("vt"), "pgqrs_messages_vt_check"),
            _check(_range.format("leased_until"), "pgqrs_messages_leased_until_check"),
            _check("read_ct >= 0", "pgqrs_messages_read_ct_check"),
            _check(
                # A CHECK that evaluates to NULL passes, so NULL is handled explicitly.
                "CASE WHEN max_read_ct IS NULL THEN read_ct = 0 ELSE max_read_ct >= 1 END",
                "pgqrs_messages_max_read_ct_check",
            ),
            _check("jsonb_typeof(headers) = 'object'", "pgqrs_messages_headers_check"),
            _check(
                f"char_length(dedup_key) BETWEEN 1 AND {validation.MAX_KEY_LENGTH}",
                "pgqrs_messages_dedup_key_check",
            ),
            sa.Index(
                conv("pgqrs_messages_order_idx"),
                "queue_id",
                "priority",
                "vt",
                "id",
            ),
            sa.Index(
                conv("pgqrs_messages_dedup_key_idx"),
                "queue_id",
                "dedup_key",
                unique=True,
                postgresql_where=sa.text("dedup_key IS NOT NULL"),
            ),
            _options(cls, "Live messages of pgqrs_sa", **_storage(_STORAGE)),
        )

    def __repr__(self) -> str:
        text = loaded(self, "id", "queue_id", "priority", "vt", "read_ct", "max_read_ct")
        return text if self.queue_name is None else f"{text[:-1]} queue_name={self.queue_name!r}>"

    @hybrid_property
    def delay(self) -> float | timedelta | None:
        """Write only: seconds or a timedelta from now, by the database's clock."""
        raise AttributeError("delay only sets vt: read vt")

    @delay.inplace.setter
    def _set_delay(self, value: float | timedelta | None) -> None:
        self._say_when(delay=value)

    @delay.inplace.comparator
    @classmethod
    def _compare_delay(cls) -> Comparator[Any]:
        return _WriteOnly("delay")

    @hybrid_property
    def at(self) -> datetime | None:
        """Write only: an aware datetime. A time in the past means now."""
        raise AttributeError("at only sets vt: read vt")

    @at.inplace.setter
    def _set_at(self, value: datetime | None) -> None:
        self._say_when(at=value)

    @at.inplace.comparator
    @classmethod
    def _compare_at(cls) -> Comparator[Any]:
        return _WriteOnly("at")

    def _say_when(self, **given: Any) -> None:
        said = self.__dict__.setdefault("_pgqrs_when", {})
        said.update({name: value for name, value in given.items() if value is not None})
        if not said:
            return
        span, moment = validation.validate_delay_or_at(said.get("delay"), said.get("at"))
        # A SQL expression as a value: the database's clock computes the time in the INSERT.
        expression: Any = func.statement_timestamp() + span
        if moment is not None:
            expression = states.never_past(moment)
        self.vt = expression

    @hybrid_property
    def queue_name(self) -> str | None:
        """The queue's name: in SQL a subquery, on an instance the name given to the constructor.

        None on a loaded row: use ``queue_id``.
        """
        name: str | None = self.__dict__.get("_pgqrs_queue_name")
        return name

    @queue_name.inplace.setter
    def _set_queue_name(self, value: str | None) -> None:
        state: Any = sa.inspect(self)
        if state.persistent:
            raise InvalidArgument(
                f"queue_name={value!r} is for a message that is not flushed yet: set queue_id"
            )
        self.__dict__["_pgqrs_queue_name"] = validation.validate_queue_name(value)

    @queue_name.inplace.comparator
    @classmethod
    def _compare_queue_name(cls) -> Comparator[str | None]:
        return _QueueName(cls)

    @validates("payload")
    def _check_payload(self, _key: str, value: Any) -> Any:
        _strict.dumps(value)
        return value

    @validates("headers", "priority", "max_read_ct", "dedup_key", "vt", "leased_until")
    def _check_option(self, key: str, value: Any) -> Any:
        if value is None or isinstance(value, sa.ClauseElement):
            return value
        _OPTION_CHECKS[key](value)
        return value

    ready = _in_state(states.ready)
    """Visible, with attempts left: the next dequeue may lease it."""

    exhausted = _in_state(states.exhausted)
    """Visible, but out of attempts: it will become a dead letter."""

    leased = _in_state(states.leased)
    """A consumer holds it, and its lease has not expired."""

    scheduled = _in_state(states.scheduled)
    """Not visible yet, and not leased."""

    @hybrid_property
    def has_attempts(self) -> bool:
        """Whether another attempt is allowed."""
        return self.max_read_ct is None or (self.read_ct or 0) < self.max_read_ct

    @has_attempts.inplace.expression
    @classmethod
    def _has_attempts(cls) -> ColumnElement[bool]:
        return states.has_attempts(cls)

    @hybrid_property
    def state(self) -> str:
        """``ready``, ``scheduled``, ``leased`` or ``exhausted``."""
        if not isinstance(self.vt, datetime):
            raise InvalidArgument("this message has no vt yet: flush it first")
        now = datetime.now(UTC)
        if self.leased_until is not None and self.leased_until > now:
            return "leased"
        if self.vt > now:
            return "scheduled"
        return "ready" if self.has_attempts else "exhausted"

    @state.inplace.expression
    @classmethod
    def _state(cls) -> ColumnElement[str]:
        return states.state(cls)


class ArchivedMessageMixin(_ContentMixin):
    """A settled message: done, dead, cancelled or discarded, with the reason."""

    __tablename__ = "pgqrs_archive"

    # The message's. A requeue takes the row back, so that an id is here at most once.
    id: Mapped[int] = mapped_column(sa.BigInteger, autoincrement=False, sort_order=-1)
    archived_at: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock, sort_order=1)
    outcome: Mapped[str] = mapped_column(
        sa.Text, server_default=sa.text("'archived'"), sort_order=1
    )
    reason: Mapped[str | None] = mapped_column(sa.Text, sort_order=1)
    fencing_token: Mapped[int | None] = mapped_column(sa.BigInteger, sort_order=1)

    @hybrid_property
    def original_msg_id(self) -> int:
        """The id, under the name that it has in pgqrs."""
        return self.id

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        return (
            sa.PrimaryKeyConstraint("id", name=conv("pgqrs_archive_pkey")),
            _check(
                "outcome IN ('archived', 'dead', 'cancelled', 'discarded')",
                "pgqrs_archive_outcome_check",
            ),
            sa.Index(conv("pgqrs_archive_queue_idx"), "queue_id", "archived_at", "id"),
            sa.Index(
                conv("pgqrs_archive_not_done_idx"),
                "queue_id",
                "outcome",
                "id",
                postgresql_where=sa.text("outcome <> 'archived'"),
            ),
            _options(cls, "Settled messages of pgqrs_sa"),
        )

    def __repr__(self) -> str:
        return loaded(self, "id", "queue_id", "outcome", "archived_at")


class WorkerMixin:
    """A registered worker process.

    Every start inserts a new row, so a stale process is never mistaken for its successor.
    """

    __tablename__ = "pgqrs_workers"

    id: Mapped[int] = mapped_column(sa.BigInteger, _identity)
    name: Mapped[str] = mapped_column(sa.Text)
    hostname: Mapped[str] = mapped_column(sa.Text)
    pid: Mapped[int | None] = mapped_column(sa.Integer)
    port: Mapped[int | None] = mapped_column(sa.Integer)
    version: Mapped[str | None] = mapped_column(sa.Text)
    queues: Mapped[list[str]] = mapped_column(ARRAY(sa.Text), server_default=sa.text("'{}'"))
    status: Mapped[str] = mapped_column(sa.Text, server_default=sa.text("'ready'"))
    started_at: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock)
    heartbeat_at: Mapped[datetime] = mapped_column(_timestamp, server_default=_clock)
    shutdown_at: Mapped[datetime | None] = mapped_column(_timestamp)
    waiting_until: Mapped[datetime | None] = mapped_column(_timestamp)
    leased: Mapped[int | None] = mapped_column(sa.Integer)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        return (
            sa.PrimaryKeyConstraint("id", name=conv("pgqrs_workers_pkey")),
            _check("status IN ('ready', 'suspended', 'stopped')", "pgqrs_workers_status_check"),
            _options(cls, "Processes that work on pgqrs_sa queues"),
        )

    def __repr__(self) -> str:
        return loaded(self, "id", "name", "hostname", "pid", "status", "queues")

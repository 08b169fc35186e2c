"""Send a statement without waiting for its reply, on a connection of psycopg.

The server works while the handlers of the previous batch run. Outside of its pipeline mode, libpq
ends each statement with a Sync: the server commits it, and holds no lock and no snapshot, whether
or not the reply is read. In pipeline mode, a statement without a Sync stays in its transaction
until the reply is fetched (https://www.postgresql.org/docs/current/libpq-pipeline-mode.html).
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, exc
from sqlalchemy.orm import Session
from sqlalchemy.sql import Executable

from .._core.sessions import is_customized
from .call_transactions import shut_down

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

__all__ = ["NonblockingConnection"]

_numbers = itertools.count(1)


class _Text(NamedTuple):
    """A statement as libpq takes it.

    Attributes:
        sql: With ``$1``, ``$2`` and so on.
        defaults: The values of the parameters that have one.
        names: The name of each parameter, in their order.
        processors: Convert the values of some parameters for the driver.
    """

    sql: str
    defaults: dict[str, Any]
    names: tuple[str, ...]
    processors: Mapping[str, Callable[[Any], Any]]


class NonblockingConnection:
    """A connection of psycopg in AUTOCOMMIT, for statements that are not waited for.

    One statement at a time. After an error the connection must not be used again.

    Args:
        connection: In AUTOCOMMIT. See `of`.
        driver: Its ``psycopg.Connection`` or ``psycopg.AsyncConnection``.
    """

    def __init__(self, connection: Connection, driver: Any) -> None:
        from psycopg import adapt, pq  # noqa: PLC0415 - only where this driver is used

        self._transformer = partial(adapt.Transformer, driver)
        self._format = adapt.PyFormat.AUTO
        self._good = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
        self._connection = connection
        self._driver = driver
        self._pgconn: PGconn = driver.pgconn
        self._texts: dict[Executable, _Text] = {}
        self._prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._row_makers: dict[tuple[bytes | None, ...], Callable[[Sequence[Any]], Any]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pgconn.socket, selectors.EVENT_READ)

    @classmethod
    def of(cls, connection: Connection, session: Session) -> NonblockingConnection | None:
        """Return the means to send without waiting, or None if that is not possible.

        asyncpg's protocol belongs to its event loop, and psycopg2 and pg8000 give no access to
        what they send. What a session's ``execute()`` was customized for, it must be shown.
        """
        if connection.dialect.driver != "psycopg" or is_customized(session):
            return None
        driver: Any = connection.connection.driver_connection
        return cls(connection, driver) if hasattr(driver, "pgconn") else None

    def send(self, statement: Executable, values: Mapping[str, Any]) -> None:
        """Send a statement. The server executes and commits it, also if nobody asks for its reply.

        Args:
            statement: A statement of SQLAlchemy.
            values: Its parameters.

        Raises:
            DBAPIError: as SQLAlchemy would raise.
        """
        text = self._texts.get(statement) or self._text_of(statement)
        given = text.defaults | dict(values)
        arguments = [
            text.processors[name](given[name]) if name in text.processors else given[name]
            for name in text.names
        ]
        transformer = self._transformer()
        with self._errors():
            dumped = transformer.dump_sequence(arguments, [self._format] * len(arguments))
            types, formats = transformer.types or (), transformer.formats
            if self._driver.prepare_threshold is None:  # as behind a pooler that forbids it
                self._pgconn.send_query_params(text.sql.encode(), dumped, types, formats)
            else:
                name = self._prepare(text.sql, types)
                self._pgconn.send_query_prepared(name, dumped, formats)
            self._flush()

    def receive(self) -> Sequence[Any]:
        """Wait for the reply to the statement that was sent; return its rows, as named tuples.

        Raises:
            DBAPIError: as SQLAlchemy would raise.
        """
        with self._errors():
            result = self._result()
            transformer = self._transformer()
            transformer.set_pgresult(result)
            rows: Sequence[Any] = transformer.load_rows(0, result.ntuples, self._row_maker(result))
            return rows

    def abort(self) -> None:
        """End a call that waits for the server. Called from another thread."""
        shut_down(self._driver)

    def close(self) -> None:
        """Leave the connection as it was. A statement that is on its way must be read before.

        Raises:
            DBAPIError: it is broken, and must not be used again.
        """
        prepared, self._prepared = self._prepared, {}
        try:
            with self._errors():
                for name in prepared.values():
                    self._close_prepared(name)
                    self._flush()
                    self._result()
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave the connection as it is: it is broken."""
        self._selector.close()

    def _text_of(self, statement: Executable) -> _Text:
        """Return the text that SQLAlchemy sends, with the parameters by number."""
        connection, compilable = self._connection, statement
        translated = connection.get_execution_options().get("schema_translate_map")
        compiled: Any = compilable.compile(  # type: ignore[attr-defined]
            dialect=connection.dialect,
            schema_translate_map=translated,
            render_schema_translate=bool(translated),
        )
        names = tuple(compiled.bind_names.values())
        processors = {}
        for bind, name in compiled.bind_names.items():
            convert = bind.type.dialect_impl(connection.dialect).bind_processor(connection.dialect)
            if convert is not None:
                processors[name] = convert
        sql = compiled.string % {name: f"${number}" for number, name in enumerate(names, 1)}
        defaults = {name: bind.effective_value for bind, name in compiled.bind_names.items()}
        text = _Text(sql, defaults, names, processors)
        self._texts[statement] = text
        return text

    def _prepare(self, sql: str, types: Sequence[int]) -> bytes:
        """Return the name of a statement that is prepared for parameters of these types."""
        key = (sql, tuple(types))
        if (name := self._prepared.get(key)) is None:
            # Not to be mixed up with what an earlier user of the connection has prepared.
            name = b"pgqrs_%d" % next(_numbers)
            self._pgconn.send_prepare(name, sql.encode(), types)
            self._flush()
            self._result()
            self._prepared[key] = name
        return name

    def _close_prepared(self, name: bytes) -> None:
        """Ask the server to forget a statement."""
        from psycopg import capabilities  # noqa: PLC0415

        if capabilities.has_send_close_prepared():  # PgBouncer knows it by another name there
            self._pgconn.send_close_prepared(name)
        else:
            self._pgconn.send_query_params(b"DEALLOCATE " + name, None)

    def _flush(self) -> None:
        """Wait until all of a statement was handed to the system."""
        pgconn, socket = self._pgconn, self._pgconn.socket
        if not pgconn.flush():
            return
        self._selector.modify(socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while pgconn.flush():
            for _, events in self._selector.select():
                if events & selectors.EVENT_READ:  # the server may wait for that
                    pgconn.consume_input()
        self._selector.modify(socket, selectors.EVENT_READ)

    def _result(self) -> PGresult:
        """Wait for the reply to what was sent, and return it."""
        pgconn, found = self._pgconn, None
        while True:
            while pgconn.is_busy():
                self._selector.select()
                pgconn.consume_input()
            if (result := pgconn.get_result()) is None:
                break
            found = result
            if result.status not in self._good:
                raise _error(result)
        assert found is not None  # noqa: S101 - there is a result for each statement
        return found

    def _row_maker(self, result: PGresult) -> Callable[[Sequence[Any]], Any]:
        """Return the constructor of a result's rows."""
        names = tuple(map(result.fname, range(result.nfields)))
        if names not in self._row_makers:
            texts = [(name or b"").decode() for name in names]
            row: Any = namedtuple("Row", texts, rename=True)  # type: ignore[misc]  # noqa: PYI024
            self._row_makers[names] = row._make
        return self._row_makers[names]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of the driver as those of SQLAlchemy."""
        import psycopg  # noqa: PLC0415
        from psycopg.pq import ConnStatus  # noqa: PLC0415

        try:
            yield
        except psycopg.Error as error:
            raised = exc.DBAPIError.instance(
                None,
                None,
                error,
                psycopg.Error,
                hide_parameters=True,
                connection_invalidated=self._pgconn.status != ConnStatus.OK,
                dialect=self._connection.dialect,
            )
            raise raised from error


def _error(result: PGresult) -> Exception:
    """Return the error of a statement that failed."""
    import psycopg  # noqa: PLC0415
    from psycopg.pq import DiagnosticField  # noqa: PLC0415

    text = result.error_message.decode(errors="replace").strip()
    code = result.error_field(DiagnosticField.SQLSTATE)
    if code is None:  # the connection was lost
        return psycopg.OperationalError(text)
    try:
        return psycopg.errors.lookup(code.decode())(text)
    except KeyError:
        return psycopg.DatabaseError(f"{text} [{code.decode()}]")

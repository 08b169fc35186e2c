"""Statements that are sent without waiting for their reply."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa.consumer.nonblocking import NonblockingConnection
from pgqrs_sa.consumer.retrying import is_transient, sqlstate
from support.waiting import until

LARGE = 20_000_000
"""Characters: more than the buffers of a socket hold."""


@pytest.fixture
def autocommit(migrated):
    engine = sa.create_engine(
        migrated.direct.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        yield connection


def opened(connection):
    return NonblockingConnection.of(connection, Session(connection))


@pytest.fixture
def line(autocommit):
    line = opened(autocommit)
    yield line
    with contextlib.suppress(sa.exc.DBAPIError):  # some tests break it
        line.close()


def echo(**types):
    """Return a statement that returns its parameters."""
    binds = (sa.bindparam(name, type_=type_) for name, type_ in types.items())
    return sa.select(*(sa.cast(bind, bind.type).label(bind.key) for bind in binds))


def exchange(line, statement, **values):
    line.send(statement, values)
    return line.receive()


def test_parameters_and_rows_are_those_of_the_driver(line, subtests):
    moment = dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    cases = [
        (sa.BigInteger(), 1),
        (sa.BigInteger(), 2**40),
        (sa.Text(), "100 % äöü'\"\\"),
        (sa.Interval(), dt.timedelta(days=-1, seconds=5, microseconds=7)),
        (sa.DateTime(timezone=True), moment),
        (sa.ARRAY(sa.BigInteger), [1, 2**33]),
        (sa.ARRAY(sa.BigInteger), []),
        (sa.Boolean(), True),
        *((type_, None) for type_ in (sa.BigInteger(), sa.Text(), sa.Interval())),
    ]
    for type_, value in cases:
        with subtests.test(type=repr(type_), value=value):
            (row,) = exchange(line, echo(value=type_, other=sa.Text()), value=value, other="x")
            assert (row.value, row.other) == (value, "x")


def test_a_statement_commits_although_nobody_reads_its_reply(line, engine, autocommit):
    driver = autocommit.connection.driver_connection
    line.send(
        sa.text("INSERT INTO pgqrs_queues (queue_name) VALUES (:name) RETURNING id"),
        {"name": "mail"},
    )
    with engine.connect() as other:
        names = sa.text("SELECT queue_name FROM pgqrs_queues")
        state = sa.text("SELECT state, xact_start FROM pg_stat_activity WHERE pid = :pid")
        until(lambda: other.scalars(names).all() == ["mail"], "it is committed")
        pid = {"pid": driver.info.backend_pid}
        until(lambda: other.execute(state, pid).one() == ("idle", None), "the backend is idle")
    assert len(line.receive()) == 1


def test_what_does_not_fit_into_a_buffer_is_sent_and_received(line):
    (row,) = exchange(line, echo(value=sa.Text()), value="x" * LARGE)
    assert row.value == "x" * LARGE


def prepared(connection):
    names = connection.exec_driver_sql("SELECT name FROM pg_prepared_statements").scalars()
    return [name for name in names if name.startswith("pgqrs")]


def test_a_statement_is_prepared_once_until_the_connection_is_given_back(line, autocommit):
    statement = echo(value=sa.BigInteger())
    for value in range(5):
        assert exchange(line, statement, value=value) == [(value,)]
    assert len(prepared(autocommit)) == 1
    line.close()
    assert prepared(autocommit) == []


def test_nothing_is_prepared_where_the_driver_may_not(migrated):
    engine = sa.create_engine(
        migrated.direct.url,
        poolclass=sa.NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"prepare_threshold": None},
    )
    with engine.connect() as connection:
        line = opened(connection)
        assert exchange(line, echo(value=sa.Interval()), value=dt.timedelta(1))[0].value.days == 1
        assert prepared(connection) == []
        line.close()


def test_names_of_schemas_are_translated(migrated):
    engine = sa.create_engine(
        migrated.direct.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
    ).execution_options(schema_translate_map={"x": "pg_catalog"})
    table = sa.Table("pg_class", sa.MetaData(), sa.Column("relname", sa.Text), schema="x")
    statement = sa.select(table.c.relname).where(table.c.relname == sa.bindparam("name"))
    with engine.connect() as connection:
        line = opened(connection)
        assert exchange(line, statement, name="pg_type") == [("pg_type",)]
        line.close()


def test_errors_are_those_of_sqlalchemy(line):
    with pytest.raises(sa.exc.DataError) as caught:
        exchange(line, sa.text("SELECT 1 / CAST(:value AS int)"), value=0)
    assert sqlstate(caught.value) == "22012"
    assert not is_transient(caught.value)


def test_a_lost_connection_is_an_error_that_passes(line, autocommit, migrated):
    pid = autocommit.connection.driver_connection.info.backend_pid
    line.send(sa.text("SELECT pg_sleep(:seconds)"), {"seconds": 600})
    with sa.create_engine(migrated.url, poolclass=sa.NullPool).connect() as other:
        other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    with pytest.raises(sa.exc.DBAPIError) as caught:
        line.receive()
    assert is_transient(caught.value)
    with pytest.raises(sa.exc.DBAPIError) as caught:
        exchange(line, sa.text("SELECT :value"), value=1)
    assert is_transient(caught.value)


def test_a_wait_can_be_aborted(line, autocommit):
    del autocommit
    line.send(sa.text("SELECT pg_sleep(:seconds)"), {"seconds": 600})
    line.abort()
    with pytest.raises(sa.exc.DBAPIError) as caught:
        line.receive()
    assert is_transient(caught.value)


def test_only_psycopg_can(migrated):
    async def check(driver):
        engine = create_async_engine(migrated.async_url(driver), poolclass=sa.NullPool)
        async with engine.connect() as connection:
            return await connection.run_sync(opened)

    assert asyncio.run(check("asyncpg")) is None
    found = asyncio.run(check("psycopg"))
    assert found is not None
    found.discard()


def test_an_application_that_watches_a_session_is_shown_its_statements(autocommit):
    class Watched(Session):
        def execute(self, *args, **kwargs):
            return super().execute(*args, **kwargs)

    assert NonblockingConnection.of(autocommit, Watched(autocommit)) is None

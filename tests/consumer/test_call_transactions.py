"""The end of a call's connection reaches the server, and no other call's connection."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from pgqrs_sa.consumer.call_transactions import CallTransactions, shut_down
from support.waiting import until

PID = sa.text("SELECT pg_backend_pid()")


@pytest.fixture
def engine(threads: Any) -> Any:
    """With one connection."""
    return threads.app_engine(pool_size=1, max_overflow=0)


def unit(*tokens: int) -> Any:
    return SimpleNamespace(deliveries=[SimpleNamespace(fencing_token=token) for token in tokens])


def message(token: int) -> Any:
    return SimpleNamespace(fencing_token=token)


def gone(threads: Any, pid: int) -> bool:
    return not threads.sql("SELECT 1 FROM pg_stat_activity WHERE pid = :pid", pid=pid)


def pid_of(engine: Any) -> int:
    with engine.connect() as connection:
        return connection.scalar(PID)


def test_the_server_rolls_back_what_a_call_has_locked(threads, engine):
    calls = CallTransactions()
    with calls.transaction(unit(1, 2)) as call, engine.connect() as connection:
        call.use(connection)
        call.locks_messages()
        pid = connection.scalar(PID)
        calls.end(message(2))
        calls.end(message(1))
        until(lambda: gone(threads, pid), "the server has ended it")
        with pytest.raises(sa.exc.OperationalError):
            connection.scalar(PID)
    assert pid_of(engine) != pid


def test_a_call_that_locks_nothing_keeps_its_connection(engine):
    calls = CallTransactions()
    with calls.transaction(unit(1)) as call, engine.connect() as connection:
        call.use(connection)
        pid = connection.scalar(PID)
        calls.end(message(1))
        assert connection.scalar(PID) == pid


def test_what_is_back_in_the_pool_is_left_alone(engine):
    calls = CallTransactions()
    with calls.transaction(unit(1)) as call:
        call.locks_messages()
        with engine.connect() as connection:
            call.use(connection)
            pid = connection.scalar(PID)
        calls.end(message(1))
        assert pid_of(engine) == pid
    calls.end(message(1))
    assert pid_of(engine) == pid


def test_a_connection_that_was_ended_after_its_commit_is_not_used_again(engine):
    calls = CallTransactions()
    with calls.transaction(unit(1)) as call:
        call.locks_messages()
        with engine.connect() as connection:
            call.use(connection)
            pid = connection.scalar(PID)
            connection.commit()
            calls.end(message(1))
    assert pid_of(engine) != pid


def test_a_connection_without_a_pool_is_left_alone(engine):
    calls = CallTransactions()
    with calls.transaction(unit(1)) as call, engine.connect() as connection:
        connection.detach()
        call.use(connection)
        call.locks_messages()
        calls.end(message(1))
        assert connection.scalar(PID)


def test_a_connection_that_is_closed_already_is_no_error(engine):
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        connection.invalidate()
    shut_down(driver)
    assert pid_of(engine)


def test_it_ends_where_no_event_loop_runs(tasks):
    engine = create_async_engine(tasks._async_url, poolclass=sa.NullPool)
    calls, loop = CallTransactions(), asyncio.new_event_loop()

    async def begin(call: Any) -> tuple[Any, int]:
        connection = await engine.connect()
        await connection.run_sync(call.use)
        call.locks_messages()
        return connection, await connection.scalar(PID)

    with calls.transaction(unit(1)) as call:
        connection, pid = loop.run_until_complete(begin(call))
        calls.end(message(1))
        until(lambda: gone(tasks, pid), "the server has ended it")

    async def end() -> None:
        await connection.invalidate()
        await connection.close()

    loop.run_until_complete(end())
    loop.close()

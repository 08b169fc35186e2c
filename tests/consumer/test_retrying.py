"""Which errors pass by themselves."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from pgqrs_sa.consumer.retrying import is_transient, retrying, sqlstate, without_parameters
from support.cases import each_case


class Driver(Exception):
    def __init__(self, code=None, name="sqlstate"):
        super().__init__(code)
        setattr(self, name, code)


def wrapped(error, kind=sa.exc.DBAPIError):
    return kind("SELECT 1", {}, error)


@each_case(
    "code",
    [
        "08006",
        "08P01",
        "53300",
        "53100",
        "57P01",
        "57P03",
        "57014",
        "58030",
        "40001",
        "40P01",
        "25006",
        "25P03",
        "55000",
        "55P03",
    ],
)
def test_trouble_of_the_server_passes(code):
    assert is_transient(wrapped(Driver(code)))
    assert is_transient(wrapped(Driver(code, "pgcode")))
    assert is_transient(Driver(code))  # asyncpg's own, while it connects


@each_case("code", ["42P01", "42501", "23505", "22P02", "28P01", "3D000", "57000"])
def test_what_somebody_has_to_fix_does_not(code):
    assert not is_transient(wrapped(Driver(code), sa.exc.OperationalError))


def test_without_a_code_it_is_the_kind_that_counts():
    assert is_transient(wrapped(Driver(), sa.exc.OperationalError))
    assert is_transient(wrapped(Driver(), sa.exc.InterfaceError))
    assert not is_transient(wrapped(Driver(), sa.exc.ProgrammingError))
    assert is_transient(sa.exc.TimeoutError())
    assert is_transient(ConnectionRefusedError())
    assert is_transient(TimeoutError())
    for bug in (ValueError(), KeyError(), AssertionError(), KeyboardInterrupt()):
        assert not is_transient(bug)


def test_an_invalidated_connection_passes_whatever_its_code():
    error = sa.exc.ProgrammingError("SELECT 1", {}, Driver("42P01"), connection_invalidated=True)
    assert is_transient(error)


def test_the_code_is_found_below_what_wraps_it():
    inner = Driver("40001")
    outer = RuntimeError()
    outer.__cause__ = wrapped(inner)
    assert sqlstate(outer) == "40001"
    assert sqlstate(ValueError()) is sqlstate(None) is None


def test_a_code_is_not_looked_for_below_five_errors():
    def chain(wrappers):
        error = Driver("40001")
        for _ in range(wrappers):
            outer = RuntimeError()
            outer.__cause__ = error
            error = outer
        return error

    assert sqlstate(chain(4)) == "40001"
    assert sqlstate(chain(5)) is None


def test_what_asyncpg_says_of_a_connection_that_was_ended_meanwhile_passes():
    class InternalClientError(Exception):
        """As asyncpg 0.30 has it, without a SQLSTATE."""

    class Ended(InternalClientError):
        pass

    assert is_transient(Ended())


@each_case("link", ["itself", "__cause__", "__context__"])
def test_an_error_that_is_logged_has_no_parameters(link):
    statement = sa.exc.DBAPIError("UPDATE", {"error": "hunter2"}, Driver())
    error = statement if link == "itself" else RuntimeError("cannot settle")
    if link != "itself":
        setattr(error, link, statement)
    assert "hunter2" in str(statement)
    assert without_parameters(error) is error
    assert "hunter2" not in str(statement)


def test_it_is_tried_again_until_it_works_or_all_stops():
    stopping = threading.Event()
    tries = []

    def work():
        tries.append(None)
        if len(tries) == 4:
            stopping.set()
        raise wrapped(Driver("57P01"), sa.exc.OperationalError)

    with pytest.raises(sa.exc.OperationalError):  # noqa: PT012
        for attempt in retrying(stopping, "a test", 7):
            with attempt:
                work()
    assert len(tries) == 4
    for attempt in retrying(stopping, "a test", 7):
        with attempt:
            tries.append(None)
    assert len(tries) == 5


def test_what_does_not_pass_is_raised_at_once():
    tries = []
    with pytest.raises(ValueError, match="bug"):  # noqa: PT012
        for attempt in retrying(threading.Event(), "a test", None):
            with attempt:
                tries.append(None)
                raise ValueError("bug")
    assert len(tries) == 1

"""The doctor, called on a database that a test has damaged; and the fixes, run as pasted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import Finding, Thresholds, diagnose
from pgqrs_sa.models import READY_MADE
from support.waiting import until

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=True)


@pytest.fixture
def doctor(engine) -> Callable[..., list[Finding]]:
    """Return a function that examines the database in a transaction of its own."""

    def examine(*only: str, context: Context = CONTEXT, **limits) -> list[Finding]:
        with Session(engine) as session:
            return diagnose(session, context, thresholds=Thresholds(**limits), only=only)

    return examine


@pytest.fixture
def sql(engine) -> Callable[..., None]:
    """Return a function that runs lines of SQL one by one, as psql does."""

    def run(script: str) -> None:
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        with autocommit.connect() as connection:
            for line in script.splitlines():
                connection.exec_driver_sql(line.replace("%", "%%"))

    return run


@pytest.fixture
def fixed(doctor, sql) -> Callable[..., Finding]:
    """Return a function that wants one finding, and its fix to make it go away."""

    def check(*only: str, **options) -> Finding:
        (finding,) = doctor(*only, **options)
        sql(finding.fix)
        # Not at once: a backend ends some time after pg_terminate_backend has returned.
        until(lambda: doctor(*only, **options) == [], "its fix has removed the finding")
        return finding

    return check


@pytest.fixture
def rows(engine) -> Callable[[str], list[sa.Row]]:
    """Return a function that returns what a query finds."""

    def query(text: str) -> list[sa.Row]:
        with engine.connect() as connection:
            return list(connection.exec_driver_sql(text))

    return query

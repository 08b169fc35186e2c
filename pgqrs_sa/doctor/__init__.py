"""The doctor: whether a database is fit to work with, and how to fix what is not.

Every check only reads, and works in a read-only transaction. The exact comparison of the schema
needs temporary tables (see `catalog`), and is less exact without. Run it in a transaction of its
own, which may be committed or rolled back::

    with Session(engine) as session:
        for finding in diagnose(session, Context.of(READY_MADE, None, None, allow_autocommit=True)):
            print(finding.problem, finding.fix)

| module | |
|---|---|
| `findings` | `Finding`, `Thresholds`, and the context that a check gets |
| `schema_diff` | the checks of the version, the columns, indexes and constraints of the tables |
| `checks` | the checks of the server, and of queues, messages and workers |
| `catalog` | the four tables as they should be, and as the database has them |
| `fixes` | the SQL that fixes a table |

The statements that the checks execute are in `pgqrs_sa._core.sql`: `catalog`, `health` and
`integrity`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from .._core.scope import Scope
from ..errors import InvalidArgument
from .catalog import TABLES
from .checks import QUEUE_CHECKS, SERVER_CHECKS, TABLE_CHECKS
from .findings import CheckContext, Finding, Severity, Thresholds
from .schema_diff import compare, invariants, version

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .._core.scope import Context

__all__ = ["CHECKS", "Finding", "Severity", "Thresholds", "diagnose"]

_DEFAULTS = Thresholds()

CHECKS: Mapping[str, Callable[[CheckContext], Iterator[Finding]]] = {
    "schema": version,
    "drift": compare,
    "promises": invariants,
    **SERVER_CHECKS,
    **TABLE_CHECKS,
    **QUEUE_CHECKS,
}
"""The checks by name, in the order in which they are made."""


def diagnose(
    session: Session,
    context: Context,
    *,
    thresholds: Thresholds = _DEFAULTS,
    only: Collection[str] = (),
) -> list[Finding]:
    """Return what is wrong with a database, the errors first.

    Args:
        session: The session to execute the statements in.
        context: The service's settings.
        thresholds: Above which something is a finding.
        only: The names of the checks to make; default: all of `CHECKS`.

    Raises:
        InvalidArgument: a check of that name does not exist.
    """
    if unknown := sorted(set(only) - set(CHECKS)):
        raise InvalidArgument(f"no check is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
    check = CheckContext.of(Scope(session, context), thresholds)
    found: list[Finding] = []
    for name, find in _possible(check).items():
        if not only or name in only:
            found += find(check)
    return sorted(found, key=lambda finding: finding.severity)


def _possible(check: CheckContext) -> Mapping[str, Callable[[CheckContext], Iterator[Finding]]]:
    """Return the checks that can be made with the tables that exist."""
    if not check.tables:
        return {"schema": version, **SERVER_CHECKS}
    missing = [table for name, table in TABLES.items() if name not in check.tables]
    lacking = any(
        column.name not in check.tables[name].columns
        for name, table in TABLES.items()
        if name in check.tables
        for column in table.columns
    )
    if missing or lacking:  # the other checks would fail for what the drift reports
        return {"schema": version, "drift": compare, **SERVER_CHECKS}
    return CHECKS

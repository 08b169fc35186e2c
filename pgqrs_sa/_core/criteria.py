"""Criteria on messages that a caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import ClauseElement, visitors
from sqlalchemy.sql.selectable import AliasedReturnsRows

from .. import validation
from ..errors import InvalidArgument, safe_repr

__all__ = ["Criteria", "criteria_on", "reject_reserved_binds"]

Criteria: TypeAlias = (
    sa.ColumnExpressionArgument[bool] | Sequence[sa.ColumnExpressionArgument[bool]] | None
)
"""One criterion in SQL, several that must all hold, or none."""

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

"""The very SQL of the package, as text: for those who execute it without the package.

The text is compiled from the package's builders, so that it can never be another statement.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import PGCompiler_psycopg, PGDialect_psycopg
from sqlalchemy.sql import Executable

from pgqrs_sa._core.sql import enqueue, lease, settle
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE

from .base import QUEUE

TABLES = tables_of(READY_MADE)

__all__ = ["Statement", "archive", "dequeue", "enqueue_many", "enqueue_one"]

_NAME = re.compile(r"(?<!:):(\w+)")


class _Compiler(PGCompiler_psycopg):
    """Writes ``CAST(:name AS type)``: what pgbench and ``text()`` both read."""

    def render_bind_cast(self, _type: Any, dbapi_type: Any, sqltext: str) -> str:
        name = self.dialect.type_compiler_instance.process(dbapi_type)
        return f"CAST({sqltext} AS {name})"


class _Dialect(PGDialect_psycopg):
    statement_compiler = _Compiler
    supports_statement_cache = True


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL with named parameters.

    Attributes:
        text: ``:name`` stands for a parameter.
        defaults: The values that a call without any options has.
    """

    text: str
    defaults: Mapping[str, Any]

    def values(self, **given: Any) -> dict[str, Any]:
        """Return all parameters of a call."""
        return {**self.defaults, **given}

    def inlined(self, given: Mapping[str, str], free: Iterable[str]) -> str:
        """Return the text with literals for all parameters but the free ones.

        Args:
            given: SQL for some parameters, in place of their defaults.
            free: What stays a parameter.
        """
        kept = set(free)

        def literal(match: re.Match[str]) -> str:
            name = match[1]
            if name in kept:
                return match[0]
            return given[name] if name in given else _literal(self.defaults[name])

        return " ".join(_NAME.sub(literal, self.text).split())


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, timedelta):
        return f"interval '{value.total_seconds()} s'"
    return str(value) if isinstance(value, int | float) else f"'{value}'"


def _statement(built: Executable, **defaults: Any) -> Statement:
    dialect: Any = _Dialect
    clause: Any = built
    compiled = clause.compile(dialect=dialect(paramstyle="named"))
    known = {name: value for name, value in defaults.items() if name in compiled.params}
    return Statement(str(compiled), {**compiled.params, **known})


def _plain(build: Callable[..., Executable]) -> Executable:
    """Build an enqueue without any option, whichever options this version's builder has."""
    parameters = inspect.signature(build).parameters.values()
    options = {
        parameter.name: False
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return build(TABLES, **options)


@cache
def enqueue_one() -> Statement:
    """One message. A call gives payload (JSON text) and size."""
    return _statement(_plain(enqueue.one), queue=QUEUE, priority=0)


@cache
def enqueue_many() -> Statement:
    """A batch. A call gives items (the text of a JSON array of payloads) and size."""
    return _statement(_plain(enqueue.plain), queue=QUEUE)


@cache
def dequeue() -> Statement:
    """A lease. A call gives limit."""
    return _statement(lease.dequeue(TABLES, by_worker=False), queue=QUEUE)


@cache
def archive() -> Statement:
    """An acknowledgement. A call gives ids, tokens and required."""
    return _statement(settle.archive(TABLES, with_reason=False), outcome="archived")

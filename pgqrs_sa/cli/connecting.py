"""The engine of a command, and what to call its database without saying the password."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from ..dsns import servers
from ..settings import Settings, database_url

__all__ = ["engine", "secrets_of", "target"]


def engine(settings: Settings) -> sa.Engine:
    """Return an engine with one connection, on which the tables are those of the schema."""
    # The address is what was meant; the commands themselves are not asynchronous.
    url = database_url(settings.dsn, without_asyncio=True)
    mapped: dict[str, Any] = {}
    if settings.schema is not None:
        mapped = {"schema_translate_map": {None: settings.schema}}
    return sa.create_engine(
        url,
        pool_size=1,
        max_overflow=0,
        connect_args=_connect_args(url, settings),
        execution_options=mapped,
    )


def _connect_args(url: sa.URL, settings: Settings) -> dict[str, Any]:
    driver = url.get_driver_name()
    if driver not in {"psycopg", "psycopg2"}:
        return {}
    # libpq takes whole seconds, and treats 1 as 2.
    timeout = max(2, math.ceil(settings.connection_timeout_seconds))
    wanted: dict[str, Any] = {"connect_timeout": timeout, "application_name": "pgqrs"}
    if driver == "psycopg":
        # A command that repeats itself would prepare its statements, which PgBouncer loses.
        wanted["prepare_threshold"] = None
    return {name: value for name, value in wanted.items() if name not in url.query}


def target(settings: Settings) -> str:
    """Return hosts, database and schema, for people."""
    url = database_url(settings.dsn)
    places = ",".join(_place(host or "localhost", port) for host, port in servers(url))
    database = url.database or url.username or "the user's database"
    where = f"{places}/{database}"
    return where if settings.schema is None else f"{where}, schema {settings.schema}"


def _place(host: str, port: str) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}" if port else host


def secrets_of(dsn: str) -> set[str]:
    """Return the passwords in a DSN, in each form that an error might repeat."""
    try:
        url = database_url(dsn)
    except ValueError:  # what is wrong with it is said by who reads it
        return set()
    found = {url.password, _query(url, "sslpassword")}
    plain = {one for one in found if one}
    return plain | {quote(one, safe="") for one in plain} | {quote_plus(one) for one in plain}


def _query(url: sa.URL, name: str) -> str | None:
    value = url.query.get(name)
    return value if value is None or isinstance(value, str) else ",".join(value)

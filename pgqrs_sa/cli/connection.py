"""The engine of a command, its database without the password, and hints for a failed connection.

A failed connection has no SQLSTATE in libpq, only a text. It is English unless the server is
configured otherwise, and then the hint is a general one.
"""

from __future__ import annotations

import math
import re
from shlex import quote as shell_quote
from typing import Any
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from ..dsns import servers
from ..settings import Settings, database_url

__all__ = ["GENERAL", "engine", "hint", "secrets_of", "target"]

GENERAL = "check the address in --dsn or PGQRS_DSN"

_HINTS: tuple[tuple[str, str], ...] = (
    (
        r"database \"(?P<name>.+)\" does not exist",
        "name another database in {address}, or create this one: createdb {name}",
    ),
    (
        r"role \"(?P<name>.+)\" does not exist",
        "name another user in {address}, or create this role: createuser {name}",
    ),
    (
        r"password authentication failed for user \"(?P<name>.+)\"",
        "the password in {address}, PGPASSWORD or ~/.pgpass is not the one of {name}",
    ),
    (
        r"no password supplied",
        "add the password to {address}, or set PGPASSWORD, or write it into ~/.pgpass",
    ),
    (
        r"pg_hba\.conf",
        "allow this host, user and database in the server's pg_hba.conf, and reload it",
    ),
    (
        r"failed to resolve host|could not translate host name|[Nn]ame or service not known",
        "no such host is known: check the spelling of the host in {address}",
    ),
    (
        r"on socket .* failed: No such file or directory",
        "no server listens on this socket: start it, or name a host in {address}",
    ),
    (
        r"session is read-only|server is in hot standby mode",
        "no host of {address} takes writes now: wait for the promotion, or add the primary to it",
    ),
    (
        r"Connection refused|Connect call failed",
        "nothing listens there: start the server, or check the host and port in {address}",
    ),
    (
        r"timeout|timed out",
        "no answer came in time: check host, port and firewall",
    ),
    (
        r"too many clients|connection slots are reserved",
        "all connections of the server are in use: close some, or raise its max_connections",
    ),
    (
        r"server does not support SSL",
        "switch SSL on in the server, or write sslmode=prefer into {address}",
    ),
    (r"starting up|shutting down|in recovery mode", "try again when the server has started"),
    (r"invalid connection option|invalid .* value", "correct what follows the ? in {address}"),
)


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
    plain = {text for text in found if text}
    return plain | {quote(text, safe="") for text in plain} | {quote_plus(text) for text in plain}


def _query(url: sa.URL, name: str) -> str | None:
    value = url.query.get(name)
    return value if value is None or isinstance(value, str) else ",".join(value)


def hint(said: str, otherwise: str = GENERAL, *, address: str = "the DSN") -> str:
    """Return what to do about a failed connection.

    Args:
        said: The text of the driver's error.
        otherwise: What to return for a text that is not known.
        address: What names the server, for people.
    """
    for pattern, advice in _HINTS:
        if found := re.search(pattern, said):
            names = {key: shell_quote(name) for key, name in found.groupdict().items()}
            return advice.format(address=address, **names)
    return otherwise

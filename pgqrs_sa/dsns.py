"""Read a DSN in the forms of libpq and of SQLAlchemy, with one host or several, as a URL.

Each of these names two servers::

    postgresql://ada@a:5432,b:5433/shop?target_session_attrs=read-write
    host=a,b port=5432,5433 user=ada dbname=shop target_session_attrs=read-write
    postgresql://ada@/shop?host=a:5432&host=b:5433&target_session_attrs=read-write
    postgresql://ada@/shop?host=a,b&port=5432,5433&target_session_attrs=read-write

The first two are libpq's
(https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING), the others are
SQLAlchemy's, of which the last is the only form that psycopg and asyncpg both take with IPv6
addresses and with folders of sockets
(https://docs.sqlalchemy.org/en/20/dialects/postgresql.html#specifying-multiple-fallback-hosts).
So each form becomes the last.

An error repeats nothing of a DSN but the names of keywords: any other part may be of a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from .errors import InvalidArgument

__all__ = ["connect_args", "parse", "servers", "shown"]

_DEFAULT_PORT = "5432"
_LARGEST_PORT = 65535

_ATTRIBUTES = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
"""Values of ``target_session_attrs``, the same in libpq and asyncpg."""

_SEVERAL_HOSTS = {"psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "asyncpg"}

_WITHOUT_ASYNCIO = {"asyncpg": "psycopg", "psycopg_async": "psycopg"}

_FOR_ASYNCPG = {"connect_timeout": "timeout", "sslmode": "ssl"}
"""Options of libpq, and asyncpg's words for the same."""

_SERVER_SETTINGS = ("application_name", "options")
"""Options of libpq that are settings of the session for the server."""

_NUMBERS: Mapping[str, type[int | float]] = {
    "timeout": float,
    "command_timeout": float,
    "statement_cache_size": int,
    "max_cached_statement_lifetime": int,
    "max_cacheable_statement_size": int,
}
"""Options of asyncpg that are numbers, which SQLAlchemy hands on as text."""

_ASYNCPG = {
    *_NUMBERS,
    *_SERVER_SETTINGS,
    "gsslib",
    "host",
    "krbsrvname",
    "passfile",
    "port",
    "prepared_statement_cache_size",
    "service",
    "servicefile",
    "ssl",
    "target_session_attrs",
}
"""The names that may be in the query of a URL for asyncpg."""

_SECRET = ("password", "sslpassword")

_SCHEME = re.compile(r"[\w+]+://")
# Where SQLAlchemy's own pattern finds the user and the hosts.
_URL = re.compile(
    r"(?P<start>[\w+]+://(?:(?P<user>[^:/]*(?::[^@]*)?)@)?)(?P<hosts>[^/?]*)(?P<rest>.*)", re.DOTALL
)
_KEYWORD = re.compile(
    r"\s*(?P<name>[a-z_]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?!')(?:[^\s\\]|\\.)*)", re.DOTALL
)
_SERVER = re.compile(
    r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<folder>/.*?)|(?P<name>[^:/\[\]]*))(?::(?P<port>[^:]*))?"
)

_Query: TypeAlias = dict[str, str | tuple[str, ...]]


class _Server(NamedTuple):
    """A host, or the folder of a socket, and a port; either is empty for the driver's default."""

    host: str
    port: str = ""


def parse(dsn: str | sa.URL, driver: str = "psycopg", *, without_asyncio: bool = False) -> sa.URL:
    """Return a DSN as a URL that names its driver, and all of its hosts.

    Args:
        dsn: A URL, as text or as SQLAlchemy has read it; or keywords with values
            (``host=a,b dbname=shop``).
        driver: The driver of a DSN that names none.
        without_asyncio: Take psycopg where the DSN names a driver that needs asyncio.

    Raises:
        InvalidArgument: it cannot be read, is not PostgreSQL's, or the driver cannot do what it
            says. Nothing was contacted.
    """
    url = _read(dsn)
    backend, _, named = url.drivername.partition("+")
    if backend not in {"postgresql", "postgres"}:
        raise InvalidArgument(f"the DSN is for {backend!r}: pgqrs_sa needs postgresql")
    chosen = named or driver
    if without_asyncio:
        chosen = _WITHOUT_ASYNCIO.get(chosen, chosen)
    return _for_driver(url.set(drivername=f"postgresql+{chosen}"), chosen)


def servers(url: sa.URL) -> list[tuple[str, str]]:
    """Return the hosts of a URL of `parse` with their ports; "" for what it leaves open."""
    hosts = _text(url.query, "host")
    if hosts is None:
        return [(url.host or "", str(url.port or ""))]
    ports = (_text(url.query, "port") or "").split(",")
    names = hosts.split(",")
    return list(zip(names, ports if len(ports) == len(names) else ports * len(names), strict=True))


def connect_args(url: sa.URL) -> tuple[sa.URL, dict[str, object]]:
    """Return a URL of `parse` for ``create_engine``, and the ``connect_args`` to go with it.

    SQLAlchemy hands the query of a URL to asyncpg as text. What has to be a number there, or a
    setting of the session for the server, is taken out of it.
    """
    if url.get_driver_name() != "asyncpg":
        return url, {}
    query: _Query = dict(url.query)
    found: dict[str, object] = {}
    for name, number in _NUMBERS.items():
        if (text := _taken(query, name)) is not None:
            value = number(text)
            # As in libpq, 0 is for no limit.
            found[name] = None if name == "timeout" and value <= 0 else value
    settings = {name: _taken(query, name) for name in _SERVER_SETTINGS if name in query}
    if settings:
        found["server_settings"] = settings
    return url.set(query=query), found


def shown(url: sa.URL) -> str:
    """Return a URL as text for people, without any password: SQLAlchemy shows those in a query."""
    hidden = {name: "***" for name in _SECRET if name in url.query}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _unreadable() -> InvalidArgument:
    return InvalidArgument(
        "the DSN cannot be read: it should look like postgresql://user@host:5432/database, "
        "with any of @ : / in a password or an option written as %40 %3A %2F"
    )


def _read(dsn: str | sa.URL) -> sa.URL:
    if isinstance(dsn, str):
        return _from_text(dsn) if _SCHEME.match(dsn) else _from_keywords(dsn)
    hosts = (dsn.host or "").split(",") if dsn.host or dsn.port else []
    return _placed(dsn, [_Server(host, str(dsn.port or "")) for host in hosts])


def _from_text(dsn: str) -> sa.URL:
    found = _URL.match(dsn)
    # With an @ in the query, that and all before it would be taken for a password; and an @ behind
    # the hosts is likely of a password, whose rest would be taken for them.
    if found is None or re.search(r"^[^:]*\?|/.*\?", found["user"] or ""):
        raise _unreadable()
    path, _, query = found["rest"].partition("?")
    if "@" in path:
        raise _unreadable()
    try:
        url = sa.make_url(f"{found['start']}/?{query}")
    except (ArgumentError, ValueError):
        raise _unreadable() from None
    # SQLAlchemy 2.0 does not decode it.
    url = url.set(database=unquote(path.removeprefix("/")))
    parts = found["hosts"].split(",") if found["hosts"] else []
    listed = [_server(part, number) for number, part in enumerate(parts, 1)]
    return _placed(url, [_Server(unquote(host), port) for host, port in listed])


def _from_keywords(dsn: str) -> sa.URL:
    """Return what libpq reads in ``host=a,b dbname=shop``."""
    if "=" not in dsn:
        raise _unreadable()
    found: _Query = {}
    position, end, after = 0, len(dsn.rstrip()), ""
    while position < end:
        if (pair := _KEYWORD.match(dsn, position)) is None:
            raise InvalidArgument(
                f"the DSN cannot be read{after}: it is a list of keyword=value, and a value with "
                "spaces stands in quotes: host=db user='Ada L.'"
            )
        value = pair["value"][1:-1] if pair["value"].startswith("'") else pair["value"]
        found[pair["name"]] = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
        position, after = pair.end(), f" after {pair['name']}"
    set_only = {name: value for name, value in found.items() if value}
    return _placed(sa.URL.create("postgresql", query=set_only), [])


def _placed(url: sa.URL, listed: list[_Server]) -> sa.URL:
    """Return a URL in which each thing stands in one place, the hosts of its query included.

    What is in the query goes before what is in front of it, as in libpq.
    """
    query: _Query = dict(url.query)
    user, password, database = (
        _taken(query, name) or given
        for name, given in (
            ("user", url.username),
            ("password", url.password),
            ("dbname", url.database),
        )
    )
    if "host" not in query and not listed and "hostaddr" in query:
        query["host"] = query.pop("hostaddr")
    if in_query := _hosts_in(query):
        if any(server.port for server in listed) and not any(server.port for server in in_query):
            query.setdefault("port", ",".join(server.port for server in listed))
        listed = in_query
    listed = _with_ports(listed, query)
    if any("@" in server.host for server in listed):
        raise _unreadable()
    _check_query(query, max(1, len(listed)))
    host, port = None, None
    if len(listed) == 1 and not listed[0].host.startswith("/"):
        host, port = listed[0].host or None, int(listed[0].port) if listed[0].port else None
    elif listed:
        query |= _as_query(listed)
    return sa.URL.create(url.drivername, user, password, host, port, database or None, query)


def _as_query(listed: Sequence[_Server]) -> dict[str, str]:
    found = {"host": ",".join(server.host for server in listed)}
    if any(server.port for server in listed):
        found["port"] = ",".join(server.port or _DEFAULT_PORT for server in listed)
    return found


def _hosts_in(query: _Query) -> list[_Server]:
    """Take the hosts out of a query."""
    given = query.pop("host", ())
    parts = given.split(",") if isinstance(given, str) else given
    return [
        # Not in brackets, as libpq has it in its keyword form.
        _Server(part) if part.count(":") > 1 and "[" not in part else _server(part, number)
        for number, part in enumerate(parts, 1)
    ]


def _with_ports(listed: list[_Server], query: _Query) -> list[_Server]:
    """Take the ports out of a query, and give each host its own."""
    given = query.pop("port", ())
    ports = given.split(",") if isinstance(given, str) else list(given)
    for number, port in enumerate(ports, 1):
        _check_port(port, f"port {number} of the DSN")
    if not ports:
        return listed
    hosts = [server.host for server in listed] or [""]
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise InvalidArgument(
            f"the DSN has {len(ports)} ports for {len(hosts)} host{'s' * (len(hosts) > 1)}: "
            "give one port for each host, or one for all of them"
        )
    return [_Server(host, port) for host, port in zip(hosts, ports, strict=True)]


def _server(text: str, number: int) -> _Server:
    found = _SERVER.fullmatch(text)
    if found is None:
        raise InvalidArgument(
            f"host {number} of the DSN cannot be read: write host:port, "
            "with an IPv6 address in brackets: [::1]:5432"
        )
    port = found["port"] or ""
    _check_port(port, f"the port of host {number} of the DSN")
    return _Server(found["ipv6"] or found["folder"] or found["name"] or "", port)


def _check_port(port: str, what: str) -> None:
    digits = port.isascii() and port.isdigit() and len(port) <= len(str(_LARGEST_PORT))
    if port and not (digits and 0 < int(port) <= _LARGEST_PORT):
        raise InvalidArgument(
            f"the DSN cannot be read: {what} is no number from 1 to {_LARGEST_PORT}, "
            "or a character of its password has to be written as %XX"
        )


def _check_query(query: _Query, hosts: int) -> None:
    attributes = query.get("target_session_attrs")
    if attributes is not None and attributes not in _ATTRIBUTES:
        raise InvalidArgument(
            f"target_session_attrs in the DSN is none of {', '.join(_ATTRIBUTES)}"
        )
    addresses = (_text(query, "hostaddr") or "").split(",")
    if "hostaddr" in query and len(addresses) != hosts:
        raise InvalidArgument(
            f"the DSN has {len(addresses)} values in hostaddr for {hosts} in host"
        )


def _for_driver(url: sa.URL, driver: str) -> sa.URL:
    """Return a URL with what a driver takes, in its own words."""
    query: _Query = dict(url.query)
    for libpq, asyncpg in _FOR_ASYNCPG.items():
        theirs, ours = (libpq, asyncpg) if driver == "asyncpg" else (asyncpg, libpq)
        # pg8000 calls it timeout too.
        if theirs in query and (driver in _SEVERAL_HOSTS or libpq == "sslmode"):
            query.setdefault(ours, query.pop(theirs))
    if driver == "asyncpg":
        _check_asyncpg(query)
    hosts = (_text(query, "host") or "").split(",")
    if len(hosts) > 1 and driver not in _SEVERAL_HOSTS:
        raise InvalidArgument(
            f"the DSN has {len(hosts)} hosts, and the driver {driver!r} connects to one: "
            "name +psycopg in the DSN, or no driver"
        )
    if len(hosts) > 1 and driver == "asyncpg" and "" in hosts:
        raise InvalidArgument(
            f"host {hosts.index('') + 1} of the DSN is empty: asyncpg needs each by its name"
        )
    if len(hosts) > 1:
        # SQLAlchemy passes on empty ports, for which libpq would not read PGPORT.
        port = os.environ.get("PGPORT") or _DEFAULT_PORT
        query.setdefault("port", ",".join([port] * len(hosts)))
    return url.set(query=query)


def _check_asyncpg(query: _Query) -> None:
    if unknown := sorted(set(query) - _ASYNCPG):
        raise InvalidArgument(
            f"asyncpg has no option {' or '.join(unknown)}, which the DSN has: leave it out, or "
            "name +psycopg in the DSN"
        )
    for name, number in _NUMBERS.items():
        try:
            number(_text(query, name) or 0)
        except ValueError:
            raise InvalidArgument(f"{name} in the DSN is no number") from None


def _taken(query: _Query, name: str) -> str | None:
    text = _text(query, name)
    query.pop(name, None)
    return text


def _text(query: Mapping[str, str | tuple[str, ...]], name: str) -> str | None:
    value = query.get(name)
    return value if value is None or isinstance(value, str) else ",".join(value)

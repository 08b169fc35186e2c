"""What to do about a connection that could not be made, by what the driver or the server said.

A failed connection has no SQLSTATE in libpq, only a text. It is English unless the server was
told otherwise, and then the hint is a general one.
"""

from __future__ import annotations

import re
from shlex import quote

__all__ = ["GENERAL", "hint"]

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


def hint(said: str, otherwise: str = GENERAL, *, address: str = "the DSN") -> str:
    """Return what to do about a failed connection.

    Args:
        said: The text of the driver's error.
        otherwise: What to return for a text that is not known.
        address: What names the server, for people.
    """
    for pattern, advice in _HINTS:
        if found := re.search(pattern, said):
            names = {key: quote(name) for key, name in found.groupdict().items()}
            return advice.format(address=address, **names)
    return otherwise

"""PgBouncer in transaction mode in front of a server.

::

    with PgBouncer(address) as bouncer:
        engine = sa.create_engine(bouncer.address.url("psycopg"), **PSYCOPG)
        bouncer.restart()     # as a deployment does it
        bouncer.crash()       # by SIGKILL

`SETTINGS` are the engine's arguments that docs/how-to/pgbouncer.md tells people to use.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import sqlalchemy as sa
import sqlalchemy.event

from .servers import Address
from .waiting import until

BINARY = os.environ.get("PGQRS_TEST_PGBOUNCER_BIN") or shutil.which(
    "pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"
)
"""The program, or None: then the tests that need it are left out."""

PSYCOPG: dict[str, Any] = {"connect_args": {"prepare_threshold": None}}
ASYNCPG: dict[str, Any] = {
    "poolclass": sa.NullPool,
    "connect_args": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"pgqrs_{uuid4().hex}",
    },
}
SETTINGS = {"psycopg": PSYCOPG, "psycopg_async": PSYCOPG, "asyncpg": ASYNCPG}


def _as_documented(
    dialect: sa.Dialect, _record: object, _arguments: object, parameters: dict[str, Any]
) -> None:
    settings = ASYNCPG if dialect.driver == "asyncpg" else PSYCOPG
    for name, value in settings["connect_args"].items():
        parameters.setdefault(name, value)


@contextmanager
def documented_settings() -> Iterator[None]:
    """Give every engine in this process the ``connect_args`` of the documentation."""
    sa.event.listen(sa.Engine, "do_connect", _as_documented)
    yield
    sa.event.remove(sa.Engine, "do_connect", _as_documented)


_CONFIG = """
[databases]
* = host={host} port={port}
[pgbouncer]
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
admin_users = pgqrs_admin
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
server_round_robin = 1
server_login_retry = 0
server_idle_timeout = 1
ignore_startup_parameters = extra_float_digits,options,search_path
logfile = {folder}/pgbouncer.log
pidfile = {folder}/pgbouncer.pid
"""


class PgBouncer:
    """One PgBouncer. A small pool makes sure that connections are shared.

    Server connections are handed out in turn, so that one client's transactions are seen to run
    on several. Further ``settings`` win over these.
    """

    def __init__(self, behind: Address, pool_size: int = 10, **settings: str) -> None:
        assert BINARY, "there is no pgbouncer: apt-get install pgbouncer"
        self.folder = Path(tempfile.mkdtemp(prefix="pgb-"))
        self.address = behind.via(str(self.folder), 6432)
        self.config = self.folder / "pgbouncer.ini"
        # With auth_type any, the server is logged into as the user that is named here.
        host = f"{behind.host} user={behind.user}"
        text = _CONFIG.format(host=host, port=behind.port, folder=self.folder, pool_size=pool_size)
        # Of two lines for one setting, the last one holds.
        self.config.write_text(text + "".join(f"{k} = {v}\n" for k, v in settings.items()))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    @property
    def log(self) -> str:
        return (self.folder / "pgbouncer.log").read_text()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        nobody = None
        if os.geteuid() == 0:  # PgBouncer refuses root, as PostgreSQL does
            account = pwd.getpwnam("nobody")
            nobody = account.pw_uid
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        self._process = subprocess.Popen(
            [BINARY or "", "-q", str(self.config)],
            stdin=subprocess.DEVNULL,
            user=nobody,
            extra_groups=None if nobody is None else [],
        )
        until(self._answers, "PgBouncer answers")

    def kill(self) -> None:
        """SIGKILL: every client's and every server's connection ends at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(90)
            self._process = None
            (self.folder / "pgbouncer.pid").unlink(missing_ok=True)

    def crash(self) -> None:
        """Kill it, and start it again."""
        self.kill()
        self.start()

    def restart(self) -> None:
        """SIGTERM and a new start, as a package's upgrade does it."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(90)
        self.start()

    def show(self, what: str) -> list[tuple[object, ...]]:
        """Ask the admin console: ``pools``, ``servers``, ``stats``."""
        import psycopg

        admin = psycopg.connect(
            host=str(self.folder),
            port=6432,
            user="pgqrs_admin",
            dbname="pgbouncer",
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,
        )
        with admin:
            return list(admin.execute(f"SHOW {what}").fetchall())

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.address.target) == 0

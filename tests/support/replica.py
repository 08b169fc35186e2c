"""A standby by streaming replication, and a link to it that can be cut or silenced.

::

    with own_server() as primary, standby_of(primary) as standby:
        standby.wait_for(primary)              # it has all that was committed so far
        make_synchronous(primary)              # from here on a commit waits for the standby
        standby.link.freeze()                  # the standby falls behind and does not know
        primary.server.stop("immediate")
        standby.promote()
        url = either(primary, standby, "one")  # whichever of the two takes writes
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from pgqrs_sa import embedded

from .proxy import Proxy
from .servers import OwnServer, run_sql
from .waiting import until


@dataclass(frozen=True)
class Standby(OwnServer):
    """A server that follows another one, until it is promoted.

    Attributes:
        link: What the replication goes through.
    """

    link: Proxy

    def promote(self) -> None:
        """Make it a primary, and wait until it takes writes."""
        self.server._pg_ctl("promote")

    def wait_for(self, primary: OwnServer) -> None:
        """Wait until it has replayed all that the primary has written so far."""
        ((end,),) = run_sql(primary.address, "SELECT pg_current_wal_insert_lsn()::text")
        behind = "SELECT pg_last_wal_replay_lsn() < CAST(:goal AS pg_lsn)"
        until(lambda: run_sql(self.address, behind, goal=end) == [(False,)], "it has caught up")


@contextmanager
def standby_of(primary: OwnServer) -> Iterator[Standby]:
    """Copy a running server and follow it, for the length of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="pgqrs-") as folder,
        Proxy(primary.address.target) as link,
    ):
        base = Path(folder)
        if os.geteuid() == 0:
            account = pwd.getpwnam("nobody")
            os.chown(base, account.pw_uid, account.pw_gid)
        server = embedded.EmbeddedServer(
            primary.server.bin_dir, base / "data", base, primary.server.port, primary.server.user
        )
        host, port = link.address
        source = f"host={host} port={port} user={server.user} application_name=standby"
        copied = embedded._run(
            server.bin_dir / "pg_basebackup",
            *("-d", source, "-D", str(server.data_dir), "-R", "-X", "stream", "-c", "fast"),
            "--no-sync",
        )
        assert copied.returncode == 0, copied.stdout
        with (server.data_dir / "postgresql.conf").open("a") as conf:
            conf.write(f"unix_socket_directories = '{base}'\n")
        server.log_file.unlink(missing_ok=True)
        try:
            server.start()
            yield Standby(server, link)
        finally:
            embedded._run(
                server.bin_dir / "pg_ctl", "stop", "-D", str(server.data_dir), "-m", "immediate"
            )


def make_synchronous(primary: OwnServer) -> None:
    """Let commits wait until the standby has them on its disk."""
    run_sql(primary.address, "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    run_sql(primary.address, "SELECT pg_reload_conf()")
    state = "SELECT sync_state FROM pg_stat_replication"
    until(lambda: run_sql(primary.address, state) == [("sync",)], "the standby is synchronous")


def either(server: OwnServer, other: OwnServer, dbname: str) -> sa.URL:
    """An address with two hosts: whichever takes writes (F30)."""
    hosts = [server.address, other.address]
    return sa.URL.create(
        "postgresql+psycopg",
        server.address.user,
        database=dbname,
        query={
            "host": ",".join(each.host for each in hosts),
            "port": ",".join(str(each.port) for each in hosts),
            "target_session_attrs": "read-write",
        },
    )

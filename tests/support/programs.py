"""Run Python programs as processes of their own, without the second that their imports take.

::

    done = programs.run("-m", "pgqrs_sa", "queue", "list", env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr

    with programs.start("-c", code, "an argument", env=environment) as program:
        assert program.stdout.readline() == "ready\\n"
        program.terminate()
        out, errors = program.communicate()

The arguments are those of the interpreter: any ``-W FILTER``, then ``-m MODULE``, ``-c CODE`` or a
file, and what follows.
A server process imports this package and its libraries once. It opens no connection and starts no
thread, and forks a child for each program. A child has its own standard streams, environment,
current folder and arguments, and it ends as any program does: exit handlers run, threads are
joined and streams are flushed.

Use `subprocess` for what only a new interpreter shows: its start-up, which modules a command
imports, what libraries warn of when they are imported, and standard streams that are closed.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

from support.waiting import PATIENCE

__all__ = ["Program", "environment", "run", "start", "start_in_terminal"]

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    *("alembic.command", "alembic.config", "asyncpg", "click", "durationpy", "psycopg"),
    *("rich.console", "rich.live", "rich.table", "sqlalchemy.dialects.postgresql.asyncpg"),
    *("sqlalchemy.dialects.postgresql.psycopg", "sqlalchemy.ext.asyncio", "sqlalchemy.orm"),
    *("tenacity", "yaml"),
)
NOT_IMPORTED = ("pgqrs_sa.__main__", "pgqrs_sa.pytest_plugin")


class Program:
    """A process, with the methods of `subprocess.Popen`.

    Args:
        pid: Its number. It is a child of the server, not of this process.
        stdin: Its standard input, if it is a pipe.
        stdout: Its standard output, if it is a pipe.
        errors: The file that its standard error goes to.
    """

    def __init__(
        self,
        pid: int,
        stdin: IO[str] | None = None,
        stdout: IO[str] | None = None,
        errors: IO[str] | None = None,
    ) -> None:
        self.pid = pid
        self._stdin, self._stdout, self._errors = stdin, stdout, errors
        self.returncode: int | None = None
        self._changed = threading.Condition()
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(PATIENCE)
        for stream in (self._stdin, self._stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    @property
    def stdin(self) -> IO[str]:
        assert self._stdin is not None
        return self._stdin

    @property
    def stdout(self) -> IO[str]:
        assert self._stdout is not None
        return self._stdout

    @property
    def errors(self) -> str:
        """What it has written to its standard error so far."""
        assert self._errors is not None
        return os.pread(self._errors.fileno(), 1 << 24, 0).decode(errors="replace")

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait for its end; return the rest of its standard output, and its standard error."""
        if self._stdin is not None:
            self._stdin.close()
        rest = ""
        if self._stdout is not None:
            threading.Thread(target=self._kill_after, args=(timeout,), daemon=True).start()
            rest = self._stdout.read()
        self.wait(timeout)
        return rest, self.errors if self._errors is not None else ""

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            if number == signal.SIGCONT:
                self._stopped = False
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def stop(self, timeout: float = PATIENCE) -> None:
        """Send SIGSTOP, and wait until it has stopped."""
        self.send_signal(signal.SIGSTOP)
        with self._changed:
            assert self._changed.wait_for(lambda: self._stopped, timeout), "it does not stop"

    def note(self, status: int) -> None:
        """Record a status of `os.waitpid`."""
        with self._changed:
            if os.WIFSTOPPED(status):
                self._stopped = True
            else:
                self.returncode = os.waitstatus_to_exitcode(status)
            self._changed.notify_all()

    def _kill_after(self, timeout: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout)
            return
        self.kill()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that imports `support` and this checkout's package."""
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    input: str = "",
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out:
        given.write(input)
        given.seek(0)
        with start(*arguments, env=env, cwd=cwd, stdin=given, stdout=out) as program:
            code = program.wait(timeout)
            errors = program.errors
        out.seek(0)
        return subprocess.CompletedProcess([*map(str, arguments)], code, out.read(), errors)


def start(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdin: IO[str] | None = None,
    stdout: IO[str] | None = None,
    errors: IO[str] | None = None,
) -> Program:
    """Start a program. Its standard input and output are pipes, unless files are given."""
    if errors is None:
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the program
    writing = reading = None
    ends = []
    if stdin is None:
        end, writing = os.pipe()
        ends.append(end)
    if stdout is None:
        reading, other = os.pipe()
        ends.append(other)
    fds = (
        ends[0] if stdin is None else stdin.fileno(),
        ends[-1] if stdout is None else stdout.fileno(),
        errors.fileno(),
    )
    program = Program(
        0,
        None if writing is None else os.fdopen(writing, "w"),
        None if reading is None else os.fdopen(reading),
        errors,
    )
    _server().fork(program, _request(arguments, env, cwd), fds)
    for end in ends:
        os.close(end)
    return program


def start_in_terminal(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    size: tuple[int, int] = (24, 120),
) -> tuple[Program, int]:
    """Start a program in a new pseudo-terminal; return it, and this side of the terminal."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, size)
    program = Program(0)
    request = _request(arguments, env, cwd) | {"terminal": True}
    _server().fork(program, request, (theirs, theirs, theirs))
    os.close(theirs)
    return program, ours


def _request(
    arguments: tuple[object, ...], env: Mapping[str, str] | None, cwd: Path | str | None
) -> dict[str, Any]:
    return {
        "arguments": [str(argument) for argument in arguments],
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or Path.cwd()),
        "terminal": False,
    }


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.programs", str(theirs.fileno())],
            cwd=ROOT,
            env=environment(),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._programs: dict[int, Program] = {}
        self._asking = threading.Lock()
        self._waiting: Program | None = None
        self._started = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def fork(self, program: Program, request: dict[str, Any], fds: tuple[int, int, int]) -> None:
        """Fork a child that runs the program; set its `pid`."""
        with tempfile.TemporaryFile("w+") as file, self._asking:
            # The environment may be larger than a packet.
            json.dump(request, file)
            file.flush()
            handed = array.array("i", [*fds, file.fileno()])
            with self._started:
                self._waiting = program
                self._socket.sendmsg([b"fork"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handed)])
                started = self._started.wait_for(lambda: self._waiting is None, PATIENCE)
        if not started:
            # Its answer may still come, and would be taken for that of the next program: every
            # later test would then wait for, and kill, the process of another.
            _server.cache_clear()
            raise AssertionError("the server that forks does not answer")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(PATIENCE)
        self._socket.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(1000):
                pid, status = json.loads(data)
                if status is not None:
                    # A child's number is sent before any status of it.
                    program = self._programs[pid]
                    if not os.WIFSTOPPED(status):
                        del self._programs[pid]
                    program.note(status)
                    continue
                with self._started:
                    assert self._waiting is not None
                    self._waiting.pid = pid
                    self._programs[pid] = self._waiting
                    self._waiting = None
                    self._started.notify_all()


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


# ---------------------------------------------------------------------- in the other process


def _serve(number: int) -> dict[str, Any]:
    """Fork until the other side is gone; return in each child, with its request."""
    parent = socket.socket(fileno=number)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([parent, wake], [], [])
        if wake in ready:
            os.read(wake, 1000)
            _report(parent)
        if parent not in ready:
            continue
        data, ancillary, _, _ = parent.recvmsg(1000, socket.CMSG_SPACE(16))
        if not data:
            os._exit(0)
        fds = array.array("i", ancillary[0][2])
        if pid := os.fork():
            for fd in fds:
                os.close(fd)
            parent.send(json.dumps([pid, None]).encode())
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        parent.close()
        os.close(wake)
        os.close(waker)
        *streams, described = fds
        for place, fd in enumerate(streams):
            os.dup2(fd, place)
        for fd in {*streams}:
            os.close(fd)
        with os.fdopen(described) as file:
            file.seek(0)
            request: dict[str, Any] = json.load(file)
        return request


def _report(parent: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            parent.send(json.dumps([pid, status]).encode())


def _become(request: dict[str, Any]) -> None:
    """Run the program in this child."""
    if request["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    kind, *rest = request["arguments"]
    while kind == "-W":
        warnings._setoption(rest[0])
        kind, *rest = rest[1:]
    paths = [place for place in request["env"].get("PYTHONPATH", "").split(":") if place]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-m":
        module, *given = rest
        sys.argv, sys.path[:1] = [module, *given], [request["cwd"], *paths]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if kind == "-c":
        code, *given = rest
        sys.argv, sys.path[:1] = ["-c", *given], ["", *paths]
        name = "<string>"
    else:
        code = Path(kind).read_text()
        sys.argv, sys.path[:1] = [kind, *rest], [str(Path(kind).resolve().parent), *paths]
        main.__file__ = name = kind
    exec(compile(code, name, "exec", dont_inherit=True), main.__dict__)  # noqa: S102


def _import_everything() -> None:
    import pgqrs_sa

    for name in LIBRARIES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(pgqrs_sa.__path__, "pgqrs_sa."):
        if module.name not in NOT_IMPORTED:
            importlib.import_module(module.name)


if __name__ == "__main__":
    _import_everything()
    gc.collect()
    gc.freeze()  # what is shared is not copied by a collection
    _become(_serve(int(sys.argv[1])))

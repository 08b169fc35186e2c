"""Processes that have imported everything already: forked, since an import takes a second.

One process imports the worker's program, opens no connection and starts no thread, and forks a
child for each that is wanted. A child gets standard streams of its own, and ends as a process
that was started by itself does. The parent tells of every child that has stopped or ended.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_HERE = Path(__file__).parents[1]

_PROGRAM = f"""
import sys
sys.path[:0] = [{str(_HERE)!r}, {str(_HERE.parent / "chaos")!r}, {str(_HERE.parents[1])!r}]
from hands.nursery import child
from hands.worker import main
main(child(int(sys.argv[1])))
"""


class Child:
    """One process, with what the tests need of `subprocess.Popen`."""

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._news = threading.Condition()
        self._stopped = False

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._news:
            if not self._news.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            if number == signal.SIGCONT:
                self._stopped = False
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def stop(self, timeout: float) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.send_signal(signal.SIGSTOP)
        with self._news:
            assert self._news.wait_for(lambda: self._stopped, timeout), "it does not stop"

    def hear(self, status: int) -> None:
        with self._news:
            if os.WIFSTOPPED(status):
                self._stopped = True
            else:
                self.returncode = os.waitstatus_to_exitcode(status)
            self._news.notify_all()


class Nursery:
    """The process that forks; kept for as long as this one lives."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._born: dict[int, Child] = {}
        self._early: dict[int, list[int]] = {}
        self._lock = threading.Lock()
        self._pids: list[int] = []
        self._told = threading.Condition(self._lock)
        threading.Thread(target=self._listen, daemon=True).start()

    def bear(self, args: dict[str, Any], errors: IO[str]) -> Child:
        """Fork a child that runs the worker's program; one thread at a time."""
        read_in, write_in = os.pipe()
        read_out, write_out = os.pipe()
        fds = array.array("i", [read_in, write_out, errors.fileno()])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        self._socket.sendmsg([json.dumps(args).encode()], ancillary)
        os.close(read_in)
        os.close(write_out)
        with self._told:
            assert self._told.wait_for(lambda: self._pids, 30), "the nursery does not answer"
            pid = self._pids.pop()
            one = self._born[pid] = Child(pid, os.fdopen(write_in, "w"), os.fdopen(read_out))
            early = self._early.pop(pid, [])
        for status in early:
            one.hear(status)
        return one

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(90)
        self._socket.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(1000):
                pid, status = json.loads(data)
                with self._told:
                    if status is None:
                        self._pids.append(pid)
                        self._told.notify_all()
                        continue
                    one = self._born.get(pid)
                    if one is None:
                        self._early.setdefault(pid, []).append(status)
                        continue
                one.hear(status)


def child(number: int) -> dict[str, Any]:
    """Fork until the other side is gone; return in each child, with its arguments."""
    parent = socket.socket(fileno=number)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    was = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([parent, wake], [], [])
        if wake in ready:
            os.read(wake, 1000)
            _tell(parent)
        if parent not in ready:
            continue
        data, ancillary, _, _ = parent.recvmsg(100_000, socket.CMSG_SPACE(12))
        if not data:
            os._exit(0)
        fds = array.array("i", ancillary[0][2])
        if pid := os.fork():
            for fd in fds:
                os.close(fd)
            parent.send(json.dumps([pid, None]).encode())
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, was)
        parent.close()
        for place, fd in enumerate(fds):
            os.dup2(fd, place)
            os.close(fd)
        os.close(wake)
        os.close(waker)
        args: dict[str, Any] = json.loads(data)
        return args


def _tell(parent: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            parent.send(json.dumps([pid, status]).encode())

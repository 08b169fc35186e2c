"""Count the requests and commits of a client's connections.

A `Wire` is a proxy with its own Unix socket. It passes everything on and reads the answers of the
server. Each request ends with ReadyForQuery, whatever the driver; a driver that waits for it makes
a round trip. The proxy takes CPU time, so nothing else is measured while it counts.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Self

from .place import Place

__all__ = ["Answers", "Wire"]

_HEADER = struct.Struct("!cI")  # the type of a message, and its length without the type
_READ = 1 << 16


class Answers:
    """The answers of the server on one connection.

    Attributes:
        requests: The number of answers, including the one that opens the connection.
        commits: The number of transactions that ended without a rollback.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.commits = 0
        self._rest = bytearray()
        self._started = False
        self._completed: bytes | None = None

    def feed(self, data: bytes) -> None:
        """Read bytes. They may end in the middle of a message."""
        self._rest += data
        if self._rest[:1] in (b"N", b"S") and not self._started:
            del self._rest[0]  # the answer to a request for encryption is one byte
        while len(self._rest) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._rest)
            if len(self._rest) <= length:
                return
            self._take(kind, bytes(self._rest[_HEADER.size : length + 1]))
            del self._rest[: length + 1]

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == b"C":
            self._completed = body
        if kind != b"Z":
            self._started = self._started or kind == b"R"
            return
        self.requests += 1
        if body == b"I":
            if self._completed is not None and not self._completed.startswith(b"ROLLBACK"):
                self.commits += 1
            self._completed = None


class Wire:
    """A proxy in front of a database; a context manager.

    Args:
        place: The database.
    """

    def __init__(self, place: Place) -> None:
        self._target = str(Path(place.host) / f".s.PGSQL.{place.port}")
        self._folder = tempfile.mkdtemp(prefix="wire")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(Path(self._folder) / f".s.PGSQL.{place.port}"))
        self._answers: list[Answers] = []
        self.place = replace(place, host=self._folder)

    @property
    def requests(self) -> int:
        """Requests answered on all connections, except those that opened them."""
        return sum(max(0, answers.requests - 1) for answers in list(self._answers))

    @property
    def commits(self) -> int:
        """Transactions committed on all connections."""
        return sum(answers.commits for answers in list(self._answers))

    def __enter__(self) -> Self:
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                answers = Answers()
                self._answers.append(answers)
                threading.Thread(
                    target=_connect, args=(client, server, self._target, answers), daemon=True
                ).start()


def _connect(client: socket.socket, server: socket.socket, target: str, answers: Answers) -> None:
    """Pass both directions on until one side closes its connection, and close the other."""
    with client, server:
        server.connect(target)
        requests = threading.Thread(target=_copy, args=(client, server), daemon=True)
        requests.start()
        _copy(server, client, answers)
        requests.join()


def _copy(source: socket.socket, target: socket.socket, answers: Answers | None = None) -> None:
    """Copy one direction until either side is closed. An answer is counted before it arrives."""
    with contextlib.suppress(OSError):
        while data := source.recv(_READ):
            if answers is not None:
                answers.feed(data)
            target.sendall(data)
    for side in (source, target):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)

"""A TCP proxy in front of PostgreSQL that understands just enough of the protocol to be mean.

::

    with Proxy(address.target) as proxy:
        engine = sa.create_engine(address.via(*proxy.address).url("psycopg"))
        lost = proxy.lose_reply("COMMIT")   # the server commits, the client never hears of it
        cut = proxy.cut_before("COMMIT")    # the server never hears of it
        proxy.cut_all()                     # every connection ends
        proxy.freeze()                      # every connection goes silent, for good: no FIN, no RST
        lost.wait()                         # until it happened

Patterns are regular expressions, searched for in the text of a statement that is executed, with
or without a prepared statement. Each is good for one statement; ``lose_reply`` cuts the
connection once the server has said that it is ready again, and so has done its work.
"""

from __future__ import annotations

import ctypes
import re
import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_SSL, _GSS, _CANCEL = 80877103, 80877104, 80877102


@dataclass
class Fault:
    """Something that will happen to the next statement that matches."""

    pattern: re.Pattern[str]
    before: bool
    happened: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout: float = 30) -> None:
        assert self.happened.wait(timeout), f"no statement matched {self.pattern.pattern!r}"


class _Closed(Exception):
    """One side, or a fault, has ended the connection."""


class _Side:
    """One socket, and the bytes of it that are not a whole message yet."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.rest = b""
        self.begun = False  # the first message of a client has no type byte

    def read(self) -> list[bytes]:
        try:
            data = self.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            raise _Closed
        self.rest += data
        return list(self._whole())

    def _whole(self):
        while True:
            head = 1 if self.begun else 0
            if len(self.rest) < head + 4:
                return
            (length,) = struct.unpack_from("!I", self.rest, head)
            if len(self.rest) < head + length:
                return
            message, self.rest = self.rest[: head + length], self.rest[head + length :]
            yield message

    def write(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            raise _Closed from None


class _Link(threading.Thread):
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        super().__init__(daemon=True)
        self.proxy = proxy
        self.client = _Side(client)
        self.server = _Side(_connect(proxy.target))
        self.server.begun = True
        self.wake, self.waker = socket.socketpair()
        self.statements: dict[bytes, str] = {}
        self.portals: dict[bytes, str] = {}
        self.doomed: Fault | None = None
        self.frozen = self.ended = False

    def run(self) -> None:
        sides = {self.client.sock: self._from_client, self.server.sock: self._from_server}
        with suppress(_Closed):
            while True:
                # A frozen link reads nothing: it only waits to be cut.
                ready, _, _ = select.select([self.wake, *([] if self.frozen else sides)], [], [])
                if self.ended:
                    break
                if self.wake in ready:
                    self.wake.recv(100)
                    continue
                for sock in ready:
                    sides[sock]()
        for sock in (self.client.sock, self.server.sock, self.wake, self.waker):
            sock.close()
        self.proxy._forget(self)

    def wake_up(self) -> None:
        with suppress(OSError):
            self.waker.send(b"!")

    def _from_client(self) -> None:
        for message in self.client.read():
            if not self.client.begun:
                self._startup(message)
                continue
            if (sql := self._executed(message)) and not self.doomed:
                self.doomed = self.proxy._fault_for(sql)
            if self.doomed and self.doomed.before:
                self.doomed.happened.set()
                raise _Closed
            self.server.write(message)

    def _startup(self, message: bytes) -> None:
        (code,) = struct.unpack_from("!I", message, 4)
        if code in (_SSL, _GSS):
            self.client.write(b"N")
            return
        self.client.begun = code != _CANCEL
        self.server.write(message)

    def _from_server(self) -> None:
        for message in self.server.read():
            if self.doomed is None:
                self.client.write(message)
            elif message[:1] == b"Z":  # ready for the next query: this one is done
                self.doomed.happened.set()
                raise _Closed

    def _executed(self, message: bytes) -> str | None:
        """The text of the statement, if this message executes one."""
        kind, body = message[:1], message[5:]
        if kind == b"Q":
            return body[:-1].decode(errors="replace")
        if kind == b"P":
            name, sql, _ = body.split(b"\0", 2)
            self.statements[name] = sql.decode(errors="replace")
        elif kind == b"B":
            portal, name, _ = body.split(b"\0", 2)
            self.portals[portal] = self.statements.get(name, "")
        elif kind == b"E":
            return self.portals.get(body.split(b"\0", 1)[0])
        return None


class Proxy:
    """See the module. ``target`` is a path or a (host, port)."""

    def __init__(self, target: str | tuple[str, int]) -> None:
        self.target = target
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._links: set[_Link] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, for ``address.via(*proxy.address)``."""
        host, port = self._listener.getsockname()
        return host, port

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._links)

    def lose_reply(self, pattern: str = "^COMMIT") -> Fault:
        """Let the server do the next such statement, but lose its reply and the connection."""
        return self._arm(pattern, before=False)

    def cut_before(self, pattern: str = "^COMMIT") -> Fault:
        """Cut the connection instead of passing the next such statement on."""
        return self._arm(pattern, before=True)

    def cut_all(self) -> None:
        """End every connection, and wait until they have ended."""
        for link in self._taken():
            link.ended = True
            link.wake_up()
            link.join(90)

    def freeze(self) -> None:
        """Let every connection that there is go silent both ways, and never say so.

        The server's side stays open. New connections are served. On Linux not even the client's
        bytes are acknowledged, as when a cable is cut, so that ``tcp_user_timeout`` and keepalives
        do their work; elsewhere the bytes go nowhere.
        """
        for link in self._taken():
            link.frozen = True
            _drop_what_comes(link.client.sock)
            link.wake_up()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(90)
        self.cut_all()

    def _arm(self, pattern: str, *, before: bool) -> Fault:
        fault = Fault(re.compile(pattern), before)
        with self._lock:
            self._faults.append(fault)
        return fault

    def _fault_for(self, sql: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.pattern.search(sql):
                    self._faults.remove(fault)
                    return fault
        return None

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                link = _Link(self, client)
            except OSError:  # the server is down: the client sees its connection end
                client.close()
                continue
            with self._lock:
                self._links.add(link)
            link.start()

    def _taken(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


def _connect(target: str | tuple[str, int]) -> socket.socket:
    if not isinstance(target, str):
        return socket.create_connection(target)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


def _drop_what_comes(sock: socket.socket) -> None:
    """Attach a packet filter that lets nothing in: the kernel drops it unacknowledged."""
    if sys.platform == "linux":
        nothing = _Instruction(0x06, 0, 0, 0)  # BPF_RET: keep 0 bytes
        program = struct.pack("HP", 1, ctypes.addressof(nothing))
        sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER

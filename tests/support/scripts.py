"""Python processes that say how far they are, and that are killed there.

::

    code = '''
    engine = sa.create_engine(args["url"])
    with Session(engine) as session:
        delivery, = QueueService(session).dequeue("mail")
        session.commit()
        say("leased", id=delivery.id)     # a line to the parent
        hear("go")                        # waits for it
    '''
    with Script(code, url=url) as process:
        leased = process.expect("leased")     # {"id": 1}
        process.freeze()                      # SIGSTOP, seen to have stopped
        process.thaw()                        # SIGCONT
        process.tell("go")
        assert process.wait() == 0

The code finds ``args``, ``say``, ``hear``, ``sa``, ``Session`` and ``QueueService``, and may import
`support`. Processes that still run at the end of the block are killed. What a process writes to its
standard error is in the message of a failure; its standard output is the line to the parent, so
print nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import signal
import tempfile
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from support import programs

WAIT = 90.0

_PRELUDE = """
import json, sys
import sqlalchemy as sa
from sqlalchemy.orm import Session
from pgqrs_sa import QueueService
args = json.loads(sys.argv[1])
def say(word, **data):
    print(json.dumps([word, data]), flush=True)
def hear(word):
    line = sys.stdin.readline().strip()
    assert line == word, f"heard {line!r} instead of {word!r}"
"""


class Script:
    """One Python process. ``args`` must be JSON; ``env`` is added to the environment."""

    def __init__(self, code: str, *, env: dict[str, str] | None = None, **args: Any) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on leaving
        self.process = self._start(_PRELUDE + inspect.cleandoc(code), args, env or {})
        self.said: list[tuple[str, dict[str, Any]]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self, code: str, args: dict[str, Any], env: dict[str, str]) -> programs.Program:
        return programs.start(
            "-c", code, json.dumps(args), env=programs.environment(**env), errors=self._errors
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill it, if it still runs, and close the pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT)
        self._reader.join(WAIT)
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            with suppress(BrokenPipeError):
                pipe.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        """What it wrote to its standard error, so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    def expect(self, word: str, timeout: float = WAIT) -> dict[str, Any]:
        """Read its lines until it says this; return what it said with it."""
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"no {word!r} in {timeout} s\n{self.errors}") from None
            if not line:
                code = self.process.wait(timeout)
                raise AssertionError(f"it ended ({code}) before {word!r}\n{self.errors}")
            said, data = json.loads(line)
            self.said.append((said, data))
            if said == word:
                return data

    def tell(self, word: str) -> None:
        """Let its ``hear(word)`` return."""
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def freeze(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.process.stop(WAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> int:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        return self.wait()

    def terminate(self) -> None:
        """SIGTERM; `wait` for what comes of it."""
        self.process.terminate()

    def wait(self, timeout: float = WAIT) -> int:
        """Return the exit code; negative for a signal."""
        return self.process.wait(timeout)

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

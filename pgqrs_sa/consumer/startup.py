"""Starting a run in a thread of its own.

A database that does not answer can block a thread for minutes, in a call of the driver that nobody
can end. Whoever waits for the start here can stop waiting.
"""

from __future__ import annotations

import threading

from .runtime import Runtime

__all__ = ["START_GRACE", "Startup"]

START_GRACE = 4.0
"""Seconds that a start may take to end once it was given up; then its thread is left alone."""

_BY_ITSELF = 3.0
"""Seconds of these before its connection is cut. Cut while it registers, it would leave a worker
that nobody stops: the row may have been committed, and its id is not known."""


class Startup:
    """The start of a run, from now on."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._unwanted = False
        self._lock = threading.Lock()
        self._cut = threading.Timer(_BY_ITSELF, runtime.abort_start)
        self._cut.daemon = True
        threading.Thread(target=self._run, name="pgqrs-start", daemon=True).start()

    def _run(self) -> None:
        try:
            self._runtime.start()
        except BaseException as error:  # noqa: BLE001 - raised again by `began`
            self._error = error
        self._cut.cancel()
        with self._lock:
            if not self._unwanted:
                self._over.set()
                return
        if self._error is None:  # it has begun all the same, and nobody is to know of it
            self._runtime.drain()
            self._runtime.close(lambda: True)
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of it, for so long; return whether that has come."""
        return self._over.wait(seconds)

    @property
    def aborted(self) -> bool:
        """Whether it was given up."""
        return self._runtime.aborted

    def abort(self) -> None:
        """Let it end soon, without a run, unless that has begun already."""
        with self._lock:
            first = not (self._unwanted or self._over.is_set())
            self._unwanted = self._unwanted or first
        self._runtime.abort()
        if first:
            self._cut.start()

    def began(self) -> bool:
        """Return whether there is a run, or raise what has prevented it.

        False after `abort`, unless the run had begun by then. One that begins later ends itself.
        """
        if self._unwanted:
            return False
        if self._error is not None and not self._runtime.aborted:
            raise self._error
        return self._error is None

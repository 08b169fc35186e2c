"""How far one message walks through the package: files touched, and changes of file, by profile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pgqrs_sa

PACKAGE = str(Path(pgqrs_sa.__file__).parent)
MOST_FILES, MOST_CHANGES = 39, 370
"""Measured: 39 files and 356 changes. The aim is 30 and 300: lower them with the walk.

Since 36 and 315, the models and the codec are chosen in one place each, a worker is registered in
one transaction that is tried again, and the next statement is sent before the handlers run.
"""


class Walk:
    """The files of the package that calls went into, and how often a thread went to another."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.changes = 0
        self._at = threading.local()

    def profile(self, frame: FrameType, event: str, _argument: object) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE):
            return
        name = file.removeprefix(PACKAGE)
        self.files[name] = self.files.get(name, 0) + 1
        if getattr(self._at, "file", name) != name:
            self.changes += 1
        self._at.file = name


@contextmanager
def walked() -> Iterator[Walk]:
    """Count the calls of all threads that begin meanwhile, and of this one."""
    walk = Walk()
    threading.setprofile(walk.profile)
    sys.setprofile(walk.profile)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def test_one_message_from_start_to_stop_walks_through_few_files(threads):
    def consumer():
        made = threads.consumer(heartbeat=10, concurrency=1)
        made.on("mail")(lambda _session, _delivery: None)
        return made.consumer

    threads.send({"n": 0})
    assert consumer().run(until_empty=True) == 0  # fills the caches, and imports the modules
    threads.send({"n": 1})
    measured = consumer()
    with walked() as walk:
        code = measured.run(until_empty=True)
    assert code == 0
    assert len(threads.archive()) == 2
    print(f"{len(walk.files)} files, {walk.changes} changes, {sum(walk.files.values())} calls")
    assert len(walk.files) <= MOST_FILES
    assert walk.changes <= MOST_CHANGES

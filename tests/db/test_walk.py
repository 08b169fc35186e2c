"""How many files of the package a call runs through: what somebody reads who follows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pgqrs_sa
from pgqrs_sa import QueueService

PACKAGE = str(Path(pgqrs_sa.__file__).parent)


def files_of(call: Callable[[], Any]) -> list[str]:
    """Return the files of the package whose functions a call runs, in the order of their use."""
    call()  # statements are built and cached
    files: dict[str, None] = {}

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files[frame.f_code.co_filename.removeprefix(PACKAGE).lstrip("/")] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(files)


CALLS: dict[str, tuple[Callable[[QueueService], Any], int]] = {
    "find": (lambda queue: queue.messages.find(), 6),
    "count": (lambda queue: queue.messages.count(), 7),
    "archived": (lambda queue: queue.archived.find(), 6),
    "get": (lambda queue: queue.messages.get(1), 6),
    "enqueue": (lambda queue: queue.enqueue("mail", 1), 8),
}


@pytest.mark.parametrize(("call", "most"), CALLS.values(), ids=list(CALLS))
def test_a_call_runs_through_few_files(service, call, most):
    service.enqueue("mail", {"n": 1})
    files = files_of(lambda: call(service))

    assert len(files) <= most, files

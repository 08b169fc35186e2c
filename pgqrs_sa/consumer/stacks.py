"""Where a handler is at this moment, or was when it was cancelled: its own part of the stack."""

from __future__ import annotations

import asyncio
import sys
import traceback
from types import FrameType, TracebackType
from typing import Any

from .disposition import PACKAGE

__all__ = ["of_task", "of_thread", "of_traceback"]

_MOST = 12  # frames


def of_thread(thread: int | None) -> str | None:
    """Return where the handler is that a thread runs, or None if no such thread is alive."""
    frame = sys._current_frames().get(thread) if thread is not None else None  # noqa: SLF001
    return None if frame is None else _text(traceback.extract_stack(frame))


def of_task(task: asyncio.Task[Any], thread: int | None) -> str | None:
    """Return where the handler of a task is: what it waits for, unless it is just running.

    Args:
        task: The task. This may be called from any thread.
        thread: That of its event loop.
    """
    inner: Any = task.get_coro()
    if getattr(inner, "cr_running", False):
        return of_thread(thread)
    frames: list[FrameType] = []
    # Task.get_stack() has the outermost frame only of a task that waits.
    while (frame := _attribute(inner, "frame")) is not None:
        frames.append(frame)
        inner = _attribute(inner, "await") or _attribute(inner, "yieldfrom")
    if not frames:
        return None
    return _text(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames))


def of_traceback(trace: TracebackType | None) -> str | None:
    """Return where a handler was when an error was raised in it."""
    return None if trace is None else _text(traceback.extract_tb(trace))


def _attribute(awaited: Any, name: str) -> Any:
    """Return an attribute that coroutines and both kinds of generators name differently."""
    for kind in ("cr", "gi", "ag"):
        if (found := getattr(awaited, f"{kind}_{name}", None)) is not None:
            return found
    return None


def _text(frames: traceback.StackSummary) -> str:
    ours = [place for place, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)]
    # What lies below the last frame of the runtime is the handler's.
    return "".join(traceback.format_list(frames[max(ours, default=-1) + 1 :][-_MOST:]))

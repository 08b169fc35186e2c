"""``pgqrs top``: queues and workers, live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from .app import App, Command, pass_app
from .failures import Failed, failure
from .frame import GLYPHS, PLAIN_GLYPHS, Frame
from .output import FITTED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

__all__ = ["top"]

_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"k": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"j": "down",
    b"q": "quit",
    b"r": "refresh",
    b"p": "pause",
    b"d": "drain",
    b" ": "refresh",
}
_ESCAPE = 0x1B
_REST = 4  # times what a look took: a view never occupies more than a fifth of a connection
_LONGEST_KEY = 3


@click.command(cls=Command)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Look so often, or less often where a look takes long; also the span of the rates.",
)
@click.option("--once", is_flag=True, help="Print one frame and end.")
@pass_app
def top(app: App, interval: float, once: bool) -> None:
    """Show queues and workers, live.

    in/s and out/s are what was enqueued and archived; what is deleted without a trace is not
    seen. Behind them are the last eight spans of out/s. dead is the dead letters, plus what is
    out of attempts and not a dead letter yet.

    Without a terminal, or in another format than table, it prints one frame, as --once does.
    """
    frame = Frame(app, timedelta(seconds=interval))
    frame.refresh()
    console = app.output.console
    glyphs = GLYPHS if console.encoding.startswith("utf") else PLAIN_GLYPHS
    if app.output.format != "table":
        app.emit_one(frame.data())
    elif len(frame.queues) + len(frame.workers) > FITTED and (once or not _interactive(app)):
        app.output.lines(frame.lines(glyphs=glyphs))
    elif once or not _interactive(app):
        console.print(frame.render(console.width, glyphs=glyphs))
    else:
        _run(frame, console, glyphs)


def _interactive(app: App) -> bool:
    try:
        import termios  # noqa: F401, PLC0415 - only asked whether it is there: not on Windows
    except ImportError:
        return False
    return sys.stdin.isatty() and app.output.file.isatty()


def _run(frame: Frame, console: Console, glyphs: str) -> None:
    """Show frames until `q`, or the end of the input."""
    from rich.live import Live  # noqa: PLC0415 - of the extra `cli`, and slow

    def draw(live: Live) -> None:
        drawn = frame.render(console.width, height=console.height, glyphs=glyphs)
        live.update(drawn, refresh=True)

    interval = frame.step.total_seconds()
    with _keyboard() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + interval
        while True:
            draw(live)
            for key in pressed(max(0.0, due - time.monotonic())):
                if key == "quit":
                    return
                _attempt(frame, _action(frame, key))
                if key in {"refresh", "pause", "drain"}:
                    due = 0.0
            if time.monotonic() >= due:
                begun = time.monotonic()
                _attempt(frame, frame.refresh)
                ended = time.monotonic()
                due = ended + max(interval, _REST * (ended - begun))


def _action(frame: Frame, key: str) -> Callable[[], None]:
    if key in {"up", "down"}:
        return lambda: frame.move(-1 if key == "up" else 1)
    frame.notice = ""
    actions = {"pause": frame.toggle_queue, "drain": frame.toggle_worker}
    return actions.get(key, lambda: None)


def _attempt(frame: Frame, action: Callable[[], None]) -> None:
    """Do something that asks the database; one that is away for a while does not end the view."""
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from ..errors import PgqrsError  # noqa: PLC0415

    try:
        action()
    except (DBAPIError, PgqrsError, Failed) as error:
        frame.notice = failure(error, frame.app.secrets).message


@contextmanager
def _keyboard() -> Iterator[Callable[[float], list[str]]]:
    """Yield a function that waits so long for keys, and returns those that mean something."""
    import termios  # noqa: PLC0415 - not on Windows
    import tty  # noqa: PLC0415

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(timeout: float) -> list[str]:
        if not select.select([terminal], [], [], timeout)[0]:
            return []
        typed = os.read(terminal, 64)
        return _keys(typed) if typed else ["quit"]

    # Keys come one by one, unseen; Ctrl-C still interrupts.
    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _keys(typed: bytes) -> list[str]:
    found = []
    while typed:
        length = _LONGEST_KEY if typed[0] == _ESCAPE else 1
        if name := _KEYS.get(typed[:length]):
            found.append(name)
        typed = typed[length:]
    return found

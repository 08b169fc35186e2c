"""``pgqrs top``: queues and workers, live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .app import App, Command, pass_app
from .failures import Failed, failure
from .output import FITTED, Column, aligned, fitted, note, text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from ..types import WorkerHealth
    from .queries import QueueActivity

__all__ = ["Frame", "Selected", "sparkline", "top"]

GLYPHS = "▁▂▃▄▅▆▇█"
PLAIN_GLYPHS = "_.-:=+*#"  # where the terminal has no others

_HELP = "q quit  r refresh  up/down select  p pause/resume  d suspend/resume worker"
_AROUND = 10  # lines of a frame that are not rows: headings, borders, help

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
_REST = 4  # times the duration of a query: the view uses at most a fifth of a connection
_LONGEST_KEY = 3


class Selected(NamedTuple):
    """The row that the cursor is on."""

    kind: str
    key: str | int


def sparkline(values: Sequence[float], glyphs: str = GLYPHS) -> str:
    """Return one glyph for each value, the highest being the largest of them."""
    most = max(values, default=0.0)
    if not most:
        return glyphs[0] * len(values)
    return "".join(glyphs[round(value / most * (len(glyphs) - 1))] for value in values)


@dataclass
class Frame:
    """A frame of the view: its data, where the cursor is, and how it looks.

    Attributes:
        app: The command's.
        step: The span of time over which rates are taken.
        queues: As last seen.
        workers: As last seen.
        cursor: The row selected, counting queues and then workers.
        notice: What the last key did, or why nothing new is shown.
    """

    app: App
    step: timedelta
    queues: list[QueueActivity] = field(default_factory=list)
    workers: list[WorkerHealth] = field(default_factory=list)
    cursor: int = 0
    notice: str = ""

    def refresh(self) -> None:
        """Ask the database."""
        from .._core.scope import Context, Scope  # noqa: PLC0415 - SQLAlchemy takes a while
        from ..models import READY_MADE  # noqa: PLC0415
        from .queries import activity  # noqa: PLC0415

        context = Context.of(READY_MADE, None, None, allow_autocommit=False)
        with self.app.begin() as work:
            self.queues = activity(Scope(work.session, context), self.step)
            self.workers = work.service.workers.health()
        self.move(0)

    @property
    def selected(self) -> Selected | None:
        """The queue or worker that the cursor is on."""
        if self.cursor < len(self.queues):
            return Selected("queue", self.queues[self.cursor].queue)
        place = self.cursor - len(self.queues)
        if place < len(self.workers):
            return Selected("worker", self.workers[place].worker.id)
        return None

    def move(self, by: int) -> None:
        """Move the cursor, as far as there are rows."""
        last = len(self.queues) + len(self.workers) - 1
        self.cursor = max(0, min(last, self.cursor + by))

    def toggle_queue(self) -> None:
        """Pause the selected queue, or resume it."""
        if self.selected is None or self.selected.kind != "queue":
            self.notice = "select a queue to pause or resume it"
            return
        chosen = self.queues[self.cursor]
        with self.app.begin() as work:
            act = work.service.queues.resume if chosen.paused else work.service.queues.pause
            act(chosen.queue)
        self.notice = f"{'resumed' if chosen.paused else 'paused'} queue {chosen.queue}"

    def toggle_worker(self) -> None:
        """Suspend the selected worker, or resume it."""
        if self.selected is None or self.selected.kind != "worker":
            self.notice = "select a worker to suspend or resume it"
            return
        worker = self.workers[self.cursor - len(self.queues)].worker
        suspended = worker.status == "suspended"
        with self.app.begin() as work:
            act = work.service.workers.resume if suspended else work.service.workers.suspend
            act(worker.id)
        self.notice = f"{'resumed' if suspended else 'suspended'} worker {worker.id}"

    def data(self) -> dict[str, Any]:
        """Return it for programs: the keys queues and workers, each a list of objects."""
        return {
            "queues": [asdict(queue) for queue in self.queues],
            "workers": [
                {
                    "id": health.worker.id,
                    "name": health.worker.name,
                    "hostname": health.worker.hostname,
                    "status": health.worker.status,
                    "silent_for": health.silent_for,
                    "healthy": health.healthy,
                    "leases": health.leases,
                }
                for health in self.workers
            ],
        }

    def render(
        self, width: int, *, height: int | None = None, glyphs: str = GLYPHS
    ) -> RenderableType:
        """Return it for a terminal.

        Args:
            width: Of the terminal.
            height: Of the terminal, with a cursor and help; None for a frame to keep.
            glyphs: For the sparklines, the lowest first.
        """
        from rich.console import Group  # noqa: PLC0415 - of the extra `cli`, and slow

        shown = _window(len(self.queues) + len(self.workers), self.cursor, height)
        live = height is not None
        queues = self._queues(shown, glyphs, width, live=live)
        parts: list[RenderableType] = [
            _line(f"pgqrs top  {self.app.target}", "bold"),
            "",
            queues,
            "",
        ]
        hidden = len(_QUEUE) - len(queues.columns)
        if self.workers or not live:
            workers = self._workers(shown, width, live=live)
            hidden += len(_WORKER) - len(workers.columns)
            parts += [workers, ""]
        said = text(self.notice) if self.notice else note(hidden)
        if live:
            parts += [_line(said, "yellow" if self.notice else "dim"), _line(_HELP, "dim")]
        elif said:
            parts += [_line(said, "dim")]
        return Group(*parts)

    def lines(self, *, glyphs: str = GLYPHS) -> Iterator[str]:
        """Yield it as lines of plain text, however many queues there are."""
        yield f"pgqrs top  {self.app.target}"
        yield ""
        yield from _lines_of(_QUEUE, [_of_queue(queue, glyphs) for queue in self.queues])
        yield ""
        yield from _lines_of(_WORKER, [_of_worker(health) for health in self.workers])

    def _queues(self, shown: range, glyphs: str, width: int, *, live: bool) -> Table:
        places = [place for place in range(len(self.queues)) if place in shown]
        return fitted(
            _QUEUE,
            [_of_queue(self.queues[place], glyphs) for place in places],
            width,
            [
                _style(selected=live and place == self.cursor, dim=self.queues[place].paused)
                for place in places
            ],
            noted=False,
        )

    def _workers(self, shown: range, width: int, *, live: bool) -> Table:
        first = len(self.queues)
        places = [place for place in range(len(self.workers)) if first + place in shown]
        return fitted(
            _WORKER,
            [_of_worker(self.workers[place]) for place in places],
            width,
            [
                _style(
                    selected=live and first + place == self.cursor,
                    dim=not self.workers[place].healthy,
                )
                for place in places
            ],
            noted=False,
        )


_QUEUE = (
    Column("queue", least=12),
    Column("ready", right=True, rank=1),
    Column("leased", right=True, rank=2),
    Column("sched.", right=True, rank=5),
    Column("dead", right=True, rank=3),
    Column("oldest", right=True, rank=4),
    Column("in/s", right=True, rank=7),
    Column("out/s", right=True, rank=6),
    Column(" " * 8, rank=8),
)
_WORKER = (
    Column("worker", right=True),
    Column("name", least=8),
    Column("host", least=8, rank=4),
    Column("status", rank=1),
    Column("heartbeat", right=True, rank=2),
    Column("leases", right=True, rank=3),
)


def _lines_of(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    right = {place for place, column in enumerate(columns) if column.right}
    return aligned([column.title.upper() for column in columns], rows, right)


def _of_queue(queue: QueueActivity, glyphs: str) -> list[str]:
    return [
        text(queue.queue) + (" (paused)" if queue.paused else ""),
        *(str(count) for count in (queue.ready, queue.leased, queue.scheduled)),
        _dead(queue),
        text(queue.oldest_ready_age),
        f"{queue.incoming:.1f}",
        f"{queue.outgoing[-1]:.1f}",
        sparkline(queue.outgoing, glyphs),
    ]


def _of_worker(health: WorkerHealth) -> list[str]:
    return [
        str(health.worker.id),
        text(health.worker.name),
        text(health.worker.hostname),
        health.worker.status if health.healthy else f"{health.worker.status}, silent",
        text(health.silent_for),
        text(health.leases),
    ]


def _dead(queue: QueueActivity) -> str:
    if queue.dead_capped:
        return f"{queue.dead}+"
    return f"{queue.dead}+{queue.exhausted}" if queue.exhausted else str(queue.dead)


def _window(rows: int, cursor: int, height: int | None) -> range:
    """Return which rows fit, the one at the cursor among them."""
    if height is None:
        return range(rows)
    room = max(1, height - _AROUND)
    first = max(0, min(cursor - room // 2, rows - room))
    return range(first, first + room)


def _line(said: str, style: str) -> Text:
    from rich.text import Text  # noqa: PLC0415 - of the extra `cli`, and slow

    return Text(said, style=style, no_wrap=True, overflow="ellipsis")


def _style(*, selected: bool, dim: bool) -> str:
    return " ".join(name for name, on in (("reverse", selected), ("dim", dim)) if on)


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
        import termios  # noqa: F401, PLC0415 - only whether it exists: not on Windows
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
    """Call an action that queries the database; its error is shown and does not end the view."""
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from ..errors import PgqrsError  # noqa: PLC0415

    try:
        action()
    except (DBAPIError, PgqrsError, Failed) as error:
        frame.notice = failure(error, frame.app.secrets).message


@contextmanager
def _keyboard() -> Iterator[Callable[[float], list[str]]]:
    """Yield a function that waits for keys, at most the given seconds, and returns their names."""
    import termios  # noqa: PLC0415 - not on Windows
    import tty  # noqa: PLC0415

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(timeout: float) -> list[str]:
        if not select.select([terminal], [], [], timeout)[0]:
            return []
        typed = os.read(terminal, 64)
        return _keys(typed) if typed else ["quit"]

    # Keys are read singly and not echoed; Ctrl-C still interrupts.
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

"""The processes that work: started once, each with an engine of its own for each measurement.

All of a measurement's processes open their connections first, and begin at the same moment of the
machine's monotonic clock, which they share.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

from .place import Place
from .work import Outcome, Tally

if TYPE_CHECKING:
    from .contenders.base import Contender

__all__ = ["Assignment", "ContenderFailed", "Executor"]

_LEAD = 0.02  # seconds between the word and the start, so that it reaches everybody before
_SUMMED = "windows"


class ContenderFailed(Exception):
    """A contender could not do what it was told; the message says why."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one process is to do.

    Attributes:
        contender: Who does it.
        place: In which database.
        work: The name of its method.
        arguments: The method's arguments.
        opened: Whether it is to connect before the common start.
        warm_up: Arguments with which the same method is called before the common start, so that
            nobody's first time is measured, or None.
        counted: Whether its messages and its time belong to the outcome.
    """

    contender: type[Contender]
    place: Place
    work: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    opened: bool = True
    warm_up: Mapping[str, Any] | None = None
    counted: bool = True


@dataclass(frozen=True, slots=True)
class _Report:
    tally: Tally
    started: float
    ended: float


def attend(line: Connection) -> None:
    """Be one of the processes: work on one assignment after the other until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            assignment = line.recv()
        except EOFError:
            return
        try:
            answer: object = _carry_out(assignment, line)
        except Exception as error:  # noqa: BLE001 - the others go on
            answer = f"{type(error).__name__}: {error}"
        line.send(answer)


def _carry_out(assignment: Assignment, line: Connection) -> _Report | None:
    contender = assignment.contender(assignment.place)
    if assignment.opened:
        contender.open()
    try:
        if assignment.warm_up is not None:
            getattr(contender, assignment.work)(**assignment.warm_up)
        line.send("ready")
        start = line.recv()
        if start is None:
            return None
        time.sleep(max(0.0, start - time.monotonic()))
        started = time.monotonic()
        tally = getattr(contender, assignment.work)(**assignment.arguments)
        return _Report(tally or Tally(0), started, time.monotonic())
    finally:
        if assignment.opened:
            contender.close()


class _Member:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=attend, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, deadline: float) -> object:
        """Return what it says next, or raise `ContenderFailed`."""
        if not self.line.poll(max(0.0, deadline - time.monotonic())):
            raise ContenderFailed("took longer than --limit")
        try:
            said: object = self.line.recv()
        except EOFError:
            raise ContenderFailed("the process died") from None
        if isinstance(said, str) and said != "ready":
            raise ContenderFailed(said)
        return said

    def end(self) -> None:
        self.line.close()
        self.process.kill()
        self.process.join()
        self.process.close()


class Executor:
    """Processes, as many as are needed; a context manager.

    Args:
        limit: Seconds after which a measurement is given up, and its processes ended.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.renew()

    def renew(self) -> None:
        """End all processes; the next measurement starts fresh ones."""
        while self._members:
            self._members.pop().end()

    def run(self, assignments: Sequence[Assignment]) -> Outcome:
        """Let each process do one of the assignments, all at the same time.

        Raises:
            ContenderFailed: with what the first that failed said.
        """
        self._members.extend(_Member() for _ in range(len(assignments) - len(self._members)))
        members = self._members[: len(assignments)]
        try:
            reports = zip(assignments, self._reports(members, assignments), strict=True)
            return _joined([report for item, report in reports if item.counted])
        except BaseException:
            # What the others are doing is of no use any more, and nobody knows how long it takes.
            self.renew()
            raise

    def _reports(
        self, members: Sequence[_Member], assignments: Sequence[Assignment]
    ) -> list[_Report]:
        deadline = time.monotonic() + self._limit
        for member, assignment in zip(members, assignments, strict=True):
            member.line.send(assignment)
        for member in members:
            member.answer(deadline)
        start = time.monotonic() + _LEAD
        for member in members:
            member.line.send(start)
        said = [member.answer(deadline) for member in members]
        return [line for line in said if isinstance(line, _Report)]


def _joined(reports: Sequence[_Report]) -> Outcome:
    series: dict[str, list[float]] = {}
    for report in reports:
        for name, values in report.tally.series.items():
            if name == _SUMMED and name in series:
                # Windows that only one of them saw whole are not windows of all.
                pairs = zip(series[name], values, strict=False)
                series[name] = [sum(pair) for pair in pairs]
            else:
                series[name] = series.get(name, []) + list(values)
    count = sum(report.tally.count for report in reports)
    ended = max(report.ended for report in reports)
    return Outcome(count, ended - min(report.started for report in reports), series)

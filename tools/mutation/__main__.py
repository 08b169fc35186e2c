"""``python -m tools.mutation``: change one thing in a module, and see a test fail.

In builders of statements a condition, an assignment or a lock is taken out; in Python that decides
by itself (the cursor, dispatching, leases, results of handlers, settling, purging) a comparison,
an operand, a call and the like is changed: see `tools.mutation.groups`.

The tests are collected once in a copy of the checkout, for each job with a server of its own, and
run once, to note which of them run which lines; a folder of results has these notes, and is of one
state of the package and its tests. Each mutant is then tried in a fork of that
process, by the tests that run its lines, until one fails; a test that takes ten times as long as
usual, and 20 seconds at least, has failed. It prints every survivor with the reason why no test
can find it out (`tools.mutation.reasons`), and the score by group and kind; it fails if a survivor
has none.

::

    python -m tools.mutation                      # all groups
    python -m tools.mutation cursor purge         # groups, or modules such as lease
    python -m tools.mutation statements --all     # boundaries, orders and the like as well
    python -m tools.mutation --results folder     # a line each, as they come; goes on from there
    python -m tools.mutation --results folder --again  # and tries survivors again
    python -m tools.mutation lease --only 56 --only renew  # those of a line, or of a function
    python -m tools.mutation --list
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeVar

from pgqrs_sa import embedded

from .coverage import Coverage, chosen, merged
from .groups import GROUPS, TESTS
from .mutants import Mutant
from .sandbox import SETTINGS, Sandbox, Trial

_LONGEST = 90.0  # seconds of tests for one mutant, unless --longest says otherwise

_Work = TypeVar("_Work")


class Task(NamedTuple):
    """A mutant that is to be tried."""

    group: str
    module: str
    mutant: Mutant


def picked(names: Sequence[str], *, everything: bool, only: Sequence[str] = ()) -> Iterator[Task]:
    """Yield the mutants of groups and modules, in the order of their names, or of all groups.

    With ``only``, those of these lines or functions.
    """
    for wanted in names or GROUPS:
        for name, group in GROUPS.items():
            for module in group.modules:
                if wanted in (name, module, module.rpartition("/")[2]):
                    for mutant in group.mutants(module, everything=everything):
                        if not only or {str(mutant.line), mutant.function} & {*only}:
                            yield Task(name, module, mutant)


class Results:
    """The trials so far, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self.trials: list[Trial] = []
        self._path, self._lock = path, Lock()

    def left(self, todo: Sequence[Task], *, again: bool) -> list[Task]:
        """Return those that were not tried before; with ``again``, unexplained survivors too."""
        known, left = self._known(), []
        for task in todo:
            trial = Trial(*task, None, 0.0)
            row = known.get((*trial.key, task.mutant.line))
            if row is None or (again and row["found_by"] is None and trial.reason is None):
                left.append(task)
            else:
                self.trials.append(Trial(*task, row["found_by"], row["seconds"]))
        return left

    def _known(self) -> dict[tuple[object, ...], dict[str, Any]]:
        if not self._path.exists():
            return {}
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        names = ("module", "function", "kind", "what", "line")
        return {tuple(row[name] for name in names): row for row in rows}

    def add(self, trial: Trial) -> None:
        with self._lock:
            self.trials.append(trial)
            print(trial, flush=True)
            with self._path.open("a") as file:
                file.write(f"{json.dumps(trial.row())}\n")


def shared(
    sandboxes: Sequence[Sandbox], tasks: Sequence[_Work], do: Callable[[Sandbox, _Work], None]
) -> None:
    """Let the sandboxes work off tasks, each one at a time."""
    waiting: SimpleQueue[_Work] = SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def work(sandbox: Sandbox) -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except Empty:
                return
            try:
                do(sandbox, task)
            except RuntimeError as error:  # nothing is said of this one; the next run tries again
                print(f"{error}"[:500], str(task)[:200], file=sys.stderr)

    threads = [Thread(target=work, args=(sandbox,)) for sandbox in sandboxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def coverage(sandboxes: Sequence[Sandbox], folder: Path) -> Coverage:
    """Run all tests with nothing changed, unless that was done before, and note what they call."""
    folder.mkdir(parents=True, exist_ok=True)

    def name(file: str) -> str:
        return f"{Path(file).parent.name}_{Path(file).stem}.json"

    def run(sandbox: Sandbox, file: str) -> None:
        path = folder / name(file)
        if not path.exists():
            path.write_text(json.dumps(sandbox.notes(file)))

    shared(sandboxes, TESTS, run)
    return merged(folder / name(file) for file in TESTS)


def report(trials: Sequence[Trial]) -> int:
    """Print the score and the survivors; return how many of them nobody has explained."""
    survivors = [trial for trial in trials if trial.found_by is None]
    _score("group", trials, lambda trial: trial.group)
    _score("kind", trials, lambda trial: trial.mutant.kind)
    for survivor in sorted(
        survivors, key=lambda survivor: (survivor.group, survivor.module, survivor.mutant.line)
    ):
        print(f"{survivor}\n    {survivor.reason or 'NO REASON'}")
    for survivor in trials:
        if survivor.found_by is not None and survivor.reason is not None:
            print(f"{survivor}\n    although it is said that none can: {survivor.reason}")
    return sum(survivor.reason is None for survivor in survivors)


def _score(what: str, trials: Sequence[Trial], by: Callable[[Trial], str]) -> None:
    print(f"\n| {what} | mutants | found | survived | % |\n|---|---|---|---|---|")
    total = Counter(map(by, trials))
    alive = Counter(by(trial) for trial in trials if trial.found_by is None)
    for name, n in [*sorted(total.items()), ("all", len(trials))]:
        left = alive.total() if name == "all" else alive[name]
        print(f"| {name} | {n} | {n - left} | {left} | {100 * (n - left) / max(n, 1):.1f} |")
    print()


def main() -> None:
    """Read the command line, and try the mutants."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", help="groups or modules: cursor, settle; default: all")
    parser.add_argument("--all", action="store_true", help="every kind of mutant of statements")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--longest", type=float, default=_LONGEST, help="seconds for a mutant")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="LINE|NAME",
        help="only the mutants of a line or of a function, such as Line.watch",
    )
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--results", type=Path, help="a folder that keeps what was found")
    parser.add_argument("--again", action="store_true", help="try survivors of the folder again")
    given = parser.parse_args()
    todo = [*picked(given.names, everything=given.all, only=given.only)]
    if given.list:
        for group, module, item in todo:
            print(f"{group}: {module}.py:{item.line} {item.function}(): {item.kind}: {item.what}")
        print(f"{len(todo)} mutants")
        return
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = given.results or top
        results = Results(folder / "results.jsonl")
        left = results.left(todo, again=given.again)
        servers = [
            stack.enter_context(embedded.start(settings=SETTINGS))
            for _ in range(given.jobs if left else 0)
        ]
        with ThreadPoolExecutor() as pool:
            folders = [top / f"sandbox{n}" for n in range(given.jobs)]
            sandboxes = [*pool.map(Sandbox, folders, servers)]
        for sandbox in sandboxes:
            stack.callback(sandbox.close)
        known = coverage(sandboxes, folder / "notes") if left else {}

        def attempt(sandbox: Sandbox, task: Task) -> None:
            first, lines = GROUPS[task.group].first, task.mutant.lines
            tests = chosen(known, task.module, lines, given.longest, first)
            results.add(sandbox.trial(*task, tests))

        shared(sandboxes, left, attempt)
    sys.exit(min(report(results.trials), 1))


if __name__ == "__main__":
    main()

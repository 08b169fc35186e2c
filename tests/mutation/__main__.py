"""``python -m tests.mutation``: take one condition out of a statement, and see a test fail.

Each mutant is tried in a copy of the checkout, with a server of its own for each job. First all
tests run once, to note which of them call which builder; a mutant is then tried by those that
call it, until one fails. It prints every survivor with the reason why no test can find it out
(`tests.mutation.reasons`), and the score by kind; it fails if a survivor has none.

::

    python -m tests.mutation                      # conditions, assignments, locks: two hours
    python -m tests.mutation settle lease --all   # boundaries, orders and the like as well
    python -m tests.mutation --results folder     # a line each, as they come; goes on from there
    python -m tests.mutation --list
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

from pgqrs_sa import embedded

from .bench import ROOT, SETTINGS, Bench, Trial
from .mutants import ESSENTIAL, Mutant, mutants
from .witness import Callers, Witnesses, chosen, merged

MODULES = (
    *(f"statements/{name}" for name in ("settle", "lease", "consume", "archive", "workers")),
    *(f"statements/{name}" for name in ("scheduled", "wakeup", "enqueue", "flush", "queues")),
    "states",
    *(f"statements/{name}" for name in ("parts", "integrity", "reading", "counts", "health")),
)
"""Those that have something to take out, the fences first."""

FIRST = ("tests/model/test_statements.py", "tests/model/test_holes.py")
"""Files that look at statements by themselves: they find most of it out, and soon."""

TESTS = (
    *FIRST,
    "tests/db/test_leases_and_fences.py",
    "tests/db/test_queues_reading_archive_workers.py",
    "tests/db/test_concurrency.py",
    "tests/db/test_bounded_reading.py",
    "tests/db/test_plans.py",
    "tests/db/test_plans_of_readers.py",
    "tests/db/test_plans_of_uneven_tables.py",
    "tests/db/test_floor.py",
    "tests/db/test_enqueue_ways.py",
    "tests/db/test_messages_as_objects.py",
    "tests/model/test_machine.py",
    "tests/wakeup/test_notify.py",
    "tests/wakeup/test_nudge.py",
    "tests/consumers/test_connections.py",
    "tests/consumers/test_leases.py",
    "tests/consumers/test_running.py",
    "tests/consumers/test_workers.py",
    "tests/doctor/test_doctor.py",
)
"""Files that try them."""

_LONGEST = 90.0  # seconds of tests for one mutant, unless --longest says otherwise

_Task = TypeVar("_Task")


def picked(modules: Sequence[str], *, everything: bool) -> Iterator[tuple[str, Mutant]]:
    for module in modules:
        for one in mutants((ROOT / "pgqrs_sa" / f"{module}.py").read_text()):
            if everything or one.kind in ESSENTIAL:
                yield module, one


class Results:
    """The trials so far, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self.trials: list[Trial] = []
        self._path, self._lock = path, Lock()

    def left(self, todo: Sequence[tuple[str, Mutant]]) -> list[tuple[str, Mutant]]:
        """Return the mutants that were not tried before."""
        known, left = self._known(), []
        for module, mutant in todo:
            trial = Trial(module, mutant, None, 0.0)
            if (row := known.get((*trial.key, mutant.line))) is None:
                left.append((module, mutant))
            else:
                self.trials.append(Trial(module, mutant, row["found_by"], row["seconds"]))
        return left

    def _known(self) -> dict[tuple[object, ...], dict[str, object]]:
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
    benches: Sequence[Bench], tasks: Sequence[_Task], do: Callable[[Bench, _Task], None]
) -> None:
    """Let the benches work off tasks, each one at a time."""
    waiting: SimpleQueue[_Task] = SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def work(bench: Bench) -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except Empty:
                return
            try:
                do(bench, task)
            except RuntimeError as error:  # nothing is said of this one; the next run tries again
                print(f"{task}: {error}"[:500], file=sys.stderr)

    threads = [Thread(target=work, args=(bench,)) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def witnesses(benches: Sequence[Bench], folder: Path) -> Witnesses:
    """Run all tests with nothing changed, unless that was done before, and note what they call."""
    folder.mkdir(parents=True, exist_ok=True)

    def run(bench: Bench, file: str) -> None:
        path = folder / f"{Path(file).parent.name}_{Path(file).stem}.json"
        if not path.exists() and (failed := bench.notes([file], path)):
            path.unlink(missing_ok=True)
            print(f"{failed} fails with nothing changed: {file} is no witness", file=sys.stderr)

    shared(benches, TESTS, run)
    return merged(folder.glob("*.json"))


def report(trials: Sequence[Trial]) -> int:
    """Print the score and the survivors; return how many of them nobody has explained."""
    survivors = [one for one in trials if one.found_by is None]
    print("\n| kind | mutants | found | survived |\n|---|---|---|---|")
    total, alive = Counter(t.mutant.kind for t in trials), Counter(t.mutant.kind for t in survivors)
    for kind, n in sorted(total.items()):
        print(f"| {kind} | {n} | {n - alive[kind]} | {alive[kind]} |")
    print(f"| all | {len(trials)} | {len(trials) - len(survivors)} | {len(survivors)} |\n")
    for one in sorted(survivors, key=lambda one: (one.module, one.mutant.line)):
        print(f"{one}\n    {one.reason or 'NO REASON'}")
    for one in trials:
        if one.found_by is not None and one.reason is not None:
            print(f"{one}\n    although it is said that none can: {one.reason}")
    return sum(one.reason is None for one in survivors)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "modules", nargs="*", help="such as settle, workers, states; all unless given"
    )
    parser.add_argument("--all", action="store_true", help="every kind of mutant")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--longest", type=float, default=_LONGEST, help="seconds for a mutant")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--results", type=Path, help="a folder that keeps what was found")
    given = parser.parse_args()
    wanted = [m for m in MODULES if not given.modules or m.rpartition("/")[2] in given.modules]
    todo = [*picked(wanted, everything=given.all)]
    if given.list:
        for module, one in todo:
            print(f"{module}.py:{one.line} {one.function}(): {one.kind}: {one.what}")
        print(f"{len(todo)} mutants")
        return
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = given.results or top
        benches = [
            Bench(top / f"bench{n}", stack.enter_context(embedded.start(settings=SETTINGS)))
            for n in range(given.jobs)
        ]
        for bench in benches:
            stack.callback(bench.quick.close)
        known, callers = witnesses(benches, folder / "notes"), Callers()
        results = Results(folder / "results.jsonl")

        def attempt(bench: Bench, task: tuple[str, Mutant]) -> None:
            module, mutant = task
            tests = chosen(known, callers.of(module, mutant.function), given.longest, FIRST)
            results.add(bench.trial(module, mutant, tests))

        shared(benches, results.left(todo), attempt)
    sys.exit(min(report(results.trials), 1))


if __name__ == "__main__":
    main()

"""``python -m tests.mutation``: take one condition out of a statement, and see a test fail.

Each mutant is tried in a copy of the checkout, with a server of its own for each job, by the tests
of its module, quickest first, until one fails. It prints every survivor, and the score by kind.

::

    python -m tests.mutation                      # conditions, assignments, locks: about an hour
    python -m tests.mutation settle lease --all   # boundaries, orders and the like as well
    python -m tests.mutation --list
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from pgqrs_sa import embedded

from .mutants import ESSENTIAL, Mutant, mutants

ROOT = Path(__file__).parents[2]
MODEL = "tests/model/test_machine.py::test_random_histories_keep_the_promises"
HISTORY = "tests/model/test_history.py"
HOLES = "tests/model/test_holes.py"
FENCES = "tests/db/test_leases_and_fences.py"
READING = "tests/db/test_queues_reading_archive_workers.py"
RACES = "tests/db/test_concurrency.py"
PLANS = "tests/db/test_plans.py"
FLOOR = "tests/db/test_floor.py"
TESTS = {
    "statements/settle": [HOLES, MODEL, HISTORY, PLANS, FENCES, RACES],
    "statements/lease": [HOLES, MODEL, FLOOR, PLANS, FENCES, RACES],
    "statements/workers": [HOLES, READING, MODEL, RACES, FENCES],
    "statements/scheduled": [HOLES, MODEL, READING, RACES],
    "statements/archive": [HOLES, MODEL, READING, RACES],
    "statements/parts": [HOLES, MODEL, READING, PLANS, "tests/db/test_enqueue_ways.py"],
    "states": [HOLES, MODEL, READING, FLOOR, "tests/db/test_messages_as_objects.py"],
}
"""The modules, and their tests in the order in which they are tried."""

_LONGEST = 240.0  # seconds for one file of tests; a mutant that takes longer is found out, too


@dataclass(frozen=True)
class Trial:
    """A mutant, and what became of it: the tests that found it out, or None if it survived."""

    module: str
    mutant: Mutant
    found_by: str | None
    seconds: float

    def __str__(self) -> str:
        one = self.mutant
        fate = f"found by {self.found_by}" if self.found_by else "SURVIVED"
        where = f"{self.module}.py:{one.line} {one.function}()"
        return f"{fate}: {where}: {one.kind}: {one.what} ({self.seconds:.0f} s)"

    def row(self) -> dict[str, object]:
        one = self.mutant
        told = {"line": one.line, "function": one.function, "kind": one.kind, "what": one.what}
        return {"module": self.module, **told, "found_by": self.found_by, "seconds": self.seconds}


class Bench:
    """A copy of the checkout, in which one mutant at a time takes the place of a module."""

    def __init__(self, folder: Path, server: embedded.Server) -> None:
        self.folder = folder
        dsn = f"postgresql://{server.user}@/postgres?host={server.socket_dir}&port={server.port}"
        self.environment = {
            **os.environ,
            "PGQRS_TEST_DSN": dsn,
            "PGQRS_TEST_PG_BIN": str(server.bin_dir),
            "PGQRS_TEST_SHRINK": "no",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "node_modules")
        shutil.copytree(ROOT, folder, ignore=ignored)

    def passes(self, tests: str) -> bool:
        command = [
            sys.executable,
            "-m",
            "pytest",
            tests,
            "-x",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
        ]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                timeout=_LONGEST,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def trial(self, module: str, mutant: Mutant) -> Trial:
        path = self.folder / "pgqrs_sa" / f"{module}.py"
        whole, began = path.read_text(), time.monotonic()
        path.write_text(mutant.source)
        try:
            tests = (
                one for one in TESTS[module] if (self.folder / one.partition("::")[0]).exists()
            )
            found_by = next((one for one in tests if not self.passes(one)), None)
        finally:
            path.write_text(whole)
        return Trial(module, mutant, found_by, time.monotonic() - began)


def chosen(modules: Sequence[str], *, everything: bool) -> Iterator[tuple[str, Mutant]]:
    for module in modules:
        for one in mutants((ROOT / "pgqrs_sa" / f"{module}.py").read_text()):
            if everything or one.kind in ESSENTIAL:
                yield module, one


def run(waiting: SimpleQueue[tuple[str, Mutant]], bench: Bench, trials: list[Trial]) -> None:
    while True:
        try:
            module, mutant = waiting.get_nowait()
        except Empty:
            return
        trials.append(trial := bench.trial(module, mutant))
        print(trial, flush=True)


def report(trials: Sequence[Trial]) -> None:
    survivors = [one for one in trials if one.found_by is None]
    print("\n| kind | mutants | found | survived |\n|---|---|---|---|")
    total, alive = Counter(t.mutant.kind for t in trials), Counter(t.mutant.kind for t in survivors)
    for kind, n in sorted(total.items()):
        print(f"| {kind} | {n} | {n - alive[kind]} | {alive[kind]} |")
    print(f"| all | {len(trials)} | {len(trials) - len(survivors)} | {len(survivors)} |\n")
    for one in sorted(survivors, key=lambda one: (one.module, one.mutant.line)):
        print(one)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "modules", nargs="*", help="such as settle, workers, states; all unless given"
    )
    parser.add_argument("--all", action="store_true", help="every kind of mutant")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--json", type=Path, help="write what became of each to this file")
    given = parser.parse_args()
    wanted = [m for m in TESTS if not given.modules or m.rpartition("/")[2] in given.modules]
    todo = [*chosen(wanted, everything=given.all)]
    if given.list:
        for module, one in todo:
            print(f"{module}.py:{one.line} {one.function}(): {one.kind}: {one.what}")
        print(f"{len(todo)} mutants")
        return
    waiting: SimpleQueue[tuple[str, Mutant]] = SimpleQueue()
    for one in todo:
        waiting.put(one)
    trials: list[Trial] = []
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        benches = [
            Bench(top / f"bench{n}", stack.enter_context(embedded.start()))
            for n in range(given.jobs)
        ]
        for tests in dict.fromkeys(test for module in wanted for test in TESTS[module]):
            if (ROOT / tests.partition("::")[0]).exists() and not benches[0].passes(tests):
                sys.exit(f"{tests} fails with nothing changed: mend that first")
        threads = [Thread(target=run, args=(waiting, bench, trials)) for bench in benches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report(trials)
    if given.json:
        rows = [one.row() for one in trials]
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

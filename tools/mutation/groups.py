"""What is tried: modules by what they are about, and the tests that may find something out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .mutants import ESSENTIAL, Mutant, mutants
from .operators import decisions

__all__ = ["GROUPS", "MODULES", "PACKAGE", "TESTS", "Group"]

PACKAGE = Path(__file__).parents[2] / "pgqrs_sa"


@dataclass(frozen=True)
class Group:
    """Modules with mutants of one kind.

    Attributes:
        modules: Below ``pgqrs_sa``; each with the classes and functions that are meant, or none
            for all of it.
        first: Files of tests that find most of it out, and soon.
        builds: Whether they build statements, or decide by themselves.
    """

    modules: Mapping[str, Sequence[str]]
    first: Sequence[str] = ()
    builds: bool = False

    def mutants(self, module: str, *, everything: bool = False) -> Iterator[Mutant]:
        """Yield the mutants of a module; of builders the essential ones, or all."""
        source = (PACKAGE / f"{module}.py").read_text()
        if not self.builds:
            yield from decisions(source, self.modules[module])
            return
        for one in mutants(source):
            if everything or one.kind in ESSENTIAL:
                yield one


_BUILDERS = (
    *(f"statements/{name}" for name in ("settle", "lease", "consume", "archive", "workers")),
    *(f"statements/{name}" for name in ("scheduled", "wakeup", "enqueue", "flush", "queues")),
    "states",
    *(f"statements/{name}" for name in ("parts", "integrity", "reading", "counts", "health")),
)
_RUNTIME = (
    *("_keep_watch", "_watch_crew", "_pause", "_end_by_itself", "_begin", "_return_waiting"),
    *("_give_back", "next_unit", "next_ready", "_claimed", "_begun", "finished", "_report"),
    *("fatal", "_unreachable", "over", "drain", "idle", "wait_idle", "close", "_close", "_join"),
)
"""Without how it is put together, and what others are asked for."""

GROUPS: Mapping[str, Group] = {
    "statements": Group(
        dict.fromkeys(_BUILDERS, ()),
        ("tests/model/test_statements.py", "tests/model/test_holes.py"),
        builds=True,
    ),
    "cursor": Group(
        dict.fromkeys(("floor", "operations/floors", "commits"), ()),
        ("tests/unit/test_floor.py", "tests/unit/test_commits.py"),
    ),
    "dispatching": Group(
        {
            **dict.fromkeys(("consumers/policy", "consumers/seat", "consumers/desk"), ()),
            "consumers/line": ("Line", "_in_two_parts"),
            "consumers/runtime": tuple(f"Runtime.{name}" for name in _RUNTIME),
        },
        (
            *("tests/consumers/test_policy.py", "tests/consumers/test_desk.py"),
            *("tests/consumers/test_runtime.py", "tests/consumers/test_line.py"),
        ),
    ),
    "leases": Group(
        {
            **dict.fromkeys(("consumers/book", "consumers/keeper"), ()),
            **dict.fromkeys(("operations/lease", "operations/consume"), ()),
        },
        (
            *("tests/consumers/test_book.py", "tests/consumers/test_keeper.py"),
            *("tests/unit/test_consume.py", "tests/db/test_undecodable.py"),
            "tests/db/test_settlements.py",
        ),
    ),
    "results": Group(
        {
            **dict.fromkeys((f"consumers/{name}" for name in ("results", "verdicts")), ()),
            **dict.fromkeys((f"consumers/{name}" for name in ("troubles", "calling")), ()),
            **dict.fromkeys(("decisions", "retry"), ()),
        },
        (
            *("tests/unit/test_retry.py", "tests/consumers/test_verdicts.py"),
            *("tests/consumers/test_troubles.py", "tests/consumers/test_results.py"),
        ),
    ),
    "settling": Group(
        dict.fromkeys(("operations/settle", "operations/settlements"), ()),
        (
            *("tests/db/test_forgotten_objects.py", "tests/db/test_undecodable.py"),
            *("tests/db/test_settlements.py", "tests/db/test_leases_and_fences.py"),
        ),
    ),
    "purge": Group(
        {
            "operations/queues": ("purge", "delete", "_refuse_unless_empty", "_one"),
            "operations/archive": (),
            "operations/workers": ("purge", "reclaim"),
        },
        (
            *("tests/db/test_forgotten_objects.py", "tests/cli/test_what_was_counted.py"),
            *("tests/db/test_requeue_races.py", "tests/db/test_queues_reading_archive_workers.py"),
            "tests/db/test_bad_input.py",
        ),
    ),
}
"""By name, the fences of the statements first."""

MODULES = tuple(dict.fromkeys(module for one in GROUPS.values() for module in one.modules))
"""All that have mutants."""

_FILES = {
    "consumers": (
        *("book", "bounds", "calls", "connections", "declared_queues", "desk", "event_loop"),
        *(
            "idle_queues",
            "keeper",
            "leases",
            "line",
            "policy",
            "results",
            "retries",
            "running",
            "runtime",
        ),
        *("scopes", "signatures", "transactions", "troubles", "verdicts", "workers"),
    ),
    "cli": ("what_was_counted",),
    "db": (
        *(
            "bad_input",
            "bounded_reading",
            "concurrency",
            "declared_queues",
            "dequeue_bounds",
            "empty_lists",
        ),
        *(
            "enqueue_ways",
            "floor",
            "forgotten_objects",
            "leases_and_fences",
            "messages_as_objects",
            "plans",
        ),
        *("plans_of_readers", "plans_of_uneven_tables", "queues_reading_archive_workers"),
        *("requeue_races", "session_rules", "settlements", "several_databases", "undecodable"),
    ),
    "doctor": ("doctor",),
    "model": ("statements", "holes", "machine"),
    "testing": ("draining", "single"),
    "unit": ("commits", "consume", "floor", "pickling", "retry"),
    "wakeup": ("notify", "nudge"),
}
TESTS = tuple(
    f"tests/{folder}/test_{name}.py" for folder, names in _FILES.items() for name in names
)
"""Files that try them."""

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
        for mutant in mutants(source):
            if everything or mutant.kind in ESSENTIAL:
                yield mutant


_BUILDERS = (
    *(f"_core/sql/{name}" for name in ("settle", "lease", "consume", "archive", "workers")),
    *(f"_core/sql/{name}" for name in ("messages", "wakeup", "enqueue", "queues")),
    "_core/states",
    *(f"_core/sql/{name}" for name in ("fragments", "queries", "counts", "health")),
)
_RUNTIME = (
    *("_watch", "_check_executor", "_pause", "_shut_down", "accept", "_release_unstarted"),
    *(
        "_release",
        "next_invocation",
        "next_ready_invocation",
        "_claim",
        "_mark_started",
        "finished",
        "_report",
    ),
    *("fatal", "_unreachable", "over", "drain", "idle", "wait_idle", "close", "_close", "_join"),
)
"""Without how it is put together, and what others are asked for."""

_ARCHIVED = ("requeue", "requeue_many", "_moved", "_check_movable", "delete", "prune")

GROUPS: Mapping[str, Group] = {
    "statements": Group(
        dict.fromkeys(_BUILDERS, ()),
        ("tests/model/test_statements.py", "tests/model/test_holes.py"),
        builds=True,
    ),
    "cursor": Group(
        dict.fromkeys(("_core/cursor", "_core/cursors", "_core/commits"), ()),
        ("tests/unit/test_cursor.py", "tests/unit/test_commits.py"),
    ),
    "dispatching": Group(
        {
            **dict.fromkeys(("consumer/scheduler", "consumer/leader", "consumer/dispatcher"), ()),
            "consumer/connection": ("ConsumerConnection", "_prepares_separately"),
            "consumer/runtime": ("RunQueue", *(f"Runtime.{name}" for name in _RUNTIME)),
        },
        (
            *("tests/consumer/test_scheduler.py", "tests/consumer/test_dispatcher.py"),
            *("tests/consumer/test_runtime.py", "tests/consumer/test_consumer_connection.py"),
        ),
    ),
    "leases": Group(
        {
            **dict.fromkeys((f"consumer/{name}" for name in ("leases", "renewer")), ()),
            "consumer/state": ("ConsumerState.registered", "ConsumerState.mark_lost"),
            **dict.fromkeys(("_core/lease", "consumer/store"), ()),
        },
        (
            *("tests/consumer/test_lease_table.py", "tests/consumer/test_renewer.py"),
            *("tests/unit/test_store.py", "tests/db/test_undecodable.py"),
            "tests/db/test_settlements.py",
        ),
    ),
    "results": Group(
        {
            **dict.fromkeys((f"consumer/{name}" for name in ("results", "disposition")), ()),
            **dict.fromkeys((f"consumer/{name}" for name in ("retrying", "invocation")), ()),
            "decisions": (),
        },
        (
            *("tests/unit/test_retry.py", "tests/consumer/test_disposition.py"),
            *("tests/consumer/test_retrying.py", "tests/consumer/test_results.py"),
        ),
    ),
    "settling": Group(
        dict.fromkeys(("_core/settle", "consumer/store"), ()),
        (
            *("tests/db/test_forgotten_objects.py", "tests/db/test_undecodable.py"),
            *("tests/db/test_settlements.py", "tests/db/test_leases_and_fences.py"),
        ),
    ),
    "purge": Group(
        {
            "_core/queues": ("execute_on",),
            "resources/queues": ("Queues.purge", "Queues.delete", "Queues._refuse_unless_empty"),
            "resources/archive": tuple(f"Archived.{name}" for name in _ARCHIVED),
            "resources/workers": ("Workers.purge", "Workers.reclaim"),
        },
        (
            *("tests/db/test_forgotten_objects.py", "tests/cli/test_what_was_counted.py"),
            *("tests/db/test_requeue_races.py", "tests/db/test_queues_reading_archive_workers.py"),
            "tests/db/test_bad_input.py",
        ),
    ),
}
"""By name, the fences of the statements first."""

MODULES = tuple(dict.fromkeys(module for group in GROUPS.values() for module in group.modules))
"""All that have mutants."""

_FILES = {
    "consumer": (
        *("lease_table", "bounds", "call_transactions", "connections", "declared_queues"),
        *("dispatcher", "event_loop"),
        *(
            "idle_queues",
            "renewer",
            "leases",
            "consumer_connection",
            "scheduler",
            "results",
            "retries",
            "running",
            "runtime",
        ),
        *("scopes", "signatures", "transactions", "retrying", "disposition", "workers"),
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
            "cursor",
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
    "unit": ("commits", "store", "cursor", "pickling", "retry"),
    "wakeup": ("notify", "local"),
}
TESTS = tuple(
    f"tests/{folder}/test_{name}.py" for folder, names in _FILES.items() for name in names
)
"""Files that try them."""

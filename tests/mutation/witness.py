"""Which tests call which builder: a plugin of pytest, and what is worked out of its notes.

A test that does not call a builder cannot find out that it was changed, so that a mutant is tried
by its witnesses alone, the quickest first.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

NOTES = "PGQRS_MUTATION_NOTES"
"""The environment variable that says where the plugin writes to."""

PACKAGE = Path(__file__).parents[2] / "pgqrs_sa"
MODULES = (*sorted(f"statements/{one.stem}" for one in (PACKAGE / "statements").glob("[a-z]*.py")),)
MODULES = (*MODULES, "states")

Witnesses = dict[str, dict[str, float]]
"""By function, as ``statements/lease.dequeue``: its tests, and how many seconds each takes."""

_current = ""
_calls: dict[str, set[str]] = defaultdict(set)
_seconds: dict[str, float] = defaultdict(float)


def pytest_configure() -> None:
    for name in MODULES:
        module = importlib.import_module(f"pgqrs_sa.{name.replace('/', '.')}")
        for key, value in vars(module).copy().items():
            if isinstance(value, type) or not callable(value):
                continue
            if getattr(value, "__module__", None) == module.__name__:
                setattr(module, key, _noting(f"{name}.{key}", value))


def _noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        _calls[name].add(_current)
        return function(*args, **options)

    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _current  # noqa: PLW0603 - threads note as well
    _current = item.nodeid
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration


def pytest_unconfigure() -> None:
    notes = {name: {one: _seconds[one] for one in tests if one} for name, tests in _calls.items()}
    Path(os.environ[NOTES]).write_text(json.dumps(notes))


# --- what is worked out of it --------------------------------------------------------------------


_FOREIGN = re.compile(r"^(sa|func)$|\.c$|\)$")
"""What functions of SQLAlchemy, columns and methods of statements are attributes of."""


class Callers:
    """Who calls whom, as far as names tell: builders are cached, and their helpers seen once."""

    def __init__(self) -> None:
        self._outer: dict[tuple[str, str], str] = {}
        self._mentions: dict[str, set[str]] = {}
        for module in MODULES:
            tree = ast.parse((PACKAGE / f"{module}.py").read_text())
            for outer in tree.body:
                if isinstance(outer, (ast.FunctionDef, ast.ClassDef)):
                    self._learn(module, outer)

    def _learn(self, module: str, outer: ast.FunctionDef | ast.ClassDef) -> None:
        names = set()
        for node in ast.walk(outer):
            if isinstance(node, ast.FunctionDef):
                self._outer[module, node.name] = outer.name
            elif isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and not _FOREIGN.search(ast.unparse(node.value)):
                names.add(node.attr)
        self._mentions[f"{module}.{outer.name}"] = names

    def of(self, module: str, function: str) -> set[str]:
        """Return the function and all that may call it, directly or not."""
        found, waiting = set(), [f"{module}.{self._outer[module, function]}"]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                name = one.rpartition(".")[2]
                waiting += [who for who, names in self._mentions.items() if name in names]
        return found


def merged(notes: Iterable[Path]) -> Witnesses:
    """Return what several runs have noted."""
    found: Witnesses = defaultdict(dict)
    for path in notes:
        for name, tests in json.loads(path.read_text()).items():
            found[name] |= tests
    return found


def chosen(
    witnesses: Mapping[str, Mapping[str, float]],
    callers: Iterable[str],
    most: float,
    first: Sequence[str] = (),
) -> list[str]:
    """Return the tests of some functions, a file at a time, as many as take so many seconds.

    Those of the ``first`` files come first, then the files that are soonest through; none gets
    more than half of the time. One test follows the other within a file, so that its database is
    made once.
    """
    by_file: dict[str, dict[str, float]] = defaultdict(dict)
    for name in callers:
        for test, seconds in witnesses.get(name, {}).items():
            by_file[test.partition("::")[0]][test] = seconds
    tests: list[str] = []
    left = most
    for file in sorted(by_file, key=lambda one: (one not in first, sum(by_file[one].values()))):
        of_file = by_file[file]
        for_file = min(left, most / 2)
        for test, seconds in sorted(of_file.items(), key=lambda one: (one[1], one[0])):
            if seconds <= for_file:
                tests.append(test)
                for_file -= seconds
                left -= seconds
    return tests

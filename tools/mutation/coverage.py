"""Which tests try a mutant: those that run its lines, the quickest first.

A test that does not run what was changed cannot find that out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Coverage", "chosen", "merged"]

Coverage = dict[str, dict[str, Any]]
"""By test: its ``seconds``, and its ``lines`` by module."""


def merged(notes: Iterable[Path]) -> Coverage:
    """Return what several runs have noted."""
    found: Coverage = {}
    for path in notes:
        found |= json.loads(path.read_text())
    return found


def chosen(
    coverage: Coverage,
    module: str,
    lines: Iterable[int],
    most: float,
    first: Sequence[str] = (),
) -> dict[str, float]:
    """Return the tests of some lines and their seconds, as many as take so many seconds.

    Those of the ``first`` files come first, then the files that are soonest through; none gets
    more than half of the time. One test follows the other within a file, so that its database is
    made once.
    """
    wanted = {*lines}
    by_file: dict[str, dict[str, float]] = defaultdict(dict)
    for test, item in coverage.items():
        if not wanted.isdisjoint(item["lines"].get(module, ())):
            by_file[test.partition("::")[0]][test] = item["seconds"]
    tests: dict[str, float] = {}
    left = most
    for file in sorted(by_file, key=lambda path: (path not in first, sum(by_file[path].values()))):
        for_file = min(left, most / 2)
        for test, seconds in sorted(by_file[file].items(), key=lambda path: (path[1], path[0])):
            if seconds <= for_file:
                tests[test] = seconds
                for_file -= seconds
                left -= seconds
    return tests

"""What a run found: JSON lines, and a table of them.

``python tests/support/results.py FILE...`` prints the tables; ``--markdown`` for the docs. The
first line of a file says when, and on what; each other one is a case.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pgqrs-sa", "sqlalchemy", "psycopg", "asyncpg", "alembic")


class Results:
    """A file of one run, written line by line: what there is survives an interruption."""

    def __init__(self, path: Path, title: str, **about: Any) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.write(
            title=title,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            python=platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            **about,
        )

    def write(self, **case: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(case) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a file, and the others."""
    head, *cases = [json.loads(line) for line in path.read_text().splitlines()]
    return head, cases


def table(
    cases: Iterable[dict[str, Any]], by: Sequence[str], counts: Sequence[str]
) -> list[list[str]]:
    """Sum up the counts for each combination of the columns ``by``, in order of appearance."""
    sums: dict[tuple[str, ...], Counter[str]] = {}
    for case in cases:
        found = sums.setdefault(tuple(str(case[name]) for name in by), Counter())
        found["cases"] += 1
        for name in counts:
            found[name] += int(case.get(name) or 0)
    rows = [
        [*key, *(str(found[name]) for name in ("cases", *counts))] for key, found in sums.items()
    ]
    total: Counter[str] = sum(sums.values(), Counter())
    rows.append(
        ["total", *[""] * (len(by) - 1), *(str(total[name]) for name in ("cases", *counts))]
    )
    return [[*by, "cases", *counts], *rows]


def rendered(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    edge, between = ("| ", " | ") if markdown else ("", "  ")
    lines = [
        (
            edge
            + between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            + edge[::-1]
        ).rstrip()
        for row in rows
    ]
    if markdown:
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


BY = {
    "faults": ("fault", "operation"),
    "standby": ("mode",),
    "failover": ("mode",),
    "scale": ("amount", "operation"),
}
COUNTS = ("acknowledged", "lost", "doubled")


def summary(path: Path, *, markdown: bool = False) -> str:
    """A file's first line in words, and its table."""
    head, cases = load(path)
    if not cases:
        return "no case"
    about = ", ".join(
        f"{name} {value}" for name, value in head.items() if value and name != "counts"
    )
    by = BY.get(str(head["title"]), ("title",))
    rows = table(cases, by, head.get("counts") or COUNTS)
    if {"fault", "driver"} <= cases[0].keys():
        cells = {(case["fault"], case["operation"], case["driver"]) for case in cases}
        about += f"; {len(cells)} cells of fault, operation and driver"
    return f"{about}\n\n{rendered(rows, markdown=markdown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of result files.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    for path in given.files:
        print(summary(path, markdown=given.markdown))


if __name__ == "__main__":
    main()

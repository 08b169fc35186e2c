"""What the parts have left in their folders, read and added up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.mutation.reasons import REASONS

from .counts import Counts, counted
from .parts import PARTS, Part

Row = dict[str, Any]
CLEAN = "the audit is clean"
"""What the endurance run ends with, if nothing was lost or doubled."""


@dataclass
class Outcome:
    """A part, and what there is of it; ``counts`` is None if it was not run."""

    part: Part
    folder: Path
    record: Row = field(default_factory=dict)
    counts: Counts | None = None

    @property
    def command(self) -> str:
        return str(self.record.get("command") or self.part.typed)

    @property
    def failed(self) -> bool:
        """Whether it ran and is not as it should be."""
        if self.counts is None:
            return False
        return bool(self.counts.failed or self.record.get("exit_code"))

    @property
    def state(self) -> str:
        if self.counts is None:
            return "not run"
        return "FAILED" if self.failed else "passed"

    @property
    def seconds(self) -> float:
        return float(self.record.get("seconds") or (self.counts.seconds if self.counts else 0))

    @property
    def started(self) -> str:
        told = self.record.get("started") or (self.counts.started if self.counts else None)
        return str(told or "")[:10]

    def tables(self) -> list[tuple[Row, list[Row]]]:
        """The head and the rows of each result file that has a head with a title, by title."""
        found: dict[str, tuple[Row, list[Row]]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            head, *rows = lines(path) or [{}]
            if "title" in head:
                found.setdefault(str(head["title"]), (head, []))[1].extend(rows)
        return list(found.values())


def lines(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def read(folder: Path, parts: Sequence[Part] = PARTS) -> list[Outcome]:
    """Read what each of the parts has left in its folder below this one."""
    return [_outcome(part, folder / part.name) for part in parts]


def _outcome(part: Part, folder: Path) -> Outcome:
    record_file = folder / "part.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    special = {"compat": _of_versions, "mutation": _of_mutants, "endurance": _of_endurance}
    counts = special.get(part.name, _of_junit)(folder)
    if counts is None and record:
        counts = Counts(failed=1, failures=["it left no counts: see output.txt"])
    return Outcome(part, folder, record, counts)


def _of_junit(folder: Path) -> Counts | None:
    files = [*folder.glob("*.xml")]
    return counted(files) if files else None


def versions(folder: Path) -> list[Row]:
    """The last row of each combination."""
    return list({row["combination"]: row for row in lines(folder / "versions.jsonl")}.values())


def _of_versions(folder: Path) -> Counts | None:
    rows = versions(folder)
    if not rows:
        return None
    total = Counts(started=rows[0]["started"])
    for row in rows:
        if "not_run" in row:
            total.failed += 1
            total.failures.append(f"{row['combination']} was not run: {row['not_run']}")
            continue
        if row["exit_code"] and not row["failed"]:
            total.failed += 1
            total.failures.append(f"{row['combination']}: exit code {row['exit_code']}")
        total.passed += row["passed"]
        total.failed += row["failed"]
        total.skipped += row["skipped"]
        total.seconds += row["seconds"]
        total.failures += [f"{row['combination']}: {name}" for name in row["failures"]]
    return total


def mutants(folder: Path) -> list[Row]:
    """Every mutant that was tried, of all files, with what became of it the last time."""
    rows = [row for path in sorted(folder.glob("mutants*.json")) for row in _list(path)]
    rows += [row for path in sorted(folder.glob("*.jsonl")) for row in lines(path)]
    names = ("module", "line", "function", "kind", "what")
    found = {tuple(row[name] for name in names): row for row in rows if "found_by" in row}
    return [{**row, "reason": row.get("reason") or _reason(row)} for row in found.values()]


def _reason(row: Row) -> str | None:
    """Why no test can find a mutant out, if that is known."""
    return REASONS.get((row["module"], row["function"], row["kind"], row["what"]))


def _list(path: Path) -> list[Row]:
    return list(json.loads(path.read_text()))


def _of_mutants(folder: Path) -> Counts | None:
    """A mutant that a test found is a pass, one that survived without a reason is a failure."""
    rows = mutants(folder)
    if not rows:
        return None
    total = Counts(seconds=sum(float(row.get("seconds") or 0) for row in rows))
    for row in rows:
        if row["found_by"]:
            total.passed += 1
        elif row.get("reason"):
            total.skipped += 1
        else:
            total.failed += 1
            total.failures.append(f"{row['module']}: {row['kind']}: {row['what']} survived")
    return total


def _of_endurance(folder: Path) -> Counts | None:
    output = folder / "output.txt"
    if not output.exists():
        return None
    if CLEAN in output.read_text():
        return Counts(passed=1)
    return Counts(failed=1, failures=["the audit is not clean"])

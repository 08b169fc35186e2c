"""What pytest counted: its junit XML files, added up."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Counts:
    """How many tests ended how; an error in a fixture is a failure, an xfail is skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    started: str | None = None

    @property
    def tests(self) -> int:
        return self.passed + self.failed + self.skipped

    def add(self, case: ET.Element) -> None:
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            self.failed += 1
            self.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            self.skipped += 1
        else:
            self.passed += 1


def counted(files: Iterable[Path]) -> Counts:
    """Add up these files; one that is cut off counts as a failure."""
    total = Counts()
    for path in sorted(files):
        try:
            root = ET.parse(path).getroot()  # noqa: S314 - pytest wrote it
        except ET.ParseError:
            total.failed += 1
            total.failures.append(f"{path.name} is cut off")
            continue
        for suite in root.iter("testsuite"):
            total.seconds += float(suite.get("time") or 0)
            total.started = total.started or suite.get("timestamp")
            for case in suite.iter("testcase"):
                total.add(case)
    return total

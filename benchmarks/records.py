"""The JSON lines of a run: first what it ran on, then one line for each measurement.

A line is written as soon as it is known, so that a run that was stopped is not lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

__all__ = ["Failure", "Header", "Missing", "Record", "Run", "Sample", "read", "write"]


@dataclass(frozen=True, slots=True)
class Header:
    """What a run ran on.

    Attributes:
        date: Of its start, ISO 8601, UTC.
        machine: Processor, number of CPUs, memory, system.
        versions: Of Python and the packages.
        server: The server's version and settings.
        sizes: The options.
        rounds: How often each measurement was repeated.
        heavy_rounds: The same for those that take long.
    """

    date: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    server: Mapping[str, str]
    sizes: Mapping[str, Any]
    rounds: int
    heavy_rounds: int
    kind: Literal["header"] = "header"


@dataclass(frozen=True, slots=True)
class Missing:
    """A contender that could not take part, and why."""

    contender: str
    reason: str
    kind: Literal["missing"] = "missing"


@dataclass(frozen=True, slots=True)
class Failure:
    """A measurement that came to nothing, and why."""

    scenario: str
    point: str
    contender: str
    round: int
    reason: str
    kind: Literal["failure"] = "failure"


@dataclass(frozen=True, slots=True)
class Sample:
    """A measurement."""

    scenario: str
    point: str
    contender: str
    round: int
    value: float
    unit: str
    facts: Mapping[str, int | str] = field(default_factory=dict)
    more: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, list[float]] = field(default_factory=dict)
    kind: Literal["sample"] = "sample"


Record = Header | Missing | Failure | Sample

_KINDS: dict[str, type[Record]] = {
    "header": Header,
    "missing": Missing,
    "failure": Failure,
    "sample": Sample,
}


@dataclass(frozen=True, slots=True)
class Run:
    """All that is known of a run."""

    header: Header
    missing: tuple[Missing, ...]
    failures: tuple[Failure, ...]
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Run:
        """Sort records by their kind.

        Raises:
            ValueError: there is no header among them.
        """
        known = list(records)
        headers = [entry for entry in known if isinstance(entry, Header)]
        if not headers:
            raise ValueError("these are not the lines of a run: no line has the kind 'header'")
        return cls(
            headers[0],
            tuple(entry for entry in known if isinstance(entry, Missing)),
            tuple(entry for entry in known if isinstance(entry, Failure)),
            tuple(entry for entry in known if isinstance(entry, Sample)),
        )


def write(file: TextIO, record: Record) -> None:
    """Append one line, and flush it to the disk."""
    file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
    file.flush()


def read(path: Path) -> Run:
    """Read the lines of a run; raises ValueError for a file that is something else."""
    return Run.of(_records(path))


def _records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            yield _KINDS[values["kind"]](**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no line of a run: {error}") from error

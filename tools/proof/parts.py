"""The parts of the proof: what each is about, and the command that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OUT = "{out}"
"""Stands for the part's folder, in a command and in its environment."""


@dataclass(frozen=True)
class Part:
    """A suite that one command runs.

    The command is for the shell of a reader, too: it is what the page prints, without ``OUT``.
    """

    name: str
    about: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()  # further arguments, for what only the page needs

    @property
    def typed(self) -> str:
        """What a reader types to run it without ``tools.proof``."""
        kept = {name: value for name, value in self.environment.items() if OUT not in value}
        words = [f"{name}={value}" for name, value in kept.items()]
        return " ".join([*words, *(f'"{item}"' if " " in item else item for item in self.command)])


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("python", "-m", "pytest", *arguments)


_OWN_SERVERS = ("chaos", "processes", "embedded", "tooling")
"""Their tests start what they need, so that there is nothing to put PgBouncer in front of."""

_LONG = ("-m", "long or not long")
_JUNIT = (f"--junitxml={OUT}/junit.xml",)
_CHAOS = {"PGQRS_CHAOS_RESULTS": OUT}
_MODEL = {"PGQRS_MODEL_RESULTS": OUT}

PARTS = [
    Part(
        "chaos",
        "faults of connections, servers, poolers and standbys",
        _pytest("tests/chaos", *_LONG, "-n", "0"),
        _CHAOS,
        _JUNIT,
    ),
    Part(
        "model",
        "random histories against a model, and histories of many processes",
        _pytest("tests/model", *_LONG),
        _MODEL,
        _JUNIT,
    ),
    Part(
        "security",
        "injection, roles, row level security, logs, payload bombs",
        _pytest("tests/security", *_LONG),
        keeps=_JUNIT,
    ),
    Part(
        "migrations",
        "every way from one schema to the next, and interrupted ones",
        _pytest("tests/migrations", "tests/chaos/test_interrupted_migrations.py", *_LONG),
        keeps=_JUNIT,
    ),
    Part(
        "consumers",
        "consumers in processes of their own: kills, signals, forks, silence",
        _pytest("tests/processes", *_LONG, "-n", "0"),
        keeps=_JUNIT,
    ),
    Part(
        "endurance",
        "20,000 messages, while workers are killed and the server crashes",
        ("python", "-m", "support.endurance"),
        {"PYTHONPATH": "tests"},
    ),
    Part(
        "compat",
        "PostgreSQL 14 to 18, old and new SQLAlchemy and drivers",
        ("python", "-m", "tools.compat"),
        keeps=("--out", OUT),
    ),
    Part(
        "pgbouncer",
        "the suite through PgBouncer in transaction mode",
        _pytest("tests", *(f"--ignore=tests/{name}" for name in _OWN_SERVERS)),
        {"PGQRS_TEST_PGBOUNCER": "1"},
        _JUNIT,
    ),
    Part(
        "mutation",
        "one thing changed in a statement or a decision, and a test must fail",
        ("python", "-m", "tools.mutation"),
        keeps=("--results", OUT),
    ),
]

"""The page: what was run, on what, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.compat.combinations import COMBINATIONS

from . import history
from .results import Outcome, Row, lines, mutants, versions

_HEAD = """# Reliability: what was tested, and what came of it

Written by `python -m tools.proof report` from the results of runs. Block quotes, and columns that
say why, are prose: a person wrote them. All figures were computed when the page was built.

```
pip install -e '.[dev]' && apt-get install pgbouncer
python -m tools.proof run --out results
python -m tools.proof report results --docs docs/explanation/reliability.md
```

> Anyone can run the parts again: each by its command, or all of them, which takes hours.
"""
_NOT_RUN = "Not run."
_ABOUT = {
    "commit": "commit",
    "python": "Python",
    "postgresql": "PostgreSQL",
    "sqlalchemy": "SQLAlchemy",
    "psycopg": "psycopg",
    "asyncpg": "asyncpg",
    "alembic": "Alembic",
    "pgbouncer": "PgBouncer",
    "platform": "platform",
    "cores": "cores",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(one) for one in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).replace("|", "\\|").replace("\n", " ")


def page(outcomes: Sequence[Outcome], left_out: Mapping[str, str]) -> str:
    """Write the page.

    Args:
        outcomes: Of every part, those that were not run included.
        left_out: The tests that do not go through PgBouncer, and why.
    """
    by_name = {one.part.name: one for one in outcomes}
    sections: list[tuple[str, str, Callable[[Outcome], str]]] = [
        ("Faults", "chaos", _faults),
        ("A standby is promoted", "chaos", _standby),
        ("More data", "chaos", _scale),
        ("Versions", "compat", _versions),
        ("PgBouncer", "pgbouncer", lambda one: _pgbouncer(one, left_out)),
        ("Random histories", "model", _model),
        ("Mutants", "mutation", _mutants),
        ("Endurance", "endurance", _endurance),
    ]
    parts = [_HEAD, _age(outcomes), "\n## On what\n", _environment(outcomes)]
    parts += ["\n## Summary\n", _summary(outcomes)]
    parts += [f"\n{_failures(outcomes)}"] if any(one.failed for one in outcomes) else []
    for title, name, write in sections:
        one = by_name.get(name)
        text = _NOT_RUN if one is None or one.counts is None else write(one)
        parts.append(f"\n## {title}\n\n{text}")
    return "\n".join(parts).rstrip() + "\n"


def prose(text: str) -> str:
    """Text that a person wrote, marked as such."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _commit(one: Outcome) -> str | None:
    return (one.record.get("machine") or {}).get("commit")


def _age(outcomes: Sequence[Outcome]) -> str:
    """Which commits the figures come from, and how much of the package has changed since."""
    commits = dict.fromkeys(
        commit for one in outcomes if one.counts and (commit := _commit(one)) is not None
    )
    rows = [(commit, _changed(commit)) for commit in commits]
    built = f"Built at commit {history.head() or 'unknown'}."
    return f"{built}\n\n" + table(("figures from commit", "package files changed since"), rows)


def _changed(commit: str | None) -> str:
    changed = None if commit is None else history.changed_files(commit)
    return "unknown" if changed is None else str(changed)


def _environment(outcomes: Sequence[Outcome]) -> str:
    """Each fact with its value; with several of them, if the parts were run on different ones."""
    found: dict[str, dict[str, None]] = {}
    for one in outcomes:
        heads = [head for head, _ in one.tables()] if "machine" not in one.record else []
        for name, value in (
            pair for facts in (one.record.get("machine") or {}, *heads) for pair in facts.items()
        ):
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    days = dict.fromkeys(sorted({one.started for one in outcomes if one.counts and one.started}))
    rows = [("date", ", ".join(days) or "-")]
    rows += [(title, ", ".join(found.get(name, ["-"]))) for name, title in _ABOUT.items()]
    return table(("what", "which"), rows)


def _summary(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for one in outcomes:
        counts: list[Any] = [None] * 4
        if (found := one.counts) is not None:
            counts = [found.tests, found.passed, found.failed, found.skipped]
        seconds = f"{one.seconds:.0f}" if one.seconds else None
        since = [_commit(one) or "unknown", _changed(_commit(one))] if found else [None, None]
        rows.append((one.part.name, f"`{one.command}`", *counts, seconds, one.state, *since))
    head = ("part", "command", "tests", "passed", "failed", "skipped", "seconds", "state")
    notes = [f"- {one.part.name}: {note}" for one in outcomes if (note := one.record.get("note"))]
    about = [f"- {one.part.name}: {one.part.about}." for one in outcomes]
    texts = [table((*head, "commit", "files changed since"), rows), "", prose("\n".join(about))]
    if notes:
        texts += ["", prose("\n".join(["Notes:", "", *notes]))]
    return "\n".join(texts)


def _failures(outcomes: Sequence[Outcome]) -> str:
    named = [
        f"- {one.part.name}: {name}"
        for one in outcomes
        if one.failed and one.counts
        for name in one.counts.failures or [f"exit code {one.record.get('exit_code')}"]
    ]
    return "\n".join(["Failed:", "", *named])


def summed(rows: Iterable[Row], by: Sequence[str], counts: Sequence[str]) -> list[list[Any]]:
    """Add the counts up for each combination of ``by``, in order of appearance, and in all."""
    sums: dict[tuple[str, ...], Counter[str]] = {}
    for row in rows:
        found = sums.setdefault(tuple(str(row.get(name)) for name in by), Counter())
        found.update({name: int(row.get(name) or 0) for name in counts})
        found["cases"] += 1
    total: Counter[str] = Counter()
    for one in sums.values():
        total.update(one)
    names = ("cases", *counts)
    last = ["all", *[""] * (len(by) - 1), *(total[name] for name in names)]
    return [*([*key, *(one[name] for name in names)] for key, one in sums.items()), last]


def _titled(one: Outcome, title: str) -> tuple[Row, list[Row]]:
    return next((found for found in one.tables() if found[0]["title"] == title), ({}, []))


def _summed(one: Outcome, title: str, by: Sequence[str], default: Sequence[str]) -> str:
    head, rows = _titled(one, title)
    if not rows:
        return _NOT_RUN
    counts = list(head.get("counts") or default)
    return table([*by, "cases", *counts], summed(rows, by, counts))


_OUTCOMES = ("acknowledged", "lost", "doubled")
_FAULTS = """\
A case is one operation with a fault injected at one point of it. Acknowledged: a caller was told
that the operation is done. Nobody is told if the process was killed first; two callers are told if
one was only suspended. Lost: the effect is missing. Doubled: the effect happened twice."""


def _faults(one: Outcome) -> str:
    _, rows = _titled(one, "faults")
    if not rows:
        return _NOT_RUN
    drivers = list(dict.fromkeys(str(row["driver"]) for row in rows))
    cells: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    for row in rows:
        place = cells.setdefault((str(row["fault"]), str(row["operation"])), {})
        place.setdefault(str(row["driver"]), Counter()).update(
            {"cases": 1, **{name: int(row.get(name) or 0) for name in _OUTCOMES}}
        )
    matrix = [
        [*key, *(_three(place.get(driver)) for driver in drivers)] for key, place in cells.items()
    ]
    return "\n".join(
        [
            prose(_FAULTS),
            "",
            table(["fault", "cases", *_OUTCOMES], summed(rows, ["fault"], _OUTCOMES)),
            "\nBy operation and driver, as acknowledged / lost / doubled (cases):\n",
            table(["fault", "operation", *drivers], matrix),
        ]
    )


def _three(found: Counter[str] | None) -> str | None:
    if found is None:
        return None
    return " / ".join(str(found[name]) for name in _OUTCOMES) + f" ({found['cases']})"


def _standby(one: Outcome) -> str:
    return _summed(one, "standby", ["mode"], _OUTCOMES)


def _scale(one: Outcome) -> str:
    return _summed(one, "scale", ["amount", "operation"], ["buffers"])


def _versions(one: Outcome) -> str:
    """A table for each selection of tests that was run."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in versions(one.folder):
        groups.setdefault(tuple(row["tests"]), []).append(row)
    texts = []
    for tests, rows in groups.items():
        told = ", ".join(f"`{test}`" for test in tests)
        texts += [f"With each of these: {told}.\n", _combinations(rows), ""]
    there = {row["combination"] for rows in groups.values() for row in rows}
    absent = ", ".join(one.name for one in COMBINATIONS if one.name not in there)
    return "\n".join([*texts, f"Not run: {absent}."] if absent else texts[:-1])


def _combinations(rows: Iterable[Row]) -> str:
    names = ("postgresql", "python", "sqlalchemy", "psycopg", "asyncpg", "alembic")
    counts = ("passed", "failed", "skipped", "seconds")
    told = []
    for row in rows:
        facts = [row["combination"], *(row.get(name) for name in names)]
        if "not_run" in row:
            told.append([*facts, f"not run: {row['not_run']}", *[None] * 3])
        else:
            told.append([*facts, *(row[name] for name in counts)])
    return table(["combination", *names, *counts], told)


def _pgbouncer(one: Outcome, left_out: Mapping[str, str]) -> str:
    assert one.counts is not None
    counts = one.counts
    said = f"{counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped."
    rows = [(f"`{name}`", why) for name, why in left_out.items()]
    return f"{said} These need the server itself, and are left out:\n\n" + table(
        ("test", "why"), rows
    )


def _model(one: Outcome) -> str:
    found = lines(one.folder / "model.jsonl")
    if not found:
        return "It left no counts of what happened."
    names = list(
        dict.fromkeys(
            name
            for row in found
            for name, value in row.items()
            if name == "seed" or isinstance(value, int | float)
        )
    )
    text = table(["test", *names], ([row["test"], *(row.get(n) for n in names)] for row in found))
    seen: Counter[str] = Counter()
    for row in found:
        seen.update(row.get("seen") or {})
    if seen:
        told = ", ".join(f"{what} {times:,}" for what, times in sorted(seen.items()))
        text += f"\n\nWhat happened in them, and how often: {told}."
    return text


def _mutants(one: Outcome) -> str:
    rows = [{**row, "found": bool(row["found_by"])} for row in mutants(one.folder)]
    for row in rows:
        row.setdefault("group", "statements")
        row["survived"] = not row["found"]
    found = sum(row["found"] for row in rows)
    counts = ("found", "survived")
    texts = [
        f"{found} of {len(rows)} mutants were found out by a test ({found / len(rows):.1%}).\n",
        table(["group", "mutants", *counts], summed(rows, ["group"], counts)),
        "",
        table(["module", "mutants", *counts], summed(rows, ["module"], counts)),
        "",
        table(["kind", "mutants", *counts], summed(rows, ["kind"], counts)),
    ]
    survivors = [
        (f"{row['module']}.py:{row['line']}", f"`{row['function']}`", row["kind"],
         f"`{row['what']}`", row.get("reason") or "NO REASON GIVEN")
        for row in rows if row["survived"]
    ]  # fmt: skip
    if survivors:
        texts += ["\nSurvivors:\n"]
        texts += [table(("where", "function", "kind", "changed", "why it survives"), survivors)]
    return "\n".join(texts)


def _endurance(one: Outcome) -> str:
    return f"```\n{(one.folder / 'output.txt').read_text().strip()}\n```"

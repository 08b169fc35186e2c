"""Small made-up results, and the page that is written about them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support.direct import DIRECT
from tools.proof import __main__ as program
from tools.proof import history
from tools.proof.page import page
from tools.proof.parts import PARTS, Part
from tools.proof.results import read
from tools.proof.running import ran

JUNIT = """<testsuites><testsuite time="2.5" timestamp="2026-01-02T03:04:05">
<testcase classname="tests.x" name="test_that_passes"/>
<testcase classname="tests.x" name="test_that_skips"><skipped message="no"/></testcase>
{more}</testsuite></testsuites>"""
BROKEN = '<testcase classname="tests.x" name="test_that_fails"><failure/></testcase>'
ERROR = '<testcase classname="tests.x" name="test_that_errs"><error/></testcase>'
MUTANT = {"module": "settle", "line": 3, "function": "build", "kind": "lock", "seconds": 1}


def left(folder: Path, name: str, text: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(item) + "\n" for item in text)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def written(folder: Path) -> str:
    return page(read(folder), {"test_a": "for a reason"})


def line(text: str, start: str) -> str:
    (found,) = [item for item in text.splitlines() if item.startswith(start)]
    return found


def command(*arguments: str) -> Any:
    return CliRunner().invoke(program.main, arguments)


def test_with_no_results_every_part_is_said_not_to_have_run(tmp_path):
    text = written(tmp_path)
    for part in PARTS:
        assert line(text, f"| {part.name} |").endswith("| - | - | - | - | - | not run | - | - |")
    assert text.count("\n\nNot run.") == 8


def test_the_counts_of_pytest_and_what_failed_are_told(tmp_path):
    """A failure, an error, a file that is cut off and an exit code: each fails its part."""
    left(tmp_path, "security/junit.xml", JUNIT.format(more=""))
    left(tmp_path, "security/part.json", {"seconds": 61.2, "exit_code": 0, "command": "run it"})
    left(tmp_path, "model/junit.xml", JUNIT.format(more=BROKEN + ERROR))
    left(tmp_path, "chaos/junit.xml", JUNIT.format(more=""))
    left(tmp_path, "chaos/part.json", {"exit_code": 3, "note": "some of them\nwere slow"})
    left(tmp_path, "migrations/part.json", {"exit_code": 0})
    left(tmp_path, "consumers/junit.xml", "<testsuites><testsuite")
    left(tmp_path, "pgbouncer/junit.xml", "")
    text = written(tmp_path)
    assert line(text, "| security |") == (
        "| security | `run it` | 2 | 1 | 0 | 1 | 61 | passed | unknown | unknown |"
    )
    assert "| date | 2026-01-02 |" in text
    assert line(text, "| model |").endswith("| 4 | 1 | 2 | 1 | 2 | FAILED | unknown | unknown |")
    for name in ("chaos", "consumers", "pgbouncer"):
        assert line(text, f"| {name} |").endswith("FAILED | unknown | unknown |")
    assert "- model: tests.x::test_that_fails" in text
    assert "- model: tests.x::test_that_errs" in text
    assert "- chaos: exit code 3" in text
    assert "- migrations: it left no counts" in text
    assert "> Notes:\n>\n> - chaos: some of them\n> were slow" in text
    assert "> - chaos: faults of connections" in text


def test_the_page_says_on_what_it_was_run(tmp_path):
    for name, release in (("chaos", "18.6"), ("model", "18.6"), ("security", "17.1")):
        left(tmp_path, f"{name}/junit.xml", JUNIT.format(more=""))
        left(tmp_path, f"{name}/part.json", {"machine": {"postgresql": release, "cores": 2}})
    text = written(tmp_path)
    assert "| PostgreSQL | 18.6, 17.1 |" in text
    assert "| cores | 2 |" in text
    assert "| PgBouncer | - |" in text


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository instead of ours: two commits, the second changes two package files."""
    root = tmp_path / "repository"
    (root / "pgqrs_sa").mkdir(parents=True)

    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", *author, *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    for text in ("old", "new"):
        for name in ("pgqrs_sa/a.py", "pgqrs_sa/b.py", "README.md"):
            (root / name).write_text(text)
        git("add", ".")
        git("commit", "-qm", text)
        commits.append(git("describe", "--always"))
    monkeypatch.setattr(history, "head", functools.partial(history.head, root))
    monkeypatch.setattr(
        history, "changed_files", functools.partial(history.changed_files, root=root)
    )
    return commits


def test_the_page_says_how_far_the_package_has_moved_on_since_each_part(tmp_path, repository):
    old, new = repository
    for name, commit in (("chaos", old), ("model", new), ("security", "0000000")):
        left(tmp_path, f"{name}/junit.xml", JUNIT.format(more=""))
        left(tmp_path, f"{name}/part.json", {"machine": {"commit": commit}})
    text = written(tmp_path)
    assert f"Built at commit {new}." in text
    assert line(text, f"| {old} |") == f"| {old} | 2 |"
    assert line(text, f"| {new} |") == f"| {new} | 0 |"
    assert line(text, "| 0000000 |") == "| 0000000 | unknown |"
    assert line(text, "| chaos |").endswith(f"| passed | {old} | 2 |")


def test_faults_and_standbys_are_added_up(tmp_path):
    row = {"fault": "crash", "operation": "archive", "driver": "psycopg", "acknowledged": 1}
    rows = [row, {**row, "doubled": 1}, {**row, "driver": "asyncpg", "lost": 2}]
    left(tmp_path, "chaos/faults.jsonl", [{"title": "faults"}, *rows])
    left(tmp_path, "chaos/faults-2.jsonl", [{"title": "faults"}, {**row, "operation": "enqueue"}])
    head = {"title": "standby", "counts": ["acknowledged", "lost"], "postgresql": "16.3"}
    rows = [{"mode": "asynchronous", "acknowledged": 9, "lost": n} for n in (2, 3)]
    left(tmp_path, "chaos/standby.jsonl", [head, *rows])
    left(tmp_path, "chaos/junit.xml", JUNIT.format(more=""))
    text = written(tmp_path)
    assert "| fault | operation | psycopg | asyncpg |" in text
    assert "| crash | archive | 2 / 0 / 1 (2) | 1 / 2 / 0 (1) |" in text
    assert "| crash | enqueue | 1 / 0 / 0 (1) | - |" in text
    assert "| crash | 4 | 4 | 2 | 1 |\n| all | 4 | 4 | 2 | 1 |" in text
    assert "| asynchronous | 2 | 18 | 5 |" in text
    assert "| PostgreSQL | 16.3 |" in text  # of a part without a record: from its results


def combination(name: str, **more: Any) -> dict[str, Any]:
    common = {"combination": name, "started": "2026-01-02", "tests": ["tests/db"]}
    counts = {"passed": 5, "failed": 0, "skipped": 1, "seconds": 9, "failures": []}
    return {**common, "postgresql": "14.2", "exit_code": 0, **counts, **more}


def test_the_last_run_of_each_combination_counts_and_one_that_failed_fails_the_part(tmp_path):
    rows = [combination("pg14", failed=1, exit_code=1), combination("pg14", python="3.11.7")]
    left(tmp_path, "compat/versions.jsonl", rows)
    text = written(tmp_path)
    assert line(text, "| pg14 |") == "| pg14 | 14.2 | 3.11.7 | - | - | - | - | 5 | 0 | 1 | 9 |"
    assert line(text, "| compat |").endswith("passed | unknown | unknown |")
    assert "With each of these: `tests/db`." in text
    assert "Not run: pg15, pg16, pg17, pg18, oldest," in text
    failed = [
        (combination("pg14", failed=1, failures=["tests.x::y"], exit_code=1), "pg14: tests.x::y"),
        (combination("pg14", exit_code=2), "pg14: exit code 2"),
        (combination("pg14", not_run="no npm"), "pg14 was not run: no npm"),
    ]
    for row, said in failed:
        left(tmp_path, "compat/versions.jsonl", [row, combination("pg15")])
        text = written(tmp_path)
        assert line(text, "| compat |").endswith("FAILED | unknown | unknown |")
        assert said in text


def test_mutants_are_scored_and_a_survivor_needs_a_reason(tmp_path):
    rows = [
        {**MUTANT, "what": "FOR UPDATE", "found_by": "tests/db/a.py"},
        {**MUTANT, "what": "a | b", "found_by": None, "reason": "the same"},
        {**MUTANT, "what": "x", "found_by": None},
        {**MUTANT, "what": "x", "found_by": "tests/a.py"},  # tried again: counts once
    ]
    left(tmp_path, "mutation/results.jsonl", rows)
    text = written(tmp_path)
    assert "2 of 3 mutants were found out by a test (66.7%)" in text
    assert "| settle.py:3 | `build` | lock | `a \\| b` | the same |" in text
    assert line(text, "| mutation |").endswith("| 3 | 2 | 0 | 1 | 3 | passed | unknown | unknown |")
    left(tmp_path, "mutation/mutants-1.json", [{**MUTANT, "what": "y", "found_by": None}])
    text = written(tmp_path)
    assert "NO REASON GIVEN" in text
    assert line(text, "| mutation |").endswith("FAILED | unknown | unknown |")


def test_the_model_pgbouncer_and_the_audit_of_the_endurance_run_are_told(tmp_path):
    row = {"test": "test_x", "examples": 450, "steps": 27, "seed": 5, "seen": {"a lease": 3}}
    left(tmp_path, "model/model.jsonl", [row, {**row, "test": "test_y"}])
    for name in ("model", "pgbouncer"):
        left(tmp_path, f"{name}/junit.xml", JUNIT.format(more=""))
    for said, state in [("the audit is clean", "passed"), ("the audit fails: lost 1", "FAILED")]:
        left(tmp_path, "endurance/output.txt", f"20 messages\n{said}\n")
        text = written(tmp_path)
        assert line(text, "| endurance |").endswith(f"{state} | unknown | unknown |")
        assert f"20 messages\n{said}\n```" in text
    assert "| test_x | 450 | 27 | 5 |" in text
    assert "how often: a lease 6." in text
    assert "| `test_a` | for a reason |" in text


# --- the commands --------------------------------------------------------------------------------


def test_a_report_is_written_and_exits_with_1_if_a_part_has_failed(tmp_path):
    docs = tmp_path / "page.md"
    left(tmp_path, "model/junit.xml", JUNIT.format(more=""))
    assert command("report", str(tmp_path), "--docs", str(docs)).exit_code == 0
    assert docs.read_text().startswith("# Reliability")
    left(tmp_path, "model/junit.xml", JUNIT.format(more=BROKEN))
    assert command("report", str(tmp_path), "--docs", str(docs)).exit_code == 1
    assert "test_that_fails" in docs.read_text()


def part(code: str) -> Part:
    return Part("small", "", ("python", "-c", code), keeps=("{out}/junit.xml",))


def test_a_part_leaves_its_output_and_what_it_was_run_on(tmp_path):
    write = f"import sys; print('hello'); open(sys.argv[1], 'w').write({JUNIT.format(more='')!r})"
    left(tmp_path, "small/junit-old.xml", JUNIT.format(more=BROKEN))
    assert ran(part(write), tmp_path / "small") == 0
    (item,) = read(tmp_path, [part(write)])
    assert (item.state, item.counts.tests) == ("passed", 2)
    assert (tmp_path / "small" / "output.txt").read_text() == "hello\n"
    assert item.record["machine"]["python"] == sys.version.split()[0]


def test_a_run_exits_with_1_if_a_part_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "PARTS", [part("raise SystemExit(3)")])
    done = command("run", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert read(tmp_path, program.PARTS)[0].failed


def test_what_does_not_go_through_pgbouncer_exists():
    root = Path(__file__).parents[2]
    sources = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    for name in DIRECT:
        if name.endswith(".py"):
            assert (root / name).exists(), name
        else:
            assert f"def {name.partition('[')[0]}(" in sources, name


def test_every_part_that_pytest_runs_has_tests():
    root = Path(__file__).parents[2]
    for part in PARTS:
        for word in part.command:
            assert not word.startswith("tests/") or (root / word).exists(), word

"""What CI makes of what pip-audit says: see ``.ci/audit``."""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from support.cases import each_case

AUDIT = Path(__file__).parents[2] / ".ci" / "audit"
REFUSED = """Traceback (most recent call last):
requests.exceptions.ConnectionError: HTTPSConnectionPool(host='index.test', port=443): Max retries
"""
CLEAN = {"name": "clean", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found and could not be audited"}
VULNERABLE = {
    "name": "bad",
    "version": "2.0",
    "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}, {"id": "CVE-2", "fix_versions": []}],
}


@pytest.fixture(scope="module")
def judge() -> Any:
    if not AUDIT.exists():
        pytest.skip("not a checkout: there is no .ci/audit")
    loader = SourceFileLoader("pgqrs_ci_audit", str(AUDIT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module.judge


def told(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_vulnerability_fails_with_the_release_that_fixes_it(judge) -> None:
    code, text = judge(1, told(CLEAN, VULNERABLE, UNKNOWN), "Found 2 known vulnerabilities")
    assert code == 1
    assert "bad 2.0: CVE-1, fixed in 2.1" in text
    assert "bad 2.0: CVE-2, fixed in no release" in text


def test_it_fails_whatever_exit_code_it_came_with(judge) -> None:
    assert judge(0, told(VULNERABLE), "")[0] == 1


def test_nothing_known_passes_and_says_of_how_many_packages_and_what_was_left_out(judge) -> None:
    assert judge(0, told(CLEAN, CLEAN), "") == (0, "no known vulnerability in 2 packages")
    code, text = judge(0, told(CLEAN, UNKNOWN), "")
    assert (code, text) == (0, "no known vulnerability in 1 packages; not in the index: unknown")


def test_an_index_that_cannot_be_reached_is_said_and_does_not_fail(judge) -> None:
    code, text = judge(1, "", REFUSED)
    assert code == 0
    assert text.startswith("NOTHING WAS AUDITED: the index of vulnerabilities does not answer")


def test_an_index_that_knows_nothing_is_not_taken_for_a_clean_bill(judge) -> None:
    code, text = judge(0, told(UNKNOWN, UNKNOWN), "No known vulnerabilities found")
    assert (code, text) == (0, "NOTHING WAS AUDITED: the index knows none of the 2 packages")


@each_case(
    ("code", "out", "err"),
    [(2, "", "error: unrecognized arguments"), (1, "", ""), (1, told(CLEAN), "it broke")],
)
def test_a_failure_of_another_kind_is_a_failure(judge, code: int, out: str, err: str) -> None:
    code, text = judge(code, out, err)
    assert code == 2
    assert text.startswith("pip-audit failed")

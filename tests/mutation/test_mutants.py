"""What is taken out of a statement, shown on a small one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .__main__ import MODULES
from .mutants import ESSENTIAL, KINDS, mutants
from .reasons import REASONS
from .witness import Callers, chosen

ROOT = Path(__file__).parents[2]
SOURCE = """
def build(models, wanted):
    rows = (
        sa.select(t.c.id)
        .join(other, t.c.id == other.c.id)
        .where(t.c.a == 1, t.c.vt <= now(), *more)
        .order_by(t.c.id)
        .with_for_update(of=t, skip_locked=True)
    )
    return sa.update(t).where(t.c.id == rows.c.id).values(vt=now() + span, é=None)
"""
CHANGES = [
    ("join", "t.c.id == other.c.id", "join(other, sa.true())"),
    ("conjunct", "*more", "where(t.c.a == 1, t.c.vt <= now())"),
    ("conjunct", "t.c.a == 1", "where(t.c.vt <= now(), *more)"),
    ("conjunct", "t.c.vt <= now()", "where(t.c.a == 1, *more)"),
    ("boundary", "t.c.vt <= now() -> t.c.vt < now()", "(t.c.vt < now())"),
    ("order", "order by t.c.id", "*more))\n        .with_for_update"),
    ("lock", "FOR UPDATE", ".order_by(t.c.id))"),
    ("skip locked", "SKIP LOCKED", "with_for_update(of=t))"),
    ("conjunct", "t.c.id == rows.c.id", "(sa.update(t)).values(vt=now() + span, é=None)"),
    ("set", "vt=now() + span", "values(é=None)"),
    ("set", "é=None", "values(vt=now() + span)"),
    ("arithmetic", "now() + span -> now()", "values(vt=(now()), é=None)"),
]


def test_each_part_is_taken_out_once() -> None:
    found = [*mutants(SOURCE)]
    assert {(one.kind, one.what) for one in found} == {(kind, what) for kind, what, _ in CHANGES}
    assert len(found) == len(CHANGES)
    for one in found:
        (expected,) = (text for *key, text in CHANGES if (one.kind, one.what) == tuple(key))
        ast.parse(one.source)
        assert expected in one.source
        assert one.function == "build"
    assert [one.line for one in found if one.kind in {"join", "lock", "set"}] == [5, 8, 10, 10]


@pytest.mark.parametrize("module", MODULES)
def test_every_mutant_of_a_module_is_a_module(module: str) -> None:
    source = (ROOT / "pgqrs_sa" / f"{module}.py").read_text()
    found = [*mutants(source)]
    assert sum(one.kind in ESSENTIAL for one in found) >= 5
    for one in found:
        assert one.kind in KINDS
        assert one.source != source
        compile(one.source, module, "exec")


def test_every_module_that_has_something_to_take_out_is_tried() -> None:
    statements = (ROOT / "pgqrs_sa" / "statements").glob("*.py")
    having = {f"statements/{one.stem}" for one in statements if [*mutants(one.read_text())]}
    assert having <= {*MODULES}


@pytest.mark.parametrize("key", REASONS, ids=lambda key: ".".join(key[:2]))
def test_what_is_said_to_be_without_a_test_is_still_a_mutant(key: tuple[str, ...]) -> None:
    module, *rest = key
    source = (ROOT / "pgqrs_sa" / f"{module}.py").read_text()
    assert rest in [[one.function, one.kind, one.what] for one in mutants(source)]
    assert len(REASONS[key]) > 40, "say why"


def test_who_calls_a_helper_is_known_by_its_name() -> None:
    callers = Callers()
    assert "statements/settle.archive" in callers.of("statements/settle", "held")
    assert "statements/consume.turn" in callers.of("statements/settle", "held")
    assert callers.of("statements/archive", "prune") == {"statements/archive.prune"}
    # A function inside another one is part of that.
    assert "statements/enqueue.from_select" in callers.of("statements/enqueue", "given")


def test_a_mutant_is_tried_by_those_who_call_it_the_quickest_first() -> None:
    noted = {
        "s.one": {"a.py::slow": 5.0, "a.py::quick": 1.0, "b.py::short": 0.5},
        "s.two": {"c.py::other": 0.1},
    }
    assert chosen(noted, ["s.one"], 60) == ["b.py::short", "a.py::quick", "a.py::slow"]
    assert chosen(noted, ["s.one"], 60, ["a.py"])[0] == "a.py::quick"
    assert chosen(noted, ["s.one"], 4) == ["b.py::short", "a.py::quick"]
    assert chosen(noted, ["s.none"], 60) == []

"""What is changed in a statement and in a decision, shown on small ones."""

from __future__ import annotations

import ast
from typing import Any

from tools.mutation.coverage import chosen
from tools.mutation.groups import GROUPS, MODULES, PACKAGE, TESTS
from tools.mutation.mutants import ESSENTIAL, KINDS, mutants
from tools.mutation.operators import DECISIONS, decisions
from tools.mutation.reasons import REASONS

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
DECISION = """
class Book:
    def __init__(self):
        super().__init__()
        self.held = {}

    async def due(self, now, *, é=True):
        self.asked = now
        kept = min(now, self.end - 2 * now)
        if self.closed or not kept:
            raise Closed(f"{kept + 1}")
        while kept > 0:
            log.info("kept", kept + 1)
            await self.wait(strict=True)
            break
        match kept:
            case Held() if kept.one:
                return True
            case Left():
                return [one for one in kept if one.é]
            case _:
                return None

def free():
    return a < b
"""
DECIDED = [
    ("Book.due", 8, "removed", "self.asked = now", "        pass\n        kept"),
    ("Book.due", 9, "extreme", None, "kept = (max(now, self.end - 2 * now))"),
    ("Book.due", 9, "factor", "2 * now -> 2 / now", "self.end - (2 / now)"),
    ("Book.due", 9, "sign", None, "min(now, (self.end + 2 * now))"),
    ("Book.due", 10, "not", "not kept -> kept", "if self.closed or (kept):"),
    ("Book.due", 10, "operand", "or: not kept", "if (self.closed):"),
    ("Book.due", 10, "operand", "or: self.closed", "if (not kept):"),
    ("Book.due", 11, "removed", None, "not kept:\n            pass\n"),
    ("Book.due", 12, "boundary", "kept > 0 -> kept >= 0", "while (kept >= 0):"),
    ("Book.due", 12, "constant", "kept > 0 -> kept > 1", "while (kept > 1):"),
    ("Book.due", 12, "negated", "kept > 0 -> kept <= 0", "while (kept <= 0):"),
    ("Book.due", 14, "constant", "True in self.wait(strict=True)", "wait(strict=False)"),
    ("Book.due", 14, "removed", "await self.wait(strict=True)", "pass\n            break"),
    ("Book.due", 15, "loop", "break", "continue\n        match"),
    ("Book.due", 17, "case", "case Held() if kept.one", "case Held() if False:"),
    ("Book.due", 18, "constant", "return True", "return False"),
    ("Book.due", 19, "case", "case Left()", "case Left() if False:"),
    ("Book.due", 20, "negated", "one.é -> not one.é", "if (not one.é)]"),
    ("free", 25, "boundary", "a < b -> a <= b", "return (a <= b)"),
    ("free", 25, "negated", "a < b -> a >= b", "return (a >= b)"),
]


def test_each_part_is_taken_out_once() -> None:
    found = [*mutants(SOURCE)]
    assert {(row.kind, row.what) for row in found} == {(kind, what) for kind, what, _ in CHANGES}
    assert len(found) == len(CHANGES)
    for row in found:
        (expected,) = (text for *key, text in CHANGES if (row.kind, row.what) == tuple(key))
        ast.parse(row.source)
        assert expected in row.source
        assert row.function == "build"
    assert [row.line for row in found if row.kind in {"join", "lock", "set"}] == [5, 8, 10, 10]


def test_each_decision_is_changed_once() -> None:
    found = [*decisions(DECISION)]
    assert [(row.function, row.line, row.kind) for row in found] == [row[:3] for row in DECIDED]
    for item, (_, line, _, what, text) in zip(found, DECIDED, strict=True):
        ast.parse(item.source)
        assert what in (None, item.what)
        assert text in item.source
        assert item.lines[0] == line


def test_classes_and_functions_can_be_chosen() -> None:
    everything = [*decisions(DECISION)]
    assert [*decisions(DECISION, ["Book"])] == everything[:-2]
    assert [*decisions(DECISION, ["Book.due"])] == everything[:-2]
    assert [*decisions(DECISION, ["free"])] == everything[-2:]


def test_every_mutant_of_a_module_compiles_and_every_reason_is_about_one() -> None:
    explained = set()
    for group in GROUPS.values():
        for module in group.modules:
            source = (PACKAGE / f"{module}.py").read_text()
            found = [*group.mutants(module, everything=True)]
            essential = sum(mutant.kind in ESSENTIAL for mutant in found)
            assert essential >= 5 if group.builds else found, module
            for mutant in found:
                assert mutant.kind in (KINDS if group.builds else DECISIONS), module
                assert mutant.source != source, mutant
                compile(mutant.source, module, "exec")
                explained.add((module, mutant.function, mutant.kind, mutant.what))
    assert {*REASONS} - explained == set()
    assert [key for key, reason in REASONS.items() if len(reason) <= 40] == [], "say why"


def test_every_module_that_has_something_to_take_out_is_tried() -> None:
    statements = (PACKAGE / "_core/sql").glob("*.py")
    having = {f"_core/sql/{path.stem}" for path in statements if [*mutants(path.read_text())]}
    assert having <= {*MODULES}


def test_what_is_chosen_exists() -> None:
    """A function or a file of tests that gets another name is not left out by that."""
    assert [file for file in TESTS if not (PACKAGE.parent / file).exists()] == []
    for group in GROUPS.values():
        assert {*group.first} <= {*TESTS}
        for module, names in group.modules.items():
            tree = ast.parse((PACKAGE / f"{module}.py").read_text())
            top = {node.name: node for node in tree.body if hasattr(node, "name")}
            for name in names:
                outer, _, inner = name.partition(".")
                methods = {getattr(node, "name", "") for node in getattr(top[outer], "body", ())}
                assert not inner or inner in methods, name


def test_a_mutant_is_tried_by_those_that_run_it_the_quickest_first() -> None:
    def noted(seconds: float, *lines: int) -> dict[str, Any]:
        return {"seconds": seconds, "lines": {"s": [*lines]}}

    coverage = {
        "a.py::slow": noted(5.0, 1, 2),
        "a.py::quick": noted(1.0, 2),
        "b.py::short": noted(0.5, 2, 3),
        "c.py::other": noted(0.1, 4),
    }
    assert [*chosen(coverage, "s", [2], 60)] == ["b.py::short", "a.py::quick", "a.py::slow"]
    assert chosen(coverage, "s", [1, 3], 60) == {"b.py::short": 0.5, "a.py::slow": 5.0}
    assert next(iter(chosen(coverage, "s", [2], 60, ["a.py"]))) == "a.py::quick"
    assert [*chosen(coverage, "s", [2], 4)] == ["b.py::short", "a.py::quick"]
    assert chosen(coverage, "other", [2], 60) == {}

"""A module's source with one decision changed: each comparison, operand, call and so on in turn.

For Python that decides by itself; what builds statements has `tools.mutation.mutants`. Texts of
errors and of the log are left as they are, and so is what a constructor assigns.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .mutants import Mutant, replaced

__all__ = ["DECISIONS", "decisions"]

DECISIONS = (
    *("boundary", "negated", "operand", "not", "case", "constant"),
    *("sign", "factor", "extreme", "removed", "loop"),
)
"""All kinds."""

_BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, type[ast.operator]]] = {
    ast.Add: ("sign", ast.Sub),
    ast.Sub: ("sign", ast.Add),
    ast.Mult: ("factor", ast.Div),
    ast.Div: ("factor", ast.Mult),
}
_EXTREMES = {"min": "max", "max": "min"}
_LOGS = ("log", "_log")

_Node = ast.expr | ast.stmt | ast.pattern
_Change = tuple[str, str, _Node, str]
"""Kind, what, the node that is replaced, and the text that takes its place."""


def decisions(source: str, within: Sequence[str] = ()) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its lines.

    Args:
        source: The module's.
        within: The classes and functions to change, by their names; none for all.
    """
    found = []
    for name, function in _functions(ast.parse(source), ""):
        if within and not {name, name.partition(".")[0]} & {*within}:
            continue
        constructs = name.endswith("__init__")
        for node in _walked(function.body):
            for kind, what, old, text in _changes(node, constructs=constructs):
                lines = range(old.lineno, (old.end_lineno or 0) + 1)
                found.append(Mutant(lines[0], kind, what, name, replaced(source, old, text), lines))
    unique = {row.source: row for row in found}
    yield from sorted(unique.values(), key=lambda name: (name.line, name.kind, name.what))


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    """Yield the functions of a module and of its classes; those inside others belong to them."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Function):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{node.name}.")


def _walked(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yield nodes and what is in them, but for texts and types."""
    for node in nodes:
        if isinstance(node, (ast.JoinedStr, ast.arguments)) or _logs(node):
            continue
        yield node
        if isinstance(node, _Function):
            yield from _walked(node.body)
        elif isinstance(node, ast.AnnAssign):
            yield from _walked([node.value] if node.value else [])
        else:
            yield from _walked([*ast.iter_child_nodes(node)])


def _logs(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        node = node.value
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in _LOGS
    )


def _changes(node: ast.AST, *, constructs: bool) -> Iterator[_Change]:
    if (change := _BY_TYPE.get(type(node))) is not None:
        yield from change(node)
    if isinstance(node, ast.stmt) and _is_removable(node, constructs=constructs):
        yield "removed", ast.unparse(node), node, "pass"


def _is_removable(node: ast.stmt, *, constructs: bool) -> bool:
    """Whether a statement may be left out: of what it assigns a name to, everybody would know."""
    if isinstance(node, ast.Raise):  # an AssertionError says that nothing comes here
        return node.exc is None or "AssertionError" not in ast.unparse(node.exc)
    if constructs:
        return False
    if isinstance(node, ast.Expr):
        value = node.value.value if isinstance(node.value, ast.Await) else node.value
        return isinstance(value, ast.Call)
    if isinstance(node, ast.Assign):
        return not any(isinstance(item, ast.Name) for item in _targets(node))
    return isinstance(node, (ast.AugAssign, ast.Delete))


def _targets(node: ast.Assign) -> Iterator[ast.expr]:
    for target in node.targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def _compared(node: ast.Compare) -> Iterator[_Change]:
    for place, operator in enumerate(node.ops):
        if type(operator) in _BOUNDARIES:
            new = copy.deepcopy(node)
            new.ops[place] = _BOUNDARIES[type(operator)]()
            yield _expression("boundary", node, new)
    if len(node.ops) == 1:
        opposite = _OPPOSITES[type(node.ops[0])]()
        yield _expression("negated", node, ast.Compare(node.left, [opposite], node.comparators))
    for place, value in enumerate([node.left, *node.comparators]):
        if isinstance(value, ast.Constant) and type(value.value) in (int, float):
            new = copy.deepcopy(node)
            changed = [new.left, *new.comparators][place]
            assert isinstance(changed, ast.Constant)
            changed.value = value.value + 1
            yield _expression("constant", node, new)


def _operands(node: ast.BoolOp) -> Iterator[_Change]:
    for place, operand in enumerate(node.values):
        left = [value for n, value in enumerate(node.values) if n != place]
        new = left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
        word = "and" if isinstance(node.op, ast.And) else "or"
        what = f"{word}: {ast.unparse(operand)}"
        yield "operand", what, node, f"({ast.unparse(new)})"


def _inverted(node: ast.UnaryOp) -> Iterator[_Change]:
    if isinstance(node.op, ast.Not):
        yield _expression("not", node, node.operand)


def _calculated(node: ast.BinOp) -> Iterator[_Change]:
    if (found := _ARITHMETIC.get(type(node.op))) is not None:
        kind, operator = found
        yield _expression(kind, node, ast.BinOp(node.left, operator(), node.right))


def _returned(node: ast.Return) -> Iterator[_Change]:
    if isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool):
        yield "constant", ast.unparse(node), node, f"return {not node.value.value}"


def _called(node: ast.Call) -> Iterator[_Change]:
    if isinstance(node.func, ast.Name) and node.func.id in _EXTREMES:
        new = copy.deepcopy(node)
        new.func = ast.Name(_EXTREMES[node.func.id])
        yield _expression("extreme", node, new)
    if ast.unparse(node.func) == "zip":  # its strict says what is so anyway
        return
    for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, bool):
            what = f"{argument.value} in {ast.unparse(node)}"
            yield "constant", what, argument, str(not argument.value)


def _branches(node: ast.If | ast.While | ast.IfExp) -> Iterator[_Change]:
    yield from _tested(node.test)


def _filtered(node: ast.comprehension) -> Iterator[_Change]:
    for test in node.ifs:
        yield from _tested(test)


def _tested(test: ast.expr) -> Iterator[_Change]:
    """Negate what is tested, unless that is done by the operator or the operands of the test."""
    operated = isinstance(test, ast.Compare) and len(test.ops) == 1
    inverted = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    if not (operated or inverted or isinstance(test, (ast.Constant, ast.BoolOp))):
        yield _expression("negated", test, ast.UnaryOp(ast.Not(), test))


def _case(node: ast.match_case) -> Iterator[_Change]:
    pattern = ast.unparse(node.pattern)
    if node.guard is not None:
        yield "case", f"case {pattern} if {ast.unparse(node.guard)}", node.guard, "False"
    elif pattern != "_":
        yield "case", f"case {pattern}", node.pattern, f"{pattern} if False"


def _expression(kind: str, old: ast.expr, new: ast.expr) -> _Change:
    text = ast.unparse(ast.fix_missing_locations(new))
    return kind, f"{ast.unparse(old)} -> {text}", old, f"({text})"


_BY_TYPE: dict[type[ast.AST], Callable[[Any], Iterator[_Change]]] = {
    ast.Compare: _compared,
    ast.BoolOp: _operands,
    ast.UnaryOp: _inverted,
    ast.BinOp: _calculated,
    ast.Call: _called,
    ast.If: _branches,
    ast.While: _branches,
    ast.IfExp: _branches,
    ast.comprehension: _filtered,
    ast.match_case: _case,
    ast.Return: _returned,
    ast.Break: lambda node: iter([("loop", "break", node, "continue")]),
    ast.Continue: lambda node: iter([("loop", "continue", node, "break")]),
}

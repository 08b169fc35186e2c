"""A module's source with one thing taken out: each condition, assignment and lock in its turn.

It works on the syntax tree of the Python that builds the statements. What is taken out is named by
its kind, so that the score can be told for the fences alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["ESSENTIAL", "KINDS", "Mutant", "mutants", "replaced"]

ESSENTIAL = ("conjunct", "disjunct", "join", "set", "lock", "skip locked", "filter", "negation")
"""Kinds that decide which rows a statement changes, and how."""

KINDS = (*ESSENTIAL, "order", "limit", "alternative", "arithmetic", "boundary", "null test")
"""All kinds."""

_CONDITIONAL = ("_update", "move_to_archive")  # helpers that take conditions after their rows
_NO_CONDITION = ("held", "_held", "chosen")
_SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


@dataclass(frozen=True)
class Mutant:
    """A change of a module.

    Attributes:
        line: Where.
        kind: One of `KINDS`.
        what: What was taken out, or what became of it.
        function: The builder that it is in.
        source: The whole module, changed.
        lines: Those of the original that have what is changed.
    """

    line: int
    kind: str
    what: str
    function: str
    source: str
    lines: range


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.expr):
                for kind, what, new, at in _changes(node):
                    text = ast.unparse(ast.fix_missing_locations(new))
                    changed = replaced(source, node, f"({text})")
                    line = at.end_lineno or 0  # of a chain of calls, the end is the call's own
                    lines = range(at.lineno, line + 1)
                    found.append(Mutant(line, kind, what, function.name, changed, lines))
    unique = {row.source: row for row in found}  # a nested function is walked twice
    yield from sorted(unique.values(), key=lambda name: (name.line, name.what))


def replaced(source: str, node: Any, text: str) -> str:
    """Return the source with other text in the place of a node."""
    lines = source.encode().splitlines(keepends=True)
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    raw = source.encode()
    return (raw[:begin] + text.encode() + raw[end:]).decode()


_Change = tuple[str, str, ast.expr, ast.expr]
"""Kind, what, the node that takes the place of the old one, and the one that tells the line."""


def _changes(node: ast.expr) -> Iterator[_Change]:
    if isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield "arithmetic", f"{ast.unparse(node)} -> {ast.unparse(node.left)}", node.left, node
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        new = copy.deepcopy(node)
        new.ops = [_SWAPPED[type(node.ops[0])]()]
        yield "boundary", f"{ast.unparse(node)} -> {ast.unparse(new)}", new, node


def _call(node: ast.Call) -> Iterator[_Change]:
    name = _name(node.func)
    if name in _BY_NAME:
        yield from _BY_NAME[name](node)
    if name in _CONDITIONAL:
        for n, argument in enumerate(node.args):
            if n and not isinstance(argument, ast.Name) and not _makes_rows(argument):
                yield "conjunct", ast.unparse(argument), _without(node, n), argument


def _makes_rows(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Call) and _name(argument.func) in _NO_CONDITION


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _receiver(node: ast.Call) -> ast.expr:
    assert isinstance(node.func, ast.Attribute)
    return node.func.value


def _of_sqlalchemy(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and ast.unparse(_receiver(node)) in {"sa", "func"}


def _without(node: ast.Call, n: int) -> ast.Call:
    new = copy.deepcopy(node)
    del new.args[n]
    return new


def _where(node: ast.Call) -> Iterator[_Change]:
    for n, argument in enumerate(node.args):
        new = _receiver(node) if len(node.args) == 1 else _without(node, n)
        yield "conjunct", ast.unparse(argument), new, argument


def _joined(kind: str) -> Callable[[ast.Call], Iterator[_Change]]:
    def change(node: ast.Call) -> Iterator[_Change]:
        for n, argument in enumerate(node.args):
            rest = _without(node, n)
            new = rest.args[0] if len(rest.args) == 1 else rest
            yield kind, ast.unparse(argument), new, argument

    return change


def _join(node: ast.Call) -> Iterator[_Change]:
    on = 2 if _of_sqlalchemy(node) else 1
    if len(node.args) > on and ast.unparse(node.args[on]) != "sa.true()":
        new = copy.deepcopy(node)
        new.args[on] = ast.parse("sa.true()", mode="eval").body
        yield "join", ast.unparse(node.args[on]), new, node.args[on]


def _values(node: ast.Call) -> Iterator[_Change]:
    for n, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            new = copy.deepcopy(node)
            del new.keywords[n]
            yield "set", ast.unparse(keyword), new, keyword.value


def _lock(node: ast.Call) -> Iterator[_Change]:
    yield "lock", "FOR UPDATE", _receiver(node), node
    for n, keyword in enumerate(node.keywords):
        if keyword.arg == "skip_locked":
            new = copy.deepcopy(node)
            del new.keywords[n]
            yield "skip locked", "SKIP LOCKED", new, node


def _dropped(kind: str) -> Callable[[ast.Call], Iterator[_Change]]:
    def change(node: ast.Call) -> Iterator[_Change]:
        if isinstance(node.func, ast.Attribute) and not _of_sqlalchemy(node):
            yield kind, f"{kind} by {', '.join(map(ast.unparse, node.args))}", _receiver(node), node

    return change


def _negation(node: ast.Call) -> Iterator[_Change]:
    yield "negation", ast.unparse(node), node.args[0], node


def _alternative(node: ast.Call) -> Iterator[_Change]:
    for argument in node.args:
        yield "alternative", f"{ast.unparse(node)} -> {ast.unparse(argument)}", argument, node


def _null(node: ast.Call) -> Iterator[_Change]:
    if node.args and ast.unparse(node.args[0]) == "None":
        new = copy.deepcopy(node)
        assert isinstance(new.func, ast.Attribute)
        new.func.attr = {"is_": "is_not", "is_not": "is_"}[new.func.attr]
        yield "null test", ast.unparse(node), new, node


def _append(node: ast.Call) -> Iterator[_Change]:
    """A condition that is added to a list, if the caller wants it."""
    if len(node.args) == 1:
        yield "conjunct", ast.unparse(node.args[0]), ast.Constant(None), node


_BY_NAME: dict[str, Callable[[ast.Call], Iterator[_Change]]] = {
    "where": _where,
    "and_": _joined("conjunct"),
    "or_": _joined("disjunct"),
    "join": _join,
    "outerjoin": _join,
    "values": _values,
    "_update": _values,
    "with_for_update": _lock,
    "filter": _dropped("filter"),
    "order_by": _dropped("order"),
    "limit": _dropped("limit"),
    "not_": _negation,
    "coalesce": _alternative,
    "greatest": _alternative,
    "least": _alternative,
    "is_": _null,
    "is_not": _null,
    "append": _append,
}

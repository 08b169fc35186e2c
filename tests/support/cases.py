"""Run the rows of a table as the subtests of one test.

``each_case`` takes the arguments of ``pytest.mark.parametrize``. The difference: the fixtures are
set up once for all rows. So use it where a row leaves nothing behind that the next row could find,
or name a fixture that cleans up in ``before``. Each row still reports by itself, with its id or its
values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import pytest

__all__ = ["each_case"]

_PARAM = type(pytest.param())


class _Case(NamedTuple):
    label: str | None
    shown: dict[str, Any]  # instead of a label
    values: dict[str, Any]

    def combined(self, other: _Case) -> _Case:
        labels = [label for label in (self.label, other.label) if label is not None]
        return _Case("-".join(labels) or None, self.shown | other.shown, self.values | other.values)


def each_case(
    argnames: str | Sequence[str],
    rows: Mapping[str, Any] | Iterable[Any],
    ids: Iterable[str] | Callable[[Any], object] | None = None,
    *,
    before: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Call the test once for each row, as a subtest.

    A mapping gives each row an id. A single name in ``argnames`` takes the row as it is, several
    names take its elements. Stacked on another ``each_case`` it runs all combinations.
    ``before`` names a fixture, such as ``reset``: its value is called before each row.
    """
    separate = argnames.split(",") if isinstance(argnames, str) else argnames
    names = [name.strip() for name in separate]
    cases = list(_cases(names, rows, ids))
    assert cases, "a table without rows tests nothing"

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(test).parameters
        assert set(names) <= set(parameters), f"{test.__name__} does not take {names}"
        called, inner, first = getattr(test, "_each_case", (test, [_Case(None, {}, {})], None))
        combined = [case.combined(other) for case in cases for other in inner]
        added = [name for name in ("subtests", before or first) if name]
        run = wraps(test)(_runner(called, combined, before or first))
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
                for name in [*(name for name in parameters if name not in {*names, *added}), *added]
            ]
        )
        run._each_case = called, combined, before or first  # type: ignore[attr-defined]
        return run

    return decorate


def _runner(test: Callable[..., Any], cases: list[_Case], before: str | None) -> Callable[..., Any]:
    taken = inspect.signature(test).parameters

    def given(case: _Case, fixtures: dict[str, Any]) -> dict[str, Any]:
        return {name: fixtures[name] for name in fixtures if name in taken} | case.values

    def run(**fixtures: Any) -> None:
        for case in cases:
            with fixtures["subtests"].test(case.label, **case.shown):
                if before:
                    fixtures[before]()
                test(**given(case, fixtures))

    async def run_async(**fixtures: Any) -> None:
        for case in cases:
            with fixtures["subtests"].test(case.label, **case.shown):
                if before and inspect.isawaitable(done := fixtures[before]()):
                    await done
                await test(**given(case, fixtures))

    return run_async if inspect.iscoroutinefunction(test) else run


def _cases(
    names: list[str],
    rows: Mapping[str, Any] | Iterable[Any],
    ids: Iterable[str] | Callable[[Any], object] | None,
) -> Iterator[_Case]:
    if isinstance(rows, Mapping):
        rows, ids = list(rows.values()), list(rows)
    else:
        rows = list(rows)
    labels = [None] * len(rows) if ids is None or callable(ids) else list(ids)
    for row, given in zip(rows, labels, strict=True):
        values, label = row if len(names) > 1 else (row,), given
        if isinstance(row, _PARAM):
            assert not row.marks, "a subtest has no marks: give the row a test of its own"
            values, label = row.values, row.id or given
        if label is None and callable(ids):
            label = "-".join(str(ids(value)) for value in values)
        named = dict(zip(names, values, strict=True))
        yield _Case(label, named if label is None else {}, named)

"""Run the rows of a table as the subtests of one test.

``each_case`` takes the arguments of ``pytest.mark.parametrize``. The difference: the fixtures are
set up once for all rows, so use it where a row leaves nothing behind that the next row could
find. Each row still reports by itself, with its id or its values.
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
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Call the test once for each row, as a subtest.

    A mapping gives each row an id. A single name in ``argnames`` takes the row as it is, several
    names take its elements. Stacked on another ``each_case`` it runs all combinations.
    """
    separate = argnames.split(",") if isinstance(argnames, str) else argnames
    names = [name.strip() for name in separate]
    cases = list(_cases(names, rows, ids))
    assert cases, "a table without rows tests nothing"

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(test).parameters
        assert set(names) <= set(parameters), f"{test.__name__} does not take {names}"
        called, inner = getattr(test, "_each_case", (test, [_Case(None, {}, {})]))
        combined = [case.combined(other) for case in cases for other in inner]
        takes_subtests = "subtests" in inspect.signature(called).parameters

        def subtest(case: _Case, fixtures: dict[str, Any]) -> Any:
            subtests = fixtures["subtests"] if takes_subtests else fixtures.pop("subtests")
            return subtests.test(case.label, **case.shown)

        if inspect.iscoroutinefunction(called):

            @wraps(test)
            async def run(**fixtures: Any) -> None:
                for case in combined:
                    given = dict(fixtures)
                    with subtest(case, given):
                        await called(**given, **case.values)

        else:

            @wraps(test)
            def run(**fixtures: Any) -> None:
                for case in combined:
                    given = dict(fixtures)
                    with subtest(case, given):
                        called(**given, **case.values)

        kept = [name for name in parameters if name not in {*names, "subtests"}]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kept]
            + [inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)]
        )
        run._each_case = called, combined  # type: ignore[attr-defined]
        return run

    return decorate


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

"""Mutants that no test can find out, and why: what they take away is there a second time.

`tests/mutation/test_mutants.py` checks that each is still a mutant, and a run says when one that
is listed here was found out after all.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

REASONS: Mapping[tuple[str, str, str, str], str] = {
    ("statements/health", "_ids", "conjunct", "criterion"): (
        "The ids of the rows with attempts and of those without are put together again: without"
        " the criterion each half has all. It lets each use its own partial index."
    ),
    (
        "statements/health",
        "overview",
        "conjunct",
        "archived.c.outcome != sa.literal('archived', literal_execute=True)",
    ): (
        "What is 'dead' is not 'archived'. It is the predicate of the partial index, said word for"
        " word so that the planner may use that."
    ),
}
"""By module, function, kind and what was taken out."""

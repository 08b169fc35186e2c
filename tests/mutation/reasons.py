"""Mutants that no test can find out, and why: what they take away is there a second time.

`tests/mutation/test_mutants.py` checks that each is still a mutant, and a run says when one that
is listed here was found out after all.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

REASONS: Mapping[tuple[str, str, str, str], str] = {
    (
        "statements/settle",
        "held",
        "conjunct",
        "message.c.id == func.any(array_bind('ids', sa.BigInteger))",
    ): (
        "The join with the tokens says the same of the same ids. It is said twice for the planner,"
        " whose choice is right without it on all states of a table that tests/db/test_plans.py"
        " makes."
    ),
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

"""Mutants that no test can find out, and why: what they take away is there a second time.

`tests/mutation/test_mutants.py` checks that each is still a mutant, and a run says when one that
is listed here was found out after all.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

REASONS: Mapping[tuple[str, str, str, str], str] = {
    (
        "statements/counts",
        "not_done",
        "conjunct",
        """archived.c.outcome != sa.literal_column("'archived'", sa.Text)""",
    ): (
        "What has another outcome is not 'archived'. It is the predicate of the partial index, said"
        " word for word so that the planner may use that."
    ),
    ("statements/lease", "_levels", "order", "order by message.c.priority"): (
        "The index that has the levels has them in this order, and PostgreSQL reads it so without"
        " being told."
    ),
    (
        "statements/lease",
        "_lease",
        "boundary",
        "levels.c.level > _BEFORE_ALL -> levels.c.level >= _BEFORE_ALL",
    ): "No message can have the level at which the search for levels begins.",
    ("statements/lease", "_lease", "join", "any_level"): (
        "The same. It saves one look into the index for each dequeue."
    ),
    ("statements/parts", "among", "conjunct", "message.c.id == func.any(ids_of(rows))"): (
        "The join beside it says the same. It is there for the plan on tables whose statistics are"
        " wrong; PostgreSQL 18 does without it in every state that tests/db/test_plans.py has."
    ),
}
"""By module, function, kind and what was taken out."""

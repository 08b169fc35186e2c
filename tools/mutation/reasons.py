"""Mutants that no test can find out, and why: what they change makes no difference.

`tests/tooling/test_mutation.py` checks that each is still a mutant, and a run says when one that
is listed here was found out after all.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

_MOMENT = (
    "It is about two readings of a clock that are the same to the last digit: either answer is"
    " right then, and the next look, a moment later, gives the other."
)
_TYPES = "For the type checker: at this place it is never None."

REASONS: Mapping[tuple[str, str, str, str], str] = {
    (
        "consumer/dispatcher",
        "Dispatcher._ask_for_notifications",
        "boundary",
        (
            "self._scheduler.idle_for(now) < _IDLE_AFTER"
            " -> self._scheduler.idle_for(now) <= _IDLE_AFTER"
        ),
    ): _MOMENT,
    (
        "consumer/dispatcher",
        "Dispatcher._due",
        "boundary",
        "pending.not_before <= now -> pending.not_before < now",
    ): _MOMENT,
    ("consumer/renewer", "LeaseRenewer._end_overdue", "operand", "or: timedelta(0)"): (
        f"{_TYPES} Only a handler with a timeout is overdue."
    ),
    ("consumer/renewer", "Maintenance.mark_stopped", "operand", "or: 0"): (
        f"{_TYPES} Without a worker the loop has no rounds."
    ),
    (
        "consumer/connection",
        "ConsumerConnection._ready",
        "operand",
        "or: self._session.bind is not connection",
    ): (
        "After an error there is no session that could belong to another connection, and a line"
        " that was closed is not used again: each of the two would do alone."
    ),
    (
        "consumer/connection",
        "ConsumerConnection.abort_if_stuck",
        "boundary",
        "time.monotonic() - since > self._deadline -> time.monotonic() - since >= self._deadline",
    ): _MOMENT,
    (
        "consumer/results",
        "_problem",
        "case",
        "case None | bool() | int() | float() | str() | bytes() | Decision()",
    ): (
        "None of the cases below is about a plain value; it comes first so that the usual results"
        " are compared with none of them. A decision is told apart before this is asked."
    ),
    ("consumer/results", "_wrong", "operand", "or: type(value) in _ATOMS"): (
        "Nothing below is about a plain value, and it contains nothing. It comes first, as most"
        " values are plain."
    ),
    ("consumer/runtime", "Runtime.finished", "operand", "and: not self._running"): (
        "Who is told too often looks again, and goes on waiting: it is told for nothing."
    ),
    ("consumer/runtime", "Runtime.finished", "operand", "and: self._draining"): (
        "Nobody waits for that before it drains: it is told for nothing."
    ),
    (
        "consumer/leader",
        "LeaderFollower._lead_rounds",
        "boundary",
        (
            "time.monotonic() + rest < self._asleep_until -> time.monotonic() + rest <="
            " self._asleep_until"
        ),
    ): _MOMENT,
    (
        "consumer/leader",
        "LeaderFollower._sleep",
        "boundary",
        "now >= self._asleep_until -> now > self._asleep_until",
    ): _MOMENT,
    (
        "consumer/leader",
        "LeaderFollower._sleep",
        "boundary",
        ("(spare := (due_at - now)) > 0 -> (spare := (due_at - now)) >= 0"),
    ): _MOMENT,
    (
        "consumer/leader",
        "LeaderFollower.try_lead",
        "operand",
        "and: not self._has_tasks.is_set()",
    ): ("What is set can be set again: asking first only saves the lock of the event."),
    ("consumer/store", "_retry", "operand", "and: limit is not None"): (
        f"{_TYPES} A lease returns the limit of the message, of the consumer or of the queue."
    ),
    ("decisions", "Backoff.delay", "sign", "1 + spread -> 1 - spread"): (
        "The spread is drawn evenly from both sides of nothing, so that its sign says nothing."
    ),
    (
        "_core/sql/counts",
        "not_done",
        "conjunct",
        """archived.c.outcome != sa.literal_column("'archived'", sa.Text)""",
    ): (
        "What has another outcome is not 'archived'. It is the predicate of the partial index, said"
        " word for word so that the planner may use that."
    ),
    ("_core/sql/lease", "_levels", "order", "order by message.c.priority"): (
        "The index that has the levels has them in this order, and PostgreSQL reads it so without"
        " being told."
    ),
    (
        "_core/sql/lease",
        "_lease",
        "boundary",
        "levels.c.level > _BEFORE_ALL -> levels.c.level >= _BEFORE_ALL",
    ): "No message can have the level at which the search for levels begins.",
    ("_core/sql/lease", "_lease", "join", "any_level"): (
        "The same. It saves one look into the index for each dequeue."
    ),
    ("_core/sql/fragments", "in_rows", "conjunct", "in_list(message, rows)"): (
        "The join beside it says the same. It is there for the plan on tables whose statistics are"
        " wrong; PostgreSQL 18 does without it in every state that tests/db/test_plans.py has."
    ),
}
"""By module, function, kind and what was taken out."""

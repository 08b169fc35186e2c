"""One vocabulary for outcomes: its texts are public, and so is what is documented of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from pgqrs_sa import Outcome
from pgqrs_sa.cli.application import Counter
from pgqrs_sa.consumer.events import Event
from pgqrs_sa.types import ArchiveOutcome
from support.handlers import delivery

STATES = Path(__file__).parents[2] / "docs/reference/states.md"
ATTEMPTS = [outcome for outcome in Outcome if outcome is not Outcome.CANCELLED]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (Outcome.ARCHIVED, "archived"),
        (Outcome.DISCARDED, "discarded"),
        (Outcome.DEAD, "dead"),
        (Outcome.CANCELLED, "cancelled"),
        (Outcome.RETRIED, "retry"),
        (Outcome.RELEASED, "released"),
        (Outcome.LOST, "lease lost"),
    ],
)
def test_an_outcome_is_its_text(outcome, text):
    assert outcome == text == f"{outcome}"
    assert {text: 1}[outcome] == 1
    assert json.dumps({"outcome": outcome}) == json.dumps({"outcome": text})


def test_the_first_outcomes_are_those_of_the_archive():
    assert set(get_args(ArchiveOutcome)) == set([*Outcome][:4])


def test_every_outcome_is_documented_where_the_states_are():
    settled, attempts = STATES.read_text().split("## Outcomes of an attempt")
    in_tables = re.compile(r"^\| `([a-z ]+)` \|", re.MULTILINE)
    assert set(in_tables.findall(attempts)) == set(ATTEMPTS)
    _, settled = settled.split("## Outcomes of settled messages")
    assert set(in_tables.findall(settled)) == set(get_args(ArchiveOutcome))


def test_a_running_worker_counts_each_outcome_of_an_attempt():
    counter = Counter(lambda _worker: None)
    for number, outcome in enumerate(ATTEMPTS, 1):
        for _ in range(number):
            counter.on_success(Event(delivery(1), outcome, "handler", None))
    row = counter.row()
    assert list(row) == [
        "worker", "queues", "archived", "discarded", "retried", "released", "dead", "lost",
    ]  # fmt: skip
    assert list(row.values())[2:] == [1, 2, 4, 5, 3, 6]

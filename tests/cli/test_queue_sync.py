"""``pgqrs queue sync``: the queues that an application declares."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from support.cases import each_case

from .conftest import Pgqrs

DECLARED = """
import os
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from pgqrs_sa import Consumer, DeclaredQueue, declare_queues

MAIL = DeclaredQueue("mail", lease=60)
QUEUES = [MAIL, DeclaredQueue("posts")]
NOTHING = []

class Base(DeclarativeBase): ...
declare_queues(Base.metadata, *QUEUES)
metadata = Base.metadata

url = os.environ["PGQRS_DSN"].replace("postgresql:", "postgresql+psycopg:", 1)
consumer = Consumer(sessionmaker(sa.create_engine(url)), queues=QUEUES)
consumer.on("mail")(lambda payload: None)

def make():
    return QUEUES
"""


@pytest.fixture
def here(pgqrs: Pgqrs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pgqrs]:
    (pgqrs.folder / "declared_app.py").write_text(DECLARED)
    monkeypatch.syspath_prepend(str(pgqrs.folder))
    yield pgqrs
    sys.modules.pop("declared_app", None)


@pytest.mark.parametrize("name", ["QUEUES", "Base", "metadata", "consumer", "make"])
def test_declared_queues_are_created(here: Pgqrs, name: str) -> None:
    found = here.json("queue", "sync", f"declared_app:{name}")
    assert [(row["name"], row["status"]) for row in found] == [
        ("mail", "created"),
        ("posts", "created"),
    ]
    again = here.json("queue", "sync", f"declared_app:{name}")
    assert {row["status"] for row in again} == {"unchanged"}


def test_what_differs_is_changed_on_request_alone(here: Pgqrs) -> None:
    here("queue", "create", "mail", "--lease", "5")
    result = here("queue", "sync", "declared_app:MAIL")
    assert "lease_seconds is 5.0, declared 60.0" in result.stdout
    assert "--update changes them" in result.stderr
    assert here.json("queue", "get", "mail")["lease_seconds"] == 5
    (row,) = here.json("queue", "sync", "declared_app:MAIL", "--update", "--dry-run")
    assert (row["status"], row["dry_run"]) == ("differs", True)
    (row,) = here.json("queue", "sync", "declared_app:MAIL", "--update")
    assert row["status"] == "updated"
    assert here.json("queue", "get", "mail")["lease_seconds"] == 60


def test_a_dry_run_creates_nothing(here: Pgqrs) -> None:
    found = here.json("queue", "sync", "declared_app:QUEUES", "--dry-run")
    assert [row["status"] for row in found] == ["missing", "missing"]
    assert here.json("queue", "list") == []


def test_the_worker_check_says_what_differs(here: Pgqrs) -> None:
    here("queue", "create", "mail", "--lease", "5")
    done = here.process("worker", "check", "declared_app:consumer")
    assert done.returncode == 0, done.stderr
    assert "queue 'mail': lease_seconds is 5.0, declared 60.0" in done.stderr
    assert [row["name"] for row in here.json("queue", "list")] == ["mail"]


@each_case(
    ("target", "problem"),
    [
        ("declared_app", "names no declared queues"),
        ("declared_app:NOTHING", "declares no queue"),
        ("declared_app:url", "is a string, and declares no queue"),
        ("declared_app:QUEUE", "has no 'QUEUE'"),
        ("declared_ap:QUEUES", "there is no module 'declared_ap'"),
    ],
)
def test_a_target_without_queues_is_refused(here: Pgqrs, target: str, problem: str) -> None:
    assert problem in here("queue", "sync", target, code=2).stderr

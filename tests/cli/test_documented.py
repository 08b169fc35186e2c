"""Every command of docs/reference/cli.md runs, and gives the keys that stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import pytest

from pgqrs_sa.cli import group
from support.cases import each_case

from .conftest import bury

DOCS = Path(__file__).parents[2] / "docs/reference/cli.md"
ROW = re.compile(
    r"^\| `(?P<command>[^`]+)` \| (?P<gives>one|list) \| (?P<keys>.+) \|$", re.MULTILINE
)
OTHERS = {"doctor", "top", "schema", "demo", "completion"}
"""Documented elsewhere, or printing no data."""

RUN = {
    "queue create": ["queue", "create", "new"],
    "queue update": ["queue", "update", "mail", "--lease", "2m"],
    "queue metrics": ["queue", "metrics"],
    "queue metrics NAME": ["queue", "metrics", "mail"],
    "queue purge": ["queue", "purge", "mail", "--yes"],
    "queue delete": ["queue", "delete", "mail", "--force", "--yes"],
    "message enqueue": ["message", "enqueue", "mail", "--payload", "1", "--delay", "1h30m"],
    "message get": ["message", "get", "{ready}"],
    "message archive": ["message", "archive", "{leased}", "--token", "{token}"],
    "message delete": ["message", "delete", "{ready}", "--yes"],
    "message cancel": ["message", "cancel", "{ready}"],
    "message reschedule": ["message", "reschedule", "{ready}", "--delay", "7d"],
    "worker run": ["worker", "run", "documented_jobs:consumer", "--until-empty"],
    "queue sync": ["queue", "sync", "documented_jobs:QUEUES"],
    "worker check": ["worker", "check", "documented_jobs:consumer"],
    "worker create": ["worker", "create", "w", "--queue", "mail", "--host", "h", "--port", "1"],
    "worker list": ["worker", "list"],
    "worker health": ["worker", "health"],
    "worker stats": ["worker", "stats", "mail"],
    "worker health --group-by-queue": ["worker", "health", "--group-by-queue"],
    "worker purge": ["worker", "purge", "--older-than", "0", "--yes"],
    "worker delete": ["worker", "delete", "{stopped}", "--yes"],
    "archive get": ["archive", "get", "{dead}"],
    "archive requeue": ["archive", "requeue", "{dead}"],
    "archive delete": ["archive", "delete", "mail", "--older-than", "0", "--yes"],
    "archive prune": ["archive", "prune", "--older-than", "0", "--yes"],
    "dead list": ["dead", "list"],
    "dead retry": ["dead", "retry", "{dead}"],
    "dead retry --all": ["dead", "retry", "--all", "--yes"],
    "dead discard": ["dead", "discard", "{dead}", "--yes"],
    "uninstall": ["uninstall", "--yes"],
    "admin uninstall": ["admin", "uninstall", "--yes"],
}
"""The arguments where a command needs more than the name of a queue, or the id of a worker."""


def documented() -> dict[str, tuple[str, list[str]]]:
    found = {
        item["command"]: (item["gives"], item["keys"]) for item in ROW.finditer(DOCS.read_text())
    }

    def keys(text: str) -> list[str]:
        if text.startswith("as "):
            return keys(found[text.removeprefix("as ").strip("`")][1])
        return re.findall("`([^`]+)`", text)

    return {command: (gives, keys(text)) for command, (gives, text) in found.items()}


def commands(of: click.Group, before: tuple[str, ...] = ()) -> list[str]:
    context = click.Context(of)
    found = []
    for name in of.list_commands(context):
        if not before and name in OTHERS:
            continue
        command = of.get_command(context, name)
        path = (*before, name)
        found += commands(command, path) if isinstance(command, click.Group) else [" ".join(path)]
    return found


JOBS = """
import os
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from pgqrs_sa import Consumer, DeclaredQueue

QUEUES = [DeclaredQueue("mail")]

url = os.environ["PGQRS_DSN"].replace("postgresql:", "postgresql+psycopg:", 1)
consumer = Consumer(sessionmaker(sa.create_engine(url)))
consumer.on("mail")(lambda payload: None)
"""


def test_every_command_is_documented():
    described = {re.sub(" (--|NAME).*", "", command) for command in documented()}
    assert described == set(commands(group))


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """An application with a consumer."""
    (tmp_path / "documented_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("documented_jobs", None)


@pytest.fixture
def world(work, jobs) -> dict[str, int]:
    """A queue with something of everything, and the ids of it."""
    with work() as service:
        service.queues.create("mail", lease=60)
        worker = service.workers.register("w1", queues=["mail"])
        stopped = service.workers.register("w2", queues=["mail"])
        service.workers.stop(stopped.id)
    dead = bury(work, "mail", {"n": "dead"})
    with work() as service:
        leased = service.enqueue("mail", {"n": "leased"})
        (held,) = service.dequeue("mail", worker=worker)
        service.enqueue("mail", {"n": "scheduled"}, delay=60)
        ready = service.enqueue("mail", {"n": "ready"})
    return {
        "worker": worker.id,
        "stopped": stopped.id,
        "leased": leased.id,
        "token": held.fencing_token,
        "ready": ready.id,
        "dead": dead,
    }


@pytest.mark.parametrize("command", [c for c in documented() if "install" not in c])
def test_the_keys_are_those_of_the_documentation(pgqrs, world, command):
    gives, keys = documented()[command]
    words = command.split()
    argument = {"worker": "{worker}"}.get(words[0], "mail")
    if words[0] == "admin" or words[-1] in ("verify", "list"):
        argument = ""
    args = RUN.get(command, [*words, *([argument] if argument else [])])

    result = pgqrs.json(*(arg.format(**world) if arg.startswith("{") else arg for arg in args))

    rows = result if gives == "list" else [result]
    assert isinstance(result, list if gives == "list" else dict)
    assert rows
    assert all(list(row) == keys for row in rows)


@pytest.mark.parametrize("command", ["install", "uninstall", "admin install", "admin uninstall"])
def test_the_keys_of_installing_are_those_of_the_documentation(bare, command):
    bare("install")
    assert list(bare.json(*RUN.get(command, command.split()))) == documented()[command][1]


@each_case(
    ("old", "new"),
    [
        ("queue get --queue mail", "queue get mail"),
        ("message get --id 2", "message get 2"),
        ("message count --queue mail", "message count mail"),
        ("message list -q mail", "message list mail"),
        ("worker get --id 1", "worker get 1"),
        ("worker messages --id 1", "worker messages 1"),
        ("worker stats --queue mail", "worker stats mail"),
        ("worker health --queue mail --max-age 60", "worker health --timeout 1m"),
        ("archive count --queue mail", "archive count mail"),
    ],
)
def test_both_spellings_say_the_same(pgqrs, world, old, new):
    first, second = pgqrs.json(*old.split()), pgqrs.json(*new.split())
    moving = ("visible_in_seconds", "silent_for_seconds")
    for rows in (first, second):
        for row in rows if isinstance(rows, list) else [rows]:
            for key in moving:
                row.pop(key, None)
    assert first == second


def test_two_spellings_that_contradict_each_other_are_refused(pgqrs):
    assert "given twice" in pgqrs("queue", "get", "a", "--queue", "b", code=2).stderr


def test_the_old_names_of_worker_commands_work(pgqrs, world):
    assert pgqrs.json("worker", "release-messages", world["worker"])["count"] == 1
    assert pgqrs.json("worker", "shutdown", "--id", world["worker"])["status"] == "stopped"


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("queue list", ""),
        ("queue metrics", ""),
        ("queue archive-dlq", ""),
        ("queue messages", "mail"),
        ("message dequeue", "mail"),
        ("message list", ""),
        ("worker list", ""),
        ("worker health", ""),
        ("worker health --group-by-queue", ""),
        ("archive list", ""),
        ("dead list", ""),
    ],
)
def test_csv_without_rows_has_the_documented_header(pgqrs, command, args):
    if args:
        pgqrs("queue", "create", args)
    shown = pgqrs(*command.split(), *args.split(), "--format", "csv").stdout
    assert shown == ",".join(documented()[command][1]) + "\n"


def test_csv_without_findings_has_the_documented_header(pgqrs):
    shown = pgqrs("doctor", "--only", "orphans", "--format", "csv").stdout
    assert shown == "check,severity,subject,problem,fix,mend\n"

"""Documentation is code: every Python block of a document runs, in its order."""

from __future__ import annotations

import inspect
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import (
    DeadLetter,
    Discard,
    Hooks,
    Message,
    Outcome,
    QueueService,
    RetryIn,
    Snooze,
)
from pgqrs_sa._core.scope import Context
from pgqrs_sa.consumer.base import BaseConsumer
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.dsns import servers
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.settings import database_url
from pgqrs_sa.types import MessageState
from support import programs

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^```python(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


README, TUTORIAL = "README.md", "docs/tutorial/first-queue.md"
ENQUEUE, SETTLE = "docs/how-to/enqueue.md", "docs/how-to/settle.md"
MANAGE, OWN_MODELS = "docs/how-to/manage-messages.md", "docs/how-to/own-models.md"
ASYNCIO, MIGRATIONS = "docs/how-to/asyncio.md", "docs/how-to/migrations.md"
CONSUMERS, TESTING = "docs/reference/consumers.md", "docs/how-to/testing.md"
AVAILABILITY = "docs/how-to/high-availability.md"
DOCUMENTS = [
    README,
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if path.parent.name != "guide"
    ),
]
"""All pages that are written here: ``docs/guide`` is a copy."""

EXECUTED_HERE = {
    README, TUTORIAL, ENQUEUE, SETTLE, MANAGE, OWN_MODELS, ASYNCIO, MIGRATIONS, CONSUMERS, TESTING,
    AVAILABILITY,
}  # fmt: skip
EXECUTED_ELSEWHERE = {
    "docs/how-to/pgbouncer.md": "tests/chaos/test_pgbouncer.py",
    "docs/how-to/pgqrs-to-own-session.md": "tests/guide/test_pgqrs_surface.py",
    "docs/how-to/row-level-security.md": "tests/security/test_row_level_security.py",
}


def test_every_document_with_python_blocks_is_executed_by_a_test() -> None:
    written = {page for page in DOCUMENTS if "```python" in (ROOT / page).read_text()}
    assert written == EXECUTED_HERE | set(EXECUTED_ELSEWHERE)
    for page, test in EXECUTED_ELSEWHERE.items():
        assert page in (ROOT / test).read_text()


def blocks(title: str | None, document: str = README) -> list[tuple[int, str]]:
    """The blocks of a document that have this title, with the line on which each begins."""
    text = (ROOT / document).read_text()
    found = [
        (text.count("\n", 0, m.start("code")), m["code"])
        for m in FENCE.finditer(text)
        if m["title"] == title
    ]
    assert found, f"{document} has no block titled {title!r}"
    return found


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import shop_models

    return shop_models


def execute(code: str, line: int, names: dict, document: str = README) -> None:
    # Padded, so that a traceback names the line of the document.
    path = str(ROOT / document)
    exec(compile("\n" * line + code, path, "exec", dont_inherit=True), names)  # noqa: S102


def execute_all(names: dict, document: str) -> None:
    for line, code in blocks(None, document):
        execute(code, line, names, document)


async def execute_awaiting(names: dict, document: str) -> None:
    """Run the blocks titled ``asyncio`` one after the other, in the running loop."""
    for line, code in blocks("asyncio", document):
        execute(f"async def main():\n{textwrap.indent(code, '    ')}", line - 1, names, document)
        await names["main"]()


def test_the_blocks_of_the_readme_run_one_after_the_other(engine: sa.Engine, shop) -> None:
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("receipts")
    names = {"engine": engine, "Order": shop.Order}
    by_hand, with_a_consumer = blocks(None)
    for line, code in (by_hand, with_a_consumer):
        execute(code, line, names)
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue("receipts", {"order": 7})  # for the next block
    with Session(engine) as session:
        metrics = QueueService(session).messages.metrics("receipts")
        assert session.get_one(shop.Order, 7).receipts_sent == 2
        assert (metrics.archived, metrics.live) == (2, 1)


def test_the_blocks_of_the_how_to_pages_run_in_their_order(engine: sa.Engine, shop) -> None:
    with Session(engine) as session, session.begin():
        session.add(shop.Order(id=7, customer="Ada", total_cents=1200))
    with Session(engine) as session:
        names = {"engine": engine, "Order": shop.Order, "session": session}
        for page in (ENQUEUE, SETTLE, MANAGE, OWN_MODELS):
            execute_all(names, page)
    with Session(engine) as session:
        metrics = QueueService(session).messages.metrics("mail")
        assert (metrics.archived, metrics.cancelled) == (1, 2)


def test_the_blocks_of_the_tutorial_run_one_after_the_other(database, capsys) -> None:
    names: dict = {}
    for line, code in blocks(None, TUTORIAL):
        here = code.replace("postgresql+psycopg://localhost/shop", database.url)
        execute(here, line, names, TUTORIAL)
    order = names["Order"]
    with Session(names["engine"]) as session:
        metrics = QueueService(session).messages.metrics("receipts")
        assert (metrics.archived, metrics.live) == (3, 0)
        assert [session.get_one(order, id_).receipts_sent for id_ in (7, 9, 10)] == [1, 1, 1]
        assert session.get(order, 8) is None
    names["engine"].dispose()
    assert "{'order': 10} no such order" in capsys.readouterr().out


async def test_the_asyncio_block_runs(migrated, shop) -> None:
    engine = create_async_engine(migrated.async_url("asyncpg"))
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("INSERT INTO pgqrs_queues (queue_name) VALUES ('receipts')")
        )
    await execute_awaiting({"async_engine": engine, "Order": shop.Order}, ASYNCIO)
    async with engine.connect() as connection:
        assert (await connection.execute(sa.select(Message.payload))).scalar_one() == {"order": 8}
    await engine.dispose()


def test_the_documented_environment_autogenerates_migrates_and_is_clean(
    database, tmp_path: Path
) -> None:
    ((_, env),) = blocks("env.py", MIGRATIONS)
    scripts = tmp_path / "migrations"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(env)
    (scripts / "script.py.mako").write_text((ROOT / "alembic" / "script.py.mako").read_text())
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "models.py").write_text((ROOT / "examples" / "shop_models.py").read_text())
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\nscript_location = %(here)s/migrations\nprepend_sys_path = %(here)s\n"
        f"path_separator = os\nsqlalchemy.url = {database.url.replace('%', '%%')}\n"
    )

    def alembic(*arguments: str) -> None:
        done = programs.run("-m", "alembic", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    alembic("revision", "--autogenerate", "-m", "add the queue")
    (revision,) = (scripts / "versions").glob("*.py")
    assert "op.pgqrs_upgrade(from_version=0, to_version=1)" in revision.read_text()
    alembic("upgrade", "head")
    alembic("check")
    alembic("downgrade", "base")


def test_the_tests_of_the_guide_to_testing_pass_and_leave_nothing_behind(
    migrated, engine: sa.Engine, tmp_path: Path
) -> None:
    (tmp_path / "models.py").write_text((ROOT / "examples" / "shop_models.py").read_text())
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = .\nfilterwarnings = error\nasyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )
    titles = {m["title"] for m in FENCE.finditer((ROOT / TESTING).read_text())}
    assert titles == {"conftest.py", "shop.py", "test_shop.py", "test_asyncio.py"}
    for title in titles:
        code = "\n\n".join(code for _, code in blocks(title, TESTING))
        (tmp_path / title).write_text(code)
    # A checkout may have been installed before the plugin's entry point was there.
    installed = "pgqrs_sa" in entry_points(group="pytest11").names
    plugin = [] if installed else ["-p", "pgqrs_sa.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *plugin]
    environment = {**os.environ, "TEST_DATABASE_URL": migrated.url}

    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )

    assert done.returncode == 0, done.stdout
    written = "".join(code for title in titles for _, code in blocks(title, TESTING))
    assert f"{written.count('def test_') + 1} passed" in done.stdout  # one has two parameters
    with Session(engine) as session:
        assert QueueService(session).queues.list() == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_only_files_and_headings_that_exist(document: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text())
    for link in [link for link in links if "://" not in link]:
        name, _, anchor = link.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PARTS = ["docs/architecture.md", "docs/glossary.md"]


@pytest.mark.parametrize("document", PARTS)
def test_the_modules_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`([a-z_/0-9]+(?:\.py|/))`", text))
    assert len(named) > 15
    missing = {name for name in named if not (ROOT / "pgqrs_sa" / name).exists()}
    assert missing - {"pgqrs_sa/"} == set()


def test_the_diagram_of_states_is_the_same_on_both_pages() -> None:
    diagram = re.compile(r"^```mermaid\nstateDiagram.*?^```$", re.MULTILINE | re.DOTALL)
    pages = ["docs/architecture.md", "docs/reference/states.md"]
    diagrams = [diagram.findall((ROOT / page).read_text()) for page in pages]
    assert diagrams[0] == diagrams[1]
    assert len(diagrams[0]) == 1


def test_every_outcome_has_a_row_and_every_hook_in_it_exists() -> None:
    text = (ROOT / "docs/reference/states.md").read_text()
    rows = set(re.findall(r"^\| `([a-z ]+)` \|", text, re.MULTILINE))
    assert rows == {*Outcome, *get_args(MessageState)}
    assert set(re.findall(r"`(on_\w+)`", text)) <= set(vars(Hooks))


# Consumers

MESSAGES = {
    "receipts": [{"order": 7}],
    "welcomes": [{"to": "ada@example.org"}, {"two": "bob"}],
    "mail": [{"to": "nobody", "text": "x"}, {"to": "eve", "text": "x"}],
    "posts": ["spam", "hello"],
    "reports": [{"chapters": 2}],
    "rows": [{"id": 1, "customer": "ada"}, {"oops": 1}, {"id": 2, "customer": "bob"}],
    "metrics": [{"visits": 0}],
    "exports": [{}],
    "payments": [],  # the document enqueues one
    "totals": [[1, 2, 3], ["x"]],
    "reports.daily": ["2026-11-28"],
    "reports.hourly": [{}],
}
"""What the handlers of docs/reference/consumers.md get."""


@pytest.fixture
def quiet() -> Iterator[None]:
    """Forget the handlers of logging that a document installs."""
    logger = logging.getLogger("pgqrs_sa")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture
def worked_on(engine: sa.Engine, shop) -> None:
    """An order, and a queue with messages for each handler of the document."""
    with Session(engine) as session, session.begin():
        session.add(shop.Order(id=7, customer="Ada", total_cents=1200))
        service = QueueService(session)
        for queue, messages in MESSAGES.items():
            service.queues.create(queue)
            service.enqueue_many(queue, messages)


def test_the_blocks_about_consumers_run_one_after_the_other(
    engine: sa.Engine, shop, worked_on, quiet, capsys
) -> None:
    names = {"engine": engine, "Order": shop.Order}
    execute_all(names, CONSUMERS)
    names["engine"].dispose()
    with Session(engine) as session:
        service = QueueService(session)
        assert session.get_one(shop.Order, 7).receipts_sent == 1
        books = {
            metrics.queue: (metrics.archived, metrics.live)
            for metrics in service.messages.all_metrics()
        }
        ends = {message.payload["to"]: message.reason for message in service.archived.find("mail")}
        (spam,) = service.messages.find("posts")
        customers = session.scalars(sa.select(shop.Order.customer)).all()
    assert books == {
        "receipts": (1, 0),
        "welcomes": (1, 1),  # one does not fit, and waits for its next attempt
        "mail": (1, 1),
        "posts": (0, 1),
        "reports": (1, 0),
        "rows": (2, 0),
        "metrics": (2, 0),
        "exports": (1, 0),
        "payments": (1, 0),
        "totals": (1, 1),  # one does not fit
        "reports.daily": (1, 1),
        "reports.hourly": (1, 1),
    }
    assert ends == {
        "nobody": "no such address",
        "eve": None,
        "ada@example.org": "we are on holiday",
    }
    assert (spam.payload, spam.state) == ("spam", "scheduled")
    assert sorted(customers) == ["Ada", "ada", "bob"]
    assert "at most once: it is archived already {'visits': 1}" in capsys.readouterr().out
    assert names["metrics"].seconds


def test_the_flask_block_about_consumers_runs(migrated, engine, shop, worked_on) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = migrated.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 10}
    names = {"app": app, "db": SQLAlchemy(app), "Order": shop.Order, "Session": Session}
    for line, code in blocks("flask", CONSUMERS):
        execute(code, line, names, CONSUMERS)
    names["consumer"].dispose()
    with Session(engine) as session:
        assert session.get_one(shop.Order, 7).receipts_sent == 1
        assert QueueService(session).messages.metrics("receipts").archived == 1


async def test_the_asyncio_block_about_consumers_runs(migrated, engine, shop, worked_on) -> None:
    async_engine = create_async_engine(migrated.async_url("psycopg"))
    await execute_awaiting({"async_engine": async_engine, "Order": shop.Order}, CONSUMERS)
    await async_engine.dispose()
    with Session(engine) as session:
        assert session.get_one(shop.Order, 7).receipts_sent == 1
        assert QueueService(session).messages.metrics("receipts").archived == 1


def test_every_hook_and_decision_is_documented() -> None:
    text = (ROOT / CONSUMERS).read_text()
    hooks = [name for name in vars(Hooks) if name.startswith("on_")]
    decisions = [RetryIn, Snooze, Discard, DeadLetter]
    assert len(hooks) == text.count("| `on_")
    assert not [name for name in hooks if f"| `{name}` |" not in text]
    assert not [decision for decision in decisions if f"| `{decision.__name__}(" not in text]


@pytest.mark.parametrize("function", [BaseConsumer.__init__, BaseConsumer.on])
def test_every_option_of_a_consumer_has_a_row_in_a_table(function) -> None:
    lines = (ROOT / CONSUMERS).read_text().splitlines()
    first_cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    documented = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    options = {
        p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY
    }
    assert options - documented == set()


# High availability


@pytest.fixture
def at_hand(migrated) -> Callable[[str], str]:
    """Return a function that puts a missing server for db1 in a block, and the test's for db2."""
    server, name = migrated.server, migrated.name
    user = quote(server.user) + (f":{quote(server.password)}" if server.password else "")
    nowhere, there = f"/nowhere:{server.port}", f"{server.host}:{server.port}"
    in_query = f"{user}@/{name}?host={nowhere}&host={there}"
    in_front = f"{user}@{quote(nowhere, safe=':')},{quote(there, safe=':')}/{name}"

    def put(code: str) -> str:
        code = code.replace("app@/shop?host=db1:5432&host=db2:5432", in_query)
        code = code.replace("app@db1:5432,db2:5432/shop", in_front)
        assert "db1" not in code
        return code

    return put


def test_the_blocks_about_high_availability_run(migrated, engine, shop, at_hand) -> None:
    with Session(engine) as session, session.begin():
        session.add(shop.Order(id=6, customer="Bob", total_cents=900))
        service = QueueService(session)
        service.queues.create("receipts")
        service.enqueue("receipts", {"order": 6})
    names = {"Order": shop.Order}
    for line, code in blocks(None, AVAILABILITY):
        execute(at_hand(code), line, names, AVAILABILITY)
    names["place"](7)  # as after a COMMIT whose reply was lost
    names["engine"].dispose()
    assert names["url"].query["host"].startswith("/nowhere,")
    with Session(engine) as session:
        assert session.get_one(shop.Order, 6).receipts_sent == 1
        found = QueueService(session).messages.find("receipts")
        assert [message.payload for message in found] == [{"order": 7}]


async def test_the_asyncio_block_about_high_availability_runs(at_hand) -> None:
    ((line, code),) = blocks("asyncio", AVAILABILITY)
    names: dict = {}
    execute(at_hand(code), line, names, AVAILABILITY)
    async with names["async_engine"].connect() as connection:
        assert await connection.scalar(sa.text("SELECT 1")) == 1
    await names["async_engine"].dispose()


def other(title: str, language: str, document: str = AVAILABILITY) -> str:
    """The block of another language with this title."""
    fence = rf'^```{language} title="{title}"\n(.*?)^```$'
    (text,) = re.findall(fence, (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return text


def test_the_fillfactor_of_the_documentation_is_accepted(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(other("fillfactor", "sql", MIGRATIONS)))
    context = Context.of(READY_MADE, None, None, allow_autocommit=False)
    with Session(engine) as session:
        assert diagnose(session, context) == []


def test_the_dsns_about_high_availability_name_the_same_servers() -> None:
    text = other("dsn", "text")
    urls = {database_url(line) for line in text.splitlines()}
    assert len(urls) == 1
    assert servers(*urls) == [("db1", "5432"), ("db2", "5432")]


def test_the_sql_about_high_availability_moves_the_sequences(engine: sa.Engine) -> None:
    sql = other("sequences", "sql")
    with Session(engine) as session, session.begin():
        session.execute(sa.text(sql))
        service = QueueService(session)
        service.queues.create("mail")
        service.enqueue("mail", 1)
        (delivery,) = service.dequeue("mail")
    assert min(delivery.id, delivery.fencing_token) > 1_000_000

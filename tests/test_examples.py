"""The programs in ``examples/`` do what they say, on a real database."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import psycopg
import pytest
import sqlalchemy as sa
import yaml
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy.orm import Session

from pgqrs_sa import Message, QueueNotFound, QueueService, SchemaVersionError
from pgqrs_sa.consumer import runtime, tasks
from support import programs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

Load = Callable[[str, str], ModuleType]


@pytest.fixture
def load(monkeypatch) -> Load:
    """Import an example from its file, as if for the first time, for the database given."""

    def load_one(name: str, dsn: str) -> ModuleType:
        monkeypatch.setenv("PGQRS_DSN", dsn)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, "shop_models", raising=False)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_one


def environment(dsn: str) -> dict[str, str]:
    return os.environ | {
        "PGQRS_DSN": dsn,
        "FLASK_APP": "examples/flask_app.py",
        "PYTHONPATH": str(EXAMPLES),
    }


def run(dsn: str, *arguments: str) -> str:
    """Run Python as a user does, in a new interpreter, with every warning an error."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(dsn), capture_output=True, text=True, check=False
    )
    return output_of(done)


def run_again(dsn: str, *arguments: str) -> str:
    """Do the same without the time that the imports take."""
    return output_of(programs.run("-W", "error", *arguments, cwd=ROOT, env=environment(dsn)))


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def migrated(emptied):
    """One database for all tests of this file, emptied before each."""
    with psycopg.connect(emptied.dsn) as connection:
        connection.execute("DROP FUNCTION IF EXISTS refuse() CASCADE")
        connection.execute("TRUNCATE shop_orders RESTART IDENTITY")
    return emptied


# FastAPI


@pytest.fixture(params=["postgresql+psycopg", "postgresql+asyncpg"])
def dsn(request, migrated) -> str:
    return migrated.dsn.replace("postgresql", request.param, 1)


@pytest.fixture
async def shop(load, dsn) -> AsyncIterator[httpx.AsyncClient]:
    """The shop, started."""
    app = load("fastapi_app", dsn).app
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            yield client


ORDER = {"customer": "ada", "total_cents": 4200, "receipt_delay": 60}


def shop_orders(session: Session) -> list[Any]:
    rows = session.execute(sa.text("SELECT id, customer, total_cents, receipt_id FROM shop_orders"))
    return list(rows)


@pytest.mark.parametrize(
    "dsn", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg"], indirect=True
)
async def test_fastapi_commits_an_order_and_its_receipt_together(shop, session):
    answer = await shop.post("/orders", json=ORDER)
    assert answer.status_code == 201
    body = answer.json()
    assert body["duplicate"] is False
    assert shop_orders(session) == [(body["order"], "ada", 4200, body["message"])]
    message = QueueService(session).messages.get(body["message"])
    assert (message.queue, message.payload) == ("receipts", {"to": "ada"})
    assert message.state == "scheduled"
    assert 59 < (message.vt - message.enqueued_at).total_seconds() <= 60


async def test_fastapi_answers_a_repeated_key_with_the_order_of_the_first_request(shop, session):
    headers = {"Idempotency-Key": "basket-1"}
    first = await shop.post("/orders", json=ORDER, headers=headers)
    second = await shop.post("/orders", json=ORDER | {"customer": "bob"}, headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json() == first.json() | {"duplicate": True}
    assert [order.customer for order in shop_orders(session)] == ["ada"]
    assert QueueService(session).messages.metrics("receipts").live == 1


async def test_fastapi_writes_one_order_for_two_requests_at_once_with_one_key(shop, session):
    post = lambda: shop.post("/orders", json=ORDER, headers={"Idempotency-Key": "basket-1"})  # noqa: E731
    answers = await asyncio.gather(post(), post())
    assert sorted(answer.status_code for answer in answers) == [200, 201]
    assert len({answer.json()["order"] for answer in answers}) == 1
    assert len(shop_orders(session)) == 1


async def test_fastapi_takes_requests_without_a_key_as_different_ones(shop, session):
    answers = [await shop.post("/orders", json=ORDER) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert len(shop_orders(session)) == 2


async def test_fastapi_frees_a_key_when_the_receipt_has_been_sent(shop, session):
    headers = {"Idempotency-Key": "basket-1"}
    await shop.post("/orders", json=ORDER | {"receipt_delay": 0}, headers=headers)
    service = QueueService(session)
    service.archive_many(service.dequeue("receipts"))
    session.commit()
    again = await shop.post("/orders", json=ORDER, headers=headers)
    assert again.status_code == 201
    assert len(shop_orders(session)) == 2


async def test_fastapi_leaves_neither_order_nor_message_when_the_endpoint_raises(shop, session):
    declined = await shop.post("/orders/charged", json=ORDER | {"total_cents": 100_001})
    assert declined.status_code == 402
    assert shop_orders(session) == []
    assert session.scalar(sa.select(sa.func.count()).select_from(Message)) == 0
    # Ids were drawn: the rows had been there until the exception.
    accepted = await shop.post("/orders/charged", json=ORDER | {"total_cents": 100_000})
    assert accepted.status_code == 201
    assert (accepted.json()["order"], accepted.json()["message"]) == (2, 2)


async def test_fastapi_does_not_answer_201_when_the_commit_fails(shop, session):
    session.execute(
        sa.text(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RAISE EXCEPTION ''refused at commit''; END'"
        )
    )
    session.execute(
        sa.text(
            "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON shop_orders DEFERRABLE "
            "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    )
    session.commit()
    answer = await shop.post("/orders", json=ORDER)
    assert answer.status_code == 500
    assert QueueService(session).messages.metrics("receipts").live == 0


async def test_fastapi_answers_404_with_the_names_that_come_close(shop):
    answer = await shop.get("/queues/receipt")
    assert answer.status_code == 404
    assert answer.json()["did_you_mean"] == ["receipts"]
    assert "did you mean 'receipts'?" in answer.json()["detail"]


async def test_fastapi_shows_the_metrics_of_a_queue(shop):
    await shop.post("/orders", json=ORDER)
    await shop.post("/orders", json=ORDER | {"receipt_delay": 0})
    answer = await shop.get("/queues/receipts")
    assert answer.status_code == 200
    metrics = answer.json()
    assert (metrics["queue"], metrics["ready"], metrics["scheduled"]) == ("receipts", 1, 1)
    assert metrics["oldest_ready_age"].startswith("PT")


async def test_fastapi_explains_a_value_that_the_queue_refuses(shop, session):
    late = await shop.post("/orders", json=ORDER | {"receipt_delay": -1})
    long = await shop.post("/orders", json=ORDER, headers={"Idempotency-Key": "x" * 256})
    odd = await shop.get("/queues/no%20queue")
    assert [late.status_code, long.status_code, odd.status_code] == [422, 422, 422]
    assert "delay" in late.json()["detail"]
    assert "no queue name" in odd.json()["detail"]
    assert shop_orders(session) == []


async def test_fastapi_does_not_start_without_the_tables(load, database):
    app = load("fastapi_app", database.dsn).app
    with pytest.raises(SchemaVersionError, match="alembic upgrade head"):
        async with app.router.lifespan_context(app):
            pass


# FastAPI's consumer


async def test_the_outbox_sends_each_receipt_once_and_notes_it(load, shop, dsn, session, capsys):
    keyed = {"Idempotency-Key": "basket-1"}
    for headers in (keyed, keyed, {}):
        order = ORDER | {"customer": "ada@example.org", "receipt_delay": 0}
        await shop.post("/orders", json=order, headers=headers)
    consumer = load("fastapi_consumer", dsn).consumer
    assert await consumer.run(until_empty=True) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "receipt-1 goes to ada@example.org",
        "receipt-3 goes to ada@example.org",
    ]
    rows = session.execute(sa.text("SELECT receipts_sent, receipt_id FROM shop_orders")).all()
    assert rows == [(1, None), (1, None)]
    metrics = QueueService(session).messages.metrics("receipts")
    assert (metrics.archived, metrics.live) == (2, 0)
    await consumer.dispose()


async def test_the_outbox_gives_up_on_an_address_that_is_none(load, shop, dsn, session):
    order = ORDER | {"customer": "eve@nowhere.invalid", "receipt_delay": 0}
    await shop.post("/orders", json=order)
    consumer = load("fastapi_consumer", dsn).consumer
    assert await consumer.run(until_empty=True) == 0
    (dead,) = QueueService(session).archived.find("receipts", outcome="dead")
    assert (dead.reason, dead.read_ct) == ("no such address", 1)
    assert session.scalar(sa.text("SELECT receipts_sent FROM shop_orders")) == 0
    await consumer.dispose()


def test_the_outbox_runs_as_its_docstring_says(migrated, session, tmp_path, monkeypatch):
    QueueService(session).queues.create("receipts")
    QueueService(session).enqueue("receipts", {"to": "ada@example.org"})
    session.commit()
    monkeypatch.setenv("ALIVE_FILE", str(tmp_path / "alive"))
    worker = ("-m", "pgqrs_sa", "worker")
    given = environment(migrated.dsn)
    target = "fastapi_consumer:consumer"
    checked = programs.run("-W", "error", *worker, "check", target, cwd=ROOT, env=given)
    assert checked.returncode == 0, checked.stderr
    done = subprocess.run(
        [sys.executable, "-W", "error", *worker, "run", target, "--until-empty"],
        env=given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "receipt-1 goes to ada@example.org\n"
    assert (tmp_path / "alive").read_text() == "1\n"


# The asynchronous consumer


def test_the_crawler_fetches_indexes_and_sorts_out(migrated, session):
    for run_it in (run, run_again):
        lines = run_it(migrated.dsn, "examples/async_consumer.py").splitlines()
        assert sorted(lines[:4]) == ["fetched /", "fetched /a", "fetched /a/1", "fetched /b"]
        assert lines[4:8] == [
            "indexed /: 2 link(s)",
            "indexed /a: 2 link(s)",
            "indexed /a/1: 0 link(s)",
            "indexed /b: 0 link(s)",
        ]
        assert sorted(lines[8:]) == [
            "dead {'oops': True}: not a page: ['oops']",
            "discarded {'url': '/a/gone'}: there is no such page",
        ]
        service = QueueService(session)
        assert [metrics.live for metrics in service.messages.all_metrics()] == [0, 0]
        attempts = [
            message.read_ct
            for message in service.archived.find("pages", outcome="archived")
            if message.payload == {"url": "/b"}
        ]
        assert attempts == [2]
        session.execute(sa.text("DELETE FROM pgqrs_archive"))
        session.commit()


# The parent that forks


def test_each_forked_process_works_on_connections_of_its_own(migrated, session):
    # The parent's connection is left alone in a child: not used, and not closed either.
    assert run(migrated.dsn, "-W", "ignore::ResourceWarning", "examples/preforked.py") == (
        "20 orders have exactly one receipt\nthe children ended with [0, 0]\n"
    )
    workers = QueueService(session).workers.list()
    assert len({worker.pid for worker in workers}) == len(workers) == 2
    assert [worker.status for worker in workers] == ["stopped", "stopped"]
    assert QueueService(session).messages.metrics("receipts").archived == 20


def test_gunicorn_finds_its_settings_and_waits_for_the_consumer(load, migrated):
    config = load("preforked", migrated.dsn)
    assert config.preload_app
    assert config.graceful_timeout > stopping(config.consumer)
    config.engine.dispose()


# Deployment

LAST_WORDS = 4 * runtime.SETTLE_TIMEOUT + tasks._CANCELLED
"""Seconds that a consumer may need after its drain_timeout, if its connections hang."""


def stopping(consumer: Any) -> float:
    return consumer._config.drain_timeout + LAST_WORDS


def test_the_systemd_unit_waits_for_the_consumer_that_it_runs(load, migrated):
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(EXAMPLES / "deploy" / "shop-worker.service")
    service = unit["Service"]
    assert int(service["TimeoutStopSec"]) > stopping(
        load("fastapi_consumer", migrated.dsn).consumer
    )
    assert service["KillSignal"] == "SIGTERM"
    for key, command in (("ExecStart", "run"), ("ExecStartPre", "check")):
        assert f"pgqrs worker {command} fastapi_consumer:consumer" in service[key]


def test_the_kubernetes_fragment_waits_for_the_consumer_that_it_runs(load, migrated):
    text = (EXAMPLES / "deploy" / "kubernetes.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    consumer = load("fastapi_consumer", migrated.dsn).consumer
    assert pod["terminationGracePeriodSeconds"] > stopping(consumer)
    (worker,), (check,) = pod["containers"], pod["initContainers"]
    assert worker["command"][:4] == ["pgqrs", "worker", "run", "fastapi_consumer:consumer"]
    assert check["command"] == ["pgqrs", "worker", "check", "fastapi_consumer:consumer"]
    assert "lifecycle" not in worker
    # The liveness looks at the file that the consumer writes, less often than it is written.
    (alive,) = [item["value"] for item in worker["env"] if item["name"] == "ALIVE_FILE"]
    assert alive in worker["livenessProbe"]["exec"]["command"][-1]
    assert worker["livenessProbe"]["periodSeconds"] > 2 * consumer._config.heartbeat


# Flask


@pytest.fixture
def flask_shop(load, database) -> Iterator[SimpleNamespace]:
    """The module, its application and clients, on a database that ``flask init-db`` made."""
    module = load("flask_app", database.dsn)
    app = module.create_app()
    app.testing = True

    def command(*arguments: str) -> Any:
        done = app.test_cli_runner().invoke(args=arguments)
        assert done.exit_code == 0, done.output
        return done

    command("init-db")
    yield SimpleNamespace(module=module, app=app, http=app.test_client(), command=command)
    with app.app_context():
        module.db.engine.dispose()


@pytest.fixture
def outside(database) -> Iterator[Session]:
    """A session on the same database that is not the application's."""
    engine = sa.create_engine(database.url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def sent(session: Session) -> dict[str, bool]:
    rows = session.execute(sa.text("SELECT customer, receipt_sent_at IS NOT NULL FROM orders"))
    return dict(iter(rows))


def test_flask_commits_an_order_and_its_message_together(flask_shop, outside):
    answer = flask_shop.http.post("/orders", json=ORDER)
    assert answer.status_code == 201
    assert sent(outside) == {"ada": False}
    message = QueueService(outside).messages.get(answer.json["message"])
    assert (message.payload, message.state) == ({"order": answer.json["order"]}, "scheduled")


def test_flask_takes_the_order_back_when_the_queue_refuses_its_message(flask_shop, outside):
    answer = flask_shop.http.post("/orders", json=ORDER | {"receipt_delay": -1})
    assert answer.status_code == 422
    assert "delay" in answer.json["error"]
    assert sent(outside) == {}
    # The order had been flushed before that: its id is used up.
    assert flask_shop.http.post("/orders", json=ORDER).json == {"order": 2, "message": 1}


def test_flask_works_with_tables_that_have_a_version(flask_shop, outside):
    QueueService(outside).check_schema()


def test_flask_work_sends_what_is_due_and_archives_it_with_the_orders(flask_shop, outside):
    for customer, delay in [("ada", 0), ("bob", 0), ("cyd", 60)]:
        order = {"customer": customer, "total_cents": 1, "receipt_delay": delay}
        flask_shop.http.post("/orders", json=order)
    lines = flask_shop.command("work").stdout.splitlines()
    assert lines == ["receipt for order 1 goes to ada", "receipt for order 2 goes to bob"]
    assert sent(outside) == {"ada": True, "bob": True, "cyd": False}
    metrics = QueueService(outside).messages.metrics("receipts")
    assert (metrics.archived, metrics.scheduled, metrics.live) == (2, 1, 1)


def test_flask_work_goes_on_after_a_message_that_fails(flask_shop, outside):
    bad = QueueService(outside).enqueue("receipts", {"order": 99}, priority=-1)
    outside.commit()
    flask_shop.http.post("/orders", json=ORDER | {"receipt_delay": 0})
    done = flask_shop.command("work")
    assert "goes to ada" in done.stdout
    assert f"message {bad.id}: No row was found" in done.stderr
    assert sent(outside) == {"ada": True}
    message = QueueService(outside).messages.get(bad.id)
    assert (message.state, message.read_ct) == ("scheduled", 1)
    assert message.last_error is not None
    assert message.last_error.startswith("NoResultFound")


def test_flask_work_rolls_the_handler_back_when_its_lease_was_lost(flask_shop, outside):
    flask_shop.http.post("/orders", json=ORDER | {"receipt_delay": 0})
    service = QueueService(outside)
    (slow,) = service.dequeue("receipts", lease=0.01)
    outside.commit()
    time.sleep(0.05)
    (holder,) = service.dequeue("receipts", lease=60)
    outside.commit()
    with flask_shop.app.app_context():
        flask_shop.module.settle(slow)
    assert sent(outside) == {"ada": False}
    message = service.messages.get(slow.id)
    assert (message.state, message.read_ct, message.last_error) == ("leased", 2, None)
    service.archive(holder)


def test_flask_commands_run_as_the_docstring_says(database, outside):
    run(database.dsn, "-m", "flask", "init-db")
    run_again(database.dsn, "-m", "flask", "init-db")
    outside.execute(sa.text("INSERT INTO orders (customer, total_cents) VALUES ('ada', 1)"))
    QueueService(outside).enqueue("receipts", {"order": 1})
    outside.commit()
    assert run_again(database.dsn, "-m", "flask", "work") == "receipt for order 1 goes to ada\n"
    assert sent(outside) == {"ada": True}


# The script


def test_the_script_tells_the_same_story_each_time(migrated, session):
    story = """\
enqueued 5 reminders of 6: one key was there already
cancelled 1 for cyd
rescheduled dan's: it is due now instead of in an hour
  bob: water the plants
  ada: pay the rent
dead without 'text'
  dan: buy milk
  fay: slow down
  fay: slow down
too late: lease lost: message {fay} is archived (attempt 2). Roll back: nothing was settled
dead: {{'to': 'eve'}}, attempt 1 of 1 failed: KeyError: 'text'
pruned 3
pruned 2
pruned 0
left: 1 scheduled, 0 other
"""
    # Those with a key come last, and 6 would have been the duplicate.
    for run_it, eve, fay in ((run, 4, 7), (run_again, 11, 14)):
        assert run_it(migrated.dsn, "examples/plain_script.py") == story.format(fay=fay)
        service = QueueService(session)
        (left,) = service.messages.find("reminders")
        assert (left.id, left.payload, left.state) == (eve, {"to": "eve"}, "scheduled")
        assert (left.read_ct, left.max_read_ct) == (1, 3)
        assert service.archived.find("reminders") == []
        session.rollback()


def test_the_scripts_producer_leaves_what_it_says(load, migrated, engine, session):
    load("plain_script", migrated.dsn).produce(engine)
    service = QueueService(session)
    ready = service.messages.find("reminders", state="ready")
    assert [message.payload["to"] for message in ready] == ["ada", "dan", "eve", "bob"]
    assert service.messages.metrics("reminders").live == 4
    (cancelled,) = service.archived.find("reminders", outcome="cancelled")
    assert (cancelled.payload["to"], cancelled.reason) == ("cyd", "moved out")


def test_the_scripts_consumer_archives_and_buries(load, migrated, engine, session):
    script = load("plain_script", migrated.dsn)
    script.produce(engine)
    script.consume(engine)
    archived = QueueService(session).archived
    done = archived.find("reminders", outcome="archived")
    assert sorted(message.payload["to"] for message in done) == ["ada", "bob", "dan"]
    (dead,) = archived.find("reminders", outcome="dead")
    assert (dead.payload, dead.last_error) == ({"to": "eve"}, "KeyError: 'text'")


# The host's own classes


@pytest.fixture
def own(load, database) -> ModuleType:
    return load("own_models", database.dsn)


@pytest.fixture
def own_session(own, database) -> Iterator[Session]:
    engine = sa.create_engine(database.url)
    own.create_tables(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_own_models_run_as_a_script_in_their_schema(database, outside):
    assert run(database.dsn, "examples/own_models.py") == (
        "states: ('ready', 2) ('scheduled', 1)\n"
        "due: ada cyd\n"
        "later: bob scheduled\n"
        "tenant 7: the invoice for ada goes out\n"
        "states: ('ready', 1) ('scheduled', 1)\n"
        "due: cyd\n"
        "later: bob scheduled\n"
    )
    live = sa.text(
        "SELECT tenant_id, customer FROM jobs.pgqrs_messages AS m JOIN invoices AS i "
        "ON i.message_id = m.id ORDER BY customer"
    )
    assert outside.execute(live).all() == [(7, "bob"), (8, "cyd")]
    settled = sa.text("SELECT payload->>'customer', outcome FROM jobs.pgqrs_archive")
    assert outside.execute(settled).all() == [("ada", "archived")]
    let_go = sa.text("SELECT customer FROM invoices WHERE message_id IS NULL")
    assert outside.execute(let_go).all() == [("ada",)]
    assert sa.inspect(outside.connection()).get_table_names("public") == ["invoices"]


def test_own_models_refer_to_messages_with_the_type_of_their_ids(own, own_session):
    inspector = sa.inspect(own_session.connection())
    columns = {column["name"]: column["type"] for column in inspector.get_columns("invoices")}
    assert isinstance(columns["message_id"], sa.BigInteger)
    (key,) = inspector.get_foreign_keys("invoices")
    assert (key["referred_schema"], key["referred_table"]) == ("jobs", "pgqrs_messages")


def test_own_models_relate_both_ways(own, own_session):
    own.enqueue(own_session)
    invoice = own_session.scalars(sa.select(own.Invoice).filter_by(customer="ada")).one()
    assert invoice.message.tenant_id == 7
    assert invoice.message.invoice is invoice


def test_own_models_lease_for_one_tenant_only(own, own_session):
    own.enqueue(own_session)
    own.work(own_session, tenant=8)
    left = sa.select(own.Message.tenant_id, own.Message.state).order_by(own.Message.id)
    assert own_session.execute(left).all() == [(7, "ready"), (7, "scheduled")]


def test_own_models_take_invoice_and_message_back_together(own, own_session):
    own.enqueue(own_session)
    message = own.Message(queue_name="invoice", payload={}, tenant_id=7)
    own_session.add(own.Invoice(customer="dan", message=message))
    with pytest.raises(QueueNotFound) as caught:
        own_session.commit()
    own_session.rollback()
    assert caught.value.suggestions == ("invoices",)
    assert own_session.scalar(sa.select(sa.func.count()).select_from(own.Invoice)) == 3


def written(engine: sa.Engine, own: ModuleType) -> str:
    """What ``alembic revision --autogenerate`` would write."""
    options = {
        "include_schemas": True,
        "target_metadata": own.Base.metadata,
        "autogenerate_plugins": ["alembic.autogenerate.*", "pgqrs_sa"],
    }
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        upgrade = produce_migrations(context, own.Base.metadata).upgrade_ops
        assert upgrade is not None
        return render_python_code(upgrade)


def test_own_models_are_what_alembic_would_make(own, database):
    engine = sa.create_engine(database.url)
    fresh = written(engine, own)
    assert "op.pgqrs_upgrade(from_version=0, to_version=1, schema='jobs')" in fresh
    assert "op.add_column('pgqrs_messages', sa.Column('tenant_id'" in fresh
    assert "op.create_table('invoices'" in fresh
    own.create_tables(engine)
    assert "op." not in written(engine, own)
    engine.dispose()

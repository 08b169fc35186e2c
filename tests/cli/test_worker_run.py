"""``pgqrs worker run`` and ``pgqrs worker check``, with an application's consumer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from pgqrs_sa import Worker
from support import programs
from support.cases import each_case
from support.waiting import PATIENCE

from .conftest import Pgqrs

APPLICATION = """
import os, time
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker, Session
from pgqrs_sa import Consumer, DeadLetter, Delivery, Discard, Retry, Snooze

engine = sa.create_engine(os.environ["PGQRS_DSN"].replace("postgresql:", "postgresql+psycopg:", 1),
                          pool_size=int(os.environ.get("POOL", "9")), max_overflow=0)
consumer = Consumer(sessionmaker(engine), concurrency=4, drain_timeout=120, poll_interval=0.05,
                    housekeeping=float(os.environ.get("HOUSEKEEPING", "60")))
class nested:
    inner = consumer

@consumer.on("mail", timeout=60, retry=Retry(max_attempts=3, base=0))
def send(payload, session: Session, delivery: Delivery):
    os.write(1, f"got {payload}\\n".encode())  # whole lines, from several threads
    if payload == "wait":
        end = time.monotonic() + 120
        while not os.path.exists("go") and time.monotonic() < end:
            time.sleep(0.01)
    if payload == "until it stops":
        while not consumer._run.runtime.stopping:
            time.sleep(0.01)
        time.sleep(0.5)
    if payload == "fail":
        raise RuntimeError("it failed")
    return {"discard": Discard(), "dead": DeadLetter("so"), "snooze": Snooze(60)}.get(payload)

@consumer.on("posts", lease=90, concurrency=2, batch=5, acknowledge="manual")
def post(payloads: list[str]):
    pass

def make():
    return consumer

async def make_later():
    return consumer

def broken():
    raise RuntimeError("no such tenant")

number = 7
"""

ASYNCHRONOUS = """
import os
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from pgqrs_sa import AsyncConsumer

url = os.environ["PGQRS_DSN"].replace("postgresql:", f"postgresql+{os.environ['DRIVER']}:", 1)
consumer = AsyncConsumer(async_sessionmaker(create_async_engine(url)), concurrency=4)

@consumer.on("mail")
async def send(payload, session: AsyncSession):
    print("got", payload, flush=True)
"""


@pytest.fixture
def application(pgqrs, work) -> Path:
    """An application in the current folder, and its queues."""
    (pgqrs.folder / "shop").mkdir()
    (pgqrs.folder / "shop" / "__init__.py").touch()
    (pgqrs.folder / "shop" / "jobs.py").write_text(APPLICATION)
    (pgqrs.folder / "shop" / "tasks.py").write_text(ASYNCHRONOUS)
    (pgqrs.folder / "shop" / "wrong.py").write_text(
        "import shop.jobs\nimport nowhere_to_be_found\n"
    )
    (pgqrs.folder / "shop" / "raising.py").write_text("1 / 0\n")
    with work() as service:
        service.queues.create("mail", lease=45)
        service.queues.create("posts")
    return pgqrs.folder


@pytest.fixture
def here(pgqrs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pgqrs]:
    """The command line in this process, which forgets the application afterwards."""
    monkeypatch.syspath_prepend(str(pgqrs.folder))
    yield pgqrs
    for name in [module for module in sys.modules if module.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.fixture
def enqueue(work):
    def put(*payloads: object) -> None:
        with work() as service:
            service.enqueue_many("mail", payloads)

    return put


def running(pgqrs: Pgqrs, *args: str, **env: str) -> programs.Program:
    """A worker as a process of its own, which is not left behind."""
    environment = pgqrs.environment | env
    command = ("-m", "pgqrs_sa", "worker", "run", *args)
    return programs.start(*command, env=environment, cwd=pgqrs.folder)


# -------------------------------------------------------------------------------- running


@pytest.mark.parametrize(
    ("target", "driver"),
    [
        ("shop.jobs:consumer", ""),
        ("shop.jobs:nested.inner", ""),
        ("shop.jobs:make", ""),
        ("shop.tasks:consumer", "psycopg"),
        ("shop.tasks:consumer", "asyncpg"),
    ],
)
def test_until_empty_works_off_a_queue_and_ends(
    pgqrs, application, enqueue, counts, target, driver
):
    enqueue(1, 2, 3)
    done = pgqrs.process("worker", "run", target, "--until-empty", env={"DRIVER": driver})
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["got 1", "got 2", "got 3"])
    first, last = done.stderr.splitlines()
    assert first.startswith("worker 1 works on mail")
    assert first.endswith("4 at a time")
    assert last == "worker 1 has ended: 3 archived"
    assert (counts("mail").archived, counts("mail").live) == (3, 0)


def test_a_synchronous_consumer_needs_no_greenlet(pgqrs, application, enqueue, counts):
    enqueue("a")
    program = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from pgqrs_sa.cli import main\n"
        "sys.exit(main(['worker', 'check', 'shop.jobs:consumer'])"
        " or main(['worker', 'run', '--until-empty', 'shop.jobs:consumer']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=pgqrs.environment,
        cwd=pgqrs.folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert counts("mail").archived == 1


def test_the_end_says_what_became_of_the_messages(pgqrs, application, enqueue):
    enqueue(1, "fail", "discard", "dead", "snooze")
    done = pgqrs.process(
        "worker", "run", "shop.jobs:consumer", "--until-empty", "--format", "json", "-q", "mail"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :]) == {
        "worker": 1,
        "queues": ["mail"],
        "archived": 1,
        "discarded": 1,
        "retried": 2,
        "released": 1,
        "dead": 2,
        "lost": 0,
    }
    log = done.stderr  # without the payload
    assert "message 2 of mail: attempt 1 of 3 failed: RuntimeError in " in log


def test_only_the_queues_that_are_asked_for_are_worked_on(pgqrs, application, work, counts):
    with work() as service:
        service.enqueue("mail", 1)
        service.enqueue("posts", "x")
    done = pgqrs.process("worker", "run", "shop.jobs:consumer", "--until-empty", "--queues", "mail")
    assert "works on mail, 4 at a time" in done.stderr
    assert (counts("mail").live, counts("posts").ready) == (0, 1)
    wrong = pgqrs.process("worker", "run", "shop.jobs:consumer", "--queues", "mail,male")
    assert wrong.returncode == 2
    assert "no handler is for the queue 'male'; there are: 'mail', 'posts'" in wrong.stderr


def test_sigterm_lets_the_handler_finish_and_ends_with_0(pgqrs, application, enqueue, counts):
    enqueue("until it stops", *range(20))
    with running(pgqrs, "shop.jobs:consumer", "--concurrency", "1") as worker:
        assert worker.stdout.readline() == "got until it stops\n"
        worker.send_signal(signal.SIGTERM)
        # Nothing more is leased from here on, although 20 messages wait.
        out, said = worker.communicate(timeout=PATIENCE)
    assert (worker.returncode, out) == (0, "")
    assert said.splitlines()[-1] == "worker 1 has ended: 1 archived"
    assert (counts("mail").archived, counts("mail").ready, counts("mail").leased) == (1, 20, 0)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_handler_that_is_given_up_leaves_no_lease_and_ends_with_1(
    pgqrs, application, enqueue, counts, work, signals
):
    enqueue("wait")
    # One signal and a short time to drain, or two and a long one.
    timeout = "100ms" if signals == 1 else "1h"
    with running(pgqrs, "shop.jobs:consumer", "--drain-timeout", timeout) as worker:
        assert worker.stdout.readline() == "got wait\n"
        worker.send_signal(signal.SIGINT)
        if signals == 2:
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.5)
            worker.send_signal(signal.SIGTERM)  # another one: two of a kind may arrive as one
        _, said = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 1
    assert said.splitlines()[-1] == "worker 1 has ended: 1 released"
    with work() as service:
        (message,) = service.messages.find("mail")
        assert (message.state, message.max_read_ct - message.read_ct) == ("ready", 3)
        assert service.workers.get(1).status == "stopped"


@pytest.fixture
def role(pgqrs, engine) -> Iterator[str]:
    """The address of the database for a role that has the rights of a consumer, and no others."""
    name = f"pgqrs_consumer_{os.getpid()}"
    granted = pgqrs("schema", "grants", "--role", "consumer", "--to", name).stdout
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name}")
        connection.exec_driver_sql(granted)
    yield f"{pgqrs.dsn}{'&' if '?' in pgqrs.dsn else '?'}options=-crole%3D{name}"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}")
        connection.exec_driver_sql(f"DROP ROLE {name}")


def test_the_printed_grants_are_enough_for_working_and_taking_back(
    pgqrs, application, work, counts, engine, role
):
    with work() as service:
        dead = service.workers.register("silent", queues=["mail"])
        service.enqueue_many("mail", ["held", "wait"])
        service.dequeue("mail", worker=dead, lease=3600)
        service.enqueue("posts", "x")
        silent = sa.update(Worker).values(heartbeat_at=sa.func.now() - sa.text("interval '1 day'"))
        service.session.execute(silent)
    env = {"PGQRS_DSN": role, "HOUSEKEEPING": "0.2"}
    with running(pgqrs, "shop.jobs:consumer", "--until-empty", "-v", **env) as worker:
        lines = {worker.stdout.readline(), worker.stdout.readline()}
        (application / "go").touch()
        _, said = worker.communicate(timeout=PATIENCE)
    assert (worker.returncode, lines) == (0, {"got held\n", "got wait\n"})
    assert counts("mail").archived == 2
    assert "tidying up was not possible: ProgrammingError" in said  # pruning is not a consumer's
    with work() as service:
        assert service.workers.get(dead.id).status == "stopped"


def test_concurrency_of_the_command_line_counts_for_handlers_without_their_own(here, application):
    rows = here.json("worker", "check", "shop.jobs:consumer", "--concurrency", 7, POOL="20")
    assert [row["concurrency"] for row in rows] == [7, 2]


def test_what_a_handler_logs_is_shown_at_the_level_asked_for(pgqrs, application, enqueue):
    with (application / "shop" / "jobs.py").open("a") as file:
        file.write("import logging\nconsumer.on('posts')  # nothing yet\n")
        file.write("logging.getLogger('shop').info('imported')\n")
        file.write("@consumer.on('third')\ndef third(payload): logging.getLogger('shop').info('x')")
    pgqrs("queue", "create", "third")
    pgqrs("message", "enqueue", "third", "--payload", "1")
    args = ("worker", "run", "shop.jobs:consumer", "--until-empty")
    quiet = pgqrs.process(*args)
    assert len(quiet.stderr.splitlines()) == 2
    pgqrs("message", "enqueue", "third", "--payload", "1")
    assert "INFO shop: x" in pgqrs.process(*args, "--log-level", "info").stderr
    pgqrs("message", "enqueue", "third", "--payload", "1")
    kept = pgqrs.process(*args, "--log-level", "info", "--log-dest", "log")
    assert "INFO shop: x" in (application / "log").read_text()
    assert "INFO" not in kept.stderr


def test_an_application_that_has_set_up_logging_gets_each_line_once(pgqrs, application, enqueue):
    with (application / "shop" / "jobs.py").open("a") as file:
        file.write("import logging\nlogging.basicConfig(format='mine %(message)s')\n")
    enqueue("fail")
    done = pgqrs.process("worker", "run", "shop.jobs:consumer", "--until-empty")
    lines = [line for line in done.stderr.splitlines() if "RuntimeError" in line]
    assert [line.partition(": RuntimeError")[0] for line in lines] == [
        "mine message 1 of mail: attempt 1 of 3 failed",
        "mine message 1 of mail: attempt 2 of 3 failed",
        "mine message 1 of mail: attempt 3 of 3 failed, and was the last",
    ]


# ------------------------------------------------------------------------------- checking


def test_check_shows_the_handlers(here, application):
    assert here.json("worker", "check", "shop.jobs:consumer") == [
        {
            "queue": "mail",
            "handler": "send",
            "lease_seconds": 45.0,
            "concurrency": 4,
            "batch": 1,
            "timeout_seconds": 60.0,
            "acknowledge": "commit",
        },
        {
            "queue": "posts",
            "handler": "post",
            "lease_seconds": 90.0,
            "concurrency": 2,
            "batch": 5,
            "timeout_seconds": None,
            "acknowledge": "manual",
        },
    ]
    shown = here("worker", "check", "shop.tasks:consumer", DRIVER="asyncpg")
    assert shown.stdout.splitlines()[1].split() == [
        "mail",
        "send",
        "45s",
        "4",
        "1",
        "none",
        "commit",
    ]
    assert shown.stderr == "shop.tasks:consumer can work on 1 queue(s)\n"


def test_check_registers_and_leases_nothing(pgqrs, application, enqueue, counts):
    enqueue(1)
    pgqrs.process("worker", "check", "shop.jobs:consumer")
    assert pgqrs.json("worker", "list") == []
    assert counts("mail").ready == 1


def test_check_says_what_is_wrong_and_ends_with_1(pgqrs, application, database):
    def said(*args: str, code: int = 1, **env: str) -> list[str]:
        done = pgqrs.process("worker", "check", "shop.jobs:consumer", *args, env=env)
        assert (done.returncode, done.stdout) == (code, "")
        return done.stderr.splitlines()

    error, hint = said(POOL="5")
    assert "gives at most 5 connection(s)" in error
    assert "needs 6" in error
    assert hint == "hint: raise pool_size, or lower concurrency"
    error, hint = said(PGQRS_DSN=database.dsn)
    assert "holds no known version of the queue tables" in error
    assert "pgqrs install" in hint
    error, hint = said(PGQRS_DSN="postgresql://127.0.0.1:1/x", code=4)
    assert error.startswith("error: cannot connect: ")
    assert "engine connects to" in hint
    pgqrs("queue", "delete", "mail", "--yes")
    error, hint = said()
    assert (error, hint) == ("error: there is no queue 'mail'", "hint: pgqrs queue create mail")
    read_only = pgqrs.dsn + ("&" if "?" in pgqrs.dsn else "?")
    error, hint = said(PGQRS_DSN=f"{read_only}options=-cdefault_transaction_read_only=on")
    assert (error, hint) == (
        "error: the database is set to read only",
        "hint: connect the consumer to the primary server",
    )


def test_run_refuses_what_check_refuses(pgqrs, application):
    done = pgqrs.process("worker", "run", "shop.jobs:consumer", env={"POOL": "5"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs 6" in done.stderr
    nowhere = {"PGQRS_DSN": "postgresql://127.0.0.1:1/x", "DRIVER": "asyncpg"}
    assert pgqrs.process("worker", "run", "shop.tasks:consumer", env=nowhere).returncode == 4
    pgqrs("queue", "delete", "mail", "--yes")
    assert pgqrs.process("worker", "run", "shop.jobs:consumer").returncode == 3


# ------------------------------------------------------------------------- what is named


@each_case(
    ("target", "code", "error", "hint"),
    [
        ("shop.jobs", 2, "'shop.jobs' names no consumer: shop.jobs has consumer", "app.jobs:"),
        ("shop/jobs.py:consumer", 2, "'shop/jobs.py' is no name of a module", "app.jobs:"),
        ("shp:consumer", 2, "no module 'shp' in the current folder", "mean shop?"),
        ("shop.jbs:consumer", 2, "no module 'jbs' in shop; there are: jobs,", "mean shop.jobs?"),
        ("shop.jobs.more:consumer", 2, "no module 'more' in shop.jobs", "app.jobs:"),
        ("shop.jobs:consumr", 2, "no 'consumr': shop.jobs has consumer", "shop.jobs:consumer?"),
        ("shop.jobs:nested.innr", 2, "shop.jobs:nested has no 'innr'", "shop.jobs:nested.inner?"),
        ("shop.jobs:number", 2, "is of type int, and no consumer", "app.jobs:"),
        ("shop.jobs:Consumer", 2, "is a class, and no consumer", "app.jobs:"),
        ("shop.jobs:make_later", 2, "is a coroutine function, and no", "app.jobs:"),
        ("shop.jobs:send", 1, "calling shop.jobs:send failed: TypeError", "-vv"),
        ("shop.jobs:broken", 1, "failed: RuntimeError: no such tenant", "-vv"),
        ("shop.wrong:x", 1, "importing shop.wrong failed: No module named 'nowhere_to", "-vv"),
        ("shop.raising:x", 1, "importing shop.raising failed: ZeroDivisionError", "-vv"),
        ("shop:consumer", 2, "shop has no 'consumer': shop has no consumer", "app.jobs:"),
    ],
)
def test_a_wrong_target_is_an_error_that_names_what_was_found(
    here, application, target, code, error, hint
):
    first, second = here("worker", "run", target, code=code).stderr.splitlines()
    assert error in first
    assert hint in second


def test_a_wrong_target_ends_a_process_as_all_errors_do(pgqrs, application):
    for command in ("run", "check"):
        done = pgqrs.process("worker", command, "shop.jobs:consumr")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: shop.jobs has no 'consumr'")


def test_a_missing_library_of_ours_is_named_with_its_extra(pgqrs, application):
    (application / "sitecustomize.py").write_text("import sys\nsys.modules['tenacity'] = None\n")
    path = {"PYTHONPATH": str(application)}
    done = pgqrs.interpreter("worker", "check", "shop.jobs:consumer", env=path)
    assert done.returncode == 1
    assert "hint: pip install 'pgqrs-sa[consumer]'" in done.stderr


def test_the_database_of_other_commands_is_not_silently_ignored(pgqrs, application):
    for option in ("--dsn", "--schema", "--config"):
        done = pgqrs.process("worker", "run", "shop.jobs:consumer", option, "x")
        assert done.returncode == 2
        assert f"{option} has no effect on shop.jobs:consumer" in done.stderr

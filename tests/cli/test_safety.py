"""Nothing is destroyed by accident, and no password is shown."""

from __future__ import annotations

import json
import signal

import pytest
import sqlalchemy as sa

from pgqrs_sa import migrations
from pgqrs_sa.cli import params
from support import programs
from support.cases import each_case

from .conftest import bury


@pytest.fixture
def full(pgqrs, work) -> None:
    """Something for every destructive command to destroy."""
    with work() as service:
        service.queues.create("mail")
        service.queues.create("live")
        service.workers.stop(service.workers.register("w").id)
        service.messages.cancel(service.enqueue("live", 1).id)
        service.enqueue("live", 2, delay=3600)
    bury(work, "mail", 1)


DESTRUCTIVE = [
    ["queue", "purge", "live"],
    ["queue", "delete", "live", "--force"],
    ["message", "delete", "{live}"],
    ["worker", "purge", "--older-than", "0"],
    ["worker", "delete", "1"],
    ["archive", "delete", "live"],
    ["archive", "delete", "--id", "{dead}"],
    ["archive", "prune", "--older-than", "0"],
    ["dead", "discard", "{dead}"],
    ["dead", "discard", "--all"],
    ["dead", "retry", "--queue", "mail"],
]


def contents(engine: sa.Engine) -> list[object]:
    with engine.connect() as connection:
        tables = ("queues", "messages", "archive", "workers")
        return [
            connection.execute(sa.text(f"SELECT * FROM pgqrs_{table} ORDER BY id")).all()  # noqa: S608
            for table in tables
        ]


@pytest.fixture
def ids(engine: sa.Engine, full) -> dict[str, str]:
    """The ids of the live message and of the dead letter."""
    dead = "SELECT id FROM pgqrs_archive WHERE outcome = 'dead'"
    with engine.connect() as connection:
        return {
            "live": str(connection.scalar(sa.text("SELECT id FROM pgqrs_messages"))),
            "dead": str(connection.scalar(sa.text(dead))),
        }


@pytest.mark.parametrize("command", DESTRUCTIVE, ids=" ".join)
def test_it_is_refused_with_nobody_to_ask_and_a_dry_run_changes_nothing(
    pgqrs, engine, ids, migrated, command
):
    command = [word.format(**ids) for word in command]
    before = contents(engine)
    refused = pgqrs(*command, code=5)
    assert (migrated.name in refused.stderr, refused.stdout) == (True, "")
    assert "hint: --yes" in refused.stderr
    dry = pgqrs(*command, "--dry-run", "--format", "json")
    assert json.loads(dry.stdout)["dry_run"] is True
    assert dry.stderr.startswith("would ")
    assert contents(engine) == before
    pgqrs(*command, "--yes")
    assert contents(engine) != before


@pytest.mark.parametrize(
    "command",
    [
        ["queue", "purge", "live"],
        ["worker", "purge", "--older-than", "0"],
        ["archive", "delete", "live"],
        ["archive", "prune", "--older-than", "0"],
        ["dead", "discard", "--all"],
        ["dead", "retry", "--all"],
    ],
    ids=" ".join,
)
def test_nothing_to_destroy_is_no_failure_and_no_question(pgqrs, work, command):
    with work() as service:
        service.queues.create("live")
    done = pgqrs(*command, "--format", "json")
    assert json.loads(done.stdout)["count"] == 0
    assert "nothing to do" in done.stderr


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 5, 1), ("\n", 5, 1)])
def test_somebody_who_is_there_is_asked(pgqrs, full, counts, monkeypatch, answer, code, left):
    monkeypatch.setattr(params, "_is_interactive", lambda: True)
    asked = pgqrs("queue", "purge", "live", code=code, input=answer)
    assert "delete 1 live message(s) of queue 'live'" in asked.stderr
    assert "go on? [y/N]" in asked.stderr
    assert counts("live").live == left


def test_a_queue_that_holds_something_is_not_deleted_without_force(pgqrs, full):
    refused = pgqrs("queue", "delete", "live", "--yes", code=1)
    assert "still holds 1 live and 1 archived" in refused.stderr
    assert "hint: --force" in refused.stderr


def test_a_purge_keeps_the_archive_and_the_workers(pgqrs, full, counts):
    pgqrs("queue", "purge", "live", "--yes")
    assert (counts("live").live, counts("live").cancelled) == (0, 1)
    assert len(pgqrs.json("worker", "list")) == 1


def test_an_interrupted_purge_keeps_what_was_committed(pgqrs, work, counts, monkeypatch):
    from pgqrs_sa.resources import Queues

    with work() as service:
        service.queues.create("mail")
        service.enqueue_many("mail", range(10))
    original, calls = Queues.purge, []

    def interrupted(self, name, *, tokens):
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, name, tokens=tokens)

    monkeypatch.setattr(Queues, "purge", interrupted)
    stopped = pgqrs("queue", "purge", "mail", "--yes", "--chunk", 4, code=130)
    assert calls == [4, 4, 2]
    assert "interrupted after 8 of 10: these are committed" in stopped.stderr
    assert counts("mail").ready == 2


def test_a_long_job_leaves_alone_what_comes_later(pgqrs, work, counts, monkeypatch):
    from pgqrs_sa.resources import Queues

    with work() as service:
        service.queues.create("mail")
        service.enqueue_many("mail", range(4))
    original = Queues.purge

    def meanwhile(self, name, **options):
        with work() as service:
            service.enqueue_many("mail", range(2))
        return original(self, name, **options)

    monkeypatch.setattr(Queues, "purge", meanwhile)
    assert pgqrs.json("queue", "purge", "mail", "--yes", "--chunk", 2)["count"] == 4
    assert counts("mail").ready == 4


def test_a_purge_does_not_make_up_for_messages_that_were_settled_meanwhile(
    pgqrs, work, counts, monkeypatch
):
    with work() as service:
        service.queues.create("mail")
        service.enqueue_many("mail", range(4))

    def settled_and_enqueued(*_args, **_options):
        with work() as service:
            service.archive_many(service.dequeue("mail", limit=3))
            service.enqueue_many("mail", range(40))
        return True

    monkeypatch.setattr("pgqrs_sa.cli.queues.confirmed", settled_and_enqueued)
    assert pgqrs.json("queue", "purge", "mail")["count"] == 1
    assert counts("mail").ready == 40


@pytest.mark.parametrize("command", ["delete", "purge"])
def test_emptying_a_queue_commits_chunk_by_chunk(pgqrs, work, counts, monkeypatch, command):
    from pgqrs_sa.resources import Queues

    with work() as service:
        service.queues.create("mail")
        service.queues.create("other")
        service.enqueue_many("mail", range(4))
    original, seen = Queues.purge, []

    def watched(self, name, **options):
        seen.append(counts("mail").live)
        deleted = original(self, name, **options)
        with work() as service:  # not committed yet, and other queues do not wait for it
            service.session.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
            service.enqueue("other", 1)
        return deleted

    monkeypatch.setattr(Queues, "purge", watched)
    force = ["--force"] if command == "delete" else []
    pgqrs("queue", command, "mail", *force, "--yes", "--chunk", 2)
    assert seen == [4, 2]
    assert counts("other").ready == 2


# ------------------------------------------------------------------------------- installing


def versions(engine_url: str, schema: str | None = None) -> int | None:
    engine = sa.create_engine(engine_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return migrations.current_version(connection, schema)


def test_install_and_uninstall_run_the_steps(bare, database):
    assert "holds no known version" in bare("queue", "list", code=1).stderr
    bare("verify", code=1)
    assert "would bring" in bare("install", "--dry-run").stderr
    assert versions(database.url) is None
    assert bare.json("install")["from_version"] == 0
    assert bare.json("install")["from_version"] == 1
    assert versions(database.url) == 1
    bare("verify")
    bare("queue", "create", "mail")
    bare("message", "enqueue", "mail", "--payload", "1")
    refused = bare("uninstall", code=5).stderr
    assert "drop 1 message(s)" in refused
    bare("uninstall", "--dry-run")
    assert versions(database.url) == 1
    bare("uninstall", "--yes")
    assert versions(database.url) is None
    assert "nothing to do" in bare("uninstall", "--yes").stderr


def test_every_group_works_in_a_schema(bare, database):
    bare("install", "--schema", "jobs")
    assert (versions(database.url), versions(database.url, "jobs")) == (None, 1)
    for command in (
        "queue create mail",
        "queue list",
        "queue get mail",
        "queue update mail --max-read-ct 2",
        "queue pause mail",
        "queue resume mail",
        "message enqueue mail --payload 1 --delay 1h",
        "message enqueue mail --payload 2",
        "message enqueue mail --payload 3",
        "worker create w -q mail",
        "message dequeue mail --worker 1",
        "message list",
        "message get 1",
        "message count mail",
        "queue messages mail",
        "queue metrics",
        "worker messages 1",
        "worker health --group-by-queue",
        "worker stats mail",
        "worker list",
        "worker heartbeat 1",
        "worker suspend 1",
        "worker resume 1",
        "worker release 1",
        "message dequeue mail --worker 1",
        "message archive 2 --token 5",
        "message reschedule 1 --delay 2h",
        "message cancel 1",
        "message delete 3 --yes",
        "archive list",
        "archive count mail",
        "archive get 1",
        "archive requeue 1",
        "archive prune --older-than 0 --yes",
        "archive delete mail --yes",
        "dead list",
        "dead retry --all --yes",
        "dead discard --all --yes",
        "queue archive-dlq",
        "admin stats",
        "admin reclaim -q mail",
        "admin reclaim",
        "worker stop 1",
        "worker delete 1 --yes",
        "worker purge --yes",
        "verify",
        "queue purge mail --yes",
        "queue delete mail --force --yes",
        "uninstall --yes",
    ):
        bare("--schema", "jobs", *command.split())
    assert versions(database.url, "jobs") is None


def test_a_schema_of_a_hosts_history_is_left_to_it(pgqrs, engine):
    told = pgqrs("install")
    assert "there is nothing to do" in told.stderr
    assert "belongs to a host's Alembic history" in told.stderr
    for command in (["uninstall", "--yes"], ["uninstall", "--dry-run"]):
        refused = pgqrs(*command, code=1)
        assert "belongs to a host's Alembic history (it has alembic_version)" in refused.stderr
        assert "hint: downgrade the revision" in refused.stderr
    pgqrs("verify")


def test_install_refuses_where_a_host_would_have_to_do_it(bare, database):
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num text)")
    refused = bare("install", code=1)
    assert "hint: run `alembic upgrade head` there" in refused.stderr
    assert versions(database.url) is None
    bare("install", "--schema", "jobs")


def test_two_installs_at_once_are_one(bare, database):
    command = ("-m", "pgqrs_sa", "install", "--format", "json")
    with (
        programs.start(*command, env=bare.environment) as first,
        programs.start(*command, env=bare.environment) as second,
    ):
        done = [json.loads(program.communicate()[0]) for program in (first, second)]
    assert sorted(installed["from_version"] for installed in done) == [0, 1]


def test_verify_finds_what_is_missing(bare, database):
    bare("install")
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE pgqrs_messages DROP COLUMN headers")
        connection.exec_driver_sql(
            "INSERT INTO pgqrs_messages (queue_id, payload) VALUES (99, '1')"
        )
    found = bare("verify", "--format", "json", code=1)
    bad = {row["check"] for row in json.loads(found.stdout) if not row["ok"]}
    assert bad == {"pgqrs_messages", "messages_without_queue"}


# ------------------------------------------------------------------------------- passwords

UNREACHABLE = [
    "postgresql://bob:s3cr3t@127.0.0.1:1/x",
    "postgresql://bob:s3cr3t@127.0.0.1:1/x?bogus=1",
    "postgresql://bob:x/s3cr3t@127.0.0.1:1/x",
    "postgresql:///x?host=/nowhere&password=s3cr3t",
    "postgresql://bob:s3cr3t@%2Fnowhere:1/x",
    "host=127.0.0.1 port=1 password=s3cr3t",
    r"host=127.0.0.1 port=1 password='s3cr3t\'s'",
    "host=127.0.0.1 port=1 password = s3cr3t",
    "postgresql://bob:s3cr3t@127.0.0.1:1,127.0.0.1:1/x",
    "postgresql://bob:s3cr3t@127.0.0.1:1,[::1]:1/x?target_session_attrs=read-write",
    "postgresql+asyncpg://bob:s3cr3t@127.0.0.1:1,127.0.0.1:1/x",
    "postgresql://bob@/x?host=127.0.0.1:1&host=127.0.0.1:1&password=s3cr3t",
]
UNREADABLE = [
    "postgresql://bob:s3cr3t@127.0.0.1:port/x",
    "postgresql://bob:@s3cr3t@/x",
    "postgresql+nodriver://bob:s3cr3t@h/x",
    "mysql://bob:s3cr3t@h/x",
    "bob:s3cr3t@h",
    "postgresql://bob:s3cr3t@127.0.0.1:1,b:2/x?port=1,2,3",
    "postgresql://bob:s3cr3t@127.0.0.1:1,b:port/x",
    "postgresql://bob:s3cr3t@127.0.0.1:1,b:2/x?target_session_attrs=writable",
    "postgresql://bob:x@s3cr3t,b:2/x@y",
    "postgresql://a:1,b:2/x?user=bob&password=x@s3cr3t",
    "postgresql://bob:s3cr3t,b:2/x",
    "postgresql://bob:s3cr3t",
    "host=a,b port=1,2,3 password=s3cr3t",
    "host=h password=my s3cr3t",
    "host=h password='s3cr3t",
    "host=h password = x s3cr3t=1",
    "s3cr3t host=h",
]
LEAKS = [(dsn, 4) for dsn in UNREACHABLE] + [(dsn, 2) for dsn in UNREADABLE]


@each_case(("dsn", "code"), LEAKS)
@each_case("how", ["option", "environment", "file"])
def test_no_error_shows_the_password(nowhere, dsn, code, how, tmp_path):
    args: list[str] = ["queue", "list", "-vv", "--log-level", "debug"]
    env = {"PGQRS_CONNECTION_TIMEOUT": "2"}
    if how == "environment":
        env["PGQRS_DSN"] = dsn
    elif how == "file":
        (tmp_path / "c.yaml").write_text(f"dsn: {json.dumps(dsn)}\n")
        args += ["--config", str(tmp_path / "c.yaml")]
        env["PGQRS_DSN"] = ""
    else:
        args += ["--dsn", dsn]
    result = nowhere(*args, code=code, **env)
    assert "s3cr3t" not in result.stdout + result.stderr
    assert "error: " in result.stderr


@each_case(
    "text",
    [
        "dsn: postgresql://bob:s3cr3t@h/x: y\n",
        "dsn: {postgresql://bob:s3cr3t@h/x",
        "dsn: [postgresql://bob:s3cr3t@h/x]\n",
        "dsn: postgresql://bob:s3cr3t@h/x\nschemaa: x\n",
    ],
)
def test_a_file_that_is_wrong_keeps_its_password(nowhere, tmp_path, text):
    (tmp_path / "pgqrs.yaml").write_text(text)
    result = nowhere("queue", "list", code=2, PGQRS_DSN="")
    assert "s3cr3t" not in result.stderr


def test_a_dsn_in_the_place_of_a_command_is_not_repeated(nowhere):
    for args in (["postgresql://b:s3cr3t@h/x"], ["queue", "list", "postgresql://b:s3cr3t@h/x"]):
        result = nowhere(*args, code=2)
        assert "s3cr3t" not in result.stderr
        assert "b:***@h" in result.stderr


@each_case(
    "dsn",
    [
        "postgresql://b:s3cr3t@h,i/x",
        "host=h password=s3cr3t",
        "host=h password = s3cr3t",
        r"host=h password = 'x\'s3cr3t' dbname=x",
        r"host=h password=x\ s3cr3t",
    ],
)
def test_no_form_of_a_dsn_is_repeated_where_a_command_belongs(nowhere, dsn):
    for args in ([dsn], ["queue", "list", dsn]):
        result = nowhere(*args, code=2)
        assert "s3cr3t" not in result.stdout + result.stderr
        assert "***" in result.stderr


def test_a_wrong_password_is_not_shown(pgqrs, migrated, engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP ROLE IF EXISTS nobody_at_all")
    url = sa.make_url(migrated.dsn).set(username="nobody_at_all", password="s3cr3t")  # noqa: S106
    dsn = url.render_as_string(hide_password=False)
    result = pgqrs("queue", "list", "-vv", "--dsn", dsn, code=4)
    assert "s3cr3t" not in result.stdout + result.stderr


def test_ctrl_c_ends_with_130(pgqrs):
    pgqrs("queue", "create", "mail")
    command = ("-m", "pgqrs_sa", "queue", "list", "--watch", "60", "--format", "ndjson")
    with programs.start(*command, env=pgqrs.environment) as program:
        assert json.loads(program.stdout.readline())["name"] == "mail"
        program.send_signal(signal.SIGINT)
        _, said = program.communicate()
    assert (program.returncode, said) == (130, "error: interrupted\n")


@each_case("where", ["environment", "option", "schema"])
def test_what_is_no_utf_8_is_a_usage_error(nowhere, where):
    env, options = {}, ["--dsn", "postgresql://a:secret@127.0.0.1:1/x"]
    if where == "environment":
        env, options = {"PGQRS_DSN": "postgresql://a:secret\udcff@127.0.0.1:1/x"}, []
    elif where == "option":
        options = ["--dsn", "postgresql://a:secret\udcff@127.0.0.1:1/x"]
    else:
        options += ["--schema", "a\udcff"]
    done = nowhere.process("queue", "list", *options, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not valid UTF-8" in done.stderr
    assert "secret" not in done.stderr

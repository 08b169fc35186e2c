"""The commands doctor, schema and top, as programs; top in a pseudo-terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import select
import subprocess
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from pgqrs_sa import QueueService, cli, metadata
from pgqrs_sa.cli.top import _keys, sparkline
from support import programs
from support.waiting import PATIENCE


@pytest.fixture
def pgqrs(migrated, monkeypatch, capsys):
    """Return a function that runs a command on the test's database."""

    def run(*arguments, code=0, dsn=migrated.dsn):
        monkeypatch.delenv("PGQRS_DSN", raising=False)
        if dsn:
            monkeypatch.setenv("PGQRS_DSN", dsn)
        capsys.readouterr()
        ended = cli.main(arguments)
        done = SimpleNamespace(**dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))
        assert ended == code, done
        return done

    return run


@pytest.fixture
def psql(pg_bin):
    """Return a function that runs a script, as one would by hand."""

    def run(script, dsn):
        subprocess.run(
            [pg_bin / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", dsn],
            input=script, text=True, check=True, capture_output=True,
        )  # fmt: skip

    return run


# doctor


def test_the_doctor_is_content(pgqrs):
    done = pgqrs("doctor")
    assert done.stdout == ""
    assert "nothing is wrong" in done.stderr
    assert json.loads(pgqrs("doctor", "--format", "json").stdout) == []


def test_the_doctors_fixes_are_run_by_psql(pgqrs, psql, sql, migrated):
    sql(
        "DROP INDEX pgqrs_archive_queue_idx\n"
        "ALTER TABLE pgqrs_messages DROP CONSTRAINT pgqrs_messages_vt_check\n"
        "ALTER TABLE pgqrs_messages SET (autovacuum_enabled = off)"
    )
    done = pgqrs("doctor", code=1)
    assert "3 error(s) and 0 warning(s)" in done.stderr
    assert "error drift pgqrs_archive_queue_idx: the index of" in done.stdout
    listed = json.loads(pgqrs("doctor", "--format", "json", code=1).stdout)
    assert [sorted(entry) for entry in listed] == [
        ["check", "fix", "mend", "problem", "severity", "subject"]
    ] * 3
    for form in ("ndjson", "csv"):
        text = pgqrs("doctor", "--format", form, code=1).stdout
        parsed = (
            list(csv.DictReader(io.StringIO(text)))
            if form == "csv"
            else [json.loads(line) for line in text.splitlines()]
        )
        assert parsed == listed
    (only,) = json.loads(pgqrs("doctor", "--only", "autovacuum", "--format=json", code=1).stdout)
    assert only["check"] == "autovacuum"
    # What a person copies from the screen.
    script = "\n".join(line for line in done.stdout.splitlines() if line.startswith("    "))
    psql(script, migrated.dsn)
    pgqrs("doctor")


def test_the_doctor_on_an_empty_database(pgqrs, database):
    done = pgqrs("doctor", code=1, dsn=database.dsn)
    assert "holds no queue tables" in done.stdout
    assert "    pgqrs install\n" in done.stdout


def test_the_doctor_in_another_schema(pgqrs, engine):
    engine = engine.execution_options(schema_translate_map={None: "Jobs"})
    with engine.begin() as connection:
        connection.exec_driver_sql('CREATE SCHEMA "Jobs"')
        metadata.create_all(connection)
    pgqrs("doctor", "--schema", "Jobs")
    pgqrs("schema", "check", "--schema", "Jobs")
    assert "schema 'None'" not in pgqrs("doctor", "--schema", "None", code=1).stdout.lower()


def test_the_doctors_checks(pgqrs):
    listed = json.loads(pgqrs("doctor", "--list", "--format", "json").stdout)
    assert {"check": "clock", "looks_for": (
        "that the clocks of this computer and of the database differ")} in listed  # fmt: skip
    done = pgqrs("doctor", "--only", "nonsense", code=2)
    assert "no check is called 'nonsense'" in done.stderr


def test_the_doctor_without_a_server(pgqrs):
    pgqrs("doctor", code=4, dsn="postgresql://nobody:secret@127.0.0.1:1/x")


# schema


@pytest.mark.parametrize("schema", [(), ("--schema", 'Jobs of "us" 5%')])
def test_the_schema_as_sql_makes_healthy_tables(pgqrs, psql, database, schema):
    made = pgqrs("schema", "sql", *schema, dsn=None).stdout
    psql(made, database.dsn)
    pgqrs("doctor", *schema, dsn=database.dsn)
    gone = pgqrs("schema", "sql", "--down", *schema, dsn=None).stdout
    psql(gone, database.dsn)
    pgqrs("schema", "check", *schema, code=1, dsn=database.dsn)


def test_the_schema_as_sql_between_versions(pgqrs):
    whole = pgqrs("schema", "sql").stdout
    assert pgqrs("schema", "sql", "--from", "0", "--to", "1").stdout == whole
    assert "DROP TABLE" in pgqrs("schema", "sql", "--down", "--from", "1", "--to", "0").stdout
    assert "not the way up" in pgqrs("schema", "sql", "--from", "1", code=2).stderr
    assert "not the way down" in pgqrs("schema", "sql", "--down", "--to", "1", code=2).stderr
    assert "speaks of version 9" in pgqrs("schema", "sql", "--to", "9", code=2).stderr


def test_the_schema_check(pgqrs, sql, psql, migrated):
    pgqrs("schema", "check")
    sql("DROP INDEX pgqrs_archive_queue_idx")
    done = pgqrs("schema", "check", code=1)
    assert "1 problem(s)" in done.stderr
    psql(done.stdout, migrated.dsn)
    pgqrs("schema", "check")


def test_the_grants(pgqrs, psql, migrated):
    for kind in ("producer", "consumer", "dashboard", "operator", "migrator"):
        lines = pgqrs("schema", "grants", "--role", kind, "--to", "postgres", dsn=None).stdout
        psql(lines, migrated.dsn)
    assert "TO pgqrs_consumer;" in pgqrs("schema", "grants", "--role", "consumer").stdout
    text = pgqrs("schema", "grants", "--role", "producer", "--schema", "Jobs").stdout
    assert 'GRANT USAGE ON SCHEMA "Jobs" TO pgqrs_producer;' in text
    pgqrs("schema", "grants", code=2)


# top


@pytest.fixture
def busy(service, session):
    """Two queues with something in them, and a worker."""
    service.queues.create("reports")
    service.enqueue_many("mail", range(7))
    worker = service.workers.register("sender", hostname="here")
    for delivery in service.dequeue("mail", 3, worker=worker)[:2]:
        service.archive(delivery)
    service.workers.heartbeat(worker.id, leased=1)
    service.enqueue("mail", 1, delay=60)
    session.commit()
    return service


def test_one_frame(pgqrs, busy):
    done = pgqrs("top", "--once", "--interval", "60")
    (mail,) = (line for line in done.stdout.splitlines() if "mail" in line)
    assert mail.split()[1:5] == ["4", "1", "1", "0"]
    assert mail.split()[-3:] == ["0.1", "0.0", "▁▁▁▁▁▁▁█"]
    assert "sender" in done.stdout
    assert pgqrs("top").stdout.splitlines()[0] == done.stdout.splitlines()[0]  # no terminal


def test_one_frame_for_programs(pgqrs, busy):
    data = json.loads(pgqrs("top", "--format", "json", "--interval", "60").stdout)
    mail, reports = data["queues"]
    assert (mail["queue"], mail["ready"], mail["leased"], mail["scheduled"]) == ("mail", 4, 1, 1)
    assert mail["incoming"] == pytest.approx(8 / 60)
    assert mail["outgoing"][-1] == pytest.approx(2 / 60)
    assert reports["incoming"] == 0
    (worker,) = data["workers"]
    assert (worker["name"], worker["leases"], worker["healthy"]) == ("sender", 1, True)


def test_one_frame_without_a_server(pgqrs):
    pgqrs("top", "--once", code=4, dsn="postgresql://nobody:secret@127.0.0.1:1/x")


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *arguments, dsn):
        environment = {**os.environ, "PGQRS_DSN": dsn, "TERM": "xterm"}
        self.program, self.fd = programs.start_in_terminal(
            "-m", "pgqrs_sa", *arguments, env=environment, size=(24, 100)
        )
        self.seen = ""

    def wait_for(self, pattern, seconds=PATIENCE):
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"no {pattern!r} in {self.seen[-3000:]!r}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found[0]

    def press(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        """Return the exit code, once the program has ended and said all it had to say."""
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:  # Linux's way to say that nobody writes any more
            pass
        os.close(self.fd)
        return self.program.wait(PATIENCE)


def test_top_in_a_terminal(migrated, busy, session, engine):
    def paused(name):
        with sa.orm.Session(engine) as other:
            return QueueService(other).queues.get(name).paused_at is not None

    terminal = Terminal("top", "--interval", "0.5", dsn=migrated.dsn)
    terminal.wait_for("pgqrs top")
    terminal.wait_for("sender")
    terminal.press("p")
    terminal.wait_for(r"mail \(paused\)")
    assert paused("mail")
    terminal.press("p")
    terminal.wait_for("resumed queue mail")
    assert not paused("mail")
    terminal.press("\x1b[Bp")
    terminal.wait_for("paused queue reports")
    assert paused("reports")
    terminal.press("jd")
    terminal.wait_for("suspended worker")
    terminal.press("d")
    terminal.wait_for("resumed worker")
    terminal.press("p")
    terminal.wait_for("select a queue")
    busy.enqueue_many("mail", range(1000, 2000))
    session.commit()
    terminal.wait_for("1004")  # by itself
    terminal.press("r")
    terminal.press("q")
    assert terminal.end() == 0


def test_top_survives_a_lost_connection_and_is_interrupted(migrated, busy, sql):
    terminal = Terminal("top", "--interval", "0.5", dsn=migrated.dsn)
    terminal.wait_for("mail")
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgqrs'")
    terminal.wait_for("terminating connection|closed the connection|connection is lost")
    terminal.press("p")
    terminal.wait_for("paused queue mail")
    terminal.press("\x03")
    assert terminal.end() == 130


def test_top_with_more_queues_than_lines(migrated, service, session):
    for n in range(60):
        service.queues.create(f"queue-{n:02}")
    session.commit()
    terminal = Terminal("top", dsn=migrated.dsn)
    terminal.wait_for("queue-05")
    terminal.press("j" * 40)
    terminal.wait_for("queue-39")
    terminal.press("q")
    assert terminal.end() == 0


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0] * 8) == "▁" * 8
    assert sparkline([0, 2, 0]) == "▁█▁"


def test_keys():
    assert _keys(b"\x1b[A\x1bOBjkxqrp d") == [
        "up", "down", "down", "up", "quit", "refresh", "pause", "refresh", "drain",
    ]  # fmt: skip

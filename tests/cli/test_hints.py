"""Each problem of a connection or a schema has a hint of its own, which is what solves it."""

from __future__ import annotations

import ast
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from pgqrs_sa import embedded, metadata
from pgqrs_sa.cli import connection, group
from support import programs
from support.cases import each_case


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that listens, and asks one role for its password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"listen_addresses": "127.0.0.1", "port": str(port)}
    with embedded.start(settings=settings) as started:
        rules = started.data_dir / "pg_hba.conf"
        asks = "host all asked 127.0.0.1/32 scram-sha-256\nhost all kept_out 127.0.0.1/32 reject\n"
        rules.write_text(asks + rules.read_text())
        engine = sa.create_engine(
            f"postgresql+psycopg://{started.user}@127.0.0.1:{port}/postgres", poolclass=sa.NullPool
        )
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE ROLE asked LOGIN PASSWORD 'right'")
            connection.exec_driver_sql("CREATE ROLE kept_out LOGIN")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        yield f"{started.user}@127.0.0.1:{port}/postgres"


def said(dsn: str, *options: str, code: int, **env: str) -> tuple[str, str]:
    """Return the error and the hint of a command."""
    done = CliRunner().invoke(group, ["--dsn", dsn, *options, "queue", "list"], env=env)
    assert done.exit_code == code, done.output
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@each_case(
    ("change", "expected"),
    [
        (("/postgres", "/no'where"), "or create this one: createdb 'no'\"'\"'where'"),
        (("postgres@", "nobody-at-all@"), "or create this role: createuser nobody-at-all"),
        (("postgres@", "asked:wrong@"), "the password in the DSN, PGPASSWORD or ~/.pgpass is not"),
        (("postgres@", "asked@"), "add the password to the DSN, or set PGPASSWORD"),
        (("postgres@", "kept_out@"), "allow this host, user and database in the server's pg_hba"),
        (("127.0.0.1", "no.such.host.invalid"), "check the spelling of the host in the DSN"),
        (("/postgres", "/postgres?sslmode=require"), "switch SSL on in the server"),
        (("/postgres", "/postgres?nonsense=1"), "correct what follows the ? in the DSN"),
    ],
)
def test_a_wrong_part_of_the_address_is_named(server, change, expected, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    error, hint = said("postgresql://" + server.replace(*change), code=4)
    assert error.startswith("cannot connect to ")
    assert expected in hint


@each_case("place", ["option", "environment", "file"])
@each_case(
    "form",
    [
        "postgresql://{user}@127.0.0.1:{dead},127.0.0.1:{port}/{db}?target_session_attrs=read-write",
        "postgresql+asyncpg://{user}@[::1]:{dead},127.0.0.1:{port}/{db}",
        "postgresql://{user}@%2Fnowhere:{port},127.0.0.1:{port}/{db}",
        "host=127.0.0.1,127.0.0.1 port={dead},{port} user={user} dbname={db}",
        "host=/nowhere,127.0.0.1 port={port} user={user} dbname={db}",
        "postgresql://{user}@/{db}?host=127.0.0.1:{dead}&host=127.0.0.1:{port}",
    ],
)
def test_the_host_that_answers_of_several_is_used(server, form, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = sa.make_url("postgresql://" + server)
    dsn = form.format(user=url.username, port=url.port, db=url.database, dead=free_port())
    args, env = ["doctor", "--format", "json"], {"PGQRS_DSN": ""}
    if place == "option":
        args += ["--dsn", dsn]
    elif place == "environment":
        env["PGQRS_DSN"] = dsn
    else:
        (tmp_path / "pgqrs.toml").write_text(f"dsn = {json.dumps(dsn)}\n")
    done = CliRunner().invoke(group, args, env=env)
    assert done.exit_code in {0, 1}, done.output  # 1: it was reached, and has no tables
    assert json.loads(done.stdout)


def test_all_hosts_are_named_when_none_answers():
    ports = [free_port(), free_port()]
    error, hint = said(
        f"postgresql://u@127.0.0.1:{ports[0]},[::1]:{ports[1]}/x", "--verbose", code=4
    )
    assert error.startswith(f"cannot connect to 127.0.0.1:{ports[0]},[::1]:{ports[1]}/x: ")
    assert hint == "nothing listens there: start the server, or check the host and port in the DSN"


def test_a_port_or_a_socket_where_nothing_listens(tmp_path):
    _, hint = said(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres", code=4)
    assert hint == "nothing listens there: start the server, or check the host and port in the DSN"
    _, hint = said(f"postgresql:///postgres?host={tmp_path}", code=4)
    assert hint.startswith("no server listens on this socket")


def test_a_server_that_does_not_answer():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres?connect_timeout=2"
        _, hint = said(dsn, code=4)
    assert "no answer came in time" in hint


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def options_of(command: click.Command) -> Iterator[str]:
    for param in command.params:
        yield from (*param.opts, *param.secondary_opts)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from options_of(command.get_command(context, name))


def texts_of(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_option_that_a_hint_or_the_documentation_names_exists():
    known = {*options_of(group), "--help"}
    texts = [
        (module.name, text)
        for module in sorted((ROOT / "pgqrs_sa" / "cli").rglob("*.py"))
        for text in texts_of(module)
    ]
    texts.append(("cli.md", (ROOT / "docs/reference/cli.md").read_text()))
    for page in PAGES:
        texts += [(page.name, line) for line in re.findall(r"pgqrs [^`\n]*", page.read_text())]
    named = {(place, option) for place, text in texts for option in OPTION.findall(text)}
    assert len(named) > 50
    assert {(place, option) for place, option in named if option not in known} == set()


def test_a_leased_message_is_settled_with_the_option_that_the_hint_names(pgqrs):
    pgqrs("queue", "create", "mail")
    pgqrs("message", "enqueue", "mail", "--payload", "1")
    (leased,) = pgqrs.json("message", "dequeue", "mail")
    said = pgqrs("message", "archive", leased["id"], code=1).stderr
    (option,) = OPTION.findall(said)
    pgqrs("message", "archive", leased["id"], option, leased["fencing_token"])


def test_what_nobody_knows_has_a_general_hint():
    assert connection.hint("etwas ging schief") == connection.GENERAL


@each_case(
    ("driver", "expected"),
    [
        ("psycopg2", "pip install psycopg2-binary, or name +psycopg in the DSN, or no driver"),
        ("pg8000", "pip install pg8000, or name +psycopg in the DSN, or no driver"),
        ("psycopg", "pip install 'pgqrs-sa[psycopg]'"),
        ("nothing", "name +psycopg in the DSN, or no driver"),
    ],
)
def test_a_driver_that_is_not_installed(driver, expected):
    code = (
        f"import sys; sys.modules[{driver!r}] = None\n"
        "from pgqrs_sa.cli import main; sys.exit(main())"
    )
    done = programs.run("-c", code, "--dsn", f"postgresql+{driver}://h/x", "queue", "list")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"hint: {expected}"


@pytest.fixture
def dsn(database: Any) -> str:
    return str(database.dsn)


def run(dsn: str, *statements: str) -> None:
    engine = sa.create_engine(
        sa.make_url(dsn).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool
    )
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_a_database_without_tables(dsn):
    error, hint = said(dsn, code=1)
    assert "holds no known version" in error
    assert hint == "pgqrs install"
    _, hint = said(dsn, "--schema", "my jobs", code=1)
    assert hint == "pgqrs --schema 'my jobs' install"


def test_a_schema_that_does_not_exist_beside_one_that_has_the_tables(dsn):
    assert CliRunner().invoke(group, ["--dsn", dsn, "-s", "jobs", "install"]).exit_code == 0
    for options, command in (
        ((), "pgqrs install"),
        (("-s", "nope"), "pgqrs --schema nope install"),
    ):
        _, hint = said(dsn, *options, code=1)
        assert hint == f"--schema jobs has tables; to make these: {command}"


def test_a_history_of_alembic_is_not_passed_over(dsn):
    run(dsn, "CREATE TABLE alembic_version (version_num text)", "CREATE SCHEMA jobs")
    assert said(dsn, code=1)[1] == "alembic upgrade head"
    assert said(dsn, "-s", "jobs", code=1)[1] == "alembic upgrade head"
    run(dsn, "DROP TABLE alembic_version", "CREATE TABLE jobs.alembic_version (version_num text)")
    assert said(dsn, code=1)[1] == "pgqrs install"
    assert said(dsn, "-s", "jobs", code=1)[1] == "alembic upgrade head"


@pytest.mark.parametrize("version", [None, 0])
def test_the_doctor_prints_the_command_that_fits(dsn, version):
    def fix() -> str:
        done = CliRunner().invoke(group, ["--dsn", dsn, "schema", "check"])
        return str(done.stdout).strip()

    if version is not None:
        engine = sa.create_engine(
            sa.make_url(dsn).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool
        )
        metadata.create_all(engine)
        run(dsn, f"COMMENT ON TABLE pgqrs_queues IS 'pgqrs_sa:schema={version}'")
    assert fix() == "pgqrs install"
    run(dsn, "CREATE TABLE alembic_version (version_num text)")
    assert fix() == "alembic upgrade head"

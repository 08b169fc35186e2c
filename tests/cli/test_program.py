"""The program around the commands: exit codes, formats, pipes, terminals, settings, start-up."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import select
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import flask
import pytest

import pgqrs_sa.cli
from pgqrs_sa.cli import output
from support import programs
from support.cases import each_case
from support.waiting import PATIENCE

SCRIPTS = Path(sysconfig.get_path("scripts"))
HEAVY = ("sqlalchemy", "alembic", "rich", "durationpy", "yaml", "psycopg", "asyncio")

# The package's own __init__ imports the library, for any import from it; what the command
# line adds to that is what is looked at here.
BARE_PACKAGE = """
import sys, types, importlib.util
spec = importlib.util.find_spec("pgqrs_sa")
package = sys.modules["pgqrs_sa"] = types.ModuleType("pgqrs_sa")
package.__path__ = spec.submodule_search_locations
from pgqrs_sa.cli import main
code = main({args!r})
print([one for one in {heavy!r} if one in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("args", [["--help"], ["queue", "--help"], ["message", "list", "--help"]])
def test_help_imports_nothing_heavy(args):
    code = BARE_PACKAGE.format(args=args, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "Usage: pgqrs" in done.stdout


def test_help_lists_every_command():
    from click.testing import CliRunner

    shown = CliRunner().invoke(pgqrs_sa.cli.group, ["-h"]).stdout
    for name in pgqrs_sa.cli.group.lazy:
        assert re.search(rf"^  {name} +\w", shown, re.MULTILINE)


def test_the_exit_codes_are_those_of_the_documentation(pgqrs):
    pgqrs("queue", "create", "mail")
    nowhere = {"PGQRS_DSN": "postgresql://127.0.0.1:1/x"}
    for code, args, env in (
        (0, ["queue", "list"], {}),
        (1, ["queue", "delete", "mail"], {}),
        (2, ["queue", "get"], {}),
        (2, ["qeue"], {}),
        (3, ["queue", "get", "mial"], {}),
        (4, ["queue", "list"], nowhere),
        (5, ["queue", "purge", "mail"], {}),
    ):
        if code == 1:
            pgqrs("message", "enqueue", "mail", "--payload", "1")
        done = pgqrs.process(*args, env=env)
        assert done.returncode == code, (args, done.stderr)
        if code:
            *_, error, hint = done.stderr.splitlines()
            assert error.startswith("error: ")
            assert hint.startswith("hint: ")
            assert done.stdout == ""


@each_case("program", [[sys.executable, "-m", "pgqrs_sa"], [SCRIPTS / "pgqrs"]])
def test_both_programs_end_with_the_exit_code(pgqrs, program):
    done = subprocess.run(
        [*program, "queue", "get", "mial"],
        env=pgqrs.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: there is no queue 'mial'")


def test_what_was_not_found_has_a_hint(pgqrs):
    pgqrs("queue", "create", "mail")
    assert "hint: did you mean mail?" in pgqrs("queue", "get", "mial", code=3).stderr
    assert "hint: pgqrs queue create zzz" in pgqrs("queue", "get", "zzz", code=3).stderr
    assert "hint: pgqrs worker list" in pgqrs("worker", "get", 7, code=3).stderr
    assert "archive list --message" in pgqrs("message", "get", 7, code=3).stderr
    assert "did you mean queue" in pgqrs("qeue", code=2).stderr


def test_a_traceback_needs_vv(pgqrs):
    for flags, shown in (([], False), (["-v"], False), (["-vv"], True), (["-v", "-v"], True)):
        said = pgqrs("queue", "get", "nope", *flags, code=3).stderr
        assert ("Traceback" in said) is shown


def test_without_the_extra_it_says_what_to_install(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'click' else real(name, *rest)\n"
        "sys.modules['click'] = None\n"
        "import pgqrs_sa.demo\n"
        "pgqrs_sa.demo.run = lambda: print('the demo runs') or 0\n"
        "from pgqrs_sa.cli import main\n"
        "assert [main(args) for args in ([], ['queue', 'list'], ['--help'])] == [2, 2, 2]\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "demo"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "the demo runs\n")
    assert done.stderr.count("pip install 'pgqrs-sa[cli]'") == 3


def test_a_library_that_is_missing_is_named_with_its_extra(pgqrs, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.cells", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "pip install 'pgqrs-sa[cli]'" in pgqrs("queue", "list", code=2).stderr


# --------------------------------------------------------------------------------- formats

NASTY = {"text": 'a "quoted", line\nbreak; \x1b[31mred é', "list": [1, None, True], "n": 2**70}


@pytest.fixture
def nasty(pgqrs, work):
    with work() as service:
        service.queues.create("mail")
        service.enqueue("mail", NASTY, headers={"trace": "[bold]x[/bold]"}, key="[red]k\x1b[0m")
        service.enqueue("mail", 2)
    return pgqrs


def test_every_format_can_be_read_back(nasty):
    from_json = nasty.json("message", "list")
    lines = nasty("message", "list", "--format", "ndjson").stdout.splitlines()
    from_csv = list(csv.DictReader(io.StringIO(nasty("--format", "csv", "message", "list").stdout)))
    assert len(from_json) == len(lines) == len(from_csv) == 2
    assert [json.loads(line)["payload"] for line in lines] == [NASTY, 2]
    assert [item["payload"] for item in from_json] == [NASTY, 2]
    assert json.loads(from_csv[0]["payload"]) == NASTY
    assert json.loads(from_csv[0]["headers"]) == {"trace": "[bold]x[/bold]"}
    assert (from_csv[0]["worker_id"], from_csv[0]["id"]) == ("", str(from_json[0]["id"]))
    assert list(from_csv[0]) == list(from_json[0])


def test_a_table_shows_data_as_it_is_and_drives_no_terminal(nasty):
    shown = nasty("message", "list").stdout
    assert "\x1b" not in shown
    assert "[red]k\\x1b[0m" in shown
    assert len(shown.splitlines()) == 3


def test_nothing_is_an_empty_list(pgqrs):
    assert pgqrs("queue", "list", "--format", "json").stdout == "[]\n"
    assert pgqrs("queue", "list", "--format", "ndjson").stdout == ""
    header = "id,name,created_at,lease_seconds,max_read_ct,keep,retention_seconds,"
    header += "failed_retention_seconds,max_payload_bytes,"
    assert pgqrs("queue", "list", "--format", "csv").stdout == f"{header}paused_at\n"


def test_data_goes_to_the_file_of_out(nasty, tmp_path):
    done = nasty("message", "list", "--format", "ndjson", "--out", tmp_path / "data")
    assert done.stdout == ""
    assert len((tmp_path / "data").read_text().splitlines()) == 2
    nasty("message", "list", "--out", tmp_path / "none" / "data", code=2)


def test_a_pipe_gets_plain_text_and_may_be_closed(nasty, work):
    done = nasty.process("message", "list", env={"FORCE_COLOR": ""})
    assert "\x1b" not in done.stdout
    assert str(2**70) in done.stdout.splitlines()[1]  # nothing is cut off
    for_programs = nasty.process("message", "list", "--format", "json")
    assert json.loads(for_programs.stdout)[0]["payload"] == NASTY
    with work() as service:
        service.enqueue_many("mail", ["x" * 1000] * 500)
    command = f"{sys.executable} -m pgqrs_sa message list --limit 1000 --format ndjson | head -n 1"
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=nasty.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert json.loads(piped.stdout)["payload"] == NASTY


def failed_plainly(done: subprocess.CompletedProcess[str], says: str) -> None:
    error, *hints = done.stderr.splitlines()
    assert (done.returncode, error[:7]) == (1, "error: ")
    assert says in error
    assert all(hint.startswith("hint: ") for hint in hints)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@each_case("rest", ["queue list > /dev/full", "--help > /dev/full", "queue list --out /dev/full"])
def test_a_full_disk_is_a_plain_failure(pgqrs, rest):
    pgqrs("queue", "create", "mail", code=0)
    words, _, place = rest.partition(" > ")
    with open(place or os.devnull, "w") as stdout:  # noqa: PTH123 - a device
        program = programs.start(
            "-m", "pgqrs_sa", *words.split(), env=pgqrs.environment, stdout=stdout
        )
    with program:
        _, errors = program.communicate()
        done = subprocess.CompletedProcess(rest, program.wait(), "", errors)
    failed_plainly(done, "No space left on device")


@each_case("rest", ["queue list >&-", "queue create late >&-"])
def test_a_closed_stdout_is_a_plain_failure(pgqrs, rest):
    pgqrs("queue", "create", "mail")
    command = f"{sys.executable} -m pgqrs_sa {rest}"
    done = subprocess.run(
        ["bash", "-c", command], env=pgqrs.environment, capture_output=True, text=True, check=False
    )
    failed_plainly(done, "stdout is closed")
    assert [queue["name"] for queue in pgqrs.json("queue", "list")] == ["mail"]


def test_a_closed_stdout_is_not_needed_with_out(pgqrs, tmp_path):
    pgqrs("queue", "create", "mail")
    command = f"{sys.executable} -m pgqrs_sa queue list --out {tmp_path / 'data'} >&-"
    done = subprocess.run(
        ["bash", "-c", command], env=pgqrs.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mail" in (tmp_path / "data").read_text()


@each_case("module", ["pgqrs_sa.cli.app", "pgqrs_sa.cli.root", "click"])
def test_ctrl_c_during_an_import_ends_as_anywhere_else(module):
    code = (
        "import sys\n"
        "for name in [*sys.modules]:\n"
        "    if name.startswith(('click', 'pgqrs_sa.cli')): del sys.modules[name]\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "from pgqrs_sa.cli import main\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.exit(main(['queue', 'list']))\n"
    )
    done = programs.run("-c", code)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@each_case(
    ("seconds", "shown"),
    [(0, "0.0s"), (9.94, "9.9s"), (59.6, "1m"), (90, "1m 30s"), (5400, "1h 30m"), (-70, "-1m 10s")],
)
def test_spans_are_short(seconds, shown):
    assert output.span(seconds) == shown


# ------------------------------------------------------------------------------- terminals


def in_a_terminal(pgqrs, *args: str, until: str, keys: bytes, **env: str) -> tuple[int, str]:
    """Run in a pseudo-terminal until some text shows up, press keys, and return how it ends."""
    environment = pgqrs.environment | {"TERM": "xterm-256color", "COLUMNS": "120"} | env
    program, terminal = programs.start_in_terminal("-m", "pgqrs_sa", *args, env=environment)
    read, deadline, again = b"", time.monotonic() + PATIENCE, 0.0
    with program:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    read += os.read(terminal, 65_536)
                except OSError:  # it has ended
                    program.wait(PATIENCE)
                    break
            # A key that comes as the program is just changing the terminal's mode may be lost. Not
            # again soon: a second Ctrl-C, while a slow machine is at the first, is another story.
            if until.encode() in read and time.monotonic() > again:
                os.write(terminal, keys)
                again = time.monotonic() + PATIENCE / 5
    os.close(terminal)
    return program.wait(), read.decode()


def test_watch_shows_the_list_until_ctrl_c(pgqrs):
    pgqrs("queue", "create", "reminders")
    code, seen = in_a_terminal(
        pgqrs, "queue", "metrics", "--watch", "60", until="reminders", keys=b"\x03"
    )
    assert code == 130
    assert "oldest ready" in seen
    assert "\x1b[" in seen
    assert "Traceback" not in seen


def test_no_color_is_respected_on_a_terminal(pgqrs):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        code, seen = in_a_terminal(pgqrs, "queue", "get", "none", until="hint", keys=b"", **env)
        assert code == 3
        assert bool(colour.search(seen)) is coloured


@pytest.mark.parametrize(
    ("keys", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 5, 1), (b"\x03", 130, 1)]
)
def test_the_question_is_asked_on_a_terminal(pgqrs, counts, keys, code, left):
    pgqrs("queue", "create", "mail")
    pgqrs("message", "enqueue", "mail", "--payload", "1")
    ended, seen = in_a_terminal(pgqrs, "queue", "purge", "mail", until="[y/N]", keys=keys)
    assert (ended, counts("mail").live) == (code, left)
    assert "delete 1 live message(s)" in seen


# -------------------------------------------------------------------------------- settings


def test_settings_come_in_the_documented_order(nowhere, tmp_path):
    wrong = "postgresql://127.0.0.1:1/"
    Path("pgqrs.yaml").write_text(f"dsn: {wrong}here\n")
    (tmp_path / "other.toml").write_text(f'dsn = "{wrong}other"\nschema = "filed"\n')
    (tmp_path / "named.yaml").write_text(f"dsn: {wrong}named\n")

    def target(*args: str, **env: str) -> str:
        said = nowhere("queue", "list", *args, code=4, **env).stderr
        return said.splitlines()[0].partition("cannot connect to ")[2].partition(": ")[0]

    none = {"PGQRS_DSN": ""}
    assert target(**none).endswith("/here")
    named = none | {"PGQRS_CONFIG_FILE": str(tmp_path / "named.yaml")}
    assert target(**named).endswith("/named")
    given = ["--config", str(tmp_path / "other.toml")]
    assert target(*given, **named).endswith("/other, schema filed")
    env = {"PGQRS_DSN": f"{wrong}env", "PGQRS_SCHEMA": "varied"}
    assert target(*given, **env).endswith("/env, schema varied")
    options = ["--dsn", f"{wrong}option", "--schema", "opted"]
    assert target(*given, *options, **env).endswith("/option, schema opted")


def test_an_option_after_the_command_wins_over_one_before_it(pgqrs):
    both = pgqrs("--format", "csv", "queue", "list", "--format", "json")
    assert both.stdout == "[]\n"


@each_case(
    ("name", "value"),
    [
        ("PGQRS_MAX_READ_CT", "many"),
        ("PGQRS_CONNECTION_TIMEOUT", "-1"),
        ("PGQRS_DEFAULT_BATCH_SIZE", "1.5"),
        ("PGQRS_VALIDATION_CONFIG", "{"),
    ],
)
def test_a_malformed_value_is_an_error(nowhere, name, value):
    assert name in nowhere("queue", "list", code=2, **{name: value}).stderr


def test_no_database_is_an_error_that_says_how_to_name_one(nowhere):
    assert "pass --dsn, or set PGQRS_DSN" in nowhere("queue", "list", code=2, PGQRS_DSN="").stderr


def test_the_settings_have_their_effect(pgqrs):
    pgqrs("queue", "create", "mail", PGQRS_MAX_READ_CT="9")
    assert pgqrs.json("queue", "get", "mail")["max_read_ct"] == 9
    pgqrs("message", "dequeue", "mail", "--limit", 3, code=2, PGQRS_DEFAULT_BATCH_SIZE="2")


@each_case("name", ["format", "log_level"])
def test_a_malformed_option_in_the_environment_names_its_variable(nowhere, name):
    variable = f"PGQRS_{name.upper()}"
    said = nowhere("queue", "list", code=2, **{variable: "nonsense"}).stderr
    assert variable in said
    assert "nonsense" in said


def test_options_are_read_from_the_environment(pgqrs, tmp_path):
    pgqrs("queue", "create", "mail")
    listed = pgqrs("queue", "list", PGQRS_FORMAT="ndjson")
    assert json.loads(listed.stdout)["name"] == "mail"
    assert "sqlalchemy" in pgqrs("queue", "list", PGQRS_LOG_LEVEL="debug").stderr
    out, log = tmp_path / "out", tmp_path / "log"
    environment = {"PGQRS_OUT": str(out), "PGQRS_LOG_DEST": str(log), "PGQRS_FORMAT": "json"}
    done = pgqrs("queue", "list", "--log-level", "debug", **environment)
    assert (done.stdout, done.stderr) == ("", "")
    assert json.loads(out.read_text())[0]["name"] == "mail"
    assert "sqlalchemy" in log.read_text()


@each_case("words", [["--format", "json", "queue", "list"], ["queue", "list", "--format", "json"]])
def test_an_option_wins_over_its_variable_wherever_it_stands(pgqrs, words):
    assert pgqrs(*words, PGQRS_FORMAT="csv").stdout == "[]\n"


@each_case(
    ("level", "logged"), [("warn", False), ("TRACE", True), ("Debug", True), ("error", False)]
)
def test_levels_of_logging_have_the_names_of_pgqrs_too(pgqrs, level, logged):
    assert ("sqlalchemy" in pgqrs("queue", "list", "--log-level", level).stderr) is logged


def test_the_log_goes_where_it_is_told(pgqrs, tmp_path):
    log = tmp_path / "log"
    done = pgqrs("queue", "list", "--log-level", "debug", "--log-dest", log)
    assert "sqlalchemy" in log.read_text()
    assert done.stderr == ""
    assert "sqlalchemy" in pgqrs("queue", "list", "--log-level", "debug").stderr


# ---------------------------------------------------------------------------- foreign text


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


def test_no_cell_of_a_csv_is_a_formula(pgqrs, work):
    with work() as service:
        service.queues.create("mail")
        for text in FORMULAS:
            service.enqueue("mail", 1, key=text, headers={})
    shown = pgqrs("message", "list", "--format", "csv").stdout
    keys = [row["key"] for row in csv.DictReader(io.StringIO(shown))]
    assert len(keys) == len(FORMULAS)
    assert all(key.startswith("'") for key in keys)


CONTROLS = ["\x1b[2J", "\x9b2J", "\x7f", "\x07"]


@each_case("format", ["table", "json", "ndjson", "csv"])
def test_no_control_character_reaches_the_terminal(with_controls, format):
    shown = with_controls("message", "list", "--format", format).stdout
    assert not [control for control in CONTROLS if control[0] in shown]
    if format == "json":
        assert [message["key"] for message in json.loads(shown)] == CONTROLS


@pytest.fixture
def with_controls(pgqrs, work):
    """A queue with a message for each control character, in its payload and its key."""
    with work() as service:
        service.queues.create("mail")
        for control in CONTROLS:
            service.enqueue("mail", {"x": control}, key=control)
    return pgqrs


def test_a_long_cell_of_a_table_is_cut_and_the_other_formats_have_all_of_it(pgqrs, work):
    with work() as service:
        service.queues.create("mail")
        service.enqueue("mail", "x" * 100_000)
    assert len(pgqrs("message", "list").stdout) < 3000
    assert "100,000 characters" in pgqrs("message", "list").stdout
    assert pgqrs.json("message", "list")[0]["payload"] == "x" * 100_000


# ------------------------------------------------------------------- other programs and shells


@each_case(
    ("shell", "needle"), [("bash", "complete -o nosort"), ("zsh", "#compdef"), ("fish", "complete")]
)
def test_completion_prints_the_script_of_the_shell(nowhere, shell, needle):
    script = nowhere("completion", shell).stdout
    assert needle in script
    assert "_PGQRS_COMPLETE" in script


def test_the_shell_completes_commands_and_options(nowhere):
    def completed(words: str, run=nowhere.process) -> set[str]:
        count = len(words.split(" ")) - 1
        env = {"_PGQRS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        lines = run(env=env).stdout.splitlines()
        return {line.partition(",")[2] for line in lines}

    assert completed("pgqrs me", nowhere.interpreter) == {"message"}
    assert {"enqueue", "reschedule"} <= completed("pgqrs message ")
    assert "--state" in completed("pgqrs message list --s")


def test_flask_mounts_the_group(pgqrs, monkeypatch):
    monkeypatch.setenv("PGQRS_DSN", pgqrs.dsn)
    app = flask.Flask(__name__)
    app.cli.add_command(pgqrs_sa.cli.group)
    runner = app.test_cli_runner()
    made = runner.invoke(args=["pgqrs", "queue", "create", "mail"])
    assert made.exit_code == 0, made.output
    listed = runner.invoke(args=["pgqrs", "--format", "json", "queue", "list"])
    assert [item["name"] for item in json.loads(listed.stdout)] == ["mail"]
    missing = runner.invoke(args=["pgqrs", "queue", "get", "none"])
    assert missing.exit_code == 3
    assert missing.stderr.startswith("error: there is no queue 'none'")


def test_the_version_is_shown(nowhere):
    assert nowhere("--version").stdout.startswith("pgqrs_sa ")

"""Settings: where each comes from, and what is refused."""

from __future__ import annotations

import pytest

from pgqrs_sa import InvalidArgument
from pgqrs_sa.settings import Settings, Validation, database_url
from support.cases import each_case

DSN = "postgresql://ada:s3cret@db:5433/shop"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(environ=(), **arguments) -> Settings:
    return Settings.load(environ={"PGQRS_DSN": DSN, **dict(environ)}, **arguments)


def test_an_argument_wins_over_the_environment_and_that_over_a_file(elsewhere):
    (elsewhere / "pgqrs.toml").write_text('schema = "file"\nmax_read_ct = 7\nmax_connections = 3\n')
    settings = load({"PGQRS_SCHEMA": "environment", "PGQRS_MAX_READ_CT": "8"}, schema="argument")
    assert (settings.schema, settings.max_read_ct, settings.max_connections) == ("argument", 8, 3)


@each_case("name", ["pgqrs.yaml", "pgqrs.yml", "pgqrs.toml"])
def test_a_file_of_the_current_folder_is_read(elsewhere, name):
    line = 'schema = "x"' if name.endswith("toml") else "schema: x"
    (elsewhere / name).write_text(line)
    assert load().schema == "x"
    (elsewhere / name).unlink()


def test_the_file_that_is_named_is_read_instead(elsewhere):
    (elsewhere / "pgqrs.toml").write_text('schema = "here"')
    (elsewhere / "other.toml").write_text('schema = "there"')
    assert load({"PGQRS_CONFIG_FILE": "other.toml"}).schema == "there"
    assert load(config="other.toml").schema == "there"


@each_case(
    ("variable", "text", "says"),
    [
        ("PGQRS_MAX_READ_CT", "five", "PGQRS_MAX_READ_CT must be a whole number, not 'five'"),
        ("PGQRS_MAX_READ_CT", "0", "PGQRS_MAX_READ_CT must be 1 or more"),
        ("PGQRS_DEFAULT_LOCK_TIME", "-1", "PGQRS_DEFAULT_LOCK_TIME must be more than 0"),
        ("PGQRS_CONNECTION_TIMEOUT", "nan", "PGQRS_CONNECTION_TIMEOUT must be more than 0"),
        ("PGQRS_VALIDATION_CONFIG", "{", "PGQRS_VALIDATION_CONFIG must be JSON"),
        ("PGQRS_VALIDATION_CONFIG", '{"max_size": 1}', "keys that nobody reads: max_size"),
        ("PGQRS_CONFIG_FILE", "nowhere.toml", "the configuration nowhere.toml cannot be read"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_its_place(variable, text, says):
    with pytest.raises(InvalidArgument, match=says):
        load({variable: text})


@each_case(
    ("text", "says"),
    [
        ("max_read = 3", "settings that nobody reads: max_read"),
        ("max_read_ct = true", "pgqrs.toml: max_read_ct must be a whole number, not True"),
        ("max_read_ct = 2.5", "pgqrs.toml: max_read_ct must be a whole number, not 2.5"),
        ("schema = 3", "pgqrs.toml: schema must be a string, not 3"),
        ("schema = ", "the configuration pgqrs.toml is malformed"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_its_place(elsewhere, text, says):
    (elsewhere / "pgqrs.toml").write_text(text)
    with pytest.raises(InvalidArgument, match=says):
        load()


@each_case(
    "dsn",
    [
        "nonsense",
        "postgresql://u:s3cret@h:port/d",
        "postgresql://u:s3@cret@h/d",
        "mysql://u:s3cret@h",
    ],
)
def test_a_dsn_that_cannot_be_read_is_refused_without_being_shown(dsn):
    with pytest.raises(InvalidArgument) as caught:
        Settings.load(environ={"PGQRS_DSN": dsn})
    assert "s3" not in str(caught.value)


def test_settings_do_not_show_the_password():
    assert "s3cret" not in repr(load())


@each_case(
    ("dsn", "driver"),
    [
        ("postgres://h/d", "postgresql+psycopg"),
        ("postgresql://h/d", "postgresql+psycopg"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg"),
    ],
)
def test_a_dsn_without_a_driver_gets_one(dsn, driver):
    assert database_url(dsn).drivername == driver


def test_no_dsn_is_an_error_that_says_where_to_put_one():
    with pytest.raises(InvalidArgument, match="set PGQRS_DSN"):
        Settings.load(environ={})


def test_validation_is_checked_when_it_is_made():
    assert Validation(forbidden_keys=["a"]).forbidden_keys == ("a",)
    with pytest.raises(InvalidArgument, match=r"validation\.max_enqueue_burst must be 1 or more"):
        Validation(max_enqueue_burst=0)


def test_a_number_in_a_string_becomes_the_number():
    settings = Settings(DSN, max_read_ct="7", default_lock_time_seconds="2.5")
    assert (settings.max_read_ct, settings.default_lock_time_seconds) == (7, 2.5)
    assert Validation(max_payload_size_bytes="60").max_payload_size_bytes == 60

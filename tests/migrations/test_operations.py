"""``op.pgqrs_upgrade`` and ``op.pgqrs_downgrade`` in a revision, online and offline."""

from __future__ import annotations

import subprocess

import pytest
import sqlalchemy as sa
from alembic import command

from pgqrs_sa import migrations
from pgqrs_sa.errors import InvalidArgument, SchemaVersionError
from pgqrs_sa.migrations.ops import DowngradeOp, UpgradeOp
from pgqrs_sa.models import metadata

AWKWARD = ["jobs", 'Te"nant', "with space", "a:b%c", "sele'ct"]
VERSION_TABLE = {"public.alembic_version", "public.alembic_version_pkc", "public._alembic_version"}


def test_each_operation_is_the_other_ones_reverse():
    up = UpgradeOp(1, 3, "jobs")
    down = up.reverse()
    assert isinstance(down, DowngradeOp)
    assert down.to_diff_tuple() == ("pgqrs_downgrade", "jobs", 3, 1)
    assert down.reverse().to_diff_tuple() == ("pgqrs_upgrade", "jobs", 1, 3)


def test_a_downgrade_leaves_nothing_behind(host, relations):
    host.revision()
    host.upgrade()
    with host.connect() as connection:
        assert "public.pgqrs_messages" in relations(connection)
    host.downgrade()
    with host.connect() as connection:
        assert relations(connection) == VERSION_TABLE
    host.upgrade()
    host.check()


@pytest.mark.parametrize("schema", AWKWARD)
def test_a_named_schema_is_created_and_kept(host, schema, relations):
    host.write(f"op.pgqrs_upgrade(schema={schema!r})", f"op.pgqrs_downgrade(schema={schema!r})")
    host.upgrade()
    with host.connect() as connection:
        assert migrations.current_version(connection, schema) == 1
        assert migrations.current_version(connection) is None
        assert f"{schema}.pgqrs_messages" in relations(connection)
    host.downgrade()
    with host.connect() as connection:
        assert relations(connection) == VERSION_TABLE
        assert sa.inspect(connection).has_schema(schema)
    host.upgrade()


def test_a_schema_that_exists_needs_no_right_to_create_schemas(host):
    host.write("op.pgqrs_upgrade(schema='jobs')")
    owner = host.url
    with host.connect() as connection:
        name = connection.scalar(sa.text("SELECT current_database()"))
        role = f"plain_{name}"
        connection.execute(sa.text(f"CREATE ROLE {role}"))
        connection.execute(sa.text(f"CREATE SCHEMA jobs AUTHORIZATION {role}"))
        connection.execute(sa.text(f"GRANT ALL ON SCHEMA public TO {role}"))
        may_create = sa.text(f"SELECT has_database_privilege('{role}', '{name}', 'CREATE')")
        assert not connection.scalar(may_create)
    try:
        host.url = f"{owner}{'&' if '?' in owner else '?'}options=-c%20role%3D{role}"
        host.upgrade()
    finally:
        host.url = owner
        with host.connect() as connection:
            connection.execute(sa.text(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}"))


@pytest.mark.parametrize("schema", AWKWARD)
def test_offline_scripts_run_in_psql(host, database, schema, pg_bin, dump, relations):
    host.write("op.pgqrs_upgrade()", "op.pgqrs_downgrade()")
    host.write(f"op.pgqrs_upgrade(schema={schema!r})", f"op.pgqrs_downgrade(schema={schema!r})")
    up = host.sql(command.upgrade, "head")
    down = host.sql(command.downgrade, "head:base")

    def psql(script: str) -> None:
        arguments = [pg_bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null"]
        done = subprocess.run(
            [*arguments, database.dsn], input=script, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    psql(up)
    offline = dump(database.dsn)
    psql(down)
    with host.connect() as connection:
        assert relations(connection) == VERSION_TABLE
        connection.execute(sa.schema.DropSchema(schema))
        connection.execute(sa.text("DROP TABLE alembic_version"))
    host.upgrade()
    assert dump(database.dsn) == offline


def test_the_lock_is_the_first_statement_of_an_operation(host):
    host.write("op.pgqrs_upgrade()")
    text = host.sql(command.upgrade, "head")
    statements = text.partition("-- Running upgrade")[2].split("\n\n")
    assert statements[1] == f"SELECT pg_advisory_xact_lock({migrations.LOCK_KEY});"


def test_an_upgrade_over_create_all_says_to_stamp(host):
    number = host.write("op.pgqrs_upgrade()", "op.pgqrs_downgrade()")
    with host.connect() as connection:
        metadata.create_all(connection)
    with pytest.raises(SchemaVersionError, match="alembic stamp") as caught:
        host.upgrade()
    assert caught.value.installed == 1
    host.stamp(number)
    host.upgrade()
    host.check()
    host.downgrade()
    with host.connect() as connection:
        assert migrations.current_version(connection) is None


def test_a_downgrade_of_what_is_gone_says_to_stamp(host):
    number = host.write("op.pgqrs_upgrade()", "op.pgqrs_downgrade()")
    host.stamp(number)
    with pytest.raises(SchemaVersionError, match="alembic stamp"):
        host.downgrade()


def test_tables_without_their_stamp_are_not_touched(host):
    host.write("op.pgqrs_upgrade()")
    with host.connect() as connection:
        metadata.create_all(connection)
        connection.execute(sa.text("COMMENT ON TABLE pgqrs_queues IS NULL"))
    with pytest.raises(SchemaVersionError, match=r"COMMENT ON TABLE public\.pgqrs_queues"):
        host.upgrade()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("op.pgqrs_upgrade(to_version=99)", "older than the migration, upgrade the package"),
        ("op.pgqrs_upgrade(from_version=98, to_version=99)", "upgrade the package"),
        ("op.pgqrs_downgrade(from_version=99)", "older than the migration, upgrade the package"),
        ("op.pgqrs_upgrade(from_version=-1)", "version -1 is below 0"),
        ("op.pgqrs_downgrade(to_version=-1)", "version -1 is below 0"),
        ("op.pgqrs_upgrade(from_version=1, to_version=0)", "call op.pgqrs_downgrade"),
        ("op.pgqrs_upgrade(from_version=1, to_version=1)", "from version 1 to 1"),
        ("op.pgqrs_downgrade(from_version=0, to_version=1)", "call op.pgqrs_upgrade"),
    ],
)
def test_impossible_moves_are_refused_before_anything_runs(host, call, message, relations):
    host.write(call)
    with pytest.raises(InvalidArgument, match=message):
        host.upgrade()
    with host.connect() as connection:
        assert relations(connection) == set()


def test_a_failing_revision_takes_the_tables_back_with_it(host, relations):
    host.write("op.pgqrs_upgrade(); op.execute('SELECT 1 / 0')")
    with pytest.raises(sa.exc.DataError):
        host.upgrade()
    with host.connect() as connection:
        assert relations(connection) == set()

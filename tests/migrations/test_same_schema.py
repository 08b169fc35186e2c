"""The steps, ``create_all`` and plain autogenerate make the same tables."""

from __future__ import annotations

import re

import sqlalchemy as sa

from pgqrs_sa.models import metadata

PLAIN = 'OPTIONS = {"target_metadata": [pgqrs_metadata, Base.metadata]}'
CONVENTION = """
names = {{
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
}}

class Own(DeclarativeBase):
    metadata = sa.MetaData(naming_convention=names)

class Queue(models.QueueMixin, Own): ...
class OwnMessage(models.MessageMixin, Own): ...
class Archived(models.ArchivedMessageMixin, Own): ...
class Worker(models.WorkerMixin, Own): ...

OPTIONS = {{"target_metadata": Own.metadata{plugins}}}
"""
# SQLAlchemy 2.0 has no storage parameters on Table, so Alembic has nothing to write them from.
SETS_STORAGE = sa.__version__ >= "2.1"


def create_all(url: str) -> None:
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        metadata.create_all(connection)


def without_storage(dumped: str) -> str:
    return re.sub(r"\)\nWITH \(autovacuum[^)]*\);", ");", dumped)


def test_the_steps_make_what_create_all_makes(host, database, dump):
    host.write("op.pgqrs_upgrade()", "op.pgqrs_downgrade()")
    host.upgrade()
    by_steps = dump(database.dsn)
    host.downgrade()
    create_all(database.url)
    assert by_steps == dump(database.dsn)
    assert "autovacuum_vacuum_scale_factor='0.01'" in by_steps
    assert "pgqrs_sa:schema=1" in by_steps


def test_plain_autogenerate_makes_what_create_all_makes(host, database, dump):
    host.declare(PLAIN)
    assert "op.pgqrs_upgrade" not in host.revision()
    host.upgrade()
    plain = dump(database.dsn)
    host.downgrade()
    create_all(database.url)
    made = dump(database.dsn)
    assert plain == (made if SETS_STORAGE else without_storage(made))


def test_plain_autogenerate_is_clean_after_the_steps(host):
    host.write("op.pgqrs_upgrade()")
    host.upgrade()
    host.declare(PLAIN)
    host.check()


def test_the_plugin_is_clean_after_create_all_and_after_plain_autogenerate(host, database):
    create_all(database.url)
    host.check()


def test_a_naming_convention_of_the_host_renames_nothing(host, database, dump):
    host.write("op.pgqrs_upgrade()", "op.pgqrs_downgrade()")
    host.upgrade()
    usual = dump(database.dsn)
    host.downgrade()
    host.declare(CONVENTION.format(plugins=', "autogenerate_plugins": PLUGINS'))
    host.upgrade()
    assert dump(database.dsn) == usual
    host.check()
    host.downgrade()


def test_a_naming_convention_and_plain_autogenerate(host, database, dump):
    host.declare(CONVENTION.format(plugins=""))
    assert "op.pgqrs_upgrade" not in host.revision()
    host.upgrade()
    plain = dump(database.dsn)
    host.downgrade()
    create_all(database.url)
    made = dump(database.dsn)
    assert plain == (made if SETS_STORAGE else without_storage(made))

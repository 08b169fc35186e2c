"""One release's code on another's tables, as during a deployment: a release to come, simulated.

Its step only adds, like every step that can be deployed without a pause. What it does to data is
in ``test_next_release.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Item, Message, QueueService, Retry, SchemaVersionError, migrations
from support.consumers import Kit, effect, kit_for
from support.waiting import until

RELEASE_2 = """
import sys, types
import sqlalchemy as sa
from pgqrs_sa import migrations, models

TABLES = ("pgqrs_messages", "pgqrs_archive")

def upgrade(op, schema):
    for name in TABLES:
        op.add_column(name, sa.Column("trace_id", sa.Text), schema=schema)
        op.create_index(name + "_trace_idx", name, ["trace_id"], schema=schema)
    op.alter_column("pgqrs_queues", "lease_seconds", server_default="45", schema=schema)

def downgrade(op, schema):
    for name in TABLES:
        op.drop_column(name, "trace_id", schema=schema)

step = types.SimpleNamespace(upgrade=upgrade, downgrade=downgrade)
migrations.STEPS = {**migrations.STEPS, 2: step}
migrations.LATEST = models.SCHEMA_VERSION = 2
migrations.OLDEST = OLDEST_OF_IT
"""
MIGRATE = """
from alembic.config import main
main(argv=["-c", INI, *sys.argv[1:]])
"""
WORK = """
from sqlalchemy.orm import Session, sessionmaker
from pgqrs_sa import Consumer, Delivery, QueueService

engine = sa.create_engine(URL)
consumer = Consumer(sessionmaker(engine), poll_interval=0.02)

@consumer.on("mail")
def handle(delivery: Delivery) -> None:
    print(f"done {delivery.payload}\\n", end="")  # in one piece: two threads do

with Session(engine) as session, session.begin():
    QueueService(session).check_schema()
    QueueService(session).enqueue("mail", "of release 2")
consumer.run(until_empty=True)
"""


@pytest.fixture
def release_2(host: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs some code with the next release."""
    ini = host.folder / "alembic.ini"
    text = f"[alembic]\nscript_location = {host.folder}\nurl = {host.url}\n"
    ini.write_text(text.replace("%", "%%"))

    def run(code: str, *arguments: str, oldest: int = 1) -> subprocess.CompletedProcess[str]:
        script = (RELEASE_2 + code).replace("OLDEST_OF_IT", str(oldest))
        script = script.replace("INI", repr(str(ini))).replace("URL", repr(host.url))
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=os.environ, capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip

    return run


@pytest.fixture
def last(host: Any) -> Any:
    """A host with the tables of this release, and a queue in them."""
    host.write("op.pgqrs_upgrade(from_version=0, to_version=1)")
    host.upgrade()
    with Session(sa.create_engine(host.url, poolclass=sa.NullPool)) as session, session.begin():
        QueueService(session).queues.create("mail")
    return host


@pytest.fixture
def upgrade(last: Any, release_2: Any) -> Callable[[], None]:
    """Return a function that upgrades to the next release."""
    last.write("op.pgqrs_upgrade(from_version=1, to_version=2)")

    def run() -> None:
        done = release_2(MIGRATE, "upgrade", "head")
        assert done.returncode == 0, done.stderr
        with last.connect() as connection:
            assert migrations.current_version(connection) == 2

    return run


@pytest.fixture(params=["threads", "psycopg", "asyncpg"])
def kit(request: pytest.FixtureRequest, database: Any, last: Any) -> Iterator[Kit]:
    kit = kit_for(database, request.param)
    kit.sql(
        "CREATE TABLE effects (id bigserial PRIMARY KEY, msg_id bigint, read_ct int, note text)"
    )
    yield kit
    kit.close()


def test_consumers_of_this_release_work_on_while_the_tables_become_those_of_the_next(
    kit: Kit, upgrade: Callable[[], None]
) -> None:
    """On connections that have prepared their statements before."""
    consumer = kit.consumer(housekeeping=0.05)

    @consumer.on("mail", retry=Retry(base=0, jitter=0))
    def handler(session: Any, delivery: Any) -> None:
        effect(session, delivery)
        if delivery.payload % 3 == 0 and delivery.read_ct == 1:
            raise ValueError("not at once")

    consumer.start()
    ids = kit.send(*range(30))
    until(lambda: len(kit.archive()) >= 10, "many are done before")
    upgrade()
    ids += kit.send(*range(30))
    until(lambda: len(kit.archive()) == 60, "all are done")
    assert consumer.stop() == 0
    assert kit.outcomes() == dict.fromkeys(ids, "archived")
    assert sorted(id_ for id_, _ in kit.effects()) == sorted(ids)


def test_a_session_of_this_release_does_everything_on_the_tables_of_the_next(
    last: Any, upgrade: Callable[[], None]
) -> None:
    engine = sa.create_engine(last.url)
    with Session(engine) as session:
        service = QueueService(session)
        service.check_schema()
        before = service.enqueue("mail", "before")
        session.commit()
        upgrade()
        service.enqueue("mail", 1, key="k")
        service.enqueue_many("mail", [2, Item(3, key="l")])
        service.enqueue_from("mail", sa.select(sa.literal(4)))
        session.add(Message(queue_name="mail", payload=5))
        session.commit()
        worker = service.workers.register("w", queues=["mail"])
        first, *others = service.dequeue("mail", 9, worker=worker)
        assert first.id == before.id
        assert [other.payload for other in others] == [1, 2, 3, 4, 5]
        service.fail(first, "no", dead=True)
        service.archive_many(others)
        (letter,) = service.archived.find("mail", outcome="dead")
        assert service.archived.requeue(letter.id).id == before.id
        session.commit()
        found = session.scalars(sa.select(Message)).one()
        assert (found.id, found.payload, found.ready) == (before.id, "before", True)
        # A process of this release that starts now says that it is too old, before it does harm.
        with pytest.raises(SchemaVersionError, match="pip install --upgrade pgqrs-sa"):
            service.check_schema()
    engine.dispose()


def test_the_next_release_works_on_the_tables_of_this_one_as_long_as_it_says_so(
    last: Any, release_2: Any
) -> None:
    with Session(sa.create_engine(last.url, poolclass=sa.NullPool)) as session, session.begin():
        QueueService(session).enqueue("mail", "of release 1")
    done = release_2(WORK, oldest=1)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["done of release 1", "done of release 2"]


def test_a_release_that_needs_its_tables_says_so_before_it_writes_anything(
    last: Any, release_2: Any
) -> None:
    done = release_2(WORK, oldest=2)
    assert done.returncode != 0
    assert "run `alembic upgrade head`" in done.stderr
    with last.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqrs_messages")) == 0
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqrs_workers")) == 0

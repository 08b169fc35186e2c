"""What one set of extras can do: run with the Python of an environment that has just that set.

::

    python probe.py DSN EXTRA...

Ends with an error at the first thing that does not work.
"""

from __future__ import annotations

import inspect
import json
import os
import pydoc
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDS = {
    "AsyncConsumer": {"asyncio", "consumer"},
    "AsyncQueueService": {"asyncio"},
    "Consumer": {"consumer"},
}
"""The public names that need extras."""

SYNC_APP = """
import os
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from pgqrs_sa import Consumer

consumer = Consumer(sessionmaker(create_engine(os.environ["APP_URL"])), concurrency=1)

@consumer.on("mail")
def handle(payload: dict, session: Session) -> None:
    assert payload == {"n": 1}
"""

ASYNC_APP = """
import os
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from pgqrs_sa import AsyncConsumer

engine = create_async_engine(os.environ["APP_URL"])
consumer = AsyncConsumer(async_sessionmaker(engine), concurrency=1)

@consumer.on("mail")
async def handle(payload: dict, session: AsyncSession) -> None:
    assert payload == {"n": 1}
"""


def check_libraries(extras: set[str]) -> None:
    for library, extra in (("greenlet", "asyncio"), ("tenacity", "consumer"), ("click", "cli")):
        assert (find_spec(library) is not None) == (extra in extras), library


def check_names(extras: set[str]) -> None:
    import pgqrs_sa

    names: dict[str, Any] = {}
    exec("from pgqrs_sa import *", names)  # noqa: S102
    assert set(pgqrs_sa.__all__) <= names.keys()
    assert set(pgqrs_sa.__all__) <= dict(inspect.getmembers(pgqrs_sa)).keys()
    assert "QueueService" in pydoc.render_doc(pgqrs_sa)
    assert pgqrs_sa.__version__[0].isdigit()
    for name, needed in NEEDS.items():
        missing = needed - extras
        try:
            names[name](None)
        except ImportError as error:
            if f"pip install 'pgqrs-sa[{','.join(sorted(missing))}]'" not in str(error):
                raise
        except pgqrs_sa.InvalidArgument:
            assert not missing, name


def check_plain_session(url: str) -> None:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from pgqrs_sa import QueueService, metadata

    engine = sa.create_engine(url)
    metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
        QueueService(session).enqueue("mail", {"n": 1})
    with Session(engine) as session, session.begin():
        (delivery,) = QueueService(session).dequeue("mail")
    with Session(engine) as session, session.begin():
        QueueService(session).archive(delivery)
    with Session(engine) as session, session.begin():
        QueueService(session).enqueue("mail", {"n": 1})
    engine.dispose()


def check_async_session(url: str) -> None:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    from pgqrs_sa import AsyncQueueService, metadata

    async def work() -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            await AsyncQueueService(session).queues.create("mail")
            await AsyncQueueService(session).enqueue("mail", {"n": 1})
        async with AsyncSession(engine) as session, session.begin():
            (delivery,) = await AsyncQueueService(session).dequeue("mail")
        async with AsyncSession(engine) as session, session.begin():
            await AsyncQueueService(session).archive(delivery)
            await AsyncQueueService(session).enqueue("mail", {"n": 1})
        await engine.dispose()

    asyncio.run(work())


def pgqrs(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "pgqrs"
    return subprocess.run(
        [program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check_command_line(extras: set[str], dsn: str) -> None:
    done = pgqrs("--help")
    if "cli" not in extras:
        assert done.returncode == 2, done
        assert "pip install 'pgqrs-sa[cli]'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    if "psycopg" in extras:
        done = pgqrs("queue", "list", "--format", "json", "--dsn", dsn)
        assert done.returncode == 0, done.stderr
        assert [row["name"] for row in json.loads(done.stdout)] == ["mail"]


def check_consumer(extras: set[str], app: str, url: str) -> None:
    """The message that is left is worked on, by the command line where there is one."""
    Path("app_jobs.py").write_text(app)
    if "cli" in extras:
        for command in (["check"], ["run", "--until-empty"]):
            done = pgqrs("worker", *command, "app_jobs:consumer", APP_URL=url)
            assert done.returncode == 0, done.stderr
        return
    os.environ["APP_URL"] = url
    sys.path.insert(0, str(Path.cwd()))
    import asyncio

    from app_jobs import consumer

    code = consumer.run(until_empty=True)
    assert (asyncio.run(code) if inspect.isawaitable(code) else code) == 0


COUNT = "SELECT count(*) FROM pgqrs_messages"


def check_empty(url: str) -> None:
    import sqlalchemy as sa

    with sa.create_engine(url).connect() as connection:
        assert connection.execute(sa.text(COUNT)).scalar() == 0


def check_empty_async(dsn: str) -> None:
    import asyncio

    import asyncpg

    async def look() -> Any:
        connection = await asyncpg.connect(dsn)
        return await connection.fetchval(COUNT)

    assert asyncio.run(look()) == 0


def check_migrations(url: str) -> None:
    import sqlalchemy as sa
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    from pgqrs_sa import migrations  # noqa: F401

    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA jobs"))
        op: Any = Operations(MigrationContext.configure(connection))
        op.pgqrs_upgrade(from_version=0, to_version=1, schema="jobs")
        assert sa.inspect(connection).has_table("pgqrs_messages", schema="jobs")


def main(dsn: str, extras: set[str]) -> None:
    """Check everything that the set is for."""
    sync = dsn.replace("postgresql:", "postgresql+psycopg:")
    asynchronous = dsn.replace("postgresql:", "postgresql+asyncpg:")
    check_libraries(extras)
    check_names(extras)
    if "psycopg" in extras:
        check_plain_session(sync)
        if "asyncio" in extras:
            check_async_session(sync)
        if "alembic" in extras:
            check_migrations(sync)
    elif {"asyncpg", "asyncio"} <= extras:
        check_async_session(asynchronous)
    check_command_line(extras, dsn)
    if {"psycopg", "consumer"} <= extras:
        check_consumer(extras, SYNC_APP, sync)
        check_empty(sync)
        if "asyncio" in extras:
            check_async_session(sync)
            check_consumer(extras, ASYNC_APP, sync)
            check_empty(sync)
    elif {"asyncpg", "asyncio", "consumer"} <= extras:
        check_consumer(extras, ASYNC_APP, asynchronous)
        check_empty_async(dsn)


if __name__ == "__main__":
    main(sys.argv[1], set(sys.argv[2:]))

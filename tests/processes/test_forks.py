"""A parent that has used the engine before it forks, as gunicorn does with ``--preload``."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress

import pytest

from support.processes import KINDS, settings_of
from support.scripts import Script
from support.servers import run_sql

PARENT = """
import asyncio, os, signal, threading
os.setpgrp()
from support.consumer_program import make_async, make_sync

if args["kind"] == "sync":
    consumer, engine = make_sync(args, None)
    run = consumer.run

    def used():
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT pg_backend_pid()"))
else:
    consumer, engine = make_async(args, None)
    run = lambda: asyncio.run(consumer.run())
    loop = asyncio.new_event_loop()

    async def use():
        async with engine.connect() as connection:
            return await connection.scalar(sa.text("SELECT pg_backend_pid()"))

    def used():
        return loop.run_until_complete(use())

backend = used()
children = []
for _ in range(2):
    if (pid := os.fork()) == 0:
        if args["kind"] != "sync":
            asyncio.set_event_loop(None)
        code = 9
        try:
            code = run()
        finally:
            os._exit(code)
    children.append(pid)
say("forked", children=children)
same = all(used() == backend for _ in range(200))
hear("go")
for pid in children:
    os.kill(pid, signal.SIGTERM)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
say("ended", codes=codes, same=same and used() == backend)
if args["kind"] == "sync":
    # The parent may work as well.
    threading.Thread(target=lambda: (hear("stop"), consumer.stop())).start()
    say("worked", code=run())
"""


@contextmanager
def family(code=PARENT, **args):
    """A parent whose children end with it."""
    with Script(code, **args) as parent:
        try:
            yield parent
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
def test_children_of_a_parent_that_used_the_engine_work_and_leave_its_connections_alone(
    fleet, kind
):
    args = settings_of(fleet.address, kind, name=kind)
    with family(**args) as parent:
        children = parent.expect("forked")["children"]
        fleet.registered(2)
        fleet.send(*[{"ms": 1}] * 60)
        fleet.emptied()
        parent.tell("go")
        assert parent.expect("ended") == {"codes": [0, 0], "same": True}, parent.errors
        if kind == "sync":
            fleet.send({})
            fleet.emptied()
            parent.tell("stop")
            assert parent.expect("worked") == {"code": 0}
        assert parent.wait() == 0, parent.errors
    rows = run_sql(fleet.address, "SELECT pid, status FROM pgqrs_workers ORDER BY id")
    assert {pid for pid, _ in rows[:2]} == set(children)
    assert {status for _, status in rows} == {"stopped"}
    assert fleet.audit().archived == 60 + (kind == "sync")


FORKS = """
import asyncio, logging, os
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from pgqrs_sa import AsyncConsumer, Consumer

os.setpgrp()
logging.basicConfig()

def fork(session):
    child = os.fork()
    if child == 0:
        if args["how"] == "raises":
            raise ValueError("of the child")
        if args["how"] == "exits":
            sys.exit(7)
        return
    say("ended", code=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    session.execute(sa.text("SELECT 1"))  # the connection is still its own

if args["kind"] == "sync":
    consumer = Consumer(sessionmaker(sa.create_engine(args["url"])), poll_interval=0.02)

    @consumer.on("mail")
    def handler(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        fork(session)

    say("over", code=consumer.run(until_empty=True))
else:
    engine = create_async_engine(args["url"])
    consumer = AsyncConsumer(async_sessionmaker(engine), poll_interval=0.02)

    @consumer.on("mail")
    async def handler(session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1"))
        await session.run_sync(fork)

    say("over", code=asyncio.run(consumer.run(until_empty=True)))
"""


@pytest.mark.parametrize(("how", "code"), [("returns", 1), ("raises", 1), ("exits", 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_child_that_was_forked_in_a_handler_and_comes_back_from_it_ends(fleet, kind, how, code):
    fleet.send({})
    with family(FORKS, **settings_of(fleet.address, kind, how=how)) as parent:
        assert parent.expect("ended") == {"code": code}, parent.errors
        assert parent.expect("over") == {"code": 0}, parent.errors
        assert parent.wait() == 0
        assert "was forked in a handler" in parent.errors
    assert run_sql(fleet.address, "SELECT outcome FROM pgqrs_archive") == [("archived",)]

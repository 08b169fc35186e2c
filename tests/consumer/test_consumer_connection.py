"""The consumer's own connections, and what a pooler in transaction mode does to them."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import Item, QueueService
from pgqrs_sa._core import enqueue, wakeup
from pgqrs_sa._core.scope import Context
from pgqrs_sa.consumer import store
from pgqrs_sa.consumer.connection import AsyncConnector, ConsumerConnection, SyncConnector
from pgqrs_sa.models import READY_MADE
from pgqrs_sa.resources.workers import set_status
from support.proxy import Proxy
from support.servers import Address
from support.waiting import PATIENCE, until

CONTEXT = Context.of(READY_MADE, None, None, allow_autocommit=True)
FOR_PGBOUNCER = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: f"pgqrs_{uuid4().hex}",
}


def settle_and_lease(scope, *leasing):
    """Send the statement, and wait for it."""
    return store.SettleAndLease(scope, *leasing).run(scope)


def transactions(scope):
    """How many transactions two statements are."""
    return len({scope.session.scalar(sa.text(f"SELECT now() -- {n}")) for n in range(2)})


@pytest.mark.parametrize(("settings", "expected"), [({}, 2), (FOR_PGBOUNCER, 1)])
def test_asyncpg_set_up_for_pgbouncer_sends_no_statement_outside_a_transaction(
    migrated, settings, expected
):
    """It prepares each statement before it runs it: two rounds, that belong to one server."""
    url = migrated.direct.async_url("asyncpg")
    engine = create_async_engine(url, poolclass=sa.NullPool, connect_args=settings)
    line = ConsumerConnection(AsyncConnector(engine), threading.Event(), deadline=30)
    assert line.run_once(CONTEXT, transactions) == expected
    line.run_once(CONTEXT, create)
    line.close()
    with sa.create_engine(migrated.url, poolclass=sa.NullPool).connect() as other:
        assert other.scalar(sa.text("SELECT count(*) FROM pgqrs_queues")) == 1


@pytest.fixture(params=["psycopg", "psycopg_async", "asyncpg"])
def line(request, migrated):
    url = migrated.direct
    if request.param == "psycopg":
        connector = SyncConnector(sa.create_engine(url.url, poolclass=sa.NullPool))
    else:
        driver = request.param.removesuffix("_async")
        connector = AsyncConnector(
            create_async_engine(url.async_url(driver), poolclass=sa.NullPool)
        )
    line = ConsumerConnection(connector, threading.Event(), deadline=30)
    yield line
    line.close()


def test_a_server_whose_default_is_another_level_gets_read_committed(migrated):
    """A statement outside of a transaction would have the server's default."""
    options = {"options": "-c default_transaction_isolation=serializable"}
    engine = sa.create_engine(migrated.direct.url, poolclass=sa.NullPool, connect_args=options)
    line = ConsumerConnection(SyncConnector(engine), threading.Event(), deadline=30)

    def level(scope):
        return scope.session.scalar(sa.text("SHOW transaction_isolation"))

    assert [line.run_once(CONTEXT, level), line.transaction(CONTEXT, level)] == [
        "read committed"
    ] * 2
    line.close()


def create(scope):
    queues = QueueService(scope.session, allow_autocommit=True)
    queues.queues.create("mail")
    return queues.workers.register("a", queues=["mail"]).id


def states(session):
    return list(
        session.scalars(
            sa.text(
                "SELECT state FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
        )
    )


def test_a_line_is_in_no_transaction_between_two_calls(line, engine):
    for call in (line.run_once, line.transaction, line.run_once, line.run_once, line.transaction):
        call(CONTEXT, transactions)
        with engine.connect() as other:
            assert states(other) == ["idle"]


def test_each_statement_of_a_line_is_there_for_others_at_once(line, engine):
    def work(scope):
        create(scope)
        with engine.connect() as other:
            return other.scalar(sa.text("SELECT count(*) FROM pgqrs_queues"))

    assert line.run_once(CONTEXT, work) == 1


def test_what_a_line_enqueues_is_told_to_the_consumers_of_this_process(line):
    line.run_once(CONTEXT, create)
    told = []
    forget = wakeup.subscribe(told.append)
    for call in (line.run_once, line.run_once, line.transaction):
        call(CONTEXT, enqueue.one, "mail", Item(1))
        assert "mail" in told
        told.clear()
    forget()


def test_a_line_goes_on_from_what_it_has_leased(line):
    """Its cursor: each lease is committed when it returns."""
    worker = line.run_once(CONTEXT, create)
    context = Context.of(READY_MADE, None, worker, allow_autocommit=True)
    line.run_once(context, enqueue.many, "mail", range(6))
    leased = []
    for _ in range(3):
        turn = line.run_once(
            context, settle_and_lease, leased, "mail", 2, timedelta(minutes=1), None
        )
        assert turn.settled == {delivery.id for delivery in leased}
        leased = turn.leased
        assert len(leased) == 2
    went_on = []

    def watch(scope):
        def note(*told):
            went_on.append(told[4].compiled_parameters[0]["cursor"] is not None)

        sa.event.listen(scope.session.connection(), "before_cursor_execute", note)
        return settle_and_lease(scope, leased, "mail", 2, timedelta(minutes=1), None)

    assert line.run_once(context, watch).leased == []
    assert went_on == [True, False]  # nothing behind the cursor, and so a look from the beginning


def test_a_worker_that_is_suspended_leases_nothing_from_the_beginning_either(line):
    worker = line.run_once(CONTEXT, create)
    context = Context.of(READY_MADE, None, worker, allow_autocommit=True)
    line.run_once(context, enqueue.many, "mail", range(2))
    lease = "mail", 1, timedelta(minutes=1), None
    (first,) = line.run_once(context, settle_and_lease, [], *lease).leased
    line.run_once(context, set_status, worker, "suspended")
    turn = line.run_once(context, settle_and_lease, [first], *lease)
    assert (turn.settled, turn.leased) == ({first.id}, [])


def test_what_is_found_from_the_beginning_is_gone_on_from(line, engine):
    worker = line.run_once(CONTEXT, create)
    context = Context.of(READY_MADE, None, worker, allow_autocommit=True)
    lease = "mail", 1, timedelta(minutes=1), None
    with Session(engine) as late:
        QueueService(late).enqueue_many("mail", ["late", "later"])
        line.run_once(context, enqueue.many, "mail", [1])
        assert line.run_once(context, settle_and_lease, [], *lease).leased[0].payload == 1
        late.commit()
    began = []

    def watch(scope):
        def note(*told):
            began.append(told[4].compiled_parameters[0]["cursor"] is not None)

        sa.event.listen(scope.session.connection(), "before_cursor_execute", note)
        turn = settle_and_lease(scope, [], *lease)
        sa.event.remove(scope.session.connection(), "before_cursor_execute", note)
        return turn

    assert line.run_once(context, watch).leased[0].payload == "late"
    assert line.run_once(context, watch).leased[0].payload == "later"
    assert began == [True, False, True]


def test_a_transaction_is_one_also_where_each_call_commits_by_itself(line):
    assert line.run_once(CONTEXT, transactions) == 2
    assert line.transaction(CONTEXT, transactions) == 1
    assert line.run_once(CONTEXT, transactions) == 2


@pytest.mark.parametrize(("deadline", "cuts"), [(-1.0, 1), (3600.0, 0)])
def test_a_call_that_takes_too_long_is_cut_and_none_that_has_ended(deadline, cuts):
    class Connector:
        cuts = 0

        def run(self, work):
            line.abort_if_stuck()
            return work(None)

        def abort(self):
            self.cuts += 1

    connector = Connector()
    line = ConsumerConnection(connector, threading.Event(), deadline)
    line._timed(lambda _: None)
    line.abort_if_stuck()
    assert connector.cuts == cuts


def test_a_call_that_fails_is_told_and_its_connection_dropped():
    told = []

    class Connector:
        def run(self, _work):
            raise ConnectionError

        def discard(self):
            told.append("dropped")

    line = ConsumerConnection(Connector(), threading.Event(), deadline=30)
    line.on_failure = lambda: told.append("trouble")
    with pytest.raises(ConnectionError):
        line.run_once(CONTEXT, create)
    assert told == ["dropped", "trouble"]


@pytest.mark.parametrize(
    ("hurried", "error", "told"),
    [
        (True, OSError(), "the database is away: OSError"),
        (False, OSError(), "the consumer cannot go on"),
        (True, ValueError(), "the consumer cannot go on"),
    ],
)
def test_a_database_that_is_away_at_the_end_is_no_error(caplog, hurried, error, told):
    line = ConsumerConnection(None, threading.Event(), deadline=30)
    if hurried:
        line.stopping.set()
    line.log_failure(error, 7)
    assert caplog.messages == [told]


def test_a_call_may_be_cut_whatever_it_does():
    cuts = []
    line = ConsumerConnection(
        SimpleNamespace(abort=lambda: cuts.append(None)), threading.Event(), deadline=30
    )
    line.abort()
    assert len(cuts) == 1


class Echo:
    """A statement in two halves, which gives its parameter back."""

    statement = sa.select(sa.cast(sa.bindparam("value"), sa.Text).label("value"))

    def __init__(self, _scope, text):
        self.values = {"value": text}

    def read(self, rows):
        return rows[0].value


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("before_cursor_execute", False),
        ("after_execute", False),
        ("do_execute", False),
        ("handle_error", False),
        ("do_connect", True),  # as an application does it whose password changes
    ],
)
def test_listeners_are_shown_each_statement(migrated, event, expected):
    engine = sa.create_engine(migrated.direct.url, poolclass=sa.NullPool)
    sa.event.listen(engine, event, lambda *_args, **_kwargs: None)
    line = ConsumerConnection(SyncConnector(engine), threading.Event(), deadline=30)
    line.run_once(CONTEXT, create)
    assert line.can_send is expected
    line.close()


@pytest.mark.parametrize("kind", ["psycopg", "psycopg_async"])
def test_the_return_of_a_connection_that_has_gone_silent_can_be_cut(migrated, kind):
    host, port = migrated.direct.server.host, migrated.direct.server.port
    address = Address(host, port, migrated.direct.server.user, migrated.name)
    with Proxy(address.target) as proxy:
        url = address.via(*proxy.address).url(kind)
        if kind == "psycopg":
            connector = SyncConnector(sa.create_engine(url))
        else:
            connector = AsyncConnector(create_async_engine(url))
        line = ConsumerConnection(connector, threading.Event(), deadline=30)
        line.run_once(CONTEXT, create)
        assert line.can_send
        assert line.receive(line.send(CONTEXT, Echo, "x")) == "x"
        proxy.freeze()
        closing = threading.Thread(target=line.close, daemon=True)
        closing.start()
        until(lambda: line._call_started_at is not None, "it waits for the server")
        line.abort()
        closing.join(PATIENCE)
        assert not closing.is_alive()


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "READ COMMITTED"])
def test_it_is_known_whether_the_applications_connections_commit_by_themselves(migrated, isolation):
    engine = sa.create_engine(migrated.url, isolation_level=isolation, poolclass=sa.NullPool)
    line = ConsumerConnection(SyncConnector(engine), threading.Event(), deadline=30)
    line.run_once(CONTEXT, transactions)
    assert line.is_autocommit is (isolation == "AUTOCOMMIT")
    line.close()


@pytest.mark.parametrize(("error", "stopped"), [(ValueError("a bug"), False), (OSError(), True)])
def test_what_does_not_pass_or_is_not_waited_for_is_tried_once(error, stopped):
    line = ConsumerConnection(None, threading.Event(), deadline=30)
    tries = []

    def run_once(*_):
        tries.append(None)
        raise error

    line.run_once = run_once
    if stopped:
        line.stopping.set()
    with pytest.raises(type(error)):
        line.run("a test", CONTEXT, create)
    assert len(tries) == 1


def test_what_passes_is_tried_until_it_works():
    line = ConsumerConnection(None, threading.Event(), deadline=30)
    answers = [OSError(), OSError(), "done"]

    def run_once(*_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    line.run_once = run_once
    assert line.run("a test", CONTEXT, create) == "done"


def test_a_line_works_on_after_an_error(line):
    def fail(scope):
        scope.session.execute(sa.text("SELECT 1 / 0"))

    line.run_once(CONTEXT, create)
    for call in (line.run_once, line.transaction):
        with pytest.raises(sa.exc.DBAPIError):
            call(CONTEXT, fail)
        assert line.run_once(CONTEXT, transactions) == 2


@pytest.mark.parametrize(("seconds", "expected"), [(0.05, "closed"), (60, "cancelled")])
def test_what_a_call_has_left_in_its_loop_ends_before_the_loop(migrated, seconds, expected):
    """SQLAlchemy closes the connection of a cancelled call in such a task."""
    ends = []

    async def close():
        try:
            await asyncio.sleep(seconds)
            ends.append("closed")
        finally:
            ends.append("cancelled")

    def leave(scope):
        return asyncio.get_running_loop().create_task(close())

    engine = create_async_engine(migrated.direct.async_url("asyncpg"), poolclass=sa.NullPool)
    line = ConsumerConnection(AsyncConnector(engine), threading.Event(), deadline=30)
    task = line.run_once(CONTEXT, leave)
    line.close()
    assert task.done()
    assert ends[0] == expected

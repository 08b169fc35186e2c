"""The plans must not flip: a queue table is analysed while it is empty all the time.

Each state of the statistics is made for real, and the plan that PostgreSQL then runs is read, for
the very statements of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.orm import Session

from pgqrs_sa import QueueService
from pgqrs_sa._core import states
from pgqrs_sa._core.cursor import CursorSnapshot, Position
from pgqrs_sa._core.sql import archive, consume, enqueue, lease, messages, settle
from pgqrs_sa._core.tables import tables_of
from pgqrs_sa.models import READY_MADE
from support.cases import each_case

BACKLOG = 20_000
FILL = (
    "INSERT INTO pgqrs_messages (queue_id, payload, vt, priority) "
    "SELECT 1, '{}', statement_timestamp() + interval '1 s' * :ahead, 0 "
    "FROM generate_series(1, :rows)"
)
Fill = Callable[..., None]


def never_analysed(run: Callable[[str], None], fill: Fill) -> None:
    fill(BACKLOG)


def analysed_while_empty(run: Callable[[str], None], fill: Fill) -> None:
    run("VACUUM ANALYZE pgqrs_messages")
    fill(BACKLOG)


def analysed_while_full(run: Callable[[str], None], fill: Fill) -> None:
    fill(BACKLOG)
    run("VACUUM ANALYZE pgqrs_messages")


def drained_since_it_was_analysed(run: Callable[[str], None], fill: Fill) -> None:
    fill(BACKLOG)
    run("ANALYZE pgqrs_messages")
    run("DELETE FROM pgqrs_messages WHERE id <= (SELECT max(id) - 500 FROM pgqrs_messages)")


def purged_and_refilled(run: Callable[[str], None], fill: Fill) -> None:
    fill(BACKLOG)
    run("DELETE FROM pgqrs_messages")
    run("VACUUM ANALYZE pgqrs_messages")
    fill(BACKLOG)


def all_but_a_few_in_the_future(run: Callable[[str], None], fill: Fill) -> None:
    fill(BACKLOG, ahead=3600)
    fill(500)


STATES = [
    never_analysed,
    analysed_while_empty,
    analysed_while_full,
    drained_since_it_was_analysed,
    purged_and_refilled,
    all_but_a_few_in_the_future,
]


@pytest.fixture
def migrated(fresh: Any) -> Any:
    """Never analysed means never: no database that a test before this one has used."""
    return fresh


def database(like: Any, name: str, template: str) -> DatabaseJanitor:
    """Return what makes a copy of a database, and drops it."""
    janitor = DatabaseJanitor(
        user=like.user,
        host=like.host,
        port=like.port,
        dbname=name,
        template_dbname=template,
        maintenance_dbname=like.maintenance_dbname,
        password=like.password,
    )
    janitor.drop()
    return janitor


@contextmanager
def autocommitting(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@pytest.fixture(scope="module", params=STATES, ids=lambda state: state.__name__)
def state(request: pytest.FixtureRequest, pg_migrated: Any, url_of: Any) -> Iterator[str]:
    """Make each state once, in a database of its own; return the name of that."""
    name = "pgqrs_plans_state"
    with database(pg_migrated, name, pg_migrated.template_dbname):
        with autocommitting(url_of(name)) as connection:

            def run(sql: str) -> None:
                connection.execute(sa.text(sql))

            def fill(rows: int, ahead: int = 0) -> None:
                connection.execute(sa.text(FILL), {"rows": rows, "ahead": ahead})

            # What autovacuum would do at some moment, the states do at theirs.
            run("ALTER TABLE pgqrs_messages SET (autovacuum_enabled = off)")
            run(
                "INSERT INTO pgqrs_queues (id, queue_name)"
                " OVERRIDING SYSTEM VALUE VALUES (1, 'mail')"
            )
            request.param(run, fill)
        yield name


@pytest.fixture
def connection(state: str, pg_migrated: Any, url_of: Any) -> Iterator[sa.Connection]:
    """A connection to a copy of the state, with its statistics and what is dead in it."""
    name = "pgqrs_plans"
    with (
        database(pg_migrated, name, state),
        autocommitting(url_of(name)) as connection,
    ):
        yield connection


@pytest.fixture(scope="module")
def shared(state: str, pg_migrated: Any, url_of: Any) -> Iterator[sa.Engine]:
    """A copy of the state for all tests that undo what they do."""
    name = "pgqrs_plans_shared"
    with database(pg_migrated, name, state):
        yield sa.create_engine(url_of(name), poolclass=sa.NullPool)


@pytest.fixture
def undone(shared: sa.Engine) -> Iterator[sa.Connection]:
    """A connection to a copy of the state, in a transaction that is rolled back at the end.

    To copy the database for each test took ten times as long as the test. A test that counts the
    row versions that are read has a copy for all its cases, since a rollback leaves dead ones.
    """
    with shared.connect() as connection:
        yield connection


def explain(connection: sa.Connection, statement: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Run a statement of the package, with its own bind parameters, under EXPLAIN."""
    compiled = statement.compile(dialect=connection.dialect)
    sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
    found = connection.exec_driver_sql(sql, compiled.construct_params(values)).scalar_one()
    plan: dict[str, Any] = found[0]["Plan"]
    return plan


def explain_for_any_values(
    connection: sa.Connection, statement: Any, values: dict[str, Any]
) -> dict[str, Any]:
    """The same, by the generic plan that a prepared statement gets after some executions."""
    compiled = statement.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call]
    given = compiled.construct_params(values)
    cursor = psycopg.ClientCursor(connection.connection.dbapi_connection)  # type: ignore[arg-type]
    cursor.execute("SET plan_cache_mode = force_generic_plan")
    cursor.execute(f"PREPARE ours AS {compiled}".encode())
    places = ", ".join(["%s"] * len(compiled.positiontup))
    cursor.execute(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE ours({places})".encode(),
        [given[name] for name in compiled.positiontup],
    )
    found: Any = cursor.fetchone()
    cursor.execute("DEALLOCATE ours")
    plan: dict[str, Any] = found[0][0]["Plan"]
    return plan


EXPLAINS = {"for_these_values": explain, "for_any_values": explain_for_any_values}


@pytest.fixture(params=EXPLAINS)
def explained(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    return EXPLAINS[request.param]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def scans(plan: dict[str, Any]) -> dict[str, int]:
    """How pgqrs_messages was read: the index (or 'seq'), and the rows looked at."""
    found: dict[str, int] = {}
    for node in nodes(plan):
        if node["Node Type"] == "Seq Scan" and node.get("Relation Name") == "pgqrs_messages":
            found["seq"] = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        elif "Index Name" in node and node["Index Name"].startswith("pgqrs_messages"):
            looked = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            loops = node["Actual Loops"]
            name = node["Index Name"]
            found[name] = found.get(name, 0) + int(looked * loops)
    return found


def probes(plan: dict[str, Any]) -> dict[str, int]:
    """How often each index of pgqrs_messages was looked into, or the table ('seq') read."""
    found: dict[str, int] = {}
    for node in nodes(plan):
        name = node.get("Index Name", "seq")
        if node.get("Relation Name") == "pgqrs_messages" and node["Actual Loops"]:
            found[name] = found.get(name, 0) + node["Actual Loops"]
    return found


LEVELS = 2
"""Looks into the index for the one priority in use: its first row, and that there is no other."""

LOOK = consume._LOOK


def dequeue_values(limit: int, *, cursor: str | None) -> dict[str, Any]:
    plain = {"queue": "mail", "limit": limit, "lease": None, "worker": None, "attempts": None}
    return plain | {"cursor": cursor}


def place(connection: sa.Connection) -> str:
    """Return a cursor before everything, at the level of all messages."""
    oid = connection.exec_driver_sql("SELECT 'pgqrs_messages'::regclass::oid").scalar_one()
    place = Position(datetime(2000, 1, 1, tzinfo=UTC), 0, 0, 0.0)
    return CursorSnapshot(f"f{oid}", {0: place}).as_json()


each_plan = each_case("explained", EXPLAINS)
each_beginning = each_case("from_a_place", {"from_the_beginning": False, "from_a_place": True})


@each_plan
@each_beginning
@each_case("limit", [1, 50])
def test_a_dequeue_reads_its_rows_from_the_order_index_and_finds_them_again_by_their_ids(
    connection: sa.Connection,
    explained: Callable[..., dict[str, Any]],
    limit: int,
    from_a_place: bool,
) -> None:
    cursor = place(connection) if from_a_place else None
    statement = lease.dequeue(TABLES, by_worker=False)
    values = dequeue_values(limit, cursor=cursor)
    explained(connection, statement, values)  # marks what is dead in the index as dead
    in_front = count_leased(connection)
    plan = explained(connection, statement, values)
    read = scans(plan)
    assert set(read) == {"pgqrs_messages_order_idx", "pgqrs_messages_pkey"}, read
    # What the first one and the other cases have leased has kept its place, and is read over.
    most = in_front + limit + (0 if cursor else LEVELS)
    assert limit <= read["pgqrs_messages_order_idx"] <= most
    assert read["pgqrs_messages_pkey"] == limit
    # What is dead in front is read once from the beginning, and once more to find the priorities.
    dead = 100 if cursor else 200
    most = dead + 100 + 30 * limit + in_front
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < most


def test_a_place_costs_no_page_and_a_level_that_has_nothing_five(connection: sa.Connection) -> None:
    """As docs/explanation/performance.md has it."""
    connection.execute(sa.text("VACUUM pgqrs_messages"))
    oid = connection.exec_driver_sql("SELECT 'pgqrs_messages'::regclass::oid").scalar_one()
    place = Position(datetime(2000, 1, 1, tzinfo=UTC), 0, 0, 0.0)
    read = []
    for places in (None, {0: place}, dict.fromkeys(range(-19, 1), place)):
        cursor = None if places is None else CursorSnapshot(f"f{oid}", places).as_json()
        statement = lease.dequeue(TABLES, by_worker=False)
        connection.exec_driver_sql("BEGIN")
        plan = explain(connection, statement, dequeue_values(10, cursor=cursor))
        connection.exec_driver_sql("ROLLBACK")
        read.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    beginning, item, twenty = read
    assert item <= beginning + 2, read
    assert twenty <= item + 19 * 5, read


def newest(connection: sa.Connection, count: int) -> list[int]:
    ids = sa.text(
        "SELECT id FROM pgqrs_messages WHERE payload = '{}' ORDER BY id DESC LIMIT :count"
    )
    return list(connection.scalars(ids, {"count": count}))


def count_leased(connection: sa.Connection) -> int:
    found = sa.select(sa.func.count()).where(states.leased(TABLES.message.c))
    return connection.scalar(found) or 0


def lease_in_front(connection: sa.Connection, count: int) -> None:
    """Let so many messages be leased that became visible before all others."""
    connection.execute(
        sa.text(
            "INSERT INTO pgqrs_messages (queue_id, payload, vt, read_ct, max_read_ct, dequeued_at,"
            " leased_until) SELECT 1, '1', statement_timestamp() - interval '1 day', 1, 5,"
            " statement_timestamp(), statement_timestamp() + interval '1 hour'"
            " FROM generate_series(1, :count)"
        ),
        {"count": count},
    )


def leased(connection: sa.Connection, count: int) -> dict[str, Any]:
    """Lease the newest messages; return the parameters that say so."""
    lease = sa.text(
        "UPDATE pgqrs_messages SET read_ct = 1, max_read_ct = 5, consumer_worker_id = 1,"
        " dequeued_at = statement_timestamp(),"
        " leased_until = statement_timestamp() + interval '1 hour'"
        " WHERE id = ANY(:ids) RETURNING id, fencing_token"
    )
    rows = connection.execute(lease, {"ids": newest(connection, count)}).all()
    ids, tokens = zip(*rows, strict=True)
    return {"ids": list(ids), "tokens": list(tokens), "required": count}


TABLES = tables_of(READY_MADE)
SPAN = timedelta(seconds=30)
NOW = datetime.now(UTC)
EACH: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    # What is executed for one or more leases, and the parameters besides those that name them.
    "extend": (lambda: settle.extend(TABLES), lambda _: {"lease": SPAN}),
    "renew": (lambda: settle.extend(TABLES, skip_locked=True), lambda _: {"lease": SPAN}),
    "release": (lambda: settle.release(TABLES), lambda _: {}),
    "release what is not locked": (
        lambda: settle.release(TABLES, skip_locked=True),
        lambda _: {},
    ),
    "release with a delay": (
        lambda: settle.release(TABLES, delayed=True),
        lambda _: {"delay": SPAN},
    ),
    "fail": (
        lambda: settle.reschedule_failed(TABLES),
        lambda n: {"errors": ["no"] * n, "delays": [SPAN] * n},
    ),
    "retry what is not locked": (
        lambda: settle.reschedule_failed(TABLES, skip_locked=True),
        lambda n: {"errors": ["no"] * n, "delays": [SPAN] * n},
    ),
    "hold": (lambda: consume.lock_messages(TABLES), lambda _: {}),
    "whereabouts": (lambda: settle.whereabouts(TABLES), lambda _: {}),
    # Those that delete come last: in one of the states there are 500 messages.
    "archive": (
        lambda: settle.archive(TABLES),
        lambda n: {"outcome": "archived", "reasons": [None] * n, "errors": [None] * n},
    ),
    "archive without a reason": (
        lambda: settle.archive(TABLES, with_reason=False),
        lambda _: {"outcome": "archived"},
    ),
    "archive what is not locked": (
        lambda: settle.archive(TABLES, with_reason=False, skip_locked=True),
        lambda _: {"outcome": "archived"},
    ),
    "archive plainly": (lambda: settle.archive_done(TABLES), lambda _: {}),
    "delete": (lambda: settle.delete(TABLES), lambda _: {}),
}


@pytest.mark.parametrize(
    ("count", "in_front"),
    [(1, 0), (20, 0), (20, 10_000), pytest.param(20, 100_000, marks=pytest.mark.long)],
)
@each_plan
def test_what_is_done_to_a_lease_finds_it_by_its_id(
    connection: sa.Connection,
    explained: Callable[..., dict[str, Any]],
    count: int,
    in_front: int,
) -> None:
    lease_in_front(connection, in_front)
    found = {
        what: scans(explained(connection, build(), leased(connection, count) | more(count)))
        for what, (build, more) in EACH.items()
    }
    # Once to lock, once to change; a bitmap scan counts its rows in the index as well.
    assert {
        what: read
        for what, read in found.items()
        if set(read) != {"pgqrs_messages_pkey"} or read["pgqrs_messages_pkey"] > 3 * count
    } == {}


ONE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "archive": (
        lambda: settle.archive_one(TABLES),
        {"outcome": "archived", "reasons": None, "errors": None},
    ),
    "archive without a reason": (
        lambda: settle.archive_one(TABLES, with_reason=False),
        {"outcome": "archived"},
    ),
    "delete": (lambda: settle.delete_one(TABLES), {}),
}


def test_what_settles_one_lease_finds_it_once_by_its_id(
    connection: sa.Connection, explained: Callable[..., dict[str, Any]]
) -> None:
    for what, (build, more) in ONE.items():
        given = leased(connection, 1)
        one = {"id": given["ids"][0], "token": given["tokens"][0]}
        read = scans(explained(connection, build(), one | more))
        assert read == {"pgqrs_messages_pkey": 1}, what


@each_plan
@each_beginning
@each_case("count", [1, 20])
def test_a_turn_reads_what_it_settles_by_id_and_what_it_leases_from_the_order_index(
    connection: sa.Connection,
    explained: Callable[..., dict[str, Any]],
    count: int,
    from_a_place: bool,
) -> None:
    cursor = place(connection) if from_a_place else None
    worker = (
        "INSERT INTO pgqrs_workers (id, name, hostname) VALUES (1, 'w', 'h') ON CONFLICT DO NOTHING"
    )
    connection.execute(sa.text(worker))
    statement = consume.settle_and_lease(TABLES)
    values = dequeue_values(count, cursor=cursor) | {"worker": 1}
    given = leased(connection, count)
    nobody = {"ids": [0] * count, "tokens": [0] * count}
    explained(connection, statement, values | nobody)  # marks what is dead as dead
    in_front = count_leased(connection)
    plan = explained(connection, statement, values | given)
    read = scans(plan)
    assert set(read) == {"pgqrs_messages_order_idx", "pgqrs_messages_pkey"}, read
    # It reads over what the first one and the other cases have leased, which has kept its place.
    most = in_front + count + (0 if cursor else LEVELS)
    assert count <= read["pgqrs_messages_order_idx"] <= most
    assert read["pgqrs_messages_pkey"] <= 4 * count


IN_FRONT = [10_000, pytest.param(100_000, marks=pytest.mark.long)]


@pytest.mark.parametrize("in_front", IN_FRONT)
def test_a_dequeue_reads_over_what_is_leased_in_front_once_and_not_at_all_from_behind_it(
    connection: sa.Connection, explained: Callable[..., dict[str, Any]], in_front: int
) -> None:
    lease_in_front(connection, in_front)
    statement = lease.dequeue(TABLES, by_worker=False)
    oid = connection.exec_driver_sql("SELECT 'pgqrs_messages'::regclass::oid").scalar_one()
    place = Position(datetime.now(UTC) - timedelta(hours=12), 0, 0, 0.0)
    behind = CursorSnapshot(f"f{oid}", {0: place}).as_json()
    limit = 10
    explained(connection, statement, dequeue_values(limit, cursor=behind))
    both = {"pgqrs_messages_order_idx", "pgqrs_messages_pkey"}
    for cursor, fewest, most in (
        (behind, limit, 2 * limit),
        (None, in_front + limit, in_front + 3 * limit + LEVELS),
    ):
        read = scans(explained(connection, statement, dequeue_values(limit, cursor=cursor)))
        assert set(read) == both, read
        assert fewest <= read["pgqrs_messages_order_idx"] <= most
        assert read["pgqrs_messages_pkey"] == limit


@pytest.mark.parametrize("in_front", IN_FRONT)
def test_a_look_reads_over_what_is_leased_in_front_once(
    connection: sa.Connection, explained: Callable[..., dict[str, Any]], in_front: int
) -> None:
    lease_in_front(connection, in_front)
    statement = consume.check_queues(TABLES)
    read = scans(explained(connection, statement, look_values(connection, 1, "mail")))
    assert set(read) == {"pgqrs_messages_order_idx"}, read
    assert sum(read.values()) <= in_front + LOOK + LEVELS


BY_ID: dict[str, tuple[Callable[[], Any], Callable[[list[int]], dict[str, Any]]]] = {
    "cancel": (lambda: messages.cancel(TABLES), lambda ids: {"ids": ids, "reason": None}),
    "reschedule": (
        lambda: messages.reschedule(TABLES),
        lambda ids: {"message_id": ids[0], "delay": SPAN, "at": None},
    ),
    "leased until": (lambda: messages.leased_until(TABLES), lambda ids: {"ids": ids}),
}


def test_what_is_done_to_a_waiting_message_finds_it_by_its_id(
    undone: sa.Connection, explained: Callable[..., dict[str, Any]]
) -> None:
    for what, (build, values) in BY_ID.items():
        read = scans(explained(undone, build(), values(newest(undone, 1))))
        undone.rollback()
        assert set(read) == {"pgqrs_messages_pkey"}, (what, read)
        assert read["pgqrs_messages_pkey"] <= 3, what


def test_a_requeue_reads_no_message_but_those_with_its_key(
    undone: sa.Connection, explained: Callable[..., dict[str, Any]]
) -> None:
    values = leased(undone, 50) | {"outcome": "archived"}
    undone.execute(settle.archive(TABLES, with_reason=False), values)
    ids = list(undone.scalars(sa.text("SELECT id FROM pgqrs_archive")))
    values = {"ids": ids, "delay": SPAN, "attempts": None, "required": len(ids)}
    read = scans(explained(undone, archive.requeue(TABLES), values))
    assert set(read) <= {"pgqrs_messages_dedup_key_idx"}, read
    read = scans(explained(undone, archive.requeue_candidates(TABLES), {"ids": ids}))
    assert set(read) <= {"pgqrs_messages_dedup_key_idx"}, read


@pytest.mark.parametrize("live", [0, 100])
def test_a_keyed_batch_reads_no_messages_but_those_that_have_its_keys(
    undone: sa.Connection, explained: Callable[..., dict[str, Any]], live: int
) -> None:
    keys = [f"k{number:03}" for number in range(500)]
    item = '["x",null,null,0,null,null,"{}"]'.format
    values = {"queue": "mail", "size": 1, "producer": None, "keys": keys[:live]}
    values["items"] = f"[{','.join(map(item, keys[:live]))}]"
    statement = enqueue.many(TABLES, keyed=True, notify=False)
    undone.execute(statement, values)
    values |= {"keys": keys, "items": f"[{','.join(map(item, keys))}]"}
    read = scans(explained(undone, statement, values))
    assert set(read) <= {"pgqrs_messages_dedup_key_idx"}, read
    assert sum(read.values()) == live


def exhaust(connection: sa.Connection, count: int, *, newest: bool) -> None:
    """Let the leases of the oldest or the newest visible messages run out with no attempts left."""
    order = sa.text("vt DESC, id DESC" if newest else "vt, id")
    moment, message = sa.func.statement_timestamp(), TABLES.message
    visible = sa.select(message.c.id).where(message.c.vt <= moment).order_by(order).limit(count)
    ended = moment - timedelta(seconds=1)
    spent = {"read_ct": 1, "max_read_ct": 1, "dequeued_at": ended, "leased_until": ended}
    connection.execute(sa.update(message).where(message.c.id.in_(visible)).values(spent))


@pytest.mark.parametrize(("look", "limit", "dead"), [(LOOK, 100, LOOK), (100, 10, 10)])
def test_burying_reads_no_more_than_it_looks_at(
    connection: sa.Connection,
    explained: Callable[..., dict[str, Any]],
    look: int,
    limit: int,
    dead: int,
) -> None:
    exhaust(connection, 50, newest=False)
    values = {"queue": "mail", "limit": limit, "look": look}
    plan = explained(connection, archive.dead_letter_exhausted(TABLES), values)
    read = scans(plan)
    assert set(read) == {"pgqrs_messages_order_idx", "pgqrs_messages_pkey"}, read
    assert read["pgqrs_messages_order_idx"] <= look + LEVELS
    assert read["pgqrs_messages_pkey"] <= 3 * dead
    assert plan["Actual Rows"] == dead


def test_burying_all_reads_what_is_visible_once(
    connection: sa.Connection, explained: Callable[..., dict[str, Any]]
) -> None:
    exhaust(connection, 50, newest=True)
    visible = sa.text("SELECT count(*) FROM pgqrs_messages WHERE vt <= statement_timestamp()")
    there = connection.scalar(visible)
    values = {"queue": "mail", "limit": 10, "look": None}
    plan = explained(connection, archive.dead_letter_exhausted(TABLES), values)
    read = scans(plan)
    assert read["pgqrs_messages_pkey"] <= 30, read
    assert sum(read.values()) <= there + 30 + LEVELS, read
    assert plan["Actual Rows"] == 10


def test_handing_back_what_a_lost_turn_has_leased_reads_the_messages_once(
    connection: sa.Connection, explained: Callable[..., dict[str, Any]]
) -> None:
    """After a broken connection, once; what is given back is found again by its id."""
    values = {
        "worker_id": 1,
        "queue": "mail",
        "lease": SPAN,
        "since": NOW,
        "until": NOW + SPAN,
        "known": [],
    }
    there = connection.scalar(sa.text("SELECT count(*) FROM pgqrs_messages"))
    read = scans(explained(connection, consume.release_unanswered(TABLES), values))
    assert sum(read.values()) <= there, read


def test_what_is_executed_all_the_time_is_not_planned_anew_each_time(
    connection: sa.Connection,
) -> None:
    """For all sizes of its batches, and all statistics of the table."""
    with Session(connection) as session:
        queue = QueueService(session, allow_autocommit=True)
        for limit in (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 2, 1, 20, 1):
            for put_back in (True, False):
                deliveries = queue.dequeue("mail", limit)
                if put_back:
                    queue.fail_many(deliveries, "broken", delay=0)
                else:
                    queue.archive_many(deliveries)
        planned = session.execute(
            sa.text(
                "SELECT custom_plans, generic_plans, statement FROM pg_prepared_statements"
                " WHERE statement ~ 'pgqrs_messages'"
            )
        ).all()
    assert len(planned) >= 3, [item.statement[:60] for item in planned]
    for custom, generic, statement in planned:
        # The server makes five before it compares.
        assert (custom, generic > 0) == (5, True), statement


MANY_QUEUES = (
    "INSERT INTO pgqrs_queues (id, queue_name)"
    " SELECT n + 1, 'other/' || n FROM generate_series(1, 10000) n"
)


def look_values(connection: sa.Connection, count: int, *more: str) -> dict[str, Any]:
    worker = "INSERT INTO pgqrs_workers (name, hostname) VALUES ('w', 'h') RETURNING id"
    asked = [f"other/{number}" for number in range(1, 10_000, 10_000 // count)][:count]
    return {"queues": [*asked, *more], "worker": connection.scalar(sa.text(worker))}


def table_pages(connection: sa.Connection) -> int:
    """How many pages the messages have, and twice those of the order index."""
    sizes = "SELECT pg_relation_size('{0}') + 2 * pg_relation_size('{0}_order_idx')"
    return int(connection.scalar(sa.text(sizes.format("pgqrs_messages"))) or 0) // 8192


def pages(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("count", [1, 20, 200])
def test_a_look_at_idle_queues_reads_a_few_pages_of_the_indexes_for_each_of_them(
    request: pytest.FixtureRequest,
    connection: sa.Connection,
    explained: Callable[..., dict[str, Any]],
    count: int,
) -> None:
    connection.execute(sa.text(MANY_QUEUES))
    statement = consume.check_queues(TABLES)
    plan = explained(connection, statement, look_values(connection, count))
    assert sum(scans(plan).values()) == 0
    assert pages(plan) <= 10 * count + 20
    plan = explained(connection, statement, look_values(connection, count, "mail"))
    # Of the queue with 20,000 messages: its one level of priority, and the first that are visible.
    assert sum(scans(plan).values()) <= LOOK + LEVELS
    # Where it has just been drained, its dead index entries are read until vacuum takes them: for
    # the priorities, and for the messages, with each page of the table that they point to.
    dead = table_pages(connection) if "drained" in request.node.name else 0
    assert pages(plan) <= 10 * count + 40 + dead


@pytest.mark.long
@pytest.mark.parametrize("analysed", [False, True])
def test_a_look_does_not_read_a_million_messages_of_ten_thousand_other_queues(
    engine: sa.Engine, explained: Callable[..., dict[str, Any]], analysed: bool
) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ALTER TABLE pgqrs_messages SET (autovacuum_enabled = off)"))
        connection.execute(sa.text(MANY_QUEUES))
        connection.execute(
            sa.text(
                "INSERT INTO pgqrs_messages (queue_id, payload)"
                " SELECT id, '{}' FROM pgqrs_queues, generate_series(1, 103) WHERE id % 50 <> 2"
            )
        )
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqrs_messages")) > 1_000_000
        if analysed:
            connection.execute(sa.text("VACUUM ANALYZE pgqrs_messages"))
        plan = explained(connection, consume.check_queues(TABLES), look_values(connection, 200))
        assert sum(scans(plan).values()) == 0
        assert pages(plan) <= 200 * 10

"""How long a message can be passed over while others flow: on real clocks, with real sessions.

No dequeue that begins more than `BOUND` seconds after a message became visible passes it over, and
where a reading from the beginning is quick, none that begins more than a second after. What counts
is when a dequeue begins, so that a slow machine cannot fail these tests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from pgqrs_sa import Item, QueueService, metadata
from pgqrs_sa._core import cursor
from support.waiting import PATIENCE

BOUND = 5.0
"""Seconds."""

QUEUES, MESSAGES = (metadata.tables[f"pgqrs_{name}"] for name in ("queues", "messages"))

TENANTS = 40


@pytest.fixture
def own(migrated: Any) -> Iterator[sa.Engine]:
    """An engine that remembers nothing yet, with one connection."""
    engine = sa.create_engine(migrated.url, pool_size=1, max_overflow=0, pool_timeout=PATIENCE)
    yield engine
    engine.dispose()


def backlog(engine: sa.Engine) -> None:
    """More messages than any of these tests reads."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO pgqrs_messages (queue_id, payload, vt)"
            " SELECT q.id, to_jsonb(n), statement_timestamp()"
            " FROM pgqrs_queues q, generate_series(1, 40000) n WHERE queue_name = 'mail'"
        )


class Flow:
    """Dequeues one message after the other, and notes when each began and what it found."""

    def __init__(self, engine: sa.Engine, queue: str = "mail", **options: Any) -> None:
        self.engine = engine
        self.queue = queue
        self.options = options
        self.begun: list[float] = []

    def take(self, limit: int = 1, inside: AbstractContextManager[Any] | None = None) -> list[Any]:
        self.begun.append(time.monotonic())
        with Session(self.engine) as session, session.begin():
            found = QueueService(session, **self.options).dequeue(self.queue, limit)
            with inside or nullcontext():
                return [row.payload for row in found]

    def passed_over(self, message: Any, since: float) -> float:
        """Return how long after it became visible the last dequeue began that did not find it."""
        while message not in self.take():
            assert time.monotonic() - since < PATIENCE, f"{message} was not found"
        passing = [item for item in self.begun[:-1] if item > since]
        return passing[-1] - since if passing else 0.0


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """What is stated, for how long the slowest reading from the beginning has taken here."""
    took: list[float] = []

    def interval(seconds: float) -> float:
        took.append(seconds)
        return asked(seconds)

    asked = cursor.interval
    monkeypatch.setattr(cursor, "interval", interval)
    return lambda: min(BOUND, max(item + max(1.0, 20 * item) for item in took))


@contextmanager
def late(engine: sa.Engine, payload: Any = "late", **options: Any) -> Iterator[Callable[[], float]]:
    """A message that was enqueued before the others, and is committed when that is called."""
    with Session(engine) as session:
        QueueService(session).enqueue("mail", payload, **options)

        def commit() -> float:
            session.commit()
            return time.monotonic()

        yield commit


def lay_before(engine: sa.Engine, payload: Any, priority: int = 0) -> float:
    """The same in one go, for where a transaction cannot stay open; return when it was visible."""
    with Session(engine) as session, session.begin():
        receipt = QueueService(session).enqueue("mail", payload, priority=priority)
        session.execute(
            sa.text("UPDATE pgqrs_messages SET vt = vt - interval '1 h' WHERE id = :id"),
            {"id": receipt.id},
        )
    return time.monotonic()


@contextmanager
def slowly(seconds: float) -> Iterator[None]:
    """What a caller does within its transaction, or before."""
    yield
    time.sleep(seconds)


@contextmanager
def holding_the_connection(engine: sa.Engine, seconds: float) -> Iterator[None]:
    connection = engine.connect()
    end = threading.Timer(seconds, connection.close)
    end.start()
    yield
    end.join()


@contextmanager
def stalling_the_table(engine: sa.Engine, seconds: float) -> Iterator[None]:
    connection = engine.connect()
    connection.exec_driver_sql("LOCK TABLE pgqrs_messages IN ACCESS EXCLUSIVE MODE")
    end = threading.Timer(seconds, connection.close)
    end.start()
    yield
    end.join()


CALLERS = {
    "at once": lambda flow, _: flow.take(),
    "in a slow transaction": lambda flow, _: flow.take(inside=slowly(0.5)),
    "after a wait for the connection": lambda flow, _: during(
        holding_the_connection(flow.engine, 0.5), flow.take
    ),
    "from a stalled table": lambda flow, engine: during(stalling_the_table(engine, 0.5), flow.take),
}


def during(trouble: AbstractContextManager[None], call: Callable[[], Any]) -> None:
    with trouble:
        call()


@pytest.mark.parametrize("how", CALLERS)
def test_a_late_message_is_passed_over_for_a_second_and_for_five_at_most(
    engine, service, own, bound, how
):
    flow = Flow(own)
    backlog(engine)
    CALLERS[how](flow, engine)  # the first dequeue, which reads from the beginning
    # On a slow machine the next one may come so late that it reads from there again: try again.
    for number in range(50):
        passed = flow.passed_over(f"late {number}", lay_before(engine, f"late {number}"))
        assert passed <= bound()
        if passed:
            break
    assert passed, "none was ever passed over: then what is bounded here?"


@pytest.mark.parametrize("how", CALLERS)
def test_a_more_urgent_message_is_seen_by_the_very_next_dequeue(engine, service, own, how):
    flow = Flow(own)
    backlog(engine)
    CALLERS[how](flow, engine)
    flow.take()
    lay_before(engine, "urgent", priority=-10)
    assert flow.take() == ["urgent"]


def test_twenty_levels_are_each_read_again_in_time(engine, service, own, bound):
    flow = Flow(own)
    with late(engine, "late at 0"), late(engine, "late at 19", priority=19) as commit:
        with Session(engine) as session, session.begin():
            levels = [Item(n, priority=n % 19) for n in range(190)]
            QueueService(session).enqueue_many("mail", levels)
            rest = [Item(n, priority=19) for n in range(20_000)]
            QueueService(session).enqueue_many("mail", rest)
        assert len(flow.take(191)) == 191  # all that is more urgent than the last level
        began_at = commit()
        with Session(engine) as session, session.begin():
            QueueService(session).enqueue("mail", "more urgent", priority=-1)
        assert flow.take() == ["more urgent"]
        assert flow.passed_over("late at 19", began_at) <= bound()


def test_a_reading_that_is_rolled_back_puts_no_other_off(engine, service, own, bound):
    flow = Flow(own)
    with late(engine) as commit:
        backlog(engine)
        flow.take()
        visible_at = commit()
        found, passed_at = 0, visible_at
        while found < 5:
            began_at = time.monotonic()
            assert began_at - visible_at < PATIENCE
            with Session(own) as session:
                if QueueService(session).dequeue("mail")[0].payload == "late":
                    found += 1
                else:
                    assert not found, "once found, it comes first until a lease of it is committed"
                    passed_at = began_at
                if found < 5:
                    session.rollback()
                else:
                    session.commit()
    assert passed_at - visible_at <= bound()


def test_a_lease_that_another_process_rolls_back_comes_first_again_in_time(
    engine, service, own, bound
):
    flow = Flow(own)
    backlog(engine)
    with Session(engine) as elsewhere:
        taken = [delivery.payload for delivery in QueueService(elsewhere).dequeue("mail", 3)]
        flow.take()
        elsewhere.rollback()
        began_at = time.monotonic()
    assert flow.passed_over(taken[0], began_at) <= bound()
    assert [*flow.take(), *flow.take()] == taken[1:]  # and those behind it at once


@pytest.mark.parametrize("in_front", [0, 10_000])
def test_a_lease_that_ran_out_comes_first_again_in_time(engine, service, own, bound, in_front):
    """Also where a reading from the beginning reads over many that are still leased."""
    flow = Flow(own)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO pgqrs_messages (queue_id, payload, vt, read_ct, max_read_ct,"
                " dequeued_at, leased_until)"
                " SELECT id, '1', statement_timestamp() - interval '1 h', 1, 5,"
                " statement_timestamp(), statement_timestamp() + interval '1 h'"
                " FROM pgqrs_queues, generate_series(1, :count)"
            ),
            {"count": in_front},
        )
    backlog(engine)
    (mine,) = flow.take()
    assert [*flow.take(), *flow.take()] == [mine + 1, mine + 2]
    with engine.begin() as connection:
        ended = (
            "UPDATE pgqrs_messages SET leased_until = statement_timestamp()"
            " WHERE vt = (SELECT max(vt) FROM pgqrs_messages) AND payload = CAST(:mine AS jsonb)"
        )
        assert connection.execute(sa.text(ended), {"mine": str(mine)}).rowcount == 1
    began_at = time.monotonic()
    assert flow.passed_over(mine, began_at) <= bound()
    (after,) = flow.take()
    assert after > mine + 2


# ------------------------------------------------------------------------------------- tenants


class Tenant:
    """Dequeues of one tenant, on an engine that all tenants share."""

    def __init__(
        self, number: int, session: Callable[[int], AbstractContextManager[Session]], **options: Any
    ) -> None:
        self.number = number
        self.session = session
        self.options = options
        self.last_passed_at = 0.0
        self.since = 0.0
        self.found = False

    def take(self) -> None:
        began_at = time.monotonic()
        with self.session(self.number) as session:
            (delivery,) = QueueService(session, **self.options).dequeue("mail")
        assert delivery.payload["tenant"] == str(self.number)
        self.found = self.found or "late" in delivery.payload
        if self.since and not self.found and began_at > self.since:
            self.last_passed_at = began_at

    def be_late(self) -> None:
        """Let a message come that lies before all others."""
        payload = f'{{"tenant": "{self.number}", "late": true}}'
        with self.session(self.number) as session:
            session.execute(
                sa.insert(MESSAGES).from_select(
                    ["queue_id", "payload", "vt"],
                    sa.select(
                        QUEUES.c.id,
                        sa.cast(sa.literal(payload, sa.Text), JSONB),
                        sa.func.statement_timestamp() - timedelta(hours=1),
                    ),
                )
            )
        self.since = time.monotonic()


def check_tenants(tenants: list[Tenant]) -> None:
    """Each finds its late message, while all of them go on."""
    for tenant in tenants * 2:
        tenant.take()
    for tenant in tenants:
        tenant.be_late()
    until = time.monotonic() + BOUND
    while not all(tenant.found for tenant in tenants) and time.monotonic() < until:
        for tenant in tenants:
            tenant.take()
    for tenant in tenants:
        tenant.take()  # one that begins after the bound, if it has come to that
        assert tenant.found
        assert tenant.last_passed_at - tenant.since <= BOUND
    for _ in range(2):
        tenants[0].take()


FILL = """
    INSERT INTO {schema}pgqrs_queues (queue_name) VALUES ('mail') ON CONFLICT DO NOTHING;
    INSERT INTO {schema}pgqrs_messages (queue_id, payload, vt)
    SELECT id, jsonb_build_object('tenant', '{tenant}'), statement_timestamp()
    FROM {schema}pgqrs_queues, generate_series(1, 600)
"""


FILL_ONE = """
    INSERT INTO pgqrs_queues (queue_name) VALUES ('mail');
    INSERT INTO pgqrs_messages (queue_id, payload, vt)
    SELECT id, jsonb_build_object('tenant', tenant::text), statement_timestamp()
    FROM pgqrs_queues, generate_series(1, 600) n, generate_series(0, 39) tenant ORDER BY n, tenant
"""


def sent_places(engine: sa.Engine) -> list[bool]:
    """Of each dequeue: whether it goes on from somewhere."""
    sent: list[bool] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_c: Any, _cur: Any, sql: str, values: Any, *_rest: Any) -> None:
        if "to_regclass" in sql:
            sent.append(bool(values.get("cursor")))

    return sent


@pytest.fixture
def schemas(engine: sa.Engine) -> Iterator[list[str]]:
    """Tables of their own for each tenant."""
    names = [f"tenant_{number}" for number in range(TENANTS)]
    with engine.begin() as connection:
        for number, name in enumerate(names):
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
            translated = connection.execution_options(schema_translate_map={None: name})
            metadata.create_all(translated, checkfirst=False)
            connection.exec_driver_sql(FILL.format(schema=f"{name}.", tenant=number))
    yield names
    with engine.begin() as connection:
        for name in names:
            connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


@pytest.mark.parametrize("named", [False, True], ids=["without_a_key", "with_a_key"])
def test_forty_tenants_by_search_path(own, schemas, named):
    @contextmanager
    def session(number: int) -> Iterator[Session]:
        with Session(own) as session, session.begin():
            session.execute(sa.text(f"SET LOCAL search_path = {schemas[number]}"))
            yield session

    sent = sent_places(own)
    check_tenants(
        [
            Tenant(number, session, **({"cursor_key": name} if named else {}))
            for number, name in enumerate(schemas)
        ]
    )
    assert sent[-1], "it goes on from its own place"


def test_forty_tenants_by_schema_translate_map_of_their_connections(own, schemas):
    @contextmanager
    def session(number: int) -> Iterator[Session]:
        with Session(own) as session:
            options = {"schema_translate_map": {None: schemas[number]}}
            session.connection(execution_options=options)
            yield session
            session.commit()

    sent = sent_places(own)
    check_tenants([Tenant(number, session) for number in range(TENANTS)])
    assert sent[-1], "it goes on from its own place"


@pytest.fixture
def hidden(engine: sa.Engine) -> Iterator[Callable[..., AbstractContextManager[Session]]]:
    """One table, in which each tenant sees its own messages alone."""
    role = "pgqrs_bounds_tenant"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE ROLE {role};"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};"
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role};"
            "ALTER TABLE pgqrs_messages ENABLE ROW LEVEL SECURITY;"
            f"CREATE POLICY tenant ON pgqrs_messages TO {role}"
            " USING (payload ->> 'tenant' = current_setting('app.tenant', true))"
        )
        connection.exec_driver_sql(FILL_ONE)

    @contextmanager
    def session(own: sa.Engine, number: int) -> Iterator[Session]:
        with Session(own) as session, session.begin():
            session.execute(sa.text(f"SET LOCAL ROLE {role}"))
            setting = sa.func.set_config("app.tenant", str(number), True)
            session.execute(sa.select(setting))
            yield session

    yield session
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "DROP POLICY tenant ON pgqrs_messages;"
            "ALTER TABLE pgqrs_messages DISABLE ROW LEVEL SECURITY;"
            f"DROP OWNED BY {role}; DROP ROLE {role}"
        )


@pytest.mark.parametrize("named", [False, True], ids=["without_a_key", "with_a_key"])
def test_forty_tenants_by_row_level_security(own, hidden, named):
    sent = sent_places(own)
    check_tenants(
        [
            Tenant(
                number,
                lambda number: hidden(own, number),
                **({"cursor_key": f"tenant {number}"} if named else {}),
            )
            for number in range(TENANTS)
        ]
    )
    assert sent[-1] == named
    assert any(sent) == named

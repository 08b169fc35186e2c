"""The surface of pgqrs 0.5: names, constructors, lifecycle, tables, errors, event loops."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, declarative_base

from pgqrs_sa import Message, PgqrsError, QueueService, pgqrs
from pgqrs_sa.pgqrs import database as pgqrs_database
from support.waiting import until_awaited

from .conftest import Clock

ROOT = Path(__file__).parents[2]
SCRIPT = """
import asyncio, sys
from pgqrs_sa import pgqrs

admin = pgqrs.Admin(sys.argv[1])

async def first():
    await admin.install()
    await admin.create_queue("loops")
    producer = pgqrs.Producer(admin, "loops", "h", 1)
    await asyncio.gather(*(producer.enqueue(n) for n in range(30)))
    return producer

async def second(producer):
    await producer.enqueue("again")
    consumer = pgqrs.Consumer(sys.argv[1], "loops", "h", 1)
    (message,) = await consumer.dequeue()
    del consumer, message                      # with its pool, and its task, running
    print(await (await admin.get_messages()).count())

producer = asyncio.run(first())
asyncio.run(second(producer))                  # the same objects in another event loop
"""


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_dsn_may_name_several_hosts(database, driver, tmp_path) -> None:
    server = database.server
    hosts = ",".join(quote(case, safe="") for case in (str(tmp_path), server.host))
    user = quote(server.user) + (f":{quote(server.password)}" if server.password else "")
    dsn = (
        f"postgresql+{driver}://{user}@{hosts}/{database.name}"
        f"?port={server.port}&target_session_attrs=read-write"
    )
    config = pgqrs.Config.from_dsn(dsn)
    assert not server.password or server.password not in repr(config)
    admin = pgqrs.Admin(config)
    await admin.install()
    await admin.create_queue("mail")
    await pgqrs.Producer(admin, "mail", "h", 1).enqueue(7)
    (message,) = await pgqrs.Consumer(admin, "mail", "h", 1).dequeue()
    assert message.payload == 7


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_a_script_that_closes_nothing_ends_without_a_word(database, scheme) -> None:
    dsn = database.dsn.replace("postgresql", scheme, 1)
    command = [sys.executable, "-W", "error", "-c", SCRIPT, dsn]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "31\n")
    engine = sa.create_engine(database.url)
    with engine.connect() as connection:
        others = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        assert connection.scalar(others) == 1
    engine.dispose()


DROPPED = """
import asyncio, sys
from pgqrs_sa import pgqrs

async def install():
    async with pgqrs.Admin(sys.argv[1]) as admin:
        await admin.install()
        await admin.create_queue("loops")

async def drop(turns):
    consumer = pgqrs.Consumer(sys.argv[1], "loops", "h", 1)
    await consumer.dequeue()
    del consumer                               # the loop ends while its pool is being closed
    for _ in range(turns):
        await asyncio.sleep(0)

asyncio.run(install())
for turns in range(6):
    asyncio.run(drop(turns))
"""


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg"])
def test_a_pool_that_is_being_closed_when_its_loop_ends_is_closed_without_a_word(
    database, scheme
) -> None:
    dsn = database.dsn.replace("postgresql", scheme, 1)
    command = [sys.executable, "-W", "error", "-c", DROPPED, dsn]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


def test_a_pool_that_cannot_be_closed_does_not_keep_asyncio_run(
    prepare, database, monkeypatch
) -> None:
    """As when the server does not answer any more."""
    prepare("tasks")
    closing: list[str] = []

    dispose = pgqrs_database.AsyncEngine.dispose

    async def close(engine: pgqrs_database.AsyncEngine) -> None:
        closing.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            closing.append("cancelled")
            await dispose(engine)

    monkeypatch.setattr(pgqrs_database, "_CLOSE_TIMEOUT", 0.05)
    monkeypatch.setattr(pgqrs_database.AsyncEngine, "dispose", close)

    async def main() -> None:
        other = pgqrs.Admin(database.dsn)
        await other.get_queue("tasks")
        del other
        gc.collect()
        await until_awaited(lambda: closing == ["begun"], "the pool is being closed")

    asyncio.run(main())
    assert closing == ["begun", "cancelled"]


def test_an_admin_keeps_nothing_of_event_loops_that_have_ended(prepare) -> None:
    admin = prepare("tasks")
    for _ in range(3):
        assert asyncio.run(admin.get_queue("tasks")).queue_name == "tasks"
    assert len(admin._database._loops) == 1


def test_constructors_do_nothing_but_check_what_they_are_given() -> None:
    admin = pgqrs.Admin("postgresql://nowhere.invalid/none")
    pgqrs.Producer(admin, "q", "h", 1)
    pgqrs.Consumer("postgres://nowhere.invalid/none", "q", "h", 1)
    with pytest.raises(TypeError, match="a DSN or a Config, not a int"):
        pgqrs.Admin(7)
    with pytest.raises(TypeError, match="an Admin, a Config or a DSN"):
        pgqrs.Producer(None, "q", "h", 1)
    with pytest.raises(ValueError, match="no async driver"):
        pgqrs.Admin("postgresql+psycopg2://localhost/x")
    with pytest.raises(ValueError, match="needs postgresql"):
        pgqrs.Admin("mysql://localhost/x")
    assert "secret" not in repr(pgqrs.Admin("postgresql://me:secret@localhost/x"))


async def test_the_next_awaited_call_registers_what_was_constructed(admin) -> None:
    producer = pgqrs.Producer(admin, "tasks", "a", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "b", 2)
    assert producer.worker_id is None
    workers = await admin.get_workers()
    assert [(entry.name, entry.hostname, entry.port) for entry in await workers.list()] == [
        ("producer", "a", 1),
        ("consumer", "b", 2),
    ]
    assert (await workers.get(consumer.worker_id)).queue_id == (await admin.get_queue("tasks")).id
    await asyncio.gather(*(consumer.dequeue() for _ in range(10)))
    assert await workers.count() == 2


async def test_a_queue_that_is_missing_is_named_once_by_the_next_call(admin) -> None:
    producer = pgqrs.Producer(admin, "task", "h", 1)
    with pytest.raises(pgqrs.QueueNotFound, match="did you mean 'tasks'"):
        await admin.get_messages()
    await admin.get_messages()  # it is dropped
    with pytest.raises(pgqrs.QueueNotFound):
        await producer.enqueue(1)
    await admin.create_queue("task")
    await producer.enqueue(1)
    early = pgqrs.Producer(admin, "soon", "h", 1)
    await admin.create_queue("soon")  # which it was waiting for
    assert early.worker_id is not None


async def test_dsn_and_config_are_taken_where_an_admin_is(database, admin) -> None:
    async with pgqrs.Producer(database.dsn, "tasks", "h", 1) as producer:
        assert producer.worker_id is not None
        id_ = await producer.enqueue({"n": 1}, headers={"trace": "x"})
    config = pgqrs.Config.from_dsn(database.async_url("asyncpg"))
    async with pgqrs.Consumer(config, "tasks", "h", 1) as consumer:
        (message,) = await consumer.dequeue()
        assert (message.id, message.payload, message.headers) == (id_, {"n": 1}, {"trace": "x"})
        assert (message.read_ct, message.vt - message.enqueued_at > timedelta(seconds=5)) == (
            1,
            True,
        )
        await consumer.archive(message.id)
    workers = await (await admin.get_workers()).list("stopped")
    assert [worker.name for worker in workers] == ["producer", "consumer"]


def test_a_config_is_made_from_a_dsn_and_a_schema() -> None:
    dsn = "postgresql://localhost/shop"
    assert pgqrs.Config(dsn).settings == pgqrs.Config.from_dsn(dsn).settings
    config = pgqrs.Config(dsn, schema="jobs")
    assert (config.dsn, config.schema) == (dsn, "jobs")
    assert pgqrs.Admin(config).settings.schema == "jobs"
    with pytest.raises(ValueError, match="takes a DSN, not a int"):
        pgqrs.Config(7)


@pytest.mark.parametrize("name", ["s" * 64, "ä" * 32])
def test_a_schema_name_that_postgresql_would_cut_is_refused(name) -> None:
    with pytest.raises(ValueError, match="64 bytes, and PostgreSQL takes 63"):
        pgqrs.Config("postgresql://localhost/shop", schema=name)
    with pytest.raises(ValueError, match="64 bytes"):
        pgqrs.Admin("postgresql://localhost/shop", schema=name)
    assert pgqrs.Config("postgresql://localhost/shop", schema=name[:-1]).schema == name[:-1]


async def test_lifecycle_and_its_invalid_transitions(admin) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    id_ = await producer.enqueue(1)
    assert await consumer.status() is pgqrs.WorkerStatus.Ready
    assert await consumer.is_healthy()
    for change in (consumer.resume, consumer.shutdown):
        with pytest.raises(pgqrs.InvalidStateTransition):
            await change()
    await consumer.dequeue_delay(600)
    await consumer.suspend()
    with pytest.raises(pgqrs.InvalidStateTransition, match="suspended cannot become suspended"):
        await consumer.suspend()
    with pytest.raises(pgqrs.WorkerNotReady, match="suspended"):
        await consumer.dequeue()
    with pytest.raises(pgqrs.WorkerHasPendingMessages, match=str(id_)):
        await consumer.shutdown()
    await consumer.resume()
    await consumer.suspend()
    await consumer.release_messages([id_])
    await consumer.shutdown()
    with pytest.raises(pgqrs.InvalidStateTransition):
        await consumer.resume()
    with pytest.raises(pgqrs.WorkerNotReady, match="stopped"):
        await consumer.dequeue()
    with pytest.raises(pgqrs.WorkerNotReady):
        await consumer.heartbeat()
    assert not await consumer.is_healthy()
    await producer.heartbeat()


async def test_calls_of_a_worker_say_that_it_lives(database, admin) -> None:
    config = pgqrs.Config.from_dsn(database.dsn)
    config.heartbeat_interval_seconds = 0.05
    async with pgqrs.Admin(config) as mine:
        await mine.register("host", 1)
        consumer = pgqrs.Consumer(mine, "tasks", "h", 1)
        await consumer.dequeue()
        workers = await admin.get_workers()
        before = [entry.heartbeat_at for entry in await workers.list()]
        await asyncio.sleep(0.1)
        await consumer.dequeue()
        await mine.system_stats()
        after = [entry.heartbeat_at for entry in await workers.list()]
        assert all(late > early for early, late in zip(before, after, strict=True))


async def test_an_admin_is_a_worker_when_it_registers(admin) -> None:
    with pytest.raises(pgqrs.NotRegistered):
        await admin.heartbeat()
    info = await admin.register("host", 5432)
    assert (info.queue_id, info.status, admin.worker_id) == (None, "ready", info.id)
    with pytest.raises(pgqrs.InvalidWorkerType):
        await admin.release_worker_messages(info.id)
    await admin.suspend()
    await admin.resume()
    with pytest.raises(pgqrs.WorkerInUse):
        await admin.delete_worker(info.id)
    await admin.delete_self()
    assert admin.worker_id is None
    assert await (await admin.get_workers()).count() == 0


async def test_what_a_worker_holds_is_seen_and_released(admin) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    ids = [item.id for item in await producer.enqueue_batch([1, 2, 3])]
    await consumer.dequeue_batch_with_delay(2, 600)
    held = await admin.get_worker_messages(consumer.worker_id)
    assert [lease.id for lease in held] == ids[:2]
    assert (await admin.worker_stats("tasks")).leases == 2
    (health,) = await admin.worker_health_stats()
    assert (health.total, health.ready, health.stale) == (2, 2, 0)
    assert await admin.release_worker_messages(consumer.worker_id) == 2
    assert await consumer.archive(ids[0]) is False
    stats = await admin.system_stats()
    assert (stats.queues, stats.ready, stats.leased, stats.workers) == (1, 3, 0, 2)
    assert [item.queue for item in await admin.all_queues_metrics()] == ["tasks"]


async def test_extend_and_delete_many_at_once(admin, clock: Clock) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    ids = [item.id for item in await producer.enqueue_batch([1, 2])]
    ids.append(await producer.enqueue_delayed(3, 3600))
    await consumer.dequeue_batch(2)
    assert await consumer.extend_visibility_batch(ids, 500) == [True, True, False]
    assert all(clock.waits()[id_] > 499 for id_ in ids[:2])
    assert await consumer.delete_many([ids[2], ids[0], 999, ids[0]]) == [True, True, False, False]
    assert [message.outcome for message in clock.archived("tasks")] == [
        "cancelled"
    ]  # the other is gone
    assert await consumer.delete_many([]) == []
    assert await consumer.extend_visibility_batch([], 1) == []
    assert await consumer.archive_batch([]) == []
    with pytest.raises(pgqrs.DelayError):
        await consumer.extend_visibility(ids[1], 0)


async def test_queues_and_workers_as_tables(admin) -> None:
    await admin.create_queue("other")
    queues = await admin.get_queues()
    tasks = await queues.get_by_name("tasks")
    assert await queues.count() == 2
    assert [entry.queue_name for entry in await queues.list()] == ["other", "tasks"]
    assert await queues.get(tasks.id) == tasks
    assert datetime.fromisoformat(tasks.created_at) < datetime.now(UTC)
    assert [await queues.exists(case) for case in ("tasks", "nope")] == [True, False]
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    workers = await admin.get_workers()
    assert await workers.count_for_queue("tasks") == 2
    assert await workers.count_for_queue("other") == 0
    await producer.close()
    await workers.delete(producer.worker_id)
    assert [item.id for item in await workers.filter_by_fk(tasks.id)] == [consumer.worker_id]
    await queues.delete_by_name("other")
    with pytest.raises(pgqrs.QueueNotFound):
        await queues.delete(999)
    await queues.delete(tasks.id)
    assert (await workers.get(consumer.worker_id)).queue_id is None


@pytest.fixture
async def five(admin) -> tuple[pgqrs.Producer, pgqrs.Consumer, list[int]]:
    """Five messages: the first is archived, the second is held."""
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    ids = [item.id for item in await producer.enqueue_batch([{"n": n} for n in range(5)])]
    await consumer.dequeue_batch(2)
    await consumer.archive(ids[0])
    return producer, consumer, ids


async def test_messages_as_a_table(admin, five, clock: Clock) -> None:
    _, consumer, ids = five
    messages, queue = await admin.get_messages(), await admin.get_queue("tasks")
    assert await messages.count() == await messages.count_for_queue(queue.id) == 4
    assert await messages.count_pending("tasks") == 3
    assert await messages.count_pending_filtered("tasks") == 3
    assert await messages.count_pending_filtered("tasks", consumer.worker_id) == 1
    assert (await messages.get(ids[2])).payload == {"n": 2}
    assert [item.id for item in await messages.get_by_ids([ids[4], ids[1], 999])] == [
        ids[1],
        ids[4],
    ]
    assert [entry.id for entry in await messages.list(after=ids[2], limit=1)] == [ids[3]]
    assert len(await messages.filter_by_fk("tasks")) == 4
    assert [item.id for item in await messages.filter_by_payload({"n": 3})] == [ids[3]]
    with pytest.raises(ValueError, match="a value to look for"):
        await messages.filter_by_payload(None)
    later = datetime.now(UTC) + timedelta(hours=1)
    assert await messages.update_visibility_timeout(ids[2], later) is True
    assert await messages.update_visibility_timeout(999, later) is False
    with pytest.raises(pgqrs.MessageLeased):
        await messages.update_visibility_timeout(ids[1], later)
    assert 3590 < clock.waits()[ids[2]] <= 3600
    assert await messages.delete(ids[2]) is True
    assert await messages.delete_by_ids([ids[1], ids[3]]) == [False, True]


async def test_the_vt_of_a_leased_message_is_the_end_of_its_lease(admin, clock) -> None:
    await admin.create_queue("leases")
    producer = pgqrs.Producer(admin, "leases", "h", 1)
    consumer = pgqrs.Consumer(admin, "leases", "h", 2)
    sent = await producer.enqueue({"n": 1})
    before = await (await admin.get_messages()).get(sent)
    (taken,) = await consumer.dequeue_delay(600)

    def columns() -> Message:
        with Session(clock.engine) as session:
            return session.get_one(Message, sent)

    assert columns().vt == before.vt
    assert columns().leased_until == taken.vt
    assert taken.vt - columns().dequeued_at == timedelta(seconds=600)
    assert (await (await admin.get_messages()).get(sent)).vt == taken.vt
    assert await consumer.extend_visibility(sent, 3600)
    assert (await (await admin.get_messages()).get(sent)).vt == columns().leased_until
    assert await consumer.release_messages([sent]) == 1
    assert (await (await admin.get_messages()).get(sent)).vt == before.vt


async def test_the_archive_as_a_table(admin, five) -> None:
    producer, consumer, ids = five
    await (await admin.get_messages()).delete_by_ids(ids[2:4])
    archive = await admin.get_archive()
    assert await archive.count() == 3
    newest = await archive.list()
    assert [message.original_msg_id for message in newest] == [ids[3], ids[2], ids[0]]
    assert [message.id for message in newest] == [ids[3], ids[2], ids[0]]
    assert await archive.get(ids[0]) == newest[2]
    assert [item.original_msg_id for item in await archive.list(1, 1)] == [ids[2]]
    assert await archive.count_by_worker(consumer.worker_id) == 1
    (mine,) = await archive.list_by_worker(consumer.worker_id, 10, 0)
    assert (mine.producer_worker_id, mine.outcome) == (producer.worker_id, "archived")
    assert datetime.fromisoformat(mine.archived_at) > datetime.fromisoformat(mine.enqueued_at)
    assert await archive.delete_by_worker(consumer.worker_id) == 1
    assert await archive.delete(newest[0].id) == 1
    assert await archive.delete(newest[0].id) == 0


async def test_the_archive_of_a_queue_is_purged(admin, five) -> None:
    await admin.create_queue("other")
    await (await admin.get_messages()).delete_by_ids(five[2][2:4])
    archive = await admin.get_archive()
    assert await archive.purge("other") == 0
    assert await archive.purge("tasks") == 3
    assert await archive.count() == 0
    with pytest.raises(pgqrs.QueueNotFound):
        await archive.purge("task")


async def test_a_queue_with_messages_and_history_is_deleted_by_force(admin, five) -> None:
    _, consumer, _ = five
    await consumer.close()
    await five[0].close()
    with pytest.raises(pgqrs.QueueNotEmpty):
        await admin.delete_queue("tasks")
    await admin.delete_queue("tasks", force=True)
    assert await (await admin.get_queues()).count() == 0
    assert await (await admin.get_messages()).count() == 0
    assert await (await admin.get_archive()).count() == 0


async def test_silent_workers_of_a_queue_are_listed(admin, five, clock: Clock) -> None:
    producer, consumer, _ = five
    workers = await admin.get_workers()
    assert await workers.count_zombies_for_queue("tasks", 60) == 0
    with clock.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE pgqrs_workers SET heartbeat_at = heartbeat_at - interval '1 hour'"
        )
    queue = await admin.get_queue("tasks")
    found = await workers.list_zombies_for_queue(queue.id, 60)
    assert [row.id for row in found] == [producer.worker_id, consumer.worker_id]
    assert await workers.count_zombies_for_queue("tasks", 7200) == 0
    (stats,) = await admin.worker_health_stats(60, False)
    assert stats.stale == 2


async def test_install_verify_and_uninstall(database, clock: Clock) -> None:
    async with pgqrs.Admin(database.dsn) as admin:
        await asyncio.gather(*(admin.install() for _ in range(3)))
        await admin.install()
        await admin.verify()
        await admin.create_queue("gone")
        producer = pgqrs.Producer(admin, "gone", "h", 1)
        consumer = pgqrs.Consumer(admin, "gone", "h", 1)
        await producer.enqueue(1)
        await consumer.dequeue()
        with clock.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM pgqrs_queues"))
            connection.execute(sa.text("DELETE FROM pgqrs_workers"))
        with pytest.raises(pgqrs.NotIntact) as broken:
            await admin.verify()
        assert broken.value.findings == {"messages_without_queue": 1, "leases_without_worker": 1}
        await admin.uninstall()
        await admin.uninstall()
        with pytest.raises(RuntimeError) as missing:
            await admin.verify()
        assert isinstance(missing.value, pgqrs.SchemaVersionError)


async def test_a_schema_of_a_hosts_history_is_verified_and_left_alone(migrated) -> None:
    async with pgqrs.Admin(migrated.dsn) as admin:
        await admin.install()
        with pytest.raises(pgqrs.SchemaNotOurs, match="Alembic history"):
            await admin.uninstall()
        await admin.verify()
        await admin.create_queue("mail")


def test_config(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PGQRS_")]:
        monkeypatch.delenv(name)
    config = pgqrs.Config.from_dsn("postgresql://localhost/x")
    assert (config.max_connections, config.default_lock_time_seconds, config.max_read_ct) == (
        16,
        5,
        5,
    )
    config.default_lock_time_seconds = 7
    with pytest.raises(ValueError, match="max_connections must be 1 or more"):
        config.max_connections = 0
    assert config.max_connections == 16
    assert pgqrs.Config.from_dsn_with_schema("postgresql://localhost/x", "jobs").schema == "jobs"
    monkeypatch.setenv("PGQRS_DSN", "postgresql://localhost/env")
    monkeypatch.setenv("PGQRS_MAX_READ_CT", "9")
    file = tmp_path / "pgqrs.toml"
    file.write_text('dsn = "postgresql://localhost/file"\nmax_connections = 3\n')
    assert pgqrs.Config.from_env().max_read_ct == 9
    assert pgqrs.Config.load().dsn == "postgresql://localhost/env"
    assert pgqrs.Config.from_file(file).dsn == "postgresql://localhost/file"
    assert pgqrs.Config.load_with_options("postgresql://localhost/arg", file).max_connections == 3
    loaded = pgqrs.Config.load_with_schema_options(schema="s", config_path=file)
    assert (loaded.schema, loaded.dsn) == ("s", "postgresql://localhost/env")
    monkeypatch.setenv("PGQRS_MAX_READ_CT", "many")
    with pytest.raises(ValueError, match="PGQRS_MAX_READ_CT"):
        pgqrs.Config.from_env()


def test_validation_settings() -> None:
    from pgqrs_sa.pgqrs.producer import ValidatingCodec

    rules = pgqrs.Validation(
        max_payload_size_bytes=60, max_string_length=4, max_object_depth=2, forbidden_keys=("no",)
    )
    codec = ValidatingCodec(rules)
    codec.dumps({"a": [1, "four"]})
    for payload, problem in (
        ({"a": {"b": {}}}, "payload.a.b is nested deeper than 2"),
        ({"a": "fünf"}, "payload.a takes 5 bytes"),
        ({"longkey": 1}, "a key of payload takes 7 bytes"),
        ([{"no": 1}], r"payload\[0\] has the key 'no'"),
        (list(range(30)), "takes 81 bytes, more than 60"),
    ):
        with pytest.raises(pgqrs.PayloadError, match=problem):
            codec.dumps(payload)


def test_every_error_is_a_value_error_or_a_runtime_error_and_has_a_code_of_its_own() -> None:
    kinds = [getattr(pgqrs, name) for name in pgqrs.__all__]
    errors = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(errors) > 20
    for kind in errors:
        assert issubclass(kind, PgqrsError)
        assert kind is PgqrsError or issubclass(kind, (ValueError, RuntimeError))
    assert len({kind.code for kind in errors}) == len(errors)


async def test_one_bad_row_hides_no_neighbours_and_is_a_dead_letter_at_once(
    admin, clock: Clock
) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    good = await producer.enqueue({"n": 1})
    with clock.engine.begin() as connection:
        huge = sa.text(
            "INSERT INTO pgqrs_messages (queue_id, payload) "
            "SELECT id, CAST(:p AS jsonb) FROM pgqrs_queues"
        )
        connection.execute(huge.bindparams(p="1" * 5000))
    consumer = pgqrs.Consumer(admin, "tasks", "h", 1)
    (message,) = await consumer.dequeue_batch()
    assert (message.id, message.payload) == (good, {"n": 1})
    (bad,) = await (await admin.get_archive()).list_dlq_messages()
    assert bad.outcome == "dead"
    with pytest.raises(pgqrs.PayloadError):
        _ = bad.payload
    assert await consumer.archive(message.id) is True


async def test_a_session_of_the_applications_own_sees_the_same_messages(
    admin, clock: Clock
) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    id_ = await producer.enqueue({"n": 1})
    with Session(clock.engine) as session, session.begin():
        (delivery,) = QueueService(session).dequeue("tasks")
        assert delivery.id == id_
        assert session.get_one(Message, id_).producer_worker_id == producer.worker_id


async def test_the_block_in_the_docs_runs(database, admin) -> None:
    await admin.create_queue("receipts")
    text = (ROOT / "docs/how-to/pgqrs-to-own-session.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    Base = declarative_base()  # noqa: N806
    order = type(
        "Order", (Base,), {"__tablename__": "orders", "id": sa.Column(sa.Integer, primary_key=True)}
    )
    engine = create_async_engine(database.async_url("psycopg"))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    names = {"AsyncSession": AsyncSession, "Order": order, "engine": engine}
    exec(f"async def main():\n{textwrap.indent(block, '    ')}", names)  # noqa: S102
    await names["main"]()
    await engine.dispose()
    (message,) = await (await admin.get_messages()).filter_by_payload({"order": 7})
    assert message.vt - message.enqueued_at == timedelta(seconds=60)


def test_the_table_in_the_docs_names_everything() -> None:
    lines = (ROOT / "docs/how-to/pgqrs-to-own-session.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    assert all(len(row) == 3 for row in rows)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert len(set(named)) == len(named)
    endings = ("Info", "Message", "Metrics", "Stats", "Status")
    values = {item for item in pgqrs.__all__ if item.endswith(endings)}
    wanted = set(pgqrs.__all__)
    for name in wanted - values - {"Validation"}:
        kind = getattr(pgqrs, name)
        if not issubclass(kind, Exception):
            wanted |= {f"{name}.{item}" for item in dir(kind) if not item.startswith("_")}
    assert set(named) == wanted


async def test_statistics_have_the_names_of_pgqrs(admin) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    for message in await producer.enqueue_batch([1, 2]):
        oldest = message.enqueued_at
    await producer.enqueue_delayed(3, 3600)
    (held,) = await consumer.dequeue()

    queue = await admin.queue_metrics("tasks")
    assert (queue.name, queue.total_messages, queue.pending_messages) == ("tasks", 3, 2)
    assert (queue.locked_messages, queue.archived_messages) == (1, 0)
    assert held.enqueued_at <= oldest == queue.oldest_pending_message <= queue.newest_message
    await consumer.archive(held.id)
    assert (await admin.queue_metrics("tasks")).archived_messages == 1
    (listed,) = await admin.all_queues_metrics()
    assert (listed.pending_messages, listed.newest_message) == (2, None)

    system = await admin.system_stats()
    assert (system.total_queues, system.total_workers, system.active_workers) == (1, 2, 2)
    assert (system.total_messages, system.pending_messages) == (2, 2)
    assert (system.locked_messages, system.archived_messages) == (0, 1)


async def test_statistics_of_workers_have_the_names_of_pgqrs(admin) -> None:
    producer = pgqrs.Producer(admin, "tasks", "h", 1)
    consumer = pgqrs.Consumer(admin, "tasks", "h", 2)
    await producer.enqueue(1)
    await consumer.dequeue()
    stats = await admin.worker_stats("tasks")
    (health,) = await admin.worker_health_stats()
    for counts in (stats, health):
        assert (counts.total_workers, counts.ready_workers, counts.stopped_workers) == (2, 2, 0)
        assert counts.suspended_workers == counts.polling_workers == counts.interrupted_workers == 0
    assert (health.queue_name, health.stale_workers) == ("Global", 0)
    assert stats.average_messages_per_worker == 0.5
    assert stats.newest_heartbeat_age is not None
    assert stats.oldest_worker_age is not None
    assert stats.oldest_worker_age >= stats.newest_heartbeat_age


def test_a_rate_has_the_names_of_pgqrs() -> None:
    full = pgqrs.RateLimitStatus(10.0, 10, 5.0)
    assert (full.available_tokens, full.burst_capacity, full.max_per_second) == (10, 10, 5.0)
    assert (full.utilization_percentage, full.is_full, full.is_near_empty) == (100.0, True, False)
    low = pgqrs.RateLimitStatus(1.9, 10, 5.0)
    assert (low.available_tokens, low.utilization_percentage) == (1, 10.0)
    assert (low.is_full, low.is_near_empty) == (False, True)

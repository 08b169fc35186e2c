"""Neither a password nor a payload is ever logged: not at DEBUG, and not when something fails.

Everything under ``pgqrs_sa`` is captured as a handler would write it, tracebacks and all ``extra``
values included. What an application's own exception says is the application's, and so are the
parameters that SQLAlchemy prints unless the engine is made with ``hide_parameters=True``.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import (
    AsyncConsumer,
    Consumer,
    DeadLetter,
    Delivery,
    DuplicateMessage,
    Hooks,
    Item,
    LeaseLost,
    Message,
    MessageLeased,
    PayloadError,
    PgqrsError,
    QueueNotFound,
    QueueService,
    pgqrs,
)
from support.waiting import until

from .conftest import PASSWORD

PAYLOAD = "p4yl0ad-of-somebody"
HEADER = "h34der-of-somebody"
SECRETS = (PAYLOAD, HEADER, PASSWORD, PASSWORD.replace("&", "%26"))


class Everything(logging.Handler):
    """Keeps all that any handler could write of a record."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        extra = {name: value for name, value in vars(record).items() if name != "exc_info"}
        text = f"{record.getMessage()} {extra!r}"
        if record.exc_info and record.exc_info[1] is not None:
            text += "".join(traceback.format_exception(record.exc_info[1]))
        self.lines.append(text)


@pytest.fixture
def logged() -> Iterator[Everything]:
    """Everything under ``pgqrs_sa``, however the application has set its loggers."""
    handler = Everything()
    logger = logging.getLogger("pgqrs_sa")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.fixture
def engine(login) -> sa.Engine:
    """With a password in its URL."""
    engine = login("operator")
    assert engine.url.password == PASSWORD
    return engine


def check(logged: Everything, capfd: Any = None) -> None:
    written = "\n".join(logged.lines)
    if capfd is not None:
        written += "".join(capfd.readouterr())
    for secret in SECRETS:
        assert secret not in written


def test_the_capture_sees_what_it_has_to(logged) -> None:
    logger = logging.getLogger("pgqrs_sa.deep.inside")
    logger.debug("a %s", PAYLOAD)
    logger.info("b", extra={"what": HEADER})
    try:
        raise ValueError(PASSWORD)  # noqa: TRY301
    except ValueError:
        logger.exception("c")
    for line, secret in zip(logged.lines, (PAYLOAD, HEADER, PASSWORD), strict=True):
        assert secret in line
    with pytest.raises(AssertionError):
        check(logged)


def lifecycle(service: QueueService, session: Session) -> list[PgqrsError]:
    """Each way of a message, and the errors on it."""
    payload, headers = {"who": PAYLOAD}, {"who": HEADER}
    errors: list[PgqrsError] = []

    def refuse(kind: type[PgqrsError], call: Callable[[], Any]) -> None:
        with pytest.raises(kind) as caught:
            call()
        errors.append(caught.value)

    service.queues.create("mail")
    worker = service.workers.register("w", queues=["mail"])
    service.enqueue("mail", payload, headers=headers, key="k")
    service.enqueue_many("mail", [payload, Item(payload, headers=headers), payload, payload])
    service.enqueue_from("mail", sa.select(sa.literal(PAYLOAD)))
    session.add(Message(queue_name="mail", payload=payload, headers=headers))
    session.flush()
    session.commit()
    duplicate = Message(queue_name="mail", payload=payload, dedup_key="k")
    session.add(duplicate)
    refuse(DuplicateMessage, session.flush)
    session.expunge(duplicate)
    refuse(QueueNotFound, lambda: service.enqueue("mial", payload))
    refuse(PayloadError, lambda: service.enqueue("mail", {"a": {PAYLOAD, 1}}))
    refuse(PayloadError, lambda: service.enqueue("mail", [PAYLOAD, float("nan")]))
    refuse(PayloadError, lambda: service.enqueue("mail", f"{PAYLOAD}\0"))
    refuse(PayloadError, lambda: service.enqueue("mail", PAYLOAD * 100_000))
    refuse(PgqrsError, lambda: service.enqueue_many("mail", payload))
    refuse(PgqrsError, lambda: service.enqueue("mail", payload, headers=HEADER))
    delivery, two, three, four, five, six, seven = service.dequeue("mail", 9, worker=worker)
    session.commit()
    refuse(MessageLeased, lambda: service.messages.cancel(delivery.id))
    service.archive(delivery)
    refuse(LeaseLost, lambda: service.archive(delivery))
    service.delete(two)
    service.extend(three, 60)
    service.release(four)
    service.fail(five, "no")
    service.fail(six, ValueError("never"), dead=True)
    service.archive(seven, outcome="discarded", reason="why")
    (letter,) = service.archived.find("mail", outcome="dead")
    service.archived.requeue(letter.id)
    session.commit()
    service.messages.cancel_where("mail", payload=payload, reason="enough")
    service.workers.reclaim(silent_for=1)
    service.workers.stop(worker.id)
    service.archived.prune(0)
    service.queues.purge("mail")
    session.commit()
    # A delivery may be logged as it is: by its repr it shows no payload.
    errors.append(PgqrsError(repr(delivery)))
    return errors


def test_a_whole_lifecycle_with_its_errors_logs_no_secret(migrated, engine, logged, capfd) -> None:
    with Session(engine) as session:
        errors = lifecycle(QueueService(session), session)
    check(logged, capfd)
    # The errors will be logged by their receiver.
    told = "".join(f"{error} {error!r} {vars(error)!r}" for error in errors)
    headers = HEADER  # are for tracing: the repr of a delivery shows them
    for secret in {*SECRETS} - {headers}:
        assert secret not in told


def test_statements_that_fail_show_no_payload_with_hidden_parameters(migrated, login) -> None:
    """What the documentation recommends, of both kinds: a refused value, and a missing right."""
    url = login("operator").url
    engine = sa.create_engine(url, hide_parameters=True, echo=False)
    with Session(engine) as session:
        QueueService(session).queues.create("mail")
        session.commit()
        for values in ({"priority": 40_000}, {"read_ct": 1}):
            statement = sa.insert(Message).values(queue_id=1, payload=PAYLOAD, **values)
            with pytest.raises(sa.exc.DBAPIError) as failed:
                session.execute(statement)
            session.rollback()
            assert "hide_parameters" in str(failed.value)
            said = str(failed.value).partition("DETAIL")[0]  # the server's, of a refused row
            assert PAYLOAD not in said
            assert PASSWORD not in str(failed.value)
    engine.dispose()


class Broken(Hooks):
    """Hooks that fail."""

    def on_success(self, _event: Any) -> None:
        raise RuntimeError("a hook")


def test_a_consumer_logs_no_secret_whatever_its_handlers_do(
    migrated, engine, logged, capfd
) -> None:
    """Handlers whose errors repeat the payload, statements that fail with it as a parameter."""
    consumer = Consumer(
        sessionmaker(engine), poll_interval=0.02, housekeeping=0.05, hooks=[Broken()]
    )

    @consumer.on("mail", lease=30)
    def handle(payload: dict, session: Session, delivery: Delivery) -> Any:
        match payload["n"]:
            case 1:
                raise ValueError(payload["who"])
            case 2:
                session.execute(sa.text("SELECT CAST(:who AS int)"), payload)
            case 3:
                return DeadLetter(f"not {payload['who']}")
            case 4:
                session.connection().invalidate()
            case 5:
                QueueService(session).archived.get(10**9)
        return None

    with Session(engine) as session:
        service = QueueService(session)
        service.queues.create("mail", max_read_ct=1)
        service.enqueue_many(
            "mail", [Item({"n": n, "who": PAYLOAD}, headers={"who": HEADER}) for n in range(6)]
        )
        session.commit()
    consumer.run(until_empty=True)
    with Session(engine) as session:
        metrics = QueueService(session).messages.metrics("mail")
    assert (metrics.archived, metrics.dead, metrics.live) == (1, 5, 0)
    assert any("dead" in line for line in logged.lines), "nothing was logged: nothing was shown"
    check(logged, capfd)


def test_a_consumer_that_cannot_settle_any_more_logs_no_secret(
    kept, migrated, engine, logged, capfd
) -> None:
    """The statement that fails has the text of the handler's error as a parameter."""
    owner = sa.create_engine(kept.url, poolclass=sa.NullPool)
    consumer = Consumer(sessionmaker(engine), poll_interval=0.02, housekeeping=None)

    @consumer.on("mail")
    def handle(payload: dict) -> None:
        with owner.begin() as connection:
            connection.exec_driver_sql("REVOKE UPDATE (vt) ON pgqrs_messages FROM sec_operator")
        raise ValueError(payload["who"])

    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
        QueueService(session).enqueue("mail", {"who": PAYLOAD})
    try:
        with pytest.raises(sa.exc.ProgrammingError):
            consumer.run(until_empty=True)
    finally:
        with owner.begin() as connection:
            connection.exec_driver_sql("GRANT UPDATE (vt) ON pgqrs_messages TO sec_operator")
    assert any("cannot go on" in line for line in logged.lines)
    check(logged, capfd)


async def test_an_awaited_consumer_logs_no_secret_whatever_its_handlers_do(
    migrated, engine, logged, capfd
) -> None:
    driven = create_async_engine(engine.url.set(drivername="postgresql+asyncpg"))
    consumer = AsyncConsumer(
        async_sessionmaker(driven), poll_interval=0.02, housekeeping=0.05, hooks=[Broken()]
    )

    @consumer.on("mail", timeout=4)
    async def handle(payload: dict, session: AsyncSession) -> Any:
        match payload["n"]:
            case 1:
                raise ValueError(payload["who"])
            case 2:
                await session.execute(sa.text("SELECT CAST(:who AS int)"), {"who": payload["who"]})
            case 3:
                return DeadLetter(f"not {payload['who']}")
            case 4:
                await asyncio.sleep(60)
        return None

    with Session(engine) as session, session.begin():
        service = QueueService(session)
        service.queues.create("mail", max_read_ct=1)
        service.enqueue_many("mail", [{"n": n, "who": PAYLOAD} for n in range(5)])
    await consumer.run(until_empty=True)
    await driven.dispose()
    with Session(engine) as session:
        metrics = QueueService(session).messages.metrics("mail")
    assert (metrics.archived, metrics.dead, metrics.live) == (1, 4, 0)
    check(logged, capfd)


def test_a_listener_that_cannot_connect_logs_no_password(migrated, engine, logged, capfd) -> None:
    """Neither when nobody answers there, nor when the password is wrong or the database is not."""
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
    url = engine.url.set(drivername="postgresql")
    nobody = url.set(query={}, host="127.0.0.1", port=1, database=None)
    for dsn in (nobody, url.set(database="no such database"), url.set(username="nobody else")):
        heard = len(logged.lines)
        consumer = Consumer(
            sessionmaker(engine),
            poll_interval=0.02,
            listen_dsn=dsn.render_as_string(hide_password=False),
        )
        consumer.on("mail")(lambda payload: None)
        consumer.start()
        until(
            lambda heard=heard: any("listen" in line for line in logged.lines[heard:]),
            "something is logged: else nothing was shown",
        )
        assert consumer.stop() == 0
    check(logged, capfd)


async def test_the_vocabulary_of_pgqrs_logs_no_secret(migrated, engine, logged, capfd) -> None:
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    config = pgqrs.Config.from_dsn(dsn)
    config.heartbeat_interval_seconds = 0.05
    async with pgqrs.Producer(config, "mail", "h", 1) as producer:
        await producer.enqueue({"who": PAYLOAD})
        async with pgqrs.Consumer(config, "mail", "h", 2) as consumer:
            await consumer.dequeue_delay(60)
            # Its heartbeat fails: there is nobody to raise that to, so it is logged.
            consumer._service = None  # what follows a lost connection is an error like any other
            assert await consumer._heartbeat_while_leasing()
            del consumer._service
            assert logged.lines, "nothing was logged: nothing was shown"
            assert PASSWORD not in f"{config!r} {consumer!r} {producer!r} {config.settings!r}"
    check(logged, capfd)


def test_no_module_logs_by_another_name(logged) -> None:
    """So that ``logging.getLogger("pgqrs_sa")`` is all that an application has to set."""
    ours = [name for name in logging.root.manager.loggerDict if "pgqrs" in name]
    assert ours
    assert all(name == "pgqrs_sa" or name.startswith("pgqrs_sa.") for name in ours)

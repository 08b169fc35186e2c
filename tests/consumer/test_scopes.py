"""Calls that run at once share no session, for any scope of a registry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqrs_sa import AsyncConsumer, Consumer, Delivery, InvalidArgument, Retry
from support.consumers import Kit, effect
from support.waiting import PATIENCE, until_awaited

QUICK: dict[str, Any] = {
    "poll_interval": 0.02,
    "housekeeping": None,
    "retry": Retry(max_attempts=1, base=0, jitter=0),
}
AT_ONCE = 8


@pytest.fixture
def flask(threads: Kit) -> Iterator[SimpleNamespace]:
    """An application with Flask-SQLAlchemy, on the database of the kit."""
    app, db = Flask(__name__), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = threads.engine.url.render_as_string(hide_password=False)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 2 * AT_ONCE + 4}
    db.init_app(app)
    yield SimpleNamespace(app=app, db=db)
    with app.app_context():
        db.engine.dispose()


def all_at_once(consumer: Any, registry: Any) -> list[tuple[bool, Any]]:
    """Register a handler; return whether each session was the registry's, and the session."""
    seen: list[tuple[bool, Any]] = []
    together = threading.Barrier(AT_ONCE)

    @consumer.on("mail")
    def handler(session: Session, delivery: Delivery) -> None:
        effect(session, delivery)
        seen.append((registry() is session, session))
        together.wait(PATIENCE)

    return seen


def check_apart(kit: Kit, ids: list[int], seen: list[tuple[bool, Any]]) -> None:
    assert sorted(kit.effects()) == [(id_, 1) for id_ in ids]
    assert kit.outcomes() == dict.fromkeys(ids, "archived")
    assert [current for current, _ in seen] == [True] * len(ids)
    assert len({id(session) for _, session in seen}) == len(ids)
    assert not any(session.in_transaction() for _, session in seen)


@pytest.mark.parametrize("given", [True, False])
def test_calls_with_flask_sqlalchemys_session_have_sessions_of_their_own(threads, flask, given):
    ids = threads.send(*range(2 * AT_ONCE))
    options = {"call_context": flask.app.app_context} if given else {}
    consumer = Consumer(flask.db.session, concurrency=AT_ONCE, **QUICK, **options)
    seen = all_at_once(consumer, flask.db.session)

    with flask.app.app_context():
        mine = flask.db.session()
        mine.connection()
        consumer.check()
        assert consumer.run(until_empty=True) == 0
        assert flask.db.session() is mine
        assert mine.in_transaction()

    check_apart(threads, ids, seen)


def test_an_application_context_around_run_is_not_needed(threads, flask):
    ids = threads.send(*range(AT_ONCE))
    consumer = Consumer(
        flask.db.session, concurrency=AT_ONCE, call_context=flask.app.app_context, **QUICK
    )
    seen = all_at_once(consumer, flask.db.session)

    assert consumer.run(until_empty=True) == 0

    check_apart(threads, ids, seen)
    consumer.dispose()


def test_without_any_application_context_the_error_names_what_to_pass(threads, flask):
    threads.send(1)
    consumer = Consumer(flask.db.session, **QUICK)
    consumer.on("mail")(lambda session: None)

    for start in (consumer.check, consumer.start):
        with pytest.raises(InvalidArgument, match=r"call_context=app\.app_context"):
            start()

    assert threads.workers() == []


@pytest.mark.parametrize("given", [True, False])
def test_handlers_that_use_flask_sqlalchemys_session_themselves_do_not_share_it(
    threads, flask, given
):
    good, bad = threads.send("good", "bad")
    added, rolled_back = threading.Event(), threading.Event()
    options = {"call_context": contextlib.nullcontext} if given else {}
    with flask.app.app_context():
        consumer = Consumer(sessionmaker(flask.db.engine), concurrency=2, **QUICK, **options)

        @consumer.on("mail")
        def handler(payload: str, delivery: Delivery) -> None:
            if payload == "good":
                effect(flask.db.session, delivery)
                added.set()
                assert rolled_back.wait(PATIENCE)
                flask.db.session.commit()
                return
            assert added.wait(PATIENCE)
            flask.db.session.rollback()
            rolled_back.set()
            raise ValueError(payload)

        assert consumer.run(until_empty=True) == 0

    assert threads.effects() == [(good, 1)]
    assert threads.outcomes() == {good: "archived", bad: "dead"}


def test_calls_of_a_registry_by_thread_have_sessions_of_their_own(threads):
    ids = threads.send(*range(2 * AT_ONCE))
    registry = scoped_session(sessionmaker(threads.app_engine()))
    consumer = Consumer(registry, concurrency=AT_ONCE, **QUICK)
    seen = all_at_once(consumer, registry)

    assert consumer.run(until_empty=True) == 0

    check_apart(threads, ids, seen)


def test_calls_of_a_registry_by_context_variable_have_sessions_of_their_own(tasks):
    ids = tasks.send(*range(2 * AT_ONCE))
    request: ContextVar[object] = ContextVar("request")

    @contextlib.contextmanager
    def new_request() -> Iterator[None]:
        before = request.set(object())
        yield
        request.reset(before)

    async def run() -> list[tuple[bool, Any]]:
        request.set("lifespan")
        registry = async_scoped_session(async_sessionmaker(tasks.app_engine()), request.get)
        consumer = AsyncConsumer(registry, concurrency=AT_ONCE, call_context=new_request, **QUICK)
        seen: list[tuple[bool, Any]] = []

        @consumer.on("mail")
        async def handler(session: AsyncSession, delivery: Delivery) -> None:
            await session.run_sync(effect, delivery)
            seen.append((registry() is session, session))
            number = (len(seen) - 1) // AT_ONCE + 1
            await until_awaited(lambda: len(seen) >= number * AT_ONCE, "all have begun")

        await consumer.check()
        mine = registry()
        await mine.connection()
        assert await consumer.run(until_empty=True) == 0
        assert registry() is mine
        assert mine.in_transaction()
        await registry.remove()
        assert not registry.registry.registry
        return seen

    check_apart(tasks, ids, tasks.call(run))


# --------------------------------------------------------------------------- what is refused


def test_a_scope_that_threads_share_is_refused_before_the_start(threads):
    request: ContextVar[object] = ContextVar("request", default="the program")
    registry = scoped_session(sessionmaker(threads.app_engine()), request.get)
    consumer = Consumer(registry, concurrency=1, **QUICK)
    consumer.on("mail")(lambda session: None)

    for start in (consumer.check, consumer.start):
        with pytest.raises(InvalidArgument, match=r"'the program' in both: .*call_context"):
            start()

    assert threads.workers() == []


def test_a_scope_that_calls_share_among_themselves_is_refused_before_the_start(threads):
    request: ContextVar[object] = ContextVar("request", default="the program")

    @contextlib.contextmanager
    def same_for_all() -> Iterator[None]:
        before = request.set("a call")
        yield
        request.reset(before)

    registry = scoped_session(sessionmaker(threads.app_engine()), request.get)
    consumer = Consumer(registry, call_context=same_for_all, **QUICK)
    consumer.on("mail")(lambda session: None)

    with pytest.raises(InvalidArgument, match="'a call' in both"):
        consumer.start()


@pytest.mark.parametrize("scope", ["shared", "missing", "of the thread"])
def test_a_scope_that_tasks_share_is_refused_before_the_start(tasks, scope):
    request: ContextVar[object] = ContextVar("request")

    async def refused() -> str:
        if scope == "shared":
            request.set("lifespan")
        function = threading.get_ident if scope == "of the thread" else request.get
        registry = async_scoped_session(async_sessionmaker(tasks.app_engine()), function)
        consumer = AsyncConsumer(registry, **QUICK)

        @consumer.on("mail")
        async def handler(session: AsyncSession) -> None: ...

        with pytest.raises(InvalidArgument, match="call_context"):
            await consumer.check()
        with pytest.raises(InvalidArgument) as caught:
            await consumer.start()
        return str(caught.value)

    message = tasks.call(refused)
    assert ("LookupError" if scope == "missing" else "would share a session") in message
    assert tasks.workers() == []


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (contextlib.nullcontext(), "must be a function that returns a context manager"),
        ("app", "must be a function that returns a context manager, .* not 'app'"),
    ],
)
def test_a_call_context_is_a_function(threads, given, wrong):
    with pytest.raises(InvalidArgument, match=wrong):
        Consumer(sessionmaker(threads.engine), call_context=given)


def test_a_call_context_that_cannot_be_entered_is_refused_before_the_start(threads):
    consumer = Consumer(sessionmaker(threads.engine), call_context=dict, **QUICK)
    consumer.on("mail")(lambda session: None)

    with pytest.raises(InvalidArgument, match="without arguments that returns a context manager"):
        consumer.start()

    assert threads.workers() == []


# --------------------------------------------------------------------------- around a call


@pytest.mark.parametrize("session", [True, False])
def test_a_call_is_made_in_its_call_context(kit, session):
    good, bad = kit.send("good"), kit.send("bad")
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    heard: list[Any] = []

    @contextlib.contextmanager
    def acme() -> Iterator[None]:
        before = tenant.set("acme")
        try:
            yield
            if session and heard:  # not as the consumer tries it, before it starts
                heard.append(kit.outcomes())
        except ValueError as error:
            heard.append(str(error))
            raise
        finally:
            tenant.reset(before)

    consumer = kit.consumer(call_context=acme, **QUICK | {"concurrency": 1})

    @consumer.on("mail", session=session)
    def handler(_session, delivery):
        heard.append(tenant.get())
        if delivery.payload == "bad":
            raise ValueError("no")

    assert consumer.run() == 0

    after_good = [{good[0]: "archived"}] if session else []  # the commit came before
    assert heard == ["acme", *after_good, "acme", "no"]
    assert kit.outcomes() == {good[0]: "archived", bad[0]: "dead"}


@pytest.mark.parametrize("session", [True, False])
def test_a_call_context_that_suppresses_an_error_records_no_success(kit, session):
    (id_,) = kit.send("bad")
    consumer = kit.consumer(call_context=lambda: contextlib.suppress(ValueError), **QUICK)

    @consumer.on("mail", session=session)
    def handler(_session, _delivery):
        raise ValueError("no")

    assert consumer.run() == 0

    assert kit.outcomes() == {id_: "dead"}
    assert "call_context has suppressed" in kit.archive()[id_].last_error


def test_a_scope_is_empty_after_a_call_that_made_its_own_session(threads):
    threads.send(1)
    registry = scoped_session(sessionmaker(threads.app_engine()))
    made: list[Session] = []
    left: list[bool] = []

    def look() -> contextlib.AbstractContextManager[object]:
        stack = contextlib.ExitStack()
        stack.callback(lambda: left.append(registry.registry.has()))
        return stack

    consumer = Consumer(registry, concurrency=1, call_context=look, **QUICK)

    @consumer.on("mail", acknowledge="manual")
    def handler(session: Session, delivery: Delivery) -> None:
        registry.remove()
        made.extend([session, registry()])
        made[-1].execute(sa.select(1))

    assert consumer.run(until_empty=True) == 0

    assert made[0] is not made[1]
    assert not any(session.in_transaction() for session in made)
    assert not any(left)


def test_a_scope_that_the_handler_leaves_is_not_taken_from_others(threads):
    """A handler in a scope of its own removes no session of another scope."""
    threads.send(1)
    number: ContextVar[object] = ContextVar("number", default="the program")

    @contextlib.contextmanager
    def new() -> Iterator[None]:
        number.set(object())
        yield

    registry = scoped_session(sessionmaker(threads.app_engine()), number.get)
    mine = registry()
    mine.connection()
    consumer = Consumer(registry, concurrency=1, call_context=new, **QUICK)

    @consumer.on("mail")
    def handler(session: Session) -> None:
        number.set("the program")

    assert consumer.run(until_empty=True) == 0
    assert registry() is mine
    assert mine.in_transaction()
    registry.remove()

"""The listener: it hears, it notices when it does not, and it goes when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import InvalidArgument, Message, QueueService
from pgqrs_sa._core.sql.wakeup import channel
from pgqrs_sa.wakeup import Listener
from support.waiting import PATIENCE, until

CHANNEL = channel(None)
AT_ONCE = 60.0
"""Seconds within which a busy machine ends a thread; the tests let nothing else end so soon."""


@dataclass
class Woken:
    """What a listener said; `until` waits for it."""

    names: list[str | None] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, queue: str | None) -> None:
        with self.changed:
            self.names.append(queue)
            self.changed.notify_all()

    def until(self, *expected: str | None) -> None:
        """Wait until exactly this was notified since the last call."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.names) >= len(expected), PATIENCE)
            assert self.names == list(expected)
            self.names.clear()


@pytest.fixture
def woken() -> Woken:
    return Woken()


@pytest.fixture(params=["psycopg", "psycopg_async", "asyncpg"])
def driver(request) -> str:
    return request.param


@pytest.fixture
def make_engine(migrated, driver) -> Iterator[Callable[..., object]]:
    """Return a function that makes an engine of the driver that is being tested."""
    engines = []

    def make(**options):
        if driver == "psycopg":
            engines.append(sa.create_engine(migrated.url, **options))
        else:
            engines.append(create_async_engine(migrated.async_url(driver), **options))
        return engines[-1]

    yield make
    for engine in engines:
        closing = engine.dispose()
        if closing is not None:
            asyncio.run(closing)


@pytest.fixture
def start() -> Iterator[Callable[..., Listener]]:
    """Return a function that starts a listener and waits until it hears."""
    listeners = []

    def start(*args, wait=True, **options) -> Listener:
        listener = Listener(*args, **options)
        listeners.append(listener)
        listener.start()
        if wait:
            until(lambda: listener.connected)
        return listener

    yield start
    for item in listeners:
        item.stop()
        assert item._thread is None or not item._thread.is_alive()


@pytest.fixture
def server(migrated) -> Iterator[psycopg.Connection]:
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        yield connection


def notify(server, payload="mail", name=CHANNEL):
    server.execute("SELECT pg_notify(%s, %s)", [name, payload])


def backends(server) -> list[int]:
    """The connections that have last done what a listener does."""
    rows = server.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND query ~ '^(NOTIFY|LISTEN) '"
    )
    return [pid for (pid,) in rows]


def test_it_passes_on_what_is_notified(make_engine, start, woken, server):
    start(make_engine(), woken)
    woken.until(None)

    notify(server, "mail")
    notify(server, "other", "pgqrs_0123456789abcdef")  # that of other tables
    notify(server, "post")
    woken.until("mail", "post")


def test_an_enqueue_wakes_through_it(make_engine, start, woken, engine, waits):
    with Session(engine) as session, session.begin():
        QueueService(session).queues.create("mail")
    waits("mail")
    start(make_engine(), woken)
    woken.until(None)

    with Session(engine) as session, session.begin():
        QueueService(session, notify=True).enqueue("mail", 1)
    woken.until("mail")
    with Session(engine, info={"pgqrs_notify": True}) as session, session.begin():
        session.add(Message(queue_name="mail", payload=1))
    woken.until("mail")


def test_it_uses_none_of_the_pool(make_engine, start, woken):
    engine = make_engine(pool_size=1, max_overflow=0)
    start(engine, woken)

    assert engine.pool.checkedin() == engine.pool.checkedout() == 0


def test_it_connects_as_the_engine_does(migrated, make_engine, start, woken, server, driver):
    name = f"listener_{driver}"
    arguments = (
        {"server_settings": {"application_name": name}}
        if driver == "asyncpg"
        else {"application_name": name}
    )
    start(make_engine(connect_args=arguments), woken)

    (count,) = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]
    ).fetchone()
    assert count == 1


def test_a_creator_is_asked_for_its_connection(migrated, driver, start, woken, server):
    made = []

    def creator():
        made.append(psycopg.connect(migrated.dsn))
        return made[-1]

    async def async_creator():
        if driver == "asyncpg":
            import asyncpg

            made.append(await asyncpg.connect(migrated.dsn))
        else:
            made.append(await psycopg.AsyncConnection.connect(migrated.dsn))
        return made[-1]

    engine = (
        sa.create_engine("postgresql+psycopg://", creator=creator)
        if driver == "psycopg"
        else create_async_engine(
            f"postgresql+{driver.partition('_')[0]}://", async_creator=async_creator
        )
    )
    start(engine, woken)
    woken.until(None)
    notify(server)
    woken.until("mail")

    assert len(made) == 1


def test_a_hook_that_leaves_a_transaction_open_does_no_harm(make_engine, start, woken, server):
    engine = make_engine()

    @event.listens_for(getattr(engine, "sync_engine", engine), "connect")
    def _connect(connection, _record):
        cursor = connection.cursor()
        cursor.execute("SET application_name = 'hooked'")
        cursor.close()

    start(engine, woken)
    woken.until(None)
    notify(server)
    woken.until("mail")


def test_it_finds_back_however_often_its_backend_is_ended(make_engine, start, woken, server):
    listener = start(make_engine(), woken)
    woken.until(None)
    for round_ in range(20):
        until(lambda: listener.connected)
        (pid,) = backends(server)
        server.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        woken.until(None)  # subscribed again: messages may have come meanwhile
        notify(server, f"queue-{round_}")
        woken.until(f"queue-{round_}")

    until(lambda: backends(server) and listener.connected)
    assert len(backends(server)) == 1


class Proxy:
    """Passes bytes between TCP and the server, until it is told to swallow them."""

    def __init__(self, database) -> None:
        self._server = database.server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.deaf = threading.Event()
        self.accepted = self.swallowed = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def _run(self, *work) -> None:
        thread = threading.Thread(target=work[0], args=work[1:])
        self._threads.append(thread)
        thread.start()

    def _connect(self) -> socket.socket:
        host, port = self._server.host, self._server.port
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(f"{host}/.s.PGSQL.{port}")
        return upstream

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.accepted += 1
                upstream = self._connect()
                self._sockets += [client, upstream]
                self._run(self._pass, client, upstream)
                self._run(self._pass, upstream, client)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.deaf.is_set():
                    self.swallowed += len(data)
                else:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for case in (self._listening, *self._sockets):
            with contextlib.suppress(OSError):
                case.shutdown(socket.SHUT_RDWR)
            case.close()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def proxy(migrated) -> Iterator[Proxy]:
    proxy = Proxy(migrated)
    yield proxy
    proxy.close()


@pytest.fixture
def through(proxy, migrated, driver) -> sa.URL:
    return sa.make_url(migrated.async_url(driver.partition("_")[0])).set(
        host="127.0.0.1", port=proxy.port, query={}
    )


def test_a_connection_that_has_fallen_silent_is_noticed_and_replaced(
    proxy, through, make_engine, start, woken, server, caplog
):
    listener = start(make_engine(), woken, listen_dsn=through, ping_interval=0.05, ping_timeout=3)
    woken.until(None)
    notify(server)
    woken.until("mail")
    assert proxy.accepted == 1

    with caplog.at_level(logging.WARNING, "pgqrs_sa.wakeup"):
        proxy.deaf.set()
        until(lambda: not listener.connected)
    assert "nothing was heard for 3 s" in caplog.text

    proxy.deaf.clear()
    until(lambda: listener.connected)
    assert proxy.accepted > 1
    woken.until(None)
    notify(server)
    woken.until("mail")


def test_one_that_is_heard_is_kept(proxy, through, make_engine, start, woken):
    listener = start(make_engine(), woken, listen_dsn=through, ping_interval=0.01, ping_timeout=60)
    for _ in range(50):
        assert listener.connected
        time.sleep(0.01)
    assert proxy.accepted == 1


@pytest.fixture
def proxies(migrated) -> Iterator[list[Proxy]]:
    proxies = [Proxy(migrated), Proxy(migrated)]
    yield proxies
    for proxy in proxies:
        proxy.close()


@pytest.fixture(params=["host list", "keywords", "URL"])
def both(request, proxies, through, migrated) -> str | sa.URL:
    """The server by two ways, in each form that names several hosts."""
    hosts = ",".join("127.0.0.1" for _ in proxies)
    ports = ",".join(str(proxy.port) for proxy in proxies)
    query = {"host": hosts, "port": ports, "target_session_attrs": "read-write"}
    url = sa.URL.create(
        "postgresql", through.username, through.password, database=through.database, query=query
    )
    if request.param == "URL":
        return url.set(drivername=through.drivername)
    if request.param == "host list":
        places = ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies)
        dsn = url.set(query={"target_session_attrs": "read-write"})
        return dsn.render_as_string(hide_password=False).replace("@/", f"@{places}/")
    words = query | {"user": url.username, "password": url.password, "dbname": url.database}
    return " ".join(f"{name}='{value}'" for name, value in words.items() if value)


def goes_over(proxies, listener, woken, server) -> None:
    """The first way is closed, and the listener goes the second."""
    woken.until(None)
    assert [proxy.accepted for proxy in proxies] == [1, 0]
    proxies[0].close()
    woken.until(None)
    until(lambda: listener.connected)
    assert proxies[1].accepted
    notify(server)
    woken.until("mail")


def test_it_goes_to_the_next_host_of_its_dsn(proxies, both, make_engine, start, woken, server):
    listener = start(make_engine(), woken, listen_dsn=both)
    goes_over(proxies, listener, woken, server)


@pytest.mark.parametrize("both", ["URL"], indirect=True)
def test_it_goes_to_the_next_host_of_its_engine(proxies, both, driver, start, woken, server):
    engine = create_async_engine(both) if driver != "psycopg" else sa.create_engine(both)
    listener = start(engine, woken)
    goes_over(proxies, listener, woken, server)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
@pytest.mark.parametrize("both", ["host list"], indirect=True)
def test_a_host_that_never_answers_is_passed_over_in_time(
    proxies, both, make_engine, start, woken, server
):
    proxies[0].deaf.set()
    start(make_engine(), woken, listen_dsn=f"{both}&connect_timeout=2")
    assert [proxy.accepted for proxy in proxies] == [1, 1]
    woken.until(None)
    notify(server)
    woken.until("mail")


PGBOUNCER = os.environ.get("PGQRS_TEST_PGBOUNCER_BIN") or shutil.which(
    "pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"
)


@pytest.fixture
def bouncer(migrated) -> Iterator[int]:
    """PgBouncer in transaction mode; its port. It gives a client the server that it had before."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = migrated.server
    config = (
        f"[databases]\n* = host={server.host} port={server.port} user={server.user}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\n"
    )
    as_user = ["-u", "nobody"] if os.geteuid() == 0 else []  # it refuses to run as root
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "ini").write_text(config)
        with subprocess.Popen(
            [PGBOUNCER, *as_user, f"{folder}/ini"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            until(lambda: is_open(port))
            yield port
            process.terminate()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.skipif(PGBOUNCER is None, reason="there is no pgbouncer")
def test_a_pooler_that_delivers_nothing_is_not_taken_for_a_connection(
    bouncer, migrated, start, woken, server, driver, caplog
):
    name = driver.partition("_")[0]
    url = f"postgresql+{name}://{migrated.server.user}@127.0.0.1:{bouncer}/{migrated.name}"
    engine = sa.create_engine(url) if driver == "psycopg" else create_async_engine(url)
    listener = start(engine, woken, wait=False, ping_timeout=0.5)
    until(lambda: listener._attempts > 1)
    assert not listener.connected
    assert "give its server's address as listen_dsn" in caplog.text

    direct = Woken()
    start(engine, direct, listen_dsn=migrated.dsn)
    direct.until(None)
    notify(server)
    direct.until("mail")


def stopped_at_once(listener: Listener) -> None:
    began = time.monotonic()
    listener.stop()
    assert time.monotonic() - began < AT_ONCE
    assert not listener.connected
    assert not listener._thread.is_alive()


def test_it_stops_at_once_and_leaves_no_connection(make_engine, start, woken, server):
    listener = start(make_engine(), woken, ping_interval=600)
    assert len(backends(server)) == 1

    stopped_at_once(listener)
    listener.stop()  # does nothing

    until(lambda: not backends(server))
    notify(server)
    woken.until(None)
    gc.collect()


def test_it_stops_at_once_while_its_connection_is_silent(proxy, through, make_engine, start, woken):
    listener = start(make_engine(), woken, listen_dsn=through, ping_interval=0.01, ping_timeout=600)
    proxy.deaf.set()
    until(lambda: proxy.swallowed)  # a ping is on its way, and not heard

    stopped_at_once(listener)


def test_it_stops_at_once_while_it_is_connecting(proxy, through, make_engine, start, woken):
    proxy.deaf.set()
    listener = start(make_engine(), woken, listen_dsn=through, wait=False, ping_timeout=600)
    until(lambda: proxy.accepted)

    stopped_at_once(listener)
    proxy.close()
    until(lambda: not [t for t in threading.enumerate() if "pgqrs" in t.name])


def test_a_connection_that_comes_after_the_stop_is_closed(migrated, woken):
    asked, go, made = threading.Event(), threading.Event(), []

    def creator():
        asked.set()
        assert go.wait(PATIENCE)
        made.append(psycopg.connect(migrated.dsn))
        return made[0]

    listener = Listener(sa.create_engine("postgresql+psycopg://", creator=creator), woken)
    listener.start()
    assert asked.wait(PATIENCE)
    stopped_at_once(listener)
    go.set()

    until(lambda: made and made[0].closed)
    assert woken.names == []


def test_it_stops_at_once_between_two_attempts_to_connect(make_engine, start, woken, driver):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    name = driver.partition("_")[0]
    listener = start(
        make_engine(),
        woken,
        listen_dsn=f"postgresql+{name}://nobody@127.0.0.1:{port}/x",
        wait=False,
    )
    until(lambda: listener._attempts > 3)
    paused = threading.Event()
    listener._pause = lambda: paused.set() or 600.0
    assert paused.wait(PATIENCE)
    assert not listener.connected

    stopped_at_once(listener)
    assert woken.names == []


def test_what_it_wakes_may_stop_it(make_engine, server):
    done = threading.Event()

    def stop(queue):
        if queue is not None:
            listener.stop()
            done.set()

    listener = Listener(make_engine(), stop)
    listener.start()
    until(lambda: listener.connected)
    notify(server)
    assert done.wait(PATIENCE)
    listener._thread.join(PATIENCE)
    assert not listener._thread.is_alive()


def test_what_it_wakes_may_fail(make_engine, start, server, caplog):
    heard = Woken()

    def fail(queue):
        heard(queue)
        raise RuntimeError(f"no {queue}")

    listener = start(make_engine(), fail)
    heard.until(None)
    notify(server)
    heard.until("mail")
    notify(server)
    heard.until("mail")

    assert listener.connected
    assert "no mail" in caplog.text


def test_the_pauses_between_attempts_grow_and_end_growing(engine):
    listener = Listener(engine, print)
    pauses = [listener._pause() for _ in range(12)]

    for number, pause in enumerate(pauses):
        longest = min(0.1 * 2**number, 10)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)


def test_a_listener_is_started_once_and_not_after_it_was_stopped(engine, woken):
    listener = Listener(engine, woken)
    listener.stop()  # never started
    with pytest.raises(InvalidArgument, match="make another"):
        listener.start()


def test_tables_in_another_schema_are_listened_to_where_they_are(engine, start, woken, server):
    moved = engine.execution_options(schema_translate_map={None: "jobs"})
    start(moved, woken)
    woken.until(None)

    notify(server, "no", CHANNEL)
    notify(server, "mail", channel("jobs"))
    woken.until("mail")


def test_a_driver_that_cannot_listen_is_refused_by_name(migrated, woken, start, server):
    engine = sa.create_engine("sqlite://")
    with pytest.raises(InvalidArgument, match="'pysqlite' cannot be listened with, psycopg and"):
        Listener(engine, woken)

    start(engine, woken, listen_dsn=migrated.dsn)  # psycopg, unless it names another
    woken.until(None)
    notify(server)
    woken.until("mail")


def test_a_dsn_that_cannot_be_read_is_refused_without_its_password(engine, woken):
    with pytest.raises(InvalidArgument, match="cannot be read") as caught:
        Listener(engine, woken, listen_dsn="postgresql://me:sec@ret@host:x/db")
    assert "ret" not in str(caught.value).replace("postgresql", "")

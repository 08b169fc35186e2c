"""What the benchmark measures apart from time: each number is compared with what is known."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from benchmarks import metering
from benchmarks.place import Place
from benchmarks.scenarios.cost import hot_share
from benchmarks.wire import Answers, Wire
from benchmarks.work import Tally
from support.cases import each_case


@pytest.fixture
def place(database) -> Place:
    """An empty database, past PgBouncer."""
    server = database.direct.server
    if not server.host.startswith("/"):
        pytest.skip("the meter reads /proc of the server's machine, and the wire is a Unix socket")
    return Place(server.host, server.port, server.user, database.name, str(server.bin_dir))


@pytest.fixture
def connection(place: Place) -> Iterator[psycopg.Connection]:
    with psycopg.connect(place.conninfo, autocommit=True) as connected:
        yield connected


# ----------------------------------------------------------------------------- requests and commits


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + (len(body) + 4).to_bytes(4, "big") + body


STARTED = message(b"R", b"\0\0\0\0") + message(b"S", b"name\0on\0") + message(b"Z", b"I")
INSIDE = message(b"C", b"BEGIN\0") + message(b"Z", b"T")
COMMITTED = message(b"C", b"COMMIT\0") + message(b"Z", b"I")
ROLLED_BACK = message(b"C", b"ROLLBACK\0") + message(b"Z", b"I")
PREPARED = message(b"1") + message(b"Z", b"I")
SELECTED = message(b"D", b"Z" * 300) + message(b"C", b"SELECT 1\0") + message(b"Z", b"I")

EXCHANGES = [
    (STARTED, 1, 0),
    (b"N" + STARTED + SELECTED, 2, 1),
    (STARTED + INSIDE + COMMITTED, 3, 1),
    (STARTED + INSIDE + ROLLED_BACK, 3, 0),
    (STARTED + PREPARED + SELECTED + SELECTED, 4, 2),
]


@each_case(("data", "requests", "commits"), EXCHANGES)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_answers_are_counted_however_they_are_cut(
    data: bytes, requests: int, commits: int, size: int
) -> None:
    answers = Answers()
    for start in range(0, len(data), size):
        answers.feed(data[start : start + size])
    assert (answers.requests, answers.commits) == (requests, commits)


def test_a_wire_counts_the_requests_of_all_connections_and_not_their_start(place: Place) -> None:
    with Wire(place) as wire:
        meter = metering.WireMeter(wire)
        with psycopg.connect(wire.place.conninfo) as first:
            first.execute("SELECT 1")
            meter.start()
            first.execute("SELECT 2")
            first.commit()  # two requests, one commit
            first.execute("SELECT 3")
            first.rollback()  # three requests, since it has to begin: no commit
            with psycopg.connect(wire.place.conninfo, autocommit=True) as second:
                assert second.execute("SELECT repeat('x', 200000)").fetchone() == ("x" * 200_000,)
            assert meter.stop() == {"requests": 6.0, "commits": 2.0}


# ------------------------------------------------------------------------------ CPU time and bytes


def test_a_meter_counts_the_bytes_that_were_written(
    place: Place, connection: psycopg.Connection
) -> None:
    connection.execute("CREATE TABLE written (id int PRIMARY KEY, body text)")
    with metering.CostMeter(place) as meter:
        meter.start()
        nothing = meter.stop()
        meter.start()
        connection.execute(
            "INSERT INTO written SELECT n, repeat('x', 1000) FROM generate_series(1, 1000) AS n"
        )
        spent = meter.stop()
    assert (nothing["heap"], nothing["index"]) == (0, 0)
    assert 1_000_000 < spent["heap"] < 1_300_000
    assert 16_384 <= spent["index"] < 100_000
    assert spent["wal"] > 1_000_000


def test_cpu_time_is_that_of_whoever_spent_it(place: Place, connection: psycopg.Connection) -> None:
    with metering.CostMeter(place) as meter:
        meter.start()
        connection.execute("SELECT count(*) FROM generate_series(1, 2000000)")
        server = meter.stop()
        meter.start()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        client = meter.stop()
        processes = meter._read()[1]
        own = meter._connection.info.backend_pid
    assert server["server"] > 0.1 > server["client"]
    assert client["client"] >= 0.2 > client["server"]
    assert connection.info.backend_pid in processes
    assert own not in processes


@each_case(("index", "share"), [("id", 1.0), ("held", 0.0)])
def test_the_share_of_hot_updates_depends_on_the_indexes(
    place: Place, index: str, share: float
) -> None:
    with psycopg.connect(place.conninfo) as consumer:
        consumer.execute("DROP TABLE IF EXISTS leases")  # the statistics go with it
        consumer.execute("CREATE TABLE leases (id int, held int) WITH (fillfactor = 50)")
        consumer.execute(f"CREATE INDEX ON leases ({index})")
        consumer.execute("INSERT INTO leases SELECT n, 0 FROM generate_series(1, 100) AS n")
        consumer.commit()
        consumer.execute("UPDATE leases SET held = held + 1")
        consumer.commit()
        assert hot_share(place) == share  # it ends the connection, which then reports
        with pytest.raises(psycopg.OperationalError):
            consumer.execute("SELECT 1")


def test_without_updates_there_is_no_share(place: Place) -> None:
    assert hot_share(place) is None


# ------------------------------------------------------------------- what of a consumer is measured


class Recorder:
    """A meter that knows how often it was started and stopped."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self) -> None:
        self.said.append("start")

    def stop(self) -> dict[str, float]:
        self.said.append("stop")
        return {"client": 1.5}


def test_a_consumer_is_measured_between_its_warm_up_and_its_end() -> None:
    recorder = Recorder()
    progress = metering.MeteredProgress(recorder, warm=20, count=30, longest=60)
    assert [progress.add(10) for _ in range(2)] == [True, True]
    assert recorder.said == ["start"]
    assert [progress.add(10) for _ in range(4)] == [True, True, False, False]
    assert recorder.said == ["start", "stop"]
    assert progress.tally() == Tally(30, {"client": [1.5]})


def test_fewer_messages_are_enough_when_it_is_time() -> None:
    progress = metering.MeteredProgress(Recorder(), warm=1, count=1000, longest=0)
    assert [progress.add(5), progress.add(5)] == [True, False]
    assert progress.tally().count == 5


def test_a_consumer_that_ends_too_soon_has_no_numbers() -> None:
    progress = metering.MeteredProgress(Recorder(), warm=1, count=1000, longest=60)
    progress.add(5)
    with pytest.raises(RuntimeError, match="ended after 5 messages"):
        progress.tally()

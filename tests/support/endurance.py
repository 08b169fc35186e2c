"""The big run: consumers under load, while processes are killed and the server crashes.

    PYTHONPATH=tests python -m support.endurance --messages 20000 --workers 8

Producers enqueue with keys, each batch again until its commit was acknowledged. Workers are of all
kinds in turn. One message in a hundred fails: half of these once, half each time, until it is a
dead letter. In the end every committed message has one effect or is dead, every
attempt was counted before it began, and nothing is held. Exits with 1 if that is not so.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import Item, QueueService
from support.bouncer import PgBouncer
from support.ledger import Audit, Sent
from support.loops import outliving
from support.processes import KINDS, ConsumerFleet, ConsumerProcess
from support.servers import OwnServer, own_server, run_sql

_BATCH = 50  # messages that a producer commits together
_ATTEMPTS = 10  # more than all kills and crashes together can cost a message


@dataclass(frozen=True)
class Options:
    """How big it is; see ``--help``."""

    messages: int = 20_000
    workers: int = 8
    concurrency: int = 4
    producers: int = 2
    restarts: int = 2
    kills: int = 3
    poolers: int = 0
    lease: float = 5.0
    timeout: float = 600.0

    def payload(self, number: int) -> dict[str, object]:
        """Return a message; number 13 of each two hundred is poison, number 113 fails once."""
        what = {13: "poison", 113: "once"}.get(number % 200, "work")
        return {"unit": number, "do": what}

    @property
    def poison(self) -> int:
        return sum(self.payload(number)["do"] == "poison" for number in range(self.messages))

    @property
    def failing(self) -> int:
        return sum(self.payload(number)["do"] != "work" for number in range(self.messages))


@dataclass
class Report:
    """What came of it."""

    options: Options
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    audit: Audit | None = None
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        options = self.options
        yield (
            f"{options.workers} workers, {options.messages} messages, {options.failing} failing "
            f"({options.poison} of them each time), {options.restarts} restarts -m immediate, "
            f"{options.kills} SIGKILLs"
            + (f", {options.poolers} SIGKILLs of PgBouncer" if options.poolers else "")
        )
        yield from self.events
        if self.audit is not None:
            yield from (f"  {name:<10} {value:>8}" for name, value in self.audit.as_dict().items())
        yield f"exit codes of the workers: {self.codes}"
        rate = options.messages / self.seconds
        yield f"{self.seconds:.1f} s, {rate:.0f} messages a second"
        yield "the audit fails: " + "; ".join(self.wrong) if self.wrong else "the audit is clean"


def endure(server: OwnServer, dbname: str, options: Options) -> Report:
    """Do it all, and audit it."""
    report = Report(options)
    address = server.database(dbname)
    engine = sa.create_engine(address.url(), pool_size=options.producers)
    direct = sa.create_engine(address.url(), poolclass=sa.NullPool)
    with ExitStack() as stack:
        fleet = stack.enter_context(ConsumerFleet(address, direct))
        pooler = stack.enter_context(PgBouncer(address)) if options.poolers else None
        began = time.monotonic()
        running = [_start(fleet, number, options, pooler) for number in range(options.workers)]
        producers = _produce(engine, options)

        def say(what: str) -> None:
            share = _settled(fleet) / options.messages
            report.events.append(f"{time.monotonic() - began:6.1f} s, {share:4.0%}: {what}")

        for at, what in _plan(options):
            _progressed(fleet, at, options.timeout)
            if what == "restart":
                server.crash()
                say("the server has crashed and is back")
            elif what == "pooler" and pooler is not None:
                pooler.crash()
                say("PgBouncer was killed and is back")
            else:
                producer = running.pop(0)
                producer.kill()
                running.append(_start(fleet, len(fleet.workers), options, pooler))
                say(f"{producer.name} was killed, and replaced by {running[-1].name}")
        for producer in producers:
            producer.join(options.timeout)
        say("all is enqueued")
        fleet.emptied(options.timeout)
        for producer in running:
            producer.terminate()
        report.codes = [item.wait(90) for item in running]
        report.seconds = time.monotonic() - began
        _audit(fleet, report)
    engine.dispose()
    return report


def _plan(options: Options) -> list[tuple[int, str]]:
    """Return what happens after how many messages: spread over the first three quarters."""
    turns = [
        ["kill"] * options.kills,
        ["restart"] * options.restarts,
        ["pooler"] * options.poolers,
    ]
    order = []
    while any(turns):
        turns.sort(key=len)
        order.append(turns[-1].pop())
    step = options.messages * 3 // 4 // (len(order) + 1)
    return [(step * place, what) for place, what in enumerate(order, 1)]


def _start(
    fleet: ConsumerFleet, number: int, options: Options, pooler: PgBouncer | None
) -> ConsumerProcess:
    return fleet.start(
        KINDS[number % len(KINDS)],
        consumer={"concurrency": options.concurrency, "housekeeping": 5, "heartbeat": 2},
        on={"lease": options.lease, "prefetch": options.concurrency},
        retry={"max_attempts": _ATTEMPTS},
        **({"through": pooler.address, "pooled": True} if pooler else {}),
    )


def _produce(engine: sa.Engine, options: Options) -> list[threading.Thread]:
    def produce(start: int) -> None:
        numbers = list(range(start, options.messages, options.producers))
        for at in range(0, len(numbers), _BATCH):
            outliving(_batch(engine, options, numbers[at : at + _BATCH]))

    threads = [
        threading.Thread(target=produce, args=(start,), daemon=True)
        for start in range(options.producers)
    ]
    for thread in threads:
        thread.start()
    return threads


def _batch(engine: sa.Engine, options: Options, numbers: list[int]) -> Callable[[], None]:
    def send() -> None:
        items = [Item(options.payload(number), key=f"unit-{number}") for number in numbers]
        with Session(engine) as session, session.begin():
            for receipt in QueueService(session).enqueue_many("mail", items):
                if not receipt.duplicate:
                    session.add(Sent(message_id=receipt.id))

    return send


def _settled(fleet: ConsumerFleet) -> int:
    ((count,),) = run_sql(fleet.address, "SELECT count(*) FROM pgqrs_archive")
    return int(str(count))


def _progressed(fleet: ConsumerFleet, count: int, timeout: float) -> None:
    fleet.settled(count, timeout)


def _audit(fleet: ConsumerFleet, report: Report) -> None:
    try:
        report.audit = fleet.audit()
    except AssertionError as error:
        report.wrong.append(str(error))
        return
    wanted = {
        "committed": report.options.messages,
        "archived": report.options.messages - report.options.poison,
        "dead": report.options.poison,
    }
    report.wrong += [
        f"{name}: {found}, not {value}"
        for name, value in wanted.items()
        if (found := getattr(report.audit, name)) != value
    ]
    if set(report.codes) != {0}:
        report.wrong.append(f"exit codes {report.codes}")


def main() -> int:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m support.endurance", description=__doc__.split("\n\n")[2]
    )
    for name, default in vars(Options()).items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help="default: %(default)s"
        )
    options = Options(**vars(parser.parse_args()))
    with own_server() as server:
        report = endure(server, "endurance", options)
    print(*report.lines(), sep="\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The machine that does things to a queue and to the model of it, and compares them at each step.

Two sessions take turns in one thread, so nothing may wait: where the model says that a statement
would wait for the other session, it is tried with a short ``lock_timeout`` and has to fail.
Everywhere else a wait is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy.orm import Session

from pgqrs_sa import (
    DuplicateMessage,
    InvalidArgument,
    Item,
    LeaseLost,
    Message,
    MessageLeased,
    MessageNotFound,
    Queue,
    QueueService,
    Worker,
    WorkerNotReady,
    metadata,
)
from support.model_state import ATTEMPTS, LATER, QUEUES, ModelState, Row
from support.model_state import Worker as Process

TOLERANCE = timedelta(minutes=2)  # how long an example may take

SETTLE: dict[str, Callable[[QueueService, list[Any], float, str], Any]] = {
    "archive": lambda service, held, *_: service.archive_many(held),
    "discard": lambda service, held, *_: service.archive_many(held, outcome="discarded"),
    "delete": lambda service, held, *_: service.delete_many(held),
    "extend": lambda service, held, *_: service.extend_many(held, LATER),
    "release": lambda service, held, wait, _: service.release_many(held, delay=wait),
    "fail": lambda service, held, wait, error: service.fail_many(held, error, delay=wait),
    "bury": lambda service, held, _, error: service.fail_many(held, error, dead=True),
}
TRY: dict[str, Callable[[QueueService, list[Any], float, str], list[bool]]] = {
    "archive": lambda service, held, *_: service.try_archive_many(held),
    "discard": lambda service, held, *_: service.try_archive_many(held, outcome="discarded"),
    "delete": lambda service, held, *_: service.try_delete_many(held),
    "extend": lambda service, held, *_: service.try_extend_many(held, LATER),
    "release": lambda service, held, wait, _: service.try_release_many(held, delay=wait),
    "fail": lambda service, held, wait, error: service.try_fail_many(held, error, delay=wait),
    "bury": lambda service, held, _, error: service.try_fail_many(held, error, dead=True),
}

COMMON = (
    "q.queue_name AS queue, payload AS n, priority, dedup_key AS key, vt, read_ct, x.max_read_ct,"
    " dequeued_at IS NOT NULL AS held, consumer_worker_id AS worker, last_error AS error,"
    " fencing_token AS token,"
    " statement_timestamp() AS now"
)
EVERYTHING = sa.text(
    f"SELECT x.id, {COMMON}, leased_until AS until, NULL AS outcome FROM pgqrs_messages x"  # noqa: S608
    " JOIN pgqrs_queues q ON q.id = x.queue_id UNION ALL"
    f" SELECT x.id, {COMMON}, NULL, outcome FROM pgqrs_archive x"
    " JOIN pgqrs_queues q ON q.id = x.queue_id"
)

sessions = st.sampled_from((0, 1))
queues = st.sampled_from(("mail", "mail", "mail", "post"))
waits = st.sampled_from((0.0, LATER))
seldom = st.sampled_from((0.0, 0.0, 0.0, LATER))
priorities = st.sampled_from((0, 0, 1))
keys = st.sampled_from((None, None, "k1", "k2"))
limits = st.sampled_from((None, None, 1, 2))
picks = st.integers(0, 11)
errors = st.sampled_from(("no", "never"))
OPTIONAL = (
    *("enqueue_many", "enqueue_from", "add", "cancel", "cancel_where", "reschedule"),
    *("manage", "manage_workers", "requeue", "rollback", "savepoint", "dequeue_in_vain"),
)
COMMON_SITUATIONS = (
    *(
        "a lease",
        "a lease of a later attempt",
        "a lease after one that ran out",
        "a settle by a former holder",
        "a wait",
    ),
    *("a settle of an expired lease", "a key that was live", "a key that was live, added"),
    *("a requeue", "a savepoint taken back", "a dequeue by a worker that may not"),
    *("a settle of a lease that was rolled back", "the same, while another holds that attempt"),
    *("moved: None", "moved: MessageLeased", "moved: MessageNotFound"),
)
SELDOM_SITUATIONS = (
    *("a dequeue while paused", "a dequeue that buries", "a dequeue that passes over some"),
    *("a prune", "a purge", "a reclaim"),
    *("leases released", "a requeue of a live key"),
)
MANAGE = ("purge", "pause", "resume", "bury", "bury", "bury", "prune", "prune", "delete", "delete")
MANAGE_WORKERS = (
    *("register", "fall silent", "reclaim", "reclaim", "release"),
    *("suspend", "resume", "resume", "stop", "heartbeat"),
)
ends = st.sampled_from((True, True, True, False))


ARGUMENTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {}
NAMES: list[str] = []


def step(weight: int = 2, **given: Any) -> Callable[[Any], Any]:
    """One of the things that a session does, drawn as often as its weight says."""

    def register(method: Any) -> Any:
        ARGUMENTS[method.__name__] = st.fixed_dictionaries(given)
        NAMES.extend([method.__name__] * weight)
        return method

    return register


@st.composite
def operations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(NAMES))
    return name, draw(ARGUMENTS[name])


class Lease(NamedTuple):
    """A delivery, and which lease of the model it is."""

    delivery: Any
    grant: int


class QueueMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self, engine: sa.Engine, seen: Counter[str]) -> None:
        super().__init__()
        seen["examples"] += 1
        self.seen = seen  # how often what happened, over all examples
        self.model = ModelState()
        self.clock = engine.execution_options(isolation_level="AUTOCOMMIT").connect()
        names = ", ".join(table.name for table in metadata.sorted_tables)
        self.clock.execute(sa.text(f"TRUNCATE {names} CASCADE"))
        self.sessions = [Session(engine), Session(engine)]
        self.services = [QueueService(session) for session in self.sessions]
        for name in QUEUES:
            self.clock.execute(sa.insert(Queue).values(queue_name=name, max_read_ct=ATTEMPTS))
        self.numbers = 0
        self.changed = True
        self.born: set[int] = set()
        self.most_read: dict[int, int] = {}
        self.greatest: dict[int, int] = {}  # token of each message

    def teardown(self) -> None:
        for session in self.sessions:
            session.close()
        self.clock.close()

    @initialize(without=st.sets(st.sampled_from(OPTIONAL), max_size=6))
    def a_beginning(self, without: set[str]) -> None:
        """And leave something out of this example, so that the rest comes more often."""
        self.without = without
        for _ in range(2):
            self.register(0)
        for n in range(4):
            self.enqueue(0, "mail" if n else "post", 0, 0, None, None)
        self.commit(0)

    @rule(s=sessions, operation=operations(), end=ends)
    def do(self, s: int, operation: tuple[str, dict[str, Any]], end: bool) -> None:
        """Something, and a commit after most of it, unless there is a savepoint."""
        name, values = operation
        self.seen["steps"] += 1
        if name in self.without:
            return
        self.seen["operations"] += 1
        self.seen[f"done: {name}"] += 1
        self.changed = True
        getattr(self, name)(s, **values)
        if end and not self.model.open[s].saved:
            self.commit(s)

    # --- enqueue ---------------------------------------------------------------------------------

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def made(self, s: int, receipt: Any, row: Row) -> None:
        """Compare a receipt with the model, which is told of the message if it is new."""
        there = self.model.with_key(s, row.queue, row.key)
        if there is not None:
            assert (receipt.id, receipt.duplicate) == (there, True)
            assert receipt.vt == self.model.get(s, "live", there).vt
            self.seen["a key that was live"] += 1
            return
        assert not receipt.duplicate
        assert self.model.get(s, "live", receipt.id) is None
        self.model.put(s, "live", receipt.id, row)
        self.model.learn(s, receipt.id, vt=receipt.vt)

    @step(4, queue=queues, wait=seldom, priority=priorities, key=keys, limit=limits)
    def enqueue(self, s, queue, wait, priority, key, limit) -> None:
        row = Row(queue, self.number(), wait, priority, key, max_read_ct=limit)
        options = {"delay": wait, "priority": priority, "key": key, "max_read_ct": limit}
        with self.unless(s, self.model.waits_for_key(s, queue, [key])) as service:
            receipt = service.enqueue(queue, row.n, **options)
            self.made(s, receipt, row)

    @step(4, queue=queues, items=st.lists(st.tuples(seldom, keys), min_size=1, max_size=4))
    def enqueue_many(self, s, queue, items) -> None:
        rows = [Row(queue, self.number(), wait, key=key) for wait, key in items]
        given = [Item(row.n, delay=row.wait, key=row.key) for row in rows]
        waits = self.model.waits_for_key(s, queue, [row.key for row in rows])
        with self.unless(s, waits) as service:
            receipts = service.enqueue_many(queue, given)
            assert [receipt.id for receipt in receipts if not receipt.duplicate] == sorted(
                {receipt.id for receipt in receipts if not receipt.duplicate},
                key=[receipt.id for receipt in receipts].index,
            )
            for receipt, row in zip(receipts, rows, strict=True):
                self.made(s, receipt, row)

    @step(queue=queues, wait=seldom, key=keys, count=st.integers(1, 2))
    def enqueue_from(self, s, queue, wait, key, count) -> None:
        rows = [Row(queue, self.number(), wait, key=key) for _ in range(count)]
        values = sa.values(sa.column("n", sa.Integer), name="v").data([(row.n,) for row in rows])
        query = sa.select(values.c.n.label("payload"), sa.literal(wait).label("delay"))
        if key is not None:
            query = query.add_columns(sa.literal(key).label("key"))
        with self.unless(s, self.model.waits_for_key(s, queue, [key])) as service:
            inserted = service.enqueue_from(queue, query)
            new = rows if key is None else rows[: self.model.with_key(s, queue, key) is None]
            assert inserted == len(new)
            ids = {row.n: row.id for row in self.sessions[s].execute(EVERYTHING)}
            for row in new:
                self.model.put(s, "live", ids[row.n], row)

    @step(queue=queues, wait=seldom, priority=priorities, key=keys, limit=limits)
    def add(self, s, queue, wait, priority, key, limit) -> None:
        """``session.add(Message(...))``, which refuses a key that is live."""
        row = Row(queue, self.number(), wait, priority, key, max_read_ct=limit)
        session = self.sessions[s]
        message = Message(queue_name=queue, payload=row.n, delay=wait, priority=priority)
        message.dedup_key, message.max_read_ct = key, limit
        if (there := self.model.with_key(s, queue, key)) is not None:
            session.add(message)
            with pytest.raises(DuplicateMessage) as duplicate:
                session.flush()
            assert duplicate.value.id == there
            session.expunge(message)
            self.seen["a key that was live, added"] += 1
            return
        with self.unless(s, self.model.waits_for_key(s, queue, [key])):
            session.add(message)
            session.flush()
            self.model.put(s, "live", message.id, row)

    # --- lease and settle ------------------------------------------------------------------------

    @step(
        8,
        queue=queues,
        limit=st.integers(1, 4),
        pick=st.sampled_from((None, 0, 1)),
        which=st.sampled_from((None, None, "any", "priority 1")),
    )
    def dequeue(self, s, queue, limit, pick, which) -> None:
        model = self.model
        worker = None if pick is None else self.one_of(model.all(s, "worker"), pick)
        where = {None: None, "any": sa.true(), "priority 1": Message.priority == 1}[which]
        call = lambda: self.services[s].dequeue(  # noqa: E731
            queue, limit, lease=LATER, worker=worker, where=where
        )
        stopped = worker is not None and model.get(s, "worker", worker).status != "ready"
        if stopped:
            with pytest.raises(WorkerNotReady):
                call()
            self.seen["a dequeue by a worker that may not"] += 1
            return
        ready = model.ready(s, queue, 1 if which == "priority 1" else None)
        if model.get(s, "queue", queue) == "paused":
            self.seen["a dequeue while paused"] += 1
            ready = []
        deliveries = call()
        taken = [delivery.id for delivery in deliveries]
        if which is None:
            # It may go on from where this process was, and pass over what lies before: see
            # `_core.cursor`. What it takes comes in order, and there is some if there is any.
            assert taken == [id_ for id_ in ready if id_ in taken][:limit]
            assert bool(taken) == bool(ready)
            self.seen["a dequeue that passes over some"] += taken != ready[:limit]
        else:
            assert taken == ready[:limit]
        for delivery in deliveries:
            assert not model.running(s, delivery.id), f"message {delivery.id} has two holders"
            self.seen["a lease after one that ran out"] += (
                model.get(s, "live", delivery.id).length < 0
            )
            grant = model.lease(s, delivery.id, worker)
            row = model.get(s, "live", delivery.id)
            told = (
                delivery.payload,
                delivery.read_ct,
                delivery.max_read_ct,
                delivery.worker_id,
                delivery.last_error,
            )
            assert told == (row.n, row.read_ct, row.max_read_ct, row.worker, row.error)
            assert delivery.vt == row.vt, "a lease moved the message"
            model.learn(s, delivery.id, until=delivery.leased_until)
            model.open[s].leases.append(Lease(delivery, grant))
            self.seen["a lease" if delivery.read_ct == 1 else "a lease of a later attempt"] += 1
        if not deliveries and model.bury(s, queue):
            self.seen["a dequeue that buries"] += 1

    @step(
        8,
        way=st.sampled_from([*SETTLE]),
        chosen=st.lists(picks, min_size=1, max_size=3),
        strict=st.booleans(),
        wait=waits,
        error=errors,
    )
    def settle(self, s, way, chosen, strict, wait, error) -> None:
        """By holders, former holders, and who never committed a lease: only the first may do it."""
        model = self.model
        leases = self.some_leases(s, chosen)
        if not leases:
            return
        held = [lease for lease in leases if self.holds(s, lease)]
        ids = [lease.delivery.id for lease in held]
        deliveries = [lease.delivery for lease in leases]
        self.seen[f"{way}, strict" if strict else f"{way}, or not"] += 1
        self.seen["a settle by a former holder"] += len(held) < len(leases)
        self.seen["a settle of an expired lease"] += any(
            model.get(s, "live", id_).visible for id_ in ids
        )
        for lease in leases:
            if lease in model.uncommitted:
                self.seen["a settle of a lease that was rolled back"] += 1
                row = model.get(s, "live", lease.delivery.id)
                twin = row is not None and row.grant is not None
                twin = twin and row.read_ct == lease.delivery.read_ct
                self.seen["the same, while another holds that attempt"] += twin
        with self.unless(s, model.waits(s, "live", ids)) as service:
            if not strict:
                done = TRY[way](service, deliveries, wait, error)
                assert done == [lease in held for lease in leases]
            elif len(held) < len(leases):
                with pytest.raises(LeaseLost) as lost:
                    SETTLE[way](service, deliveries, wait, error)
                assert set(lost.value.ids) == {delivery.id for delivery in deliveries} - set(ids)
                model.lock(s, "live", ids)
                return
            else:
                SETTLE[way](service, deliveries, wait, error)
            for id_ in ids:
                model.settle(s, way, id_, wait, error)

    def some_leases(self, s: int, chosen: list[int]) -> list[Lease]:
        """Some deliveries of the last ones, one for a message, in the order in which they are.

        Those of leases that were rolled back are among them.
        """
        pool = (self.model.leases + self.model.open[s].leases)[-10:] + self.model.uncommitted[-2:]
        taken = (pool[-1 - pick % len(pool)] for pick in chosen if pool)
        return [*{delivery.delivery.id: delivery for delivery in taken}.values()]

    def holds(self, s: int, lease: Lease) -> bool:
        row = self.model.get(s, "live", lease.delivery.id)
        return row is not None and row.grant == lease.grant

    # --- messages in nobody's hands --------------------------------------------------------------

    @step(pick=picks)
    def cancel(self, s, pick) -> None:
        if (id_ := self.any_id(s, pick)) is None:
            return
        with self.expecting(s, id_) as refusal, self.unless(s, self.hindered(s, id_)) as service:
            if refusal is not None:
                with pytest.raises(refusal):
                    service.messages.cancel(id_)
            else:
                service.messages.cancel(id_)
                self.model.archive(s, id_, "cancelled")

    @step(queue=queues, priority=st.sampled_from((0, 1, 1, 1)))
    def cancel_where(self, s, queue, priority) -> None:
        ids = self.model.rows(
            s, lambda row: row.unheld and (row.queue, row.priority) == (queue, priority)
        )
        with self.unless(s, self.model.waits(s, "live", ids)) as service:
            where = Message.priority == priority
            assert service.messages.cancel_where(queue, where) == len(ids)
            for id_ in ids:
                self.model.archive(s, id_, "cancelled")

    @step(pick=picks, wait=waits)
    def reschedule(self, s, pick, wait) -> None:
        if (id_ := self.any_id(s, pick)) is None:
            return
        with self.expecting(s, id_) as refusal, self.unless(s, self.hindered(s, id_)) as service:
            if refusal is not None:
                with pytest.raises(refusal):
                    service.messages.reschedule(id_, delay=wait)
                return
            receipt = service.messages.reschedule(id_, delay=wait)
            row = self.model.get(s, "live", id_)
            limit = row.max_read_ct if row.has_attempts else row.read_ct + 1
            self.model.move(s, id_, wait, max_read_ct=limit)
            self.model.learn(s, id_, vt=receipt.vt)

    def any_id(self, s: int, pick: int) -> int | None:
        """A message that there is, or was: an id that is settled is worth a try."""
        return self.one_of({*self.born, *self.model.all(s, "live")}, pick)

    @contextmanager
    def expecting(self, s: int, id_: int) -> Iterator[type[Exception] | None]:
        """The error for a message that cannot be moved, or None."""
        row = self.model.get(s, "live", id_)
        refusal = MessageNotFound if row is None else None if row.unheld else MessageLeased
        self.seen[f"moved: {refusal and refusal.__name__}"] += 1
        yield refusal

    def hindered(self, s: int, id_: int) -> bool:
        row = self.model.get(s, "live", id_)
        return row is not None and row.unheld and self.model.taken(s, "live", id_)

    def purge(self, s, queue, limit) -> None:
        ids = self.model.rows(s, lambda row: row.queue == queue)[:limit]
        with self.unless(s, self.model.waits(s, "live", ids)) as service:
            assert service.queues.purge(queue, limit=limit) == len(ids)
            self.seen["a purge"] += bool(ids)
            for id_ in ids:
                self.model.remove(s, "live", id_)

    def pause_or_resume(self, s, queue, what) -> None:
        with self.unless(s, self.model.taken(s, "queue", queue)) as service:
            getattr(service.queues, what)(queue)
            self.model.put(s, "queue", queue, "paused" if what == "pause" else "open")

    @step(queue=queues, pick=picks, limit=limits, wait=waits, what=st.sampled_from(MANAGE))
    def manage(self, s, queue, pick, limit, wait, what) -> None:
        """What happens seldom: together they come as often as one of the others."""
        match what:
            case "purge":
                self.purge(s, queue, limit)
            case "pause" | "resume":
                self.pause_or_resume(s, queue, what)
            case "bury":
                self.bury(s, queue)
            case "prune":
                self.prune(s, None if limit else queue, wait)
            case "delete":
                self.delete_archived(s, pick)

    @step(queue=queues, pick=picks, to=st.sampled_from(MANAGE_WORKERS), holding=st.booleans())
    def manage_workers(self, s, queue, pick, to, holding) -> None:
        match to:
            case "register":
                self.register(s)
            case "fall silent":
                self.fall_silent(pick)
            case "reclaim":
                self.fall_silent(pick)
                self.reclaim(s, holding, queue)
            case "release":
                self.release_leases(s, pick)
            case _:
                self.tell_worker(s, pick, to)

    # --- the archive -----------------------------------------------------------------------------

    def bury(self, s, queue) -> None:
        service = self.services[s]
        assert service.archived.bury(queue) == len(self.model.bury(s, queue))

    @step(chosen=st.lists(picks, min_size=1, max_size=3), wait=waits, attempts=limits)
    def requeue(self, s, chosen, wait, attempts) -> None:
        model, archived = self.model, self.model.all(s, "archive")
        if not archived:
            return
        ids = [*dict.fromkeys(self.one_of(archived, pick) for pick in chosen)]
        rows = [archived[id_].row for id_ in ids]
        call = lambda service: service.archived.requeue_many(  # noqa: E731
            ids, delay=wait, attempts=attempts
        )
        if any(model.with_key(s, row.queue, row.key) is not None for row in rows):
            with pytest.raises(DuplicateMessage):
                call(self.services[s])
            self.seen["a requeue of a live key"] += 1
            return
        used = [(row.queue, row.key) for row in rows if row.key is not None]
        waits = model.waits(s, "archive", ids)
        if len(set(used)) < len(used):
            # Only the first with the key is locked, and it is the first by its id.
            first = min(ids)
            with self.unless(s, model.taken(s, "archive", first)) as service:
                with pytest.raises(InvalidArgument, match="share a key"):
                    call(service)
                model.lock(s, "archive", [first])
            self.seen["a requeue of a key twice"] += 1
            return
        waits = waits or any(model.waits_for_key(s, row.queue, [row.key]) for row in rows)
        with self.unless(s, waits) as service:
            receipts = call(service)
            assert [receipt.id for receipt in receipts] == ids
            self.seen["a requeue"] += 1
            for id_, receipt in zip(ids, receipts, strict=True):
                model.requeue(s, id_, wait, attempts)
                model.learn(s, id_, vt=receipt.vt)

    def prune(self, s, queue, age) -> None:
        model = self.model
        ids = [
            id_
            for id_, item in model.all(s, "archive").items()
            if age == 0 and queue in {None, item.row.queue} and not model.taken(s, "archive", id_)
        ]
        assert self.services[s].archived.prune(age, queue=queue) == len(ids)
        self.seen["a prune"] += bool(ids)
        for id_ in ids:
            model.remove(s, "archive", id_)

    def delete_archived(self, s, pick) -> None:
        if (id_ := self.one_of(self.model.all(s, "archive"), pick)) is None:
            return
        with self.unless(s, self.model.taken(s, "archive", id_)) as service:
            assert service.archived.delete([id_]) == 1
            self.model.remove(s, "archive", id_)

    # --- workers ---------------------------------------------------------------------------------

    def register(self, s) -> None:
        worker = self.services[s].workers.register("w", queues=["mail"], hostname="h")
        self.model.put(s, "worker", worker.id, Process())

    def tell_worker(self, s, pick, to) -> None:
        id_ = self.one_of(self.model.all(s, "worker"), pick)
        before = self.model.get(s, "worker", id_)
        tell = lambda service: getattr(service.workers, to)(id_)  # noqa: E731
        if before.status == "stopped":
            if to == "stop":
                assert tell(self.services[s]).status == "stopped"
            else:
                with pytest.raises(WorkerNotReady):
                    tell(self.services[s])
            return
        status = {"suspend": "suspended", "resume": "ready", "stop": "stopped"}
        silent = before.silent and to != "heartbeat"
        with self.unless(s, self.model.taken(s, "worker", id_)) as service:
            after = Process(status.get(to, before.status), silent)
            assert tell(service).status == after.status
            self.model.put(s, "worker", id_, after)

    def fall_silent(self, pick) -> None:
        """Let an hour have passed since the last heartbeat of a worker."""
        model = self.model
        id_ = self.one_of(model.all(None, "worker"), pick)
        if not (model.taken(0, "worker", id_) or model.taken(1, "worker", id_)):
            past = sa.func.statement_timestamp() - timedelta(hours=1)
            self.clock.execute(sa.update(Worker).where(Worker.id == id_).values(heartbeat_at=past))
            model.committed["worker", id_] = Process(model.get(None, "worker", id_).status, True)

    def reclaim(self, s, holding, queue) -> None:
        model = self.model
        dead = []
        for id_, item in model.all(s, "worker").items():
            overdue = item.silent and item.status != "stopped" and queue in {None, "mail"}
            if overdue and not model.taken(s, "worker", id_):
                dead += [id_] if self.held_by(s, [id_]) or not holding else []
        back = self.held_by(s, dead, skip_locked=True)
        freed = self.services[s].workers.reclaim(silent_for=60, holding=holding, queue=queue)
        assert freed == len(back)
        self.seen["a reclaim"] += bool(back)
        for id_ in dead:
            model.put(s, "worker", id_, Process("stopped", silent=True))
        for id_ in back:
            model.free(s, id_)

    def release_leases(self, s, pick) -> None:
        id_ = self.one_of(self.model.all(s, "worker"), pick)
        back = self.held_by(s, [id_], skip_locked=True)
        assert self.services[s].workers.release_leases(id_) == len(back)
        self.seen["leases released"] += bool(back)
        for message in back:
            self.model.free(s, message)

    def held_by(self, s: int, workers: list[int], *, skip_locked: bool = False) -> list[int]:
        fits = lambda row: row.state == "leased" and row.worker in workers  # noqa: E731
        return self.model.rows(s, fits, skip_locked=skip_locked)

    # --- time and transactions -------------------------------------------------------------------

    @step(5, pick=picks)
    def time_comes(self, _s, pick) -> None:
        """A lease runs out, or a delay ends."""
        waiting = {
            id_: row
            for s in (None, 0, 1)
            for id_, row in self.model.all(s, "live").items()
            if not row.visible
        }
        if (id_ := self.one_of(waiting, pick)) is None:
            return
        holder = next((s for s in (0, 1) if self.model.taken(1 - s, "live", id_)), None)
        if (row := self.model.get(holder, "live", id_)) is None or row.visible:
            return
        self.model.expire(id_)
        column = "leased_until" if row.state == "leased" else "vt"
        ended = sa.func.statement_timestamp() - timedelta(seconds=1)
        table: Any = Message.__table__
        connection = self.clock if holder is None else self.sessions[holder].connection()
        connection.execute(sa.update(table).where(table.c.id == id_).values({column: ended}))

    @step()
    def commit(self, s) -> None:
        self.sessions[s].commit()
        self.model.commit(s)

    @step(crash=st.booleans())
    def rollback(self, s, crash) -> None:
        if crash:
            self.sessions[s].connection().invalidate()
        self.sessions[s].rollback()
        self.model.rollback(s)

    @step()
    def savepoint(self, s) -> None:
        if len(self.model.open[s].saved) < 2:
            self.sessions[s].begin_nested()
            self.model.open[s].save()

    @step(keep=st.booleans())
    def end_savepoint(self, s, keep) -> None:
        if not self.model.open[s].saved:
            return
        nested = self.sessions[s].get_nested_transaction()
        assert nested is not None
        if keep:
            nested.commit()
            self.model.open[s].saved.pop()
        else:
            self.seen["a savepoint taken back"] += 1
            nested.rollback()
            self.model.restore(s)

    @step(4, queue=queues, whole=st.booleans(), again=st.booleans())
    def dequeue_in_vain(self, s, queue, whole, again) -> None:
        """A lease that is rolled back; and the other session may take the message then."""
        if not whole:
            self.savepoint(s)
        self.dequeue(s, queue, 2, None, None)
        if whole:
            self.rollback(s, crash=False)
        else:
            self.end_savepoint(s, keep=False)
        if again:
            self.dequeue(1 - s, queue, 2, None, None)

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def the_tables_are_those_of_the_model(self) -> None:
        for s in (None, 0, 1) if self.changed else ():
            where = self.clock if s is None else self.sessions[s]
            rows = where.execute(EVERYTHING).all()
            live = [row for row in rows if row.outcome is None]
            settled = [row for row in rows if row.outcome is not None]
            self.compare(s, live, settled)
            if s is None:
                self.nothing_is_lost_or_doubled(live, settled)
                self.nothing_has_two_holders(live)
                self.attempts_only_grow(rows)
                self.tokens_only_grow(rows)
            else:
                self.metrics_are_those_of_the_model(s)
        self.changed = False

    def metrics_are_those_of_the_model(self, s: int) -> None:
        for found in self.services[s].messages.all_metrics():
            expected = self.model.metrics(s, found.queue)
            assert {name: getattr(found, name) for name in expected} == expected
            assert found.paused == (self.model.get(s, "queue", found.queue) == "paused")

    def compare(self, s: int | None, live: Any, settled: Any) -> None:
        expected = self.model.all(s, "live")
        assert {row.id for row in live} == expected.keys()
        for row in live:
            model = expected[row.id]
            assert facts(row) == facts(model), f"message {row.id}"
            assert row.held == (model.grant is not None), f"message {row.id}"
            assert row.held == (row.until is not None), f"message {row.id}"
            self.compare_times(s, row, model)
        expected = self.model.all(s, "archive")
        assert {row.id for row in settled} == expected.keys()
        for row in settled:
            model = expected[row.id]
            told = (facts(row), row.outcome)
            assert told == (facts(model.row), model.outcome), f"archived message {row.id}"

    def compare_times(self, s: int | None, row: Any, model: Row) -> None:
        """A time stands as the database gave it; one that was just given is where it should be."""
        times = {"vt": (row.vt, model.vt, model.wait)}
        if row.held:
            times["until"] = (row.until, model.until, model.length)
        for name, (found, known, ahead) in times.items():
            if known is not None:
                assert found == known, f"{name} of message {row.id}"
                continue
            wanted = timedelta(seconds=ahead)
            assert wanted - TOLERANCE < found - row.now <= wanted, f"{name} of message {row.id}"
            self.model.learn(s, row.id, **{name: found})

    def nothing_is_lost_or_doubled(self, live: Any, settled: Any) -> None:
        """Each committed message is live, or archived, or was removed on purpose."""
        committed = [row.id for row in (*live, *settled)]
        assert len(set(committed)) == len(committed)
        removed = {key[1] for key in self.model.committed if key[0] == "gone"}
        self.born |= {*committed} | removed
        assert self.born == {*committed} | removed
        assert not removed & {*committed}

    def nothing_has_two_holders(self, live: Any) -> None:
        """Of all committed deliveries one at most fits a row: this asks no model."""
        given = Counter(lease.delivery.id for lease in self.model.leases)
        tokens = {(lease.delivery.id, lease.delivery.fencing_token) for lease in self.model.leases}
        assert len(tokens) == given.total(), "two leases have the same token"
        for row in live:
            if row.held and row.until > row.now:
                assert (row.id, row.token) in tokens, f"nobody was given message {row.id}"

    def tokens_only_grow(self, rows: Any) -> None:
        """No number is given twice, and of a message a later lease has the greater one."""
        model = self.model
        given = [*model.leases, *model.uncommitted, *(x for o in model.open for x in o.leases)]
        assert len({item.delivery.fencing_token for item in given}) == len(given)
        by_grant = sorted(given, key=lambda item: item.grant)
        last: dict[int, int] = {}
        for item in by_grant:
            id_, token = item.delivery.id, item.delivery.fencing_token
            assert token > last.get(id_, 0), f"message {id_}"
            last[id_] = token
        for row in rows:
            assert row.token >= self.greatest.get(row.id, 0), f"message {row.id}"
            self.greatest[row.id] = row.token

    def attempts_only_grow(self, rows: Any) -> None:
        for row in rows:
            assert row.read_ct >= self.most_read.get(row.id, 0), f"message {row.id}"
            self.most_read[row.id] = row.read_ct

    # --- helpers ---------------------------------------------------------------------------------

    @contextmanager
    def unless(self, s: int, waits: bool) -> Iterator[QueueService]:
        """Do what is inside; if it has to wait for the other session, see that it does."""
        if not waits:
            yield self.services[s]
            return
        session = self.sessions[s]
        with pytest.raises(sa.exc.OperationalError) as refused, session.begin_nested():  # noqa: PT012
            session.execute(sa.text("SET LOCAL lock_timeout = '5ms'"))
            yield self.services[s]
        self.seen["a wait"] += 1
        assert refused.value.orig.sqlstate == "55P03"

    @staticmethod
    def one_of(values: Any, pick: int) -> Any:
        """One of the newest of them, or None."""
        return sorted(values)[-1 - pick % len(values)] if values else None


def facts(row: Any) -> tuple[Any, ...]:
    """What a row and its model have in common."""
    attempts = (row.read_ct, row.max_read_ct, row.worker, row.error)
    return row.queue, row.n, row.priority, row.key, *attempts

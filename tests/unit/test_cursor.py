"""Where a dequeue begins: nothing is passed over for longer than is stated."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgqrs_sa._core.cursor import CursorSnapshot, CursorUpdate, DequeueCursor, interval
from support.cases import each_case
from support.properties import at_least

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
INTERVAL = 1.0
TABLE = "f16384"


@dataclass(frozen=True)
class Row:
    """A message as a dequeue returns it."""

    priority: int
    vt: datetime
    id: int

    @property
    def key(self) -> tuple[int, datetime, int]:
        return self.priority, self.vt, self.id


class Queue:
    """A queue in memory, asked as the server is asked, with a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: dict[int, Row] = {}
        self.ids = 0
        self.passed_over_since: dict[int, float] = {}
        self.cursor = DequeueCursor(clock=lambda: self.now)
        self.took = 0.0

    def moment(self, back: float = 0.0) -> datetime:
        return EPOCH + timedelta(seconds=self.now - back)

    def add(self, priority: int, back: float = 0.0) -> int:
        """Let a message come; ``back`` seconds late, as that of a long transaction."""
        self.ids += 1
        self.rows[self.ids] = Row(priority, self.moment(back), self.ids)
        return self.ids

    def again(self, row: Row) -> None:
        """A retry: visible from now on."""
        self.rows[row.id] = Row(row.priority, self.moment(), row.id)

    def back(self, row: Row) -> None:
        """A release, or a lease that ran out: it is where it was, before those that came later."""
        self.rows[row.id] = row

    def dequeue(self, limit: int) -> list[Row]:
        """Lease, and commit at once."""
        taken, moves = self.lease(limit)
        if moves is not None:
            self.cursor.apply(moves)
        return taken

    def lease(self, limit: int) -> tuple[list[Row], CursorUpdate | None]:
        """Lease, and return what counts when that is committed."""
        start = self.cursor.snapshot()
        taken = self._behind({} if start is None else start.positions, limit)
        if not taken and start is not None:
            start, taken = None, self._behind({}, limit)
        self._note_what_is_passed_over(taken)
        for row in taken:
            del self.rows[row.id]
            self.passed_over_since.pop(row.id, None)
        if not taken:
            self.cursor.reset()
            return [], None
        full = len(taken) == limit
        return taken, self.cursor.record(TABLE, taken, start, full=full, seconds=self.took)

    def roll_back(self, taken: list[Row]) -> None:
        """Let a lease not be committed."""
        self.rows |= {row.id: row for row in taken}

    def _behind(self, places, limit: int) -> list[Row]:
        found = sorted(self.rows.values(), key=lambda row: row.key)
        return [
            row
            for row in found
            if row.priority not in places or row.key[1:] > places[row.priority][:2]
        ][:limit]

    def _note_what_is_passed_over(self, taken: list[Row]) -> None:
        if not taken:
            return
        last = max(row.key for row in taken)
        ids = {row.id for row in taken}
        for row in self.rows.values():
            if row.id not in ids and row.key < last:
                since = self.passed_over_since.setdefault(row.id, self.now)
                assert self.now - since <= INTERVAL, f"{row} was passed over for too long"


def levels(queue: Queue) -> dict[int, int]:
    start = queue.cursor.snapshot()
    return {} if start is None else {level: place.id for level, place in start.positions.items()}


def test_a_dequeue_begins_behind_the_last_message_of_each_priority():
    queue = Queue()
    for priority in (5, 0, 5, 0):
        queue.add(priority)

    assert [row.id for row in queue.dequeue(3)] == [2, 4, 1]
    assert levels(queue) == {0: 4, 5: 1}


def test_the_places_are_given_to_the_statement_as_json():
    queue = Queue()
    queue.add(3)
    queue.dequeue(1)
    start = queue.cursor.snapshot()
    assert start is not None
    place = '{"level":3,"vt":"2026-01-01 00:00:00+00:00","id":1}'
    assert start.as_json() == f'{{"f16384":[{place}]}}'


def test_the_first_dequeue_and_every_one_of_an_empty_queue_begin_at_the_beginning():
    queue = Queue()
    assert levels(queue) == {}
    queue.dequeue(1)
    assert levels(queue) == {}
    queue.add(0)
    queue.dequeue(1)
    assert levels(queue) == {0: 1}
    queue.dequeue(1)  # nothing behind it, nor before it
    assert levels(queue) == {}


def test_a_late_message_is_found_after_the_interval_although_others_flow():
    queue = Queue()
    for _ in range(100):
        queue.add(0)
    queue.now = 5.0
    queue.dequeue(1)
    late = queue.add(0, back=10.0)
    for tick in range(11):
        queue.now = 5.0 + tick / 10
        assert late in queue.rows
        queue.add(0)
        queue.dequeue(1)
    assert late not in queue.rows


@each_case("others", [True, False])
def test_a_lease_that_ran_out_is_found_after_the_interval_or_at_once_if_nothing_else_is(
    others: bool,
):
    queue = Queue()
    for _ in range(100):
        queue.add(0)
    (first,) = queue.dequeue(1)
    queue.dequeue(50 if others else 99)
    queue.back(first)
    if not others:
        assert queue.dequeue(1) == [first]
        return
    newer = [row.id for row in queue.dequeue(2)]
    assert newer == [52, 53]
    queue.now = 1.01
    assert [row.id for row in queue.dequeue(2)] == [first.id, 54]


def test_a_more_urgent_level_than_those_remembered_is_seen_at_once():
    queue = Queue()
    for priority in (5, 5, 5, 9):
        queue.add(priority)
    queue.dequeue(1)
    for priority in (-1, 7):
        new = queue.add(priority, back=100.0)
        assert [row.id for row in queue.dequeue(4)][0 if priority < 0 else 2] == new
        queue.add(5)
        queue.add(5)


@each_case(
    ("took", "expected"),
    [(0.0, 1.0), (0.05, 1.0), (0.1, 2.0), (0.2, 4.0), (0.5, 4.5), (3.0, 2.0), (4.5, 1.0), (60, 1)],
)
def test_the_next_reading_is_due_after_20_times_as_long_and_5_seconds_at_most(took, expected):
    assert interval(took) == pytest.approx(expected)
    queue = Queue()
    queue.took = took
    queue.add(0)
    queue.add(0)
    queue.dequeue(1)
    queue.now = expected - 0.01
    assert levels(queue)
    queue.now = expected + 0.01
    assert not levels(queue)


def test_when_the_next_reading_is_due_depends_on_no_commit():
    queue = Queue()
    for _ in range(9):
        queue.add(0)
    queue.dequeue(1)
    queue.now = 1.5
    taken, _ = queue.lease(1)  # from the beginning, and never committed
    queue.roll_back(taken)
    queue.now = 2.4
    assert levels(queue) == {0: 1}
    queue.now = 2.6
    _, moves = queue.lease(1)
    queue.now = 9.0
    assert moves is not None
    queue.cursor.apply(moves)  # long after the next one was due
    assert levels(queue) == {}


def test_a_place_comes_down_at_once_and_is_not_moved_up_by_what_began_before():
    queue = Queue()
    for _ in range(9):
        queue.add(0)
    queue.dequeue(3)
    slow, earlier = queue.lease(2)
    queue.now = 2.0
    late = [queue.add(0, back=30.0) for _ in range(4)]
    assert [row.id for row in queue.lease(1)[0]] == late[:1]  # not committed yet
    assert earlier is not None
    queue.cursor.apply(earlier)
    assert [row.id for row in queue.dequeue(2)] == late[1:3]
    queue.roll_back(slow)
    assert [row.id for row in queue.dequeue(1)] == late[3:]


def lease(
    cursor: DequeueCursor, start: CursorSnapshot | None, *rows: tuple[int, int]
) -> CursorUpdate:
    """Note that messages of these priorities and ids were leased, by a batch that is full."""
    taken = [Row(priority, EPOCH + timedelta(seconds=id_), id_) for priority, id_ in rows]
    return cursor.record(TABLE, taken, start, full=True, seconds=0.0)


def test_a_lease_that_began_before_a_reading_does_not_move_up_what_that_has_brought_down():
    cursor = DequeueCursor(clock=lambda: 0.0)
    cursor.apply(lease(cursor, None, (0, 5)))
    before = lease(cursor, cursor.snapshot(), (0, 7), (1, 8))
    lease(cursor, None, (0, 2))  # from the beginning, where a late message was; not committed
    cursor.apply(before)
    start = cursor.snapshot()
    assert start is not None
    assert {level: place.id for level, place in start.positions.items()} == {0: 1, 1: 8}


def test_leases_that_are_committed_in_another_order_move_a_place_as_far():
    queue = Queue()
    for _ in range(3):
        queue.add(0)
    queue.dequeue(1)
    (_, first), (_, second) = queue.lease(1), queue.lease(1)
    assert first is not None
    assert second is not None
    queue.cursor.apply(second)
    queue.cursor.apply(first)
    assert levels(queue) == {0: 3}


def test_a_batch_that_is_not_full_has_read_every_level():
    queue = Queue()
    queue.add(1)
    queue.dequeue(1)
    queue.now = 2.0
    queue.add(0)
    queue.dequeue(2)
    queue.now = 2.9
    assert levels(queue) == {0: 2, 1: 1}


def test_a_rolled_back_reading_creates_no_place():
    queue = Queue()
    for _ in range(3):
        queue.add(0)
    taken, _ = queue.lease(2)
    queue.roll_back(taken)
    assert levels(queue) == {}


def test_a_level_that_a_full_batch_did_not_come_to_stays_due():
    queue = Queue()
    for _ in range(3):
        queue.add(1)
    queue.dequeue(2)
    queue.now = 2.0
    late = queue.add(1, back=30.0)
    early = queue.add(0, back=20.0)
    assert [row.id for row in queue.dequeue(1)] == [early]
    assert [row.id for row in queue.dequeue(1)] == [late]


def test_places_of_one_table_say_nothing_of_another():
    cursor = DequeueCursor(clock=lambda: 0.0)
    ours, theirs = (Row(0, EPOCH + timedelta(hours=n), n) for n in (5, 1))
    cursor.apply(cursor.record("f1", [ours], None, full=True, seconds=0.0))
    start = cursor.snapshot()
    moves = cursor.record("f2", [theirs], start, full=True, seconds=0.0)
    assert cursor.snapshot() is None
    cursor.apply(moves)
    assert cursor.snapshot() is not None
    assert cursor.snapshot().table == "f2"
    late = cursor.record("f1", [ours], start, full=True, seconds=0.0)
    cursor.apply(moves)
    assert cursor.snapshot() is None
    cursor.apply(late)
    assert cursor.snapshot().positions[0].id == 5


def test_a_reading_of_another_table_is_not_due_when_that_of_the_first_was():
    now = 0.0
    cursor = DequeueCursor(clock=lambda: now)
    row = Row(0, EPOCH, 1)
    cursor.apply(cursor.record("f1", [row], None, full=True, seconds=0.0))
    start = cursor.snapshot()
    now = 0.5
    cursor.apply(cursor.record("f2", [row], start, full=True, seconds=0.0))
    now = 1.2
    assert cursor.snapshot() is not None


def test_dequeues_of_one_transaction_count_together():
    queue = Queue()
    for priority in (0, 0, 1):
        queue.add(priority)
    moves = None
    for _ in range(3):
        _, more = queue.lease(1)
        moves = more.after(moves)
    queue.cursor.apply(moves)
    assert levels(queue) == {0: 2, 1: 3}
    assert CursorUpdate("f1", {}).after(moves) == CursorUpdate("f1", {})


def test_the_levels_of_the_latest_leases_are_remembered_and_no_more_than_a_statement_should_ask():
    queue = Queue()
    for priority in range(40):
        queue.add(priority)
    queue.dequeue(40)
    assert sorted(levels(queue)) == list(range(8, 40))
    queue.add(8)
    queue.add(50)
    queue.dequeue(2)
    assert sorted(levels(queue)) == [8, *range(10, 40), 50]


steps = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("late"), st.integers(0, 2), st.floats(0.0, 30.0)),
    st.tuples(st.just("dequeue"), st.integers(1, 4), st.just(0.0)),
    st.tuples(st.just("rolled back"), st.integers(1, 4), st.just(0.0)),
    st.tuples(st.just("again"), st.integers(0, 50), st.just(0.0)),
    st.tuples(st.just("back"), st.integers(0, 50), st.just(0.0)),
    st.tuples(st.just("wait"), st.just(0), st.floats(0.01, 0.7)),
)


NEW_LEVEL = [  # comes to lie between one that a full sweep has reached and one that it has not
    ("add", 2, 0.0),
    ("dequeue", 1, 0.0),
    *[("add", 0, 0.0)] * 4,
    ("add", 1, 0.0),
    ("add", 2, 0.0),
    ("dequeue", 1, 0.0),
    ("again", 0, 0.0),
    ("wait", 0, 0.5),
    ("wait", 0, 0.5),
]


@at_least(100)
@example(NEW_LEVEL)
@given(st.lists(steps, max_size=120))
def test_nothing_is_passed_over_for_longer_than_the_interval(plan):
    queue = Queue()
    taken: list[Row] = []
    for step, number, amount in plan:
        if step in ("add", "late"):
            queue.add(number, amount)
        elif step == "dequeue":
            taken += queue.dequeue(number)  # asserts it
        elif step == "rolled back":
            queue.roll_back(queue.lease(number)[0])
        elif step == "again" and taken:
            queue.again(taken.pop(number % len(taken)))
        elif step == "back" and taken:
            queue.back(taken.pop(number % len(taken)))
        queue.now += amount if step == "wait" else 0.0
    # In every case, all can be leased after an idle moment.
    while queue.dequeue(4):
        queue.now += 0.1
    assert not queue.rows

"""Where a dequeue begins: nothing is passed over for longer than the interval."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgqrs_sa.floor import Floor

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
INTERVAL = 1.0


@dataclass(frozen=True)
class Row:
    """A message as a dequeue returns it."""

    priority: int
    was_visible_at: datetime
    id: int

    @property
    def key(self) -> tuple[int, datetime, int]:
        return self.priority, self.was_visible_at, self.id


class Queue:
    """A queue in memory, asked as the server is asked, with a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: dict[int, Row] = {}
        self.ids = 0
        self.passed_over_since: dict[int, float] = {}
        self.floor = Floor(INTERVAL, clock=lambda: self.now)
        self.sweeps = 0

    def moment(self, back: float = 0.0) -> datetime:
        return EPOCH + timedelta(seconds=self.now - back)

    def add(self, priority: int, back: float = 0.0) -> int:
        """Let a message come; ``back`` seconds late, as that of a long transaction."""
        self.ids += 1
        self.rows[self.ids] = Row(priority, self.moment(back), self.ids)
        return self.ids

    def again(self, row: Row) -> None:
        """A release, a retry or a lease that ran out: visible from now on."""
        self.rows[row.id] = Row(row.priority, self.moment(), row.id)

    def dequeue(self, limit: int, *, commit: bool = True) -> list[Row]:
        start = self.floor.start()
        taken: list[Row] = []
        if start is not None:
            for level, vt, id_ in zip(*start, strict=True):
                behind = [r for r in self._level(level) if (r.was_visible_at, r.id) > (vt, id_)]
                taken += behind[: limit - len(taken)]
        swept = not taken
        if swept:
            self.sweeps += 1
            taken = sorted(self.rows.values(), key=lambda r: r.key)[:limit]
        if not commit:
            return taken
        self._note_what_is_passed_over(taken)
        for row in taken:
            del self.rows[row.id]
            self.passed_over_since.pop(row.id, None)
        if swept:
            self.floor.swept(taken, self.now, full=len(taken) == limit)
        else:
            self.floor.leased(taken)
        return taken

    def _level(self, level: int) -> list[Row]:
        found = [r for r in self.rows.values() if r.priority == level]
        return sorted(found, key=lambda r: r.key)

    def _note_what_is_passed_over(self, taken: list[Row]) -> None:
        if not taken:
            return
        last = max(row.key for row in taken)
        ids = {row.id for row in taken}
        for row in self.rows.values():
            if row.id not in ids and row.key < last:
                since = self.passed_over_since.setdefault(row.id, self.now)
                assert self.now - since <= INTERVAL, f"{row} was passed over for too long"


def test_a_dequeue_begins_behind_the_last_message_of_each_priority():
    queue = Queue()
    for priority in (5, 0, 5, 0):
        queue.add(priority)

    assert [row.id for row in queue.dequeue(3)] == [2, 4, 1]
    start = queue.floor.start()
    assert start is not None
    assert (start.levels, start.ids) == ([0, 5], [4, 1])


def test_the_first_dequeue_and_every_one_of_an_empty_queue_begin_at_the_beginning():
    queue = Queue()
    assert queue.floor.start() is None
    queue.dequeue(1)
    assert queue.floor.start() is None
    queue.add(0)
    queue.dequeue(1)
    assert queue.floor.start() is not None
    queue.dequeue(1)  # nothing behind the floor: swept, and empty
    assert queue.floor.start() is None


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


def test_a_sweep_that_took_long_is_followed_by_the_next_one_later():
    now = 0.0
    floor = Floor(1.0, share=20.0, clock=lambda: now)
    now = 3.0
    floor.swept([Row(0, EPOCH, 1)], 2.0, full=True)  # it took a second
    now = 22.9
    assert floor.start() is not None
    now = 23.1
    assert floor.start() is None


def test_a_lower_floor_is_taken_after_a_sweep_and_levels_not_reached_begin_anew():
    queue = Queue()
    for _ in range(3):
        queue.add(1)
    queue.dequeue(2)
    queue.now = 2.0
    queue.add(1, back=30.0)
    early = queue.add(0, back=20.0)
    assert [row.id for row in queue.dequeue(1)] == [early]
    # The level of the late one was not reached by the sweep, and is not passed over now.
    assert [row.id for row in queue.dequeue(1)] == [4]


def test_no_more_levels_are_remembered_than_a_statement_should_ask():
    queue = Queue()
    for priority in range(40):
        queue.add(priority)
    queue.dequeue(40)
    start = queue.floor.start()
    assert start is not None
    assert start.levels == list(range(16))


steps = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("late"), st.integers(0, 2), st.floats(0.0, 30.0)),
    st.tuples(st.just("dequeue"), st.integers(1, 4), st.just(0.0)),
    st.tuples(st.just("rolled back"), st.integers(1, 4), st.just(0.0)),
    st.tuples(st.just("again"), st.integers(0, 50), st.just(0.0)),
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


@settings(max_examples=400, deadline=None)
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
            queue.dequeue(number, commit=False)
        elif step == "again" and taken:
            queue.again(taken.pop(number % len(taken)))
        queue.now += amount if step == "wait" else 0.0
    # Whatever happened, an idle moment later all can be had.
    while queue.dequeue(4):
        queue.now += 0.1
    assert not queue.rows

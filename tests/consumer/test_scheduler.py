"""What is leased, when, and what is started next: rules that always hold."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_sa.consumer.handlers import Invocation, invocations
from pgqrs_sa.consumer.runtime import RunQueue
from pgqrs_sa.consumer.scheduler import CheckQueues, Fetch, Scheduler, Wait
from support.handlers import delivery, handlers
from support.properties import at_least

POLL = 0.5


def schedule(wanted, *, slots=4, jitter=lambda: 0.5):
    made = Scheduler(slots, POLL, jitter)
    made.add_handlers(wanted)
    return made


def next_lease(plan, now, *, ready=True):
    """Return the next step that is no look; a look finds something everywhere, or nowhere."""
    while isinstance(step := plan.next(now), CheckQueues):
        plan.record_check(step.queues, step.queues if ready else (), now)
    return step


HANDLERS = st.lists(
    st.fixed_dictionaries(
        {
            "concurrency": st.integers(1, 5),
            "batch": st.none() | st.integers(1, 4),
            "prefetch": st.integers(0, 6),
            "weight": st.integers(1, 5),
        }
    ),
    min_size=1,
    max_size=4,
)


@at_least(50)
@given(HANDLERS, st.integers(1, 8), st.data())
def test_never_more_is_leased_than_may_run_or_wait(wanted, slots, data):
    made = handlers(*wanted)
    plan = schedule(made, slots=slots)
    in_hand: Counter[str] = Counter()
    now = 0.0
    for _ in range(data.draw(st.integers(1, 40))):
        step = plan.next(now)
        if isinstance(step, Wait):
            assert step.seconds >= 0
            now += step.seconds + 0.01
        elif isinstance(step, CheckQueues):
            plan.record_check(step.queues, data.draw(st.sets(st.sampled_from(step.queues))), now)
        else:
            queue = step.handler.queue
            assert step.limit >= 1
            got = data.draw(st.integers(0, step.limit))
            in_hand[queue] += got
            plan.record_fetch(queue, step.limit, got, now)
            handler = step.handler
            most = min(handler.concurrency, slots) * handler.batch + handler.prefetch
            assert in_hand[queue] <= most
        if not any(entry.prefetch for entry in made):
            assert sum(-(-in_hand[entry.queue] // entry.batch) for entry in made) <= slots
        busy = [queue for queue, count in in_hand.items() if count]
        if busy and data.draw(st.booleans()):
            queue = data.draw(st.sampled_from(sorted(busy)))
            ended = data.draw(st.integers(1, in_hand[queue]))
            in_hand[queue] -= ended
            plan.finished(queue, ended)
        assert plan.in_hand == in_hand.total()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_queues_that_are_always_full_get_shares_by_their_weights(weights):
    plan = schedule(handlers(*({"weight": weight} for weight in weights), concurrency=1), slots=1)
    turns: Counter[str] = Counter()
    last: dict[str, int] = {}
    rounds = 40
    for number in range(rounds * sum(weights)):
        step = next_lease(plan, 0.0)
        assert isinstance(step, Fetch)
        queue = step.handler.queue
        turns[queue] += 1
        # Nobody starves: between two turns of a queue lie at most two rounds.
        assert number - last.get(queue, 0) <= 2 * sum(weights)
        last[queue] = number
        plan.record_fetch(queue, step.limit, 1, 0.0)
        plan.finished(queue, 1)
    for number, weight in enumerate(weights):
        assert abs(turns[f"q{number}"] - rounds * weight) <= max(weights)


def test_a_queue_with_a_store_ahead_does_not_starve_the_others():
    made = handlers({"prefetch": 20}, {"weight": 5}, {"prefetch": 5})
    plan = schedule(made, slots=4)
    ready = RunQueue(4)
    turns: Counter[str] = Counter()
    running: list[Invocation] = []
    for number in range(2000):
        step = next_lease(plan, 0.0)
        if isinstance(step, Fetch):
            plan.record_fetch(step.handler.queue, step.limit, step.limit, 0.0)
            ready.add(invocations(step.handler, [delivery(number)] * step.limit))
        while (unit := ready.take()) is not None:
            turns[unit.handler.queue] += 1
            running.append(unit)
        ended = running.pop(0)
        ready.finished(ended)
        plan.finished(ended.handler.queue, 1)
    assert min(turns.values()) > 50


def test_a_queue_that_was_empty_for_long_does_not_make_up_for_it():
    plan = schedule(handlers({}, {}, concurrency=1), slots=1)
    plan.record_check(["q0"], ["q0"], 0.0)
    plan.record_fetch("q1", 1, 0, 1e9)  # not due for very long
    for _ in range(1000):
        assert plan.next(0.0).handler.queue == "q0"
        plan.record_fetch("q0", 1, 1, 0.0)
        plan.finished("q0", 1)
    plan.wake("q1")
    chosen = []
    for _ in range(10):
        chosen.append(plan.next(0.0).handler.queue)
        plan.record_fetch(chosen[-1], 1, 1, 0.0)
        plan.finished(chosen[-1], 1)
    assert sorted(chosen) == ["q0"] * 5 + ["q1"] * 5


@given(st.floats(0, 1), st.integers(1, 30))
def test_an_idle_queue_is_asked_less_and_less_within_the_jitter(draw, times):
    plan = schedule(handlers({}), jitter=lambda: draw)
    now, waits = 0.0, []
    for _ in range(times):
        assert plan.next(now) == CheckQueues(("q0",))
        plan.record_check(["q0"], [], now)
        step = plan.next(now)
        assert isinstance(step, Wait)
        waits.append(step.seconds)
        now += step.seconds
    for number, wait in enumerate(waits):
        longest = min(0.02 * 2**number, POLL)
        assert longest * 0.8 - 1e-9 <= wait <= longest * 1.2 + 1e-9
    assert plan.idle_for(now) == pytest.approx(now)


def test_a_wake_makes_a_queue_due_and_a_strangers_does_not():
    plan = schedule(handlers({}, {}))
    for queue in ("q0", "q1"):
        plan.record_fetch(queue, 4, 0, 100.0)
    assert isinstance(plan.next(100.0), Wait)
    plan.wake("another")
    assert isinstance(plan.next(100.0), Wait)
    plan.wake("q1")
    assert plan.next(100.0).handler.queue == "q1"
    plan.record_fetch("q1", 4, 0, 100.0)
    plan.wake(None)
    assert plan.next(100.0) == CheckQueues(("q0", "q1"))


def test_drained_is_when_all_were_empty_since_something_was_found_and_nothing_is_in_hand():
    plan = schedule(handlers({}, {}))
    assert not plan.drained
    plan.record_fetch("q0", 4, 0, 0.0)
    assert not plan.drained
    plan.record_fetch("q1", 4, 1, 0.0)
    assert not plan.drained  # what was found may enqueue for the other
    plan.finished("q1", 1)
    plan.record_fetch("q1", 3, 0, 0.0)
    assert not plan.drained
    plan.record_fetch("q0", 4, 0, 0.0)
    assert plan.drained
    plan.wake("q0")
    assert not plan.drained
    plan.record_fetch("q0", 4, 0, 0.0)
    assert plan.drained
    plan.check_again(0.0)
    assert not plan.drained
    assert isinstance(plan.next(0.0), Wait)
    assert isinstance(plan.next(0.1), CheckQueues)


def test_a_look_at_empty_queues_drains_as_a_lease_does():
    plan = schedule(handlers({}, {}))
    plan.record_check(["q0", "q1"], ["q1"], 0.0)
    assert not plan.drained
    plan.record_fetch("q1", 4, 0, 0.0)
    assert plan.drained


def test_idle_queues_are_looked_at_together_once_in_an_interval():
    plan = schedule(handlers(*[{}] * 200), jitter=iter([0.0, 1.0] * 1000).__next__)
    now, looks = 0.0, 0
    while now < 100:
        step = plan.next(now)
        if isinstance(step, CheckQueues):
            assert len(step.queues) == 200
            looks += 1
            plan.record_check(step.queues, [], now)
        else:
            now += step.seconds
    # Some at the beginning, which come quickly; then each POLL of time, moved by a fifth.
    assert looks <= 6 + 100 / (0.8 * POLL)


def test_only_the_queues_in_which_a_look_has_found_something_are_leased_from():
    plan = schedule(handlers({}, {}, {}))
    step = plan.next(0.0)
    assert step == CheckQueues(("q0", "q1", "q2"))
    plan.record_check(step.queues, {"q0", "q2"}, 0.0)
    asked = []
    while isinstance(step := plan.next(0.0), Fetch):
        asked.append(step.handler.queue)
        plan.record_fetch(asked[-1], step.limit, 1, 0.0)
    assert sorted(asked) == ["q0", "q2"]


def test_a_queue_that_goes_on_having_something_is_not_looked_at():
    plan = schedule(handlers({}))
    plan.wake("q0")
    for number in range(10):
        assert plan.next(float(number)) == Fetch(plan.next(float(number)).handler, 4)
        plan.record_fetch("q0", 4, 1, float(number))
        plan.finished("q0", 1)


def test_a_queue_that_may_not_have_more_is_not_looked_at():
    plan = schedule(handlers({"concurrency": 1}, {}), slots=2)
    plan.record_check(["q0"], ["q0"], 0.0)
    plan.record_fetch("q0", 1, 1, 0.0)
    plan.wake(None)
    assert plan.next(0.0) == CheckQueues(("q1",))


def test_a_queue_that_is_dropped_is_asked_no_more():
    plan = schedule(handlers({}, {}))
    plan.remove("q0")
    plan.finished("q0", 1)
    assert plan.queues == ["q1"]
    assert next_lease(plan, 0.0).handler.queue == "q1"
    plan.remove("q1")
    assert isinstance(plan.next(0.0), Wait)


def test_a_batch_in_hand_is_one_call_of_those_that_may_run():
    plan = schedule(handlers({"batch": 4}, {}))
    plan.wake("q1")
    plan.record_fetch("q0", 16, 4, 0.0)
    assert plan.next(0.0) == Fetch(plan.next(0.0).handler, 3)


def test_what_a_queue_has_in_hand_itself_takes_no_calls_from_it():
    plan = schedule(handlers({}))
    plan.record_fetch("q0", 4, 1, 0.0)
    assert plan.next(0.1) == Fetch(plan.next(0.1).handler, 3)


def test_after_it_had_something_a_queue_is_asked_as_often_as_at_first():
    plan = schedule(handlers({}))
    for _ in range(5):
        plan.record_fetch("q0", 4, 0, 0.0)
    assert plan.idle_time(0.0) == pytest.approx(16 * 0.02)
    plan.record_fetch("q0", 4, 1, 1.0)
    plan.finished("q0", 1)
    plan.record_fetch("q0", 4, 0, 2.0)
    assert plan.idle_time(2.0) == pytest.approx(0.02)


def test_a_queue_in_which_a_look_found_something_is_due_although_it_was_not_its_turn():
    plan = schedule(handlers({}, {}))
    for _ in range(5):
        plan.record_fetch("q1", 4, 0, 0.0)
    assert plan.next(0.1) == CheckQueues(("q0", "q1"))
    plan.record_check(["q0", "q1"], ["q1"], 0.1)
    assert plan.next(0.1).handler.queue == "q1"


def test_a_wake_of_all_queues_lets_those_that_have_something_go_on():
    plan = schedule(handlers({}))
    plan.record_fetch("q0", 4, 1, 0.0)
    plan.wake(None)
    assert plan.next(0.0) == Fetch(plan.next(0.0).handler, 3)


def test_after_a_wake_a_queue_is_asked_as_often_as_at_first():
    plan = schedule(handlers({}))
    for _ in range(5):
        plan.record_fetch("q0", 4, 0, 0.0)
    plan.wake("q0")
    plan.record_fetch("q0", 4, 0, 1.0)
    assert plan.idle_time(1.0) == pytest.approx(0.02)


def test_what_could_not_be_taken_is_asked_for_again_soon():
    plan = schedule(handlers({}), jitter=lambda: 1.0)
    for _ in range(5):
        plan.record_fetch("q0", 4, 0, 0.0)
    plan.check_again(0.0)
    assert plan.idle_time(0.0) == pytest.approx(1.2 * 0.02)


def test_it_is_idle_since_the_last_queue_had_something():
    assert schedule([]).idle_for(5.0) == 0.0
    plan = schedule(handlers({}, {}))
    plan.record_fetch("q0", 4, 0, 1.0)
    assert plan.idle_for(5.0) == 0.0
    plan.record_fetch("q1", 4, 0, 2.0)
    plan.record_fetch("q1", 4, 0, 3.0)
    assert plan.idle_for(5.0) == 3.0
    plan.record_fetch("q0", 4, 1, 6.0)
    assert plan.idle_for(7.0) == 0.0


def test_it_is_not_drained_while_something_is_in_hand():
    plan = schedule(handlers({}))
    plan.record_fetch("q0", 4, 1, 0.0)
    plan.record_fetch("q0", 3, 0, 0.0)
    assert not plan.drained
    plan.finished("q0", 1)
    assert plan.drained


def test_it_rests_until_the_first_of_the_queues_is_due():
    plan = schedule(handlers({}, {}))
    plan.record_fetch("q0", 4, 0, 0.0)
    plan.record_fetch("q1", 4, 0, 0.01)
    assert plan.next(0.015) == Wait(pytest.approx(0.005))


def test_beside_a_store_ahead_the_others_may_have_one_that_waits_and_the_store_no_more():
    made = handlers({"prefetch": 1}, {}, {}, concurrency=1)
    plan = schedule(made, slots=1)
    plan.record_fetch("q0", 2, 2, 0.0)
    plan.record_fetch("q2", 1, 0, 0.0)
    plan.wake("q1")
    assert plan.next(0.0) == Fetch(made[1], 1)
    plan = schedule(made, slots=1)
    plan.record_fetch("q1", 1, 1, 0.0)
    plan.record_fetch("q2", 1, 0, 0.0)
    plan.wake("q0")
    assert plan.next(0.0) == Fetch(made[0], 1)


def test_without_a_store_ahead_nothing_waits():
    plan = schedule(handlers({}, {}, concurrency=1), slots=1)
    plan.record_fetch("q0", 1, 1, 0.0)
    plan.wake("q1")
    assert isinstance(plan.next(0.0), Wait)


def test_a_store_ahead_is_filled_when_half_is_used_up():
    plan = schedule(handlers({"prefetch": 10, "concurrency": 1}))
    assert next_lease(plan, 0.0).limit == 11
    plan.record_fetch("q0", 11, 11, 0.0)
    for _ in range(4):
        plan.finished("q0", 1)
        assert isinstance(plan.next(0.0), Wait)
    plan.finished("q0", 1)
    assert plan.next(0.0).limit == 5


@at_least(50)
@given(HANDLERS, st.integers(1, 8), st.data())
def test_no_more_runs_than_may_and_each_handlers_calls_begin_in_order(wanted, slots, data):
    made = handlers(*wanted)
    ready = RunQueue(slots)
    running: list[Invocation] = []
    begun: dict[str, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["add", "take", "finish"])):
            case "add":
                ready.add([Invocation(data.draw(st.sampled_from(made)), (delivery(1),))])
            case "take":
                unit = ready.take()
                if unit is None:
                    waits = {item.handler.queue for item in ready._waiting}
                    free = [
                        entry.queue
                        for entry in made
                        if sum(r.handler is entry for r in running) < entry.concurrency
                    ]
                    assert len(running) == slots or not waits & set(free)
                    continue
                running.append(unit)
                begun.setdefault(unit.handler.queue, []).append(unit.number)
            case "finish" if running:
                ready.finished(running.pop(data.draw(st.integers(0, len(running) - 1))))
        assert len(running) <= slots
        for entry in made:
            assert sum(r.handler is entry for r in running) <= entry.concurrency
    assert all(numbers == sorted(numbers) for numbers in begun.values())
    left = ready.clear()
    assert ready.waiting == 0
    assert [item.number for item in left] == sorted(item.number for item in left)


def test_what_was_leased_is_cut_into_batches():
    (handler,) = handlers({"batch": 3})
    cut = invocations(handler, [delivery(n) for n in range(7)])
    assert [[delivery.id for delivery in unit.deliveries] for unit in cut] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]


def filled(plan, now, *, every=0.0):
    """Lease two full stores of the first queue, so that its handlers are known to be quick."""
    for moment in (now - every, now):
        plan.finished("q0", plan.in_hand)
        step = next_lease(plan, moment)
        plan.record_fetch("q0", step.limit, step.limit, moment)


def test_quick_handlers_get_a_second_store_and_no_third():
    plan = schedule(handlers({"prefetch": 4, "concurrency": 1}))
    filled(plan, 10.0, every=0.09)
    assert isinstance(plan.next(10.0), Wait)
    step = plan.ahead(10.0)
    assert step.limit == 5
    plan.record_fetch("q0", 5, 5, 10.0)
    assert plan.ahead(10.0) is None
    plan.finished("q0", 1)
    assert plan.ahead(10.0) is None  # worth a statement is half of what is ahead
    plan.finished("q0", 1)
    assert plan.ahead(10.0).limit == 2


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({"prefetch": 4}, 0.11),
        ({"prefetch": 0}, 0.0),
        ({"prefetch": 4, "acknowledge": "first"}, 0.0),
    ],
    ids=["slow", "none ahead", "acknowledged first"],
)
def test_others_get_no_second_store(options, every):
    plan = schedule(handlers({"concurrency": 1, **options}))
    filled(plan, 10.0, every=every)
    assert plan.ahead(10.0) is None


def test_a_queue_that_had_less_than_was_asked_for_is_not_asked_ahead():
    plan = schedule(handlers({"prefetch": 4, "concurrency": 1}))
    filled(plan, 10.0)
    plan.finished("q0", 5)
    plan.record_fetch("q0", 5, 4, 10.0)
    assert plan.ahead(10.0) is None
    plan.wake("q0")
    assert plan.ahead(10.0) is None


def test_a_queue_is_only_asked_ahead_while_its_handlers_have_something():
    plan = schedule(handlers({"prefetch": 4, "concurrency": 1}))
    filled(plan, 10.0)
    plan.finished("q0", 5)
    assert plan.ahead(10.0) is None


@at_least(50)
@given(HANDLERS, st.integers(1, 8), st.data())
def test_never_more_than_two_stores_are_leased(wanted, slots, data):
    made = handlers(*wanted)
    plan = schedule(made, slots=slots)
    in_hand: Counter[str] = Counter()
    for number in range(data.draw(st.integers(1, 40))):
        now = number / 100
        step = plan.ahead(now) or plan.next(now)
        if isinstance(step, CheckQueues):
            plan.record_check(step.queues, step.queues, now)
        elif isinstance(step, Fetch):
            queue, handler = step.handler.queue, step.handler
            assert step.limit >= 1
            plan.record_fetch(queue, step.limit, step.limit, now)
            in_hand[queue] += step.limit
            store = min(handler.concurrency, slots) * handler.batch + handler.prefetch
            assert in_hand[queue] <= (2 if handler.prefetch else 1) * store
        busy = [queue for queue, count in in_hand.items() if count]
        if busy and data.draw(st.booleans()):
            queue = data.draw(st.sampled_from(sorted(busy)))
            ended = data.draw(st.integers(1, in_hand[queue]))
            in_hand[queue] -= ended
            plan.finished(queue, ended)
        assert plan.finishes_until_lease() >= 1


def test_more_is_leased_once_so_many_are_finished():
    plan = schedule(handlers({"prefetch": 6, "concurrency": 2}), slots=2)
    step = next_lease(plan, 0.0)
    plan.record_fetch("q0", step.limit, step.limit, 0.0)
    count = plan.finishes_until_lease()
    plan.finished("q0", count - 1)
    assert isinstance(plan.next(0.0), Wait)
    plan.finished("q0", 1)
    assert isinstance(plan.next(0.0), Fetch)
    filled(plan, 1.0)
    plan.record_fetch("q0", 8, 8, 1.0)
    count = plan.finishes_until_lease()
    plan.finished("q0", count - 1)
    assert plan.ahead(1.0) is None
    plan.finished("q0", 1)
    assert isinstance(plan.ahead(1.0), Fetch)

"""The leases that are held: when to renew which, and what is told once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from pgqrs_sa.consumer.leases import LeaseTable
from support.handlers import delivery, handlers


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(clock):
    return LeaseTable(clock)


def entered(book, clock, *ids, lease=30, timeout=None, **options):
    (handler,) = handlers({"timeout": timeout, **options})
    leased = [delivery(id_) for id_ in ids]
    return book.add(handler, leased, timedelta(seconds=lease), clock.now)


def test_a_lease_is_due_when_a_third_of_it_is_over(book, clock):
    (lease,) = entered(book, clock, 1)
    assert book.due(1009.9) == []
    (held,) = book.due(1010.0)
    assert held.delivery is lease
    assert book.next_renewal() == 1010.0
    book.mark_renewed([held], 1010.0)
    assert book.due(1019.0) == []
    assert book.next_renewal() == 1020.0


def test_a_lease_that_no_handler_begins_with_is_not_renewed_for_longer_than_it_lasts(book, clock):
    begun, waiting = entered(book, clock, 1, 2)
    book.mark_started([begun], None)
    for clock.now in (1010.0, 1020.0):
        assert [lease.delivery for lease in book.due(clock.now)] == [begun, waiting]
        book.mark_renewed(book.all(), clock.now)
    assert book.unstarted(1029.9) == set()
    clock.now = 1030.0
    assert book.unstarted(clock.now) == {2}
    assert [lease.delivery for lease in book.due(clock.now)] == [begun]
    book.mark_renewed(book.due(clock.now), clock.now)
    assert book.next_renewal() == 1040.0


def test_the_lease_begins_before_the_statement_was_sent(book, clock):
    (handler,) = handlers({})
    (item,) = book.add(handler, [delivery(1)], timedelta(seconds=30), asked_at=990.0)
    clock.now = 1020.1
    assert item.lease_lost


def test_a_lease_that_must_have_run_out_counts_as_lost_until_it_is_renewed(book, clock):
    (lease,) = entered(book, clock, 1)
    clock.now = 1030.5
    assert lease.lease_lost
    assert not book.mark_started([lease], None)
    book.mark_renewed(book.all(), 1030.5)
    assert not lease.lease_lost
    assert book.mark_started([lease], None)


def test_a_batch_does_not_begin_when_one_of_it_was_lost(book, clock):
    first, second = entered(book, clock, 1, 2)
    book.mark_lost([second])
    assert second.lease_lost
    assert not first.lease_lost
    assert not book.mark_started([first, second], None)
    assert book.get(first).started_at is None


def test_what_takes_too_long_is_overdue_once_and_not_renewed(book, clock):
    (lease,) = entered(book, clock, 1, timeout=20)
    assert book.overdue(5000.0) == []  # it has not begun
    book.mark_started([lease], 7)
    assert book.next_renewal() == 1010.0
    clock.now = 1020.5
    assert book.due(clock.now) == []
    (held,) = book.overdue(clock.now)
    assert held.thread == 7
    assert book.overdue(clock.now) == []
    assert book.next_renewal() == float("inf")
    book.mark_settling([lease])
    assert book.due(5000.0) == []  # too late for that


def test_what_is_settling_is_not_overdue_and_is_renewed(book, clock):
    (lease,) = entered(book, clock, 1, timeout=20)
    book.mark_started([lease], None)
    book.mark_settling([lease])
    assert book.overdue(2000.0) == []
    assert len(book.due(1025.0)) == 1
    assert book.next_renewal() == 1010.0


def test_an_attempt_commits_or_has_failed_by_its_timeout_and_never_both(book, clock):
    first, second = entered(book, clock, 1, 2, timeout=20)
    book.mark_started([first, second], None)
    assert book.begin_commit([first]) == []
    (late,) = book.overdue(2000.0)
    assert late.delivery is second
    assert book.begin_commit([second]) == [second]


def test_what_was_given_up_settled_or_lost_may_not_commit_nor_its_batch(book, clock):
    given_up, lost, settled, good = entered(book, clock, 1, 2, 3, 4)
    book.mark_started([given_up, lost, settled, good], None)
    book.mark_lost([lost])
    book.remove([settled])
    assert book.abandon([given_up, lost]) == [given_up]
    assert given_up.lease_lost
    assert book.begin_commit([given_up, lost, settled, good]) == [given_up, lost, settled]
    assert not book.get(good).settling
    assert book.begin_commit([good]) == []
    assert book.get(good).settling


def test_the_moments_at_which_a_lease_and_a_handler_s_time_end_belong_to_them(book, clock):
    (lease,) = entered(book, clock, 1, lease=60, timeout=20)
    book.mark_started([lease], None)
    clock.now = 1020.0
    assert book.overdue(clock.now) == []
    clock.now = 1060.0
    assert not lease.lease_lost
    book.hand_over([lease])
    assert book.tokens() == []


def test_it_is_known_when_the_next_handler_is_overdue(book, clock):
    waiting, begun, settled = entered(book, clock, 1, 2, 3, lease=90, timeout=20)
    assert book.next_renewal() == 1030.0
    clock.now = 1005.0
    book.mark_started([settled], None)
    clock.now = 1006.0
    book.mark_started([begun], None)
    assert book.next_renewal() == 1025.0
    book.mark_settling([settled])
    assert book.next_renewal() == 1026.0
    clock.now = 1027.0
    assert [lease.delivery for lease in book.overdue(clock.now)] == [begun]
    assert book.next_renewal() == 1030.0
    assert waiting.fencing_token in book.tokens()


def test_what_is_settled_without_a_call_is_renewed_for_as_long_as_that_takes(book, clock):
    (lease,) = entered(book, clock, 1)
    book.mark_settling([lease])
    clock.now = 1031.0
    assert book.unstarted(clock.now) == set()
    assert [held.delivery for held in book.due(clock.now)] == [lease]


def test_whoever_removes_a_lease_tells_of_it_and_nobody_else(book, clock):
    (lease,) = entered(book, clock, 1)
    assert [held.delivery for held in book.remove([lease])] == [lease]
    assert book.remove([lease]) == book.mark_lost([lease]) == []
    assert book.get(lease) is None
    assert len(book) == 0


def test_another_attempt_of_the_same_message_is_another_lease(book, clock):
    (old,) = entered(book, clock, 1)
    again = replace(old, read_ct=2, fencing_token=12)
    assert book.get(again) is None
    assert [lease.delivery for lease in book.replaced([again])] == [old]
    (handler,) = handlers({})
    book.mark_lost([old])
    (new,) = book.add(handler, [again], timedelta(seconds=30), clock.now)
    assert old.lease_lost
    assert not new.lease_lost
    assert book.remove([old]) == []
    assert book.get(new) is not None


def test_what_is_left_to_be_settled_by_hand_is_known_until_its_lease_ends(book, clock):
    entered(book, clock, 1)
    (left,) = entered(book, clock, 2, lease=60)
    book.hand_over([left])
    assert sorted(book.tokens()) == [11, 21]
    assert [item.delivery.id for item in book.all()] == [1]
    clock.now = 1060.1
    assert book.tokens() == [11]

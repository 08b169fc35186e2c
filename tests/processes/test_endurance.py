"""The big run, small: see `support.endurance`."""

from __future__ import annotations

import pytest

from support.endurance import Options, endure


def test_nothing_is_lost_or_done_twice_while_processes_and_the_server_die(own):
    options = Options(messages=1200, workers=4, concurrency=3, restarts=1, kills=1, lease=2)
    report = endure(own, "endurance", options)
    assert not report.wrong, "\n".join(report.lines())


@pytest.mark.long
def test_nothing_is_lost_or_done_twice_in_the_big_run(own):
    report = endure(own, "endurance_long", Options())
    assert not report.wrong, "\n".join(report.lines())


@pytest.mark.long
@pytest.mark.pgbouncer
def test_nothing_is_lost_or_done_twice_behind_a_pgbouncer_that_dies_too(own):
    options = Options(messages=6000, workers=6, restarts=1, kills=1, poolers=3)
    report = endure(own, "endurance_pooled", options)
    assert not report.wrong, "\n".join(report.lines())

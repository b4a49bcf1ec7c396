# SPDX-License-Identifier: Apache-2.0
"""The watchdog names the ranks that the others wait for."""

from __future__ import annotations

import pytest

from engine import heartbeat
from engine.distributed import Context
from engine.heartbeat import FILE, Heartbeat, Watch


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """The heartbeats of three ranks and a clock."""
    monkeypatch.setenv(FILE, str(tmp_path / 'heartbeat'))
    assert Heartbeat.of_launcher() is None
    watched = Heartbeat.create(str(tmp_path / 'heartbeat'), 3)
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, 'monotonic', lambda: clock[0])
    return watched, [Context(rank, 3, False, Heartbeat.of_launcher()) for rank in range(3)], clock


def test_a_wait_is_a_problem_after_the_limit(ranks, monkeypatch):
    watched, contexts, clock = ranks
    monkeypatch.setenv('PADDLE_PG_TIMEOUT', '10000')
    watch = Watch(watched)
    clock[0] = 100.0
    assert watch.problem() is None  # reading the data before the first step may take long
    for context in contexts[:2]:
        context.mark()
    assert watched.counts() == [1, 1, 0]
    for now, found in ((100.0, False), (108.0, False), (109.5, True)):
        clock[0] = now
        assert bool(watch.problem()) is found
    assert watch.problem().startswith('no rank has made progress for 9 s: the others wait for rank 2; ')
    contexts[2].mark()
    assert watch.problem() is None
    clock[0] += 9
    assert 'for 9 s: all ranks hang; ' in watch.problem()
    contexts[0].mark()
    assert watch.problem() is None
    clock[0] += 9
    assert 'wait for ranks 1, 2; ' in watch.problem()


def test_the_limit_is_paddles(ranks, monkeypatch):
    monkeypatch.delenv('PADDLE_PG_TIMEOUT', raising=False)
    assert Watch(ranks[0]).limit == 1620


def test_without_a_launcher_nothing_is_counted(monkeypatch):
    monkeypatch.delenv(FILE, raising=False)
    Context(0, 1, False, Heartbeat.of_launcher()).mark()

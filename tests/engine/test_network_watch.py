# SPDX-License-Identifier: Apache-2.0
"""The watchdog across machines: counters pass through the store of the process group, and the silent rank is named."""

from __future__ import annotations

import mmap
import socket
from collections import Counter

import paddle
import pytest

from engine import heartbeat, network_watch
from engine.heartbeat import Heartbeat, Watch
from engine.network_watch import Exchange, problem_of
from engine.paddle_private import KeyValueStore


@pytest.fixture
def machines(monkeypatch):
    """Three ranks without common memory, a store, the names that were read or changed there, and a clock."""
    monkeypatch.setenv('PADDLE_PG_TIMEOUT', '10000')
    clock, store, calls = [1.0], Counter(), []
    for module in (heartbeat, network_watch):
        monkeypatch.setattr(module.time, 'monotonic', lambda: clock[0])
    beats = [Heartbeat(mmap.mmap(-1, 24)) for _ in range(3)]
    exchanges = [Exchange(rank, 3, beat) for rank, beat in enumerate(beats)]

    def add(name, value):
        calls.append(name)
        store[name] += value
        return store[name]

    def everyone(*ranks):
        for exchange in exchanges:
            if exchange.rank in (ranks or range(3)):
                exchange.exchange(add)

    return beats, exchanges, everyone, calls, clock


def test_every_rank_names_the_silent_one(machines):
    beats, exchanges, everyone, _, clock = machines
    watches = [Watch(exchange) for exchange in exchanges]
    for step in range(3):
        for rank in range(3):
            if (rank, step) != (2, 2):
                beats[rank].mark(rank)
        clock[0] += 5
        everyone()
        assert [problem_of(*pair, 3) for pair in zip(watches, exchanges)] == [None] * 3
    for _ in range(5):  # the first call reads the counters of the others, which have changed
        clock[0] += 2.5
        everyone()
        problems = [problem_of(*pair, 3) for pair in zip(watches, exchanges)]
    assert exchanges[0].counts() == exchanges[2].counts() == [3, 3, 2]
    assert [problem.partition(';')[0] for problem in problems] == [
        'no rank has made progress for 9 s: the others wait for rank 2'
    ] * 3


def test_a_rank_that_makes_progress_reads_nothing(machines):
    beats, exchanges, everyone, calls, _ = machines
    everyone()
    calls.clear()
    beats[1].mark(1)
    everyone(1)
    assert calls == ['leanvit/progress/1'] and exchanges[1].counts() == [0, 1, 0]
    everyone(1)
    assert len(calls) == 4


def test_a_store_that_does_not_answer_is_rank_0(machines):
    beats, exchanges, everyone, _, clock = machines
    watch = Watch(exchanges[1])
    beats[1].mark(1)
    assert problem_of(watch, exchanges[1], 3) is None
    clock[0] += 20
    assert problem_of(watch, exchanges[1], 3) is None, 'the store never answered'
    everyone()
    clock[0] += 20
    assert problem_of(watch, exchanges[1], 3).startswith(
        'rank 0 does not answer, and rank 1 has made no progress for 9 s'
    )
    beats[1].mark(1)
    assert problem_of(watch, exchanges[1], 3) is None


def test_the_store_is_paddles(monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address, port = free.getsockname()
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PADDLE_MASTER', f'{address}:{port}')
    server = paddle.base.core.TCPStore(address, port, True, 1, 30)
    one, two = KeyValueStore(), KeyValueStore()
    assert [one.add('a', 2), two.add('a', 3), one.add('b', 0), one.add('a', 0)] == [2, 5, 0, 5]
    monkeypatch.setenv('MASTER_ADDR', address)
    monkeypatch.setenv('MASTER_PORT', str(port))
    monkeypatch.setenv('PADDLE_MASTER', '127.0.0.1:1')
    assert KeyValueStore().add('a', 0) == 5
    del server

# SPDX-License-Identifier: Apache-2.0
"""Reads that never return, and workers that a signal ends."""

import logging
import os
import signal
import threading
import time

import numpy as np
import pytest

from datasets import workers
from datasets.sample import Plane
from datasets.workers import BatchMemory, Job, WorkerError, WorkerPool, WorkerThread

JOB = Job(0, np.arange(1), np.zeros(1, int))


def new_memory() -> BatchMemory:
    return BatchMemory(1, [Plane('image', (2,), 'uint8')])


def hang(job, memory):
    memory.current = 7
    time.sleep(60)


def square(job, memory):
    return job.epoch**2


@pytest.mark.parametrize(
    ('number', 'words'),
    [
        (signal.SIGBUS, 'SIGBUS: is the memory of the machine or container full'),
        (signal.SIGSEGV, 'SIGSEGV: a library crashed, .* tools/verify_data.py'),
        (signal.SIGKILL, 'killed for lack of memory'),
    ],
)
def test_the_signal_that_ended_a_worker_tells_the_cause(number, words):
    def die(job, memory):
        memory.current = 3
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    pool = WorkerPool(die, [new_memory()], 2, 0.0, 'image {}'.format)
    with pytest.raises(WorkerError, match=f"worker died .*'image 3'.*{words}"):
        list(pool.run([JOB]))


def hung(kind: str, timeout: float):
    """(error, seconds) of a read that never returns."""
    began, describe = time.monotonic(), 'image {}'.format
    with pytest.raises(WorkerError) as caught:
        if kind == 'processes':
            list(WorkerPool(hang, [new_memory()], 1, timeout, describe).run([JOB]))
        else:
            list(WorkerThread(hang, [new_memory()], timeout, describe).run([JOB]))
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize('kind', ['processes', 'thread'])
def test_a_read_that_never_returns(kind, monkeypatch, caplog):
    monkeypatch.setattr(workers, 'NOTICE', 0.3)
    with caplog.at_level(logging.WARNING):
        error, seconds = hung(kind, 0.6)
    assert 'within DATA.TIMEOUT = 0.6 seconds' in error and "'image 7'" in error
    assert 0.6 <= seconds < 5
    (note,) = caplog.messages
    assert note.startswith('waiting for a batch since 0.3 seconds') and "'image 7'" in note


def test_a_short_limit_needs_no_note(caplog):
    assert hung('thread', 0.2)[1] < 5
    assert not caplog.messages


def jobs_of(epochs):
    return [Job(epoch, np.arange(1), np.zeros(1, int)) for epoch in epochs]


def test_a_thread_returns_results_and_errors_and_ends():
    before = threading.active_count()
    thread = WorkerThread(square, [new_memory()], 0.0, str)
    assert [result for result, _ in thread.run(jobs_of((2, 3)))] == [4, 9]
    with pytest.raises(AttributeError):
        next(thread.run(['no job']))
    del thread
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_thread_works_ahead_in_memory_that_is_not_in_use():
    begun, free = [], threading.Semaphore(0)

    def record(job, memory):
        begun.append((job.epoch, memory))
        free.release()
        return job.epoch

    memories = [new_memory(), new_memory()]
    results = WorkerThread(record, memories, 0.0, str).run(jobs_of(range(5)))
    for epoch in range(4):
        result, memory = next(results)
        assert free.acquire(timeout=5) and (epoch or free.acquire(timeout=5))  # the job after this one has begun
        assert result == epoch and begun[epoch][1] is memory
        assert [job for job, _ in begun] == list(range(epoch + 2))
        assert begun[epoch + 1][1] is not memory
    assert [result for result, _ in results] == [4]


def test_a_thread_drops_the_rest_of_an_earlier_call():
    thread = WorkerThread(square, [new_memory(), new_memory()], 0.0, str)
    next(thread.run(jobs_of((2, 3, 4))))
    assert [result for result, _ in thread.run(jobs_of((5, 6, 7)))] == [25, 36, 49]

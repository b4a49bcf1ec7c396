# SPDX-License-Identifier: Apache-2.0
"""Processes that are forked while this one holds objects, such as GPU tensors, that they must not free."""

import gc
import os
import signal

import numpy as np
import pytest

from datasets.sample import Plane
from datasets.workers import BatchMemory, Job, WorkerPool
from utils.errors import UserError
from utils.processes import Worker, WorkerDied, run_in_subprocess


class Held:
    """Says which process frees it; in a reference cycle, so that only the garbage collector does."""

    freed: list[int] = []

    def __init__(self):
        self.itself = self

    def __del__(self):
        Held.freed.append(os.getpid())


def collected(*_) -> list[int]:
    """The processes that freed objects, seen from this one, after a collection of garbage."""
    gc.collect()
    return list(Held.freed)


def test_a_child_frees_no_object_of_its_parent():
    gc.collect()
    gc.disable()
    try:
        Held()
        assert run_in_subprocess(collected) == []
        memory = BatchMemory(1, [Plane('image', (2,), 'uint8')])
        pool = WorkerPool(collected, [memory], 1, 0.0, str)
        assert [result for result, _ in pool.run([Job(0, np.arange(1), np.zeros(1, int))])] == [[]]
        pool.close()
        assert collected() == [os.getpid()]  # the parent does
    finally:
        gc.enable()
        Held.freed.clear()


def hold_and_collect() -> bool:
    Held()
    return collected() == [os.getpid()]


def test_a_child_frees_its_own_objects():
    assert run_in_subprocess(hold_and_collect)


# ---------------------------------------------------------------------------------------------------- Worker
def answer(kind: str) -> int:
    """Return this process, or fail in a way."""
    if kind == 'mistake':
        raise UserError('a sentence.')
    if kind == 'exception':
        raise ValueError('first line\nsecond')
    if kind == 'crash':
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 'exit':
        os._exit(3)
    return os.getpid()


def test_a_worker_outlives_the_failures_of_its_calls(capfd):
    with Worker() as worker:
        first = worker.call(answer, '')
        assert first != os.getpid() == worker.call(os.getppid)
        with pytest.raises(UserError, match='a sentence'):
            worker.call(answer, 'mistake')
        assert worker.call(answer, '') == first
        for kind, message in (
            ('exception', 'ValueError: first line$'),
            ('crash', 'signal 11'),
            ('exit', 'exited with 3'),
        ):
            with pytest.raises(WorkerDied, match=message):
                worker.call(answer, kind)
        last = worker.call(answer, '')
        assert last != first
    assert 'ValueError: first line\nsecond' in capfd.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)

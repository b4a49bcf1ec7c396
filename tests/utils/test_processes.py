# SPDX-License-Identifier: Apache-2.0
"""Processes that are forked while this one holds objects, such as GPU tensors, that they must not free."""

import gc
import os

import numpy as np

from datasets.sample import Plane
from datasets.workers import BatchMemory, Job, WorkerPool
from utils.processes import run_in_subprocess


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

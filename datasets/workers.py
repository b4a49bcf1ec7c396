# SPDX-License-Identifier: Apache-2.0
"""Worker processes that fill batches in memory shared with the process that started them.

Workers are forked: they inherit the data set and the shared memory, and pass only indices and counts through pipes. They
ignore SIGINT, SIGTERM and SIGHUP, which the training process answers by finishing its step, and are killed with it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import mmap
import multiprocessing
import os
import signal
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from utils.cli import SIGNALS
from utils.errors import UserError
from utils.processes import die_with_parent


class WorkerError(UserError, RuntimeError):
    """A worker process died or does not answer."""


@dataclasses.dataclass
class Job:
    """One batch to prepare: images [b] and, for each, how often the epoch drew it before [b]."""

    epoch: int
    indices: np.ndarray
    repeats: np.ndarray


class BatchMemory:
    """Room for one batch in anonymous shared memory, of which only pages that are used exist.

    Attributes:
        images: [batch_size, H, W, C] uint8; of two views [batch_size, 2, H, W, C].
        positions, values: room for erased values, int32 and float32; empty without `erasing`.
    """

    def __init__(self, batch_size: int, shape: tuple[int, ...], erasing: bool):
        pixels = batch_size * int(np.prod(shape))
        noise = pixels if erasing else 0
        memory = mmap.mmap(-1, 8 + 8 * noise + pixels)
        self._at_work = np.frombuffer(memory, np.int64, 1)
        self.positions = np.frombuffer(memory, np.int32, noise, offset=8)
        self.values = np.frombuffer(memory, np.float32, noise, offset=8 + 4 * noise)
        self.images = np.frombuffer(memory, np.uint8, pixels, offset=8 + 8 * noise).reshape(batch_size, *shape)
        self.at_work = -1

    @property
    def at_work(self) -> int:
        """Index of the image that is being prepared, -1 when there is none; seen by the other process."""
        return int(self._at_work[0])

    @at_work.setter
    def at_work(self, index: int) -> None:
        self._at_work[0] = index


class WorkerPool:
    """Runs `make(job, memory)` in forked processes, over and over on the same few memories.

    Args:
        make: fills a memory and returns a small picklable result.
        memories: one for each job that may be under way, or waiting to be collected, at a time.
        processes: number of workers.
        timeout: seconds to wait for a result; 0 waits for ever.
        describe: what an image is called in messages, by index.
    """

    def __init__(
        self,
        make: Callable,
        memories: list[BatchMemory],
        processes: int,
        timeout: float,
        describe: Callable[[int], str],
    ):
        self._memories = memories
        self._futures: list[concurrent.futures.Future | None] = [None] * len(memories)
        self._timeout = timeout
        self._describe = describe
        before = multiprocessing.active_children()
        self._executor = concurrent.futures.ProcessPoolExecutor(
            processes,
            multiprocessing.get_context('fork'),
            initializer=_start_worker,
            initargs=(make, memories, os.getpid()),
        )
        with warnings.catch_warnings():
            # Python warns of forking beside threads; workers use nothing that those could hold.
            warnings.simplefilter('ignore', DeprecationWarning)
            # Workers inherit the mask: they never see these, not even before their first line of Python.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._executor.submit(os.getpid)  # starts all workers now
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        processes = [child for child in multiprocessing.active_children() if child not in before]
        self._finalizer = weakref.finalize(self, _end, self._executor, processes)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[object, BatchMemory]]:
        """Yields (result, memory) of each job in order; the memory is used again for a later job at the next step.

        Jobs of an earlier call that was not iterated to its end are dropped.
        """
        for future in self._futures:
            if future is not None:
                future.cancel()
        jobs = iter(jobs)
        under_way = deque(slot for slot in range(len(self._memories)) if self._submit(jobs, slot))
        return self._results(jobs, under_way)

    def _results(self, jobs: Iterator[Job], under_way: deque) -> Iterator[tuple[object, BatchMemory]]:
        while under_way:
            slot = under_way.popleft()
            self._wait(slot)
            yield self._futures[slot].result(), self._memories[slot]
            if self._submit(jobs, slot):
                under_way.append(slot)

    def _submit(self, jobs: Iterator[Job], slot: int) -> bool:
        """Starts the next job, if there is one, on memory `slot`, once whatever was dropped there has ended."""
        job = next(jobs, None)
        if job is None:
            return False
        dropped = self._futures[slot]
        if dropped is not None and not dropped.cancelled():
            self._wait(slot)
        try:
            self._futures[slot] = self._executor.submit(_work, job, slot)
        except BrokenProcessPool:
            raise self._died() from None
        return True

    def _wait(self, slot: int) -> None:
        future = self._futures[slot]
        done, _ = concurrent.futures.wait([future], self._timeout or None)
        if not done:
            self.close()
            raise WorkerError(
                f'no batch came from the data-loading workers within DATA.TIMEOUT = {self._timeout:g} seconds'
                f'{self._images_at_work()}; is the storage slow or hung? A larger DATA.TIMEOUT, or 0, waits longer.'
            )
        if isinstance(future.exception(), BrokenProcessPool):
            raise self._died()

    def _died(self) -> WorkerError:
        self.close()
        return WorkerError(
            f'a data-loading worker died{self._images_at_work()}; was it killed for lack of memory? '
            'Fewer DATA.NUM_WORKERS or a smaller DATA.PREFETCH need less.'
        )

    def _images_at_work(self) -> str:
        names = [f"'{self._describe(memory.at_work)}'" for memory in self._memories if memory.at_work >= 0]
        return f' (images in work: {", ".join(names[:8])})' if names else ''

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Ends the workers at once, hung ones too. Happens by itself when the pool is no longer referred to."""
        self._finalizer()


def _end(executor: concurrent.futures.Executor, processes: list) -> None:
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


# ---------------------------------------------------------------------------------------------------- in a worker
_make: Callable
_memories: list[BatchMemory]


def _start_worker(make: Callable, memories: list[BatchMemory], parent: int) -> None:
    global _make, _memories
    _make, _memories = make, memories
    die_with_parent()
    if os.getppid() != parent:  # it went before it could be watched
        os._exit(1)


def _work(job: Job, slot: int):
    return _make(job, _memories[slot])

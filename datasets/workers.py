# SPDX-License-Identifier: Apache-2.0
"""Worker processes that write batches to shared memory.

Workers are forked: they inherit the data set and the shared memory, so only indices and counts pass through pipes. They
ignore SIGINT, SIGTERM and SIGHUP, so that the training process can finish its step, and are killed with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import mmap
import multiprocessing
import os
import queue
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from datasets.sample import Plane
from utils.errors import UserError
from utils.processes import die_with_parent, forking
from utils.signals import SIGNALS

_LOG = logging.getLogger(__name__)

NOTICE = 15.0  # seconds of waiting for a batch until a note names the images; gloo on other ranks gives up after 30 s


class WorkerError(UserError, RuntimeError):
    """A worker process died or does not answer."""


@dataclasses.dataclass
class Job:
    """A batch to prepare: image indices [b], and for each the number of earlier draws in the epoch [b]."""

    epoch: int
    indices: np.ndarray
    repeats: np.ndarray


class BatchMemory:
    """Anonymous shared memory for one batch. Pages are allocated on first write.

    Args:
        batch_size: b.
        planes: arrays [b, *shape].
        erasing: maximum number of erased values per image.

    Attributes:
        planes: arrays by name.
        positions, values: erased values, [b * erasing] int32 and float32.
    """

    def __init__(self, batch_size: int, planes: Sequence[Plane], erasing: int = 0):
        erased = Plane('positions', (erasing,), 'int32'), Plane('values', (erasing,), 'float32')
        layout = [Plane('current', (1,), 'int64'), *erased, *planes]
        arrays = _shared_arrays(batch_size, layout)
        self._current = arrays[0][0]
        self.positions, self.values = (array.reshape(-1) for array in arrays[1:3])
        self.planes = {plane.name: array for plane, array in zip(planes, arrays[3:])}
        self.current = -1

    @property
    def current(self) -> int:
        """Index of the image in preparation, or -1; the training process can read it."""
        return int(self._current[0])

    @current.setter
    def current(self, index: int) -> None:
        self._current[0] = index


def _shared_arrays(batch_size: int, planes: Sequence[Plane]) -> list[np.ndarray]:
    """Allocate zeroed arrays [batch_size, *shape] in one shared memory map, aligned to 8 bytes."""
    sizes = [batch_size * math.prod(plane.shape) * np.dtype(plane.dtype).itemsize for plane in planes]
    starts = np.cumsum([0, *(-(-size // 8) * 8 for size in sizes)]).tolist()
    try:
        memory = mmap.mmap(-1, starts[-1])
    except (OSError, OverflowError, ValueError):
        raise UserError(
            f'a batch of {batch_size} images takes {starts[-1] / 1e9:.1f} GB, more than this process may have; lower '
            'DATA.BATCH_SIZE, DATA.IMAGE_SIZE, DATA.NUM_WORKERS or DATA.PREFETCH.'
        ) from None
    return [
        np.ndarray((batch_size, *plane.shape), plane.dtype, memory, offset=start)
        for plane, start in zip(planes, starts)
    ]


class WorkerPool:
    """Runs `make(job, memory)` in forked processes, with a fixed set of memories.

    Args:
        make: fills a memory and returns a small picklable result.
        memories: one per job that is running or waits for collection.
        processes: number of workers.
        timeout: seconds to wait for a result; 0: no limit.
        describe: maps an index to the name of the image in messages.
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
        with forking():
            # Workers inherit the mask, so signals are blocked before their first line of Python.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._executor.submit(os.getpid)  # starts all workers now
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        self._finalizer = weakref.finalize(self, _end, self._executor, self._processes)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[object, BatchMemory]]:
        """Return an iterator over (result, memory) of the jobs in order; its next step reuses the memory.

        Remaining jobs of an earlier call are dropped.
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
        """Start the next job on memory `slot`, after a dropped job there has ended; return False without a next job."""
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
        for seconds in waits(self._timeout, self._current_images):
            if concurrent.futures.wait([future], seconds).done:
                break
        else:
            self.close()
            raise too_late('the data-loading workers', self._timeout, self._current_images())
        if isinstance(future.exception(), BrokenProcessPool):
            raise self._died()

    def _died(self) -> WorkerError:
        images, numbers, deadline = self._current_images(), set(), time.monotonic() + 1.0
        while not numbers and time.monotonic() < deadline:  # another thread may be about to read the exit status
            numbers = {-process.exitcode for process in self._processes if process.exitcode}
            time.sleep(0.01)
        self.close()
        return WorkerError(f'a data-loading worker died{images}; {_cause(numbers)}')

    def _current_images(self) -> str:
        names = [f"'{self._describe(memory.current)}'" for memory in self._memories if memory.current >= 0]
        return f' (images in preparation: {", ".join(names[:8])})' if names else ''

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Kill the workers, also hung ones. The garbage collection of the pool calls this too."""
        self._finalizer()


def _end(executor: concurrent.futures.Executor, processes: list) -> None:
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _cause(numbers: set[int]) -> str:
    """Return the likely cause of signals, and what to do."""
    if signal.SIGBUS in numbers:
        return 'SIGBUS: is the memory of the machine or container full?'
    crashes = numbers & {signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
    if crashes:
        name = signal.Signals(min(crashes)).name
        return f'{name}: a library crashed, probably on one of these images; check them with tools/verify_data.py.'
    return 'was it killed for lack of memory? Fewer DATA.NUM_WORKERS or a smaller DATA.PREFETCH need less.'


def waits(timeout: float, images: Callable[[], str]) -> Iterator[float | None]:
    """Yield the seconds of the parts of a wait for a batch; log a note on its images after the first part.

    Args:
        timeout: seconds in all; 0: no limit.
        images: describes the images in preparation.
    """
    yield min(timeout, NOTICE) if timeout else NOTICE
    if not timeout or timeout > NOTICE:
        _LOG.warning('waiting for a batch since %g seconds%s', NOTICE, images())
        yield timeout - NOTICE if timeout else None


def too_late(who: str, timeout: float, images: str) -> WorkerError:
    """Return the error for a batch that did not come within DATA.TIMEOUT."""
    return WorkerError(
        f'no batch came from {who} within DATA.TIMEOUT = {timeout:g} seconds{images}; is the storage slow or hung? A larger '
        'DATA.TIMEOUT, or 0, waits longer.'
    )


class WorkerThread:
    """Runs `make(job, memory)` in a thread of this process, ahead of its caller and with a limit for a hung file system.

    The thread is a daemon: a program may end while the thread waits.

    Args:
        make: see `WorkerPool`.
        memories: one per job that is running or waits for collection.
        timeout: seconds to wait for a result; 0: no limit.
        describe: maps an index to the name of the image in messages.
    """

    def __init__(self, make: Callable, memories: list[BatchMemory], timeout: float, describe: Callable[[int], str]):
        self._memories = memories
        self._timeout = timeout
        self._describe = describe
        self._under_way: deque[BatchMemory] = deque()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(make, self._jobs, self._results), daemon=True).start()
        self.close = weakref.finalize(self, self._jobs.put, None)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[object, BatchMemory]]:
        """Return an iterator over (result, memory) of the jobs in order; its next step reuses the memory.

        Remaining jobs of an earlier call are dropped.
        """
        while self._under_way:
            self._next_result()
        jobs, free = iter(jobs), deque(self._memories)
        while True:
            while free and (job := next(jobs, None)) is not None:
                self._jobs.put((job, free[0]))
                self._under_way.append(free.popleft())
            if not self._under_way:
                return
            result, error, memory = self._next_result()
            try:
                if error is not None:
                    raise error
            finally:
                error = None  # otherwise its traceback and this frame would hold one another
            yield result, memory
            free.append(memory)

    def _next_result(self) -> tuple[object, BaseException | None, BatchMemory]:
        """Wait for the oldest job. Return its result or error, and its memory."""
        for seconds in waits(self._timeout, self._current_image):
            with contextlib.suppress(queue.Empty):
                result, error = self._results.get(timeout=seconds)
                return result, error, self._under_way.popleft()
        raise too_late('the storage', self._timeout, self._current_image())

    def _current_image(self) -> str:
        index = max(memory.current for memory in self._memories)
        return f" (image in preparation: '{self._describe(index)}')" if index >= 0 else ''


def _serve(make: Callable, jobs: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
    while (task := jobs.get()) is not None:
        try:
            results.put((make(*task), None))
        except BaseException as error:
            results.put((None, error))
        del task  # a memory that its owner has dropped


# ---------------------------------------------------------------------------------------------------- in a worker
_make: Callable
_memories: list[BatchMemory]


def _start_worker(make: Callable, memories: list[BatchMemory], parent: int) -> None:
    global _make, _memories
    _make, _memories = make, memories
    die_with_parent()
    if os.getppid() != parent:  # the parent ended before PR_SET_PDEATHSIG was set
        os._exit(1)


def _work(job: Job, slot: int):
    return _make(job, _memories[slot])

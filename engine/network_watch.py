# SPDX-License-Identifier: Apache-2.0
"""Watchdog of a rank that Paddle's launcher started, as on several machines: names the ranks that hang and ends the job.

A rank that waits in a collective cannot run Python code. So each rank has a process beside it, which reads the rank's counter
of progress from shared memory. These processes exchange the counters through the key-value store of the process group, which
rank 0 serves; a thread does so, since a store that does not answer blocks it.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from engine.heartbeat import Heartbeat, Watch
from engine.paddle_private import KeyValueStore
from utils.processes import die_with_parent, forking
from utils.signals import handle_signals

KILL_AFTER = 5.0  # seconds after SIGTERM, which a rank in a collective cannot handle


def watched_over_network(rank: int, ranks: int) -> Heartbeat:
    """Start the watchdog of this rank and return the counter that it watches. Call it before CUDA and gloo start threads."""
    heartbeat = Heartbeat(mmap.mmap(-1, 8 * ranks))
    process = os.getpid()
    sys.stdout.flush()
    with forking():
        child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            handle_signals(signal.SIG_IGN)  # it ends with its rank, which may save first
            _run(process, Exchange(rank, ranks, heartbeat))
        finally:
            os._exit(0)
    return heartbeat


class Exchange:
    """Counters of all ranks: that of this rank from its memory, the others from the store.

    Args:
        rank: this rank.
        ranks: number of ranks.
        heartbeat: the memory of this rank.
    """

    def __init__(self, rank: int, ranks: int, heartbeat: Heartbeat):
        self.rank, self._heartbeat = rank, heartbeat
        self._known, self._published = [0] * ranks, 0
        self.answered = 0.0  # time of the last answer of the store; 0: none

    def counts(self) -> list[int]:
        """Return the counters; the others are old while this rank makes progress."""
        counts = list(self._known)
        counts[self.rank] = self._heartbeat.counts()[self.rank]
        return counts

    def exchange(self, add: Callable[[str, int], int]) -> None:
        """Publish the counter of this rank, and read the others if this rank made no progress since the last call.

        Args:
            add: adds a number to that of a name in the store and returns the sum.
        """
        own = self._heartbeat.counts()[self.rank]
        stands, counts = own == self._published, list(self._known)
        add(_name(self.rank), own - self._published)
        self._published = own
        if stands:
            counts = [own if rank == self.rank else add(_name(rank), 0) for rank in range(len(counts))]
        self._known, self.answered = counts, time.monotonic()

    def keep_exchanging(self, pause: float) -> None:
        """Exchange every `pause` seconds, until the store ends with rank 0."""
        store = KeyValueStore()
        while True:
            self.exchange(store.add)
            time.sleep(pause)


def _name(rank: int) -> str:
    return f'leanvit/progress/{rank}'


def _run(process: int, exchange: Exchange) -> None:
    """Watch the rank with the id `process` until it or the job ends."""
    watch = Watch(exchange)
    pause = min(max(watch.limit / 30, 0.1), 10.0)
    threading.excepthook = lambda _: None  # the store ended
    threading.Thread(target=exchange.keep_exchanging, args=(pause,), daemon=True).start()
    while os.getppid() == process:
        time.sleep(pause)
        problem = problem_of(watch, exchange, watch.limit / 2)
        if problem:
            os.write(2, f'error: {problem}\n'.encode())
            os.kill(process, signal.SIGTERM)
            time.sleep(KILL_AFTER)
            if os.getppid() == process:
                os.kill(process, signal.SIGKILL)
            return


def problem_of(watch: Watch, exchange: Exchange, patience: float) -> str | None:
    """Return `Watch.problem` of the ranks; a store that has not answered for `patience` seconds means that rank 0 hangs or ended.

    None while the store has never answered: nothing is known of the other ranks.
    """
    problem = watch.problem()
    if not problem or not exchange.answered:
        return None
    if time.monotonic() - exchange.answered < patience:
        return problem
    return (
        f'rank 0 does not answer, and rank {exchange.rank} has made no progress for {watch.limit:g} s: rank 0 hangs or has ended; '
        'see the log of each rank, and resume the run.'
    )

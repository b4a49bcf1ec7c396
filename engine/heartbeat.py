# SPDX-License-Identifier: Apache-2.0
"""Watchdog of the launcher: finds ranks of this machine that hang, for instance in an NCCL collective.

For several machines see `engine.network_watch`.

A rank that waits in a collective cannot run Python code, so the ranks count their progress in a shared file, and the launcher
watches it.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Protocol

FILE = 'LEANVIT_HEARTBEAT'  # environment variable with the path of the file
_LIMIT = 'PADDLE_PG_TIMEOUT'  # Paddle's limit for a collective, milliseconds
_DEFAULT_LIMIT = 30 * 60 * 1000


class Counters(Protocol):
    """Progress counters of ranks."""

    def counts(self) -> list[int]:
        """Return the counter of each rank."""


class Heartbeat:
    """Progress counters of ranks in shared memory.

    Args:
        memory: 8 bytes per rank.
    """

    def __init__(self, memory: mmap.mmap):
        self._counts = memoryview(memory).cast('q')

    @classmethod
    def create(cls, path: str, ranks: int) -> Heartbeat:
        """Create the file with counters of 0."""
        with open(path, 'wb') as file:
            file.write(bytes(8 * ranks))
        return cls._of_file(path)

    @classmethod
    def _of_file(cls, path: str) -> Heartbeat:
        with open(path, 'r+b') as file:
            return cls(mmap.mmap(file.fileno(), 0))

    @classmethod
    def of_launcher(cls) -> Heartbeat | None:
        """Return the heartbeat that the launcher watches; None under another launcher."""
        path = os.environ.get(FILE)
        return cls._of_file(path) if path and os.path.isfile(path) else None

    def mark(self, rank: int) -> None:
        """Count one unit of progress, such as a loss that was computed."""
        self._counts[rank] += 1

    def counts(self) -> list[int]:
        return self._counts.tolist()


class Watch:
    """Finds out whether the ranks make progress, from the first progress on.

    Args:
        heartbeat: its method `counts` returns the counter of each rank.
    """

    def __init__(self, heartbeat: Counters):
        # Shorter than Paddle's own limit, whose error does not name the rank that hangs.
        self.limit = 0.9 * int(os.environ.get(_LIMIT) or _DEFAULT_LIMIT) / 1000
        self._heartbeat = heartbeat
        self._counts, self._changed = heartbeat.counts(), time.monotonic()

    def problem(self) -> str | None:
        """Return a sentence about the ranks that hang, if no rank has made progress within the limit."""
        counts = self._heartbeat.counts()
        if counts != self._counts:
            self._counts, self._changed = counts, time.monotonic()
        if not any(counts) or time.monotonic() - self._changed < self.limit:
            return None
        late = [rank for rank, count in enumerate(counts) if count == min(counts)]
        ranks = f'rank{"s" * (len(late) > 1)} {", ".join(map(str, late))}'
        who = 'all ranks hang' if len(late) == len(counts) else f'the others wait for {ranks}'
        return (
            f'no rank has made progress for {self.limit:g} s: {who}; see the log of each rank, and resume the run. The '
            f'limit is 90 % of {_LIMIT} (milliseconds).'
        )

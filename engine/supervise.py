# SPDX-License-Identifier: Apache-2.0
"""Supervision of the ranks by the launcher: output, failures, stopped ranks, and one sentence for the whole job."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

from engine.heartbeat import Watch
from utils.processes import process_state
from utils.reports import ERROR, LOST, receive_reports

GRACE = 30.0  # seconds for a process to finish its step and save, as under Paddle's launcher
AFTER_FAILURE = 5.0  # seconds for the other ranks to end after one failed
AFTER_LOSS = 1.0  # seconds for a rank to report an error after the other ranks have lost it
POLL = 0.05  # seconds
_HELD = 1.0  # seconds until output is relayed; output of a failing rank is dropped if a sentence explains the failure
_GLOO = b'gloo::'  # gloo aborts a process in a collective if another one ended, or did not answer for 30 s
_GLOO_TIMEOUT = b'gloo::TimeoutException'
_TICK = 1.0  # most seconds between two looks that count; more have passed while the launcher itself was stopped

_HINTS = {
    signal.SIGKILL: '; was it for lack of memory?',
    signal.SIGBUS: '; was a memory-mapped file (LMDB) cut off, or is /dev/shm full?',
}


@dataclass(eq=False)
class Worker:
    """A rank.

    Attributes:
        rank: of the process.
        process: the process, a leader of its session.
        output: read end of the pipe that is its handle 2, for what C++ code writes.
        stopped: seconds that it has been stopped, as by SIGSTOP.
        held: (time, bytes) of output that is not relayed yet.
        sent: signals that this launcher sent it.
    """

    rank: int
    process: subprocess.Popen
    output: int
    stopped: float = 0.0
    held: list[tuple[float, bytes]] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        if self.runs:
            self.sent.add(number)
            self.process.send_signal(number)

    def look(self, seconds: float) -> None:
        """Read the output and update `stopped`; `seconds` have passed since the last look."""
        with contextlib.suppress(OSError):  # nothing to read
            while data := os.read(self.output, 65536):
                self.held.append((time.monotonic(), data))
        is_stopped = self.runs and process_state(self.process.pid) == 'T'
        self.stopped = self.stopped + min(seconds, _TICK) if is_stopped else 0.0

    def relay(self, age: float) -> None:
        """Write output that is at least `age` seconds old to standard error."""
        while self.held and time.monotonic() - self.held[0][0] >= age:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), self.held.pop(0)[1])

    def wrote(self, text: bytes) -> bool:
        """Return True if output that is not relayed yet contains `text`."""
        return text in b''.join(data for _, data in self.held)

    @property
    def killed_by(self) -> int:
        """The signal that ended it; 0: none, or one that this launcher sent."""
        number = -(self.process.returncode or 0)
        return number if number > 0 and number not in self.sent else 0

    @property
    def in_gloo(self) -> bool:
        """True if gloo aborted it, for what happened to another rank."""
        return self.killed_by == signal.SIGABRT and self.wrote(_GLOO)


class Supervisor:
    """Waits for the ranks and ends all of them when one fails.

    Args:
        workers: the ranks.
        received: signals that the launcher has received and forwarded, in order; it grows.
        reports: socket with the reports of the ranks.
        watch: finds ranks that run, but make no progress.
        limit: seconds that the other ranks wait for a stopped one; 0: no limit.
    """

    def __init__(self, workers: list[Worker], received: list[int], reports: socket.socket, watch: Watch, limit: float):
        self.workers = workers
        self.received = received
        self.reports = reports
        self.watch = watch
        self.limit = limit
        self.status: int | None = None  # of the first rank that reported an error
        self.lost, self.losers = '', set()  # the first report of a lost connection; the ranks that reported one
        self.failed: list[Worker] = []  # ranks that failed first
        self.stopped: list[Worker] = []  # ranks that were stopped at that time
        self.running: list[Worker] = []

    def run(self) -> int:
        """Return the exit status: 0, 128 + n after signal n, else 1 or that of the first rank that reported an error."""
        kill_at, terminate_at, last = None, None, time.monotonic()
        while any(worker.runs for worker in self.workers):
            time.sleep(POLL)
            now = time.monotonic()
            self._look(now - last)
            last = now
            if kill_at is None and (self._has_failed() or self.received):
                kill_at = now + (GRACE if self.received else AFTER_FAILURE)
                if not self.received:  # the other ranks wait for the failed one in a collective, or fail there
                    terminate_at = now + (AFTER_LOSS if self._lacks_cause() else 0.0)
            if terminate_at is not None and now >= terminate_at:
                terminate_at = None
                self._send(signal.SIGTERM)
            if kill_at is not None and now > kill_at:
                self._send(signal.SIGKILL)
        self._look(0.0)
        return self._end()

    def _look(self, seconds: float) -> None:
        for worker in self.workers:
            worker.look(seconds)
        for report in receive_reports(self.reports):
            if report['kind'] == LOST:
                self.lost = self.lost or report['text']
                self.losers.add(int(report['rank']))
            elif report['kind'] == ERROR and self.status is None:
                self.status = report['status']
                print(report['text'], file=sys.stderr, flush=True)
        if self.status is None and not any(worker.process.returncode for worker in self.workers):
            for worker in self.workers:
                worker.relay(_HELD)

    def _has_failed(self) -> bool:
        """Return True if a rank failed, and keep the state of all ranks at that time."""
        self.failed = [worker for worker in self.workers if worker.process.returncode]
        self.stopped = [worker for worker in self.workers if worker.stopped]
        self.running = [worker for worker in self.workers if worker.runs and not worker.stopped]
        problem = self.watch.problem() if self.status is None and not self.failed else None
        if problem:
            self.status = 1
            print(f'error: {problem}', file=sys.stderr, flush=True)
        return bool(
            problem or self.failed or self.limit and any(worker.stopped >= self.limit for worker in self.stopped)
        )

    def _lacks_cause(self) -> bool:
        """Return True if the failed ranks lost another one, which may report its own error in a moment."""
        known = self.status is not None or self.stopped
        return not known and all(worker.in_gloo or worker.rank in self.losers for worker in self.failed)

    def _send(self, number: int) -> None:
        for worker in self.workers:
            worker.send(number if not worker.stopped else signal.SIGKILL)

    # ------------------------------------------------------------------------------------------------ the verdict
    def _end(self) -> int:
        if self.received:
            return 128 + self.received[0]
        if self.status is not None:
            return self.status or 1
        if all(worker.process.returncode == 0 for worker in self.workers):
            for worker in self.workers:
                worker.relay(0.0)
            return 0
        sentence = self._sentence()
        if sentence:
            print(f'error: {sentence}', file=sys.stderr, flush=True)
            return 1
        for worker in self.failed:
            worker.relay(0.0)
        return max(1, *(worker.process.returncode for worker in self.failed[:1]))

    def _sentence(self) -> str:
        """Return what happened to the job, where no rank reported an error; '' if nothing is known."""
        if self.stopped:
            return (
                f'{self._names(self.stopped)} stopped, as by SIGSTOP, and the other processes waited for it; {_AGAIN}'
            )
        killed = [worker for worker in self.workers if worker.killed_by]
        in_gloo = [worker for worker in killed if worker.in_gloo]
        crashed = [worker for worker in killed if worker not in in_gloo and worker.rank not in self.losers]
        if crashed:
            crashed[0].relay(0.0)
            number = crashed[0].killed_by
            return f'{self._names(crashed[:1])} ended by {_name(number)}{_HINTS.get(number, ";")} {_AGAIN}'
        timed_out = [worker for worker in in_gloo if worker.wrote(_GLOO_TIMEOUT)]
        if timed_out:
            silent = [worker for worker in self.running if worker not in in_gloo] or timed_out
            return (
                f'{self._names(silent)} busy elsewhere while another process waited 30 s for it in a collective; is the '
                f'storage slow or hung? {_AGAIN}'
            )
        silent = [worker for worker in self.running if worker.rank not in self.losers]
        more = f'; {self._names(silent)} running and did not answer.' if silent and self.lost else ''
        return self.lost.partition('error: ')[2].rstrip('.') + (more or '.' * bool(self.lost))

    def _names(self, workers: list[Worker]) -> str:
        names = ', '.join(f'{worker.rank} (process id {worker.process.pid})' for worker in workers[:8])
        count = len(self.workers)
        return f'process {names} of {count} was' if len(workers) == 1 else f'processes {names} of {count} were'


_AGAIN = 'start the run again, -resume continues from its last save.'


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f'signal {number}'

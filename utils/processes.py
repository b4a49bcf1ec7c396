# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, calls in a subprocess that may crash, and memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from utils.errors import UserError
from utils.signals import SIGNALS, handle_signals

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Limits of a function in a subprocess: bytes, a thousand times the largest MATLAB file of a data set, and processor time.
MEMORY = 1 << 30
SECONDS = 15
_EXIT, _GRACE = 20.0, 5.0  # seconds in which a `Worker` exits by itself, and after SIGTERM, before it is killed


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send signal `number` to this child process when its parent ends for any reason (Linux only)."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Fork worker processes in this block, also beside threads and after CUDA has started.

    The garbage collector of a child must not free a GPU tensor, since CUDA does not work there. Therefore all objects that
    exist at the fork are frozen: the child keeps them until it ends.
    """
    with warnings.catch_warnings():
        # Python warns of a fork beside threads; children must use no lock that another thread may hold.
        warnings.simplefilter('ignore', DeprecationWarning)
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


# ---------------------------------------------------------------------------------------------------- guard
class Guard:
    """A process that ends other processes when this one was killed, also those that are stopped and get no signal.

    Args:
        grace: seconds in which they may end by themselves; stopped ones are killed earlier.
    """

    def __init__(self, grace: float):
        reader, self._writer = os.pipe()
        with forking():
            self._process = os.fork()
        if self._process == 0:
            _guard(reader, self._writer, grace)
        os.close(reader)

    def watch(self, process: int) -> None:
        """Guard the child `process`."""
        os.write(self._writer, f'{process} {_start_time(process)}\n'.encode())

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error) -> None:
        """End the guard; all processes have ended."""
        with contextlib.suppress(OSError):
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._writer)


_STOPPED_GRACE = 2.0  # seconds


def _guard(reader: int, writer: int, grace: float) -> None:
    """Wait until the parent has ended, then for its children, and kill those that are left. Does not return."""
    try:
        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.close(writer)
        null = os.open(os.devnull, os.O_RDWR)
        for handle in range(3):  # a reader of a pipe does not wait for this process
            os.dup2(null, handle)
        text = b''
        while data := os.read(reader, 4096):
            text += data
        children = [tuple(line.split()) for line in text.decode().splitlines()]
        ended, last = time.monotonic(), [(int(process), start) for process, start in children]
        while last := [(process, start) for process, start in last if _start_time(process) == start]:
            waited = time.monotonic() - ended
            for process, _ in last:
                if waited > grace or waited > _STOPPED_GRACE and process_state(process) == 'T':
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.2)
    finally:
        os._exit(0)


def process_state(process: int) -> str:
    """Return the state letter of a process, such as 'T' if it is stopped; '' if it has ended or the system is not Linux."""
    return _stat_field(process, 0)


def resident_memory(field: str) -> int | None:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process in bytes; None without /proc."""
    try:
        with open('/proc/self/status', encoding='ascii') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ':'))
    except OSError:
        return None


def _start_time(process: int) -> str:
    """Start time of a process, which distinguishes it from a later one of the same number; '' if it has ended."""
    return '' if _stat_field(process, 0) in 'ZX' else _stat_field(process, 19)


def _stat_field(process: int, field: int) -> str:
    """Return a field after the name in /proc/PID/stat (proc_pid_stat(5)), or ''."""
    try:
        with open(f'/proc/{process}/stat', encoding='ascii', errors='replace') as file:
            return file.read().rpartition(')')[2].split()[field]
    except (OSError, IndexError):
        return ''


# ---------------------------------------------------------------------------------------------------- subprocesses
def run_in_subprocess(function: Callable, *args: Any) -> Any:
    """Run a function that may crash or never end in a subprocess, limited to MEMORY and SECONDS, and return its result.

    Raises:
        Exception: any exception of the function, such as MemoryError.
        BrokenProcessPool: the subprocess crashed, or used SECONDS of processor time.
    """
    forks = 'fork' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('fork' if forks else None)
    with forking(), ProcessPoolExecutor(1, context, initializer=_crash_silently) as executor:
        return executor.submit(function, *args).result()


def _crash_silently() -> None:
    """Reset the signal handlers, so that Paddle and faulthandler print no report of a crash."""
    die_with_parent()
    for number in (signal.SIGSEGV, signal.SIGXCPU, *SIGNALS):
        signal.signal(number, signal.SIG_DFL)
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + SECONDS)


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _address_space() -> int:
    """Bytes of virtual memory of this process."""
    try:
        with open('/proc/self/statm', encoding='ascii') as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # elsewhere than on Linux
        return 1 << 40


class WorkerDied(Exception):
    """A `Worker` ended during a call; the text says how."""


class Worker:
    """A subprocess that calls functions, one at a time. A new one follows a crash or an unexpected exception.

    Unlike `run_in_subprocess` it is spawned, so that it may use a GPU and start processes of its own. It ends with this
    process, and with the block of `with`.
    """

    def __init__(self):
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable, *args: Any) -> Any:
        """Call a function that can be imported.

        Raises:
            UserError: of the function.
            WorkerDied: any other exception of the function, whose traceback is printed, or the process crashed.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, args))
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerDied(self._end()) from None
        if kind == 'result':
            return value
        if kind == 'error':
            raise UserError(value)
        self._end()  # the device may be in a state that fails again
        raise WorkerDied(value)

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def _end(self) -> str:
        """End the process if it runs, and return how it ended before."""
        process, self._process = self._process, None
        if process is None:
            return ''
        status = process.exitcode
        process.terminate()
        process.join(_GRACE)
        process.kill()
        process.join()
        self._pipe.close()
        if status == -signal.SIGKILL:
            return 'the process was killed, as the system does when memory runs out'
        return (
            f'the process ended with signal {-status}' if status and status < 0 else f'the process exited with {status}'
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind, *error) -> None:
        if self._process is not None and kind is None:
            self._pipe.close()  # so that the process ends by itself
            self._process.join(_EXIT)
        self._end()


def _serve(pipe: Connection) -> None:
    """Answer the calls of a `Worker`; signals of a terminal go to its owner, which ends this process."""
    die_with_parent()
    handle_signals(lambda number, _: sys.exit(128 + number))  # frees semaphores, unlike the default
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = 'result', function(*args)
        except UserError as error:
            answer = 'error', str(error)
        except Exception as error:
            traceback.print_exc()
            answer = 'exception', f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
        pipe.send(answer)

# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, and calls in a subprocess that may crash."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from utils.cli import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Limits of a function in a subprocess: bytes, a thousand times the largest MATLAB file of a data set, and processor time.
MEMORY = 1 << 30
SECONDS = 15


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

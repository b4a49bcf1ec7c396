# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, and calls in a subprocess that may crash."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from utils.cli import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
MEMORY = (
    1 << 30
)  # bytes that a function of `run_in_subprocess` may take: a thousand times the largest MATLAB file that is read
SECONDS = 15  # of processor time


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send signal `number` to this child process when its parent ends for any reason (Linux only)."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def run_in_subprocess(function: Callable, *args: Any) -> Any:
    """Run a function that may crash or never end in a subprocess, limited to MEMORY and SECONDS, and return its result.

    Raises:
        Exception: any exception of the function, such as MemoryError.
        BrokenProcessPool: the subprocess crashed, or used SECONDS of processor time.
    """
    forks = 'fork' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('fork' if forks else None)
    with warnings.catch_warnings(), ProcessPoolExecutor(1, context, initializer=_crash_silently) as executor:
        # Python warns of a fork beside threads; the function must use no lock that another thread may hold.
        warnings.simplefilter('ignore', DeprecationWarning)
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

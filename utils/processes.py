# SPDX-License-Identifier: Apache-2.0
"""Child processes: none outlives its parent, and one may crash."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from utils.cli import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it signal `number` when its parent is gone, however it went (Linux only)."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def run_apart(function: Callable, *args: Any) -> Any:
    """What a function returns that may crash: it runs in a process of its own.

    Raises:
        Exception: what the function raises; BrokenProcessPool when its process died.
    """
    forks = 'fork' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('fork' if forks else None)
    with warnings.catch_warnings(), ProcessPoolExecutor(1, context, initializer=_crash_silently) as executor:
        # Python warns of forking beside threads; the function must use nothing that those could hold.
        warnings.simplefilter('ignore', DeprecationWarning)
        return executor.submit(function, *args).result()


def _crash_silently() -> None:
    """Without the report that Paddle or faulthandler would write of it."""
    die_with_parent()
    for number in (signal.SIGSEGV, *SIGNALS):
        signal.signal(number, signal.SIG_DFL)

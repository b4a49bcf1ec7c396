# SPDX-License-Identifier: Apache-2.0
"""Child processes that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it signal `number` when its parent is gone, however it went (Linux only)."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))

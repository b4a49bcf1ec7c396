# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, SIGINT and SIGHUP as a polite question: the loop finishes its step, saves and leaves."""

from __future__ import annotations

import os
import signal

from utils.cli import handle_signals


class StopSignal:
    """Remembers that SIGTERM, SIGINT or SIGHUP came.

    Paddle's launcher sends SIGTERM three times, 0.2 s apart, so only SIGINT typed a second time ends the process at once.
    """

    def __init__(self):
        self.number: int | None = None
        handle_signals(self._handle)

    def _handle(self, number: int, _frame) -> None:
        if self.number == signal.SIGINT == number:
            os._exit(128 + number)
        self.number = self.number or number

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def exit_status(self) -> int:
        """128 + n, as a shell reports a process that signal n ended."""
        return 128 + (self.number or signal.SIGTERM)

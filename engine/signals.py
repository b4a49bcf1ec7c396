# SPDX-License-Identifier: Apache-2.0
"""Graceful stop on SIGTERM, SIGINT and SIGHUP: the training loop finishes its step, saves and exits."""

from __future__ import annotations

import os
import signal

from utils.cli import handle_signals


class StopSignal:
    """True after SIGTERM, SIGINT or SIGHUP.

    Only a second SIGINT ends the process at once, since Paddle's launcher sends SIGTERM three times, 0.2 s apart.
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

# SPDX-License-Identifier: Apache-2.0
"""Graceful stop on a signal or where a log cannot be written: the training loop finishes its step, saves and exits."""

from __future__ import annotations

import os
import signal

from utils.errors import UserError
from utils.signals import handle_signals


class StopSignal:
    """True after SIGTERM, SIGINT or SIGHUP, or after an error that lets the run finish its step and save.

    Only a second SIGINT ends the process at once, since Paddle's launcher sends SIGTERM three times, 0.2 s apart.

    Attributes:
        number: of the first signal.
        error: of a log file that cannot be written.
    """

    def __init__(self):
        self.number: int | None = None
        self.error: UserError | None = None
        handle_signals(self._handle)

    def _handle(self, number: int, _frame) -> None:
        if self.number == signal.SIGINT == number:
            os._exit(128 + number)
        self.number = self.number or number

    def fail(self, error: UserError) -> None:
        """Stop for an error; the first one counts."""
        self.error = self.error or error

    def __bool__(self) -> bool:
        return self.number is not None or self.error is not None

    def end(self) -> None:
        """Raise the error, else SystemExit with 128 + n, as a shell reports a process that signal n ended."""
        if self.error is not None:
            raise self.error
        raise SystemExit(128 + (self.number or signal.SIGTERM))

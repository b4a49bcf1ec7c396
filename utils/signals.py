# SPDX-License-Identifier: Apache-2.0
"""The signals that end a command. Standard library only, syntax of Python 3.6 (see utils/cli.py)."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a terminal that is closed


def handle_signals(handler) -> None:
    """Install a handler of `SIGNALS`; keep SIGHUP ignored under nohup."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

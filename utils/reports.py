# SPDX-License-Identifier: Apache-2.0
"""What a rank reports to the launcher that started it, so that of many failures only the first one is printed.

Standard library only, syntax of Python 3.6, see `utils.cli`.
"""

import json
import os
import socket

# Variables that pass handles to the ranks, as handle:device:inode. One of another job names another file, and is ignored.
REPORTS = 'LEANVIT_REPORTS'  # socket to the launcher
CONSOLE = 'LEANVIT_CONSOLE'  # standard error of the launcher; handle 2 of a rank is a pipe to the launcher

ERROR = 'error'  # the rank failed
LOST = 'lost'  # the rank failed because another one did not answer
_LONGEST = 30000  # characters of a text


def describe_handle(handle: int) -> str:
    """Return the value of a variable that passes an open handle."""
    found = os.fstat(handle)
    return f'{handle}:{found.st_dev}:{found.st_ino}'


def inherited_handle(name: str) -> 'int | None':
    """Return the handle that the variable `name` passes; None if there is none, or if it is of another job."""
    text = os.environ.get(name, '')
    try:
        handle = int(text.partition(':')[0])
        return handle if describe_handle(handle) == text else None
    except (OSError, ValueError):
        return None


def send_report(kind: str, status: int, text: str) -> bool:
    """Report a failure to the launcher.

    Args:
        kind: ERROR or LOST.
        status: exit status.
        text: what the launcher prints if this is the first report.

    Returns:
        False if no launcher receives reports.
    """
    handle = inherited_handle(REPORTS)
    if handle is None:
        return False
    report = {'kind': kind, 'rank': os.environ.get('PADDLE_TRAINER_ID', '0'), 'status': status, 'text': text[:_LONGEST]}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, fileno=os.dup(handle)) as connection:
            connection.send(json.dumps(report).encode())
    except OSError:  # the launcher was killed
        return False
    return True


def receive_reports(connection: socket.socket) -> 'list':
    """Return the reports that have arrived at the launcher's end of the socket, which does not block."""
    reports = []
    while True:
        try:
            reports.append(json.loads(connection.recv(8 * _LONGEST).decode()))
        except ValueError:
            continue
        except OSError:
            return reports

# SPDX-License-Identifier: Apache-2.0
"""How a launcher or tool ends: a user's mistake is one sentence and a non-zero status, never a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from utils.errors import UserError

USER_ERROR = 2  # exit status, as argparse's


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with the status it returns; UserError is printed and gives status 2.

    Of several processes that a launcher started, the first to fail speaks; what the others meet then is its consequence.
    """
    try:
        status = main()
    except UserError as error:
        if _is_first():
            print(f'error: {error}', file=sys.stderr)
        status = USER_ERROR
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception:
        if _is_first():
            traceback.print_exc()
        status = 1
    _exit(status or 0)


def _is_first() -> bool:
    """Whether no other process of this job has failed before; always so where no launcher made a place to say it."""
    latch = os.environ.get('LEANVIT_FIRST_ERROR')
    if latch is None:
        return True
    try:
        os.close(os.open(latch, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


def _exit(status: int) -> None:
    """Leaves at once: with a process group whose peers are gone, Paddle's own shutdown may wait for them for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    if 'PADDLE_TRAINER_ID' in os.environ:
        os._exit(status)
    sys.exit(status)
